"""`rlspec restore`: the plan, the summary, the report, one clear line for what goes wrong, and interruptions."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from restore_toys import bytes_of, pair, rewrite, tensors_of
from safetensors.torch import save_file

from rlspec.cli import restore_text
from rlspec.cli.main import main
from rlspec.io.staging import Staging
from rlspec.restore import RestoreOptions
from rlspec.restore.plan import plan_restore


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return pair(tmp_path_factory.mktemp("llama"), dtype=torch.bfloat16, shard="60KB")


def invoke(*arguments: Any) -> Result:
    result = CliRunner().invoke(main, ["restore", *(str(argument) for argument in arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def arguments(checkpoints: tuple[Path, Path], out: Path | None = None) -> list[Any]:
    return ["--base", checkpoints[0], "--tuned", checkpoints[1], *(["--out", out] if out is not None else [])]


def check_refused(out: Path, result: Result, named: str) -> None:
    """One line on stderr, code 2, nothing on stdout, and nothing under the output's name."""
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1, result.stderr
    assert named in result.stderr
    assert result.stdout == ""
    assert not out.exists()


def test_help_names_every_option_and_loads_no_torch() -> None:
    code = (
        "import sys\nfrom rlspec.cli.main import main\n"
        "try: main(['restore', '--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    options = (
        "base tuned out rank part mode strength modules layers dtype rounding seed memory-gib exact resume"
    )
    options += " overwrite dry-run report"
    assert all(f"--{name} " in done.stdout for name in options.split())


def test_summary_and_report(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "report.json"
    result = invoke(*arguments(checkpoints, out), "--report", file, "--layers", "1", "--rank", "gap:0.2")
    assert result.exit_code == 0 and result.stderr == ""
    assert "restored 3 matrices (k 1, q 1, v 1), kept 18 tensors" in result.stdout
    assert "lost to rounding" in result.stdout and "--rounding stochastic keeps it" in result.stdout
    assert f"wrote {out}" in result.stdout
    report = json.loads(file.read_text())
    assert report["options"]["rank"] == "gap:0.2" and report["tuned"] == str(checkpoints[1])
    assert len(report["kept"]) == 18 and "model.norm.weight" in report["kept"]
    for row in report["matrices"]:
        assert row["layer"] == 1 and row["dtype"] == "bfloat16" and row["change_frobenius"] > 0
        assert 0 < row["rounding_share"] < 1 and row["error_estimate"] < row["change_frobenius"]
        assert 0 < row["rotation_sine_rms"] < 1
        before, after = (tensors_of(folder)[row["tensor"]] for folder in (checkpoints[1], out))
        assert row["entries_changed"] == int((before != after).sum())
        moved = (after.double() - before.double()).norm()
        assert abs(float(moved) - row["change_frobenius"]) <= row["rounding_share"] * row["change_frobenius"]


def test_bar_on_a_terminal_alone(checkpoints: tuple[Path, Path]) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    plan = plan_restore(*checkpoints, RestoreOptions())
    steps = plan.chosen("restore")
    for stream in (Terminal(), io.StringIO()):
        bar = restore_text.Bar(stream)
        bar.begin(steps)
        for step in steps:
            bar.step(step)
        bar.finishing()
        bar.close()
        text = stream.getvalue()
        if stream.isatty():
            assert "restore" in text and "100%" in text and "B/s" in text and "copying the rest" in text
        else:
            assert text == ""


def test_dry_run_writes_nothing(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    rewritten = pair(tmp_path / "odd")
    rewrite(rewritten[0], lambda t: t.pop("lm_head.weight"))
    for folder in rewritten:
        rewrite(folder, lambda t: t.update({"model.layers.0.mixer.weight": torch.randn(8, 8)}))
    before = sorted(tmp_path.rglob("*"))
    result = invoke(*arguments(rewritten), "--dry-run", "--modules", "q,lm_head", "--layers", "0")
    assert result.exit_code == 0, result.output
    assert sorted(tmp_path.rglob("*")) == before
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line}
    assert "directions  13/64" in lines["model.layers.0.self_attn.q_proj.weight"]
    assert "16,384" in lines["model.layers.0.self_attn.q_proj.weight"]
    assert lines["lm_head.weight"].endswith("not in the base")
    assert lines["model.layers.1.self_attn.q_proj.weight"].endswith("layer 1 is not among layers 0")
    assert lines["model.layers.0.mixer.weight"].endswith("name not known")
    assert "22 tensors: restore 1, keep 21" in result.stdout
    assert "estimated time (from a short measurement" in result.stdout
    assert "not matched by name: 1 matrices" in result.stdout
    assert "1 x model.layers.N.mixer.weight" in result.stdout
    assert "energy:0.9/64" in invoke(*arguments(checkpoints), "--dry-run", "--rank", "energy:0.9").stdout


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--rank", "much"), "rank 'much' is not valid"),
        (("--mode", "svd"), "unknown mode 'svd'; valid: directions, values, both, copy, interpolate"),
        (("--part", "x"), "--part 'x' is not valid"),
        (("--modules", "q,nothing"), "it matches no matrix"),
        (("--layers", "7"), "no 7..7 here; the model has 2 layers, 0 to 1"),
        (("--memory-gib", "0.001"), "--memory-gib 0.0 is too little: give --memory-gib"),
        (("--memory-gib", "0"), "--memory-gib 0.0 must be a number above 0"),
        (("--strength", "2"), "not in [0, 1]"),
        (("--dtype", "int8"), "unknown dtype 'int8'"),
    ],
)
def test_bad_options(
    options: tuple[str, ...], named: str, checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    check_refused(out, invoke(*arguments(checkpoints, out), *options), named)
    assert list(tmp_path.iterdir()) == []


def test_paths_that_are_refused(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = checkpoints
    before = bytes_of(base.parent)
    result = invoke(*arguments(checkpoints))
    assert result.exit_code == 2 and "Missing option '--out'" in result.stderr
    check_refused(
        tmp_path / "no",
        invoke("--base", tmp_path / "no", "--tuned", tuned, "--out", tmp_path / "o"),
        "no such",
    )
    out = tmp_path / "out"
    for report, named in (
        (base / "r.json", "inputs are never written"),
        (tmp_path / "x" / "r", "no folder"),
        (out, "choose a place beside it"),
        (tmp_path, "is a folder"),
    ):
        check_refused(out, invoke(*arguments(checkpoints, out), "--report", report), named)
    result = invoke(*arguments(checkpoints, tuned), "--overwrite")
    assert result.exit_code == 2 and "inputs are never written" in result.stderr
    assert bytes_of(base.parent) == before


def test_the_report_never_takes_the_place_of_an_input(tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    for path in (one, two):
        save_file({"model.layers.0.self_attn.q_proj.weight": torch.randn(8, 8)}, path)
    before = one.read_bytes(), two.read_bytes()
    for report in (one, two):
        result = invoke(
            "--base", one, "--tuned", two, "--out", tmp_path / "out", "--modules", "q", "--report", report
        )
        assert result.exit_code == 2 and "inputs are never written" in result.stderr
    assert (one.read_bytes(), two.read_bytes()) == before and not (tmp_path / "out").exists()


def test_a_base_under_other_prefixes(tmp_path: Path) -> None:
    """A base saved without its head lacks the prefix that the tuned model's names have."""
    g = torch.Generator().manual_seed(0)
    names = [f"h.{i}.attn.{p}.weight" for i in range(2) for p in ("c_attn", "c_proj")]
    base = {n: torch.randn(16, 48 if "c_attn" in n else 16, generator=g) for n in names}
    tuned = {f"transformer.{n}": w + 0.01 * torch.randn(w.shape, generator=g) for n, w in base.items()}
    for folder, tensors in (("bare", base), ("base", {f"transformer.{n}": w for n, w in base.items()})):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
    (tmp_path / "tuned").mkdir()
    save_file(tuned, tmp_path / "tuned" / "model.safetensors")
    outs = [tmp_path / f"out-{folder}" for folder in ("bare", "base")]
    for folder, out in zip(("bare", "base"), outs):
        result = invoke("--base", tmp_path / folder, "--tuned", tmp_path / "tuned", "--out", out)
        assert result.exit_code == 0, result.stderr
    assert bytes_of(outs[0]) == bytes_of(outs[1]) != bytes_of(tmp_path / "tuned")


def test_unknown_names_are_listed(tmp_path: Path) -> None:
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        tensors = {f"enc.block.{i}.{w}.weight": torch.randn(8, 8) for i in range(3) for w in ("wq", "wk")}
        save_file(tensors | {"bias": torch.zeros(8)}, tmp_path / name / "model.safetensors")
    result = invoke("--base", tmp_path / "base", "--tuned", tmp_path / "tuned", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "not matched by name: 3 x enc.block.N.wk.weight, 3 x enc.block.N.wq.weight" in result.stderr


def test_what_was_asked_for_and_left_is_told(tmp_path: Path) -> None:
    """A vocabulary that grew."""
    for name, rows in (("base", 20), ("tuned", 24)):
        (tmp_path / name).mkdir()
        tensors = {"model.layers.0.self_attn.q_proj.weight": torch.randn(8, 8)}
        tensors["model.embed_tokens.weight"] = torch.randn(rows, 8)
        save_file(tensors, tmp_path / name / "model.safetensors")
    options = ("--base", tmp_path / "base", "--tuned", tmp_path / "tuned", "--modules", "embed,q")
    result = invoke(*options, "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert "left as it is: 1 x model.embed_tokens.weight: [24, 8] here, [20, 8] in the base" in result.stderr


def test_outputs_and_bounds_that_look_odd(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    result = invoke(*arguments(checkpoints, tmp_path / "no" / ".." / "out"))
    assert result.exit_code == 0 and (tmp_path / "out").is_dir()
    for bound in ("nan", "inf", "-1"):
        for more in ((), ("--dry-run",)):
            result = invoke(*arguments(checkpoints, tmp_path / "other"), "--memory-gib", bound, *more)
            assert result.exit_code == 2 and "must be a number above 0" in result.stderr


def test_ctrl_c_says_how_to_go_on(
    checkpoints: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert invoke(*arguments(checkpoints, whole)).exit_code == 0
    plan = plan_restore(*checkpoints, RestoreOptions())
    held: dict[str, set[str]] = {}  # what is restored in each shard
    for each in plan.chosen("restore"):
        held.setdefault(each.entry.shard.name, set()).add(each.name)
    step, finish = restore_text.Bar.step, Staging.finish
    done: list[str] = []
    remembered = {
        name: threading.Event() for name in held
    }  # that a shard is complete: the copier may be behind

    def finishing(self: Any, name: str, size: int) -> None:
        finish(self, name, size)
        if name in remembered:
            remembered[name].set()

    def interrupted(self: Any, finished: Any) -> None:
        done.append(finished.name)
        step(self, finished)
        whole = [name for name, names in held.items() if names <= set(done)]
        if whole and len(done) >= 4:
            assert all(remembered[name].wait(600) for name in whole)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Staging, "finish", finishing)
    monkeypatch.setattr(restore_text.Bar, "step", interrupted)
    result = invoke(*arguments(checkpoints, out))
    assert result.exit_code == 130
    assert "Stopped; nothing is at" in result.stderr and "--resume" in result.stderr
    assert not out.exists()
    monkeypatch.undo()
    # Other settings cannot go on with it.
    result = invoke(*arguments(checkpoints, out), "--resume", "--rank", "0.3")
    check_refused(out, result, "belongs to other inputs or settings")
    file = tmp_path / "report.json"
    result = invoke(*arguments(checkpoints, out), "--resume", "--report", file)
    assert result.exit_code == 0, result.output
    assert bytes_of(out) == bytes_of(whole)
    report = json.loads(file.read_text())
    assert len(report["matrices"]) == 6 and 0 < report["resumed"] < 6
    assert f"{report['resumed']} of them were done before the interruption" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "report.json", "whole"]


def test_ctrl_c_tells_of_the_output_that_was_there(
    checkpoints: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert invoke(*arguments(checkpoints, out), "--modules", "v").exit_code == 0
    before = bytes_of(out)
    stop_after(1, monkeypatch)
    result = invoke(*arguments(checkpoints, out), "--overwrite")
    assert result.exit_code == 130 and bytes_of(out) == before
    assert f"Stopped; {out} is as it was. To finish it: the same command with --resume" in result.stderr


@pytest.mark.parametrize("overwrite", [False, True])
def test_ctrl_c_that_comes_too_late_says_so(
    overwrite: bool, checkpoints: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert invoke(*arguments(checkpoints, whole)).exit_code == 0
    if overwrite:
        assert invoke(*arguments(checkpoints, out), "--modules", "v").exit_code == 0
    remove, calls = shutil.rmtree, []

    def interrupted(path: Path, **options: Any) -> None:
        calls.append(path)
        if len(calls) == 1:
            raise KeyboardInterrupt
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    result = invoke(*arguments(checkpoints, out), *(["--overwrite"] if overwrite else []))
    assert result.exit_code == 130 and bytes_of(out) == bytes_of(whole)
    assert result.stderr.endswith(f"Stopped; {out} was complete before\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_an_output_that_appears_meanwhile_is_to_be_moved_away(
    checkpoints: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    at_begin(out.mkdir, monkeypatch)
    result = invoke(*arguments(checkpoints, out))
    told = f"what is finished is kept, once {out} is moved away, the same command with --resume goes on"
    assert result.exit_code == 2 and told in result.stderr
    assert "--resume" in result.stderr and invoke(*arguments(checkpoints, out), "--resume").exit_code == 2
    monkeypatch.undo()
    out.rename(tmp_path / "away")
    assert "of them were done before" in invoke(*arguments(checkpoints, out), "--resume").stdout


def test_where_nothing_is_kept_no_way_to_go_on_is_told(
    checkpoints: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = pair(tmp_path / "own")
    shard = base / "model.safetensors"
    at_begin(lambda: os.utime(shard, (2e9, 2e9)), monkeypatch)
    result = invoke(*arguments((base, tuned), tmp_path / "out"))
    check_refused(tmp_path / "out", result, "was written to while it was read")
    assert "--resume" not in result.stderr


SLOW = """
import sys, time
from rlspec.cli import restore_text
from rlspec.cli.main import main
step = restore_text.Bar.step
def slow(self, finished):
    step(self, finished)
    print("done", finished.name, flush=True)
    time.sleep(0.1)
restore_text.Bar.step = slow
main(["restore", *sys.argv[1:]])
"""


def test_sigterm_stops_as_ctrl_c_does(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert invoke(*arguments(checkpoints, whole)).exit_code == 0
    command = [sys.executable, "-c", SLOW, *map(str, arguments(checkpoints, out))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline().startswith("done")
    process.terminate()
    _, told = process.communicate()
    assert process.returncode == 143 and "Traceback" not in told
    assert "Stopped; nothing is at" in told and "--resume" in told and not out.exists()
    assert invoke(*arguments(checkpoints, out), "--resume").exit_code == 0
    assert bytes_of(out) == bytes_of(whole)


def test_changed_inputs_are_not_resumed(
    checkpoints: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = pair(tmp_path / "own", shard="60KB")
    stop_after(2, monkeypatch)
    out = tmp_path / "out"
    assert invoke(*arguments((base, tuned), out)).exit_code == 130
    monkeypatch.undo()
    shard = next(iter(sorted(base.glob("*.safetensors"))))
    status = shard.stat()
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    check_refused(out, invoke(*arguments((base, tuned), out), "--resume"), "belongs to other inputs")


def stop_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def step(self: Any, finished: Any) -> None:
        seen.append(finished)
        if len(seen) == count:
            raise KeyboardInterrupt

    monkeypatch.setattr(restore_text.Bar, "step", step)


def at_begin(action: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do something once the plan stands and the work begins."""
    begin = restore_text.Bar.begin
    monkeypatch.setattr(restore_text.Bar, "begin", lambda self, steps: (begin(self, steps), action()))


def test_a_shard_that_shrinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = pair(tmp_path / "own")
    shard = checkpoints[0] / "model.safetensors"
    at_begin(lambda: os.truncate(shard, 4096), monkeypatch)
    out = tmp_path / "out"
    result = invoke(*arguments(checkpoints, out))
    check_refused(out, result, str(shard))
    assert "self_attn" in result.stderr


def test_a_shard_that_vanishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = pair(tmp_path / "own")
    shard = checkpoints[0] / "model.safetensors"
    at_begin(shard.unlink, monkeypatch)
    out = tmp_path / "out"
    check_refused(out, invoke(*arguments(checkpoints, out)), str(shard))


def test_a_disk_that_is_full(
    checkpoints: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on file sizes fails writes the way a full disk does: in the middle, with an error code."""
    out = tmp_path / "out"
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
        result = invoke(*arguments(checkpoints, out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    check_refused(out, result, os.strerror(errno.EFBIG))
    assert invoke(*arguments(checkpoints, out), "--resume").exit_code == 0


def test_a_place_that_cannot_be_written(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    check_refused(out, invoke(*arguments(checkpoints, out)), str(out.parent))
    if os.geteuid() != 0:  # root may write everywhere
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
        check_refused(closed / "out", invoke(*arguments(checkpoints, closed / "out")), "ermission")
