"""Repair of anybody's model: which restoration wins the most back for the least of what tuning gave."""

from rlspec.study.repair.command import CommandScores
from rlspec.study.repair.losses import LossScores
from rlspec.study.repair.search import Found, search

__all__ = ["CommandScores", "Found", "LossScores", "search"]
