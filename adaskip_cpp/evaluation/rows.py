"""What a row of the results says: names for people, a look for pictures, and the figures that are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..model.plan import MODES
from ..planning.compensation import COMPENSATIONS, DEFAULT_COMPENSATION
from .results import SPEEDS

__all__ = [
    "MODE_NAMES",
    "SPEED_NAMES",
    "STRATEGY_NAMES",
    "Row",
    "added_loss",
    "contender_label",
    "headline",
    "look_key",
    "speedup",
    "text_figures",
]

Row = Mapping[str, Any]
"""A contender in ``results.json``."""

STRATEGY_NAMES = {
    "full": "full model",
    "adaskip": "AdaSkip",
    "early_exit": "Early Exit",
    "skip_decode": "SkipDecode",
    "unified_skipping": "Unified Skipping",
    "tuned": "tuned plan",
}
"""Strategies as a reader knows them."""

SPEED_NAMES = {"first_token": "first token", "per_token": "later tokens", "request": "whole request"}
MODE_NAMES = {"prefill": "prefill", "decode": "decode", "e2e": "end-to-end"}


def contender_label(row: Row, *, several: bool = True) -> str:
    """Name a contender for people: ``AdaSkip affine, 12``, or ``AdaSkip affine, 1.2 x asked``.

    Args:
        row: of the results.
        several: whether contenders differ in compensation, so that it must be said.
    """
    name = STRATEGY_NAMES.get(row["strategy"], str(row["strategy"]))
    if row["strategy"] in ("full", "tuned"):
        return name
    asked = row["budget"]
    says = f" {row['compensation']}" if several and row["compensation"] != "none" else ""
    return f"{name}{says}, {f'{asked[:-1]} x asked' if asked.endswith('x') else asked}"


def look_key(row: Row) -> str:
    """Return how a contender looks: a key in :data:`adaskip_cpp.pictures.plots.STRATEGY`, or ``"other"``."""
    if row["strategy"] != "adaskip" or row["compensation"] == DEFAULT_COMPENSATION:
        return str(row["strategy"])
    if row["compensation"] == "paper":
        return "paper"
    others = [name for name in COMPENSATIONS if name not in (DEFAULT_COMPENSATION, "paper")]
    return "manual" if row["compensation"] == others[-1] else "other"


def speedup(row: Row) -> Mapping[str, Any] | None:
    """The measured speed-up that a contender's quality is read against; None if it was not timed."""
    if row["mode"] is None or row["speed"] is None:
        return None
    found: Mapping[str, Any] = row["speed"][SPEEDS[row["mode"]]]["speedup"]
    return found


def added_loss(row: Row) -> Mapping[str, Any] | None:
    """The added loss of a contender in its own mode; None if there is none."""
    found: Mapping[str, Any] | None = text_figures(row, row["mode"]).get("added_loss")
    return found


def text_figures(row: Row, mode: str | None, group: str = "all") -> Mapping[str, Any]:
    """Figures of text in a mode: of prompts in mode ``prefill``, of decoded tokens in the others."""
    measured = row["text"]["prompt" if mode == "prefill" else "decode"]
    figures: Mapping[str, Any] = (measured or {}).get(group) or {}
    return figures


def headline(results: Mapping[str, Any]) -> list[str]:
    """Return what came out in a sentence for each mode: the strategy that loses least, and the next best one."""
    return [each for mode in MODES if (each := _sentence(results["contenders"], mode)) is not None]


def _sentence(rows: Sequence[Row], mode: str) -> str | None:
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        loss, speed = added_loss(row), speedup(row)
        if row["mode"] == mode and loss is not None and speed is not None and speed["value"] is not None:
            says = f" ({row['compensation']})" if row["compensation"] != "none" else ""
            name = STRATEGY_NAMES.get(row["strategy"], str(row["strategy"])) + says
            series.setdefault(name, []).append((speed["value"], loss["mean"]))
    if not series:
        return None
    best, *others = sorted(series, key=lambda name: min(loss for _, loss in series[name]))

    def ranges(name: str) -> tuple[str, str]:
        speeds, losses = zip(*series[name], strict=True)
        return _range(speeds, 2), _range(losses, 2)

    fast, lost = ranges(best)
    text = (
        f"{MODE_NAMES[mode].capitalize()}: {best} makes the {SPEED_NAMES[SPEEDS[mode]]} {fast} times as fast and adds "
        f"{lost} nats of loss per token."
    )
    if others:
        fast, lost = ranges(others[0])
        text += f" Next is {others[0]}: {fast} times, {lost} nats."
    return text


def _range(values: Sequence[float], digits: int) -> str:
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"
