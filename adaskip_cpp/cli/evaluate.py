"""``adaskip-cpp evaluate``: measures the quality and the speed of plans, and writes a folder of results."""

import os
import shlex
import subprocess
import sys
from functools import partial
from typing import Any

import click

from ..evaluation import measure
from ..evaluation.items import EvaluationOptions
from ..evaluation.tables import summary
from ..measuring.running import Running
from ..measuring.tasks import SYNTHETIC
from ..planning.compensation import COMPENSATIONS, DEFAULT_COMPENSATION
from ..planning.modes import MODES
from ..progress import progress_bar
from .lists import names, numbers
from .planning import CHOOSERS, plan_file_option
from .terminal import console, model_options, option, run_option, skip_option, table, tell, verb, warn

_AGAIN = "; may be repeated"
_DEFAULTS = EvaluationOptions()
_text, _asked = partial(option, group="Items of text"), partial(option, group="Questions")
_speed = partial(option, group="Speed")


@verb(
    "Measure the quality and speed of plans.",
    "model.gguf -o results",
    "model.gguf --profile model.adaskip.json --skip 6,12 -o results",
)
@click.argument("model")
@option("-o", "--output", required=True, metavar="FOLDER", help="Folder for results; a second run continues there.")
@option("--max-loss", "max_losses", type=numbers(float, "0.05,0.1", least=0), help="Promises for the plans of `tune`: "
        "the largest added loss, in nats per token.  [default: 0.05,0.1]")  # fmt: skip
@option("--profile", "profile_path", metavar="PROFILE",
        help="Also compare plans of this profile.  [default: only plans of `tune`]")  # fmt: skip
@option("--skip", "n_skips", type=numbers(int, "6,12,15"), help="Numbers of sublayers to skip, as 6,12,15.  [default: "
        "a tenth, a fifth and a quarter of all]")  # fmt: skip
@option("--text", "text_files", multiple=True, metavar="FILE", help=f"UTF-8 text{_AGAIN}.  [default: --builtin pages]")
@skip_option("--strategy", "strategies", multiple=True,
             type=click.Choice(CHOOSERS), help="How to choose sublayers, see `plan --help`"
             f"{_AGAIN}.  [default: all]")  # fmt: skip
@plan_file_option
@skip_option("--mode", "modes", multiple=True, type=click.Choice(MODES), help=f"A mode{_AGAIN}.  [default: all]")
@skip_option("--compensation", "compensations", type=names(list(COMPENSATIONS)), help="For strategy adaskip: "
             f"{', '.join(COMPENSATIONS)}; see `plan --help`.  [default: {DEFAULT_COMPENSATION}]")  # fmt: skip
@_text("--builtin", multiple=True, type=click.Choice(["pages", "sources"]), help="Pages of Python's documentation, or "
       f"sources of its library, without those of calibration{_AGAIN}.")  # fmt: skip
@_text("--texts", "n_texts", type=click.IntRange(0), default=_DEFAULTS.n_texts, help="Items from each kind of text.")
@_text("--tokens", "n_tokens", type=click.IntRange(min=4), help="Tokens in each item.  [default: 512; for plans of "
       "`tune`, --speed-context plus --continuation]")  # fmt: skip
@_text("--continuation", "n_continuation", type=click.IntRange(min=2), default=_DEFAULTS.n_continuation,
       help="Tokens at the end of each item that are judged. Timed requests decode as many.")  # fmt: skip
@_asked("--synthetic", type=names(SYNTHETIC), help=f"Long-context tasks made from the text: {', '.join(SYNTHETIC)}.")
@_asked("--lengths", type=numbers(int, "1000,2000"), default="1000,2000", help="Lengths of their prompts, in tokens.")
@_asked("--depths", type=numbers(float, "0.1,0.5", least=0), default="0.1,0.5,0.9",
        help="Places of the answer in the prompt: 0 is its beginning, 1 its end.")  # fmt: skip
@_asked("--per", "n_per", type=click.IntRange(min=1), default=_DEFAULTS.n_per, help="Questions per task and place.")
@_asked("--tasks", multiple=True, metavar="FILE", help=f"A LongBench or L-Eval file (JSONL){_AGAIN}. LongBench's "
        "dataset2prompt.json and dataset2maxlen.json are read from its folder.")  # fmt: skip
@_asked("--tasks-items", type=click.IntRange(min=1), help="Questions of each task.  [default: all]")
@_speed("--rounds", "n_rounds", type=click.IntRange(0), default=_DEFAULTS.n_rounds, help="Timings per plan; 0: none.")
@_speed("--speed-context", type=click.IntRange(min=2), help="Tokens of the timed prompt.  [default: 1024, or fewer]")
@run_option("--ctx", type=click.IntRange(min=8), help="Context in tokens.  [default: as needed; 8192 with --tasks]")
@model_options
def evaluate(model: str, profile_path: str | None, output: str, running: Running, **values: Any) -> None:
    """Compare plans of MODEL, a GGUF file, with the whole model: the added loss, the agreement, answers and speed.

    It runs the plans of `tune`, one for each promise. With --profile, it also runs every strategy with every number of
    skipped sublayers in every mode. FOLDER keeps each result: after Ctrl-C or a crash, the same command continues. At
    the end FOLDER has report.html, results.json and a picture.
    """
    context = click.get_current_context()
    join = subprocess.list2cmdline if sys.platform == "win32" else shlex.join
    command = join(["adaskip-cpp", "evaluate", *context.meta["arguments"]])
    options = EvaluationOptions(**values)
    with progress_bar("Evaluating", lines=True) as on_progress:
        found = measure.evaluate(
            model, profile_path, output, options, running=running, command=command, on_progress=on_progress, tell=warn
        )
    out = console()
    for each in summary(found):
        printed = table("", *each.header[1:], title=each.title, title_style="bold")
        for row in each.rows:
            printed.add_row(*row)
        out.print(printed)
    out.print(f"Written to {os.path.join(output, 'report.html')}; the other files lie beside it.", soft_wrap=True)
    if found.n_done < found.n_results:
        tell(f"Interrupted. All results are kept; the same command continues:\n  {command}", style="")
        context.exit(130)
