"""The fixed reference of a study: the complete decomposition of every tracked matrix, built once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rlspec.backend import choose_device
from rlspec.errors import OptionError, check_type
from rlspec.io.coverage import partly_found
from rlspec.io.heads import split_heads
from rlspec.io.projections import Projection, check_finite, find_projections, language_model, parse_modules
from rlspec.io.weights import WeightSource, open_weights
from rlspec.linalg.precision import pinned_arithmetic
from rlspec.linalg.rank import Rank, RankLike
from rlspec.linalg.workers import in_order
from rlspec.perturb.matrix import MatrixBasis, matrix_basis
from rlspec.spectra.cache import cached_factors

_LOG = logging.getLogger(__name__)
Progress = Callable[[int, int], None]  # called with (matrices done, matrices in all)


class SpectralBasis:
    """Reference weights with their complete thin SVDs, against which checkpoints are measured.

    Build one with :meth:`from_model`, :meth:`from_checkpoint` or :meth:`from_tensors`; :meth:`save_pretrained` keeps it
    in a folder, which :meth:`from_pretrained` reads. The reference weights are copied, so a model that goes on training
    does not move its own reference. Weights and factors are kept on the host; a :class:`SpectralTracker` takes them to
    the device where each matrix is measured.

    Attributes:
        projections: the matrices, layer by layer.
        rank: the rule for the leading directions of each.
        note: that only some of the model's layers hold them (hybrids), and which; None where all do.
    """

    def __init__(
        self,
        projections: Iterable[Projection],
        matrices: Iterable[MatrixBasis],
        rank: Rank,
        note: str | None = None,
        *,
        devices: Mapping[str, torch.device] | None = None,
    ) -> None:
        self.projections: tuple[Projection, ...] = tuple(projections)
        self.rank = rank
        self.note = note
        self._matrices = {matrix.name: matrix for matrix in matrices}
        self._devices = dict(devices or {})

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        *,
        modules: str | Iterable[str] = ("q", "k", "v"),
        rank: RankLike = 0.2,
        per_head: bool = False,
        cache_dir: str | Path | None = None,
        device: torch.device | str = "auto",
        progress: Progress | None = None,
    ) -> SpectralBasis:
        """Decompose the projections of a model as it is now.

        Args:
            model: any module with Hugging Face parameter names; it may be wrapped as trainers do. Weights in scaled
                fp8 are dequantised, LoRA adapters of PEFT are added to theirs.
            modules: which projections: names, or a text such as ``"q,k,v"``, ``"attn"``, ``"all"``.
            rank: leading directions to follow in each matrix, see :class:`Rank`.
            per_head: each attention head of q, k, v and o is a matrix of its own; the model's configuration must say
                how many there are.
            cache_dir: where decompositions are kept between runs; default ``$RLSPEC_CACHE`` or ``~/.cache/rlspec``.
            device: where to measure. ``"auto"``: where each weight is, or on the CPU where that is no CUDA or ROCm
                device; for a checkpoint on disk, the GPU if there is one.
            progress: called with (done, total) after every matrix.

        Raises:
            ProjectionError: the model has none of one of the modules, or in a quantised form that is not known; or its
                heads are not known.
            TensorError: a weight holds NaN or infinity, has no values, or its scales do not fit.
            OptionError: an unknown module, an invalid rank.
        """
        return cls._build(model, modules, rank, per_head, cache_dir, device, progress)

    @classmethod
    def from_checkpoint(
        cls,
        folder: str | Path,
        *,
        modules: str | Iterable[str] = ("q", "k", "v"),
        rank: RankLike = 0.2,
        per_head: bool = False,
        cache_dir: str | Path | None = None,
        device: torch.device | str = "auto",
        progress: Progress | None = None,
    ) -> SpectralBasis:
        """Decompose the projections of a checkpoint, safetensors or torch.distributed.checkpoint's, a matrix at a time.

        Arguments and errors are those of :meth:`from_model`; CheckpointError where the files are at fault.
        """
        check_type("folder", folder, (str, Path), "the path of a checkpoint")
        return cls._build(Path(folder), modules, rank, per_head, cache_dir, device, progress)

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        *,
        modules: str | Iterable[str] = ("q", "k", "v"),
        rank: RankLike = 0.2,
        per_head: bool = False,
        cache_dir: str | Path | None = None,
        device: torch.device | str = "auto",
        progress: Progress | None = None,
    ) -> SpectralBasis:
        """Decompose named tensors (names as in a Hugging Face checkpoint). Arguments as
        :meth:`from_model`."""
        return cls._build(tensors, modules, rank, per_head, cache_dir, device, progress)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        rank: RankLike | None = None,
        device: torch.device | str = "auto",
        progress: Progress | None = None,
    ) -> SpectralBasis:
        """Read what :meth:`save_pretrained` wrote. It measures bit for bit as the basis that was saved.

        Args:
            folder: of the saved basis.
            rank: another rule for the leading directions than the saved one; nothing is decomposed anew for it.
            device: where to measure. ``"auto"``: the GPU if there is one.
            progress: called with (done, total) after every matrix.

        Raises:
            CheckpointError: there is no saved basis, one of a later version, or files that are missing, damaged or
                made by something else.
            TensorError: a weight or a factor holds NaN or infinity.
            OptionError: an invalid rank.
        """
        # Imported here: measuring tensors in memory needs no compiled extension.
        from rlspec.spectra.saved_basis import SavedBasis

        check_type("folder", folder, (str, Path), "the path of a saved basis")
        given = None if rank is None else Rank.parse(rank)
        place = choose_device(device)
        saved = SavedBasis(Path(folder))
        return saved.part(saved.projections, device=place, rank=given, progress=progress)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights and factors to a folder, a matrix at a time: safetensors shards of a few GiB, and ``basis.json``.

        Args:
            folder: to be made; it appears when all of it is on the disk.

        Raises:
            CheckpointError: there is something of that name, or it cannot be written.
        """
        from rlspec.spectra.saved_basis import save_basis  # as above

        check_type("folder", folder, (str, Path), "the path of a folder to be made")
        matrices = [self.matrix(projection.name) for projection in self.projections]
        save_basis(Path(folder), self.projections, matrices, self.rank, self.note)

    @classmethod
    @pinned_arithmetic()
    def _build(
        cls,
        source: WeightSource,
        modules: str | Iterable[str],
        rank: RankLike,
        per_head: bool,
        cache_dir: str | Path | None,
        device: torch.device | str,
        progress: Progress | None,
    ) -> SpectralBasis:
        rule = Rank.parse(rank)
        weights = open_weights(source)
        shapes, config = weights.shapes(), weights.config()
        projections = find_projections(shapes, parse_modules(modules), config)
        if per_head:
            projections = split_heads(projections, shapes, config)
        model = language_model(shapes, config)
        if len(model.own) > 1:
            _LOG.warning(model.note)
        matrices, devices = [], {}

        def placed() -> Iterator[tuple[Projection, Tensor]]:
            for projection, found in weights.stream(weights.in_file_order(projections)):
                devices[projection.name] = _place(device, found, source)
                yield projection, found

        for done, matrix in enumerate(
            reference_matrices(placed(), rule, cache_dir, count=len(projections)), start=1
        ):
            matrices.append(matrix)
            if progress is not None:
                progress(done, len(projections))
        return cls(projections, matrices, rule, partly_found(projections, shapes), devices=devices)

    def matrix(self, name: str) -> MatrixBasis:
        """The reference decomposition of one projection, by its name.

        Raises:
            OptionError: the basis does not hold it.
        """
        if name not in self._matrices:
            raise OptionError(f"the basis holds no matrix {name!r}; it holds {', '.join(self._matrices)}")
        return self._matrices[name]

    def device(self, name: str) -> torch.device:
        """Where a projection is measured."""
        return self._devices.get(name, torch.device("cpu"))

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(m, n) of each matrix, by the name of its projection."""
        return {projection.name: self.matrix(projection.name).shape for projection in self.projections}

    def part(self, projections: Sequence[Projection], *, device: torch.device) -> SpectralBasis:
        """Some of its matrices, which are shared, not copied, to be measured on a device.

        Args:
            projections: some of its own.
        """
        matrices = [self.matrix(projection.name) for projection in projections]
        devices = {projection.name: device for projection in projections}
        return SpectralBasis(projections, matrices, self.rank, self.note, devices=devices)

    def __len__(self) -> int:
        return len(self.projections)


def reference_matrices(
    weights: Iterable[tuple[Projection, Tensor]],
    rank: Rank,
    cache_dir: str | Path | None = None,
    *,
    count: int,
) -> Iterator[MatrixBasis]:
    """Decompose matrices (m, n), on any device, small ones side by side; what is kept of them are copies on the host.

    Args:
        count: how many there are. One alone is decomposed by the calling thread, in whose heap there is room.

    Raises:
        TensorError: one holds NaN or infinity; names it.
    """
    jobs = (_job(projection.name, weight, rank, cache_dir) for projection, weight in weights)
    return in_order(jobs, min(count, torch.get_num_threads()))


def _job(
    name: str, weight: Tensor, rank: Rank, cache_dir: str | Path | None
) -> tuple[int, Callable[[], MatrixBasis]]:
    check_finite(name, weight)
    copy = weight.cpu().contiguous().clone()

    @pinned_arithmetic()
    def work() -> MatrixBasis:
        return matrix_basis(name, copy, cached_factors(copy, cache_dir), rank)

    return copy.numel(), work


def _place(device: torch.device | str, weight: Tensor, source: WeightSource) -> torch.device:
    if device != "auto":
        return choose_device(device)
    return choose_device("auto") if isinstance(source, (str, Path)) else weight.device
