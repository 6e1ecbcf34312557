"""Settings of the two training stages. Checked when made, frozen afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlspec.errors import OptionError

Dtype = Literal["auto", "float32", "bf16"]


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise OptionError(f"{name} is {value!r}; it must be {wanted}")


def _require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    _require(value in choices, name, value, "one of " + ", ".join(choices))


def _require_at_least(config: object, least: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        _require(whole and value >= least, name, value, f"a whole number, at least {least}")


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        _require(0 < getattr(config, name) < float("inf"), name, getattr(config, name), "positive")


def _require_share(config: object, *names: str) -> None:
    for name in names:
        _require(0 <= getattr(config, name) <= 1, name, getattr(config, name), "between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Supervised fine-tuning. The defaults suit the embedded model; :meth:`paper` gives the paper's.

    Raises:
        OptionError: a value is out of range.
    """

    steps: int = 640
    batch_size: int = 64
    micro_batch_size: int = 64  # examples of one forward pass; the split changes rounding only
    learning_rate: float = 3e-4
    weight_decay: float = 0.0
    warmup_ratio: float = 0.3  # slow at first, so that the early rise of OOD accuracy can be seen
    schedule: Literal["cosine", "constant"] = "cosine"
    # dft (arXiv 2508.05629) weighs a token's loss by its own probability, so that it learns least from what it would
    # never have said.
    loss: Literal["cross_entropy", "dft"] = "cross_entropy"
    kl_coef: float = 0.0  # added per nat of KL(model || reference) and answer token
    max_grad_norm: float = 1.0
    dtype: Dtype = "auto"  # autocast; "auto" is bf16 on CUDA, float32 elsewhere
    checkpoint_every: int = 50  # steps between resume states
    seed: int = 0

    def __post_init__(self) -> None:
        _require_at_least(self, 1, "steps", "batch_size", "micro_batch_size", "checkpoint_every")
        _require_positive(self, "learning_rate", "max_grad_norm")
        _require_share(self, "warmup_ratio")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")
        _require(0 <= self.kl_coef < float("inf"), "kl_coef", self.kl_coef, "at least 0")
        _require_choice("loss", self.loss, ("cross_entropy", "dft"))
        _require_choice("schedule", self.schedule, ("cosine", "constant"))
        _require_choice("dtype", self.dtype, ("auto", "float32", "bf16"))

    @classmethod
    def paper(cls, **changes: object) -> SFTConfig:
        """arXiv 2508.16546 on 7B–11B models: learning rate 1e-6, batch 64, cosine, 3 % warm-up, no decay."""
        settings: dict[str, object] = {
            "steps": 1100,
            "learning_rate": 1e-6,
            "warmup_ratio": 0.03,
            "micro_batch_size": 4,
        }
        return cls(**{**settings, **changes})  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Proximal policy optimisation on verified turns. The defaults suit the embedded model.

    One update plays episodes until ``turns_per_update`` turns are there (the last episodes are finished, so a
    few more), then goes over them ``epochs`` times.

    Raises:
        OptionError: a value is out of range.
    """

    updates: int = 40
    turns_per_update: int = 256
    epochs: int = 4
    mini_batch_size: int = 64  # turns of one optimizer step, about: conversations are not split
    micro_batch_size: int = 64  # conversations of one forward pass; the split changes rounding only
    level: Literal["turn", "token"] = "turn"  # an action is a whole answer (the paper), or one token
    # Against what a return is held: a learnt value (gae), or the other answers to the same problem, as many as
    # group_size, without a value head: arXiv 2402.03300 (grpo), 2402.14740 (rloo).
    advantage: Literal["gae", "grpo", "rloo"] = "gae"
    group_size: int = 8  # episodes a problem for grpo and rloo
    learning_rate: float = 5e-5
    value_learning_rate: float = 1e-3  # of the value head alone
    final_learning_rate_ratio: float = 1e-3  # where the cosine ends, as a share of each rate
    weight_decay: float = 0.0
    gamma: float = 0.9  # discount from turn to turn
    lam: float = 0.95
    clip: float = 0.1
    value_clip: float = 0.5
    value_coef: float = 0.5
    kl_coef: float = 0.0  # reward taken off per nat of log(policy / reference)
    temperature: float = 1.0
    top_p: float = 1.0
    max_grad_norm: float = 1.0
    rollout_batch_size: int = 256
    dtype: Dtype = "auto"
    checkpoint_every: int = 5  # updates between resume states
    seed: int = 0

    def __post_init__(self) -> None:
        _require_at_least(self, 1, "updates", "turns_per_update", "epochs", "mini_batch_size")
        _require_at_least(self, 1, "micro_batch_size", "rollout_batch_size", "checkpoint_every")
        _require_positive(self, "learning_rate", "value_learning_rate", "clip", "value_clip", "temperature")
        _require_positive(self, "max_grad_norm", "top_p")
        _require_share(self, "gamma", "lam", "top_p", "final_learning_rate_ratio")
        for name in ("weight_decay", "value_coef", "kl_coef"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        _require_choice("level", self.level, ("turn", "token"))
        _require_choice("advantage", self.advantage, ("gae", "grpo", "rloo"))
        _require_at_least(self, 2, "group_size")
        _require_choice("dtype", self.dtype, ("auto", "float32", "bf16"))

    @classmethod
    def paper(cls, **changes: object) -> PPOConfig:
        """The paper's public settings for 7B–11B models: 1e-6 falling to 1e-9, one rate for policy and value
        head, one clip of 0.1 for both, gradient norm 0.01, no KL term.
        """
        settings: dict[str, object] = {
            "learning_rate": 1e-6,
            "value_learning_rate": 1e-6,
            "value_clip": 0.1,
            "max_grad_norm": 0.01,
            "mini_batch_size": 128,
            "micro_batch_size": 2,
            "rollout_batch_size": 64,
        }
        return cls(**{**settings, **changes})  # type: ignore[arg-type]
