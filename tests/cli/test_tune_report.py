"""adaskip_cpp.cli.tune_report: each figure of a frontier is below its own heading. All figures are different."""

import io
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from rich.console import Console

from adaskip_cpp import Frontier, SkipPlan
from adaskip_cpp.cli.tune_report import _short, print_frontier
from adaskip_cpp.intervals import Interval
from adaskip_cpp.model.edits import FEW, MANY, TOGETHER, Edits
from adaskip_cpp.model.frontier import EditPoint, Point, SpeedUp
from adaskip_cpp.model.plan import Bulk
from adaskip_cpp.model.quality import Passkeys, Quality
from adaskip_cpp.model.settings import Settings, Tried


def quality(divergence: float, loss: float, agreement: float) -> Quality:
    first, second, third = (Interval(each, each - 0.001, each + 0.002, 4) for each in (divergence, loss, agreement))
    return Quality(first, 0.0, second, 0.0, third, (0.5, 1.5), 4, 400)


NONE = SkipPlan.manual(6).prefill
BULK = Bulk(SkipPlan.manual(6, [0, 1], [1, 2, 3]).prefill, windowed=(0, 5))  # attention 0 is skipped, so one window
SPEEDUPS = ((1024, 1.1), (2048, 1.2), (4096, 1.4), (8192, 1.6), (16384, 1.8), (32768, 1.9))
KINDS = quality(0.011, 0.012, 0.83), quality(0.021, 0.022, 0.73), quality(0.015, 0.016, 0.63)
POINT = Point(2048, *KINDS, Passkeys(5, 4, 3), SPEEDUPS, SkipPlan(NONE, NONE, bulk=BULK))
SMALL = EditPoint(2048, *KINDS, Passkeys(5, 4, 4), (), Edits(most_moves=FEW))
DOUBTFUL = Interval(0.123, -0.21, 0.456, 4)
WIDE = replace(KINDS[0], divergence=DOUBTFUL, loss=DOUBTFUL)
ORDER = EditPoint(2048, WIDE, WIDE, WIDE, Passkeys(5, 4, 3), (), Edits(most_moves=MANY))
APART = EditPoint(2048, *KINDS, Passkeys(5, 4, 4), (), Edits(most_moves=TOGETHER))
TRIED = (
    Tried(Settings(), 0.01, 0.02, 0.1, 9.0, True),
    Tried(Settings(flash_attn=True), 0.005, 0.01, 0.2, 8.0, True),
    Tried(Settings(flash_attn=True, unpack=("Q5_0", "Q4_1")), 0.006, 0.01, 0.2, 9.0, False),
    Tried(Settings(flash_attn=True, repack=False), math.inf, math.inf, math.inf, math.inf, False),
)
SPEED = SpeedUp("plan", 2048, Interval(1.5, 1.4, 1.6, 3), (3.0, 2.0))


@pytest.fixture(scope="module")
def lines() -> Sequence[str]:
    """What is printed in 80 columns, with one space between words."""
    found = Frontier((POINT,), Settings(flash_attn=True), None, TRIED, (SPEED,), 9, {}, (SMALL, ORDER, APART))
    out = io.StringIO()
    print_frontier(Console(file=out, width=80), found)
    return [" ".join(each.split()) for each in out.getvalue().splitlines()]


def after(lines: Sequence[str], title: str) -> list[str]:
    """The lines with words of the table of this title."""
    begin = next(i for i, each in enumerate(lines) if each.startswith(title)) + 1
    return [each for each in lines[begin:] if each.strip("─ ")][:5]


def test_settings_plans_and_speed_stand_below_their_headings(lines: Sequence[str]) -> None:
    first, second, default, changed, unpacked = after(lines, "Settings, of the whole model")
    assert (first, second) == ("prompt, start prompt, end answer request", "tokens/s tokens/s tokens/s s")
    assert (default, changed) == ("default 100 50 10.0 9.0", "flash_attn True 200 100 5.0 8.0")
    assert unpacked == "unpack Q5_0+Q4_1 167 100 5.0 9.0" and "repack False fails fails fails fails" in lines
    assert "Chosen: flash_attn True. They change only the rounding. Answers then come 0.50" in " ".join(lines)
    first, second, row, *_ = after(lines, "Plans, judged after prompts of 2,048 tokens")
    assert first.startswith("win- diver- added in in same pass speed")
    assert second.startswith("attn FFN dows gence loss copies keys token keys at 2k at 8k")
    assert row.startswith("2 3 1 .011±.002 .012±.002 .021±.002 .015±.002 83% 3/4 1.20 1.60")
    speed = "comes 1.50 (1.40 to 1.60) times as fast with the plan of the default promise as with the whole model"
    assert f"{speed} (2.00 s instead of 3.00 s)" in " ".join(lines)


def test_speeds_are_shown_of_lengths_that_are_predicted() -> None:
    """Those of a model that was trained on 4,096 tokens have no column for 8,192."""
    out = io.StringIO()
    print_frontier(Console(file=out, width=80), Frontier((replace(POINT, speedups=((2048, 1.2), (4096, 1.4))),)))
    assert "at 2k" in out.getvalue() and "at 8k" not in out.getvalue() and "1.40" not in out.getvalue()


def test_edits(lines: Sequence[str]) -> None:
    """Edits may use half of a promise, which is at least the added loss, 0.022 in copies. A lost pass key: none."""
    first, second, small, order, together = after(lines, "Edited prompts of 2,048 tokens")
    assert first == "diver- added in in same pass from a"
    assert second == "edits gence loss copies keys token keys promise of"
    assert small == "small .011±.002 .012±.002 .021±.002 .015±.002 83% 4/4 0.044"
    assert order == "new order .123±.333 .123±.333 .123±.333 .123±.333 83% 3/4 none"
    assert together == "together .011±.002 .012±.002 .021±.002 .015±.002 83% 4/4 0.044"


def test_zeros_before_points_are_left_out() -> None:
    assert _short(Interval(10.01, 8.0, 11.0, 4)) == "10.010±2.010"
    assert _short(Interval(0.25, math.nan, math.nan, 1)) == ".250"
