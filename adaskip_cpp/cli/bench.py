"""``adaskip-cpp bench``: measures the speed of a model with and without plans, against stock llama-cpp-python."""

import os
from collections.abc import Callable, Sequence
from functools import partial

import click

from ..benchmark import measure
from ..files import json_text
from ..measuring.running import Running
from ..model.frontier import Frontier
from ..model.plan import SkipPlan
from ..model.plan_file import load_plan
from ..progress import progress_bar
from .bench_report import print_report
from .lists import numbers
from .planning import find_plan_source
from .terminal import CHOOSING, OUTPUT, console, model_options, option, verb

_measured = partial(option, group="What to measure")


@verb(
    "Measure the speed of plans.",
    example="adaskip-cpp bench model.gguf --contexts 512,2048\n"
    "adaskip-cpp bench model.gguf --plan one.json --plan another.json",
)
@click.argument("model")
@option("--plan", "plan_files", multiple=True, metavar="PLAN", group=CHOOSING, help="Plan file to measure, written by "
        "`tune` or `plan -o`; may be repeated.  [default: X.adaskip-plan.json beside MODEL, X.gguf]")  # fmt: skip
@option("--contexts", type=numbers(int, "512,2048"),
        help="Lengths of prompts, in tokens.  [default: 512,2048,8192, as far as the model allows]")  # fmt: skip
@option("--repeats", type=click.IntRange(min=1), default=12, help="Number of rounds.")
@_measured("--decode-tokens", type=click.IntRange(min=1), default=32, help="Tokens to decode after each prompt.")
@_measured("--no-stock", is_flag=True, help="Do not measure stock llama-cpp-python.")
@model_options
@option("--json", "as_json", group=OUTPUT, is_flag=True, help="Print JSON with all times instead of tables.")
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
    tell = partial(console(stderr=True).print, style="yellow", markup=False, soft_wrap=True)
    with progress_bar("Measuring", still=True, lines=True) as on_progress:
        result = measure.bench(
            model,
            _plans(model, plan_files, tell),
            contexts=contexts,
            n_rounds=repeats,
            n_decode=decode_tokens,
            stock=not no_stock,
            running=running,
            on_progress=on_progress,
            tell=tell,
        )
    if as_json:
        click.echo(json_text(result.to_dict()), nl=False)
    else:
        print_report(console(), result)
    if result.ended_by is not None:
        raise result.ended_by


def _plans(model: str, files: Sequence[str], tell: Callable[[str], object]) -> dict[str, SkipPlan | Frontier]:
    """Return the plans of files by their names in tables. Without files, that of the file beside the model, if any."""
    is_unique = len({*map(os.path.basename, files)}) == len(files)
    found = {os.path.basename(path) if is_unique else path: load_plan(path, model=model) for path in files}
    if not files:
        source = find_plan_source(model)
        found = {"tuned": source.file} if source.file is not None else {}
        if not found and source.note:
            tell(source.note)
    plans = {name: each.frontier or each.plan for name, each in found.items()}
    return {name: plan for name, plan in plans.items() if plan and not all(each.is_whole for each in found[name].plans)}
