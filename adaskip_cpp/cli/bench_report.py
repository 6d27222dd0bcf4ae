"""Prints the results of `adaskip-cpp bench`: tables, then the model, the machine and the plans."""

import itertools
import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Column, Table

from ..benchmark.bench import BenchResult
from ..benchmark.plots import TITLES
from ..benchmark.table import NO_PLAN, STOCK, Row, verdict
from ..intervals import Interval
from ..model.plan import SkipPlan
from .report import PHASE_WORDS, megabytes
from .terminal import table


def print_report(out: Console, result: BenchResult) -> None:
    rows = result.rows
    if not out.is_terminal:
        out.width = max(out.width, 100)
    for _, of_phase in itertools.groupby(rows, lambda row: (row.phase, row.context)):
        _print_phase(out, [*of_phase])
    if result.usage:
        _print_usage(out, result)
    _print_configuration(out, result)


def _table(out: Console, title: str, columns: Sequence[str]) -> Table:
    out.print(title, style="bold")  # not as the table's title, which rich wraps to the width of the table
    shown = table(Column("", no_wrap=True))
    for name in columns:
        shown.add_column(name, justify="left" if name.startswith("against") else "right", no_wrap="\n" in name)
    return shown


def _print_phase(out: Console, rows: Sequence[Row]) -> None:
    references = [name for name in (STOCK, NO_PLAN) if any(name in row.against for row in rows)]
    columns = ["median\n(quartiles)", *(f"against {name}\n(95% interval)" for name in references)]
    columns += ["ideal", "of the ideal\n(95% interval)"] if any(row.ideal is not None for row in rows) else []
    n_rounds = f"{rows[0].n_rounds} round{'s' if rows[0].n_rounds > 1 else ''}"
    table = _table(out, f"{TITLES[rows[0].phase]}, prompt of {rows[0].context:,} tokens, {n_rounds}", columns)
    for row in rows:
        cells = [row.contender, f"{seconds(row.median_s)}\n({_range(row.low_s, row.high_s)})"]
        verdicts = [verdict(row.against[name]) if name in row.against else "" for name in references]
        cells += [words.replace(" (", "\n(").replace(", ", ",\n") for words in verdicts]  # the interval goes below
        if row.ideal is not None and row.of_ideal is not None:
            cells += [f"{row.ideal.value:.2f} x", _percent(row.of_ideal)]
        table.add_row(*cells)
    out.print(table)


def _range(low: float, high: float) -> str:
    first, last = seconds(low).split(), seconds(high).split()
    return f"{first[0]} to {' '.join(last)}" if first[1] == last[1] else f"{' '.join(first)} to {' '.join(last)}"


def _percent(interval: Interval) -> str:
    ends = f"\n({interval.low * 100:.1f} to {interval.high:.1%})" if math.isfinite(interval.low) else ""
    return f"{interval.value:.1%}{ends}"


def _print_usage(out: Console, result: BenchResult) -> None:
    table = _table(out, "Memory", ("at most", "KV"))
    for name, usage in result.usage.items():
        table.add_row(name, megabytes(usage.peak_bytes), megabytes(usage.kv_bytes))
    out.print(table)


def _print_configuration(out: Console, result: BenchResult) -> None:
    settings, about = result.settings, result.about
    assert about is not None
    size = megabytes(about.file_bytes)
    lines = [f"{about.model} ({about.architecture}, {about.n_layer} layers, {about.quantisation}, {size})"]
    if result.machine is not None:
        lines.append(result.machine.words)
    lines.append(
        f"adaskip-cpp {about.adaskip_cpp}, llama-cpp-python {about.llama_cpp_python}, Python {about.python}, {about.os}"
    )
    if NO_PLAN in result.times.contenders and STOCK in result.times.contenders:
        lines.append(
            f"{NO_PLAN}: the whole model, without outputs of the prompt that stock computes but nothing reads."
        )
    lines += [f"{name}: {_skipped(plan)}; compensation {plan.compensation}" for name, plan in result.plans.items()]
    lines.append(
        "Each contender runs in turn, in a new process each round. Every second round reverses the order. "
        f"{settings.n_decode} tokens decoded after each prompt"
        + ("." if about.load_average is None else f"; load average before {about.load_average:.2f}.")
    )
    out.print("\n".join(lines), style="dim", soft_wrap=True)


def _skipped(plan: SkipPlan) -> str:
    of_prompt, where = plan.skipped("bulk"), PHASE_WORDS[plan.prompt_phase]
    return (
        f"{of_prompt.n_skip} of {2 * plan.n_layer} sublayers skipped in {where} ({len(of_prompt.attention)} attention, "
        f"{len(of_prompt.ffn)} FFN), {plan.decode.n_skip} in decode"
    )


def seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 100 else f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"
