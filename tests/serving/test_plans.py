"""adaskip_cpp.serving.plans: the plan of a request, by its promise or speed-up."""

from dataclasses import replace
from typing import Any

import pytest
from oracles.served import BULK_PLAN, FRONTIER, edited_frontier

from adaskip_cpp import SkipPlan
from adaskip_cpp.errors import RequestError
from adaskip_cpp.model.edits import FEW
from adaskip_cpp.model.frontier import Frontier
from adaskip_cpp.model.quality import Passkeys
from adaskip_cpp.serving.plans import Choice, Plans

CAREFUL, FAST = (point.plan for point in FRONTIER.points)
# The same plans for longer prompts, with longer tails.
LONGER, (FAST_1, FAST_2, _, FAST_4) = (
    [point.plan_for(n) for n in (1536, 2048, 3072, 4096)] for point in FRONTIER.points
)


def chosen(wish: Any, n_tokens: int, frontier: Frontier | None = FRONTIER, own: SkipPlan | None = None) -> Choice:
    """What a server of 4,096 tokens that promises 0.07 chooses."""
    return Plans(own, frontier, 0.07, 4096).choose(wish, n_tokens)


def test_edits_and_plan_share_a_promise() -> None:
    plans = Plans(None, edited_frontier(0.01), 0.07, 4096)
    for wish, plan, moves in (
        ("auto", FAST, FEW),  # 0.06 and 0.01
        ({"max_loss": 0.069}, CAREFUL, FEW),
        ({"max_loss": 0.019}, None, None),
        ({"speedup": 1.4}, FAST, None),  # which needs the whole promise that it names
        ("none", None, None),
    ):
        choice = plans.choose(wish, 1000, edited=True)
        assert choice.plan is plan and (choice.edits.most_moves if choice.edits else None) == moves
        assert plans.choose(wish, 1000).edits is None


def test_a_promise_chooses_by_the_length_of_the_prompt() -> None:
    """The promise of the server, or the request's own. Losses grow with the length."""
    plans = {n: chosen("auto", n).plan for n in (511, 512, 1024, 1025, 1537)}
    assert plans == {511: None, 512: FAST, 1024: FAST, 1025: FAST_1, 1537: LONGER[1]}
    assert chosen({"max_loss": 0.03}, 1000).plan is CAREFUL and chosen({"max_loss": 0.15}, 4000).plan is FAST_4
    choice = chosen({"max_loss": 0.029}, 1000)
    assert (choice.plan, choice.name, choice.point, choice.readable) == (None, "none", None, ())
    choice = chosen("auto", 1537)
    assert (choice.name, choice.max_loss, choice.speedup) == ("promise 0.07", 0.07, pytest.approx(1.3))
    assert [*map(id, choice.readable)] == [*map(id, (CAREFUL, *LONGER, FAST, FAST_1))]  # short prompts have FAST
    assert chosen({"max_loss": 0.05}, 1537).readable == (CAREFUL, *LONGER[:3])


def test_a_speed_up_is_had_under_the_least_promise_that_gives_it() -> None:
    choice = chosen({"speedup": 1.2}, 1000)
    assert choice.plan is CAREFUL and choice.readable == (CAREFUL,)
    assert chosen({"speedup": 1.4}, 2000).plan is FAST_2
    assert chosen({"speedup": 2}, 100) == chosen({"speedup": 1}, 100) != chosen({"speedup": 1.2}, 1000)
    assert chosen({"speedup": 2}, 100).plan is None, "a short prompt has little bulk, and a chat begins with one"
    with pytest.raises(RequestError, match=r"2 times as fast at 1024 tokens; ask for at most 1\.5"):
        chosen({"speedup": 2}, 1000)
    # The promise covers 1.6 standard errors too, and a plan that loses a pass key counts as none.
    (careful, fast), losing = FRONTIER.points, Passkeys(2, 2, 1)
    unsure = replace(fast, copying=replace(fast.copying, error=0.02))
    choice = chosen({"speedup": 1.4}, 1000, Frontier((careful, unsure)))
    assert choice.plan is FAST and choice.max_loss == pytest.approx(fast.copying.harm + 1.6 * 0.02)
    with pytest.raises(RequestError, match=r"at most 1\.2"):
        chosen({"speedup": 1.4}, 1000, Frontier((careful, replace(fast, passkeys=losing))))


def test_without_a_frontier_a_promise_is_kept_by_the_whole_model_and_a_speed_up_is_refused() -> None:
    assert chosen({"max_loss": 9}, 1000, None, BULK_PLAN) == chosen("auto", 1000, None) == Choice()
    assert chosen("auto", 1000, None, BULK_PLAN) == Choice(BULK_PLAN, "auto")
    with pytest.raises(RequestError, match="adaskip-cpp tune"):
        chosen({"speedup": 1.5}, 10, None, BULK_PLAN)
