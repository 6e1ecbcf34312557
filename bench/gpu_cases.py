"""What gpu_report.py checks and times: each operation at shapes of real models, and the jobs that are built of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from gpu_clock import Run, backend
from shapes import Shape, fitted_spectrum
from torch import Tensor

import rlspec
from rlspec.backend import triton_problem
from rlspec.io.projections import find_projections
from rlspec.linalg.rank import Rank
from rlspec.ops.add_low_rank import LowRank, add_low_rank
from rlspec.ops.add_rounded import add_rounded
from rlspec.ops.delta_matmul import delta_matmul, delta_rmatmul
from rlspec.ops.delta_stats import delta_stats
from rlspec.ops.draws import Draws
from rlspec.ops.gram import product_eps
from rlspec.ops.reference import sylvester_rotation_ref
from rlspec.ops.sylvester_rotation import rotation_of_images, sylvester_rotation
from rlspec.perturb.matrix import MatrixBasis, matrix_basis
from rlspec.perturb.reference import FLOOR

SHARE = 0.2
ETA = 1e-3
ALIGNED = 1e-3  # size of an update along the first singular vectors, of the weight


@dataclass
class Case:
    """Something to time: its variants, ours first, what each moves and multiplies, and whether ours is right.

    ``error`` is ours against float64 over the bar: above 1 is wrong. ``times`` of it make up the whole of the title.
    """

    title: str
    variants: dict[str, Run]
    error: Callable[[], float]
    bytes: float = 0.0
    flops: float = 0.0
    times: int = 1
    notes: list[str] = field(default_factory=list)


def backends(device: torch.device) -> tuple[str, ...]:
    return ("torch",) if triton_problem(device) is not None else ("triton", "torch")


def by_backend(device: torch.device, run: Run) -> dict[str, Run]:
    """The same call on each backend that the device has."""

    def on(name: str) -> Run:
        def call() -> object:
            with backend(name):
                return run()

        return call

    return {name: on(name) for name in backends(device)}


def worst(found: Tensor, truth: Tensor, bar: Tensor | float) -> float:
    """The largest error over its bar; NaN counts as infinite."""
    share = ((found.double() - truth.double()).abs() / bar).max()
    return float(torch.nan_to_num(share, nan=float("inf")))


# One pair of orthonormal factors a shape serves all layers: theirs differ by signs of columns and in the values.
def planted(shape: Shape, layers: int, device: torch.device) -> list[tuple[Tensor, Tensor, Tensor]]:
    """U (m, r), S (r,), Vh (r, n) of each layer, float32 on the device, S float64 on the host: spectra as flat as real
    ones."""
    generator = torch.Generator().manual_seed(0)
    r = min(shape.rows, shape.cols)
    u, v = (
        torch.linalg.qr(torch.randn(size, r, dtype=torch.float64, generator=generator).to(device))[0].float()
        for size in (shape.rows, shape.cols)
    )
    made = []
    for layer in range(layers):
        signs = 2.0 * torch.randint(0, 2, (r,), generator=generator).to(u) - 1.0
        s = fitted_spectrum(shape.projection, r) * (1 + 0.01 * layer)
        made.append((u * signs, s, v.mT.contiguous()))
    return made


def bases(shapes: list[Shape], layers: int, device: torch.device) -> dict[str, MatrixBasis]:
    found = {}
    for shape in shapes:
        for layer, (u, s, vh) in enumerate(planted(shape, layers, device)):
            name = f"model.layers.{layer}.self_attn.{shape.projection}_proj.weight"
            weight = (u * s.to(u)) @ vh
            found[name] = matrix_basis(name, weight, (u, s, vh), Rank.parse(SHARE))
    return found


def leading(basis: MatrixBasis) -> Tensor:
    """(m, n) float32, of the weight's Frobenius norm, along its first singular vectors."""
    return basis.W.float().norm() * (basis.U[:, :1] @ basis.Vh[:1]).to(basis.W.device, torch.float32)


def tuned(weight: Tensor, size: float = 1e-2, seed: int = 0) -> Tensor:
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)).to(weight)
    return weight + size * weight.norm() / noise.norm() * noise


def op_cases(m: int, n: int, layers: int, device: torch.device) -> Iterator[Case]:
    """Operations of the ops table, on stacks of bfloat16 weights (L, m, n)."""
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(layers, m, n, generator=generator).to(device).bfloat16()
    weight = (reference.float() * (1 + 1e-2)).bfloat16()
    e = weight.double() - reference.double()
    k = max(1, round(SHARE * min(m, n)))
    entries = layers * m * n
    shape = f"{layers} x {m} x {n}"

    def stats_error() -> float:
        found = delta_stats(weight, reference, eta=ETA)
        return worst(found.delta_sq, e.square().sum((1, 2)), 1e-4 * e.square().sum((1, 2)))

    yield Case(
        f"delta_stats, {shape} bfloat16",
        by_backend(device, lambda: delta_stats(weight, reference, eta=ETA)),
        stats_error,
        bytes=4.0 * entries,
    )
    for title, run, side, transposed in (
        ("E X", delta_matmul, n, False),
        ("Eᵀ Y", delta_rmatmul, m, True),
    ):
        x = torch.randn(layers, side, k, generator=generator).to(device)
        dense = e.float().mT if transposed else e.float()

        def error(run: Callable[..., Tensor] = run, x: Tensor = x, transposed: bool = transposed) -> float:
            wide = e[:1].mT if transposed else e[:1]
            bar = (wide.shape[-1] + 2) * 2.0**-20 * (wide.abs() @ x[:1].double().abs())
            return worst(run(weight, reference, x)[:1], wide @ x[:1].double(), bar)

        yield Case(
            f"delta_matmul, {title}, {shape} bfloat16, {k} columns",
            by_backend(device, lambda run=run, x=x: run(weight, reference, x))
            | {"E stored, torch.bmm": lambda dense=dense, x=x: dense @ x},
            error,
            bytes=4.0 * entries,
            flops=2.0 * entries * k,
        )
    change = 1e-3 * torch.randn(m, n, generator=generator).to(device)
    thin = LowRank(*(0.01 * torch.randn(size, 2 * k, generator=generator).to(device) for size in (m, n)))
    for rounding, draws in (("nearest", None), ("stochastic", Draws((1, 2)))):

        def stored(draws: Draws | None = draws) -> object:
            return add_rounded(weight[0], change, 1.0, torch.bfloat16, draws=draws)

        def rounded_error(draws: Draws | None = draws) -> float:
            found, _ = add_rounded(weight[0], change, 1.0, torch.bfloat16, draws=draws)
            truth, _ = add_rounded(weight[0].cpu(), change.cpu(), 1.0, torch.bfloat16, draws=draws)
            return 0.0 if torch.equal(found.cpu(), truth) else float("inf")

        yield Case(
            f"add_rounded, {rounding}, {m} x {n} bfloat16 (bits of the CPU path)",
            by_backend(device, stored),
            rounded_error,
            bytes=8.0 * m * n,
        )

    def low_rank_error() -> float:
        found, _ = add_low_rank(weight[0], thin, 1.0, torch.float32)
        exact = weight[0].double() + thin.left.double() @ thin.right.double().mT
        bar = (
            (2 * k + 3)
            * 2.0**-20
            * (thin.left.abs().double() @ thin.right.abs().double().mT + weight[0].abs())
        )
        return worst(found, exact, bar)

    yield Case(
        f"add_low_rank, {m} x {n} bfloat16, {2 * k} columns",
        by_backend(device, lambda: add_low_rank(weight[0], thin, 1.0, torch.bfloat16)),
        low_rank_error,
        bytes=4.0 * m * n,
        flops=2.0 * m * n * 2 * k,
    )
    yield from rotation_cases(m, n, layers, device)


def rotation_cases(m: int, n: int, layers: int, device: torch.device) -> Iterator[Case]:
    """How the leading vectors turn: after the two products that it follows from, and alone."""
    (u, s, vh), *_ = planted(Shape("", "q", m, n, 1), 1, device)
    r, w = len(s), max(1, round(1.25 * SHARE * len(s)))
    p = r - w
    us, values, vhs = (t.expand(layers, *t.shape).contiguous() for t in (u, s.to(device), vh))
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(layers, size, w, generator=generator).to(device) for size in (m, n))

    def turned(run: Callable[[], tuple[Tensor, ...]]) -> float:
        couplings, others, *turns = run()
        bars = (m + 2, us[0].mT, a[0], couplings[0]), (n + 2, vhs[0, w:], b[0], others[0])
        shares = [
            worst(found, x.double() @ y.double(), terms * 2.0**-20 * (x.abs().double() @ y.abs().double()))
            for terms, x, y, found in bars
        ]
        given = values[:1, w:], values[:1, :w], couplings[:1, w:], others[:1]
        sizes = sylvester_rotation_ref(*given[:2], given[2].abs(), given[3].abs(), floor=FLOOR)
        truth = sylvester_rotation_ref(*given, floor=FLOOR)
        # Values in float32 lose their rounding over their gap, at least FLOOR / 2 of them.
        bar = 2.0**-23 * (6 + 4 / FLOOR)
        return max(*shares, *(worst(t[:1], x, bar * size) for t, x, size in zip(turns, truth, sizes)))

    def images() -> tuple[Tensor, ...]:
        return rotation_of_images(us, vhs, values, a, b, floor=FLOOR)

    couplings, others, *_ = images()

    def alone() -> tuple[Tensor, ...]:
        turns = sylvester_rotation(values[:, w:], values[:, :w], couplings[:, w:], others, floor=FLOOR)
        return couplings, others, *turns

    for title, run, moved, flops in (
        ("after Uᵀ A and V2ᵀ B", images, m * r + n * p + (m + n) * w + (4 * p + w) * w, m * r + n * p),
        ("alone", alone, 4 * p * w, 0),
    ):
        yield Case(
            f"sylvester_rotation, {title}, {layers} x {m} x {n} float32, {w} columns",
            by_backend(device, run),
            lambda run=run: turned(run),
            bytes=4.0 * layers * moved,
            flops=2.0 * layers * flops * w,
        )


def tracking_case(shapes: list[Shape], layers: int, device: torch.device) -> Case:
    """An event of all matrices, against the paper's procedure and torch.svd_lowrank on one layer of them."""
    found = bases(shapes, layers, device)
    modules = dict.fromkeys(shape.projection for shape in shapes)
    weights = {name: basis.W for name, basis in found.items()}
    # The basis as from_tensors makes it, but for the decompositions, which are known here.
    projections = find_projections(
        {name: tuple(w.shape) for name, w in weights.items()}, tuple(modules), None
    )
    basis = rlspec.SpectralBasis(
        projections,
        [found[projection.name] for projection in projections],
        Rank.parse(SHARE),
        devices=dict.fromkeys(weights, device),
    )
    tracker = rlspec.SpectralTracker(basis)
    now = {name: tuned(weight, seed=i) for i, (name, weight) in enumerate(weights.items())}
    first = [name for name in now if ".layers.0." in name]

    def paper() -> None:
        for name in first:
            k = found[name].k
            u, _, vh = torch.linalg.svd(weights[name], full_matrices=False)
            u2, _, vh2 = torch.linalg.svd(now[name], full_matrices=False)
            for a, b in ((u[:, :k], u2[:, :k]), (vh[:k].mT, vh2[:k].mT)):
                torch.arccos(torch.linalg.svdvals(a.mT @ b).clamp(max=1.0))

    notes: list[str] = []

    def error() -> float:
        """Of one layer, from a basis that is decomposed as users' are: planted factors are off by their rounding. The
        second update is along the first singular vectors alone, where products lose to one side."""
        own = rlspec.SpectralBasis.from_tensors(
            {name: weights[name] for name in first}, modules=modules, rank=SHARE
        )
        along = {name: weights[name] + ALIGNED * leading(own.matrix(name)) for name in first}
        shares = []
        for current in ({name: now[name] for name in first}, along):
            record = rlspec.SpectralTracker(own).measure(current, step=0)
            missed = []
            for row in record.rows:
                name = str(row["name"])
                truth = torch.linalg.svdvals(current[name].double().cpu())[: found[name].k]
                wrong = float((record.arrays[f"{name}/sigma"].cpu().double() - truth).abs().max())
                shares.append(wrong / float(row["sigma_error_bound"] or 1e-300))
                missed.append(wrong / float((current[name].double() - weights[name].double()).norm()))
        counted = max(missed) / product_eps(device, torch.float32)
        notes[1:] = [
            f"Values under an update along the first vectors are off by {counted:.2g} product_eps of it."
        ]
        return max(shares)

    one = f"one layer of {layers}"
    notes.append(
        f"The last two do {one}: times {layers} for the same work; svd_lowrank has no bound and misses flat spectra."
    )
    return Case(
        f"tracking {len(now)} matrices of {shapes[0].model}, k = 20 %",
        by_backend(device, lambda: tracker.measure(now, step=0))
        | {
            f"paper's procedure, {one}": paper,
            f"torch.svd_lowrank, {one}": lambda: [
                torch.svd_lowrank(now[name], q=found[name].k, niter=2) for name in first
            ],
        },
        error,
        notes=notes,
    )


def restoration_case(shape: Shape, device: torch.device) -> Case:
    """One matrix restored with its base's decomposition at hand, against two decompositions."""
    (basis,) = bases([shape], 1, device).values()
    weight = tuned(basis.W)
    host = MatrixBasis(basis.name, basis.W.cpu(), basis.U.cpu(), basis.S, basis.Vh.cpu(), basis.k)

    def run() -> Tensor:
        return rlspec.restore_matrix(basis.W, weight, SHARE, basis=host, dtype=torch.float32).weight

    def dense(a: Tensor) -> Tensor:
        (u, s, vh), k = torch.linalg.svd(a, full_matrices=False), basis.k
        base = (basis.U[:, :k].to(a) * s[:k]) @ basis.Vh[:k].to(a)
        return a - (u[:, :k] * s[:k]) @ vh[:k] + base

    def error() -> float:
        truth = dense(weight.double())
        change = (truth - weight.double()).norm()
        return float((run().double() - truth).norm() / change) / 3e-3

    return Case(
        f"restore_matrix, {shape.rows} x {shape.cols}, k = 20 %",
        by_backend(device, run) | {"float32 SVD": lambda: dense(weight)},
        error,
    )


def svd_case(count: int, size: int, device: torch.device) -> Case:
    """Cold truncated decompositions of a batch."""
    shape = Shape("", "q", size, size, count)
    matrices = torch.stack([(u * s.to(u)) @ vh for u, s, vh in planted(shape, count, device)])
    k = max(1, round(SHARE * size))

    def error() -> float:
        found = rlspec.svd(matrices[:1], k, tol=1e-3)
        truth = fitted_spectrum("q", size)[:k]
        return float(((found.S[0].cpu().double() - truth).abs() / truth[0]).max()) / 1e-4

    return Case(
        f"rlspec.svd, {count} matrices of {size} x {size}, k = 20 %, sines <= 1e-3",
        by_backend(device, lambda: rlspec.svd(matrices, k, tol=1e-3))
        | {
            f"torch.linalg.svd, one of {count}": lambda: torch.linalg.svd(matrices[0], full_matrices=False),
            f"torch.svd_lowrank, all {count}, 2 iterations": lambda: torch.svd_lowrank(
                matrices, q=k, niter=2
            ),
        },
        error,
        flops=4.0 * count * size * size * k,
        notes=[
            "The rate counts one product with A and one with Aᵀ of k columns; the method takes several of each."
        ],
    )
