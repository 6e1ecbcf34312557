"""Accuracy and time of leading singular subspaces, against LAPACK and the textbook randomized SVD in the same run.

``python bench/svd_bench.py`` takes about three minutes on two cores; it needs rlspec only, and uses scikit-learn,
matplotlib and the weights of SmolLM2-135M where they are installed. k is 20 % of min(m, n), the share at which
attention weights are flat. A method of rlspec that misses its tolerance or its own bound stops the bench.

Errors are against planted factors in float64: the worst relative error of a singular value, the sine of the largest
angle (left or right), and the error of the rank-k part U S Vh. GFLOP/s count the direct method's 4 m n r + 8 r^3
operations for dense methods, and products with A for the others, so only the time compares between rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from harness import (
    gemm_peak,
    machine,
    peak_memory_mib,
    plot_error_against_time,
    reset_peak_memory,
    summary,
    table,
    timed,
)
from shapes import SHAPES, Shape, matrix
from torch import Tensor

import rlspec
from rlspec.linalg.angles import principal_angles, principal_sines
from rlspec.linalg.svd import SVDResult

Factors = tuple[Tensor, Tensor, Tensor]
Run = Callable[[Tensor, int], Factors]

DEFAULT = ("SmolLM2-135M:q", "SmolLM2-135M:v", "Qwen2.5-7B:v", "Llama-3.2-1B:q")


def rlspec_method(method: str, tol: float) -> Run:
    def run(a: Tensor, k: int) -> Factors:
        found = rlspec.svd(a, k, method=method, tol=tol)  # type: ignore[arg-type]
        return found.U, found.S, found.Vh

    return run


def lapack(a: Tensor, k: int) -> Factors:
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    return u[:, :k], s[:k], vh[:k]


def lowrank(niter: int) -> Run:
    def run(a: Tensor, k: int) -> Factors:
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(a, q=min(round(1.1 * k), *a.shape), niter=niter)
        return u[:, :k], s[:k], v[:, :k].T

    return run


def methods(quick: bool, tol: float) -> dict[str, Run]:
    """Name -> method; ours first, since the gate is theirs."""
    found: dict[str, Run] = {
        "rlspec auto": rlspec_method("auto", tol),
        "rlspec randomized": rlspec_method("randomized", tol),
        "torch.linalg.svd": lapack,
    }
    for niter in (2,) if quick else (2, 4, 8):
        found[f"svd_lowrank niter={niter}"] = lowrank(niter)
    try:
        from sklearn.utils.extmath import randomized_svd
    except ImportError:
        return found

    def sklearn(a: Tensor, k: int) -> Factors:
        u, s, vh = randomized_svd(a.numpy(), k, n_oversamples=max(10, k // 10), n_iter=4, random_state=0)
        return torch.from_numpy(u.copy()), torch.from_numpy(s.copy()), torch.from_numpy(vh.copy())

    found["sklearn n_iter=4"] = sklearn
    return found


def errors(found: Factors, u: Tensor, s: Tensor, v: Tensor) -> dict[str, float]:
    """Against the planted leading factors, (m, k), (k,), (n, k)."""
    uk, sk, vk = (x.double() for x in found)
    difference = (uk * sk) @ vk - (u * s) @ v.T
    return {
        "sigma_error_rel_max": float(((sk - s) / s).abs().max()),
        "max_sine": float(torch.maximum(principal_sines(u, uk)[0], principal_sines(v, vk.T)[0])),
        "rank_k_error_rel": float(difference.norm() / s.norm()),
    }


def flops(name: str, shape: Shape, k: int) -> float:
    m, n, r = shape.rows, shape.cols, min(shape.rows, shape.cols)
    if name.startswith(("svd_lowrank", "sklearn")):
        return (2 + 2 * int(name.rsplit("=", 1)[1])) * 2.0 * m * n * round(1.1 * k)
    return 4.0 * m * n * r + 8.0 * r**3


def bench_shape(shape: Shape, quick: bool, tol: float, peak: float) -> list[dict[str, Any]]:
    a, u, s, v, label = matrix(shape)
    k = max(1, round(0.2 * min(shape.rows, shape.cols)))
    u, s, v = u[:, :k], s[:k], v[:, :k]
    rows: list[dict[str, Any]] = []
    for name, run in methods(quick, tol).items():
        reset_peak_memory()
        row = {
            "shape": shape.name,
            "m": shape.rows,
            "n": shape.cols,
            "k": k,
            "spectrum": label,
            "method": name,
        }
        ours = name.startswith("rlspec")
        if ours:
            found = rlspec.svd(a, k, method=name.split()[1], tol=tol)  # type: ignore[arg-type]
            row |= errors((found.U, found.S, found.Vh), u, s, v)
            gate(name, a, k, found, row, tol)
        taken, factors = timed(lambda run=run: run(a, k), 1 if quick else 3, 12.0)
        row |= summary(taken)
        if not ours:
            row |= errors(factors, u, s, v)
            row["gflops"] = flops(name, shape, k) / row["median_seconds"] / 1e9
            row["share_of_gemm_peak"] = row["gflops"] / peak
        row["peak_memory_mib"] = peak_memory_mib()
        rows.append(row)
    reference = next(row["median_seconds"] for row in rows if row["method"] == "torch.linalg.svd")
    for row in rows:
        row["times_faster_than_lapack"] = reference / row["median_seconds"]
    return rows


def gate(name: str, a: Tensor, k: int, found: SVDResult, row: dict[str, Any], tol: float) -> None:
    """Stop unless rlspec's result is within its bound, and within its tolerance unless it says itself that it is not."""
    row |= {"subspace_bound": float(found.subspace_bound), "used": found.method, "notes": list(found.notes)}
    # The planted truth belongs to the matrix before its rounding to float32, which turns vectors by a little.
    s = torch.linalg.svdvals(a.double()) if min(a.shape) <= 768 else None
    slack = 2e-7 * float(found.S[0] / (s[k - 1] - s[k])) if s is not None else 1e-4
    certified = not any("too small to certify" in note for note in found.notes)
    if certified and row["max_sine"] > tol + slack:
        raise click.ClickException(
            f"{row['shape']} {name}: error {row['max_sine']:.1e} exceeds the tolerance {tol:.0e}"
        )
    if row["max_sine"] > row["subspace_bound"] + slack:
        raise click.ClickException(
            f"{row['shape']} {name}: error {row['max_sine']:.1e} exceeds the bound {row['subspace_bound']:.1e}"
        )
    if row["sigma_error_rel_max"] > 1e-5:
        raise click.ClickException(
            f"{row['shape']} {name}: singular values off by {row['sigma_error_rel_max']:.1e}"
        )


def bench_restoration(quick: bool, tol: float) -> list[dict[str, Any]]:
    """Errors of restored weights relative to the change that is meant, base and tuned decomposed apart."""
    shape = SHAPES["SmolLM2-135M:q"]
    base, *_ = matrix(shape)
    k = round(0.2 * min(base.shape))
    noise = torch.randn(base.shape, generator=torch.Generator().manual_seed(1))
    rows = []
    for size in (1e-3, 1e-2, 5e-2):
        tuned = base + size * base.norm() / noise.norm() * noise
        exact = change(lapack, base.double(), tuned.double(), k)
        truth = {side: _angles(base.double(), tuned.double(), k, side) for side in (0, 2)}
        for name, run in methods(quick, tol).items():
            error = float((change(run, base, tuned, k) - exact).norm() / exact.norm())
            rows.append({"update": size, "method": f"{name}, twice", "restored_error_rel": error})
        _, restored = timed(lambda t=tuned: rlspec.restore_matrix(base, t, k, dtype=torch.float32), 1, 60.0)
        error = float((restored.weight.double() - tuned.double() - exact).norm() / exact.norm())
        rows.append({"update": size, "method": "rlspec.restore_matrix", "restored_error_rel": error})
        taken, angles = timed(lambda t=tuned: paper_angles(base, t, k), 1, 60.0)
        worst = max(float((angles[i] - truth[i]).abs().max()) for i in (0, 2))
        rows.append(
            {
                "update": size,
                "method": "paper: two SVDs, arccos",
                "angle_error_rad_max": worst,
                **summary(taken),
            }
        )
    return rows


def change(run: Run, base: Tensor, tuned: Tensor, k: int) -> Tensor:
    """The change that putting the base's leading directions back means, float64."""
    ub, _, vb = (x.double() for x in run(base, k))
    ut, st, vt = (x.double() for x in run(tuned, k))
    return (ub * st) @ vb - (ut * st) @ vt


def paper_angles(base: Tensor, tuned: Tensor, k: int) -> dict[int, Tensor]:
    """Angles as arXiv 2508.16546 takes them, largest first: {0: left, 2: right}."""
    (ub, _, vb), (ut, _, vt) = lapack(base, k), lapack(tuned, k)
    cosines = {0: torch.linalg.svdvals(ub.T @ ut), 2: torch.linalg.svdvals(vb @ vt.T)}
    return {side: torch.arccos(c.clamp(max=1.0)).flip(-1).double() for side, c in cosines.items()}


def _angles(base: Tensor, tuned: Tensor, k: int, side: int) -> Tensor:
    one, other = lapack(base, k)[side], lapack(tuned, k)[side]
    return principal_angles(one, other) if side == 0 else principal_angles(one.T, other.T)


@click.command(help=__doc__)
@click.option("--shapes", default=",".join(DEFAULT), show_default=True, help=f"Any of {', '.join(SHAPES)}.")
@click.option(
    "--tol", default=1e-3, show_default=True, help="Sines asked of rlspec; its own default is 1e-4."
)
@click.option("--quick", is_flag=True, help="One repetition, fewer baselines.")
@click.option("--threads", type=int, help="torch threads; default: all.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all figures there.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write a plot of error against time there.")
def main(
    shapes: str, tol: float, quick: bool, threads: int | None, json_file: Path | None, plot: Path | None
) -> None:
    names = [name.strip() for name in shapes.split(",")]
    unknown = [name for name in names if name not in SHAPES]
    if unknown:
        raise click.BadParameter(
            f"no shape {unknown[0]!r}; choose from {', '.join(SHAPES)}", param_hint="--shapes"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    peak, dtype = gemm_peak()
    about = machine() | {"gemm_peak_gflops": round(peak), "gemm_peak_dtype": dtype}
    click.echo(", ".join(f"{key} {value}" for key, value in about.items()))
    results: list[dict[str, Any]] = []
    for name in names:
        rows = bench_shape(SHAPES[name], quick, tol, peak)
        results += rows
        click.echo(
            f"\n{name} {rows[0]['m']}x{rows[0]['n']}, k = {rows[0]['k']}, spectrum {rows[0]['spectrum']}"
        )
        head = (
            "method",
            "median s",
            "range s",
            "faster",
            "sigma",
            "max sine",
            "rank-k",
            "bound",
            "of GEMM",
            "MiB",
        )
        click.echo(table([head, *(_cells(row) for row in rows)]))
    restoration = bench_restoration(quick, tol)
    click.echo("\nrestored weight, SmolLM2-135M:q: error / intended change, by size of the update")
    sizes = sorted({row["update"] for row in restoration})
    by_method: dict[str, dict[float, str]] = {}
    for row in restoration:
        figure = row.get("restored_error_rel")
        text = f"{figure:.1e}" if figure is not None else f"angles {row['angle_error_rad_max']:.0e} rad off"
        by_method.setdefault(row["method"], {})[row["update"]] = text
    click.echo(
        table([("method", *map(str, sizes)), *((m, *(f[x] for x in sizes)) for m, f in by_method.items())])
    )
    if json_file is not None:
        whole = {"machine": about, "svd": results, "restoration": restoration}
        json_file.write_text(json.dumps(whole, indent=2) + "\n")
    if plot is not None and not plot_error_against_time(results, plot):
        click.echo("no plot: matplotlib is not installed")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    bound, share = row.get("subspace_bound"), row.get("share_of_gemm_peak")
    return (
        row["method"] + (f" ({row['used']})" if "used" in row else ""),
        f"{row['median_seconds']:.3f}",
        f"{row['min_seconds']:.3f}-{row['max_seconds']:.3f}",
        f"{row['times_faster_than_lapack']:.1f}x",
        f"{row['sigma_error_rel_max']:.0e}",
        f"{row['max_sine']:.0e}",
        f"{row['rank_k_error_rel']:.0e}",
        "" if bound is None else f"{bound:.0e}",
        "" if share is None else f"{share:.0%}",
        f"{row['peak_memory_mib']:.0f}",
    )


if __name__ == "__main__":
    main()
