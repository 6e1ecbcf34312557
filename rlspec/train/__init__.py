"""Training: supervised fine-tuning and PPO of any Hugging Face causal LM, and their evaluation."""

from __future__ import annotations

from rlspec.train.callbacks import Callback, StepState
from rlspec.train.checkpoint import save_checkpoint
from rlspec.train.config import PPOConfig, SFTConfig
from rlspec.train.evaluate import EvalResult, evaluate
from rlspec.train.kl import KLProbe
from rlspec.train.loop import TrainResult
from rlspec.train.ppo import train_ppo
from rlspec.train.sft import train_sft
from rlspec.train.state import ResumePoint, read_resume_point

__all__ = [
    "Callback",
    "EvalResult",
    "KLProbe",
    "PPOConfig",
    "ResumePoint",
    "SFTConfig",
    "StepState",
    "TrainResult",
    "evaluate",
    "read_resume_point",
    "save_checkpoint",
    "train_ppo",
    "train_sft",
]
