"""The plans that come with rlspec, as cells."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlspec.models import EMBEDDED
from rlspec.settings import setting
from rlspec.study.cells import Cell, Study


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """What a user may choose of a plan."""

    model: str = setting(
        "embedded",
        "A Hugging Face folder in the place of the model that comes with rlspec, whose settings stay; on the CPU.",
    )
    seeds: str = setting("0", "Seeds, as in 0,1,2; more may be added later.")
    quick: bool = setting(False, "A smaller grid, for a first look: within 10 minutes on 2 cores.")
    deals: int = setting(234, "Evaluation problems per shift, on which results are reported.")
    sft_steps: int = setting(300, "SFT optimizer steps.")
    batch_size: int = setting(32, "SFT examples per step.")
    learning_rate: float = setting(1.25e-4, "SFT learning rate.")
    ppo_updates: int = setting(20, "PPO updates.")
    turns_per_update: int = setting(256, "Answers sampled per PPO update.")
    ppo_learning_rate: float = setting(1e-4, "PPO learning rate.")
    turns: int = setting(5, "Verification turns per evaluation episode.")


class _Builder:
    """Collects the cells of one seed."""

    def __init__(self, options: StudyOptions, seed: int, *, selection: int) -> None:
        self.options, self.seed = options, seed
        self.cells: list[Cell] = []
        self.shared: dict[str, Any] = {
            "model": EMBEDDED if options.model == EMBEDDED else os.path.abspath(options.model),
            "task": "general_points",
            "turns": options.turns,
            "seed": seed,
            "deals": options.deals,
            "selection": selection,
            "shifts": ["none", "both"],
            "rank": 0.2,
            "modules": "q,k,v",
        }

    def _add(self, cell: Cell) -> str:
        self.cells.append(cell)
        return cell.digest

    def sft(self, keep: Sequence[int], *, many_rules: bool = False, **changes: Any) -> str:
        o = self.options
        sft = {
            "steps": o.sft_steps,
            "batch_size": o.batch_size,
            "learning_rate": o.learning_rate,
            "dtype": "float32",
            "checkpoint_every": 25,
            "seed": self.seed,
            **changes,
        }
        settings = {**self.shared, "sft": sft, "keep": list(keep), "many_rules": many_rules}
        return self._add(Cell("sft", settings, labels={"seed": self.seed}))

    def measure(self, parent: str | None, step: int | None, *, full: bool, **labels: Any) -> None:
        labels = {"seed": self.seed, "what": "sft" if parent else "base", "sft_step": step or 0, **labels}
        self._add(Cell("measure", {**self.shared, "full": full}, parent, step, labels))

    def ppo(self, parent: str, step: int) -> None:
        o = self.options
        ppo = {
            "updates": o.ppo_updates,
            "turns_per_update": o.turns_per_update,
            "learning_rate": o.ppo_learning_rate,
            "dtype": "float32",
            "checkpoint_every": 5,
            "seed": self.seed,
        }
        labels = {"seed": self.seed, "what": "ppo", "sft_step": step}
        self._add(Cell("ppo", {**self.shared, "ppo": ppo}, parent, step, labels))

    def restore(self, parent: str, step: int, kind: str, **changes: Any) -> None:
        restore = {
            "kind": kind,
            "rank": 0.2,
            "part": "top",
            "mode": "directions",
            "modules": "q,k,v",
            "layers": None,
            "strength": 1.0,
            "shift_k": 0,
            **changes,
        }
        if kind == "line":  # which takes whole models
            restore = {"kind": kind, "strength": restore["strength"]}
        elif kind == "noise_floor":
            restore = {"kind": kind, "modules": restore["modules"], "layers": restore["layers"]}
        labels = {"seed": self.seed, "what": kind, "sft_step": step, **restore}
        del labels["kind"]
        self._add(Cell("restore", {**self.shared, "restore": restore}, parent, step, labels))


def _steps(options: StudyOptions, *shares: float) -> list[int]:
    """SFT steps at these shares of all, in order, without repeats."""
    return sorted({max(1, round(share * options.sft_steps)) for share in shares})


def _duration(options: StudyOptions, seed: int) -> list[Cell]:
    """SFT of many lengths, and PPO from each that lies past the early peak."""
    build = _Builder(options, seed, selection=0)
    early = _steps(options, 1 / 12, 1 / 8, 1 / 6, 5 / 24)
    lengths = (
        _steps(options, 1 / 3, 2 / 3, 1)
        if options.quick
        else _steps(options, 0.25, 0.3, 1 / 3, 5 / 12, 0.5, 7 / 12, 2 / 3, 5 / 6, 1)
    )
    trunk = build.sft([*early, *lengths])
    build.measure(None, None, full=True)
    for step in [*early, *lengths]:
        build.measure(trunk, step, full=True)
    for step in lengths:
        build.ppo(trunk, step)
    return build.cells


def _lines(build: _Builder, trunk: str, step: int) -> None:
    for strength in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        build.restore(trunk, step, "line", strength=strength)


def _one_tuned(options: StudyOptions, seed: int) -> tuple[_Builder, str, int]:
    """The base, one tuned model and the straight line between them: the builder, the model's cell and its step."""
    build = _Builder(options, seed, selection=options.deals)
    step = options.sft_steps
    trunk = build.sft([step])
    build.measure(None, None, full=False)
    build.measure(trunk, step, full=False)
    _lines(build, trunk, step)
    return build, trunk, step


def _rank(options: StudyOptions, seed: int) -> list[Cell]:
    """Restorations of one tuned model, and their controls."""
    build, trunk, step = _one_tuned(options, seed)
    for modules in ("q,k,v", "attn", "mlp", "attn,mlp"):
        build.restore(trunk, step, "noise_floor", modules=modules)
        build.restore(trunk, step, "restoration", mode="copy", rank=1.0, modules=modules)
        build.restore(trunk, step, "restoration", rank=1.0, modules=modules)
        if options.quick:
            _few_ranks(build, trunk, step, modules)
        else:
            _all_ranks(build, trunk, step, modules)
    return build.cells


def _few_ranks(build: _Builder, trunk: str, step: int, modules: str) -> None:
    for rank in (0.2, 0.5):
        build.restore(trunk, step, "restoration", rank=rank, modules=modules)
        build.restore(trunk, step, "restoration", rank=rank, modules=modules, part="tail")
        build.restore(trunk, step, "random", rank=rank, modules=modules)
    for mode in ("values", "both"):
        build.restore(trunk, step, "restoration", mode=mode, modules=modules)
    for by in (-1, 1):
        build.restore(trunk, step, "restoration", modules=modules, shift_k=by)


def _all_ranks(build: _Builder, trunk: str, step: int, modules: str) -> None:
    ranks = (0.05, 0.1, 0.2, 0.3, 0.5)
    for part in ("top", "tail", "20%:50%"):
        for rank in ranks if part in ("top", "tail") else (0.3,):
            for mode in ("directions", "values", "both"):
                for strength in (0.5, 1.0):
                    place = {"part": part, "rank": rank, "modules": modules}
                    build.restore(trunk, step, "restoration", mode=mode, strength=strength, **place)
    for rank in ranks:
        build.restore(trunk, step, "random", rank=rank, modules=modules)
        for by in (-1, 1):
            build.restore(trunk, step, "restoration", rank=rank, modules=modules, shift_k=by)
        build.restore(trunk, step, "restoration", rank=f"gap:{rank}", modules=modules)
        for by in (-1, 1):
            build.restore(trunk, step, "restoration", rank=f"gap:{rank}", modules=modules, shift_k=by)


def _layers(options: StudyOptions, seed: int) -> list[Cell]:
    """First, middle and last thirds of the layers, directions and copies."""
    build, trunk, step = _one_tuned(options, seed)
    for layers in ("0:34%", "34%:67%", "67%:100%", None):
        for modules in ("q,k,v", "attn,mlp"):
            place = {"layers": layers, "modules": modules}
            for rank in (0.2, 1.0):
                build.restore(trunk, step, "restoration", rank=rank, **place)
                build.restore(trunk, step, "random", rank=rank, **place)
            build.restore(trunk, step, "restoration", mode="copy", rank=1.0, **place)
    return build.cells


def _prevent(options: StudyOptions, seed: int) -> list[Cell]:
    """Ways to train that forget less, on the same deals, beside the straight line back."""
    build = _Builder(options, seed, selection=options.deals)
    keep = (
        _steps(options, 1 / 12, 1 / 6, 1 / 3, 2 / 3, 1)
        if options.quick
        else _steps(options, *(i / 12 for i in range(1, 13)))
    )
    build.measure(None, None, full=False)
    arms: dict[str, dict[str, Any]] = {
        "plain": {},
        "half rate": {"learning_rate": options.learning_rate / 2},
        "many rules": {"many_rules": True},
        "KL 0.1": {"kl_coef": 0.1},
        "KL 1": {"kl_coef": 1.0},
        "DFT": {"loss": "dft"},
    }
    if options.quick:
        del arms["KL 1"]
    for arm, changes in arms.items():
        trunk = build.sft(keep, **changes)
        for step in keep:
            build.measure(trunk, step, full=False, arm=arm)
        if arm == "plain":
            _lines(build, trunk, keep[-1])
    return build.cells


PLANS: dict[str, Callable[[StudyOptions, int], list[Cell]]] = {
    "duration": _duration,
    "rank": _rank,
    "prevent": _prevent,
    "layers": _layers,
}


def make_study(plan: str, options: StudyOptions, seeds: Sequence[int]) -> Study:
    """The cells of a plan for some seeds; one that occurs twice is done once."""
    cells = [cell for seed in seeds for cell in PLANS[plan](options, seed)]
    return Study(plan, list({cell.digest: cell for cell in cells}.values()))
