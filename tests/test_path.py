"""adaskip_cpp.tuning.path: the path of sets, on losses and times written out here, so that its best is known."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest

from adaskip_cpp.tuning.path import LEVELS, SHARES, Candidate, Lost, Orders, aim, measure, n_judged, orders
from adaskip_cpp.tuning.path import find_path as find_path_by

NAN = float("nan")

Losses = Callable[..., Lost]
Seconds = Callable[[Candidate], float]
PARTS = ("attention", "ffn", "windowed")


def last(n: int, end: int = 12) -> tuple[int, ...]:
    """The last n layers, the very last first."""
    return tuple(range(end - 1, end - 1 - n, -1))


def all_last(attention: int, ffn: int, windowed: int = 0) -> Orders:
    return Orders((last(attention),), (last(ffn),), (last(windowed),))


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
    return find_path_by(measure(every, lost, seconds, **kwargs), seconds, SHARES, levels=levels)


def prefixes(every: Orders) -> list[Candidate]:
    """Every set of the first of each order."""
    firsts = [[tuple(sorted(order[:k])) for k in range(len(order) + 1)] for (order,) in vars(every).values()]
    return [Candidate(*parts) for parts in product(*firsts)]


# -- what a path is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("losses", [(0.002, 0.001), (0.001, 0.008), (0.02, 0.02), (0.0, 0.0)])
@pytest.mark.parametrize("sizes", [(8, 8, 12), (20, 20, 30), (8, 3, 0), (0, 8, 8), (1, 1, 1)])
def test_every_set_of_a_path_contains_the_one_before_it_and_is_faster(
    losses: Lost, sizes: tuple[int, int, int]
) -> None:
    path = find_path(Orders(*((last(n, 30),) for n in sizes)), adding(*losses), seconds)
    for less, more in pairwise(path):
        assert all({*getattr(less, part)} <= {*getattr(more, part)} for part in PARTS)
        assert seconds(more) < seconds(less)
    assert Candidate() not in path and len(path) <= len(LEVELS)


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


def test_an_order_by_scores_is_taken_where_it_loses_less_than_the_last_layers() -> None:
    # Attention 9 copies. The scores of calibration leave it for the end.
    by_score = (11, 10, 8, 7, 6, 5, 4, 9)

    def lost(candidate: Candidate, long: bool = False) -> Lost:
        return 0.002 * len_of(candidate), 0.6 if 9 in candidate.attention else 0.0

    every = Orders((last(8), by_score), (last(8),), ((),))
    assert find_path(every, lost, seconds)[-1].attention == (4, 5, 6, 7, 8, 10, 11)
    backwards = Orders((by_score, last(8)), (last(8),), ((),))
    assert find_path(backwards, lost, seconds)[-1].attention == (4, 5, 6, 7, 8, 10, 11)


def test_the_last_layers_are_taken_where_the_order_by_scores_loses_more() -> None:
    by_score = (4, 5, 6, 7, 8, 9, 10, 11)

    def lost(candidate: Candidate, long: bool = False) -> Lost:
        loss = sum(0.01 * (12 - layer) for layer in candidate.attention)
        return loss, loss

    path = find_path(Orders((last(8), by_score), ((),), ((),)), lost, seconds)
    assert path and all(each.attention == tuple(range(12 - len(each.attention), 12)) for each in path)


# -- windows ---------------------------------------------------------------------------------------------------------


def test_windows_join_where_they_lose_little() -> None:
    path = find_path(all_last(8, 8, 12), adding(0.01, 0.01, windowed=(1e-4, 1e-4)), seconds)
    assert all(each.windowed == tuple(range(12)) for each in path)


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


@pytest.mark.parametrize("alternatives", [1, 2])
@pytest.mark.parametrize("sizes", [(0, 0, 0), (1, 1, 1), (2, 1, 0), (3, 5, 4), (20, 20, 30)])
def test_no_more_sets_are_judged_than_announced_and_none_of_them_is_empty(
    sizes: tuple[int, int, int], alternatives: int
) -> None:
    seen: list[Candidate] = []
    told: list[float] = []

    def lost(candidate: Candidate, long: bool = False) -> Lost:
        seen.append(candidate)
        return 0.001 * len_of(candidate), 0.002 * len_of(candidate)

    def both(n: int) -> tuple[tuple[int, ...], ...]:
        return (last(n, 30), tuple(reversed(last(n, 30))))[:alternatives]

    every = Orders(both(sizes[0]), both(sizes[1]), (last(sizes[2], 30),))
    find_path(every, lost, seconds, on_progress=told.append)
    assert len(seen) <= n_judged(every) and Candidate() not in seen
    assert told == sorted(told) and len(told) == len(seen) and max(told, default=0) <= 1


# -- orders ----------------------------------------------------------------------------------------------------------


def test_without_scores_the_last_layers_come_first() -> None:
    assert orders(range(2, 6), None, [0, 3, 5], 6) == Orders(((5, 4, 3, 2),), ((5, 4, 3, 2),), ((5, 3, 0),))


def test_with_scores_there_is_a_second_order_by_the_score_times_the_layers_above() -> None:
    scores = np.full((6, 2), 1.0)
    scores[2:, 0] = 0.3, 0.1, 0.4, 0.9  # times 3, 2, 1 and 0 layers above
    found = orders(range(2, 6), scores, [], 6)
    assert found.attention == ((5, 4, 3, 2), (5, 3, 4, 2))
    assert found.ffn == ((5, 4, 3, 2),), "the same order is no alternative"


@pytest.mark.parametrize("layers", [(2, 3, 4, 5), (4, 5)])
def test_what_cannot_be_skipped_is_in_no_order(layers: Sequence[int]) -> None:
    scores = np.full((6, 2), 1.0)
    scores[4, 0] = scores[:, 1] = NAN
    found: Any = orders(layers, scores, [], 6)
    assert all(4 not in each for each in found.attention) and found.ffn == ((),)


# -- which sets are judged -------------------------------------------------------------------------------------------


def path_of(*levels: float) -> list[Candidate]:
    """Each skips an attention more than the one before it."""
    return [Candidate(attention=tuple(range(i + 1)), level=level) for i, level in enumerate(levels)]


def test_the_fastest_set_that_is_expected_to_keep_a_promise_is_judged_first() -> None:
    path = path_of(0.01, 0.02, 0.035, 0.06)
    assert aim(path, {}, 0.05) is path[1], "2.5 times the level is needed until something is known"
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
