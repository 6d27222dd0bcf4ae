"""Prints the results of `adaskip-cpp bench`: tables, then the model, the machine and the plans."""

import itertools
from collections.abc import Sequence

from rich.console import Console
from rich.table import Column

from ..benchmark.bench import BenchResult
from ..benchmark.table import NO_PLAN, STOCK, Row, verdict
from ..model.plan import SkipPlan
from .report import seconds, skipped_words
from .terminal import table

_TITLES = {"prefill": "Time to first token", "decode": "Time per token"}


def print_report(out: Console, result: BenchResult) -> None:
    rows = result.rows
    if not out.is_terminal:
        out.width = max(out.width, 100)
    for _, of_phase in itertools.groupby(rows, lambda row: (row.phase, row.context)):
        _print_phase(out, [*of_phase])
    _print_configuration(out, result)


def _print_phase(out: Console, rows: Sequence[Row]) -> None:
    references = [name for name in (STOCK, NO_PLAN) if any(name in row.against for row in rows)]
    columns = ["median\n(quartiles)", *(f"against {name}\n(95% interval)" for name in references)]
    n_rounds = f"{rows[0].n_rounds} round{'s' if rows[0].n_rounds > 1 else ''}"
    # Not as the table's title, which rich wraps to the width of the table.
    out.print(f"{_TITLES[rows[0].phase]}, prompt of {rows[0].context:,} tokens, {n_rounds}", style="bold")
    shown = table(
        Column("", no_wrap=True),
        *(Column(each, justify="left" if each.startswith("against") else "right", no_wrap=True) for each in columns),
    )
    for row in rows:
        cells = [row.contender, f"{seconds(row.median_s)}\n({_range(row.low_s, row.high_s)})"]
        verdicts = [verdict(row.against[name]) if name in row.against else "" for name in references]
        cells += [words.replace(" (", "\n(").replace(", ", ",\n") for words in verdicts]  # the interval goes below
        shown.add_row(*cells)
    out.print(shown)


def _range(low: float, high: float) -> str:
    first, last = seconds(low).split(), seconds(high).split()
    return f"{first[0]} to {' '.join(last)}" if first[1] == last[1] else f"{' '.join(first)} to {' '.join(last)}"


def _words(plan: SkipPlan | None) -> str:
    if plan is None:
        return "the whole model"
    return f"{skipped_words(plan)}; mode {plan.mode}, compensation {plan.compensation}"


def _print_configuration(out: Console, result: BenchResult) -> None:
    lines = list(result.configuration.values())
    if result.machine is not None:
        lines.append(result.machine.words)
    if NO_PLAN in result.times.contenders and STOCK in result.times.contenders:
        lines.append(
            f"{NO_PLAN}: the whole model, without outputs of the prompt that stock computes but nothing reads."
        )
    if result.settings.stock_options != result.settings.options and STOCK in result.times.contenders:
        lines.append(f"{STOCK}: with its own defaults. {NO_PLAN} against {STOCK} is the gain of the tuned settings.")
    for name in result.plans:
        of_contexts: dict[str, list[int]] = {}
        for context, plan in result.plans_of(name).items():
            of_contexts.setdefault(_words(plan), []).append(context)
        for words, contexts in of_contexts.items():
            where = f" for {' and '.join(f'{n:,}' for n in contexts)} tokens" if len(of_contexts) > 1 else ""
            lines.append(f"{name}{where}: {words}")
    lines.append(
        "Each contender runs in turn, in a new process each round. Every second round reverses the order. "
        f"{result.settings.n_decode} tokens decoded after each prompt"
        + ("." if result.load_average is None else f"; load average before {result.load_average:.2f}.")
    )
    out.print("\n".join(lines), style="dim", soft_wrap=True)
