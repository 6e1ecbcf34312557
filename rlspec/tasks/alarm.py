"""An alarm for a score that has passed its peak, with a bound on how often it rings for nothing.

At each event the score is tested against the best event so far, one-sided: by the exact McNemar test where there is a
success or a failure per problem, by Student's paired t-test where there is a number per text, by Fisher's exact test
where only the number of problems is known. A mere number is never tested.

The best of m earlier events is best by luck too, and a long training tests often. So the p-value of the event after m
others is multiplied by m (Bonferroni over the events that could have been the peak) and by m (m + 1), whose inverses
add up to 1 over all m. Over a whole training of any length, the chance of one false alarm is then at most the level.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rlspec.errors import OptionError
from rlspec.tasks.scores import Score, lower_is_better

LEVEL = 0.05


@dataclass(frozen=True)
class Fall:
    """A score that has passed its peak.

    Attributes:
        name: the score.
        peak_step, peak: the step to go back to, and the score there.
        step, value: where the fall was found, and the score there.
        p_value: corrected for the choice of the peak and for all tests of the training.
    """

    name: str
    peak_step: int
    peak: float
    step: int
    value: float
    p_value: float


class Alarm:
    """Watches one score.

    Args:
        name: the score to keep; low or high, see ``rlspec.tasks.scores.lower_is_better``.
        level: chance of a false alarm over the whole training, in (0, 1).

    Raises:
        OptionError: the level is out of range.
    """

    def __init__(self, name: str, level: float = LEVEL) -> None:
        if not 0 < level < 1:
            raise OptionError(f"level={level!r} must lie between 0 and 1")
        self.name = name
        self.level = level
        self._seen: list[tuple[int, Score]] = []

    def observe(self, step: int, score: Score) -> Fall | None:
        """The fall that this event shows, if it shows one.

        Raises:
            OptionError: the results are of another number of problems than before.
        """
        earlier, sign = len(self._seen), -1 if lower_is_better(self.name) else 1
        if earlier and self._seen[0][1].n != score.n:
            raise OptionError(
                f"score {self.name!r}: n={score.n} at step {step}, {self._seen[0][1].n} before; an alarm needs the "
                "same problems each time"
            )
        found = None
        if earlier:
            peak_step, peak = max(self._seen, key=lambda event: sign * event[1].value)
            p = fall_p_value(peak, score, lower=sign < 0)
            if p is not None:
                p = min(1.0, p * correction(earlier))
                if p <= self.level:
                    found = Fall(self.name, peak_step, peak.value, step, score.value, p)
        self._seen.append((step, score))
        return found


def standing_fall(name: str, events: Iterable[tuple[int, Score]]) -> Fall | None:
    """The first fall of a finished training, given its (step, score) in order, whose peak was not reached again."""
    alarm, found, sign = Alarm(name), None, -1 if lower_is_better(name) else 1
    for step, score in events:
        fall = alarm.observe(step, score)
        if found is None:
            found = fall
        elif sign * score.value >= sign * found.peak:
            found = None
    return found


def describe_fall(fall: Fall, *, title: str | None = None, checkpoint: str | None = None) -> str:
    """One line: what fell, from where, and what to go back to, the checkpoint at the peak where it is known."""
    form = ".4g" if lower_is_better(fall.name) or max(fall.peak, fall.value) > 1 else ".1%"
    peak, value = (format(number, form).replace("%", " %") for number in (fall.peak, fall.value))
    verb = "rose" if lower_is_better(fall.name) else "fell"
    return (
        f"{title or fall.name} {verb} from {peak} at step {fall.peak_step} to {value} at step {fall.step} "
        f"(p = {fall.p_value:.2g}): go back to {checkpoint or f'step {fall.peak_step}'}"
    )


def correction(earlier: int) -> float:
    """What the p-value of an event after ``earlier`` others is multiplied by, see the module."""
    return earlier * earlier * (earlier + 1)


def fall_p_value(before: Score, after: Score, *, lower: bool = False) -> float | None:
    """One-sided p-value, not corrected, of a score that got worse; None where nothing is known of its uncertainty."""
    if before.results is not None and after.results is not None and len(before.results) == len(after.results):
        pairs = list(zip(before.results, after.results))
        if before.counts and after.counts:
            lost, gained = sum(b > a for b, a in pairs), sum(a > b for b, a in pairs)
            return binomial_tail(gained if lower else lost, lost + gained)
        return paired_t_tail([(a - b) if lower else (b - a) for b, a in pairs])
    n, m = before.n, after.n
    if lower or n is None or m is None or not (0 <= before.value <= 1 and 0 <= after.value <= 1):
        return None
    return fisher_tail(round(before.value * n), n, round(after.value * m), m)


def binomial_tail(k: int, n: int) -> float:
    """P(X >= k) of X ~ Bin(n, 1/2), exact: the one-sided McNemar test of k worse among n that differ."""
    return sum(math.comb(n, i) for i in range(k, n + 1)) / 2**n


def fisher_tail(before: int, n: int, after: int, m: int) -> float:
    """P of as few successes after as these, given the total: Fisher's exact test, one-sided (R. A. Fisher 1935)."""
    total = before + after
    ways = sum(math.comb(m, i) * math.comb(n, total - i) for i in range(max(0, total - n), after + 1))
    return ways / math.comb(n + m, total)


def paired_t_tail(differences: Sequence[float]) -> float | None:
    """P(T >= t) of Student's paired t-test; None where they do not vary, or are fewer than two."""
    n = len(differences)
    if n < 2:
        return None
    mean = math.fsum(differences) / n
    variance = math.fsum((d - mean) ** 2 for d in differences) / (n - 1)
    if variance == 0:
        return None
    t = mean / math.sqrt(variance / n)
    tail = _t_tail(abs(t), n - 1)
    return tail if t > 0 else 1 - tail


def _t_tail(t: float, degrees: int) -> float:
    """P(T >= t) for t >= 0 (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    theta = math.atan(t / math.sqrt(degrees))
    sine, square = math.sin(theta), math.cos(theta) ** 2
    odd = degrees % 2
    term, total = math.cos(theta) if odd else 1.0, 0.0
    for i in range(1 + odd, degrees, 2):
        total += term
        term *= i / (i + 1) * square
    inside = 2 / math.pi * (theta + sine * total) if odd else sine * total
    return max(0.0, (1 - inside) / 2)
