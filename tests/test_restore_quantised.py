"""Restoring scaled fp8: the numbers against float64, the codes against every neighbour, the file against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from restore_toys import bytes_of, expected, pair, svd_formula, tensors_of
from safetensors.torch import load_file, save_file
from torch import Tensor

import rlspec
from rlspec.cli.restore_text import report_lines
from rlspec.errors import CheckpointError, OptionError
from rlspec.io.requantised import ScaledCodes
from rlspec.ops.draws import Draws
from rlspec.restore.checkpoint import run_plan
from rlspec.restore.options import RestoreOptions
from rlspec.restore.plan import Plan, Step, plan_restore
from rlspec.restore.target import Target

F8 = torch.float8_e4m3fn
BLOCK = (32, 32)
QKV = ("q_proj.weight", "k_proj.weight", "v_proj.weight")


def spread(scale: Tensor, shape: tuple[int, ...], block: tuple[int, int]) -> Tensor:
    """The scale of every entry, float64, by its indices."""
    wide = scale.double() if scale.dtype != torch.uint8 else torch.exp2(scale.double() - 127)
    return wide[torch.arange(shape[0]) // block[0]][:, torch.arange(shape[1]) // block[1]]


def values(tensors: dict[str, Tensor], name: str, block: tuple[int, int] = BLOCK) -> Tensor:
    codes = tensors[name].double()
    scale = tensors.get(name + "_scale_inv")
    return codes if scale is None else codes * spread(scale, tuple(codes.shape), block)


def half_step(truth: Tensor, scale: Tensor) -> Tensor:
    """Half the distance of the codes of e4m3 around a number; the scale of every entry, as the truth is shaped."""
    return scale * torch.exp2(torch.floor(torch.log2((truth / scale).abs()).clamp_min(-6))) / 16


def quantise(folder: Path, *, shards: bool = False, block: tuple[int, int] = BLOCK) -> None:
    """Store the q, k and v matrices of a checkpoint as transformers' fine-grained fp8 does."""
    tensors = load_file(folder / "model.safetensors")
    scales = {}
    for name in [n for n in tensors if n.endswith(QKV)]:
        m, n = tensors[name].shape
        grid = tensors[name].view(m // block[0], block[0], n // block[1], block[1])
        scales[name + "_scale_inv"] = grid.abs().amax((1, 3)) / 448
        wide = spread(scales[name + "_scale_inv"], (m, n), block)
        tensors[name] = (tensors[name].double() / wide).to(F8)
    if shards:  # the scales before and after the codes, in files of their own
        files = {"a": dict(list(scales.items())[::2]), "b": tensors, "c": dict(list(scales.items())[1::2])}
        (folder / "model.safetensors").unlink()
        names = {}
        for label, content in files.items():
            save_file(content, folder / f"{label}.safetensors", metadata={"format": "pt"})
            names.update(dict.fromkeys(content, f"{label}.safetensors"))
        index = {"metadata": {}, "weight_map": names}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file({**tensors, **scales}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": list(block),
        "modules_to_not_convert": ["lm_head", "mlp", "o_proj"],
    }
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "scales elsewhere"])
@pytest.mark.parametrize("of", ["both", "base", "tuned"])
def test_the_numbers_are_those_of_float64(of: str, sharded: bool, tmp_path: Path) -> None:
    folders = dict(zip(("base", "tuned"), pair(tmp_path)))
    for side in ("base", "tuned") if of == "both" else (of,):
        quantise(folders[side], shards=sharded)
    base, tuned = tensors_of(folders["base"]), tensors_of(folders["tuned"])
    report = rlspec.restore_checkpoint(*folders.values(), tmp_path / "out", rank=0.3)
    assert ("float32 keeps it" in "\n".join(report_lines(report))) is False
    assert any("stored so again" in note for note in report.notes) is (of != "base")
    out = tensors_of(tmp_path / "out")
    assert out.keys() == tuned.keys() and len(report.matrices) == 6
    for row in report.matrices:
        before, after = values(tuned, row.tensor), values(out, row.tensor)
        truth = svd_formula(0, 0.3)(values(base, row.tensor), before)
        near = 0.01 * (truth - before).norm() / truth.numel() ** 0.5 + 1e-6 * truth.abs()
        if of == "base":
            assert out[row.tensor].dtype == torch.float32
            assert (after - truth).norm() <= 0.01 * (truth - before).norm()
            continue
        assert out[row.tensor].dtype == F8
        scale = spread(out[row.tensor + "_scale_inv"], tuple(truth.shape), BLOCK)
        assert ((after - truth).abs() <= half_step(truth, scale) + 3 * near).all()
        assert row.entries_changed == int((after != before).sum()) > 0
        lost = float((after - truth).norm() / (truth - before).norm())
        assert row.rounding_share == pytest.approx(lost, rel=0.02)
        assert row.change_frobenius == pytest.approx(float((truth - before).norm()), rel=0.02)
    changed = {row.tensor for row in report.matrices}
    for name in out:
        if not any(name.startswith(weight) for weight in changed):
            assert torch.equal(out[name].view(torch.uint8), tuned[name].view(torch.uint8))


def test_fused_projections_are_restored_part_by_part(tmp_path: Path) -> None:
    """Codes of q, k and v in one tensor, whose blocks straddle the parts."""
    folders = pair(tmp_path, "phi3")
    for folder in folders:
        quantise(folder, block=(64, 32))
    base, tuned = map(tensors_of, folders)
    report = rlspec.restore_checkpoint(*folders, tmp_path / "out", rank=0.3)
    out = tensors_of(tmp_path / "out")
    numbers = [{name: values(each, name, (64, 32)) for name in each} for each in (base, tuned)]
    truth = expected("phi3", *numbers, svd_formula(0, 0.3))
    assert len(report.matrices) == 6
    for name in {row.tensor for row in report.matrices}:
        after, before = values(out, name, (64, 32)), numbers[1][name]
        near = 0.03 * (truth[name] - before).norm() / before.numel() ** 0.5 + 1e-6 * before.abs()
        scale = spread(out[name + "_scale_inv"], tuple(before.shape), (64, 32))
        assert ((after - truth[name]).abs() <= half_step(truth[name], scale) + near).all()
        changed = sum(row.entries_changed for row in report.matrices if row.tensor == name)
        assert changed == int((after != before).sum())


def test_transformers_loads_what_was_stored(tmp_path: Path) -> None:
    """Its own reader, told to dequantise, has the numbers of the codes."""
    import transformers

    base, tuned = pair(tmp_path)
    quantise(base)
    quantise(tuned)
    out = tmp_path / "out"
    rlspec.restore_checkpoint(base, tuned, out, mode="both")
    assert (out / "config.json").read_bytes() == (tuned / "config.json").read_bytes()
    settings = transformers.FineGrainedFP8Config(
        weight_block_size=BLOCK, dequantize=True, modules_to_not_convert=["lm_head", "mlp", "o_proj"]
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        out, quantization_config=settings, dtype=torch.float32
    )
    stored = tensors_of(out)
    for name, parameter in model.named_parameters():
        truth = values(stored, name)
        torch.testing.assert_close(parameter.detach().double(), truth, rtol=2**-7, atol=0)


def coded(weight: Tensor, scale: Tensor, block: tuple[int, int] | None = None) -> ScaledCodes:
    m, n = weight.shape
    grid = scale.reshape(1, 1) if scale.numel() == 1 else scale.view(scale.shape[0], -1)
    own = block or (m // grid.shape[0], n // grid.shape[1])
    bits = grid.view(torch.uint8) if grid.dtype == torch.float8_e8m0fnu else grid
    return ScaledCodes("w", (weight.double() / spread(bits, (m, n), own)).to(F8), "s", scale, block)


SCALES = {
    "blocks": torch.rand(3, 2) / 100 + 0.005,
    "rows": torch.rand(96, 1) / 100 + 0.005,
    "row vector": torch.rand(96) / 100 + 0.005,
    "one number": torch.tensor(0.01),
    "bfloat16": (torch.rand(3, 2) / 100 + 0.005).bfloat16(),
    "float16": (torch.rand(96, 1) / 100 + 0.005).half(),
    "float8": torch.tensor([[1, 2], [3, 1], [2, 2]]).mul(2.0**-7).to(F8),
    "powers of two": torch.exp2(torch.randint(-9, -5, (3, 2)).float()),
    "exponents": torch.randint(118, 122, (3, 2), dtype=torch.uint8),
    "E8M0": torch.randint(118, 122, (3, 2), dtype=torch.uint8).view(torch.float8_e8m0fnu),
}


@pytest.mark.parametrize("kind", SCALES)
def test_scales_stay_in_their_dtype_and_grow_only_where_they_must(kind: str) -> None:
    scale = SCALES[kind]
    stored = coded(torch.randn(96, 64).clamp(-2, 2), scale, (32, 32) if scale.shape == (3, 2) else None)
    before = stored.numbers()
    same = stored.replaced(before)
    assert torch.equal(same.codes.view(torch.uint8), stored.codes.view(torch.uint8)) and same.scale is scale
    wanted = before.clone()
    wanted[40, 5] = 100.0  # past 448 of any scale here
    wanted[3, 60] = before[3, 60] + 1e-6  # less than half a step
    new = stored.replaced(wanted)
    assert (new.codes.dtype, new.scale.dtype, new.scale.shape) == (F8, scale.dtype, scale.shape)
    after = new.numbers()
    assert after[40, 5] == pytest.approx(100.0, rel=1 / 16)
    assert after[3, 60] == before[3, 60] or kind == "one number"
    moved = new.scale.view(-1).view(torch.uint8) != scale.view(-1).view(torch.uint8)
    assert 1 <= int(moved.sum()) <= scale.element_size()  # bytes of one scale
    same_block = torch.zeros(96, 64, dtype=torch.bool)
    if scale.shape == (3, 2):
        same_block[32:64, :32] = True
    elif scale.numel() == 96:
        same_block[40] = True
    else:
        same_block[:] = True
    assert torch.equal(after[~same_block], before[~same_block])
    if kind in ("powers of two", "exponents", "E8M0"):
        numbers = new.scale.float() if scale.dtype != torch.uint8 else torch.exp2(new.scale.float() - 127)
        assert (torch.frexp(numbers).mantissa == 0.5).all()


def test_no_code_is_nearer_and_ties_keep_the_old_one() -> None:
    """All 254 finite codes as old values, moved by less and by more than a step; truth by trying every code."""
    every = torch.arange(256, dtype=torch.uint8).view(F8)
    every = every[every.float().isfinite()]
    table = every.double() * 0.01
    stored = ScaledCodes("w", every.repeat(8, 1), "s", torch.tensor(0.01), None)
    draw = torch.Generator().manual_seed(0)
    before = stored.numbers()
    wanted = before + 0.1 * before.abs() * torch.randn(before.shape, generator=draw)
    wanted = wanted.clamp(-4.48, 4.48)
    found = stored.replaced(wanted)
    assert found.scale is stored.scale
    distance = (found.codes.double() * 0.01 - wanted).abs()
    nearest = (table[:, None, None] - wanted).abs().amin(0)
    assert (distance <= nearest * (1 + 1e-5) + 1e-9).all()


def test_stochastic_codes_are_neighbours_with_the_right_mean() -> None:
    stored = ScaledCodes("w", torch.full((400, 250), 1.0).to(F8), "s", torch.tensor(0.5), None)
    for value, low, high in (
        (0.51, 0.5, 0.5625),
        (-0.49, -0.5, -0.46875),
        (1e-4, 0.0, 2**-10),
        (224.3, 0, 0),
    ):
        wanted = torch.full((400, 250), value)
        new = stored.replaced(wanted, draws=Draws((1, 2)))
        found = new.numbers().double()
        if high == low:  # past the largest code, 448 * 0.5: the scale grows
            assert float(new.scale) > 0.5 and (found - value).abs().max() <= value / 1000
            continue
        assert set(found.unique().tolist()) == {low, high}
        share = (value - low) / (high - low)
        assert abs(float((found == high).double().mean()) - share) <= 5 * (share * (1 - share) / 1e5) ** 0.5


def test_a_plain_copy_is_the_base_to_the_bit(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    quantise(base)
    quantise(tuned)
    rlspec.restore_checkpoint(base, tuned, tmp_path / "out", mode="copy")
    out, truth = tensors_of(tmp_path / "out"), tensors_of(base)
    for name in out:
        if name.endswith(QKV):
            for part in (name, name + "_scale_inv"):
                assert torch.equal(out[part].view(torch.uint8), truth[part].view(torch.uint8))


class _Stopped(Exception):
    pass


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_resumed_run_writes_the_same_bytes(rounding: str, tmp_path: Path) -> None:
    """Stopped after each of its steps; codes and scales lie in different files, of which any may be finished."""
    base, tuned = pair(tmp_path)
    quantise(base, shards=True)
    quantise(tuned, shards=True)
    options: dict[str, Any] = {"rounding": rounding, "layers": "1"}
    rlspec.restore_checkpoint(base, tuned, tmp_path / "whole", **options)
    whole = bytes_of(tmp_path / "whole")

    def plan() -> Plan:
        return plan_restore(base, tuned, RestoreOptions(**options))

    for stop_after in range(1, 4):
        out = tmp_path / f"out{stop_after}"
        left = iter(range(stop_after))

        def stop(step: Step, left: Any = left) -> None:
            if next(left, None) == stop_after - 1:  # noqa: B023
                raise _Stopped

        with pytest.raises(_Stopped):
            run_plan(plan(), Target(out, base, tuned), on_step=stop)
        run_plan(plan(), Target(out, base, tuned, resume=True))
        assert bytes_of(out) == whole


def test_what_codes_cannot_hold_is_refused_in_one_line(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    quantise(tuned)
    with pytest.raises(OptionError, match=r"dtype='float32': .*_proj.weight is stored as fp8 codes with a"):
        rlspec.restore_checkpoint(base, tuned, tmp_path / "out", dtype="float32")
    tensors = load_file(tuned / "model.safetensors")
    name = next(n for n in tensors if n.endswith("q_proj.weight_scale_inv"))
    save_file({**tensors, name: torch.ones(5, 1)}, tuned / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tuned/model.safetensors: .*\(5, 1\) does not scale"):
        rlspec.restore_checkpoint(base, tuned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_packed_experts_are_copied_beside_restored_attention(tmp_path: Path) -> None:
    base, tuned = pair(tmp_path)
    packed = {"model.layers.0.mlp.experts.0.up_proj.qweight": torch.ones(8, 64, dtype=torch.int32)}
    for folder in (base, tuned):
        save_file({**load_file(folder / "model.safetensors"), **packed}, folder / "model.safetensors")
    rlspec.restore_checkpoint(base, tuned, tmp_path / "out", modules="q")
    with pytest.raises(CheckpointError, match=r"up_proj\.qweight belongs to quantised weights"):
        rlspec.restore_checkpoint(base, tuned, tmp_path / "all", modules="q,mlp")
