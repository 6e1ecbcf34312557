"""What one tracking event costs, against full decompositions of the same matrices in the same run.

``python bench/track_bench.py`` measures three stacks of attention matrices with synthetic weights (spectrum flat at
the cut, a Gaussian update of 1 % of the norm), k = 20 %. First the correctness gate: the delta engine must agree
with float64 decompositions within the bounds it reports. Then medians over a few repetitions:

* delta: ``SpectralTracker(engine="delta")``, the default of ``rlspec track``;
* exact: ``SpectralTracker(engine="exact")``, float64 decompositions and the same metrics;
* two SVDs: ``torch.linalg.svd`` in float32 of reference and current weights, cosines by a product, arccos: the
  procedure of arXiv 2508.16546.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch import Tensor

from rlspec import SpectralBasis, SpectralTracker

#: name -> (layers, {projection: (rows, columns)})
STACKS: dict[str, tuple[int, dict[str, tuple[int, int]]]] = {
    "embedded model (6 layers)": (6, {"q": (192, 192), "k": (96, 192), "v": (96, 192)}),
    "SmolLM2-135M (4 of 30 layers)": (4, {"q": (576, 576), "k": (192, 576), "v": (192, 576)}),
    "Llama-3.2-1B (1 of 16 layers)": (1, {"q": (2048, 2048), "k": (512, 2048), "v": (512, 2048)}),
}


def weights(layers: int, shapes: dict[str, tuple[int, int]], seed: int) -> dict[str, Tensor]:
    """Random orthogonal factors around σ_i = 1 / (1 + 3 i / r): ratios like those of real projections at the cut."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for layer in range(layers):
        for name, (m, n) in shapes.items():
            r = min(m, n)
            U = torch.linalg.qr(torch.randn(m, r, generator=generator)).Q
            V = torch.linalg.qr(torch.randn(n, r, generator=generator)).Q
            sigma = 1 / (1 + 3 * torch.arange(r) / r)
            made[f"model.layers.{layer}.self_attn.{name}_proj.weight"] = (U * sigma) @ V.T
    return made


def updated(base: dict[str, Tensor], size: float, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tuned = {}
    for name, W in base.items():
        E = torch.randn(W.shape, generator=generator)
        tuned[name] = W + size * W.norm() / E.norm() * E
    return tuned


def two_svds(base: dict[str, Tensor], tuned: dict[str, Tensor], share: float) -> None:
    for name, W in base.items():
        k = max(1, round(share * min(W.shape)))
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        U2, _, Vh2 = torch.linalg.svd(tuned[name], full_matrices=False)
        for A, B in ((U[:, :k], U2[:, :k]), (Vh[:k].T, Vh2[:k].T)):
            torch.arccos(torch.linalg.svdvals(A.T @ B).clamp(max=1.0))


def seconds(run: Callable[[], object], repeats: int) -> list[float]:
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return taken


def gate(delta: SpectralTracker, exact: SpectralTracker, tuned: dict[str, Tensor]) -> float:
    """The largest (error / reported bound) of a singular value or an angle; at most 1, or the bench stops."""
    ours, truth = delta.measure(tuned, step=0), exact.measure(tuned, step=0)
    worst = 0.0
    for row in ours.rows:
        name = row["name"]
        sigma = (ours.arrays[f"{name}/sigma"] - truth.arrays[f"{name}/sigma"]).abs().max()
        worst = max(worst, float(sigma) / float(row["sigma_error_bound"] or 1e-300))
        for side in ("left", "right"):
            key = f"{name}/sines_{side}"
            if key in ours.arrays:
                angle = (
                    (ours.arrays[key].clamp(max=1).asin() - truth.arrays[key].clamp(max=1).asin()).abs().max()
                )
                worst = max(worst, float(angle) / float(row["angle_error_bound_rad"] or 1e-300))
    if worst > 1:
        raise click.ClickException(f"correctness gate: an error is {worst:.2f} times its reported bound")
    return worst


@click.command(help=__doc__)
@click.option("--size", default=1e-2, show_default=True, help="‖ΔW‖ / ‖W‖.")
@click.option("--rank", default=0.2, show_default=True, help="Share of singular directions tracked.")
@click.option("--repeats", default=3, show_default=True, help="Repetitions of each measurement.")
@click.option("--threads", default=None, type=int, help="torch threads; default: all.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures there too.")
def main(size: float, rank: float, repeats: int, threads: int | None, json_file: Path | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    capability = torch.backends.cpu.get_cpu_capability()
    machine = (
        f"{platform.machine()}, {capability}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    click.echo(machine)
    click.echo(
        f"{'stack':<32}{'gate':>6}{'delta':>10}{'exact':>10}{'two SVDs':>10}{'exact/delta':>13}{'SVDs/delta':>12}"
    )
    results = []
    for stack, (layers, shapes) in STACKS.items():
        base = weights(layers, shapes, seed=0)
        tuned = updated(base, size, seed=1)
        basis = SpectralBasis.from_tensors(base, rank=rank)
        delta, exact = SpectralTracker(basis, engine="delta"), SpectralTracker(basis, engine="exact")
        worst = gate(delta, exact, tuned)
        taken = {
            "delta": seconds(lambda t=delta, w=tuned: t.measure(w, step=0), repeats),
            "exact": seconds(lambda t=exact, w=tuned: t.measure(w, step=0), repeats),
            "two_svds": seconds(lambda b=base, w=tuned: two_svds(b, w, rank), repeats),
        }
        median = {name: statistics.median(values) for name, values in taken.items()}
        click.echo(
            f"{stack:<32}{worst:>6.2f}{median['delta']:>9.3f}s{median['exact']:>9.3f}s{median['two_svds']:>9.3f}s"
            f"{median['exact'] / median['delta']:>12.1f}x{median['two_svds'] / median['delta']:>11.1f}x"
        )
        results.append({"stack": stack, "gate": worst, "seconds": taken})
    if json_file is not None:
        json_file.write_text(
            json.dumps({"machine": machine, "size": size, "results": results}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
