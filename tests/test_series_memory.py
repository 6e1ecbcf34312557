"""What the plan of a series says that measuring takes, against the bytes that torch's allocator hands out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile

import rlspec
from rlspec.jobs.series.stacks import held_bytes
from rlspec.linalg.rank import Rank
from rlspec.perturb.reference import Reference, widest
from rlspec.spectra import nulls

pytestmark = pytest.mark.usefixtures("own_cache")


def peak_bytes(folder: Path, shape: tuple[int, int], dtype: torch.dtype, count: int, **options: Any) -> int:
    """The most that is held at once while a checkpoint is measured: tensors, and what LAPACK works in."""
    draw = torch.Generator().manual_seed(0)
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(count)]
    base = {name: torch.randn(shape, generator=draw) for name in names}
    tuned = {name: weight + 0.03 * torch.randn(shape, generator=draw) for name, weight in base.items()}
    for name, tensors in (("base", base), ("tuned", tuned)):
        (folder / name).mkdir()
        stored = {key: tensor.to(dtype) for key, tensor in tensors.items()}
        save_file(stored, folder / name / "model.safetensors")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        rlspec.measure(folder / "base", folder / "tuned", modules="q", **options)
    # Nothing public tells of the allocator's calls in their order.
    events = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = peak = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        held += size
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize(
    ("shape", "dtype", "count", "options", "least"),
    [
        ((448, 460), torch.float32, 1, {"rank": 0.95}, 0.9),
        ((448, 460), torch.float32, 1, {"rank": 0.95, "null_draws": 1}, 0.9),
        ((448, 460), torch.bfloat16, 1, {"rank": 1.0, "null_draws": 1}, 0.9),
        ((448, 460), torch.float64, 1, {"rank": 0.95, "null_draws": 1}, 0.9),
        ((448, 1344), torch.float32, 1, {"rank": 0.95, "null_draws": 1}, 0.9),
        ((448, 460), torch.float32, 1, {"rank": 0.5, "null_draws": 1}, 0.75),
        ((448, 1344), torch.float32, 1, {"rank": 0.2}, 0.35),
        ((448, 460), torch.float32, 1, {"rank": "energy:0.95"}, 0.5),
        ((128, 128), torch.float32, 16, {"rank": 0.95, "null_draws": 1}, 0.5),
        ((392, 6272), torch.float64, 1, {"rank": 0.95, "null_draws": 1, "engine": "exact"}, 0.8),
        ((448, 448), torch.float32, 1, {"rank": 0.95, "locking": True}, 0.5),
    ],
    ids=str,
)
def test_the_plan_covers_what_is_held_and_not_much_more(
    shape: tuple[int, int],
    dtype: torch.dtype,
    count: int,
    options: dict[str, Any],
    least: float,
    tmp_path: Path,
) -> None:
    peak = peak_bytes(tmp_path, shape, dtype, count, **options)
    drawn, locking = options.get("null_draws", 0) > 0, options.get("locking", False)
    rank = Rank.parse(options["rank"])
    planned = held_bytes(shape, count, rank=rank, nulls=drawn, locking=locking)
    assert least * planned <= peak <= planned


def test_a_copy_of_each_update_that_is_kept_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, kept = nulls._random_update, []

    def keeping(*arguments: Any) -> torch.Tensor:
        kept[:] = [right(*arguments)]
        return kept[0].clone()

    monkeypatch.setattr(nulls, "_random_update", keeping)
    peak = peak_bytes(tmp_path, (448, 1344), torch.float32, 1, rank=0.95, null_draws=1)
    assert peak > held_bytes((448, 1344), 1, rank=Rank.parse(0.95), nulls=True)


@pytest.mark.parametrize("r", [5, 40, 300])
def test_no_more_columns_are_taken_than_the_plan_counts(r: int) -> None:
    draw = torch.Generator().manual_seed(r)
    for k in range(1, r + 1):
        values = torch.rand(1, r, generator=draw, dtype=torch.float64).sort(descending=True).values
        values[:, int(0.9 * r) :] *= k % 2  # with and without a kernel
        square = torch.empty(1, r, r)
        assert Reference(("x",), square, square, values, square, k).width <= widest(k, r)
