"""``adaskip-cpp evaluate``: what every plan costs in quality and brings in speed, as a folder of results."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..model.plan import MODES
from ..planning.compensation import COMPENSATIONS, DEFAULT_COMPENSATION
from ..planning.strategies import STRATEGIES
from ..progress import told_progress
from .terminal import console, json_option, load_model, model_options

if TYPE_CHECKING:
    from ..engine.llama import AdaSkipLlama

__all__ = ["evaluate"]

_T = TypeVar("_T")

_SYNTHETIC = ("passkey", "multikey", "classify", "copy")
"""As in :data:`adaskip_cpp.measuring.synthetic.TASKS`, which is not imported for the help alone."""


class _Command(click.Command):
    """Keeps the arguments, so that the report can say how to repeat it."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        context.meta["adaskip_cpp.arguments"] = list(args)
        return super().parse_args(context, args)


def _listed(convert: Callable[[str], _T], example: str) -> Callable[..., tuple[_T, ...]]:
    """Read a list with commas."""

    def read(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[_T, ...]:
        try:
            return tuple(dict.fromkeys(convert(part.strip()) for part in value.split(","))) if value else ()
        except ValueError:
            raise click.BadParameter(f"{value!r} is not a list such as {example}") from None

    return read


def _name(allowed: Sequence[str]) -> Callable[[str], str]:
    def convert(name: str) -> str:
        if name not in allowed:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(allowed)}")
        return name

    return convert


@click.command(
    cls=_Command,
    short_help="Measure what skipping costs in quality, at measured speed.",
    epilog="\b\nExample:\n  adaskip-cpp evaluate model.gguf --profile model.adaskip.json --skip 6,12 -o results",
)
@click.argument("model")
@click.option("--profile", "profile_path", required=True, metavar="PROFILE", help="Profile of this model.")
@click.option("-o", "--output", required=True, metavar="FOLDER", help="Folder of the results; a second run goes on.")
@click.option(
    "--strategy",
    "strategies",
    multiple=True,
    type=click.Choice([name for name in STRATEGIES if name != "manual"]),
    help="A strategy; may be repeated.  [default: all]",
)
@click.option(
    "--skip",
    callback=_listed(int, "6,12,15"),
    metavar="N,...",
    help="Sublayers to skip.  [default: a tenth, a fifth and a quarter of them]",
)
@click.option(
    "--speedup", "speedups", callback=_listed(float, "1.2,1.4"), metavar="X,...", help="Also: predicted speed-ups."
)
@click.option(
    "--mode", "modes", multiple=True, type=click.Choice(MODES), help="A mode; may be repeated.  [default: all]"
)
@click.option(
    "--compensation",
    "compensations",
    callback=_listed(_name(list(COMPENSATIONS)), "affine,paper"),
    metavar="NAME,...",
    help=f"Compensations of strategy adaskip: {', '.join(COMPENSATIONS)}.  [default: {DEFAULT_COMPENSATION}]",
)
@click.option(
    "--text",
    "text_files",
    multiple=True,
    metavar="FILE",
    help="UTF-8 text; may be repeated.  [default: --builtin pages]",
)
@click.option(
    "--builtin",
    multiple=True,
    type=click.Choice(["pages", "sources"]),
    help="Pages of pydoc_data.topics that calibration leaves out, or sources of Python's standard library, which are "
    "text of another kind; may be repeated.",
)
@click.option(
    "--texts", "n_texts", type=click.IntRange(min=0), default=8, show_default=True, help="Items of each text kind."
)
@click.option(
    "--tokens", "n_tokens", type=click.IntRange(min=4), default=512, show_default=True, help="Tokens in each."
)
@click.option(
    "--continuation",
    "n_continuation",
    type=click.IntRange(min=2),
    default=64,
    show_default=True,
    help="Tokens at the end of each that are decoded, and in a timed request.",
)
@click.option("--longbench", multiple=True, metavar="FILE", help="A LongBench file (JSONL); may be repeated.")
@click.option("--longbench-prompts", metavar="JSON", help="LongBench's dataset2prompt.json.")
@click.option("--longbench-lengths", metavar="JSON", help="LongBench's dataset2maxlen.json.")
@click.option("--longbench-items", type=click.IntRange(min=1), help="Take the first so many of each dataset.")
@click.option(
    "--synthetic",
    callback=_listed(_name(_SYNTHETIC), "passkey,copy"),
    metavar="TASK,...",
    help=f"Long-context tasks made from the text: {', '.join(_SYNTHETIC)}.",
)
@click.option(
    "--lengths",
    callback=_listed(int, "1000,2000"),
    default="1000,2000",
    show_default=True,
    metavar="N,...",
    help="Tokens of their prompts.",
)
@click.option(
    "--depths",
    callback=_listed(float, "0.1,0.5"),
    default="0.1,0.5,0.9",
    show_default=True,
    metavar="X,...",
    help="Where in the prompt the answer lies, 0 to 1.",
)
@click.option(
    "--per", "n_per", type=click.IntRange(min=1), default=4, show_default=True, help="Questions of each kind."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of these tasks.")
@click.option(
    "--chat/--raw",
    default=None,
    help="Wrap questions in the model's chat template, or not.  [default: LongBench's if there is one]",
)
@click.option("--ctx", type=click.IntRange(min=8), help="Context in tokens.  [default: what is needed; LongBench 8192]")
@click.option(
    "--speed-context", type=click.IntRange(min=2), help="Prompt to time.  [default: 1024, or what the model allows]"
)
@click.option(
    "--rounds",
    "n_rounds",
    type=click.IntRange(min=0),
    default=5,
    show_default=True,
    help="Timings of each; 0 for none.",
)
@model_options
@json_option
def evaluate(
    model: str, profile_path: str, output: str, threads: int | None, gpu_layers: int, as_json: bool, **values: Any
) -> None:
    """Compare plans with the whole MODEL: loss, agreement, continuations and answers, against measured speed.

    Every strategy is run with every budget in every mode. Results are kept one by one in FOLDER: after Ctrl-C or a
    crash the same command goes on. At the end FOLDER has report.html, results.json, results.md and the pictures.
    """
    from ..evaluation.evaluate import run
    from ..evaluation.items import EvaluationOptions, prepare
    from ..evaluation.output import configuration, write_results
    from ..evaluation.store import Store
    from ..measuring.cores import BUSY, load_average
    from ..planning.profile import Profile

    context = click.get_current_context()
    options = EvaluationOptions(**values)
    if options.longbench and not (options.longbench_prompts and options.longbench_lengths):
        raise click.UsageError("--longbench needs --longbench-prompts and --longbench-lengths", context)
    profile = Profile.load(profile_path)
    load = load_average()

    def open_model(n_ctx: int, logits_all: bool) -> AdaSkipLlama:
        return load_model(model, n_ctx=n_ctx, threads=threads, gpu_layers=gpu_layers, logits_all=logits_all)

    work, notes, words, settings = prepare(model, profile, options, open_model)
    command = shlex.join(["adaskip-cpp", "evaluate", *context.meta["adaskip_cpp.arguments"]])
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    err = console(stderr=True)
    interrupted = False
    with Store(output, settings, {"started": started, "command": command, "load_average": load}) as store:
        load = store.facts.get("load_average", load)
        if work.speed_prompt and load > BUSY:
            notes.append(
                f"The load average was {load:.1f} at the beginning: unless that came from what you ran before, other "
                "programs disturb the speeds."
            )
        for note in notes:
            err.print(note, style="yellow", soft_wrap=True)
        if store.set_aside is not None:
            err.print(f"The settings have changed; earlier results are kept in {store.set_aside}", soft_wrap=True)
        n_all, n_done = len(list(work.results())), sum(key in store.records for key in work.results())
        if n_done:
            err.print(f"{n_done} of {n_all} results are there already.")
        begun = str(store.facts.get("started", "?"))[:16].replace("T", " ") + " UTC"
        about = {
            "model": os.path.basename(model).removesuffix(".gguf"),
            "title": f"{os.path.basename(model)}: what skipping costs and brings",
            "about": f"{len(work.contenders) - 1} plans against the full model, begun {begun}.",
            "notes": notes,
            "configuration": configuration(model, profile, work, settings, words),
            "command": command,
            "settings": settings,
        }
        try:
            with told_progress("Evaluating") as on_progress:
                run(work, store, open_model, on_progress)
        except KeyboardInterrupt:
            interrupted = True
        results = write_results(work, store, about, profile)
    if as_json:
        from ..evaluation.results import to_json

        click.echo(to_json(results), nl=False)
    else:
        _print(results, output)
    if interrupted:
        err.print(f"Interrupted; nothing is lost. The same command goes on:\n  {command}", soft_wrap=True)
        context.exit(130)


def _print(results: Mapping[str, Any], output: str) -> None:
    """The headline, a short table for each mode, and where the rest is."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from ..evaluation.rows import headline
    from ..evaluation.tables import summary

    out = console()
    for title, header, rows in summary(results):
        table = Table(box=SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*row)
        out.print(table)
    for sentence in headline(results):
        out.print(sentence)
    out.print(f"\nWritten to {os.path.join(output, 'report.html')}, with all else beside it.", soft_wrap=True)
