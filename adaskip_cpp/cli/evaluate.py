"""``adaskip-cpp evaluate``: what every plan costs in quality and brings in speed, as a folder of results."""

import os
import shlex
import subprocess
import sys
from functools import partial
from typing import Any

import click

from ..evaluation import measure
from ..evaluation.items import EvaluationOptions
from ..evaluation.results import Results
from ..evaluation.tables import summary
from ..measuring.running import Running
from ..measuring.synthetic import TASKS
from ..model.mode import MODES
from ..planning.compensation import COMPENSATIONS, DEFAULT_COMPENSATION
from ..planning.strategies import STRATEGIES
from ..progress import told_progress
from .lists import names, numbers
from .planning import plan_file_option
from .terminal import CHOOSING, RUNNING, console, json_option, model_options, option, table, verb

_AGAIN = "; may be repeated"
_DEFAULTS = EvaluationOptions()
_choosing, _running = partial(option, group=CHOOSING), partial(option, group=RUNNING)
_text, _question = partial(option, group="Items of text"), partial(option, group="Questions")
_speed = partial(option, group="Speed")


@verb(
    "Measure what skipping costs in quality, at measured speed.",
    example="adaskip-cpp evaluate model.gguf -o results\n"
    "adaskip-cpp evaluate model.gguf --profile model.adaskip.json --skip 6,12 -o results",
)
@click.argument("model")
@option("-o", "--output", required=True, metavar="FOLDER", help="Folder of the results; a second run goes on.")
@option(
    "--max-loss",
    "max_losses",
    type=numbers(float, "0.05,0.1", least=0),
    help="Promises for what `tune` found: nats per token that answers lose at most.  [default: 0.05,0.1]",
)
@option(
    "--profile",
    "profile_path",
    metavar="PROFILE",
    help="Profile of this model, to compare its plans too.  [default: only what `tune` found]",
)
@option(
    "--skip",
    "n_skips",
    type=numbers(int, "6,12,15"),
    help="Sublayers to skip.  [default: a tenth, a fifth and a quarter of them]",
)
@option("--text", "text_files", multiple=True, metavar="FILE", help=f"UTF-8 text{_AGAIN}.  [default: --builtin pages]")
@_choosing(
    "--strategy",
    "strategies",
    multiple=True,
    type=click.Choice([name for name in STRATEGIES if name != "manual"]),
    help=f"A strategy{_AGAIN}.  [default: all]",
)
@plan_file_option
@_choosing("--speedup", "speedups", type=numbers(float, "1.2,1.4"), help="Also: predicted speed-ups.")
@_choosing("--mode", "modes", multiple=True, type=click.Choice(MODES), help=f"A mode{_AGAIN}.  [default: all]")
@_choosing(
    "--compensation",
    "compensations",
    type=names(list(COMPENSATIONS)),
    help=f"Compensations of strategy adaskip: {', '.join(COMPENSATIONS)}.  [default: {DEFAULT_COMPENSATION}]",
)
@_text(
    "--builtin",
    multiple=True,
    type=click.Choice(["pages", "sources"]),
    help=f"Pages of pydoc_data.topics, or sources of Python's standard library, that calibration leaves out{_AGAIN}.",
)
@_text("--texts", "n_texts", type=click.IntRange(min=0), default=_DEFAULTS.n_texts, help="Items of each text kind.")
@_text(
    "--tokens",
    "n_tokens",
    type=click.IntRange(min=4),
    help="Tokens in each.  [default: 512; with promises as many as the timed prompt and --continuation]",
)
@_text(
    "--continuation",
    "n_continuation",
    type=click.IntRange(min=2),
    default=_DEFAULTS.n_continuation,
    help="Tokens at the end of each that are judged, and those decoded in a timed request.",
)
@_question("--synthetic", type=names(TASKS), help=f"Long-context tasks made from the text: {', '.join(TASKS)}.")
@_question("--lengths", type=numbers(int, "1000,2000"), default="1000,2000", help="Tokens of their prompts.")
@_question(
    "--depths",
    type=numbers(float, "0.1,0.5", least=0),
    default="0.1,0.5,0.9",
    help="Where in the prompt the answer lies, 0 to 1.",
)
@_question("--per", "n_per", type=click.IntRange(min=1), default=_DEFAULTS.n_per, help="Questions of each kind.")
@_question("--seed", type=int, default=_DEFAULTS.seed, help="Seed of these tasks.")
@_question("--tasks", multiple=True, metavar="FILE", help=f"A LongBench or L-Eval file (JSONL){_AGAIN}.")
@_question("--tasks-items", type=click.IntRange(min=1), help="Questions of each task.  [default: all]")
@_question(
    "--tasks-prompts",
    metavar="JSON",
    help="LongBench's dataset2prompt.json.  [default: a prompt for multi_news; L-Eval needs none]",
)
@_question("--tasks-lengths", metavar="JSON", help="LongBench's dataset2maxlen.json.  [default: likewise]")
@_question(
    "--chat/--raw",
    default=None,
    help="Wrap questions in the model's chat template, or not.  [default: those of --tasks, if there is one]",
)
@_speed(
    "--rounds", "n_rounds", type=click.IntRange(min=0), default=_DEFAULTS.n_rounds, help="Timings of each; 0: none."
)
@_speed("--speed-context", type=click.IntRange(min=2), help="Prompt to time.  [default: 1024 or what the model allows]")
@_running("--ctx", type=click.IntRange(min=8), help="Context in tokens.  [default: what is needed; with --tasks 8192]")
@model_options
@json_option
def evaluate(model: str, profile_path: str | None, output: str, running: Running, as_json: bool, **values: Any) -> None:
    """Compare plans with the whole MODEL: loss, agreement, continuations and answers, against measured speed.

    What `tune` found is run under each promise, and with --profile every strategy with every budget in every mode.
    Results are kept one by one in FOLDER: after Ctrl-C or a crash the same command goes on. At the end FOLDER has
    report.html, results.json, results.md and the pictures.
    """
    context = click.get_current_context()
    join = subprocess.list2cmdline if sys.platform == "win32" else shlex.join
    command = join(["adaskip-cpp", "evaluate", *context.meta["arguments"]])
    err = console(stderr=True)
    with told_progress("Evaluating", late=True) as on_progress:
        found = measure.evaluate(
            model,
            profile_path,
            output,
            EvaluationOptions(**values),
            running=running,
            command=command,
            on_progress=on_progress,
            tell=partial(err.print, style="yellow", markup=False, soft_wrap=True),
        )
    if as_json:
        click.echo(found.to_json(), nl=False)
    else:
        _print(found, output)
    if found.n_done < found.n_results:
        err.print(f"Interrupted; nothing is lost. The same command goes on:\n  {command}", soft_wrap=True)
        context.exit(130)


def _print(results: Results, output: str) -> None:
    out = console()
    for each in summary(results):
        printed = table("", *each.header[1:], title=each.title, title_style="bold")
        for row in each.rows:
            printed.add_row(*row)
        out.print(printed)
    out.print(f"Written to {os.path.join(output, 'report.html')}, with all else beside it.", soft_wrap=True)
