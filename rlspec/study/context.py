"""What the cells of one process share: the base model, its tokenizer, task, decompositions and KL probe."""

from __future__ import annotations

from functools import cache, cached_property
from typing import Any

import torch

from rlspec.jobs.loading import check_checkpoint, evaluation_keys, load_model, load_tokenizer, model_folder
from rlspec.spectra import SpectralBasis, SpectralTracker
from rlspec.study.cells import Settings
from rlspec.tasks import Rule, Task, get_task
from rlspec.train import KLProbe

#: Settings that every cell has, see rlspec.study.plans.
SHARED = ("model", "task", "turns", "seed", "deals", "selection", "shifts", "rank", "modules")
#: Rules that prompts of training may state beside J = Q = K = 10; never 11, 12, 13, which is out of distribution.
RULES = ((10, 10, 10), (1, 2, 3), (3, 2, 1), (4, 5, 6), (5, 7, 9), (6, 4, 2), (7, 8, 9), (8, 8, 8), (9, 6, 3))


class Context:
    """Inputs of cells that have the same shared settings; each is loaded when it is first asked for."""

    def __init__(self, shared: Settings) -> None:
        self.shared = shared
        self.device = torch.device("cpu")
        self.folder = model_folder(shared["model"])
        check_checkpoint(self.folder)
        self.tokenizer: Any = load_tokenizer(self.folder)

    def task(self, *, many_rules: bool = False) -> Task:
        task: Any = get_task(self.shared["task"], tokenizer=self.tokenizer, turns=self.shared["turns"])
        if many_rules:
            task.training_rules = tuple(Rule(*numbers) for numbers in RULES)
        return task

    @cached_property
    def base(self) -> Any:
        """The model that everything began with; nobody may change it."""
        return load_model(self.folder, self.device).eval()

    @cached_property
    def exclude(self) -> frozenset[Any]:
        """The problems that no training may see: those of both sets of deals."""
        s = self.shared
        return evaluation_keys(self.task(), s["shifts"], s["deals"] + s["selection"], s["seed"])

    @cached_property
    def tracker(self) -> SpectralTracker:
        return SpectralTracker(self.basis(self.shared["modules"], None), arrays=False)

    @cached_property
    def probe(self) -> KLProbe:
        return KLProbe(self.base, self.tokenizer, self.task(), seed=self.shared["seed"])

    @cache  # noqa: B019  (a context lives as long as its process)
    def basis(self, modules: str, layers: str | None) -> SpectralBasis:
        """The base's matrices of some modules and layers (``"0:33%"``, as in RestoreOptions)."""
        from rlspec.restore import RestoreOptions

        whole = SpectralBasis.from_model(self.base, modules=modules, rank=self.shared["rank"])
        count = 1 + max((p.layer for p in whole.projections if p.layer is not None), default=-1)
        chosen = RestoreOptions(layers=layers, modules=modules).chosen_layers(count)
        kept = [p for p in whole.projections if chosen is None or p.layer in chosen]
        return SpectralBasis(kept, [whole.matrix(p.name) for p in kept], whole.rank)


@cache
def _context(shared: tuple[tuple[str, Any], ...]) -> Context:
    return Context({name: list(v) if isinstance(v, tuple) else v for name, v in shared})


def context_of(settings: Settings) -> Context:
    """The context of a cell; the same one for cells of the same shared settings."""
    values = ((name, settings[name]) for name in SHARED)
    return _context(tuple((name, tuple(v) if isinstance(v, list) else v) for name, v in values))
