"""adaskip_cpp.model.frontier: which plan keeps a promise for which prompt."""

from dataclasses import replace
from typing import Any

import pytest
from oracles.frontiers import quality

from adaskip_cpp import Frontier, SkipPlan
from adaskip_cpp.errors import PlanError
from adaskip_cpp.intervals import Interval
from adaskip_cpp.model.edits import FEW, MANY, Edits
from adaskip_cpp.model.frontier import DEFAULT_LOSS, EditPoint, Point, context_for, contexts
from adaskip_cpp.model.plan import Bulk
from adaskip_cpp.model.quality import Passkeys
from adaskip_cpp.model.skip_set import SkipSet

NONE = SkipSet.none(4)
AT = 2048
"""Tokens of the prompts that points are judged on here."""


def point(harm: float, speed: float, *ffn: int, windowed: Any = (), **changes: Any) -> Point:
    """A point that is ``speed`` times as fast at every length and loses ``harm`` in continuations."""
    skip = SkipPlan.manual(4, ffn=ffn, scale=0.9).prefill
    plan = SkipPlan(NONE, NONE, bulk=Bulk(skip, windowed=windowed), mode="prompt")
    lengths = tuple((2**i, speed) for i in range(9, 16))
    kinds = {kind: quality(changes.pop(kind, 0.0)) for kind in ("copying", "retrieval")}
    parts = {"judged_at": AT, "passkeys": Passkeys(4, 4, 4), "speedups": lengths, **kinds, **changes}
    return Point(continuation=quality(harm), plan=plan, **parts)


SLOW, FAST, FASTEST = point(0.01, 1.2, 3), point(0.04, 1.5, 2, 3), point(0.2, 2.0, 1, 2, 3)
FRONTIER = Frontier((SLOW, FAST, FASTEST))


@pytest.mark.parametrize(
    ("max_loss", "chosen"), [(0.0, None), (0.01, SLOW), (0.039, SLOW), (0.04, FAST), (0.2, FASTEST), (9, FASTEST)]
)
def test_the_fastest_plan_that_keeps_a_promise_is_chosen(max_loss: float, chosen: Point | None) -> None:
    assert FRONTIER.choose(AT, max_loss) is (None if chosen is None else chosen.plan)
    assert FRONTIER.point(AT, max_loss) is chosen


def test_by_default_a_twentieth_of_a_nat_is_lost_at_most_and_short_prompts_run_whole() -> None:
    assert DEFAULT_LOSS == 0.05 and FRONTIER.choose(AT) is FAST.plan
    assert [FRONTIER.choose(n, 9) for n in (0, 1, 511, 512)] == [None, None, None, FASTEST.plan]


def test_a_plan_that_saves_no_time_is_not_chosen() -> None:
    slower = point(0.0, 1.0, 3)
    assert Frontier((slower,)).choose(AT) is None and Frontier((slower, SLOW)).choose(AT) is SLOW.plan
    for_long = replace(SLOW, speedups=((512, 0.9), (4096, 1.3)))
    assert [Frontier((for_long,)).point(n, 0.05) for n in (512, 1024, 4096)] == [None, None, for_long]


@pytest.mark.parametrize(("n_tokens", "growth"), [(512, 1), (2048, 1), (3073, 1.3), (4096, 1.3), (32768, 1.3**4)])
def test_plans_lose_nearly_a_third_more_with_each_doubling(n_tokens: int, growth: float) -> None:
    """A prompt counts as the next of the lengths below; shorter ones than were judged lose no less."""
    assert FRONTIER.point(n_tokens, 0.04 * growth + 1e-9) is FAST
    assert FRONTIER.point(n_tokens, 0.04 * growth - 1e-9) is SLOW


def test_prompts_are_planned_for_powers_of_two_and_three_quarters_of_these() -> None:
    assert contexts(5000) == [512, 768, 1024, 1536, 2048, 3072, 4096] and contexts(512) == [512] and contexts(0) == []
    assert all(context_for(n) == next(each for each in contexts(4096) if each >= n) for n in range(512, 4097))
    assert point(0.04, 1.5).needs(3072) == pytest.approx(0.04 * 1.3**0.585, rel=1e-3)


def test_a_plans_own_growth_counts_if_it_has_one() -> None:
    slow = point(0.04, 1.5, growth=1.05)
    assert [slow.needs(n) for n in (AT, 4 * AT)] == pytest.approx([0.04, 0.04 * 1.05**2])
    assert Frontier((slow,)).point(4 * AT, 0.05) is slow and Frontier((FAST,)).point(4 * AT, 0.05) is None


def test_the_worse_kind_of_answer_keeps_the_promise_or_not() -> None:
    for kind in ("copying", "retrieval"):
        worse = point(0.01, 1.5, 3, **{kind: 0.06})
        assert worse.needs(AT) == worse.harm(AT) == 0.06
        assert worse.needs(2 * AT) == worse.harm(2 * AT) == pytest.approx(0.06 * 1.3)
        losing = replace(worse, **{kind: replace(quality(0.06), loss=Interval(0.08, -0.1, 0.2, 4))})
        assert losing.needs(AT) == 0.08 and max(losing.needs_by_divergence) == 0.06, "the mean added loss"
        faster = replace(worse, speedups=tuple((n, 2 * speed) for n, speed in worse.speedups))
        assert faster.beats(losing) and not replace(losing, speedups=faster.speedups).beats(worse)


def test_a_plan_that_loses_a_pass_key_keeps_no_promise() -> None:
    losing = replace(SLOW, passkeys=Passkeys(4, 3, 2))
    assert Frontier((losing,)).choose(AT, 9) is None
    assert Frontier((replace(SLOW, passkeys=Passkeys(4, 3, 3)),)).choose(AT, 9) is SLOW.plan


def test_a_plan_beats_another_that_is_slower_and_keeps_no_promise_that_it_does_not() -> None:
    assert FAST.beats(point(0.04, 1.4)) and FAST.beats(point(0.0, 1.4, copying=0.05))
    assert not FAST.beats(point(0.039, 1.4)) and not FAST.beats(point(0.05, 1.6)) and not FAST.beats(FAST)
    *lengths, (longest, _) = FAST.speedups
    slower_once, faster_once = (replace(FAST, speedups=(*lengths, (longest, speed))) for speed in (1.4, 1.6))
    assert FAST.beats(slower_once) and not FAST.beats(faster_once)


def test_windows_and_tail_go_with_the_length_of_the_prompt() -> None:
    narrow = Frontier((point(0.0, 1.5, windowed=(1, 2)),))
    plans: Any = {n: narrow.choose(n, 9) for n in (1000, 2048, 4000, 4096, 16384)}
    sizes = {n: (plan.bulk.window_size, plan.bulk.tail) for n, plan in plans.items()}
    assert sizes == {1000: (252, 64), 2048: (252, 64), 4000: (508, 128), 4096: (508, 128), 16384: (8 * 256 - 4, 512)}
    assert plans[1000] is plans[2048] is narrow.points[0].plan and plans[4000] is plans[4096]
    between: Any = [narrow.choose(n, 9) for n in (6000, 6144)]
    assert between[0] is between[1] and (between[0].bulk.window_size, between[0].bulk.tail) == (764, 192)
    without: Any = {n: FRONTIER.choose(n, 9) for n in (512, 2048, 3000, 4096)}
    assert [(each.bulk.window_size, each.bulk.tail) for each in without.values()] == [
        (252, n) for n in (64, 64, 96, 128)
    ]
    assert without[512] is without[2048] is FASTEST.plan


@pytest.mark.parametrize("max_loss", [-0.01, float("nan"), float("inf"), True, "0.05", None, [0.05]])
def test_a_promise_that_is_no_number_from_0_on_is_refused(max_loss: Any) -> None:
    with pytest.raises(PlanError, match=r"promised loss is .*; use nats per token, a number from 0 on, such as 0\.05"):
        FRONTIER.choose(AT, max_loss)


def edit(most_moves: int, harm: float, keys: int = 2) -> EditPoint:
    return EditPoint(AT, quality(harm), *[quality(0.0)] * 2, Passkeys(2, 2, keys), (), Edits(most_moves=most_moves))


FEW_MOVES, MANY_MOVES = edit(FEW, 0.01), edit(MANY, 0.02)
EDITED = replace(FRONTIER, edits=(FEW_MOVES, MANY_MOVES))


@pytest.mark.parametrize(
    ("max_loss", "found"),
    [(0.0, None), (0.019, None), (0.02, FEW_MOVES), (0.039, FEW_MOVES), (0.04, MANY_MOVES), (9, MANY_MOVES)],
)
def test_edits_may_take_half_of_a_promise(max_loss: float, found: EditPoint | None) -> None:
    assert EDITED.edit_point(AT, max_loss) is found
    assert EDITED.edit_point(511, max_loss) is None
    assert FRONTIER.edit_point(AT, max_loss) is None


def test_edits_keep_a_promise_in_continuations_and_copies_if_clear_pass_keys_are_found() -> None:
    assert replace(FEW_MOVES, retrieval=quality(0.5)).needs(AT) == FEW_MOVES.needs(AT) == 0.01
    assert replace(FEW_MOVES, copying=quality(0.02)).needs(AT) == 0.02
    for edits in ((edit(FEW, 0.0, keys=1), MANY_MOVES), (edit(FEW, 0.9), MANY_MOVES)):
        assert replace(FRONTIER, edits=edits).edit_point(AT, 0.5) is None, "more moves lose no less than few"
    assert replace(FRONTIER, edits=(FEW_MOVES, edit(MANY, 0.0, keys=1))).edit_point(AT, 9) is FEW_MOVES


def test_plans_have_what_edits_leave_of_a_promise() -> None:
    assert EDITED.choose(AT, 0.06 + 1e-9, edited=True) is FAST.plan is EDITED.choose(AT, 0.059)
    assert EDITED.choose(AT, 0.059, edited=True) is SLOW.plan
    assert EDITED.choose(AT, 0.019, edited=True) is SLOW.plan, "there is no room for edits"
    assert EDITED.readable(0.06 + 1e-9, AT, edited=True) == (SLOW.plan, FAST.plan) == EDITED.readable(0.059, AT)
    assert EDITED.readable(0.059, AT, edited=True) == (SLOW.plan,)


def test_in_twice_as_long_prompts_small_edits_lose_no_more_and_new_orders_half_as_much_more() -> None:
    """Beside small edits, a promise of 0.02 leaves a plan 0.01 at every length."""
    for length in (AT, 8 * AT):
        assert EDITED.edit_point(length, 0.02) is FEW_MOVES and EDITED.edit_point(length, 0.02 - 1e-9) is None
        assert EDITED.left(length, 0.02, edited=True) == pytest.approx(0.01)
    assert EDITED.edit_point(2 * AT, 2 * 0.02 * 1.5 + 1e-9) is MANY_MOVES
    assert EDITED.edit_point(2 * AT, 2 * 0.02 * 1.5 - 1e-9) is FEW_MOVES
    assert EDITED.point(2 * AT, 0.04 * 1.3 + 0.02 * 1.5 + 1e-9, edited=True) is FAST
    assert EDITED.point(2 * AT, 0.04 * 1.3 + 0.02 * 1.5 - 1e-9, edited=True) is SLOW


def test_readable_are_the_very_objects_that_are_chosen_at_any_length_up_to_the_longest() -> None:
    assert FRONTIER.readable(0.005, AT) == ()
    narrow = Frontier((SLOW, point(0.026, 1.5, windowed=(1,))))
    found = narrow.readable(0.05, 9000)
    assert [plan.bulk.tail for plan in found[:4] if plan.bulk] == [64, 96, 128, 192]
    windows = [plan.bulk.window_size for plan in found[6:] if plan.bulk]
    assert windows == [252, 508, 508, 764, 1020], "at 12,288 it loses more than the promise"
    for n in (512, 2048, 3000, 5000, 8192, 9000):
        assert any(narrow.choose(n, 0.05) is plan for plan in found)
    assert all(a is b for a, b in zip(found, narrow.readable(0.05, 9000), strict=True))
