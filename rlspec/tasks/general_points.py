"""GeneralPoints: write an equation that uses four cards' numbers once each and equals the target.

Task, reward table and shifts after Jin et al. 2025 (arXiv 2508.16546) and Chu et al. 2025 (arXiv 2501.17161).
Where we depart from their checker: values are exact fractions, so 8/(3-8/3) is 24; spaces are allowed; and
"valid prefix of a solution" has an exact meaning, see :meth:`GeneralPoints.verify`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Literal

from rlspec.errors import OptionError
from rlspec.tasks.answers import Answer, read_answer
from rlspec.tasks.base import IN_DISTRIBUTION, Message, Verdict, check_shift
from rlspec.tasks.cards import SHIFTS, Deal, Rule, deal
from rlspec.tasks.expression import Expression, ExpressionError, parse_expression
from rlspec.tasks.prompts import STYLES, Prompts
from rlspec.tasks.solver import can_finish, solve

Style = Literal["chat", "compact"]

#: Reward per turn, by verdict. "turn_limit" is added when the last turn has failed too.
REWARDS: dict[str, float] = {
    "correct": 5.0,
    "partial": 1.0,
    "wrong_value": -1.0,
    "wrong_numbers": -2.0,
    "illegal_formula": -3.0,
    "turn_limit": -1.0,
}


class GeneralPoints:
    """The card game as a :class:`rlspec.tasks.base.Task`.

    Args:
        style: ``"chat"`` states the task in English and asks for a JSON-like answer; ``"compact"`` is the
            token form of the embedded model.
        turns: verification turns of an episode at most (the paper: 5).
        target: the number to reach (24).
        other_target: the number to reach under the shift ``"target"``.
        history_share: share of supervised examples whose conversation already holds a wrong answer and the
            verifier's message, so that a fine-tuned model knows what a second turn looks like.
        training_rules: rules that supervised examples are put under, each by chance; none: the one in distribution.
            Hands stay those of the problem, so what is kept for evaluation is kept under every rule.

    Raises:
        OptionError: an argument is out of range.
    """

    name = "general_points"
    shifts: tuple[str, ...] = tuple(SHIFTS)
    turn_limit_reward = REWARDS["turn_limit"]

    def __init__(
        self,
        *,
        style: Style = "chat",
        turns: int = 5,
        target: int = 24,
        other_target: int = 20,
        history_share: float = 0.2,
        training_rules: Sequence[Rule] = (),
    ) -> None:
        if style not in STYLES:
            raise OptionError(f"unknown style {style!r}; valid: {', '.join(STYLES)}")
        if turns < 1:
            raise OptionError(f"turns is {turns}, wanted at least 1")
        if not 0 <= history_share <= 1:
            raise OptionError(f"history_share is {history_share}, wanted a share in [0, 1]")
        if target < 1 or other_target < 1 or other_target == target:
            raise OptionError(f"targets {target} and {other_target}: wanted two different positive numbers")
        self.style: Style = style
        self.max_turns = turns
        self.target = target
        self.other_target = other_target
        self.history_share = history_share
        self.training_rules = tuple(training_rules)
        self.prompts: Prompts = STYLES[style]
        self.max_answer_tokens = self.prompts.max_answer_tokens

    def sample(self, rng: random.Random, shift: str = IN_DISTRIBUTION) -> Deal:
        chosen = SHIFTS[check_shift(self, shift)]
        return deal(rng, chosen, self.other_target if chosen.other_target else self.target)

    def prompt(self, problem: Deal) -> list[Message]:
        return [{"role": "user", "content": self.prompts.question(problem)}]

    def answer(self, problem: Deal) -> str:
        formula = solve(problem.numbers, problem.target)
        if formula is None:
            raise ValueError(f"the deal {problem} has no solution")
        return self.prompts.answer(problem, formula)

    def sft_example(self, problem: Deal, rng: random.Random) -> tuple[list[Message], str]:
        solvable = [
            r for r in self.training_rules if solve(r.numbers(problem.cards), problem.target) is not None
        ]
        if solvable:
            problem = replace(problem, rule=rng.choice(solvable))
        messages, answer = self.prompt(problem), self.answer(problem)
        if rng.random() < self.history_share:
            wrong = self._wrong_answer(problem, rng)
            verdict = self.verify(problem, wrong)
            if not verdict.solved:
                messages.append({"role": "assistant", "content": wrong})
                messages.append({"role": "user", "content": verdict.message})
        return messages, answer

    def verify(self, problem: Deal, answer: str) -> Verdict:
        """Judge ``answer`` by the paper's reward table.

        ``partial`` (a valid prefix of a solution) means: the formula uses some but not all of the numbers,
        none more often than dealt, and its value can still be combined with the others to the target.
        """
        kind = self._judge(problem, read_answer(answer))
        solved = kind == "correct"
        message = "" if solved else self.prompts.verdicts[kind].format(target=problem.target)
        return Verdict(REWARDS[kind], solved, kind, message)

    def _judge(self, problem: Deal, answer: Answer) -> str:
        if answer.formula is None:
            return "illegal_formula"
        try:
            expression = parse_expression(answer.formula)
        except ExpressionError:
            return "illegal_formula"
        dealt, used = Counter(problem.numbers), Counter(expression.numbers)
        if answer.numbers is not None and Counter(answer.numbers) != dealt:
            return "wrong_numbers"
        if used == dealt:
            return "correct" if expression.value == problem.target else "wrong_value"
        if used - dealt:
            return "wrong_numbers"
        rest = tuple((dealt - used).elements())
        return "partial" if self._is_partial(expression, rest, problem.target) else "wrong_numbers"

    @staticmethod
    def _is_partial(expression: Expression, rest: tuple[int, ...], target: int) -> bool:
        value: Fraction | None = expression.value
        return value is not None and can_finish(value, rest, target)

    def _wrong_answer(self, problem: Deal, rng: random.Random) -> str:
        """A reference answer with one operation or one number changed."""
        formula = solve(problem.numbers, problem.target)
        assert formula is not None
        operators = [i for i, c in enumerate(formula) if c in "+-*/"]
        i = rng.choice(operators)
        changed = rng.choice([c for c in "+-*/" if c != formula[i]])
        return self.prompts.answer(problem, formula[:i] + changed + formula[i + 1 :])
