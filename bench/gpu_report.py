"""The day a GPU is there: what runs, whether it is right, and how fast it is, in one command and under eight minutes.

``python bench/gpu_report.py`` needs no network and nothing beyond rlspec's own dependencies and Triton. First every
operation and job is checked against float64 at shapes of real models; what fails is told and not timed. Then times by
device events, variants interleaved call by call, with achieved bytes and flops and their share of what the card does
on a large copy and a large product, measured beside them. Markdown and JSON go to ``--out``, ready to be pasted
into an issue of ours.

``--device cpu --quick`` rehearses it on small shapes: the figures then say nothing about a GPU, and the report says so.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
import torch
from gpu_cases import Case, op_cases, restoration_case, svd_case, tracking_case
from gpu_clock import Clock, told, yardsticks
from gpu_iteration import iteration_cases
from gpu_solves import solve_cases
from harness import machine
from shapes import SHAPES, Shape

from rlspec.backend import choose_device
from rlspec.cli.env import environment
from rlspec.errors import OptionError

REHEARSAL = "A rehearsal on a CPU, on small shapes: no figure here says anything about a GPU."


def sections(device: torch.device, quick: bool) -> dict[str, Callable[[], Iterable[Case]]]:
    """Title -> the cases, made when their turn comes."""
    if quick:
        shapes = [Shape("a small model", p, 96 if p == "q" else 48, 96, 2) for p in "qkv"]
        size, layers, batch, solves = 96, 2, (3, 128), (16, 32)
    else:
        shapes = [SHAPES[f"Qwen2.5-7B:{p}"] for p in "qkv"]
        size, layers, batch, solves = 3584, shapes[0].layers, (32, 4096), (64, 256, 768)
    return {
        "Operations": lambda: op_cases(size, size, min(layers, 4), device),
        "Operations of a truncated decomposition": lambda: iteration_cases(size, min(layers, 4), device),
        "Tracking": lambda: [tracking_case(shapes, layers, device)],
        "Restoration": lambda: [restoration_case(shapes[0], device)],
        "Truncated decompositions": lambda: [svd_case(*batch, device)],
        "Small dense solves": lambda: solve_cases(min(layers, 8), solves, device),
    }


def rows(
    title: str, cases: Callable[[], Iterable[Case]], clock: Clock, best: dict[str, float]
) -> tuple[list[dict[str, Any]], bool]:
    """A section's cases, measured, and whether there was time for all. One that cannot be made ends its section alone."""
    found: list[dict[str, Any]] = []
    try:
        coming = iter(cases())
        while not clock.late:
            if (case := next(coming, None)) is None:
                return found, True
            found.append(measured(case, clock, best))
    except Exception as error:  # the other sections are worth knowing all the same
        missing = blank(f"{title}, case {len(found) + 1} and on", [])
        return [*found, {**missing, "failure": f"not made: {told(error)}"}], True
    return found, False


def blank(title: str, notes: list[str]) -> dict[str, Any]:
    return {"title": title, "notes": notes, "seconds": {}, "left_out": {}}


def measured(case: Case, clock: Clock, best: dict[str, float]) -> dict[str, Any]:
    """One case's gate and, where it holds, its times; what other variants fail with stands beside ours."""
    row = blank(case.title, case.notes)
    try:
        row["error_over_bar"] = case.error()
    except Exception as error:  # what is left is worth knowing all the same
        row["failure"] = told(error)
        return row
    if not row["error_over_bar"] <= 1.0:
        row["failure"] = "wrong: not timed"
        return row
    times = clock.interleaved(case.variants, seconds=20.0)
    mine = next(iter(case.variants))
    if mine in times.failed:
        row["failure"] = times.failed[mine]
        return row
    missing = [name for name in case.variants if name not in times.seconds]
    row["left_out"] = {name: times.failed.get(name, "the time was over") for name in missing}
    row["seconds"] = times.seconds
    if mine not in times.seconds:
        return row
    ours = times.seconds[mine]
    fastest = max(rate for name, rate in best.items() if name != "copy")
    for name, amount, rate in (("bytes", case.bytes, best["copy"]), ("flops", case.flops, fastest)):
        if amount:
            row[name] = {"per_second": amount / ours, "share_of_best": amount / ours / rate}
    return row


def facts(device: torch.device) -> dict[str, str]:
    found = {**environment(), **{name: str(value) for name, value in machine().items()}}
    if device.type == "cuda":
        found["card"] = card(device)
    return found


def card(device: torch.device) -> str:
    """What nvidia-smi says of a device, asked by UUID: its own numbers know nothing of CUDA_VISIBLE_DEVICES."""
    ask = "name,driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu,memory.total"
    which = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    if which is None:
        return f"{torch.cuda.get_device_name(device)} (torch tells no UUID to ask nvidia-smi about)"
    command = ["nvidia-smi", f"--id=GPU-{which}", f"--query-gpu={ask}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{torch.cuda.get_device_name(device)} (nvidia-smi: {error})"


def markdown(report: dict[str, Any]) -> str:
    best = report["yardsticks"]
    lines = [f"# rlspec on {report['device']}", ""]
    if report["rehearsal"]:
        lines += [f"**{REHEARSAL}**", ""]
    rates = [f"{rate / 1e12:.4g} TFLOP/s {name}" for name, rate in best.items() if name != "copy"]
    lines += [
        f"The card at its best, beside the rest: copy {best['copy'] / 1e12:.4g} TB/s, {', '.join(rates)}.",
        "",
    ]
    for title, found in report["sections"].items():
        lines += [
            f"## {title}",
            "",
            "| what | variant | ms | of ours | error / bar | of the best |",
            "|---|---|---|---|---|---|",
        ]
        for row in found:
            gate = f"{row['error_over_bar']:.2g}" if "error_over_bar" in row else "–"
            if "failure" in row:
                lines.append(f"| {row['title']} | **{row['failure']}** | | | {gate} | |")
            ours = next(iter(row["seconds"].values()), 1.0)
            shares = [f"{row[x]['share_of_best']:.0%} {x}" for x in ("bytes", "flops") if x in row]
            for i, (name, taken) in enumerate(row["seconds"].items()):
                first = (row["title"], gate, ", ".join(shares)) if i == 0 else ("", "", "")
                lines.append(
                    f"| {first[0]} | {name} | {taken * 1e3:.4g} | {taken / ours:.3g}x | {first[1]} | {first[2]} |"
                )
            lines += [f"| {row['title']} | {name} | {why} | | | |" for name, why in row["left_out"].items()]
        lines += ["", *(f"{note}" for row in found for note in row["notes"]), ""]
    if report["left_out"]:
        lines += [f"Left out, the time was over: {', '.join(report['left_out'])}.", ""]
    lines += [
        "## Environment",
        "",
        *(f"* {name}: {value}" for name, value in report["environment"].items()),
        "",
    ]
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--device", "name", default="cuda", show_default=True, help="cuda, cuda:1, or cpu to rehearse.")
@click.option("--quick", is_flag=True, help="Small shapes.")
@click.option("--seconds", default=440.0, show_default=True, help="After this long no call is begun.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("gpu-report"), show_default=True, help="Folder."
)
def main(name: str, quick: bool, seconds: float, out: Path) -> None:
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise click.ClickException(
            "torch finds no GPU here; --device cpu --quick rehearses the report without one"
        )
    try:
        device = choose_device(name)
    except OptionError as error:
        raise click.ClickException(str(error)) from None
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)  # for what does not say which: libraries, and operations of no tensor
    clock = Clock(device, time.monotonic() + seconds)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU",
        "rehearsal": device.type != "cuda",
        "environment": facts(device),
        "yardsticks": yardsticks(device, 256 if quick else 8192),
        "sections": {},
        "left_out": [],
    }
    out.mkdir(parents=True, exist_ok=True)
    for title, cases in sections(device, quick).items():
        if clock.late:
            report["left_out"].append(title)
        else:
            click.echo(f"{title} ...", err=True)
            report["sections"][title], whole = rows(title, cases, clock, report["yardsticks"])
            report["left_out"] += [] if whole else [f"whatever was left of {title}"]
        text = markdown(report)  # written after each section: what is known survives a crash in the next
        (out / "report.md").write_text(text)
        (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    click.echo(text)
    wrong = [row["title"] for found in report["sections"].values() for row in found if "failure" in row]
    if wrong:
        raise click.ClickException(f"failed: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
