"""The error told of a restored matrix against the true one, over a seeded search of spectra, updates and cuts."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlspec import restore_matrix
from rlspec.linalg.factor import reference_factors
from rlspec.linalg.rank import Rank
from rlspec.perturb import estimate
from rlspec.perturb.matrix import matrix_basis
from rlspec.perturb.reference import Reference
from rlspec.perturb.residual import Residual
from rlspec.restore import change

F64 = torch.float64
SPECTRA = ["flat", "random", "decay", "power", "cluster", "spikes", "late spikes"]
UPDATES = ["small", "large", "rank 1", "rank 8", "sigma_1", "sigma_1 and noise", "sparse", "turned", "swap"]
SEEDS = 3


@dataclass(frozen=True)
class Case:
    """A base and a tuned matrix (m, n), what to restore of them, and whether the base's factors are float32."""

    base: Tensor
    tuned: Tensor
    k: int
    options: dict[str, Any]
    narrow: bool
    words: str


def spectrum(kind: str, r: int, k: int, draw: random.Random, g: torch.Generator) -> Tensor:
    """(r,) descending. A cluster has the cut at k inside."""
    u, x = torch.rand(r, dtype=F64, generator=g), torch.arange(r, dtype=F64) / r
    if kind == "flat":
        s = (3.0 * torch.exp(-4.0 * x.sqrt()) + 1.0 - 0.95 * x**1.2) * (1.0 + 0.01 * u)
    elif kind == "decay":
        s = torch.exp(-draw.uniform(2, 12) * x) * (1.0 + 0.01 * u)
    elif kind == "power":
        s = (1.0 + r * x) ** -draw.uniform(0.3, 1.5) * (1.0 + 0.01 * u)
    elif kind == "cluster":
        s = (1.5 - x + 0.01 * u).sort(descending=True).values
        size = draw.choice([2, 4, 8, 20])
        first = max(0, k - draw.randint(1, size))
        several = slice(first, min(r, first + size))
        s[several] = s[several].mean() * (1.0 + 10 ** draw.uniform(-6, -2) * u[several])
    else:
        s = 0.1 + 0.9 * u
        spikes = {"random": 0, "spikes": draw.choice([1, 2, 5]), "late spikes": max(1, k // 2)}[kind]
        s[:spikes] = 10 ** draw.uniform(0.5, 2) * (1.0 + u[:spikes])
    return s.sort(descending=True).values


def update(
    kind: str, w: Tensor, u: Tensor, v: Tensor, k: int, draw: random.Random, g: torch.Generator
) -> Tensor:
    m, n = w.shape
    e, eps = torch.randn(m, n, dtype=F64, generator=g), 10 ** draw.uniform(-5, -1.1)
    if kind == "small":
        eps = 10 ** draw.uniform(-6, -3)
    elif kind == "large":
        eps = 10 ** draw.uniform(-2, -1.02)
    elif kind.startswith("rank"):
        rank = int(kind.split()[1])
        e = e[:, :rank] @ torch.randn(rank, n, dtype=F64, generator=g)
    elif kind.startswith("sigma_1"):
        first = torch.outer(u[:, 0], v[:, 0])
        noise = 10 ** draw.uniform(-5, -1) / e.norm() if kind.endswith("noise") else 0.0
        e = first + noise * e
        eps = 0.05 * float(u[:, 0] @ w @ v[:, 0] / w.norm())
    elif kind == "sparse":
        e = e * (torch.rand(m, n, generator=g) < 0.03)
    elif kind == "turned":
        for dim, left in ((m, True), (n, False)):
            a = torch.randn(dim, dim, dtype=F64, generator=g) * eps / dim**0.5
            a = torch.matrix_exp((a - a.T) / 2)
            e = (a @ w if left else (e + w) @ a) - w
    elif kind == "swap":  # the last direction restored with one past the cut
        e = torch.outer(u[:, k - 1], v[:, min(v.shape[1] - 1, k + 2)]) + 1e-3 * e / e.norm()
    return e * (eps * w.norm() / e.norm())


def case(kind: str, change_kind: str, seed: int) -> Case:
    words = f"{kind}, {change_kind}, {seed}"
    draw, g = random.Random(words), torch.Generator().manual_seed(seed)

    def dim() -> int:
        return round(math.exp(draw.uniform(math.log(40), math.log(240))))

    m, n = dim(), dim()
    n = m if draw.random() < 0.5 else n
    r = min(m, n)
    k = draw.choice([1, 2, 5, r // 10, r // 5, r // 5, r // 3, r // 2])
    u, v = (torch.linalg.qr(torch.randn(d, r, dtype=F64, generator=g)).Q for d in (m, n))
    w = (u * spectrum(kind, r, k, draw, g)) @ v.T
    there = draw.choice([torch.float32, torch.bfloat16, F64])
    here = draw.choice([there, F64])
    base = w.to(there)
    tuned = (base.double() + update(change_kind, w, u, v, k, draw, g)).to(here)
    mode = draw.choice(["directions"] * 4 + ["directions_and_values", "values", "band"])
    options = {"mode": mode, "band": (draw.randrange(k), k) if mode == "band" else None}
    return Case(
        base, tuned, k, options, draw.random() < 0.5, f"{words}: {m}x{n}, k={k}, {there}, {here}, {mode}"
    )


def truth(case: Case, g: torch.Generator) -> Tensor:
    """The change (m, n), from LAPACK on the same matrices with rows and columns in another order: what its rounding
    makes of a narrow gap differs."""
    m, n = case.base.shape
    rows, columns = torch.randperm(m, generator=g), torch.randperm(n, generator=g)
    factors = [
        torch.linalg.svd(x.double()[rows][:, columns], full_matrices=False) for x in (case.base, case.tuned)
    ]
    (u, s, v), (x, t, y) = factors
    i = slice(*(case.options["band"] or (0, case.k)))
    if case.options["mode"] == "values":
        moved = (x[:, i] * (s[i] - t[i])) @ y[i]
    else:
        put = s if case.options["mode"] == "directions_and_values" else t
        moved = (u[:, i] * put[i]) @ v[i] - (x[:, i] * t[i]) @ y[i]
    back = torch.empty_like(moved)
    back[rows[:, None], columns] = moved
    return back


def beyond_the_estimate(case: Case) -> float:
    """The true error over the one told; a result in float64 is not rounded."""
    basis = None
    if case.narrow:
        u, s, vh = reference_factors(case.base)
        basis = matrix_basis("base", case.base, (u.float(), s, vh.float()), Rank.parse(case.k))
    found = restore_matrix(case.base, case.tuned, case.k, dtype=F64, basis=basis, **case.options)
    if found.note is not None:  # fewer directions than asked for
        return 0.0
    error = found.weight - case.tuned.double() - truth(case, torch.Generator().manual_seed(0))
    return float(error.norm()) / found.error_estimate


@pytest.mark.parametrize("kind", SPECTRA)
def test_no_error_is_larger_than_told(kind: str) -> None:
    for words in UPDATES:
        for each in (case(kind, words, seed) for seed in range(SEEDS)):
            assert beyond_the_estimate(each) <= 1.0, each.words


def most_beyond(spectra: list[str], updates: list[str]) -> float:
    cases = (case(kind, words, seed) for kind in spectra for words in updates for seed in range(SEEDS))
    return max(map(beyond_the_estimate, cases))


def test_a_sample_without_the_top_columns_tells_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: one value grows, and what the solve leaves over is in its columns alone."""
    told = change.part_error

    def blind(reference: Reference, left_over: Residual, start: int) -> Tensor:
        seen = [t.clone() for t in (left_over.turn_left, left_over.turn_right, left_over.outside)]
        for tensor in seen:
            tensor[..., : reference.sample.top] = 0.0
        left, right, outside = seen
        return told(reference, replace(left_over, turn_left=left, turn_right=right, outside=outside), start)

    monkeypatch.setattr(change, "part_error", blind)
    assert most_beyond(SPECTRA, ["sigma_1 and noise"]) > 2.0


def test_rounding_counts_for_more_over_narrow_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: rounding as a share of the update and of the change alone."""
    monkeypatch.setattr(change, "part_rounding", lambda values, *_: torch.zeros(len(values), dtype=F64))
    assert most_beyond(["cluster"], ["small", "rank 1", "sigma_1 and noise"]) > 10.0


def test_what_leaves_the_span_in_leading_coordinates_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """An update carries a column of the guard band off to the tail, so that the pair spans the leading coordinates no
    more. The twin takes turns from tail coordinates alone."""
    left_behind = [case("power", "swap", 7), case("late spikes", "swap", 3)]
    assert all(beyond_the_estimate(each) <= 1.0 for each in left_behind)
    seen = estimate._escaped
    monkeypatch.setattr(estimate, "_escaped", lambda *given: torch.zeros_like(seen(*given)))
    assert all(beyond_the_estimate(each) > 100.0 for each in left_behind)
