"""Devices that we do not compute on (MPS, XPU): models there are tracked on the CPU, the rest is refused in one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from module_toys import named_module
from torch import Tensor, nn

import rlspec
from rlspec import SpectralBasis, SpectralTracker
from rlspec.backend import choose_device
from rlspec.errors import OptionError, TensorError
from rlspec.integrations.reference import make_tracker
from rlspec.spectra.dealt import DealtTracker
from rlspec.spectra.processes import Processes

MPS = torch.device("mps")
NAME = "model.layers.{}.self_attn.q_proj.weight"


class Elsewhere(Tensor):
    """A tensor that says it is on MPS: it has no float64 there, and does not mix with tensors of the CPU."""

    device = property(lambda self: MPS)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor).clone()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(type(x) is Tensor for x in (*args, *(kwargs or {}).values())):
            raise RuntimeError("Expected all tensors to be on the same device, found mps and cpu")
        found = super().__torch_function__(func, types, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            if isinstance(found, Tensor) and found.dtype == torch.float64:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return found


def elsewhere(tensor: Tensor) -> Tensor:
    return tensor.clone().as_subclass(Elsewhere)


@pytest.fixture
def pair() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    base = {NAME.format(i): torch.randn(40, 32, generator=g) for i in range(2)}
    return base, {name: w + 1e-3 * torch.randn(w.shape, generator=g) for name, w in base.items()}


def there(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: elsewhere(tensor) for name, tensor in tensors.items()}


def test_the_pretence_refuses_what_mps_refuses() -> None:
    """Without it nothing here would notice a tensor that is left there."""
    a = elsewhere(torch.ones(3, 2))
    for wrong in (lambda: a.double(), lambda: a + torch.ones(3, 2), lambda: a.to(torch.float64)):
        with pytest.raises((TypeError, RuntimeError)):
            wrong()
    assert (a + 1).device == MPS and type(a.cpu()) is Tensor


@pytest.mark.parametrize("engine", ["delta", "exact"])
def test_weights_elsewhere_are_measured_on_the_cpu_to_the_same_bits(pair: Any, engine: str) -> None:
    base, tuned = pair
    truth = SpectralTracker(SpectralBasis.from_tensors(base, modules="q"), engine=engine).measure(
        tuned, step=1, null_draws=1
    )
    basis = SpectralBasis.from_tensors(there(base), modules="q")
    assert all(basis.device(p.name).type == "cpu" for p in basis.projections)
    found = SpectralTracker(basis, engine=engine).measure(there(tuned), step=1, null_draws=1)
    assert found.rows == truth.rows
    model = SpectralTracker(SpectralBasis.from_model(named_module(there(base)), modules="q"), engine=engine)
    assert model.measure(named_module(there(tuned)), step=1, null_draws=1).rows == truth.rows


def test_trainers_and_processes_track_them_too(pair: Any) -> None:
    base, tuned = pair
    basis = SpectralBasis.from_tensors(base, modules="q")
    truth = SpectralTracker(basis).measure(tuned, step=1).rows
    options = {"modules": ("q",), "rank": basis.rank, "per_head": False}
    for start in (None, basis):
        tracker = make_tracker(named_module(there(base)), start, Processes.of_training(), **options)
        assert tracker.measure(named_module(there(tuned)), step=1).rows == truth
    dealt = DealtTracker(named_module(there(base)), modules="q")
    assert dealt.measure(named_module(there(tuned)), step=1).rows == truth


def test_lora_adapters_elsewhere_are_measured_by_their_factors() -> None:
    peft = pytest.importorskip("peft")
    from process_toys import toy_with_uneven_layers

    def adapted() -> nn.Module:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"])
        model = peft.get_peft_model(toy_with_uneven_layers(), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.add_(0.01)
        return model

    truth = SpectralTracker(SpectralBasis.from_model(toy_with_uneven_layers(), modules="q"))
    away = adapted()
    for owner in away.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[name] = elsewhere(parameter.detach())  # type: ignore[assignment]
    wanted = truth.measure(adapted(), step=1).rows
    assert wanted[0]["delta_frobenius"] > 0
    assert truth.measure(away, step=1).rows == wanted


REFUSED = "on the CPU and on CUDA and ROCm devices, found a tensor on mps; move it to the CPU first"


def test_what_computes_where_its_tensors_are_refuses_in_one_line(pair: Any) -> None:
    base, tuned = (next(iter(weights.values())) for weights in pair)
    for method in ("auto", "exact", "randomized"):
        with pytest.raises(TensorError, match=f"svd runs {REFUSED}"):
            rlspec.svd(elsewhere(base), 3, method=method)
    for first, second in ((elsewhere(base), elsewhere(tuned)), (base, elsewhere(tuned))):
        with pytest.raises(TensorError, match=f"restoring runs {REFUSED}"):
            rlspec.restore_matrix(first, second, 0.2)
    with pytest.raises(TensorError, match=rf"layers\.0.*: restoring runs {REFUSED}"):
        rlspec.restore_(named_module(there(pair[1])), SpectralBasis.from_tensors(pair[0], modules="q"))


@pytest.mark.parametrize("name", [MPS, "mps", torch.device("xpu", 1)])
def test_a_device_of_another_kind_is_refused_however_it_is_named(name: Any) -> None:
    with pytest.raises(OptionError, match=f"device='{name}': unsupported device; valid: auto, cpu"):
        choose_device(name)
    assert choose_device(torch.device("cuda", 3)) == torch.device("cuda", 3)  # not asked whether it is there
