"""Many processes measure what one would: DDP, FSDP2, tensor parallelism; and what happens when one of them fails."""

from __future__ import annotations

import datetime
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from process_toys import changed, held, together, toy_with_uneven_layers

from rlspec import SpectralBasis, SpectralTracker
from rlspec.io import weights
from rlspec.spectra import dealt
from rlspec.spectra.dealt import DealtTracker
from rlspec.spectra.processes import GatherError, ProcessError, Processes

MODULES = "q,k,v,o"


def measures(number: int, out: Path, kind: str, base: Path | None, rank: Any) -> None:
    model = held(toy_with_uneven_layers(), kind, dist.get_world_size())
    tracker = DealtTracker(model, base=base, modules=MODULES, rank=rank)
    record = tracker.measure(changed(model), step=3, stage="sft")
    (out / f"{number}.json").write_text(json.dumps(record.rows))


@pytest.mark.parametrize(
    ("count", "kind", "with_base", "rank"),
    [
        (2, "ddp", False, 0.2),
        (2, "fsdp2", False, 0.2),
        (4, "fsdp2", True, 3),
        (2, "tp", False, 0.2),
        (4, "tp and fsdp2", True, 0.2),
    ],
)
def test_rows_are_those_of_one_process_to_the_bit(
    count: int, kind: str, with_base: bool, rank: Any, tmp_path: Path
) -> None:
    start = toy_with_uneven_layers()
    reference = toy_with_uneven_layers(seed=5) if with_base else start
    base = tmp_path / "base" if with_base else None
    if base is not None:
        reference.save_pretrained(base)  # type: ignore[operator]
    basis = SpectralBasis.from_model(reference, modules=MODULES, rank=rank)
    assert together(count, measures, tmp_path, kind, base, rank) == [0] * count
    truth = SpectralTracker(basis).measure(changed(start), step=3, stage="sft").rows
    assert len(truth) == 12 and truth[0]["delta_relative"] > 1e-3
    for number in range(count):
        assert json.loads((tmp_path / f"{number}.json").read_text()) == truth


def test_the_base_may_name_its_tensors_with_another_prefix(tmp_path: Path) -> None:
    base = tmp_path / "base"
    toy_with_uneven_layers(seed=5).model.save_pretrained(base)  # type: ignore[union-attr, operator]
    assert together(2, measures, tmp_path, "fsdp2", base, 0.2) == [0, 0]
    basis = SpectralBasis.from_checkpoint(base, modules=MODULES)
    truth = SpectralTracker(basis).measure(changed(toy_with_uneven_layers()), step=3, stage="sft").rows
    assert truth[0]["name"].startswith("layers.")
    assert json.loads((tmp_path / "0.json").read_text()) == truth


def with_adapters() -> Any:
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    return peft.get_peft_model(toy_with_uneven_layers(), config).base_model.model


def trained(model: torch.nn.Module) -> torch.nn.Module:
    """The same with adapters that add something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.01)
    return model


def measures_adapters(number: int, out: Path, kind: str) -> None:
    def formed(*args: Any) -> Any:
        raise AssertionError("the product of the factors was formed")

    model = held(with_adapters(), kind, dist.get_world_size())
    tracker = DealtTracker(model, modules=MODULES)
    weights.with_adapters = formed  # type: ignore[attr-defined]
    record = tracker.measure(trained(model), step=3, stage="sft")
    (out / f"{number}.json").write_text(json.dumps(record.rows))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_adapters_are_measured_by_their_factors_as_one_process_does(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    basis = SpectralBasis.from_model(with_adapters(), modules=MODULES)
    truth = SpectralTracker(basis).measure(trained(with_adapters()), step=3, stage="sft").rows
    assert {row["module"] for row in truth if row["delta_frobenius"]} == {"q", "v"}
    assert together(2, measures_adapters, tmp_path, kind) == [0, 0]
    for number in range(2):
        assert json.loads((tmp_path / f"{number}.json").read_text()) == truth


def peak(number: int, out: Path, entries: int) -> None:
    """How many whole matrices are alive while the model is measured, counted at every gather."""
    import weakref

    from rlspec.io import module

    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = [0]
    right = module.ModuleTensors.value

    class Counted:
        pass

    def counting(self: Any, name: str) -> Any:
        tensor = right(self, name)
        handle = Counted()
        alive.add(handle)
        tensor.handle = handle
        most[0] = max(most[0], len(alive))
        return tensor

    model = held(toy_with_uneven_layers(), "fsdp2", 2)
    dealt.STACK_ENTRIES = entries
    tracker = DealtTracker(model, modules=MODULES)
    module.ModuleTensors.value = counting  # type: ignore[method-assign]
    tracker.measure(model, step=0)
    owned = [stack for stack in tracker._stacks if stack.owner == number]
    assert all(stack.tracker is not None for stack in owned)
    assert all(stack.tracker is None for stack in tracker._stacks if stack.owner != number)
    (out / f"{number}.json").write_text(json.dumps([most[0], len(owned)]))


def test_no_process_holds_a_gathered_matrix_beside_its_own_and_the_next_and_each_its_share_of_the_reference(
    tmp_path: Path,
) -> None:
    assert together(2, peak, tmp_path, 1) == [0, 0]  # as for large matrices: each alone
    found = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2)]
    assert max(most for most, _ in found) == 2  # its own, which waits for the end of the round
    assert sorted(owned for _, owned in found) == [6, 6]


def test_a_process_that_held_more_would_be_seen(tmp_path: Path) -> None:
    assert together(2, peak, tmp_path, 3 * 32 * 32) == [0, 0]  # stacks of three
    assert json.loads((tmp_path / "0.json").read_text())[0] >= 3


def at_once(number: int, out: Path) -> None:
    """Each waits for the other in the middle of its work."""
    others = dist.new_group(timeout=datetime.timedelta(seconds=10))
    right, met = SpectralTracker.measure, []

    def meets(self: Any, source: Any, **options: Any) -> Any:
        dist.barrier(others)
        met.append(number)
        return right(self, source, **options)

    SpectralTracker.measure = meets  # type: ignore[method-assign]
    dealt.STACK_ENTRIES = 1
    model = held(toy_with_uneven_layers(), "fsdp2", 2)
    DealtTracker(model, modules=MODULES).measure(model, step=0)
    assert len(met) == 6


def test_processes_work_on_their_shares_of_spread_weights_at_once(tmp_path: Path) -> None:
    assert together(2, at_once, tmp_path) == [0, 0]


def fails_in_one(number: int, out: Path, kind: str) -> None:
    right = SpectralTracker.measure

    def broken(self: Any, source: Any, **options: Any) -> Any:
        if number == 1 and options["step"] == 1:
            raise ZeroDivisionError("a fault\nof two lines")
        return right(self, source, **options)

    SpectralTracker.measure = broken  # type: ignore[method-assign]
    model = held(toy_with_uneven_layers(), kind, dist.get_world_size())
    tracker = DealtTracker(model, modules=MODULES)
    said = []
    for step in range(3):
        try:
            said.append(len(tracker.measure(model, step=step).rows))
        except ProcessError as error:
            said.append(str(error))
    (out / f"{number}.json").write_text(json.dumps(said))


@pytest.mark.parametrize("kind", ["fsdp2", "ddp"])
def test_one_that_fails_is_told_of_in_all_and_leaves_none_waiting(kind: str, tmp_path: Path) -> None:
    assert together(2, fails_in_one, tmp_path, kind) == [0, 0]
    for number in range(2):
        said = json.loads((tmp_path / f"{number}.json").read_text())
        assert said == [12, "process 1 of 2: ZeroDivisionError: a fault of two lines", 12]


def dies_in_one(number: int, out: Path) -> None:
    model = held(toy_with_uneven_layers(), "fsdp2", dist.get_world_size())
    tracker = DealtTracker(model, modules=MODULES)
    if number == 1:
        right = SpectralTracker.measure

        def killed(self: Any, source: Any, **options: Any) -> Any:
            os.kill(os.getpid(), signal.SIGKILL)
            return right(self, source, **options)

        SpectralTracker.measure = killed  # type: ignore[method-assign]
    with pytest.raises(GatherError):
        tracker.measure(model, step=0)
    os._exit(7)  # leaving a group that has lost one would wait for it


def test_when_one_is_killed_the_others_end_with_an_error(tmp_path: Path) -> None:
    assert together(3, dies_in_one, tmp_path) == [7, -signal.SIGKILL, 7]


def different(number: int, out: Path) -> None:
    model = toy_with_uneven_layers()
    if number == 1:
        model.model.layers = model.model.layers[:2]  # type: ignore[union-attr, index]
    with pytest.raises(ProcessError) as error:
        DealtTracker(model)
    (out / f"{number}.txt").write_text(str(error.value))
    nothing = torch.nn.Linear(2, 2) if number == 0 else model
    with pytest.raises(ProcessError, match="^process 0 of 2: "):
        DealtTracker(nothing)


def test_processes_with_different_matrices_are_refused_in_all(tmp_path: Path) -> None:
    assert together(2, different, tmp_path) == [0, 0]
    said = {(tmp_path / f"{number}.txt").read_text() for number in range(2)}
    assert len(said) == 1 and said.pop() == "process 1 of 2: holds other matrices than process 0"


def test_a_process_alone_is_no_group() -> None:
    alone = Processes.of_training()
    assert (alone.number, alone.count, alone.gathered(5), alone.first(6)) == (0, 1, [5], 6)
    alone.agree(None)
    with pytest.raises(ProcessError, match="^what$"):
        alone.agree("what")
