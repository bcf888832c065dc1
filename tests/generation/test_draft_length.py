"""How many tokens are drafted, with times that are given, not taken."""

from __future__ import annotations

import pytest

from halfbyte.generation.draft_length import PATIENCE, PROBE_EVERY, DraftLength


def planner(*, clocked: bool = True, draft_cost: float = 0.3, gives_up: bool = True) -> DraftLength:
    return DraftLength(16, fixed=False, clocked=clocked, draft_cost=draft_cost, gives_up=gives_up)


def taught(acceptance: float, *, plain: float, row: float, draft: float) -> DraftLength:
    length = planner()
    for _ in range(9):
        length.took(1, plain)
        length.took(5, plain + 4 * row, 4, 4 * draft)
    accepted = round(1000 * acceptance)
    for n in range(1000):
        length.learn(0, 1, int((n * accepted) // 1000 < ((n + 1) * accepted) // 1000))
    return length


@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize(("row", "draft"), [(0.0, 0.1), (0.05, 0.3), (0.3, 0.0), (0.02, 0.02)])
def test_the_length_is_the_one_with_the_most_tokens_a_second(acceptance: float, row: float, draft: float) -> None:
    length = taught(acceptance, plain=1.0, row=row, draft=draft)
    estimate = length.acceptance(0)
    assert estimate == pytest.approx(acceptance, abs=0.05)

    def rate(n: int) -> float:
        return sum(estimate**i for i in range(n + 1)) / (1 + n * (row + draft))

    best = max(range(17), key=rate)
    chosen = length.plan([0], [16])[0]
    assert rate(chosen) == pytest.approx(rate(best), rel=1e-9)


def test_two_plain_steps_come_first_so_that_there_is_something_to_compare_with() -> None:
    length = planner()
    for _ in range(2):
        assert length.plan([0], [16]) == [0]
        length.took(1, 1.0)
    assert length.plan([0], [16])[0] > 0


def test_a_draft_that_does_not_pay_is_given_up_with_the_reason() -> None:
    length = taught(0.1, plain=1.0, row=0.1, draft=0.5)
    for _ in range(PATIENCE):
        assert length.gave_up is None
        assert length.plan([0], [16]) == [0]
    assert length.gave_up is not None
    assert "0.50 of a target step" in length.gave_up


def test_kinds_are_judged_apart_and_a_bad_one_is_tried_now_and_then() -> None:
    length = planner(gives_up=False, draft_cost=0.0)
    for _ in range(9):
        length.took(2, 1.0)
        length.took(6, 1.4)
    for _ in range(200):
        length.learn(1, 4, 4)
        length.learn(2, 1, 0)
    plans = [length.plan([1, 2], [16, 16]) for _ in range(2 * PROBE_EVERY)]
    assert {plan[0] for plan in plans} == {16}
    assert [plan[1] for plan in plans].count(0) == 2 * PROBE_EVERY - 2
    assert length.gave_up is None


def test_nothing_is_drafted_where_there_is_no_draft_or_no_room() -> None:
    length = planner(clocked=False)
    assert length.plan([-1, 0, 0], [16, 0, 1]) == [0, 0, 1]


def test_without_a_clock_times_change_nothing() -> None:
    length, other = planner(clocked=False), planner(clocked=False)
    for n in range(40):
        length.took(1 + n % 5, 1e-3 * n, 2, 5.0)
        length.learn(0, 3, n % 4)
        other.learn(0, 3, n % 4)
        assert length.plan([0], [16]) == other.plan([0], [16])


def test_a_fixed_length_is_what_was_asked_for_as_far_as_there_is_room() -> None:
    length = DraftLength(4, fixed=True, clocked=True, draft_cost=9.0, gives_up=True)
    assert length.plan([0, 0, -1], [9, 2, 9]) == [4, 2, 0]
