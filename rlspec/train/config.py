"""Settings of the two training stages. Checked when made, frozen afterwards. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlspec.errors import OptionError
from rlspec.settings import setting

Dtype = Literal["auto", "float32", "bf16"]


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise OptionError(f"{name}={value!r} must be {wanted}")


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

    steps: int = setting(640, "Optimizer steps.")
    batch_size: int = setting(64, "Examples per step.")
    micro_batch_size: int = setting(64, "Examples of one forward pass; the split changes rounding only.")
    learning_rate: float = setting(3e-4, "Peak learning rate.")
    weight_decay: float = setting(0.0, "Weight decay of AdamW.", fine=True)
    # Slow at first, so that the early rise of OOD accuracy can be seen.
    warmup_ratio: float = setting(0.3, "Share of the steps that the learning rate rises over.", fine=True)
    schedule: Literal["cosine", "constant"] = setting(
        "cosine", "After the rise: cosine, which ends at 0, or constant.", fine=True
    )
    # dft (arXiv 2508.05629) weighs a token's loss by its own probability, so that it learns least from what it would
    # never have said.
    loss: Literal["cross_entropy", "dft"] = setting(
        "cross_entropy",
        "Of a token: cross_entropy, or dft, which weighs it by the token's probability.",
        fine=True,
    )
    kl_coef: float = setting(0.0, "Added per nat of KL(model || start) and answer token.", fine=True)
    max_grad_norm: float = setting(1.0, "Gradients are clipped to this norm.", fine=True)
    dtype: Dtype = setting("auto", "Autocast: auto (bf16 on CUDA, float32 elsewhere), float32 or bf16.")
    checkpoint_every: int = setting(50, "Steps between resume states.")
    seed: int = setting(0, "Seed of the data.")

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

    updates: int = setting(40, "Updates, one batch of rollouts each.")
    turns_per_update: int = setting(256, "Answers sampled per update.")
    epochs: int = setting(4, "Times that an update goes over its answers.", fine=True)
    mini_batch_size: int = setting(
        64, "Answers of one optimizer step, about: conversations are not split.", fine=True
    )
    micro_batch_size: int = setting(64, "Conversations of one forward pass; the split changes rounding only.")
    level: Literal["turn", "token"] = setting(
        "turn", "What an action is: a whole answer, turn (as in the paper), or one token.", fine=True
    )
    # grpo: arXiv 2402.03300; rloo: arXiv 2402.14740.
    advantage: Literal["gae", "grpo", "rloo"] = setting(
        "gae",
        "What a return is held against: a learnt value (gae), or the other answers to the same problem, without "
        "a value head (grpo, rloo).",
    )
    group_size: int = setting(8, "Episodes per problem for grpo and rloo.")
    learning_rate: float = setting(5e-5, "Peak learning rate.")
    value_learning_rate: float = setting(1e-3, "Learning rate of the value head.", fine=True)
    final_learning_rate_ratio: float = setting(
        1e-3, "Where the cosine ends, as a share of each rate.", fine=True
    )
    weight_decay: float = setting(0.0, "Weight decay of AdamW.", fine=True)
    gamma: float = setting(0.9, "Discount from turn to turn.", fine=True)
    lam: float = setting(0.95, "Lambda of GAE.", fine=True)
    clip: float = setting(0.1, "How far an answer's probability ratio may count from 1.", fine=True)
    value_clip: float = setting(0.5, "How far a value may count from the one at sampling.", fine=True)
    value_coef: float = setting(0.5, "Weight of the value loss.", fine=True)
    kl_coef: float = setting(
        0.0,
        "Reward taken off per nat of log(policy / reference), the weights that PPO starts from.",
        fine=True,
    )
    temperature: float = setting(1.0, "Temperature of sampling.", fine=True)
    top_p: float = setting(1.0, "Share of the probability that tokens are sampled from.", fine=True)
    max_grad_norm: float = setting(1.0, "Gradients are clipped to this norm.", fine=True)
    rollout_batch_size: int = setting(256, "Episodes played side by side.", fine=True)
    dtype: Dtype = setting("auto", "Autocast: auto (bf16 on CUDA, float32 elsewhere), float32 or bf16.")
    checkpoint_every: int = setting(5, "Updates between resume states.")
    seed: int = setting(0, "Seed of problems and sampling.")

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
