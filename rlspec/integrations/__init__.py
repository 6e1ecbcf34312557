"""Tracking inside trainers that are not rlspec's own. Nothing of theirs is imported here."""
