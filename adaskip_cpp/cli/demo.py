"""``adaskip-cpp demo``: the whole idea on a small model, in a terminal, in under three minutes."""

from __future__ import annotations

import json
import statistics
import time
from typing import TYPE_CHECKING

import click

from ..planning.request import PlanRequest
from ..planning.strategies import make_plan
from .planning import plan_options
from .report import layer_list, megabytes
from .terminal import OUTPUT, console, json_option, model_options, option, recorder, save_svg, verb

if TYPE_CHECKING:
    from rich.console import Console

    from ..demo import DemoResult
    from ..model.plan import SkipPlan
    from ..planning.profile import Profile

__all__ = ["demo"]


@verb("Show the whole idea on a small model.", example="adaskip-cpp demo --skip 6")
@option("--model", metavar="MODEL", help="Another GGUF file with a chat template.  [default: packaged SmolLM2-135M]")
@plan_options
@model_options
@option("--svg", group=OUTPUT, type=click.Path(dir_okay=False), help="Also save what is shown as a picture.")
@json_option
def demo(
    model: str | None,
    request: PlanRequest | None,
    threads: int | None,
    gpu_layers: int,
    svg: str | None,
    as_json: bool,
) -> None:
    """Let a small model learn which of its sublayers matter least, and answer a long prompt without them.

    Calibrates on pages of Python's language reference, then answers a question about another page, with and without the
    plan in turn.
    """
    from ..demo import packaged_model, run

    chosen = request or PlanRequest()
    if chosen.speedup is not None:
        raise click.UsageError("the demo times no sublayers; give --skip instead", click.get_current_context())
    out, err = console(), console(stderr=True)
    start = time.monotonic()
    path = model or packaged_model()

    def on_plan(profile: Profile, plan: SkipPlan) -> None:
        if not as_json:
            _print_plan(out, profile, plan)

    with err.status("Loading the model") as status:

        def on_stage(text: str) -> None:
            if err.is_terminal:
                status.update(text)
            else:
                err.print(text, style="dim")

        result = run(
            path,
            choose=lambda profile: make_plan(profile, chosen),
            threads=threads,
            gpu_layers=gpu_layers,
            on_stage=on_stage,
            on_plan=on_plan,
        )
    if as_json:
        click.echo(json.dumps({"model": path, **result.to_dict()}, indent=1))
    else:
        _print_result(out, result, time.monotonic() - start)
    if svg is not None:
        picture = recorder()
        _print_plan(picture, result.profile, result.plan)
        _print_result(picture, result, time.monotonic() - start)
        save_svg(picture, svg, "adaskip-cpp demo")


def _print_plan(out: Console, profile: Profile, plan: SkipPlan) -> None:
    from .plan import print_plan

    out.print(
        f"[bold]Learned[/] from {profile.n_tokens:,} tokens in {profile.n_requests} requests how much each of the "
        f"{2 * profile.n_layer} sublayers changes its input.\n"
    )
    print_plan(out, profile, plan)
    out.print()


def _print_result(out: Console, result: DemoResult, elapsed_s: float) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from ..demo import N_ANSWER, N_PROMPT

    full, skipped = result.full, result.skipped
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in ("full model", f"{result.plan.prefill.n_skip} skipped", "ratio"):
        table.add_column(name, justify="right")
    first = statistics.median(full.first_token_s), statistics.median(skipped.first_token_s)
    table.add_row(
        f"first token, {result.n_prompt:,}-token prompt",
        f"{first[0]:.2f} s",
        f"{first[1]:.2f} s",
        f"[bold]{first[0] / first[1]:.2f} x as fast[/]",
    )
    if full.token_s and skipped.token_s:
        each = statistics.median(full.token_s), statistics.median(skipped.token_s)
        table.add_row(
            "each token after it",
            f"{each[0] * 1e3:.1f} ms",
            f"{each[1] * 1e3:.1f} ms",
            f"[bold]{each[0] / each[1]:.2f} x as fast[/]",
        )
    if full.kv_bytes:
        saved = 1 - skipped.kv_bytes / full.kv_bytes
        table.add_row(
            f"KV memory for {N_PROMPT + N_ANSWER:,} tokens",
            megabytes(full.kv_bytes),
            megabytes(skipped.kv_bytes),
            f"[bold]{saved:.0%} saved[/]" if saved > 0 else "none saved",
        )
    table.add_row(
        f"loss on {result.n_loss:,} unseen tokens",
        f"{full.loss:.3f} nats",
        f"{skipped.loss:.3f} nats",
        f"{skipped.loss - full.loss:+.3f} nats",
    )
    out.print(table)
    if result.plan.online is not None:
        added = skipped.online_ffn
        out.print(
            f"The answer added {len(added)} FFN{'' if len(added) == 1 else 's'} online"
            + (f": layers {layer_list(added)}." if added else ".")
        )

    answers = Table(box=SIMPLE_HEAD, pad_edge=False, expand=True)
    answers.add_column("answer of the full model", ratio=1)
    answers.add_column(f"answer with {result.plan.prefill.n_skip} sublayers skipped", ratio=1)
    # Without its line breaks: a list of short items would fill the screen.
    answers.add_row(*(Text(" ".join(side.answer.split()) or "(none)") for side in (full, skipped)))
    out.print(answers)
    out.print(
        f"Times are {_runs(len(full.first_token_s))} on {result.n_threads} CPU threads; "
        f"answers take the likeliest token, {N_ANSWER} at most. The demo took {elapsed_s:.0f} s.",
        style="dim",
    )
    if (fewer := result.plan.prefill.n_skip // 2) > 0:
        out.print(
            f"Skipping fewer costs less quality and saves less time: adaskip-cpp demo --skip {fewer}", style="dim"
        )


def _runs(n: int) -> str:
    return f"medians of {n} runs each, in turn," if n > 1 else "of one run each"
