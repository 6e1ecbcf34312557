"""What one tracking event costs, against full decompositions of the same matrices in the same run.

``python bench/track_bench.py`` measures the q, k and v projections of models by their shapes (``shapes.py``), k = 20 %,
an update of 1 % of the norm, in some minutes on two cores. First the correctness gate: values and angles must
agree with float64 decompositions within the bounds reported. Then medians over a few repetitions of

* delta: ``SpectralTracker(engine="delta")``, the default of ``rlspec track``, all its metrics included;
* one SVD: ``torch.linalg.svd`` in float32 of every current weight, nothing else;
* paper: the procedure of arXiv 2508.16546: float32 SVDs of reference and current weights, cosines of the leading
  vectors by a product, their SVD, arccos.

GFLOP/s count the matrix products of the delta engine's first order (``flops``), over the time of the whole event, and
their share of what the fastest product reaches here (float32 or bfloat16, named in the first line). Memory is the
largest resident size while a contender runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from harness import gemm_peak, machine, peak_memory_mib, reset_peak_memory, summary, table, timed
from shapes import SHAPES, Shape, matrix, real_weight
from torch import Tensor

from rlspec import SpectralBasis, SpectralTracker
from rlspec.perturb.reference import Reference

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Matrices measured together; ``times`` as many make one event of the whole model."""

    title: str
    weights: Callable[[], tuple[Weights, str]]
    times: int = 1


def name_of(layer: int, projection: str) -> str:
    return f"model.layers.{layer}.self_attn.{projection}_proj.weight"


def registered(
    model: str, projections: str = "qkv", layers: int | None = None
) -> Callable[[], tuple[Weights, str]]:
    """Matrices of a model of the registry: its real weights where they are installed, else planted spectra."""

    def make() -> tuple[Weights, str]:
        made, label = {}, ""
        for shape in (SHAPES[f"{model}:{p}"] for p in projections):
            for layer in range(layers if layers is not None else shape.layers):
                weight = real_weight(shape.projection, layer) if model == "SmolLM2-135M" else None
                if weight is not None:
                    label = "real weights"
                else:
                    weight, *_, label = matrix(shape, seed=layer)
                made[name_of(layer, shape.projection)] = weight
        return made, label

    return make


def embedded() -> tuple[Weights, str]:
    made, label = {}, ""
    for layer in range(6):
        for projection, rows in (("q", 192), ("k", 96), ("v", 96)):
            made[name_of(layer, projection)], *_, label = matrix(
                Shape("", projection, rows, 192, 6), seed=layer
            )
    return made, label


CASES = {
    "embedded": Case("embedded model: q, k, v of 6 layers", embedded),
    "135m": Case("SmolLM2-135M: q, k, v of 30 layers", registered("SmolLM2-135M")),
    "1b": Case("Llama-3.2-1B: q, k, v of one layer (of 16)", registered("Llama-3.2-1B", layers=1), 16),
    "7b-q": Case("Qwen2.5-7B: one q, 3584 x 3584", registered("Qwen2.5-7B", "q", layers=1)),
    "7b": Case("Qwen2.5-7B: q, k, v of one layer (of 28)", registered("Qwen2.5-7B", layers=1), 28),
    "8b": Case("Llama-3.1-8B: q, k, v of one layer (of 32)", registered("Llama-3.1-8B", layers=1), 32),
    "70b-k": Case("Llama-3.1-70B: one k, 1024 x 8192", registered("Llama-3.1-70B", "k", layers=1)),
}
DEFAULT = ("embedded", "135m", "1b", "7b-q", "7b")


def updated(base: Weights, size: float, rank: int | None, seed: int) -> Weights:
    """Plus a random update of the given relative size: Gaussian, or of the given rank."""
    generator = torch.Generator().manual_seed(seed)
    tuned = {}
    for name, weight in base.items():
        m, n = weight.shape
        if rank is None:
            e = torch.randn(m, n, generator=generator)
        else:
            e = torch.randn(m, rank, generator=generator) @ torch.randn(rank, n, generator=generator)
        tuned[name] = weight + size * weight.norm() / e.norm() * e
    return tuned


def one_svd(tuned: Weights) -> None:
    for weight in tuned.values():
        torch.linalg.svd(weight, full_matrices=False)


def paper(base: Weights, tuned: Weights, share: float) -> None:
    for name, weight in base.items():
        k = max(1, round(share * min(weight.shape)))
        u, _, vh = torch.linalg.svd(weight, full_matrices=False)
        u2, _, vh2 = torch.linalg.svd(tuned[name], full_matrices=False)
        for a, b in ((u[:, :k], u2[:, :k]), (vh[:k].T, vh2[:k].T)):
            torch.arccos(torch.linalg.svdvals(a.T @ b).clamp(max=1.0))


def gate(delta: SpectralTracker, exact: SpectralTracker, tuned: Weights) -> dict[str, float]:
    """The worst errors against float64; stops the bench where one exceeds the bound that goes with it."""
    ours, truth = delta.measure(tuned, step=0), exact.measure(tuned, step=0)
    worst = {"error_over_bound": 0.0, "sigma_rel": 0.0, "angles_frobenius_rel": 0.0, "angle_rad": 0.0}
    for row in ours.rows:
        name = row["name"]
        mine, right = ours.arrays[f"{name}/sigma"], truth.arrays[f"{name}/sigma"]
        error = (mine - right).abs()
        shares = [float(error.max()) / float(row["sigma_error_bound"] or 1e-300)]
        worst["sigma_rel"] = max(worst["sigma_rel"], float((error / right).max()))
        for key in (f"{name}/sines_left", f"{name}/sines_right"):
            if key in ours.arrays:
                x, y = (record.arrays[key].clamp(max=1).asin() for record in (ours, truth))
                angle = float((x - y).abs().max())
                shares.append(angle / float(row["angle_error_bound_rad"] or 1e-300))
                worst["angle_rad"] = max(worst["angle_rad"], angle)
                relative = float((x - y).norm() / y.norm())
                worst["angles_frobenius_rel"] = max(worst["angles_frobenius_rel"], relative)
        worst["error_over_bound"] = max(worst["error_over_bound"], *shares)
    if worst["error_over_bound"] > 1:
        raise click.ClickException(
            f"an error is {worst['error_over_bound']:.2f} times the bound reported with it"
        )
    return worst


def flops(basis: SpectralBasis) -> float:
    """Products of the first-order step: E V1, Eᵀ U1, their coordinates, and five products of the rotations."""
    total = 0.0
    for projection in basis.projections:
        matrix_basis = basis.matrix(projection.name)
        (m, n), k, r = matrix_basis.shape, matrix_basis.k, len(matrix_basis.S)
        w = Reference.of([matrix_basis]).width
        p = r - w
        total += 4.0 * m * n * w + 2.0 * m * w * w + 2.0 * p * (m + n) * w + 8.0 * p * w * w
        total += 4.0 * abs(m - n) * r * w + 4.0 * (r - k) * k * k
    return total


def bench(
    case: Case, size: float, rank: float, update_rank: int | None, repeats: int, peak: float, full: bool
) -> dict[str, Any]:
    base, label = case.weights()
    tuned = updated(base, size, update_rank, seed=1)
    modules = dict.fromkeys(name.rsplit("_proj", 1)[0][-1] for name in base)
    basis = SpectralBasis.from_tensors(base, rank=rank, modules=modules)
    delta, exact = SpectralTracker(basis, engine="delta"), SpectralTracker(basis, engine="exact")
    errors = gate(delta, exact, tuned)
    contenders: dict[str, tuple[Callable[[], object], int]] = {
        "delta": (lambda: delta.measure(tuned, step=0), repeats),
        "one SVD": (lambda: one_svd(tuned), 1 if case.times > 1 else repeats),
        "paper": (lambda: paper(base, tuned, rank), 1),
    }
    rows = {}
    for contender, (run, most) in contenders.items():
        reset_peak_memory()
        taken, _ = timed(run, most, 20.0)
        rows[contender] = summary(taken) | {"peak_memory_mib": peak_memory_mib()}
    whole = None
    if full and case.times > 1:
        # Every layer its own update; the reference factors are one layer's, reused.
        layers = (updated(base, size, update_rank, seed=layer) for layer in range(case.times))
        whole = sum(timed(lambda layer=layer: delta.measure(layer, step=0), 1, 0.0)[0][0] for layer in layers)
    gflops = flops(basis) / rows["delta"]["median_seconds"] / 1e9
    return {
        "case": case.title,
        "weights": label,
        "errors": errors,
        "contenders": rows,
        "gflops": gflops,
        "share_of_gemm_peak": gflops / peak,
        "whole_event_seconds_scaled": rows["delta"]["median_seconds"] * case.times,
        "whole_event_seconds_measured": whole,
        "times": case.times,
    }


def report(result: dict[str, Any]) -> str:
    rows, errors = result["contenders"], result["errors"]
    ours = rows["delta"]["median_seconds"]
    cells = [("", "median s", "range s", "of delta", "MiB")]
    for contender, row in rows.items():
        seconds = row["median_seconds"]
        span = f"{row['min_seconds']:.2f}-{row['max_seconds']:.2f}"
        cells.append(
            (contender, f"{seconds:.3f}", span, f"{seconds / ours:.1f}x", f"{row['peak_memory_mib']:.0f}")
        )
    lines = [
        f"\n{result['case']} ({result['weights']})" + table(cells),
        f"errors: values {errors['sigma_rel']:.0e}, angles {errors['angles_frobenius_rel']:.0e} (Frobenius, relative), "
        f"worst angle {errors['angle_rad']:.0e} rad, at most {errors['error_over_bound']:.2f} of the bound",
        f"{result['gflops']:.0f} GFLOP/s, {result['share_of_gemm_peak']:.0%} of the fastest product",
    ]
    if result["times"] > 1:
        scaled = result["whole_event_seconds_scaled"]
        lines.append(f"all layers, scaled by {result['times']}: {scaled:.1f} s an event")
    if result["whole_event_seconds_measured"] is not None:
        measured = result["whole_event_seconds_measured"]
        lines.append(
            f"all {result['times']} layers measured, one layer's factors reused: {measured:.1f} s an event"
        )
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--cases", default=",".join(DEFAULT), show_default=True, help=f"Any of {', '.join(CASES)}.")
@click.option("--size", default=1e-2, show_default=True, help="‖ΔW‖ / ‖W‖.")
@click.option("--update-rank", type=int, help="Rank of the update.  [default: full, Gaussian]")
@click.option("--rank", default=0.2, show_default=True, help="Share of singular directions tracked.")
@click.option("--repeats", default=3, show_default=True, help="Repetitions of each measurement.")
@click.option("--full", is_flag=True, help="Also measure every layer where one stands for all.")
@click.option("--threads", default=None, type=int, help="torch threads; default: all.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures there too.")
def main(
    cases: str,
    size: float,
    update_rank: int | None,
    rank: float,
    repeats: int,
    full: bool,
    threads: int | None,
    json_file: Path | None,
) -> None:
    names = [name.strip() for name in cases.split(",")]
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise click.BadParameter(
            f"no case {unknown[0]!r}; choose from {', '.join(CASES)}", param_hint="--cases"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    peak, dtype = gemm_peak()
    about = machine() | {"gemm_peak_gflops": round(peak), "gemm_peak_dtype": dtype}
    about |= {"size": size, "update_rank": update_rank, "rank": rank}
    click.echo(", ".join(f"{k} {v}" for k, v in about.items()))
    results = []
    for name in names:
        results.append(bench(CASES[name], size, rank, update_rank, repeats, peak, full))
        click.echo(report(results[-1]))
    if json_file is not None:
        json_file.write_text(json.dumps({"machine": about, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
