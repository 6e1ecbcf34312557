"""Checkpoints of torch.distributed.checkpoint hold, as they are read, the bits of the state that torch was given."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_toys import assert_same, bits, save, save_with_accelerate, tensors_in
from process_toys import held, together, toy_with_uneven_layers
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel

import rlspec
from rlspec.errors import CheckpointError, TensorError
from rlspec.io.distributed_weights import DistributedWeights
from rlspec.io.projections import find_projections
from rlspec.io.stream import MemoryBoundError
from rlspec.io.weights import find_tensor, open_weights
from rlspec.jobs.loading import load_model, model_folder
from rlspec.spectra import SpectralBasis


def of_all_kinds() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    dense = torch.randn(6, 10, generator=draw)
    dtypes = (
        *(torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.bool),
    )
    return {
        **{f"as {dtype}": (dense * 3).to(dtype) for dtype in dtypes},
        "scalar": torch.tensor(2.5),
        "no rows": torch.empty(0, 4),
        "a slice of another": dense[1:3],
        "transposed": torch.randn(5, 7, generator=draw).t(),
        "permuted": torch.randn(2, 3, 4, generator=draw).permute(2, 0, 1),
        "one axis": torch.arange(9.0),
        "not finite": torch.tensor([torch.nan, -0.0, torch.inf]),
    }


@pytest.mark.parametrize(
    "options", [{}, {"single_file_per_rank": False, "thread_count": 4}], ids=["one file", "torchtune's files"]
)
def test_values_are_those_that_were_saved(options: dict[str, Any], tmp_path: Path) -> None:
    state = of_all_kinds()
    save(
        {"model": state, "optimizer": {"state": {"one axis": {"exp_avg": torch.ones(9)}}}, "step": 3},
        tmp_path,
        **options,
    )
    assert_same(tensors_in(tmp_path), state)
    assert_same(tensors_in(tmp_path, reversed(list(state))), state)


NESTED: dict[str, Any] = {
    "alone": lambda state: state,
    "accelerate, torchtune": lambda state: {"model": state, "optimizer": {"state": state}, "epochs_run": 1},
    "tutorial": lambda state: {"app": {"model": state, "optim": {"state": state}}},
    "Lightning": lambda state: {"state_dict": state, "optimizer_0": {"state": state}},
    "compiled, in DistributedDataParallel": lambda state: {
        "module._orig_mod." + n: t for n, t in state.items()
    },
    "beside its average": lambda state: {"ema": {n: t + 1 for n, t in state.items()}, "model": state},
}


@pytest.mark.parametrize("kind", NESTED)
def test_names_are_those_of_the_model_wherever_it_was_in_the_state(kind: str, tmp_path: Path) -> None:
    state = {"model.layers.0.self_attn.q_proj.weight": torch.randn(4, 3), "lm_head.weight": torch.ones(2, 4)}
    save(NESTED[kind](state), tmp_path)
    assert_same(tensors_in(tmp_path), state)


def test_of_two_models_in_one_state_neither_is_taken_for_the_other(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    save({"policy": {name: torch.ones(4, 4)}, "reference": {name: torch.zeros(4, 4)}}, tmp_path)
    weights = open_weights(tmp_path)
    assert set(weights.shapes()) == {f"policy.{name}", f"reference.{name}"}
    with pytest.raises(TensorError, match="2 tensors in the checkpoint .* could be it, policy"):
        find_tensor(name, weights.shapes(), weights.where)


def saves(number: int, out: Path, kind: str, writer: str) -> None:
    if kind == "fsdp1":
        model: Any = FullyShardedDataParallel(toy_with_uneven_layers(), device_id=torch.device("cpu"))
    else:
        model = held(toy_with_uneven_layers(), kind, dist.get_world_size())
    if writer == "accelerate":
        save_with_accelerate(model, out, number, version=1 if kind == "fsdp1" else 2)
        return
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=out)


@pytest.mark.parametrize(
    ("count", "kind", "writer"),
    [
        (1, "fsdp2", "torch"),
        (2, "ddp", "torch"),
        (2, "fsdp2", "torch"),
        (2, "fsdp1", "accelerate"),
        (2, "fsdp2", "accelerate"),
        (2, "tp", "torch"),
        (4, "tp and fsdp2", "torch"),
    ],
)
def test_parts_of_many_processes_make_the_model(count: int, kind: str, writer: str, tmp_path: Path) -> None:
    if writer == "accelerate":
        pytest.importorskip("accelerate")
    assert together(count, saves, tmp_path, kind, writer) == [0] * count
    folder = tmp_path / "pytorch_model_fsdp_0" if writer == "accelerate" else tmp_path
    assert len(list(folder.glob("*.distcp"))) == count
    assert_same(tensors_in(folder), toy_with_uneven_layers().state_dict())


def test_parts_in_another_order_of_their_values_come_whole(tmp_path: Path) -> None:
    """Blocks of rows lie one after the other only where a part was saved row by row."""
    state = {"rows": torch.randn(6, 4), "columns": torch.randn(4, 6).T, "scalar": torch.tensor(3.0)}
    assert not state["columns"].is_contiguous()
    save({"model": state}, tmp_path)
    weights = DistributedWeights(tmp_path)
    for name, tensor in state.items():
        blocks = [(at, block.clone()) for at, block in weights.rows(name, memory_bytes=1 << 16)]
        assert [at for at, _ in blocks] == [0] and bits(blocks[0][1]) == bits(tensor), name
    with pytest.raises(MemoryBoundError, match="'columns'"):
        list(weights.rows("columns", memory_bytes=64))


def test_matrices_are_read_without_the_rest_of_the_checkpoint(tmp_path: Path) -> None:
    """What is not asked for may be damaged, an optimizer's state above all."""
    model = toy_with_uneven_layers()
    state = model.state_dict()
    save(
        {"model": state, "optimizer": {"state": {n: {"exp_avg": t + 1} for n, t in state.items()}}}, tmp_path
    )
    wanted = [name for name in state if "q_proj" in name or "v_proj" in name]
    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    with (tmp_path / "__0_0.distcp").open("r+b") as file:
        for place, info in metadata.storage_data.items():
            if place.fqn.removeprefix("model.") not in wanted:
                file.seek(info.offset)
                file.write(b"\xff" * info.length)
    assert_same(tensors_in(tmp_path, wanted), {name: state[name] for name in wanted})
    weights = open_weights(tmp_path)
    projections = find_projections(weights.shapes(), ("q", "v"), weights.config())
    for projection, matrix in weights.stream(weights.in_file_order(projections)):
        assert bits(matrix) == bits(state[projection.tensor])
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: bytes \d+ to \d+: no archive of torch.save"):
        tensors_in(tmp_path, ["lm_head.weight"])


def test_a_basis_takes_the_folder_and_the_one_that_accelerate_puts_it_in(tmp_path: Path) -> None:
    model = toy_with_uneven_layers()
    model.config.save_pretrained(tmp_path)  # type: ignore[attr-defined]
    save({"model": model.state_dict()}, tmp_path / "pytorch_model_fsdp_0")
    right = SpectralBasis.from_model(model)
    for folder in (tmp_path, tmp_path / "pytorch_model_fsdp_0"):
        basis = SpectralBasis.from_checkpoint(folder)
        assert [p.name for p in basis.projections] == [p.name for p in right.projections]
        for p in right.projections:
            assert torch.equal(basis.matrix(p.name).S, right.matrix(p.name).S)


def test_safetensors_beside_it_are_read_instead(tmp_path: Path) -> None:
    model = toy_with_uneven_layers()
    save({"model": {"x": torch.ones(1)}}, tmp_path / "pytorch_model_fsdp_0")
    assert isinstance(open_weights(tmp_path), DistributedWeights)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    assert not isinstance(open_weights(tmp_path), DistributedWeights)


def test_of_two_models_in_a_folder_one_must_be_meant(tmp_path: Path) -> None:
    for number in (0, 1):
        save({"model": {"x": torch.full((1,), float(number))}}, tmp_path / f"pytorch_model_fsdp_{number}")
    with pytest.raises(
        CheckpointError, match="holds 2 models, pytorch_model_fsdp_0 and others; give the folder of one"
    ):
        open_weights(tmp_path)
    assert_same(tensors_in(tmp_path / "pytorch_model_fsdp_1"), {"x": torch.ones(1)})


def test_what_is_not_a_floating_matrix_is_told_with_its_checkpoint(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    save({"model": {name: torch.ones(4, 4)}}, tmp_path / "right")
    save({"model": {name: torch.ones(4, 4, dtype=torch.int64)}}, tmp_path / "wrong")
    basis = SpectralBasis.from_checkpoint(tmp_path / "right", modules="q", rank=2)
    with pytest.raises(
        TensorError, match=f"wrong: {name}: expected a floating-point matrix, found torch.int64"
    ):
        list(open_weights(tmp_path / "wrong").stream(basis.projections))


def test_where_safetensors_are_needed_the_way_to_them_is_told_and_leads_there(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model: Any = toy_with_uneven_layers()
    model.save_pretrained(tmp_path / "base")
    state = get_model_state_dict(model)
    alone, beside = tmp_path / "checkpoint-9" / "pytorch_model_fsdp_0", tmp_path / "dist_epoch_9"
    save({"model": state}, alone)
    save({"model": state, "optimizer": {"lr": torch.ones(1)}}, beside)
    for given, told in (
        (alone, f"{alone}: .*: accelerate merge-weights {alone} OUT"),
        (alone.parent, f"{alone}: .*: accelerate merge-weights {alone} OUT"),
        (
            beside,
            f"{beside}: .*: python -m torch.distributed.checkpoint.format_utils dcp_to_torch {beside} FILE",
        ),
    ):
        with pytest.raises(CheckpointError, match=told):
            rlspec.restore_checkpoint(given, tmp_path / "base", tmp_path / "out")
        for opens in (model_folder, partial(load_model, device=torch.device("cpu"))):
            with pytest.raises(CheckpointError, match=told):
                opens(given)
    assert not (tmp_path / "out").exists()
    accelerate.utils.merge_fsdp_weights(str(alone), str(tmp_path / "merged"))
    assert_same(tensors_in(alone), load_file(tmp_path / "merged" / "model.safetensors"))
    dcp_to_torch_save(beside, tmp_path / "FILE")
    assert_same(tensors_in(beside), torch.load(tmp_path / "FILE", weights_only=True)["model"])
