"""The fixed reference of a study: the complete decomposition of every tracked matrix, built once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from rlspec.errors import OptionError
from rlspec.io.coverage import partly_found
from rlspec.io.projections import Projection, find_projections, parse_modules
from rlspec.linalg.autocast import without_autocast
from rlspec.spectra.cache import cached_factors
from rlspec.spectra.matrix import MatrixBasis, matrix_basis
from rlspec.spectra.rank import Rank, RankLike
from rlspec.spectra.sources import WeightSource, open_weights, read_matrix

Progress = Callable[[int, int], None]  # called with (matrices done, matrices in all)


class SpectralBasis:
    """Reference weights with their complete thin SVDs, against which checkpoints are measured.

    Build one with :meth:`from_model`, :meth:`from_checkpoint` or :meth:`from_tensors`. The reference
    weights are copied, so a model that goes on training does not move its own reference.

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
    ) -> None:
        self.projections: tuple[Projection, ...] = tuple(projections)
        self.rank = rank
        self.note = note
        self._matrices = {matrix.name: matrix for matrix in matrices}

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        *,
        modules: str | Iterable[str] = ("q", "k", "v"),
        rank: RankLike = 0.2,
        cache_dir: str | Path | None = None,
        progress: Progress | None = None,
    ) -> SpectralBasis:
        """Decompose the projections of a model as it is now.

        Args:
            model: any module with Hugging Face parameter names; it may be wrapped as trainers do. Weights in scaled
                fp8 are dequantised, LoRA adapters of PEFT are added to theirs.
            modules: which projections: names, or a text such as ``"q,k,v"``, ``"attn"``, ``"all"``.
            rank: leading directions to follow in each matrix, see :class:`Rank`.
            cache_dir: where decompositions are kept between runs; default ``$RLSPEC_CACHE`` or ``~/.cache/rlspec``.
            progress: called with (done, total) after every matrix.

        Raises:
            ProjectionError: the model has none of one of the modules, or in a quantised form that is not known.
            TensorError: a weight holds NaN or infinity, has no values, or its scales do not fit.
            OptionError: an unknown module, an invalid rank.
        """
        return cls._build(model, modules, rank, cache_dir, progress)

    @classmethod
    def from_checkpoint(
        cls,
        folder: str | Path,
        *,
        modules: str | Iterable[str] = ("q", "k", "v"),
        rank: RankLike = 0.2,
        cache_dir: str | Path | None = None,
        progress: Progress | None = None,
    ) -> SpectralBasis:
        """Decompose the projections of a safetensors checkpoint; one matrix at a time is read.

        Arguments and errors are those of :meth:`from_model`; CheckpointError where the files are at fault.
        """
        return cls._build(Path(folder), modules, rank, cache_dir, progress)

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        *,
        modules: str | Iterable[str] = ("q", "k", "v"),
        rank: RankLike = 0.2,
        cache_dir: str | Path | None = None,
        progress: Progress | None = None,
    ) -> SpectralBasis:
        """Decompose named tensors (names as in a Hugging Face checkpoint). Arguments as
        :meth:`from_model`."""
        return cls._build(tensors, modules, rank, cache_dir, progress)

    @classmethod
    @without_autocast()
    def _build(
        cls,
        source: WeightSource,
        modules: str | Iterable[str],
        rank: RankLike,
        cache_dir: str | Path | None,
        progress: Progress | None,
    ) -> SpectralBasis:
        rule = Rank.parse(rank)
        weights = open_weights(source)
        shapes = weights.shapes()
        projections = find_projections(shapes, parse_modules(modules), weights.config())
        matrices = []
        for done, projection in enumerate(projections, start=1):
            weight = read_matrix(weights, projection).cpu().contiguous().clone()
            matrices.append(matrix_basis(projection.name, weight, cached_factors(weight, cache_dir), rule))
            if progress is not None:
                progress(done, len(projections))
        return cls(projections, matrices, rule, partly_found(projections, shapes))

    def matrix(self, name: str) -> MatrixBasis:
        """The reference decomposition of one projection, by its name.

        Raises:
            OptionError: the basis does not hold it.
        """
        if name not in self._matrices:
            raise OptionError(f"the basis holds no matrix {name!r}; it holds {', '.join(self._matrices)}")
        return self._matrices[name]

    def __len__(self) -> int:
        return len(self.projections)
