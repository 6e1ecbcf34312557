"""One row per matrix and step: the scalar metrics of a measurement under names that carry their units."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rlspec.io.projections import Projection
from rlspec.perturb.matrix import MatrixBasis
from rlspec.spectra.blocks import block_sizes
from rlspec.spectra.measurement import Measurement
from rlspec.spectra.metrics import (
    angle_statistics,
    intruders,
    normalised_spectral_shift,
    projected_energy,
    ratio,
    relative_changes,
    stable_rank,
)
from rlspec.spectra.nulls import Nulls
from rlspec.spectra.power_law import FEWEST, THRESHOLD, fit_power_law
from rlspec.spectra.subspaces import Locking

Row = dict[str, float | int | str | None]

# Name -> meaning. "rel" and shares are pure numbers, "rad" are radians; σ are in the units of the weight.
COLUMNS: dict[str, str] = {
    "stage": "training stage",
    "step": "optimizer step within the stage",
    "name": "projection",
    "module": "q, k, v, o, mlp, embed or lm_head",
    "layer": "layer index",
    "head": "attention head, of k and v the key-value head, of o the query head; none for a whole matrix",
    "rows": "m",
    "cols": "n",
    "rank": "k, leading directions followed",
    "sigma_max": "largest singular value",
    "sigma_max_ref": "largest singular value of the reference",
    "sigma_k_ref": "k-th singular value of the reference",
    "sigma_change_rel_max": "largest |σ_i - σ_ref,i| / σ_ref,i over the leading k",
    "sigma_change_rel_mean": "mean of the same",
    "nss_k": "normalised spectral shift of the leading k values",
    "delta_frobenius": "||ΔW||_F",
    "delta_relative": "||ΔW||_F / ||W_ref||_F",
    "stable_rank": "||W||²_F / ||W||²_2",
    "delta_stable_rank": "||ΔW||²_F / ||ΔW||²_2",
    "effective_rank": "exp of the entropy of σ/Σσ",
    "effective_rank_error_bound": "how far the effective rank can be off (0: computed from all values)",
    "angle_left_max_rad": "largest principal angle of the leading left subspaces",
    "angle_left_mean_rad": "their mean",
    "angle_left_rms_rad": "their root mean square",
    "angle_right_max_rad": "largest principal angle of the leading right subspaces",
    "angle_right_mean_rad": "their mean",
    "angle_right_rms_rad": "their root mean square",
    "projector_distance_left": "||U_k U_kᵀ - U_ref,k U_ref,kᵀ||_F",
    "projector_distance_right": "the same of the right side",
    "best_match_left_mean": "best |cos| of a leading reference left vector with any leading left vector: mean of them",
    "best_match_left_min": "the worst of them",
    "best_match_right_mean": "the same of the right side: mean",
    "best_match_right_min": "the worst of them",
    "rho_k": "||U_kᵀ ΔW V_k||_F / ||ΔW||_F in the reference basis",
    "energy_diagonal": "share of ||ΔW||²_F on the diagonal of U_kᵀ ΔW V_k",
    "energy_offdiagonal": "share of ||ΔW||²_F off it",
    "update_sparsity": "share of entries moved by at most 1e-3 of their size",
    "intruder_dimensions": "leading left vectors with |cos| < 0.5 to every reference vector and block",
    "intruder_energy": "their share of ||W||²_F",
    "blocks": "runs of near-degenerate leading reference vectors, which the update mixes with each other",
    "block_vectors": "leading vectors in such blocks",
    "block_largest": "size of the largest one, counting what lies past the cut; 1 where there is none",
    "block_at_cut": "size of the block that the cut at k splits, 0 where it splits none",
    "gap_at_cut_rel": "(σ_k - σ_{k+1}) / σ_k of the reference",
    "sigma_error_bound": "absolute error bound of every singular value reported",
    "angle_error_bound_rad": "error bound of every principal angle reported",
    "nss": "normalised spectral shift of all singular values",
    "alpha": "exponent of the tail of the density of σ²",
    "alpha_ref": "the same of the reference",
    "alpha_distance": "Kolmogorov-Smirnov distance of the tail from that power law",
    "alpha_tail": "how many eigenvalues the tail has",
    "locking_left": "||U_kᵀ U_end,k||²_F / k, the share of the leading left subspace that is the last checkpoint's",
    "locking_right": "the same of the right side",
    "locking_error_bound": "absolute error bound of both",
    "locking_end": "the checkpoint that they are measured against",
    "null_rounding_rad": "mean principal angle that rounding the weights to bfloat16 causes",
    "null_random_rad": "mean principal angle that random updates of the same norm cause (mean over draws)",
    "null_random_percentile": "percentage of those random updates that turn less than the measured one",
    "null_draws": "how many random updates",
    "engine": "delta or exact",
    "arithmetic": "of the products with ΔW, whatever precision torch is set to: float32 or float64; bfloat16 where "
    "the CPU has units for it, but for what values depend on at first order, and for error bounds",
    "note": "why a value is missing, or what was done",
}


def measured_rows(
    measurement: Measurement,
    matrices: Sequence[MatrixBasis],
    projections: Sequence[Projection],
    *,
    stage: str,
    step: int,
) -> list[Row]:
    """The rows of a measured stack. Undefined values are ``None`` and the note says why."""
    k = measurement.sigma.shape[-1]
    sigma, sigma_ref = measurement.sigma, torch.stack([matrix.S[:k] for matrix in matrices])
    change = measurement.update
    relative = relative_changes(sigma, sigma_ref)
    rho, diagonal, off = projected_energy(measurement.core, change.delta_frobenius)
    number, energy = intruders(measurement.best_cosine, sigma, change.weight_frobenius)
    columns: dict[str, Tensor] = {
        "sigma_max": sigma[:, 0],
        "sigma_max_ref": sigma_ref[:, 0],
        "sigma_k_ref": sigma_ref[:, -1],
        "sigma_change_rel_max": relative.amax(-1),
        "sigma_change_rel_mean": relative.mean(-1),
        "nss_k": normalised_spectral_shift(sigma, sigma_ref),
        "delta_frobenius": change.delta_frobenius,
        "delta_relative": ratio(change.delta_frobenius, change.reference_frobenius),
        "stable_rank": stable_rank(change.weight_frobenius, sigma[:, 0]),
        "delta_stable_rank": stable_rank(change.delta_frobenius, measurement.delta_spectral),
        "effective_rank": measurement.effective_rank,
        "effective_rank_error_bound": measurement.effective_rank_error_bound,
        **_matches("left", measurement.best_match_left),
        **_matches("right", measurement.best_match_right),
        "rho_k": rho,
        "energy_diagonal": diagonal,
        "energy_offdiagonal": off,
        "update_sparsity": change.sparsity,
        "intruder_dimensions": number,
        "intruder_energy": energy,
        **_blocks(measurement.blocks, measurement.block_at_cut),
        "sigma_error_bound": measurement.sigma_error_bound,
    }
    sides = {"left": measurement.sines_left, "right": measurement.sines_right}
    skipped = []
    for side, sines in sides.items():
        if sines is None:
            skipped.append(
                f"{side} angles skipped: k = {k} is the whole {side} space, they are zero by construction"
            )
        else:
            columns |= _angles(side, sines)
    if len(skipped) < len(sides):
        columns["angle_error_bound_rad"] = measurement.angle_error_bound_rad
    values = {name: column.tolist() for name, column in columns.items()}
    rows = []
    for i, (matrix, projection) in enumerate(zip(matrices, projections, strict=True)):
        row = _header(matrix, projection, stage, step)
        row.update({name: _finite(column[i]) for name, column in values.items()})
        row["engine"], row["arithmetic"] = measurement.engine[i], measurement.arithmetic[i]
        row["note"] = _join([matrix.note, measurement.notes[i], *skipped])
        rows.append(row)
    return rows


def _blocks(labels: Tensor, at_cut: Tensor) -> dict[str, Tensor]:
    """Columns from the labels (L, k) of blocks and the sizes (L,) of those that the cut splits."""
    sizes = block_sizes(labels)
    last = labels == labels[:, -1:]  # which may be alone on this side of the cut
    shared = (sizes > 1) | (last & (at_cut > 0).unsqueeze(-1))
    first = torch.ones_like(shared)
    first[:, 1:] = labels[:, 1:] != labels[:, :-1]
    return {
        "blocks": (shared & first).sum(-1),
        "block_vectors": shared.sum(-1),
        "block_largest": torch.maximum(sizes.amax(-1), at_cut),
        "block_at_cut": at_cut,
    }


def _matches(side: str, cosines: Tensor) -> dict[str, Tensor]:
    return {f"best_match_{side}_mean": cosines.mean(-1), f"best_match_{side}_min": cosines.amin(-1)}


def _angles(side: str, sines: Tensor) -> dict[str, Tensor]:
    found = angle_statistics(sines)
    distance = found.pop("projector_distance")
    columns = {f"angle_{side}_{name}": value for name, value in found.items()}
    return {**columns, f"projector_distance_{side}": distance}


def put_nulls(row: Row, nulls: Nulls, index: int) -> None:
    """Fill the ``null_*`` columns of matrix ``index``'s row."""
    row.update(
        null_rounding_rad=float(nulls.rounding[index]),
        null_random_rad=float(nulls.random[:, index].mean()),
        null_random_percentile=float(nulls.percentile[index]),
        null_draws=int(nulls.random.shape[0]),
    )


def put_locking(row: Row, found: Locking, index: int) -> None:
    """Fill the ``locking_*`` columns of matrix ``index``'s row, but for the name of the checkpoint compared with."""
    sides = {"locking_left": found.left, "locking_right": found.right}
    there = {name: float(side[index]) for name, side in sides.items() if side is not None}
    if there:
        row.update(there, locking_error_bound=float(found.error[index]))


def put_spectrum(row: Row, sigma: Tensor, sigma_ref: Tensor) -> None:
    """Fill the columns that need every singular value of a weight and of its reference, each (r,) float64."""
    law, before = fit_power_law(sigma), fit_power_law(sigma_ref)
    row["nss"] = float(normalised_spectral_shift(sigma, sigma_ref))
    row["alpha_ref"] = None if before is None else before.alpha
    if law is not None:
        row.update(alpha=law.alpha, alpha_distance=law.distance, alpha_tail=law.tail)
    if law is None or before is None:
        row["note"] = _join(
            [_text(row["note"]), f"fewer than {FEWEST} eigenvalues above {THRESHOLD:g}: no alpha"]
        )


def _text(value: float | int | str | None) -> str | None:
    return None if value is None else str(value)


def empty_row(matrix: MatrixBasis, projection: Projection, *, stage: str, step: int) -> Row:
    """The row of a matrix that has no direction to follow: a zero reference."""
    row = _header(matrix, projection, stage, step)
    row["note"] = _join([matrix.note, "the reference has no non-zero singular value: not measured"])
    return row


def _header(matrix: MatrixBasis, projection: Projection, stage: str, step: int) -> Row:
    row: Row = dict.fromkeys(COLUMNS)
    labels: Row = {
        "stage": stage,
        "step": step,
        "name": projection.name,
        "module": projection.module,
        "layer": projection.layer,
        "head": projection.head,
        "rows": matrix.shape[0],
        "cols": matrix.shape[1],
        "rank": matrix.k,
        "gap_at_cut_rel": matrix.gap_at_cut_rel,
    }
    row.update(labels)
    return row


def _join(notes: list[str | None]) -> str | None:
    text = "; ".join(note for note in notes if note)
    return text or None


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None
