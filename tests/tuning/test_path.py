"""adaskip_cpp.tuning.path: the path of sets, on losses and times written out here, so that its best is known."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest

from adaskip_cpp.tuning.path import LEVELS, Candidate, Lost, Orders, aim, measure, n_judged
from adaskip_cpp.tuning.path import find_path as find_path_by

Losses = Callable[..., Lost]
Seconds = Callable[[Candidate], float]
PARTS = ("attention", "ffn", "windowed")


def last(n: int, end: int = 12) -> tuple[int, ...]:
    """The last n layers, the very last first."""
    return tuple(range(end - 1, end - 1 - n, -1))


def orders_of(sizes: tuple[int, int, int], end: int = 12) -> Orders:
    return {part: last(n, end) for part, n in zip(PARTS, sizes, strict=True)}


def all_last(attention: int, ffn: int, windowed: int = 0) -> Orders:
    return orders_of((attention, ffn, windowed))


def adding(continuation: float, copying: float, **other: Lost) -> Losses:
    """Every sublayer loses as much, those of a part named otherwise as much as is said, and what they lose adds up."""

    def lost(candidate: Candidate, long: bool = False) -> Lost:
        of = [np.array(other.get(part, (continuation, copying))) * len(getattr(candidate, part)) for part in PARTS]
        return tuple(np.sum(of, axis=0).tolist())  # type: ignore[return-value]

    return lost


def seconds(candidate: Candidate) -> float:
    """An attention takes a second, half of it with a window, an FFN two; the rest ten."""
    windowed = {*candidate.windowed} - {*candidate.attention}
    return 50 - len(candidate.attention) - 2 * len(candidate.ffn) - 0.5 * len(windowed)


def find_path(
    every: Orders, lost: Losses, seconds: Seconds, levels: Sequence[float] = LEVELS, **kwargs: Any
) -> list[Candidate]:
    return find_path_by(measure(every, lost, seconds, **kwargs), seconds, levels=levels)


def prefixes(every: Orders) -> list[Candidate]:
    """Every set of the first of each order."""
    firsts = [[tuple(sorted(order[:k])) for k in range(len(order) + 1)] for order in every.values()]
    return [Candidate(*parts) for parts in product(*firsts)]


# -- what a path is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("losses", [(0.002, 0.001), (0.001, 0.008), (0.02, 0.02), (0.0, 0.0)])
@pytest.mark.parametrize("sizes", [(8, 8, 12), (20, 20, 30), (8, 3, 0), (0, 8, 8), (1, 1, 1)])
def test_every_set_of_a_path_is_faster_than_the_one_before_it(losses: Lost, sizes: tuple[int, int, int]) -> None:
    path = find_path(orders_of(sizes, 30), adding(*losses), seconds)
    for less, more in pairwise(path):
        assert seconds(more) < seconds(less)
    assert Candidate() not in path and len(path) <= len(LEVELS)


def test_a_set_need_not_contain_the_one_before_it() -> None:
    """Eight FFNs lose as much as one of them, and more than five attentions. So they replace attentions."""

    def lost(candidate: Candidate, long: bool = False) -> Lost:
        loss = 0.003 * len(candidate.attention) + 0.02 * bool(candidate.ffn)
        return loss, loss

    path = find_path(all_last(8, 8), lost, seconds, levels=(0.016, 0.021, 0.045))
    assert [(len(each.attention), len(each.ffn)) for each in path] == [(5, 0), (0, 8), (8, 8)]


@pytest.mark.parametrize("level", LEVELS)
def test_the_set_of_a_level_is_the_fastest_that_keeps_it_in_both_kinds_of_answers(level: float) -> None:
    # With 4 of each, what is lost is measured at every depth, and nothing is interpolated.
    every, lost = all_last(4, 4, 2), adding(0.011, 0.005, attention=(0.004, 0.03), windowed=(0.001, 0.002))
    path = find_path(every, lost, seconds, levels=(level,))
    keeping = [each for each in prefixes(every) if max(lost(each)) <= level]
    assert [seconds(each) for each in path] == [min(map(seconds, keeping))][: len(path)]
    assert path or max(keeping, key=len_of) == Candidate()
    assert all(max(lost(each)) <= level for each in path)


def len_of(candidate: Candidate) -> int:
    return sum(len(getattr(candidate, part)) for part in PARTS)


@pytest.mark.parametrize("kind", [0, 1])
def test_what_loses_more_together_than_alone_keeps_the_level_too(kind: int) -> None:
    alone = adding(0.0049, 0.0049)

    def lost(candidate: Candidate, long: bool = False) -> Lost:
        values = list(alone(candidate))
        if candidate.attention and candidate.ffn:
            values[kind] *= 2
        return values[0], values[1]

    (found,) = find_path(all_last(4, 4), lost, seconds, levels=(0.05,))
    assert found.attention and found.ffn and max(lost(found)) <= 0.05


# -- copies ----------------------------------------------------------------------------------------------------------


def test_a_layer_that_copies_ends_the_path_before_it_however_little_continuations_lose() -> None:
    def lost(candidate: Candidate, long: bool = False) -> Lost:
        return 0.0005 * len_of(candidate), 2.0 if 8 in candidate.attention else 0.0005 * len_of(candidate)

    path = find_path(all_last(8, 8), lost, seconds)
    assert path and all(min(each.attention, default=12) > 8 for each in path)
    assert path[-1].attention and path[-1].ffn == tuple(range(4, 12))


# -- windows ---------------------------------------------------------------------------------------------------------


def test_windows_join_where_they_lose_little() -> None:
    path = find_path(all_last(8, 8, 12), adding(0.01, 0.01, windowed=(1e-4, 1e-4)), seconds)
    assert path and all(len(each.windowed) >= 10 for each in path)


def test_windows_are_tried_in_eighths_of_the_layers() -> None:
    """Attentions and FFNs lose too much. Of 24 windows, 15 keep the level, and quarters of the layers allow only 12."""
    lost = adding(9.0, 9.0, windowed=(0.001, 0.001))
    (found,) = find_path(orders_of((0, 0, 24), 24), lost, seconds, levels=(0.0155,))
    assert found.windowed == tuple(range(9, 24))


def test_windows_stay_away_where_they_lose_much() -> None:
    path = find_path(all_last(8, 8, 12), adding(0.01, 0.01, windowed=(0.1, 0.1)), seconds)
    assert path and not any(each.windowed for each in path)


def test_windows_are_measured_after_long_prompts_and_what_is_skipped_after_both() -> None:
    """After long prompts what is skipped loses three times as much; after short ones windows would lose everything."""

    def lost(candidate: Candidate, long: bool) -> Lost:
        assert long or not candidate.windowed
        skipped = len(candidate.attention) + len(candidate.ffn)
        loss = 0.001 * skipped * (3 if long else 1) + 0.0005 * len(candidate.windowed)
        return loss, loss

    every = all_last(8, 8, 12)
    for level in (0.01, 0.02, 0.04):
        (found,) = find_path(every, lost, seconds, levels=(level,))
        keeping = [each for each in prefixes(every) if lost(each, True)[0] <= level + 1e-9]
        assert lost(found, True)[0] <= level + 1e-9
        assert seconds(found) <= min(map(seconds, keeping)) + 1.0, "windows come in steps of three layers"


# -- nothing to find -------------------------------------------------------------------------------------------------


def test_where_nothing_saves_time_the_path_is_empty() -> None:
    assert find_path(all_last(8, 8, 12), adding(0.001, 0.001), lambda candidate: 10.0) == []


def test_where_everything_loses_too_much_the_path_is_empty() -> None:
    assert find_path(all_last(8, 8, 12), adding(9.0, 9.0), seconds) == []


def test_where_nothing_can_be_skipped_nothing_is_judged() -> None:
    def lost(candidate: Candidate, long: bool = False) -> Lost:
        raise AssertionError("judged")

    assert find_path(all_last(0, 0), lost, seconds) == []


# -- how much is judged ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(0, 0, 0), (1, 1, 1), (2, 1, 0), (3, 5, 4), (20, 20, 30)])
def test_no_more_sets_are_judged_than_announced_and_none_of_them_is_empty(sizes: tuple[int, int, int]) -> None:
    seen: list[Candidate] = []
    told: list[float] = []

    def lost(candidate: Candidate, long: bool = False) -> Lost:
        seen.append(candidate)
        return 0.001 * len_of(candidate), 0.002 * len_of(candidate)

    every = orders_of(sizes, 30)
    find_path(every, lost, seconds, on_progress=told.append)
    assert len(seen) <= n_judged(every) and Candidate() not in seen
    assert told == sorted(told) and len(told) == len(seen) and max(told, default=0) <= 1


# -- which sets are judged -------------------------------------------------------------------------------------------


def path_of(*levels: float) -> list[Candidate]:
    """Each skips an attention more than the one before it."""
    return [Candidate(attention=tuple(range(i + 1)), level=level) for i, level in enumerate(levels)]


def test_the_fastest_set_that_is_expected_to_keep_a_promise_is_judged_first() -> None:
    path = path_of(0.01, 0.02, 0.035, 0.06)
    assert aim(path, {}, 0.05) is path[1], "twice the level is needed until something is known"
    assert aim(path, {path[1]: 0.02}, 0.05) is path[2], "it needs its level alone, so the third is expected to"
    assert aim(path, {path[1]: 0.02, path[2]: 0.045}, 0.05) is None, "the fourth is expected to need 0.077"


def test_after_a_set_that_breaks_the_promise_a_milder_one_is_judged() -> None:
    path = path_of(0.01, 0.02, 0.03, 0.06)
    assert aim(path, {path[2]: 0.06}, 0.05) is path[1]
    assert aim(path, {path[2]: 0.06, path[1]: 0.05}, 0.05) is None


def test_between_two_sets_that_are_judged_what_a_set_needs_is_interpolated() -> None:
    """The factors are 1 and 8, so that of the set between them is about 2.8."""
    path = path_of(0.01, 0.019, 0.021, 0.04)
    assert aim(path, {path[0]: 0.01, path[3]: 0.32}, 0.055) is path[1]
    assert aim(path, {path[0]: 0.01, path[3]: 0.32}, 0.065) is path[2]
    assert aim(path, {path[0]: 0.01, path[3]: 0.32}, 0.045) is None


def test_what_is_known_of_another_path_tells_what_to_expect_of_this() -> None:
    windowed = Candidate(windowed=(7, 8), level=0.04)
    path = path_of(0.01, 0.02, 0.03)
    assert aim(path, {windowed: 0.2}, 0.05) is path[0] and aim(path, {windowed: 0.04}, 0.05) is path[2]


def test_where_no_set_is_expected_to_keep_a_promise_the_mildest_is_judged() -> None:
    path = path_of(0.01, 0.02)
    assert aim(path, {path[1]: 0.5}, 0.05) is path[0] and aim(path, {path[0]: 0.06}, 0.05) is None
    assert aim([], {}, 0.05) is None


def test_no_set_is_judged_beyond_one_that_loses_a_pass_key() -> None:
    path = path_of(0.01, 0.02, 0.03)
    assert aim(path, {path[1]: math.inf}, 0.5) is path[0]
    assert aim(path, {Candidate(ffn=(9,), level=0.01): math.inf}, 0.03) is path[0], "it skips another sublayer"


def test_a_judged_set_tells_nothing_of_a_set_that_neither_contains_it_nor_is_within_it() -> None:
    attentions, ffns = Candidate((7, 8, 9), level=0.02), Candidate((), (7, 8, 9), level=0.03)
    both = Candidate((7, 8, 9), (7, 8, 9), level=0.04)
    path = [Candidate((9,), level=0.01), attentions, ffns, both]
    # The attentions need three times their level. Nothing is known of the FFNs.
    judged = {path[0]: 0.011, attentions: 0.06}
    assert aim(path, judged, 0.05) is ffns, "the least factor that is known"
    assert aim(path, {**judged, ffns: 0.031}, 0.05) is None
    assert aim(path, {**judged, ffns: 0.031}, 0.059) is None, "both need at least what the attentions need"
    assert aim(path, {**judged, ffns: 0.031}, 0.06) is both
