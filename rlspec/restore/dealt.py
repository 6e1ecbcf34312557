"""Which of several processes writes each shard of a restored checkpoint."""

from __future__ import annotations

from pathlib import Path

from rlspec.io.stream import by_shard
from rlspec.restore.plan import Plan, Step
from rlspec.spectra.processes import dealt

# Operations that take as long as writing a byte, roughly; a shard that is only copied counts for something.
_PER_BYTE = 100


def shard_owners(plan: Plan, count: int) -> dict[Path, int]:
    """Shard of ``plan.like`` -> process; the same whatever is finished already. Some processes may have none."""
    shards = by_shard(plan.like)
    costs = [sum(_cost(plan.steps[entry.name], plan) for entry in entries) for entries in shards.values()]
    return dict(zip(shards, dealt(costs, count)))


def _cost(step: Step, plan: Plan) -> int:
    cost = _PER_BYTE * step.bytes
    if step.action == "restore" and not plan.options.elementwise:
        cost += sum(8 * m * n * min(m, n) for _, (m, n) in step.matrices())
    return cost
