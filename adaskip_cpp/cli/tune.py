"""``adaskip-cpp tune``: find the fastest settings of a model and its frontier of plans, and write them beside it."""

import os
import time
from functools import partial

import click

from ..errors import DataError
from ..files import check_output, content_hash, json_text
from ..measuring.running import Running
from ..measuring.tasks import read_texts
from ..model.frontier import DEFAULT_LOSS
from ..model.identity import fingerprint, plan_path
from ..model.plan_file import frontier_dict, save_plan
from ..progress import told_progress
from ..tuning import tune as tuning
from ..tuning.memo import Memo
from .terminal import OUTPUT, console, json_option, model_options, option, verb
from .tune_report import minutes, print_frontier


@verb(
    "Find the fastest settings and plans, once for each model.",
    example="adaskip-cpp tune model.gguf\nadaskip-cpp tune model.gguf --data notes.txt --text letters.txt",
)
@click.argument("model")
@option("--context", type=click.IntRange(min=1), default=8192, help="Prompt length, in tokens, to be fast at.")
@option("--answer", "n_answer", type=click.IntRange(min=0), default=128, help="Answer length, in tokens.")
@option("--data", "files", multiple=True, metavar="FILE", help="Text to calibrate on; may be repeated.")
@option("--text", "text_files", multiple=True, metavar="FILE",
        help="Other text, to judge by; may be repeated.  [default: text that calibration leaves out]")  # fmt: skip
@model_options
@option("-o", "--output", group=OUTPUT, metavar="PLAN",
        help="Plan file to write.  [default: beside MODEL, X.adaskip-plan.json for X.gguf]")  # fmt: skip
@option("--fresh", group=OUTPUT, is_flag=True, help="Begin anew, whatever an earlier run that was stopped has found.")
@json_option
def tune(
    model: str,
    context: int,
    n_answer: int,
    files: tuple[str, ...],
    text_files: tuple[str, ...],
    output: str | None,
    fresh: bool,
    running: Running,
    as_json: bool,
) -> None:
    """Find what makes MODEL, a GGUF file, fastest on this machine, and write it to a plan file.

    First it tries settings that change only the speed: flash attention, repacked weights, threads, batch sizes.
    --threads and --flash-attn fix theirs. Then it finds plans of growing speed, which skip more and more sublayers
    while a long prompt is read. It measures how much worse answers become, on text that had no part in finding the
    plans. Some answers continue a prompt, others copy from it. A plan is never used if it loses a pass key, hidden in
    a prompt, that the whole model finds.

    `generate`, `chat`, `serve` and AdaSkipLlama(plan="auto") use the file that lies beside its model. For each prompt
    they take the fastest plan that keeps a promise: the loss grows by at most 0.05 nats per token, and so the
    perplexity by 5%. Their option --max-loss sets another promise.

    An edited prompt shares tokens with the one before. It also measures the loss where these are not read again.

    It reads at most 120,000 tokens. A run that was stopped goes on where it was.
    """
    start = time.monotonic()
    target = output or plan_path(model)
    check_output(target)
    if both := {*map(os.path.realpath, files)} & {*map(os.path.realpath, text_files)}:
        raise DataError(f"{min(both)!r} cannot both teach and judge; give different files to --data and --text")
    data, texts = read_texts(files), read_texts(text_files)
    key = content_hash([fingerprint(model), context, n_answer, data, texts, running.given(), running.gpu_layers])
    unfinished = f"{target.removesuffix('.json')}-unfinished.json"
    if fresh:
        Memo(unfinished).remove()
    memo = Memo(unfinished, key)
    tell = partial(console(stderr=True).print, style="dim", markup=False, soft_wrap=True)
    tell(
        "This measures how fast this machine is: let nothing else run. Ctrl-C is safe: the same command goes on later."
    )
    frontier = tuning.tune(
        model,
        context=context,
        n_answer=n_answer,
        data=data or None,
        texts=texts or None,
        given=running.given(),
        memo=memo,
        on_stage=told_progress,
        tell=tell,
        n_gpu_layers=running.gpu_layers,
    )
    save_plan(target, frontier)
    memo.remove()
    if as_json:
        click.echo(json_text({"path": target, **frontier_dict(frontier)}), nl=False)
        return
    out = console()
    print_frontier(out, frontier)
    out.print(f"\nWritten to {target}. It took {minutes(time.monotonic() - start)}.", soft_wrap=True, markup=False)
    if target == plan_path(model):
        use = f'`generate`, `chat`, `serve` and AdaSkipLlama(plan="auto") use it, with a promise of {DEFAULT_LOSS}.'
    else:
        use = f"Use it with --plan {target}."
    out.print(use, soft_wrap=True, markup=False)
