"""Mean token losses of restored models, in memory: one model is loaded, and no checkpoint is written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rlspec.backend import choose_device
from rlspec.errors import CheckpointError, OptionError
from rlspec.io.adapter import is_adapter
from rlspec.io.stream import read_tensor, stream_pairs
from rlspec.jobs.loading import load_model, load_tokenizer, model_folder
from rlspec.linalg.precision import pinned_arithmetic
from rlspec.restore.options import RestoreOptions
from rlspec.restore.plan import plan_restore
from rlspec.restore.tensors import generator, restore_stored
from rlspec.study.repair.scores import Costs, Sums
from rlspec.train.encode import pad_id
from rlspec.train.forward import answer_logits, answer_tokens, forward_passes
from rlspec.train.modes import evaluation_mode
from rlspec.train.trace_file import read_traces
from rlspec.train.traces import Trace

DTYPES = ("auto", "float32", "stored")
_ROWS = 8  # of a forward pass


class LossScores:
    """Losses on two files of texts, see :func:`rlspec.train.trace_file.read_traces`.

    Half of the rows of each file, every other one, are left for the confirmation, unless it has files of its own.

    Args:
        base, tuned: folders of safetensors checkpoints that transformers loads.
        retain: general texts, whose loss is to be won back.
        task: what was tuned for, whose loss is to stay.
        confirm_retain, confirm_task: files for the confirmation.
        device: where the model is evaluated: "auto", "cpu", "cuda" or "cuda:N".
        dtype: of the weights and products of a forward pass: "float32"; "stored", that of the tuned checkpoint, which
            takes half of the memory; or "auto", stored on a device and float32 on a CPU.

    Raises:
        CheckpointError: a model or tokenizer that cannot be loaded.
        OptionError: texts that cannot be read, or no such dtype.
    """

    can_confirm = can_randomise = True
    sign = 1.0

    def __init__(
        self,
        base: Path,
        tuned: Path,
        retain: Path,
        task: Path,
        *,
        confirm_retain: Path | None = None,
        confirm_task: Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
        cache_dir: Path | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise OptionError(f"dtype={dtype!r}: unknown; valid: {', '.join(DTYPES)}")
        if is_adapter(tuned):
            raise CheckpointError(f"{tuned}: an adapter; losses need it merged into its base, or give eval=")
        self._base, self._tuned, self._cache = model_folder(str(base)), model_folder(str(tuned)), cache_dir
        self._device = choose_device(device)
        self._stored = dtype == "stored" or (dtype == "auto" and self._device.type != "cpu")
        tokenizer = load_tokenizer(self._tuned)
        self._traces: dict[bool, dict[str, list[Trace]]] = {False: {}, True: {}}
        digest = hashlib.blake2b(digest_size=12)
        for name, path, other in (("general", retain, confirm_retain), ("task", task, confirm_task)):
            traces = read_traces(path, tokenizer)
            searched, confirmed = traces[::2], traces[1::2]
            if other is not None:
                searched, confirmed = traces, read_traces(other, tokenizer)
            self._traces[False][name], self._traces[True][name] = searched, confirmed
            digest.update(repr((searched, confirmed)).encode())
        self.identity = f"losses {digest.hexdigest()}" + (" in the stored dtype" if self._stored else "")
        self._model: Any = load_model(self._tuned, self._device, stored=self._stored)
        self._pad = pad_id(self._model, tokenizer)

    def base(self, *, confirm: bool = False) -> Costs:
        names = [name for name, _ in self._model.named_parameters()]
        # Loaded as the tuned one was: what a checkpoint leaves out (a tied head) transformers fills in.
        there = dict(load_model(self._base, torch.device("cpu"), stored=self._stored).named_parameters())
        with self._holding({name: there[name].data for name in names}):
            return self._score(confirm)

    def tuned(self, *, confirm: bool = False) -> Costs:
        return self._score(confirm)

    def restored(self, options: RestoreOptions, *, confirm: bool = False) -> Costs:
        with self._holding(self.weights(options)):
            return self._score(confirm)

    def randomised(self, options: RestoreOptions) -> Costs:
        with self._holding(self.random_weights(options)):
            return self._score(False)

    @pinned_arithmetic()
    def weights(self, options: RestoreOptions) -> dict[str, Tensor]:
        """The tensors that `rlspec restore` would write anew, by name, as it would write them."""
        plan = plan_restore(self._base, self._tuned, options)
        found: dict[str, Tensor] = {}
        for name, base, tuned in stream_pairs(
            plan.base, plan.like, [step.name for step in plan.chosen("restore")]
        ):
            step = plan.steps[name]
            out, _ = restore_stored(step, base, tuned, options, self._cache)
            found |= dict.fromkeys(plan.written_by(step), out.clone())
            del base, tuned
        return found

    @pinned_arithmetic()
    def random_weights(self, options: RestoreOptions) -> dict[str, Tensor]:
        """The same tensors, each moved from the tuned one as far as the restoration moves it, in a random direction."""
        index = plan_restore(self._base, self._tuned, options).like
        found: dict[str, Tensor] = {}
        for name, weight in self.weights(options).items():
            tuned = read_tensor(index, name).double()
            noise = torch.randn(tuned.shape, dtype=torch.float64, generator=generator(options.seed, name))
            noise *= (weight.double() - tuned).norm() / noise.norm()
            found[name] = (tuned + noise).to(weight.dtype)
        return found

    @contextmanager
    def _holding(self, weights: dict[str, Tensor]) -> Iterator[None]:
        """Context in which the model has other weights under some of its names."""
        held = dict(self._model.named_parameters(remove_duplicate=False))
        for name, weight in weights.items():
            if name not in held or held[name].shape != weight.shape:
                raise CheckpointError(
                    f"{self._tuned}: {name} is no parameter of the model that transformers makes of it; give eval=, "
                    "which scores checkpoints on disk"
                )
        before = {name: held[name].data.clone() for name in weights}
        try:
            for name, weight in weights.items():
                held[name].data.copy_(weight)
            yield
        finally:
            for name, weight in before.items():
                held[name].data.copy_(weight)

    def _score(self, confirm: bool) -> Costs:
        details = {name: self._losses(traces) for name, traces in self._traces[confirm].items()}
        return Costs(mean(details["general"]), mean(details["task"]), details)

    @torch.no_grad()
    def _losses(self, traces: Sequence[Trace]) -> Sums:
        found: dict[int, tuple[float, int]] = {}
        with evaluation_mode(self._model):
            for rows in forward_passes(self._model, traces, _ROWS, self._pad):
                chosen = [traces[row] for row in rows]
                logits, _ = answer_logits(self._model, chosen, self._pad)
                wanted = answer_tokens(chosen, logits.device)
                losses = F.cross_entropy(logits.float(), wanted, reduction="none")
                for row, part in zip(rows, losses.split([trace.answer_tokens for trace in chosen])):
                    found[row] = (float(part.double().sum()), part.numel())
        return [found[row] for row in range(len(traces))]


def mean(sums: Sums) -> float:
    """Mean token loss, nats."""
    return sum(total for total, _ in sums) / sum(count for _, count in sums)
