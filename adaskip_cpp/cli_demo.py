"""``adaskip-cpp demo``: the whole idea on a small model, in a terminal, in under three minutes."""

from __future__ import annotations

import json
import statistics
import time
from typing import TYPE_CHECKING

import click

from .terminal import console, json_option, model_options, plan_options, recorder, save_svg

if TYPE_CHECKING:
    from rich.console import Console

    from .demo import DemoResult
    from .plan import SkipPlan
    from .profile import Profile

__all__ = ["demo"]


@click.command(short_help="Show the whole idea on a small model.", epilog="\b\nExample:\n  adaskip-cpp demo --skip 6")
@click.option(
    "--model", metavar="MODEL", help="Another GGUF file with a chat template.  [default: packaged SmolLM2-135M]"
)
@click.option("--skip", type=click.IntRange(min=1), default=12, show_default=True, help="Sublayers to skip.")
@plan_options
@model_options
@click.option("--svg", type=click.Path(dir_okay=False), help="Also save what is shown as a picture.")
@json_option
def demo(
    model: str | None,
    skip: int,
    compensation: str,
    threads: int | None,
    gpu_layers: int,
    svg: str | None,
    as_json: bool,
) -> None:
    """Let a small model learn which of its sublayers matter least, and answer a long prompt without them.

    Calibrates on pages of Python's language reference, then answers a question about another page, with and without the
    plan in turn.
    """
    from .demo import packaged_model, run

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
            n_skip=skip,
            compensation=compensation,
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
    from .heatmap import print_heatmap

    out.print(
        f"[bold]Learned[/] from {profile.n_tokens:,} tokens in {profile.n_requests} requests how much each of the "
        f"{2 * profile.n_layer} sublayers changes its input, and picked the {plan.n_skip} that change it least:\n"
    )
    print_heatmap(out, profile.similarity, plan.prefill.skip)
    out.print(f"\nskipped attention: layers {_layers(plan.attention)}\nskipped FFN: layers {_layers(plan.ffn)}")
    out.print(f"compensation: {plan.compensation}\n")


def _print_result(out: Console, result: DemoResult, elapsed_s: float) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from .demo import N_ANSWER

    full, skipped = result.full, result.skipped
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in ("full model", f"{result.plan.n_skip} skipped", "ratio"):
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
    table.add_row(
        f"loss on {result.n_loss:,} unseen tokens",
        f"{full.loss:.3f} nats",
        f"{skipped.loss:.3f} nats",
        f"{skipped.loss - full.loss:+.3f} nats",
    )
    out.print(table)

    answers = Table(box=SIMPLE_HEAD, pad_edge=False, expand=True)
    answers.add_column("answer of the full model", ratio=1)
    answers.add_column(f"answer with {result.plan.n_skip} sublayers skipped", ratio=1)
    answers.add_row(Text(full.answer or "(none)"), Text(skipped.answer or "(none)"))
    out.print(answers)
    out.print(
        f"Times are {_runs(len(full.first_token_s))} on {result.n_threads} CPU threads; "
        f"answers take the likeliest token, {N_ANSWER} at most. The demo took {elapsed_s:.0f} s.",
        style="dim",
    )
    if (fewer := result.plan.n_skip // 2) > 0:
        out.print(
            f"Skipping fewer costs less quality and saves less time: adaskip-cpp demo --skip {fewer}", style="dim"
        )


def _layers(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers)) if layers else "none"


def _runs(n: int) -> str:
    return f"medians of {n} runs each, in turn," if n > 1 else "of one run each"
