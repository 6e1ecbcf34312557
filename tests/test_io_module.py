"""Models as trainers hold them: wrapped, adapted, offloaded, inside autocast. What is read is the model's own weight."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import LlamaConfig, LlamaForCausalLM

import rlspec
from rlspec.errors import TensorError
from rlspec.io.module import gathered, strip_wrappers
from rlspec.io.projections import find_projections
from rlspec.io.weights import open_weights

Q0 = "model.layers.0.self_attn.q_proj.weight"
ALL = "q,k,v,o,mlp,embed"


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))


def matrices(source: Any, modules: str = ALL) -> dict[str, torch.Tensor]:
    """Every matrix as the tracker and the basis read it."""
    weights = open_weights(source)
    found = find_projections(weights.shapes(), modules, weights.config())
    return {projection.name: matrix for projection, matrix in weights.stream(found)}


def same(source: Any, right: nn.Module, *, rtol: float = 0.0) -> None:
    """The names and the numbers are those of a plain model, whose state dict is the truth."""
    truth = {name: tensor for name, tensor in right.state_dict().items() if name in matrices(right)}
    found = matrices(source)
    assert list(found) == list(matrices(right))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, truth[name], rtol=rtol, atol=rtol * float(truth[name].abs().max()))


def each_layer(model: nn.Module, wrap: Callable[[nn.Module], Any]) -> nn.Module:
    wrapped: Any = copy.deepcopy(model)
    for i, layer in enumerate(wrapped.model.layers):
        wrapped.model.layers[i] = wrap(layer)
    return wrapped


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": lambda model: torch.compile(copy.deepcopy(model)),
    "data parallel": lambda model: nn.DataParallel(copy.deepcopy(model)),
    "data parallel around compiled": lambda model: nn.DataParallel(torch.compile(copy.deepcopy(model))),
    "compiled layers": lambda model: each_layer(model, torch.compile),
    "checkpointed layers": lambda model: each_layer(model, checkpoint_wrapper),
    "compiled checkpointed layers": lambda model: each_layer(
        model, lambda m: torch.compile(checkpoint_wrapper(m))
    ),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_wrapped_models_are_read_and_restored_like_plain_ones(
    kind: str, base: LlamaForCausalLM, tmp_path: Path
) -> None:
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    wrapped = WRAPPERS[kind](tuned)
    same(wrapped, tuned)
    basis = rlspec.SpectralBasis.from_model(base, modules="q,mlp", cache_dir=tmp_path)
    rlspec.restore_(tuned, basis)
    rlspec.restore_(wrapped, basis)
    same(wrapped, tuned)
    assert not torch.equal(matrices(wrapped)[Q0], base.state_dict()[Q0])


def test_names_lose_wrappers_and_nothing_else() -> None:
    assert (
        strip_wrappers("module._orig_mod.module.model.layers.0._checkpoint_wrapped_module.mlp.w")
        == "model.layers.0.mlp.w"
    )
    assert strip_wrappers("_fsdp_wrapped_module.h.0._fsdp_wrapped_module._orig_mod.w") == "h.0.w"
    assert strip_wrappers("encoder.module.weight") == "encoder.module.weight"
    assert strip_wrappers("module") == "module"


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_fsdp_layers_are_gathered_and_not_written_to(
    group: None, base: LlamaForCausalLM, tmp_path: Path
) -> None:
    from torch.distributed.fsdp import fully_shard

    basis = rlspec.SpectralBasis.from_model(base, modules="q", cache_dir=tmp_path)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    sharded: Any = copy.deepcopy(base)
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    same(sharded, base)
    with pytest.raises(TensorError, match=f"{Q0}: sharded over processes"):
        rlspec.restore_(sharded, basis)


def test_fsdp1_layers_are_gathered_and_not_written_to(
    group: None, base: LlamaForCausalLM, tmp_path: Path
) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    basis = rlspec.SpectralBasis.from_model(base, modules="q", cache_dir=tmp_path)
    for use_orig_params in (True, False):
        wrap = functools.partial(
            FullyShardedDataParallel, device_id=torch.device("cpu"), use_orig_params=use_orig_params
        )
        sharded = each_layer(base, wrap)
        same(sharded, base)
        with pytest.raises(TensorError, match=f"{Q0}: sharded over processes by FSDP"):
            rlspec.restore_(sharded, basis)


def adapted(base: nn.Module, seed: int = 0, **settings: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"], **settings})
    model = peft.get_peft_model(copy.deepcopy(base), config)
    stir(model, seed)
    return model


def stir(model: nn.Module, seed: int = 0) -> None:
    """Move what trains, as training would."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw))


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank stabilised": {"use_rslora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "whole modules": {"modules_to_save": ["embed_tokens", "v_proj"]},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_lora_counts_with_its_weight_as_merging_it_does(
    kind: str, base: LlamaForCausalLM, tmp_path: Path
) -> None:
    model = adapted(base, **SETTINGS[kind])
    merged = copy.deepcopy(model).merge_and_unload()
    assert not torch.equal(merged.state_dict()[Q0], base.state_dict()[Q0])
    same(model, merged, rtol=1e-6)
    same(nn.DataParallel(torch.compile(model)), merged, rtol=1e-6)
    with model.disable_adapter():
        same(model, base)
    basis = rlspec.SpectralBasis.from_model(base, modules="q", cache_dir=tmp_path)
    with pytest.raises(
        TensorError, match=rf"{Q0}: an adapter of PEFT is applied beside it; .*merge_and_unload"
    ):
        rlspec.restore_(model, basis)
    model.merge_adapter()
    same(model, merged, rtol=1e-6)
    rlspec.restore_(model, basis)
    rlspec.restore_(merged, basis)
    same(model, merged, rtol=1e-5)


def test_lora_of_several_adapters_adds_the_active_ones(base: LlamaForCausalLM) -> None:
    peft = pytest.importorskip("peft")
    model = adapted(base)
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    model.set_adapter("second")
    stir(model, 1)
    first = copy.deepcopy(model)
    first.set_adapter("default")
    for active in (model, first):
        same(active, copy.deepcopy(active).merge_and_unload(), rtol=1e-6)
    model.base_model.set_adapter(["default", "second"])
    both = copy.deepcopy(model).merge_and_unload()
    same(model, both, rtol=1e-6)
    assert not torch.equal(both.state_dict()[Q0], copy.deepcopy(first).merge_and_unload().state_dict()[Q0])


def test_lora_on_transposed_and_fused_weights(tmp_path: Path) -> None:
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=48)
    )
    model = adapted(gpt2, target_modules=["c_attn"], fan_in_fan_out=True)
    whole = copy.deepcopy(model).merge_and_unload().state_dict()["transformer.h.0.attn.c_attn.weight"]
    found = matrices(model, "q,k,v")
    right = dict(zip("qkv", whole.T.split(32)))
    assert {name[-2]: tensor.shape for name, tensor in found.items()} == {
        p: t.shape for p, t in right.items()
    }
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, right[name[-2]], rtol=1e-6, atol=1e-7)


def test_lora_below_the_rounding_of_its_base_is_still_seen(base: LlamaForCausalLM, tmp_path: Path) -> None:
    """Merged into bfloat16 such an update is lost; the model's outputs do not lose it."""
    model = adapted(copy.deepcopy(base).bfloat16())
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(1e-4)
    a, b = (factor["default"].weight.detach().double() for factor in (layer.lora_A, layer.lora_B))
    weight = layer.base_layer.weight.detach().double()
    change = 2.0 * b @ a
    found = matrices(model)[Q0]
    assert found.dtype == torch.float32
    assert float((found.double() - weight - change).norm() / change.norm()) < 0.01


@pytest.mark.parametrize("kind", ["DoRA", "IA3", "trained tokens"])
def test_other_adapters_are_refused_until_they_are_merged(kind: str, base: LlamaForCausalLM) -> None:
    peft = pytest.importorskip("peft")
    name = "model.embed_tokens.weight" if kind == "trained tokens" else Q0
    if kind == "DoRA":
        model = adapted(base, use_dora=True)
    elif kind == "IA3":
        config = peft.IA3Config(target_modules=["q_proj", "up_proj"], feedforward_modules=["up_proj"])
        model = peft.get_peft_model(copy.deepcopy(base), config)
        stir(model)
    else:
        model = adapted(base, trainable_token_indices=[1, 2])
    with pytest.raises(TensorError, match=rf"{name}: an adapter of PEFT .* is in the way.*merge_adapter\(\)"):
        matrices(model)
    merged = copy.deepcopy(model).merge_and_unload()
    model.merge_adapter()
    same(model, merged, rtol=1e-6)


def test_two_models_in_one_module_are_told_apart_by_the_user(base: LlamaForCausalLM, tmp_path: Path) -> None:
    pair = nn.ModuleDict({"policy": copy.deepcopy(base), "value_model": copy.deepcopy(base)})
    basis = rlspec.SpectralBasis.from_model(base, modules="q", cache_dir=tmp_path)
    told = rf"{Q0}: 2 (tensor|parameter)s in the model given could be it, policy\.{Q0} and value_model\.{Q0}"
    with pytest.raises(TensorError, match=told):
        rlspec.SpectralTracker(basis).measure(pair, step=1)
    with pytest.raises(TensorError, match=told):
        rlspec.restore_(pair, basis)
    same(pair["policy"], base)


def test_offloaded_weights_are_read_from_where_they_are(base: LlamaForCausalLM, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = copy.deepcopy(base)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.state_dict()[Q0].is_meta
    same(model, base)
    on_disk = copy.deepcopy(base)
    accelerate.disk_offload(on_disk, tmp_path / "offload", execution_device=torch.device("cpu"))
    same(on_disk, base)
    basis = rlspec.SpectralBasis.from_model(base, modules="q", cache_dir=tmp_path)
    with pytest.raises(
        TensorError, match=f"{Q0}: on the meta device, it has no values that could be written"
    ):
        rlspec.restore_(model, basis)


def test_weights_without_values_are_named(base: LlamaForCausalLM, tmp_path: Path) -> None:
    basis = rlspec.SpectralBasis.from_model(base, modules="q", cache_dir=tmp_path)
    tracker = rlspec.SpectralTracker(basis)
    empty = copy.deepcopy(base).to("meta")
    state = base.state_dict()
    sources = {
        "on the meta device": (empty, empty.state_dict()),
        r"a sparse tensor \(torch.sparse_coo\); give its to_dense": ({**state, Q0: state[Q0].to_sparse()},),
    }
    for told, given in sources.items():
        for source in given:
            with pytest.raises(TensorError, match=f"{Q0}: {told}"):
                tracker.measure(source, step=1)
            with pytest.raises(TensorError, match=f"{Q0}: {told}"):
                list(open_weights(source).stream(basis.projections[:1]))
    partitioned = copy.deepcopy(base)
    for parameter in partitioned.parameters():  # as DeepSpeed's ZeRO leaves them
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)  # type: ignore[attr-defined]
    with pytest.raises(TensorError, match="partitioned over processes by DeepSpeed"):
        tracker.measure(partitioned, step=1)


def test_autocast_does_not_reach_measuring_and_restoring(base: LlamaForCausalLM, tmp_path: Path) -> None:
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    results = []
    for i, enabled in enumerate((False, True)):
        model = copy.deepcopy(tuned)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            basis = rlspec.SpectralBasis.from_model(base, modules="q,mlp", cache_dir=tmp_path / str(i))
            rows = rlspec.SpectralTracker(basis).measure(model, step=1, null_draws=1).rows
            rlspec.restore_(model, basis)
            assert torch.is_autocast_enabled("cpu") == enabled
        results.append((rows, matrices(model)))
    assert results[0][0] == results[1][0]
    for name, tensor in results[0][1].items():
        assert torch.equal(tensor, results[1][1][name])


@pytest.mark.parametrize("held_on", ["cpu", "cuda"])
def test_an_offloaded_dtensor_is_gathered_on_the_device_of_its_mesh(held_on: str) -> None:
    class Offloaded:
        """FSDP2's with CPU offload, as far as a gather sees it: NCCL has nothing for tensors on the host."""

        device_mesh = SimpleNamespace(device_type="cuda")

        def __init__(self, place: str) -> None:
            self.device = torch.device(place)

        def to(self, place: str) -> Offloaded:
            assert self.device.type != place, "moved in vain"
            return Offloaded(place)

        def full_tensor(self) -> torch.Tensor:
            if self.device.type == "cpu":
                raise RuntimeError("No backend type associated with device type cpu")
            return torch.eye(2)

    with pytest.raises(RuntimeError, match="No backend"):
        Offloaded("cpu").full_tensor()
    assert torch.equal(gathered(Offloaded(held_on)), torch.eye(2))
