"""The findings of `rank` and `layers`: settings chosen on one set of deals, reported on another, beside controls."""

from __future__ import annotations

from collections.abc import Sequence

from rlspec.study.findings.section import Row, Section, pooled
from rlspec.study.statistics import holm
from rlspec.tasks import mcnemar

#: Points of ID accuracy that a chosen setting may cost, on the deals of the choice.
TOLERANCE = 0.05


def choice_sections(rows: Sequence[Row], *, by: str) -> list[Section]:
    """A section a seed, and one on the sensitivity to one direction more or less."""
    found = []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        own = [row for row in rows if row["seed"] == seed]
        (tuned,) = (row for row in own if row["what"] == "sft")
        (base,) = (row for row in own if row["what"] == "base")
        found.append(_chosen(own, base, tuned, by, seed))
        sensitivity = _sensitivity(own, tuned, seed)
        if sensitivity.rows:
            found.append(sensitivity)
    return found


def family(row: Row, by: str) -> str:
    """What competes with each other: one winner of each is chosen."""
    if row["what"] == "line":
        return "straight line"
    kind = row["mode"] if row["what"] == "restoration" else row["what"].replace("_", " ")
    place = row.get("part") if kind in ("directions", "values", "both") else None
    return ", ".join(str(p) for p in (kind, place, row.get(by) or "all") if p is not None)


def best(rows: Sequence[Row], least_id: float) -> Row | None:
    """The row of the highest OOD accuracy on the deals of the choice, of those that keep ID there."""
    kept = [row for row in rows if row["select_id"] >= least_id]
    return max(kept, key=lambda row: (row["select_ood"], row["select_id"]), default=None)


def _chosen(rows: list[Row], base: Row, tuned: Row, by: str, seed: int) -> Section:
    restored = [row for row in rows if row["what"] not in ("base", "sft") and not row.get("shift_k")]
    groups: dict[str, list[Row]] = {}
    for row in restored:
        groups.setdefault(family(row, by), []).append(row)
    least = tuned["select_id"] - TOLERANCE
    lines = [row for row in restored if row["what"] == "line"]
    winners = [(name, found) for name, group in groups.items() if (found := best(group, least)) is not None]
    tests = []
    for name, row in winners:
        tests.append((name, "tuned", _mcnemar(tuned, row)))
        rival = best(lines, min(row["select_id"], tuned["select_id"]))
        if rival is not None and row["what"] != "line":
            tests.append((name, "line", _mcnemar(rival, row)))
    adjusted = dict(zip([(name, against) for name, against, _ in tests], holm([p for *_, p in tests])))
    cells = [
        ["base", "", pooled([base], "id"), pooled([base], "ood"), "", ""],
        ["tuned", "", pooled([tuned], "id"), pooled([tuned], "ood"), "", ""],
    ]
    for name, row in sorted(winners, key=lambda pair: -pair[1]["select_ood"]):
        ps = [adjusted.get((name, against)) for against in ("tuned", "line")]
        told = ["–" if p is None else f"{p:.2g}" for p in ps]
        cells.append([name, _settings(row), pooled([row], "id"), pooled([row], "ood"), *told])
    top = max(winners, key=lambda pair: pair[1]["select_ood"], default=None)
    text = f"Seed {seed}: no setting keeps ID accuracy within {TOLERANCE:.0%}."
    if top is not None:
        name, row = top
        text = (
            f"Seed {seed}: tuned {tuned['id']:.1%} ID, {tuned['ood']:.1%} OOD. Chosen: {name} ({_settings(row)}), which "
            f"has {row['id']:.1%} ID and {row['ood']:.1%} OOD on deals that the choice did not see; against the tuned "
            f"model Holm-corrected p = {adjusted[name, 'tuned']:.2g}"
        )
        line = adjusted.get((name, "line"))
        text += "." if line is None else f", against the straight line at equal ID p = {line:.2g}."
    note = (
        "Of each kind the setting with the best OOD accuracy on other deals, among those that cost at most "
        f"{TOLERANCE:.0%} of ID accuracy there. McNemar's exact test, p-values corrected by Holm over this table."
    )
    head = ("kind", "chosen setting", "ID", "OOD", "p against tuned", "p against the line at equal ID")
    return Section(f"Restorations and their controls, seed {seed}", text, head, cells, note=note)


def _mcnemar(before: Row, after: Row) -> float:
    return mcnemar(*([c == "1" for c in row["ood_outcomes"]] for row in (before, after))).p_value


def _settings(row: Row) -> str:
    names = ("rank", "strength", "modules", "layers")
    return ", ".join(f"{name} {row[name]}" for name in names if row.get(name) is not None)


def _sensitivity(rows: list[Row], tuned: Row, seed: int) -> Section:
    """OOD of one direction less, as many as the rank says, and one more."""
    places: dict[tuple[str, ...], dict[int, Row]] = {}
    for row in rows:
        if row["what"] != "restoration" or (row["part"], row["mode"], row["strength"]) != (
            "top",
            "directions",
            1.0,
        ):
            continue
        key = (str(row["modules"]), str(row["layers"] or "all"), str(row["rank"]))
        places.setdefault(key, {})[row["shift_k"]] = row
    cells, largest = [], {"flat": 0.0, "gap": 0.0}
    for (modules, _, rank), found in places.items():
        if set(found) != {-1, 0, 1}:
            continue
        values = [found[by]["ood"] for by in (-1, 0, 1)]
        spread = max(values) - min(values)
        kind = "gap" if rank.startswith("gap") else "flat"
        largest[kind] = max(largest[kind], spread)
        changes = [found[by]["change_relative"] for by in (-1, 0, 1)]
        cells.append([modules, rank, *(f"{v:.1%}" for v in values), f"{spread:.1%}",
                      f"{min(changes):.3f} to {max(changes):.3f}"])  # fmt: skip
    text = f"Seed {seed}: one direction more or less changes OOD accuracy by up to {largest['flat']:.1%} at plain ranks"
    gaps = any(row[1].startswith("gap") for row in cells)
    text += f", by up to {largest['gap']:.1%} where the cut is put at a gap." if gaps else "."
    head = ("modules", "rank", "k - 1", "k", "k + 1", "spread", "size of the change, of ΔW")
    return Section(f"One direction more or less, seed {seed}", text, head, cells)
