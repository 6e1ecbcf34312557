"""GeneralPoints: solver against brute force, verifier against the reward table, deals against shifts."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

import pytest

from rlspec.errors import OptionError
from rlspec.tasks import (
    REWARDS,
    GeneralPoints,
    evaluation_problems,
    get_task,
    parse_expression,
    solve,
    training_problem,
)
from rlspec.tasks.answers import read_answer
from rlspec.tasks.cards import FACES, ORDINAL_RULE, TEN_RULE, Deal


def _brute_force(numbers: tuple[int, ...], target: int) -> bool:
    """All orders, all operations, the five ways to place parentheses around four numbers."""

    def apply(op: str, a: Fraction | None, b: Fraction | None) -> Fraction | None:
        if a is None or b is None or (op == "/" and b == 0):
            return None
        return {"+": a + b, "-": a - b, "*": a * b}[op] if op != "/" else a / b

    for a, b, c, d in set(itertools.permutations([Fraction(n) for n in numbers])):
        for o, p, q in itertools.product("+-*/", repeat=3):
            if target in (
                apply(q, apply(p, apply(o, a, b), c), d),
                apply(q, apply(o, a, apply(p, b, c)), d),
                apply(p, apply(o, a, b), apply(q, c, d)),
                apply(o, a, apply(q, apply(p, b, c), d)),
                apply(o, a, apply(p, b, apply(q, c, d))),
            ):
                return True
    return False


def test_solver_agrees_with_brute_force() -> None:
    hands = list(itertools.combinations_with_replacement(range(1, 14), 4))
    for hand in random.Random(0).sample(hands, 40) + [
        (3, 3, 8, 8),
        (1, 1, 1, 1),
        (1, 5, 5, 5),
        (4, 4, 10, 10),
    ]:
        formula = solve(hand)
        assert (formula is not None) == _brute_force(hand, 24), hand
        if formula is not None:
            parsed = parse_expression(formula)
            assert parsed.value == 24
            assert sorted(parsed.numbers) == sorted(hand)


def test_1362_of_1820_hands_make_24() -> None:
    """The known count for four cards of 1 to 13."""
    hands = itertools.combinations_with_replacement(range(1, 14), 4)
    assert sum(solve(hand) is not None for hand in hands) == 1362


def test_solution_depends_on_the_multiset_alone() -> None:
    assert len({solve(order) for order in itertools.permutations((2, 7, 8, 9))}) == 1


DEAL = Deal(("8", "3", "8", "3"), TEN_RULE, 24)
FACE = Deal(("J", "3", "A", "K"), ORDINAL_RULE, 24)  # 11, 3, 1, 13


def _json(numbers: str, formula: str) -> str:
    return f'{{"cards": ["?"], "number": [{numbers}], "formula": "{formula}"}}'


@pytest.mark.parametrize(
    ("deal", "answer", "kind"),
    [
        (DEAL, _json("8, 3, 8, 3", "8/(3-8/3)=24"), "correct"),
        (DEAL, _json("3, 3, 8, 8", "8 / (3 - 8/3)"), "correct"),
        (DEAL, "Let me think. First {'formula': '8+8'}.\n" + _json("8,3,8,3", "8/(3-8/3)"), "correct"),
        (DEAL, "cards 8 3 8 3 number 8 3 8 3 formula 8 / ( 3 - 8 / 3 ) = 24", "correct"),
        (DEAL, "number 8 3 8 3 formula 8 / ( 3 - 8 / 3 )", "correct"),
        (DEAL, _json("8,3,8,3", "8+8+3+3=24"), "wrong_value"),
        (DEAL, _json("8,3,8,3", "8/(3-3)+8"), "wrong_value"),
        (DEAL, _json("8,3,8,3", "3-8/3"), "partial"),
        (DEAL, _json("8,3,8,3", "8+8"), "wrong_numbers"),
        (DEAL, _json("8,3,8,3", "8*3"), "wrong_numbers"),
        (DEAL, _json("8,3,8,3", "8*3*1"), "wrong_numbers"),
        (DEAL, _json("8,3,8,4", "8/(3-8/3)"), "wrong_numbers"),
        (DEAL, _json("8,3,8,3", "8/(3-8/3"), "illegal_formula"),
        (DEAL, _json("8,3,8,3", "__import__('os').abort()"), "illegal_formula"),
        (DEAL, "", "illegal_formula"),
        (DEAL, "I give up.", "illegal_formula"),
        (FACE, _json("11,3,1,13", "11+13+1-3"), "wrong_value"),
        (FACE, _json("11,3,1,13", "(11+13)*(3-1)"), "wrong_value"),
        (FACE, _json("10,3,1,10", "(10+10)+3+1"), "wrong_numbers"),
    ],
)
def test_verdicts(deal: Deal, answer: str, kind: str) -> None:
    task = GeneralPoints()
    verdict = task.verify(deal, answer)
    assert verdict.kind == kind
    assert verdict.reward == REWARDS[kind]
    assert verdict.solved == (kind == "correct")
    assert bool(verdict.message) != verdict.solved


def test_claimed_value_does_not_buy_a_reward() -> None:
    assert GeneralPoints().verify(DEAL, _json("8,3,8,3", "8+8+3+3=24")).kind == "wrong_value"


def test_papers_reward_table() -> None:
    assert REWARDS == {
        "correct": 5,
        "partial": 1,
        "wrong_value": -1,
        "wrong_numbers": -2,
        "illegal_formula": -3,
        "turn_limit": -1,
    }


def test_verifier_survives_noise() -> None:
    """Random bytes and mangled answers get a verdict, never an exception."""
    rng = random.Random(1)
    task = GeneralPoints()
    good = task.answer(DEAL)
    for _ in range(2000):
        mangled = list(good)
        for _ in range(rng.randint(1, 8)):
            mangled[rng.randrange(len(mangled))] = chr(
                rng.choice([rng.randint(0, 127), rng.randint(0, 0x2FFF)])
            )
        assert task.verify(DEAL, "".join(mangled)).kind in REWARDS


def test_last_answer_counts() -> None:
    answer = read_answer(_json("1,2,3,4", "1+2") + " no, better: " + _json("5,6,7,8", "5+6"))
    assert answer.numbers == (5, 6, 7, 8)
    assert answer.formula == "5+6"


@pytest.mark.parametrize("style", ["chat", "compact"])
@pytest.mark.parametrize("shift", ["none", "rule", "cards", "both", "target"])
def test_every_reference_answer_is_correct(style: str, shift: str) -> None:
    task = GeneralPoints(style=style)  # type: ignore[arg-type]
    rng = random.Random(2)
    for _ in range(100):
        problem = task.sample(rng, shift)
        assert task.verify(problem, task.answer(problem)).solved


def test_shifts_change_only_what_they_name() -> None:
    task = GeneralPoints()
    deals = {shift: evaluation_problems(task, 200, shift=shift, seed=0) for shift in task.shifts}

    def faces(shift: str) -> float:
        return sum(any(c in FACES for c in d.cards) for d in deals[shift]) / 200

    assert {shift: {d.rule for d in ds} for shift, ds in deals.items()} == {
        "none": {TEN_RULE},
        "cards": {TEN_RULE},
        "target": {TEN_RULE},
        "rule": {ORDINAL_RULE},
        "both": {ORDINAL_RULE},
    }
    assert {shift: {d.target for d in ds} for shift, ds in deals.items()} == {
        "none": {24}, "cards": {24}, "target": {20}, "rule": {24}, "both": {24},
    }  # fmt: skip
    assert faces("cards") == faces("both") == 1.0
    assert 0.3 < faces("none") < 0.9
    assert 0.3 < faces("rule") < 0.9


def test_evaluation_deals_are_fixed_distinct_and_kept_from_training() -> None:
    task = GeneralPoints()
    deals = evaluation_problems(task, 234, shift="both", seed=3)
    assert deals == evaluation_problems(GeneralPoints(), 234, shift="both", seed=3)
    assert deals != evaluation_problems(task, 234, shift="both", seed=4)
    keys = frozenset(d.key for d in deals)
    assert len(keys) == 234
    rng = random.Random(0)
    assert all(training_problem(task, rng, keys).key not in keys for _ in range(2000))
    rng = random.Random(0)  # the broken twin: without the exclusion such hands do turn up
    assert any(training_problem(task, rng).key in keys for _ in range(2000))


def test_too_many_evaluation_deals_is_an_error() -> None:
    with pytest.raises(OptionError, match="distinct problems"):
        evaluation_problems(GeneralPoints(), 5000)


def test_supervised_examples_with_history() -> None:
    task = GeneralPoints(history_share=1.0)
    rng = random.Random(0)
    with_history = 0
    for _ in range(200):
        problem = task.sample(rng)
        messages, answer = task.sft_example(problem, rng)
        assert task.verify(problem, answer).solved
        if len(messages) == 3:
            with_history += 1
            verdict = task.verify(problem, messages[1]["content"])
            assert not verdict.solved
            assert messages[2] == {"role": "user", "content": verdict.message}
    assert with_history > 150  # a changed operation can by luck be right as well


def test_bad_arguments_list_what_is_valid() -> None:
    with pytest.raises(OptionError, match="valid: none, rule, cards, both, target"):
        GeneralPoints().sample(random.Random(0), "colour")
    with pytest.raises(OptionError, match="valid: general_points"):
        get_task("chess")
    with pytest.raises(OptionError, match="valid: auto, chat, compact"):
        get_task(style="loud")
    with pytest.raises(OptionError, match="turns is 0"):
        GeneralPoints(turns=0)
