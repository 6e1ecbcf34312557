"""How restored entries are rounded: to which dtype, by which draws, and the same wherever blocks of rows begin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from restore_toys import bytes_of, tensors_of

import rlspec
from rlspec.io import stream
from rlspec.io.stream import aligned
from rlspec.restore import RestoreOptions, checkpoint, tensors


def test_float32_holds_what_bfloat16_loses(llama_bf16: tuple[Path, Path], tmp_path: Path) -> None:
    narrow = rlspec.restore_checkpoint(*llama_bf16, tmp_path / "narrow")
    wide = rlspec.restore_checkpoint(*llama_bf16, tmp_path / "wide", dtype="float32")
    for row in wide.matrices:
        assert (row.dtype, tensors_of(tmp_path / "wide")[row.tensor].dtype) == ("float32", torch.float32)
        assert row.rounding_share < 1e-4
    assert all(row.rounding_share > 0.02 for row in narrow.matrices)
    kept = [name for name in wide.kept if name.endswith("o_proj.weight")]
    assert kept and all(tensors_of(tmp_path / "wide")[name].dtype == torch.bfloat16 for name in kept)


@pytest.mark.parametrize("mode", ["directions", "interpolate"])
def test_stochastic_rounding_depends_on_seed_and_name_alone(
    mode: str, llama_bf16: tuple[Path, Path], tmp_path: Path
) -> None:
    def run(out: str, **options: Any) -> dict[str, torch.Tensor]:
        options = {"rounding": "stochastic", "mode": mode, "strength": 0.5, **options}
        rlspec.restore_checkpoint(*llama_bf16, tmp_path / out, **options)
        return tensors_of(tmp_path / out)

    first, again, other, some = run("1"), run("2", memory_gib=3.0), run("3", seed=1), run("4", modules="k")
    q, k = (f"model.layers.1.self_attn.{module}_proj.weight" for module in "qk")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first[q], other[q])
    assert torch.equal(first[k], some[k])


@pytest.mark.parametrize("options", [{"mode": "copy"}, {"mode": "interpolate", "strength": 0.3}])
def test_row_blocks_of_any_size_give_the_same(
    options: dict[str, Any],
    llama: tuple[Path, Path],
    llama_bf16: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Base and tuned tensors of different widths, cut at different rows."""
    pairs = llama[0], llama_bf16[1]
    options = {**options, "modules": ".", "rounding": "stochastic"}
    rlspec.restore_checkpoint(*pairs, tmp_path / "whole", **options)
    cuts = []

    def recorded(base: Any, tuned: Any) -> Any:
        for first, there, here in aligned(base, tuned):
            cuts.append((first, len(there)))
            yield first, there, here

    monkeypatch.setattr(stream, "aligned", recorded)
    monkeypatch.setattr(checkpoint, "pool_bytes", lambda plan, memory: 1 << 17)
    monkeypatch.setattr(tensors, "BLOCK_ENTRIES", 500)
    rlspec.restore_checkpoint(*pairs, tmp_path / "cut", **options)
    assert len({count for _, count in cuts}) > 3 and max(first for first, _ in cuts) > 0
    assert bytes_of(tmp_path / "cut") == bytes_of(tmp_path / "whole")


def test_draws_do_not_hang_on_where_blocks_begin() -> None:
    """Rows that tuning left alone are passed over block by block, and draw all the same."""
    base = torch.randn(20, 30).bfloat16()
    tuned = torch.cat([base[:11], base[11:] + 0.1])
    options = RestoreOptions(mode="interpolate", strength=0.37, rounding="stochastic")

    def run(rows: int) -> torch.Tensor:
        blocks = [(i, base[i : i + rows], tuned[i : i + rows]) for i in range(0, 20, rows)]
        found = tensors.restore_rows("w", blocks, torch.bfloat16, options, tensors.Changes(20))
        return torch.cat([block for _, block in found])

    assert all(torch.equal(run(20), run(rows)) for rows in (1, 3, 7, 11))
