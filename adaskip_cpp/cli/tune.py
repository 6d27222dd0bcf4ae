"""``adaskip-cpp tune``: finds the fastest settings of a model, and its plans, and writes them to a file beside it."""

import os
import time
from functools import partial
from importlib import metadata

import click

from ..engine.settings import devices
from ..errors import DataError
from ..files import content_hash
from ..measuring.memo import Memo
from ..measuring.running import Running
from ..measuring.tasks import read_texts
from ..model.frontier import DEFAULT_LOSS
from ..model.identity import fingerprint, plan_path
from ..model.plan_file import save_plan
from ..model.stored import check_output
from ..progress import progress_bar
from ..tuning import tune as tuning
from ..tuning.hold_out import unseen_texts
from .terminal import console, model_options_with, option, output_option, tell, verb
from .tune_report import minutes, print_frontier


@verb("Find the fastest settings and plans.", "model.gguf", "model.gguf --data notes.txt --text letters.txt")
@click.argument("model")
@option("--context", type=click.IntRange(min=1), default=8192, help="Usual length of your prompts, in tokens.")
@option("--answer", "n_answer", type=click.IntRange(min=0), default=128, help="Usual length of answers, in tokens.")
@option("--data", "files", multiple=True, metavar="FILE", help="UTF-8 text to calibrate on, - for stdin; may be "
        "repeated.  [default: documentation and code of Python and of packages]")  # fmt: skip
@option("--text", "text_files", multiple=True, metavar="FILE", help="Other UTF-8 text, to judge answers; may be "
        "repeated.  [default: a story, a lecture, descriptions and code of packages]")  # fmt: skip
@model_options_with("the fastest number", "the fastest")
@output_option("-o", "--output", metavar="PLAN",
               help="Plan file to write.  [default: X.adaskip-plan.json beside MODEL, X.gguf]")  # fmt: skip
def tune(
    model: str, context: int, n_answer: int, files: tuple[str, ...], text_files: tuple[str, ...], output: str | None,
    running: Running
) -> None:  # fmt: skip
    """Find the settings and plans that make MODEL, a GGUF file, fastest on this machine. Write them to a plan file.

    First it tries settings that change only speed and rounding: flash attention, other layouts of weights, threads,
    batch sizes. --threads and --flash-attn fix theirs. Then it finds plans of growing speed, which skip sublayers while
    a long prompt is read. It measures how much worse answers become, on text that was not used to find the plans. Some
    answers continue a prompt, others copy from it. A plan is rejected if it loses a pass key: a number or a name hidden
    in a prompt that the whole model finds.

    `generate`, `chat`, `serve` and AdaSkipLlama(plan="auto") use the file that lies beside its model. For each prompt
    they take the fastest plan that keeps a promise. The default promise is a loss of at most 0.05 nats per token, which
    is 5% more perplexity, on the texts of `tune`. Other texts can lose more. --max-loss sets another promise.

    An edited prompt shares tokens with the one before. `tune` also measures the loss if these are not read again.

    It reads at most 120,000 tokens, besides timing sublayers and the result. If it was stopped, the same command
    continues.
    """
    start = time.monotonic()
    target = output or plan_path(model)
    check_output(target, model, *files, *text_files)
    if both := {*map(os.path.realpath, files)} & {*map(os.path.realpath, text_files)}:
        raise DataError(f"{min(both)!r} is given to --data and --text; give each a file of its own")
    data, texts = read_texts(files), read_texts(text_files)
    # Times are of this machine and release, and plans are judged on texts of what is installed.
    here = (*devices(), metadata.version("adaskip-cpp"), metadata.version("llama-cpp-python"))
    judged = texts or unseen_texts()
    key = content_hash([fingerprint(model), context, n_answer, here, data, judged, running.given(), running.gpu_layers])
    memo = Memo(f"{target.removesuffix('.json')}-unfinished.json", key)
    tell("This measures the speed of this machine, so run nothing else. After Ctrl-C, the same command continues.")
    frontier = tuning.tune(
        model,
        context=context,
        n_answer=n_answer,
        data=data or None,
        texts=texts or None,
        given=running.given(),
        memo=memo,
        on_stage=partial(progress_bar, lines=True),
        tell=tell,
        n_gpu_layers=running.gpu_layers,
    )
    save_plan(target, frontier)
    memo.remove()
    out = console()
    print_frontier(out, frontier)
    out.print(f"\nWritten to {target}. It took {minutes(time.monotonic() - start)}.", soft_wrap=True)
    if target == plan_path(model):
        use = f'`generate`, `chat`, `serve` and AdaSkipLlama(plan="auto") use it, with a promise of {DEFAULT_LOSS}.'
    else:
        use = f"Use it with --plan {target}."
    out.print(use, soft_wrap=True)
