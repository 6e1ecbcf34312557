"""The findings of `prevent`: each way to train at equal ID accuracy, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlspec.study.findings.choice import best
from rlspec.study.findings.section import Row, Section, pooled

#: ID accuracies, on the deals of the choice, that a model must reach.
LEVELS = (0.5, 0.7, 0.9)


def prevention_sections(rows: Sequence[Row], tokens: Mapping[str, int]) -> list[Section]:
    """A section a level of ID accuracy.

    Args:
        tokens: trained on up to each row's weights, by the row's cell.
    """
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    arms = list(dict.fromkeys(_arm(row) for row in rows if row["what"] != "base"))
    found = []
    for level in LEVELS:
        cells, told = [], []
        for arm in arms:
            chosen = [
                best([r for r in rows if r["seed"] == seed and _arm(r) == arm], level) for seed in seeds
            ]
            there = [row for row in chosen if row is not None]
            if not there:
                cells.append([arm, "–", "not reached", "–", "–"])
                continue
            places = ", ".join(
                f"strength {row['strength']}" if row["what"] == "line" else f"step {row['sft_step']}"
                for row in there
            )
            cost = sum(tokens[row["cell"]] for row in there) / len(there)
            name = arm if len(there) == len(seeds) else f"{arm} ({len(there)} of {len(seeds)} seeds)"
            cells.append([name, places, pooled(there, "id"), pooled(there, "ood"), f"{cost / 1e6:.2f} M"])
            told.append((len(there), sum(row["ood"] for row in there) / len(there), arm))
        if told:
            _, ood, arm = max(told)  # of those that reach it on most seeds: one seed may be a lucky one
            text = f"With at least {level:.0%} ID accuracy, {arm} has the highest OOD accuracy, {ood:.1%}."
        else:
            text = f"Nothing reaches {level:.0%} ID accuracy."
        head = ("way to train", "chosen on other deals", "ID", "OOD", "tokens trained on")
        found.append(Section(f"At {level:.0%} ID accuracy or more", text, head, cells, note=_NOTE))
    return found


def _arm(row: Row) -> str:
    return "straight line from the end of plain" if row["what"] == "line" else str(row.get("arm"))


_NOTE = (
    "Of each way the step (or strength) with the best OOD accuracy on other deals among those that reach the level: "
    "stopping at the peak is part of each. A pull to the base reads every token a second time, by the base. 95 % Wilson "
    "intervals over the deals of all seeds."
)
