"""The GPU's report, rehearsed on a CPU: it runs from end to end, gates before it times, and never passes for a GPU's."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_cases
import gpu_clock
import gpu_iteration
import gpu_report
import gpu_solves
import pytest
import torch
from click.testing import CliRunner
from gpu_cases import Case
from gpu_clock import Clock
from gpu_report import REHEARSAL, main, measured
from gpu_solves import solve_cases
from roofline import CARDS, Stage
from roofline import main as roofline
from shapes import Shape
from solver_toys import host_jacobi
from torch import Tensor

from rlspec.linalg import solvers
from rlspec.linalg.jacobi import MOST_SWEEPS, Rotated, Rotates
from rlspec.linalg.solvers import Cusolver, Jacobi, Solved
from rlspec.ops.table import TABLE
from rlspec.perturb.delta import DenseDelta

BEST = {"copy": 1e10, "float32": 1e11}


def test_the_report_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLSPEC_CACHE", str(tmp_path / "cache"))
    result = CliRunner().invoke(main, ["--device", "cpu", "--quick", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    text = (tmp_path / "out" / "report.md").read_text()
    assert REHEARSAL in text and "# rlspec on a CPU" in text
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report["sections"]) >= {"Operations", "Tracking", "Restoration", "Truncated decompositions"}
    rows = [row for rows in report["sections"].values() for row in rows]
    assert all(0 <= row["error_over_bar"] <= 1 and row["seconds"] for row in rows)
    for operation in TABLE:  # each has a case with its bytes and flops
        mine = [row for row in rows if row["title"].startswith(f"{operation}, ")]
        assert mine and all(row["bytes"]["per_second"] > 0 for row in mine), operation


@pytest.mark.parametrize("operation", ["gram", "chebyshev_step", "residual_norms"])
def test_an_operation_that_is_a_little_wrong_is_seen(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(gpu_iteration, operation)
    # Residuals of planted triplets are rounding by themselves: a hundredth of an entry is what is wrong there.
    share, added = (1.0, 1e-2) if operation == "residual_norms" else (1.0 + 1e-2, 0.0)
    monkeypatch.setattr(gpu_iteration, operation, lambda *given: share * right(*given) + added)
    cases = gpu_iteration.iteration_cases(96, 2, torch.device("cpu"))
    wrong = {case.title.split(",")[0]: case.error() > 1.0 for case in cases}
    assert wrong == {name: name == operation for name in ("gram", "chebyshev_step", "residual_norms")}


def test_a_rotation_that_is_a_little_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = list(gpu_cases.rotation_cases(96, 80, 2, torch.device("cpu")))
    assert all(case.error() <= 1.0 for case in cases)
    for name, part in (("rotation_of_images", 1), ("rotation_of_images", 2), ("sylvester_rotation", 1)):
        right = getattr(gpu_cases, name)

        def wrong(
            *given: Any, right: Callable[..., Any] = right, part: int = part, **options: Any
        ) -> list[Tensor]:
            return [t * (1.0 + 1e-3 * (i == part)) for i, t in enumerate(right(*given, **options))]

        with monkeypatch.context() as patched:
            patched.setattr(gpu_cases, name, wrong)
            assert [case.error() > 1.0 for case in cases] == [
                name == "rotation_of_images",
                name != "rotation_of_images",
            ]


def test_products_that_lose_to_one_side_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the update along the first vectors: of random ones the losses cancel."""
    shape = Shape("a small model", "q", 96, 96, 1)
    case = gpu_cases.tracking_case([shape], 1, torch.device("cpu"))
    assert case.error() <= 1.0
    for name in ("matmul", "rmatmul"):
        right = getattr(DenseDelta, name)
        monkeypatch.setattr(DenseDelta, name, lambda e, x, right=right: right(e, x) * (1.0 - 2.0**-18))
    assert case.error() > 1.0 and float(case.notes[1].split(" by ")[1].split()[0]) > 2.0


def test_every_choice_of_small_solves_is_checked_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A solver that is right is timed cold and warm, with its sweeps told; one that is not is told alone."""

    class Wrong(Cusolver):
        def eigh(self, a: torch.Tensor) -> Solved:
            return Solved(*torch.linalg.eigh(a + 1e-3 * a.abs()), torch.zeros(len(a)))

    choices = {"jacobi": host_jacobi(), "cusolver": Wrong(None), "broken": Cusolver(None)}  # type: ignore[arg-type]
    monkeypatch.setattr(gpu_solves, "device_solvers", lambda device: (choices, ["magma: left out."]))
    monkeypatch.setitem(solvers._MOST_COLUMNS, "broken", 1024)
    cases = list(solve_cases(2, (33,), torch.device("cpu")))
    assert len(cases) == 2
    for case in cases:
        assert {"jacobi, cold", "jacobi, warm"} <= case.variants.keys() and case.error() <= 1
        assert "cusolver, cold" not in case.variants
        told = " ".join(case.notes)
        assert (
            "magma: left out" in told
            and "wrong: not timed" in told
            and "broken, cold: AttributeError" in told
        )
        cold, warm = (int(re.search(rf"jacobi, {w}: .*?(\d+) sweeps", told)[1]) for w in ("cold", "warm"))  # type: ignore[index]
        assert warm < cold or ("cores" in case.title and warm <= 4)  # cold begins with the Gram matrix there
        assert all(run() is not None for run in case.variants.values())


def test_a_kernel_of_small_matrices_is_left_out_for_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_solves, "device_solvers", lambda device: ({"triton": host_jacobi()}, []))
    small, large = (list(solve_cases(1, (n,), torch.device("cpu"))) for n in (64, 65))
    assert [case.title.split(",")[0] for case in small[:2]] == ["jacobi", "jacobi"]
    assert all("triton, cold" in case.variants for case in small[2:])
    assert len(large) == 2 and not any("triton, cold" in case.variants for case in large)


def test_a_jacobi_that_is_a_little_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Off:
        """Results that are off by a share, or what the right one has after so many sweeps."""

        def __init__(self, most_sweeps: int = MOST_SWEEPS, **shares: float) -> None:
            self.most_sweeps, self.shares = most_sweeps, shares

        def rotate(self, g: Tensor, v: Tensor | None = None, *, most_sweeps: int = MOST_SWEEPS) -> Rotated:
            found = host_jacobi().library.rotate(g, v, most_sweeps=min(most_sweeps, self.most_sweeps))
            return found._replace(
                **{name: getattr(found, name) * share for name, share in self.shares.items()}
            )

    def cases(kernel: Rotates) -> list[Case]:
        solver = Jacobi(kernel, "triton")
        monkeypatch.setattr(gpu_solves, "device_solvers", lambda device: ({"triton": solver}, []))
        return list(solve_cases(2, (16,), torch.device("cpu")))[:2]

    for case in cases(Off()):
        assert case.error() <= 1.0 and case.bytes > 0 and case.flops > 0
        assert re.fullmatch(r"jacobi, 16 x 16 float\d\d: \d+ sweeps at most\.", case.notes[0])
    for name in ("values", "left", "right"):
        assert all(case.error() > 1.0 for case in cases(Off(**{name: 1.0 + 1e-4}))), name
    assert all(case.error() == float("inf") for case in cases(Off(most_sweeps=3)))
    for case in cases(None):  # type: ignore[arg-type]
        assert "AttributeError" in case.notes[0] and case.flops == 0
        with pytest.raises(AttributeError):
            case.error()


def test_choices_that_cannot_be_compiled_are_left_out_with_the_reason() -> None:
    choices, left_out = gpu_solves.device_solvers(torch.device("cpu"))
    assert choices == {} and [text.partition(":")[0] for text in left_out] == ["jacobi", "cusolver", "triton"]


def test_what_is_wrong_is_told_and_not_timed() -> None:
    clock = Clock(torch.device("cpu"), float("inf"))
    calls: list[int] = []
    case = Case("wrong", {"ours": lambda: calls.append(1)}, lambda: float("nan"))
    assert measured(case, clock, BEST)["failure"] == "wrong: not timed" and not calls
    broken = Case("broken", {"ours": lambda: 1 / 0}, lambda: 0.0)
    assert "ZeroDivisionError" in measured(broken, clock, BEST)["failure"]


def test_a_variant_that_fails_takes_no_other_along() -> None:
    """A baseline is told and the rest is timed; ours is a failure, be it at once or in the middle of the rounds."""
    clock = Clock(torch.device("cpu"), float("inf"))
    turns = iter([None, None, None])

    def runs_out() -> object:
        return next(turns)

    case = Case(
        "a", {"ours": lambda: None, "driver": lambda: 1 / 0, "late": runs_out}, lambda: 0.0, bytes=1.0
    )
    row = measured(case, clock, BEST)
    assert "failure" not in row and list(row["seconds"]) == ["ours"] and row["bytes"]["per_second"] > 0
    assert row["left_out"] == {"driver": "ZeroDivisionError: division by zero", "late": "StopIteration: "}
    turns = iter([None, None, None])
    row = measured(Case("b", {"ours": runs_out, "theirs": lambda: None}, lambda: 0.0), clock, BEST)
    assert row["failure"] == "StopIteration: " and not row["seconds"]


def test_a_case_that_cannot_be_made_ends_its_section_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*sizes: object) -> Iterator[Case]:
        yield Case("the first", {"ours": lambda: None, "theirs": lambda: 1 / 0}, lambda: 0.0)
        raise MemoryError("no room")

    few = {"Operations": broken, "Restoration": lambda: [1 / 0], "Tracking": lambda: list(broken())[:0]}
    few["Small dense solves"] = lambda: [Case("the last", {"ours": lambda: None}, lambda: 0.0)]
    monkeypatch.setattr(gpu_report, "sections", lambda device, quick: few)
    result = CliRunner().invoke(main, ["--device", "cpu", "--quick", "--out", str(tmp_path)])
    assert (
        result.exit_code == 1
        and "failed: Operations, case 2 and on; Restoration, case 1 and on" in result.output
    )
    text = (tmp_path / "report.md").read_text()
    assert "| Operations, case 2 and on | **not made: MemoryError: no room** |" in text
    assert "| the first | theirs | ZeroDivisionError: division by zero |" in text
    found = json.loads((tmp_path / "report.json").read_text())["sections"]
    assert found["Operations"][0]["seconds"] and found["Small dense solves"][0]["seconds"]


def test_after_the_deadline_no_call_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a variant, a case or a section; what was measured before is kept, and the files tell the rest."""
    now = [0.0]
    monkeypatch.setattr(gpu_clock.time, "monotonic", lambda: now[0])
    begun: list[str] = []

    def taking(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            begun.append(name)
            now[0] += seconds

        return run

    variants = {"ours": taking("ours", 1.0), "slow": taking("slow", 50.0), "never": taking("never", 1.0)}
    row = measured(Case("a", variants, lambda: 0.0), Clock(torch.device("cpu"), 30.0), BEST)
    assert begun == ["ours", "ours", "slow"] and not row["seconds"] and "failure" not in row
    assert set(row["left_out"].values()) == {"the time was over"}

    def cases() -> Iterator[Case]:
        yield Case("b", {"ours": taking("b", 3.0)}, lambda: 0.0)
        yield Case("c", {"ours": taking("c", 3.0)}, lambda: 0.0)

    now[0] = 0.0
    monkeypatch.setattr(gpu_report, "yardsticks", lambda device, size: BEST)
    monkeypatch.setattr(gpu_report, "sections", lambda device, quick: {"First": cases, "Second": cases})
    out = ["--device", "cpu", "--out", str(tmp_path), "--seconds"]
    assert CliRunner().invoke(main, [*out, "10"]).exit_code == 0 and "c" not in begun
    assert (
        "Left out, the time was over: whatever was left of First, Second."
        in (tmp_path / "report.md").read_text()
    )
    assert CliRunner().invoke(main, [*out, "0"]).exit_code == 0


def test_a_card_is_timed_on_its_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on that of whichever is current: work on another one would be over at once."""
    recorded = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: object = "the current device's") -> None:
            recorded.append(stream)

        def elapsed_time(self, end: object) -> float:
            return 2000.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"that of {device}")
    assert Clock(torch.device("cuda", 1), float("inf")).once(lambda: None) == 2.0
    assert recorded == ["that of cuda:1"] * 2


def test_nvidia_smi_is_asked_by_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of CUDA_VISIBLE_DEVICES=3 is not its first."""
    asked = []

    def answer(command: list[str], **options: object) -> SimpleNamespace:
        asked.append(command[1])
        return SimpleNamespace(stdout="NVIDIA H100, 550.54\n")

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(gpu_report.subprocess, "run", answer)
    for properties in (SimpleNamespace(uuid="1f3a-77"), SimpleNamespace()):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=properties: found)
        assert gpu_report.card(torch.device("cuda", 0)).startswith("NVIDIA H100")
    assert asked == ["--id=GPU-1f3a-77"]


def test_without_a_gpu_it_says_what_to_do(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("for machines without a GPU")
    result = CliRunner().invoke(main, ["--out", str(tmp_path / "out")])
    assert result.exit_code == 1 and "--device cpu --quick" in result.output
    assert not (tmp_path / "out").exists()


def test_a_stage_takes_as_long_as_what_limits_it() -> None:
    card = CARDS["H100"]
    assert Stage("", 3.35e12, 0.0).seconds(card, "bf16") == (1.0, "bytes")
    assert Stage("", 0.0, card.tf32).seconds(card, "tf32x3") == (pytest.approx(3.0), "products")


def test_the_model_says_that_it_is_one() -> None:
    result = CliRunner().invoke(roofline, ["--model", "Qwen2.5-7B", "--card", "H100"])
    assert result.exit_code == 0 and "A MODEL, NOT A MEASUREMENT" in result.output
