"""Training: supervised fine-tuning and PPO of any Hugging Face causal LM, and their evaluation.

The public names are imported on first use: the settings, which the command line reads for --help, need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlspec.train.callbacks import Callback as Callback
    from rlspec.train.callbacks import StepState as StepState
    from rlspec.train.checkpoint import save_checkpoint as save_checkpoint
    from rlspec.train.config import PPOConfig as PPOConfig
    from rlspec.train.config import SFTConfig as SFTConfig
    from rlspec.train.evaluation import EvalResult as EvalResult
    from rlspec.train.evaluation import evaluate as evaluate
    from rlspec.train.kl import KLProbe as KLProbe
    from rlspec.train.loop import TrainResult as TrainResult
    from rlspec.train.ppo import train_ppo as train_ppo
    from rlspec.train.sft import train_sft as train_sft
    from rlspec.train.state import ResumePoint as ResumePoint
    from rlspec.train.state import read_resume_point as read_resume_point

_MODULES = {
    "Callback": "callbacks",
    "EvalResult": "evaluation",
    "KLProbe": "kl",
    "PPOConfig": "config",
    "ResumePoint": "state",
    "SFTConfig": "config",
    "StepState": "callbacks",
    "TrainResult": "loop",
    "evaluate": "evaluation",
    "read_resume_point": "state",
    "save_checkpoint": "checkpoint",
    "train_ppo": "ppo",
    "train_sft": "sft",
}

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


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
