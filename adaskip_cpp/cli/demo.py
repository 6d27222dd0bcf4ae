"""``adaskip-cpp demo``: the whole idea on a small model, in a terminal, in under three minutes."""

import json
import time
from functools import partial

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..demo import N_ANSWER, N_PROMPT, DemoResult, packaged_model, run
from ..files import check_output
from ..model.plan import SkipPlan
from ..planning.profile import Profile
from ..planning.request import PlanRequest
from .plan import print_plan
from .planning import plan_options
from .report import layer_list, megabytes, n_skipped
from .terminal import OUTPUT, console, json_option, model_options, open_quietly, option, save_svg, verb


@verb("Show the whole idea on a small model.", example="adaskip-cpp demo --skip 6")
@option("--model", metavar="MODEL", help="Another GGUF file with a chat template.  [default: packaged SmolLM2-135M]")
@plan_options
@model_options
@option("--svg", group=OUTPUT, metavar="FILE", help="Also save what is shown as a picture.")
@json_option
def demo(
    model: str | None, request: PlanRequest | None, threads: int | None, gpu_layers: int, svg: str | None, as_json: bool
) -> None:
    """Let a small model learn which of its sublayers matter least, and answer a long prompt without them.

    Calibrates on text that every Python carries, then answers a question about another page, with and without the
    plan in turn.
    """
    chosen = request or PlanRequest(mode="e2e")
    if chosen.speedup is not None:
        raise click.UsageError("the demo times no sublayers; give --skip instead")
    if svg is not None:
        check_output(svg, "--svg")
    out, err = console(), console(stderr=True)
    start = time.monotonic()
    path = model or packaged_model()

    with err.status("Loading the model") as status:
        result = run(
            partial(open_quietly, path, threads=threads, gpu_layers=gpu_layers),
            chosen,
            on_stage=status.update if err.is_terminal else lambda text: err.print(text, style="dim"),
            on_plan=lambda profile, plan: None if as_json else _print_plan(out, profile, plan),
        )
    elapsed_s = time.monotonic() - start
    if as_json:
        click.echo(json.dumps({"model": path, **result.to_dict()}, indent=1))
    else:
        _print_result(out, result, elapsed_s)
    if svg is not None:
        with save_svg(svg, "adaskip-cpp demo") as picture:
            _print_plan(picture, result.profile, result.plan)
            _print_result(picture, result, elapsed_s)


def _print_plan(out: Console, profile: Profile, plan: SkipPlan) -> None:
    out.print(
        f"[bold]Learned[/] from {profile.n_tokens:,} tokens in {profile.n_requests} requests how much each of the "
        f"{2 * profile.n_layer} sublayers changes its input.\n"
    )
    print_plan(out, plan, profile.similarity)
    out.print()


def _print_result(out: Console, result: DemoResult, elapsed_s: float) -> None:
    full, skipped = result.full, result.skipped
    n_skip, where = n_skipped(result.plan)
    table = Table("", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("full model", f"{n_skip} skipped{where}", "ratio"):
        table.add_column(name, justify="right")

    times = [(f"first token, {result.n_prompt:,}-token prompt", full.first_token_s, skipped.first_token_s, 1.0, "s", 2)]
    if full.token_s and skipped.token_s:
        times.append(("each token after it", full.token_s, skipped.token_s, 1e3, "ms", 1))
    for name, whole, less, factor, unit, digits in times:
        shown = (f"{seconds * factor:.{digits}f} {unit}" for seconds in (whole, less))
        table.add_row(name, *shown, f"[bold]{whole / less:.2f} x as fast[/]")
    if full.kv_bytes:
        saved = 1 - skipped.kv_bytes / full.kv_bytes
        kept = megabytes(full.kv_bytes), megabytes(skipped.kv_bytes)
        name = f"KV memory for {N_PROMPT + N_ANSWER:,} tokens"
        table.add_row(name, *kept, f"[bold]{saved:.0%} saved[/]" if saved > 0 else "none saved")
    losses = f"{full.loss:.3f} nats", f"{skipped.loss:.3f} nats", f"{skipped.loss - full.loss:+.3f} nats"
    table.add_row(f"loss on {result.n_loss:,} unseen tokens", *losses)
    out.print(table)
    if result.plan.online is not None:
        added = skipped.online_ffn
        which = f": layers {layer_list(added)}" if added else ""
        out.print(f"The answer added {len(added)} FFN{'' if len(added) == 1 else 's'} online{which}.")

    answers = Table(box=SIMPLE_HEAD, pad_edge=False, expand=True)
    answers.add_column("answer of the full model", ratio=1)
    answers.add_column(f"answer with {n_skip} sublayers skipped{where}", ratio=1)
    # Without its line breaks: a list of short items would fill the screen.
    answers.add_row(*(Text(" ".join(side.answer.split()) or "(none)") for side in (full, skipped)))
    out.print(answers)
    n, n_threads = len(full.timings), result.n_threads
    out.print(
        f"Times are {f'medians of {n} runs each, in turn,' if n > 1 else 'of one run each'} on {n_threads} CPU "
        f"thread{'s' if n_threads > 1 else ''}; answers take the likeliest token, {N_ANSWER} at most. "
        f"The demo took {elapsed_s:.0f} s.",
        style="dim",
    )
    if n_skip >= 2:
        mode = " --mode decode" if where else ""
        fewer = f"Skipping fewer costs less quality and saves less time: adaskip-cpp demo{mode} --skip {n_skip // 2}"
        out.print(fewer, style="dim")
