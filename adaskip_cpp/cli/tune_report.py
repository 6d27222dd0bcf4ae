"""Prints the results of `adaskip-cpp tune`: settings, plans, edited prompts, speed. Start at :func:`print_frontier`."""

import math
import re
from collections.abc import Sequence

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from ..intervals import Interval
from ..model.edits import FEW, MANY, TOGETHER
from ..model.frontier import DEFAULT_LOSS, EDITS_SHARE, Figures, Frontier
from ..model.quality import ERRORS
from ..model.settings import Settings, in_words
from ..pictures.profile_plots import shown_lengths
from .report import seconds
from .terminal import table

_PROMISES = (0.02, DEFAULT_LOSS, 0.1)
_SLOWER = 1.1  # times as long for a token of an answer: users are told
_EDITS = {FEW: "small", MANY: "new order", TOGETHER: "together"}
_QUALITY = ("diver-\ngence", "added\nloss", "in\ncopies", "in\nkeys", "same\ntoken", "pass\nkeys")
_SIDES = {
    "settings": "with these settings as with stock llama-cpp-python and its defaults",
    "plan": "with the plan of the default promise as with the whole model",
    "both": "with both as with stock llama-cpp-python",
}


def print_frontier(out: Console, frontier: Frontier) -> None:
    if frontier.tried:
        _print_settings(out, frontier)
    if frontier.points:
        _print_points(out, frontier)
        _print_promises(out, frontier)
    else:
        out.print("No plan was found, so nothing is skipped.", style="bold")
    if frontier.edits:
        _print_edits(out, frontier)
    for each in frontier.speeds:
        ratio, (before, after) = each.ratio, each.seconds
        ends = "" if math.isnan(ratio.low) else f" ({ratio.low:.2f} to {ratio.high:.2f})"
        out.print(
            f"Measured: the first token after {each.context:,} tokens comes {ratio.value:.2f}{ends} times as fast "
            f"{_SIDES[each.of]} ({seconds(after)} instead of {seconds(before)})."
        )
    if "judged_on" in (about := frontier.about):
        words = (
            f"Answers judged on {about['judged_on']}; plans found on {about['searched_on']}; calibrated on "
            f"{about['calibrated_on']}. The model read {frontier.n_read:,} tokens, besides those that timed sublayers "
            "and the result."
        )
        out.print(words, style="dim")


def _print_settings(out: Console, frontier: Frontier) -> None:
    names = ("prompt, start\ntokens/s", "prompt, end\ntokens/s", "answer\ntokens/s", "request\ns")
    rows = table("", *names, title="Settings, of the whole model")
    base = best = frontier.tried[0]
    for tried in frontier.tried:
        cells = ["fails"] * 4
        if math.isfinite(tried.request_s):
            of_prompt = [f"{1 / each:,.0f}" for each in (tried.prompt_short_s, tried.prompt_long_s)]
            of_answer = 1 / tried.token_s if tried.token_s else math.inf
            cells = [*of_prompt, f"{of_answer:,.1f}", f"{tried.request_s:,.1f}"]
        name = "default" if tried is base else _difference(tried.settings, best.settings)
        rows.add_row(Text(name, "bold" if tried.chosen else ""), *cells)
        best = tried if tried.chosen else best
    out.print(rows)
    chosen = _difference(frontier.settings, base.settings)
    words = f"Chosen: {chosen}. They change only the rounding." if chosen else "Chosen: the defaults."
    if best.token_s > _SLOWER * base.token_s:
        slower = f"{base.token_s / best.token_s:.2f} times as fast as by default"
        words += f" Answers then come {slower}. If yours are long, tune with their tokens: `--answer N`."
    out.print(f"{words}\n")


def _difference(settings: Settings, before: Settings) -> str:
    return in_words({name: value for name, value in vars(settings).items() if value != getattr(before, name)})


def _figures_table(title: str, first: Sequence[Column], *last: str) -> Table:
    """Return an empty table with the columns of :func:`_cells` between the first and the last ones."""
    figures = (Column(name, justify="right", no_wrap=True) for name in (*_QUALITY, *last))
    return table(*first, *figures, padding=0, pad_edge=True, title=title)


def _cells(figures: Figures) -> list[str]:
    continuation, keys = figures.continuation, figures.passkeys
    means = continuation.divergence, continuation.loss, figures.copying.divergence, figures.retrieval.divergence
    return [*map(_short, means), f"{continuation.agreement.value:.0%}", f"{keys.plan}/{keys.whole}"]


def _short(interval: Interval) -> str:
    """Return ``.012±.034``, without the zeros before the points."""
    words = f"{interval.value:.3f}"
    if not math.isnan(interval.low):
        words += f"±{max(interval.high - interval.value, interval.value - interval.low):.3f}"
    return re.sub(r"\b0\.", ".", words)


def _print_points(out: Console, frontier: Frontier) -> None:
    judged_at = frontier.points[0].judged_at
    lengths = [length for length in shown_lengths(frontier) if length >= judged_at // 2][:2]
    counts = [Column(name, justify="right", no_wrap=True) for name in ("\nattn", "\nFFN", "win-\ndows")]
    speeds = (f"speed\nat {length // 1024}k" for length in lengths)
    rows = _figures_table(f"Plans, judged after prompts of {judged_at:,} tokens", counts, *speeds)
    for point in frontier.points:
        bulk = point.plan.bulk
        assert bulk is not None
        skipped = (str(len(each)) for each in (bulk.skip.attention, bulk.skip.ffn, bulk.narrowed))
        rows.add_row(*skipped, *_cells(point), *(f"{point.speedup(length):.2f}" for length in lengths))
    out.print(rows)
    factors = [point.growth for point in frontier.points]
    out.print(
        "attn, FFN: sublayers that the bulk of a prompt skips. windows: attentions with a window there. divergence, "
        "added loss: in nats per token, of answers that continue the prompt. in copies: the divergence of answers that "
        "copy from the prompt. in keys: that of answers that give a pass key, where the plan makes it less likely. "
        "same token: how often plan and whole model find the same token likeliest. pass keys: those that the whole "
        "model finds clearly, and of these those that the plan finds. Means over texts, ± half of a 95% interval. "
        "speed: how many times as fast the first token comes, predicted. For a prompt twice as long, losses are "
        f"assumed to be {min(factors):.3g} to {max(factors):.3g} times as large. Those of windows do not grow. A plan "
        f"keeps a promise if each divergence plus {ERRORS} standard errors stays within it, and so does each mean "
        "added loss.\n",
        style="dim",
    )


def _print_promises(out: Console, frontier: Frontier) -> None:
    length = frontier.points[0].judged_at
    least = min(point.needs(length) for point in frontier.points)
    none = "the whole model"
    if math.isfinite(least):
        none += f", as the most careful plan needs {math.ceil(1e3 * least) / 1e3:.3f}"
    for promise in _PROMISES:
        default, gives = " (the default)" if promise == DEFAULT_LOSS else "", none
        if (point := frontier.point(length, promise)) is not None:
            gives = (
                f"{point.speedup(length):.2f} times the speed at {length:,} tokens. The perplexity grows by at most "
                f"{math.exp(promise) - 1:.0%}, and {point.continuation.agreement.value:.0%} of the likeliest tokens "
                "stay the same"
            )
        out.print(f"A promise of {promise:g} nats per token{default} gives {gives}.")


def _print_edits(out: Console, frontier: Frontier) -> None:
    title = f"Edited prompts of {frontier.edits[0].judged_at:,} tokens"
    rows = _figures_table(title, [Column("\nedits", no_wrap=True)], "from a\npromise of")
    for each in frontier.edits:
        needed = each.needs(each.judged_at) / EDITS_SHARE
        name = _EDITS.get(each.edits.most_moves, f"{each.edits.most_moves} moves")
        rows.add_row(name, *_cells(each), f"{needed:.3f}" if math.isfinite(needed) else "none")
    out.print()
    out.print(rows)
    out.print(
        "If the promise allows it, tokens that an edited prompt shares with the one before are not read again. small: "
        "lines and messages are changed or dropped. new order: five documents change places, four times. together: "
        "five documents that were read alone are put together, then change places. A kind is measured if the default "
        "promise may allow it. pass keys: as above, but an edit changed a third of them, and answers must give the new "
        "ones. from a promise of: the least promise that allows this. It does not count the divergence in keys. Edits "
        "may use half of it. The plan has the rest in `serve`, elsewhere from the first edited prompt on.\n",
        style="dim",
    )


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
