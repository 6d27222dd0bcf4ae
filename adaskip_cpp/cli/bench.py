"""``adaskip-cpp bench``: measures the speed of a model with and without plans, against stock llama-cpp-python."""

import itertools
import os
from collections.abc import Sequence
from functools import partial

import click
from rich.console import Console
from rich.table import Column

from ..benchmark import measure
from ..benchmark.measure import BenchResult
from ..benchmark.table import NO_PLAN, STOCK, Row, verdict
from ..files import json_text
from ..measuring.running import Running
from ..model.frontier import Frontier
from ..model.plan import SkipPlan
from ..model.plan_file import load_plan
from ..progress import progress_bar
from .lists import numbers
from .planning import find_plan_source
from .report import seconds, skipped_words
from .terminal import console, model_options, option, output_option, skip_option, table, verb, warn

_TITLES = {"prefill": "Time to first token", "decode": "Time per token"}
_measured = partial(option, group="What to measure")


@verb("Measure the speed of plans.", "model.gguf --contexts 512,2048", "model.gguf --plan one.json --plan another.json")
@click.argument("model")
@skip_option("--plan", "plan_files", multiple=True, metavar="PLAN", help="Plan file to measure, written by `tune` or "
             "`plan -o`; may be repeated.  [default: X.adaskip-plan.json beside MODEL, X.gguf]")  # fmt: skip
@option("--contexts", type=numbers(int, "512,2048"),
        help="Lengths of prompts, in tokens.  [default: 512,2048,8192, as far as the model allows]")  # fmt: skip
@option("--repeats", type=click.IntRange(min=1), default=12, help="Number of rounds.")
@_measured("--decode-tokens", type=click.IntRange(min=1), default=32, help="Tokens to decode after each prompt.")
@_measured("--no-stock", is_flag=True, help="Do not measure stock llama-cpp-python.")
@model_options
@output_option("--json", "as_json", is_flag=True, help="Print JSON with all times instead of tables.")
def bench(
    model: str, plan_files: tuple[str, ...], contexts: tuple[int, ...] | None, repeats: int, decode_tokens: int,
    no_stock: bool, running: Running, as_json: bool
) -> None:  # fmt: skip
    """Measure the time to the first token and per token of MODEL, a GGUF file.

    Stock llama-cpp-python, the whole model ("no plan") and each plan take turns, each round in new processes. Ratios
    compare times of the same round, with a 95% interval. If it contains 1, no difference was found. Run nothing else
    meanwhile. Ctrl-C prints the results so far.

    After `tune`, "no plan" and plans use its settings. Stock keeps its own defaults.

    "no plan" can be faster than stock, which also computes outputs of the prompt that nothing reads. In mode prompt, a
    plan makes the first token come earlier, and does not change the time per token.
    """
    plans = _plans(model, plan_files)
    measured = partial(measure.bench, model, plans, contexts=contexts, n_rounds=repeats, n_decode=decode_tokens)
    with progress_bar("Measuring", still=True, lines=True) as on_progress:
        result = measured(stock=not no_stock, running=running, on_progress=on_progress, tell=warn)
    if as_json:
        click.echo(json_text(result.to_dict()), nl=False)
    else:
        print_report(console(), result)
    if result.ended_by is not None:
        raise result.ended_by


def _plans(model: str, files: Sequence[str]) -> dict[str, SkipPlan | Frontier]:
    """Return the plans of files by their names in tables. Without files, that of the file beside the model, if any."""
    is_unique = len({*map(os.path.basename, files)}) == len(files)
    found = {os.path.basename(path) if is_unique else path: load_plan(path, model=model) for path in files}
    if not files:
        source = find_plan_source(model)
        found = {"tuned": source.file} if source.file is not None else {}
        if not found and source.note:
            warn(source.note)
    plans = {name: each.frontier or each.plan for name, each in found.items()}
    return {name: plan for name, plan in plans.items() if plan and not all(each.is_whole for each in found[name].plans)}


def print_report(out: Console, result: BenchResult) -> None:
    """Print tables, then the model, the machine and the plans."""
    if not out.is_terminal:
        out.width = max(out.width, 100)
    for _, rows in itertools.groupby(result.rows, lambda row: (row.phase, row.context)):
        _print_phase(out, [*rows])
    lines = [*result.configuration.values(), *([result.machine.words] if result.machine is not None else [])]
    if STOCK in result.times.contenders:
        lines += [f"{NO_PLAN}: the whole model, without outputs of the prompt that stock computes but nothing reads."]
        if result.settings.stock_options != result.settings.options:
            gain = f"{NO_PLAN} against {STOCK} is the gain of the tuned settings"
            lines += [f"{STOCK}: its own defaults but for your options. {gain}."]
    for name in result.plans:
        of_contexts: dict[str, list[int]] = {}
        for context, plan in result.plans_of(name).items():
            words = "the whole model"
            if plan is not None:
                words = f"{skipped_words(plan)}; mode {plan.mode}, compensation {plan.compensation}"
            of_contexts.setdefault(words, []).append(context)
        for words, contexts in of_contexts.items():
            where = f" for {' and '.join(f'{n:,}' for n in contexts)} tokens" if len(of_contexts) > 1 else ""
            lines.append(f"{name}{where}: {words}")
    load = "." if result.load_average is None else f"; load average before {result.load_average:.2f}."
    lines.append(
        "Each contender runs in turn, in a new process each round. Every second round reverses the order. "
        f"{result.settings.n_decode} tokens decoded after each prompt{load}"
    )
    out.print("\n".join(lines), style="dim", soft_wrap=True)


def _print_phase(out: Console, rows: Sequence[Row]) -> None:
    references = [name for name in (STOCK, NO_PLAN) if any(name in row.against for row in rows)]
    n_rounds = f"{rows[0].n_rounds} round{'s' if rows[0].n_rounds > 1 else ''}"
    # Not as the table's title, which rich wraps to the width of the table.
    out.print(f"{_TITLES[rows[0].phase]}, prompt of {rows[0].context:,} tokens, {n_rounds}", style="bold")
    against = (Column(f"against {name}\n(95% interval)", no_wrap=True) for name in references)
    shown = table(Column("", no_wrap=True), Column("median\n(quartiles)", justify="right", no_wrap=True), *against)
    for row in rows:
        verdicts = [verdict(row.against[name]) if name in row.against else "" for name in references]
        cells = [words.replace(" (", "\n(").replace(", ", ",\n") for words in verdicts]  # the interval goes below
        high = seconds(row.high_s)
        low = seconds(row.low_s).removesuffix(high[high.index(" ") :])  # the unit, if both have the same
        shown.add_row(row.contender, f"{seconds(row.median_s)}\n({low} to {high})", *cells)
    out.print(shown)
