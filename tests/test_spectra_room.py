"""A device that is short of memory: stacks measured by parts, to the same rows, and halved where it runs out anyway."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from module_toys import named_module
from pretend import DEVICE, Pretend, pretend_device, to_pretend
from test_device import there, weights
from torch import Tensor, nn

from rlspec.io.projections import Projection
from rlspec.perturb.reference import Reference, guard_width
from rlspec.spectra import SpectralBasis, SpectralTracker, room
from rlspec.spectra import tracker as tracker_module
from rlspec.spectra.dealt import DealtTracker
from rlspec.spectra.room import event_bytes, spans

COUNT = 6
_ROUNDING = 1e-7  # of bounds, which are rounding themselves; all else agrees to 1e-10
NAME = "model.layers.{}.self_attn.q_proj.weight"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """So small are the matrices, and where the machine is shared every barrier waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pair() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Matrices whose guard bands would end at different columns, each alone; small, refined, far and no updates."""
    base, tuned = weights((80, 64), COUNT, 1e-3, torch.float32)
    g = torch.Generator().manual_seed(3)
    for i, name in enumerate(base):
        u, s, vh = torch.linalg.svd(base[name], full_matrices=False)
        s[17 + i :] *= 0.9  # past the cut at 13
        e = tuned[name] - base[name]
        base[name] = (u * s) @ vh
        tuned[name] = base[name] + (1, 20, 0, 600, 1, 1)[i] * e
    tuned[NAME.format(5)] = base[NAME.format(5)] + 0.01 * torch.randn(80, 64, generator=g)
    return base, tuned


class Event:
    """A tracker on the pretend device, and the sizes of the stacks that its engine was given."""

    def __init__(
        self, pair: Any, monkeypatch: pytest.MonkeyPatch, factors: str, engine: str = "delta"
    ) -> None:
        base, self.tuned = pair
        self.basis = SpectralBasis.from_tensors(base, modules="q")
        self.basis._devices = {p.name: DEVICE for p in self.basis.projections}
        self.tracker = SpectralTracker(self.basis, factors=factors, engine=engine)
        self.sizes: list[int] = []
        self.fails = 0  # from stacks of so many on
        right = tracker_module._ENGINES[engine]

        def counted(reference: Reference, delta: Any, **options: Any) -> Any:
            self.sizes.append(len(reference.names))
            if 0 < self.fails <= len(reference.names):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return right(reference, delta, **options)

        monkeypatch.setitem(tracker_module._ENGINES, engine, counted)

    def measure(self, **options: Any) -> Any:
        self.sizes.clear()
        return self.tracker.measure(there(self.tuned), step=1, **options)

    def of(self, matrices: int, **options: Any) -> int:
        """Bytes for so many matrices of an event."""
        group = self.tracker._groups[0]
        return matrices * event_bytes((80, 64), group.width, wide=False, **{"nulls": False, **options})


def same(found: Any, truth: Any, arrays: bool = True) -> None:
    """But for the last digits of float64: products of more or fewer matrices at a time sum in other orders."""
    for row, wanted in zip(found.rows, truth.rows, strict=True):
        floats = {c: w for c, w in wanted.items() if isinstance(w, float)}
        close = {c: pytest.approx(w, rel=_ROUNDING, abs=1e-13) for c, w in floats.items()}
        assert row == {**wanted, **close}
    assert not arrays or found.arrays.keys() == truth.arrays.keys()
    for name in found.arrays:
        torch.testing.assert_close(found.arrays[name], truth.arrays[name], rtol=1e-12, atol=1e-12)


def test_parts_cover_a_stack_in_equal_shares_that_fit() -> None:
    for count in range(1, 30):
        for free in range(70):
            found = list(spans(count, 3, free))
            assert [i for start, stop in found for i in range(start, stop)] == list(range(count))
            sizes = [stop - start for start, stop in found]
            assert max(sizes) - min(sizes) <= 1
            assert max(sizes) * 3 <= max(free, 3)
            assert len(found) == 1 or (len(found) - 1) * (free // 3) < count  # no more parts than it takes
        assert list(spans(count, 3, None)) == [(0, count)]


@pytest.mark.parametrize("factors", ["device", "host"])
@pytest.mark.parametrize(("fit", "sizes"), [(0, [1] * 6), (2, [2, 2, 2]), (4, [3, 3]), (6, [6])])
def test_a_stack_is_measured_by_parts_that_fit_to_the_same_rows(
    fit: int, sizes: list[int], factors: str, pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pretend_device():
        event = Event(pair, monkeypatch, factors)
        truth = event.measure()
        assert event.sizes == [6]
        monkeypatch.setattr("rlspec.spectra.groups.free_bytes", lambda device: event.of(fit))
        found = event.measure()
        assert event.sizes == sizes
    same(found, truth)
    assert {row["engine"] for row in truth.rows} == {"delta", "exact"}


def test_parts_have_the_guard_band_of_the_whole(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And would be measured otherwise if each had its own."""
    with pretend_device():
        event = Event(pair, monkeypatch, "host")
        (group,) = event.tracker._groups
        alone = {guard_width(m.S[None], m.k, 80) for m in group.matrices}
        assert len(alone) > 1
        truth = event.measure()
        monkeypatch.setattr("rlspec.spectra.groups.free_bytes", lambda device: 0)
        same(event.measure(), truth)
        right = Reference.of

        def own(matrices: Any, *, width: int, **options: Any) -> Reference:
            return right(matrices, **options)

        monkeypatch.setattr(Reference, "of", own)
        with pytest.raises(AssertionError):
            same(event.measure(), truth)


def test_what_is_free_is_asked_at_each_event(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training holds more once it has stepped; random updates want more room than a measurement."""
    with pretend_device():
        event = Event(pair, monkeypatch, "host")
        free = [event.of(6)]
        monkeypatch.setattr("rlspec.spectra.groups.free_bytes", lambda device: free[0])
        truth = event.measure()
        assert event.sizes == [6]
        with_nulls = event.measure(null_draws=1)
        assert Counter(event.sizes) == {3: 6}  # two parts; the weights, their rounding and a draw of each
        free[0] = event.of(2)
        same(event.measure(), truth)
        assert event.sizes == [2, 2, 2]
        free[0] = event.of(6, nulls=True)
        same(event.measure(null_draws=1), with_nulls)
        assert Counter(event.sizes) == {6: 3}


@pytest.mark.parametrize("factors", ["device", "host"])
@pytest.mark.parametrize("at_end", [6, 2, 4])
def test_subspaces_of_parts_are_compared_with_those_of_other_parts(
    at_end: int, factors: str, pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _ = pair
    end = {
        name: w + 0.01 * torch.randn(w.shape, generator=torch.Generator().manual_seed(9))
        for name, w in base.items()
    }
    with pretend_device():
        event = Event(pair, monkeypatch, factors)
        truth = event.measure(end=event.tracker.subspaces(there(end)))
        monkeypatch.setattr("rlspec.spectra.groups.free_bytes", lambda device: event.of(at_end))
        ends = event.tracker.subspaces(there(end))
        monkeypatch.setattr("rlspec.spectra.groups.free_bytes", lambda device: event.of(3))
        found = event.measure(end=ends)
        assert event.sizes == [3, 3]
    same(found, truth)
    assert all(row["locking_left"] is not None for row in truth.rows)


@pytest.mark.parametrize("factors", ["device", "host"])
@pytest.mark.parametrize("engine", ["delta", "exact"])
@pytest.mark.parametrize(
    ("fails", "sizes"), [(6, [6, 3, 3]), (3, [6, 3, 1, 2, 3, 1, 2]), (2, [6, 3, 1, 2, 1, 1, 3, 1, 2, 1, 1])]
)
def test_a_part_that_runs_out_of_memory_is_halved_to_the_same_rows(
    fails: int, sizes: list[int], engine: str, factors: str, pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pretend_device():
        event = Event(pair, monkeypatch, factors, engine)
        truth = event.measure()
        event.fails = fails
        found = event.measure()
        assert event.sizes == sizes
    same(found, truth)


@pytest.mark.parametrize("most", [5, 2, 1])
def test_factors_that_do_not_fit_come_by_halves(
    most: int, pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pretend_device():
        event = Event(pair, monkeypatch, "host")
        truth = event.measure()
        right = Reference.of

        def short(matrices: Any, **options: Any) -> Reference:
            if len(matrices) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return right(matrices, **options)

        monkeypatch.setattr(Reference, "of", short)
        same(event.measure(), truth)
        assert event.sizes == {5: [3, 3], 2: [1, 2, 1, 2], 1: [1] * 6}[most]
        most = 0
        with pytest.raises(torch.OutOfMemoryError):
            event.measure()


def test_one_matrix_that_does_not_fit_is_an_error(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pretend_device():
        event = Event(pair, monkeypatch, "host")
        event.fails = 1
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            event.measure()


def test_a_failed_attempt_holds_nothing_when_its_halves_are_tried(
    pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its traceback would keep what it had allocated, and the halves would find no room either."""
    held: list[weakref.ref[Any]] = []
    with pretend_device():
        event = Event(pair, monkeypatch, "host")
        right = tracker_module._ENGINES["delta"]

        def fails(reference: Reference, delta: Any, **options: Any) -> Any:
            assert all(one() is None for one in held)
            if len(reference.names) > 3:
                temporary = reference.U.clone()
                held.append(weakref.ref(temporary))
                raise torch.OutOfMemoryError("CUDA out of memory")
            return right(reference, delta, **options)

        monkeypatch.setitem(tracker_module._ENGINES, "delta", fails)
        gc.disable()
        try:
            event.measure()
        finally:
            gc.enable()
    assert len(held) == 1


class Peak:
    """Counts the bytes of pretend tensors that are alive, and the most there were."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.most = 0
        self._views: Counter[int] = Counter()
        right = Pretend.__new__

        def made(cls: type, inner: Tensor) -> Pretend:
            tensor, storage = right(cls, inner), inner.untyped_storage()
            place, size = storage.data_ptr(), storage.nbytes()
            self._views[place] += 1
            if self._views[place] == 1:
                self.now += size
                self.most = max(self.most, self.now)
            weakref.finalize(tensor, self._gone, place, size)
            return tensor

        monkeypatch.setattr(Pretend, "__new__", made)

    def _gone(self, place: int, size: int) -> None:
        self._views[place] -= 1
        if self._views[place] == 0:
            self.now -= size


@pytest.mark.parametrize("nulls", [0, 1])
@pytest.mark.parametrize(
    ("shape", "rank", "eps", "dtype"),
    [
        ((256, 256), 0.2, 1e-3, torch.bfloat16),
        ((256, 256), 0.5, 5e-2, torch.float32),
        ((96, 512), 0.2, 1e-2, torch.bfloat16),
        ((512, 96), 1.0, 1e-2, torch.float32),
        ((192, 192), 0.2, 0.9, torch.bfloat16),
        ((192, 192), 0.5, 1e-2, torch.float64),
    ],
)
def test_an_event_takes_no_more_memory_than_is_planned_for_it(
    shape: tuple[int, int],
    rank: float,
    eps: float,
    dtype: torch.dtype,
    nulls: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, tuned = weights(shape, 3, eps, dtype)
    peak = Peak(monkeypatch)
    with pretend_device():
        basis = SpectralBasis.from_tensors(base, modules="q", rank=rank)
        basis._devices = {p.name: DEVICE for p in basis.projections}
        tracker = SpectralTracker(basis, factors="host")
        before = peak.now
        now = {name: to_pretend(w) for name, w in tuned.items()}
        tracker.measure(now, step=1, null_draws=nulls)
    group = tracker._groups[0]
    planned = 3 * event_bytes(shape, group.width, wide=dtype == torch.float64, nulls=nulls > 0)
    assert 0.4 * planned < peak.most - before <= planned


def test_the_cpu_is_not_asked_for_memory(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert room.free_bytes(torch.device("cpu")) is None
    seen = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: seen.append(device) or (5000, 9000))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 700)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 300)
    base, tuned = pair
    basis = SpectralBasis.from_tensors(base, modules="q", device="cpu")
    SpectralTracker(basis).measure(tuned, step=1)
    assert not seen
    assert room.free_bytes(DEVICE) == 5400  # what the allocator keeps of freed tensors is free, too


def copies(tensors: dict[str, Tensor]) -> nn.Module:
    """The matrices as a module on the pretend device."""
    return named_module({name: to_pretend(tensor) for name, tensor in tensors.items()})


def test_processes_with_copies_stack_on_a_device_as_one_process_does(
    pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They used to take a CPU's small stacks there."""
    base, tuned = pair
    monkeypatch.setattr(room, "STACK_ENTRIES", 1)
    with pretend_device():
        event = Event(pair, monkeypatch, "host")
        truth = event.measure()
        dealt = DealtTracker(copies(base), modules="q")
        assert len(dealt._stacks) == 1
        event.fails = 6  # halved there, too
        same(dealt.measure(copies(tuned), step=1), truth, arrays=False)


@pytest.mark.parametrize(
    ("device", "processes", "sizes"),
    [
        (DEVICE, 1, [7]),
        (DEVICE, 2, [4, 3]),
        (DEVICE, 4, [2, 2, 2, 1]),
        ("cpu", 2, [3, 3, 1]),
        ("cpu", 4, [3, 3, 1]),
    ],
)
def test_every_process_has_a_share_of_the_stacks(
    device: Any, processes: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU the stacks are those of one process, whose rows they give."""
    monkeypatch.setattr(room, "STACK_ENTRIES", 3 * 80 * 64)
    dealt = DealtTracker.__new__(DealtTracker)
    dealt.processes = SimpleNamespace(count=processes, number=0)  # type: ignore[assignment]
    dealt.projections = tuple(
        Projection(NAME.format(i).removesuffix(".weight"), NAME.format(i), i, "q") for i in range(7)
    )
    dealt._stacks = []
    dealt._deal({p.name: (80, 64) for p in dealt.projections}, torch.device(device))
    assert [len(stack.projections) for stack in dealt._stacks] == sizes
    assert len({stack.owner for stack in dealt._stacks}) == min(processes, len(sizes))
