"""``adaskip-cpp demo``: calibrates a small model, and compares plans with the whole model, in under three minutes."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import click
from rich.console import Console
from rich.table import Column
from rich.text import Text

from ..demo import N_ANSWER, PAPERS, SPEEDUP, WHOLE, DemoResult, Side, packaged_model, run
from ..files import check_output, json_text
from ..measuring.running import Running, open_quietly
from ..planning.profile import Profile
from ..planning.request import PlanRequest
from .plan import print_plan
from .planning import plan_options
from .terminal import OUTPUT, console, json_option, model_options, option, save_svg, table, verb


@verb("Show how skipping works, on a small model.", example="adaskip-cpp demo --speedup 1.3")
@option("--model", metavar="MODEL", help="Another GGUF file with a chat template.  [default: packaged SmolLM2-135M]")
@plan_options
@model_options
@option("--svg", group=OUTPUT, metavar="FILE", help="Also save the output as a picture, in SVG format.")
@json_option
def demo(model: str | None, request: PlanRequest | None, running: Running, svg: str | None, as_json: bool) -> None:
    """Show on a small model how much faster a long prompt is read with a plan, and how much worse the answers are.

    It calibrates the model on text from Python's own library. Then it compares the whole model, mode prompt, and the
    paper's mode e2e at the same predicted speed. Each answers a question about a page that calibration did not read.
    Each also predicts the text that follows other prompts, and looks for pass keys. Its default is --speedup 1.4.
    """
    chosen = request or PlanRequest()
    if chosen.n_skip is None and chosen.speedup is None and chosen.strategy != "manual":
        chosen = replace(chosen, speedup=SPEEDUP)
    if svg is not None:
        check_output(svg, "--svg")
    out, err = console(), console(stderr=True)
    start = time.monotonic()
    path = model or packaged_model()

    with err.status("Loading the model") as status:
        result = run(
            partial(open_quietly, path, running=running),
            chosen,
            on_stage=status.update if err.is_terminal else lambda text: err.print(text, style="dim"),
            on_plans=lambda profile, sides: None if as_json else _print_plans(out, profile, sides),
        )
    elapsed_s = time.monotonic() - start
    if as_json:
        click.echo(json_text({"model": path, **result.to_dict()}), nl=False)
    else:
        _print_result(out, result, elapsed_s)
    if svg is not None:
        with save_svg(svg, "adaskip-cpp demo") as picture:
            _print_plans(picture, result.profile, result.sides)
            _print_result(picture, result, elapsed_s)


def _print_plans(out: Console, profile: Profile, sides: Mapping[str, Side]) -> None:
    out.print(
        f"[bold]Measured[/] on {profile.n_tokens:,} tokens in {profile.n_requests} requests how much each of the "
        f"{2 * profile.n_layer} sublayers changes its input.\n"
    )
    chosen = next(side.plan for side in sides.values() if side.plan is not None)
    print_plan(out, chosen, profile.similarity)
    if PAPERS in sides:
        papers = sides[PAPERS]
        assert papers.plan is not None
        out.print(
            f"\nFor the same predicted speed, {PAPERS} e2e skips {papers.plan.prefill.n_skip} sublayers for all tokens "
            "of prompt and answer."
        )
    out.print()


def _print_result(out: Console, result: DemoResult, elapsed_s: float) -> None:
    sides, whole = result.sides.values(), result.sides[WHOLE]
    figures = table("", *result.sides)

    def row(name: str, cell: Callable[[Side], str], against: Callable[[Side], str] | None = None) -> None:
        cells = (
            cell(side) + ("" if side is whole or against is None else f"\n[bold]{against(side)}[/]") for side in sides
        )
        figures.add_row(name, *cells)

    row(
        f"first token, {result.n_prompt:,}-token prompt",
        lambda side: f"{side.first_token_s:.2f} s",
        lambda side: f"{whole.first_token_s / side.first_token_s:.2f} x as fast",
    )
    row("each token after it", lambda side: "-" if side.token_s is None else f"{side.token_s * 1e3:.1f} ms")
    row(
        f"loss on {result.n_judged:,} tokens\nafter new prompts",
        lambda side: f"{side.loss:.3f} nats",
        lambda side: f"{side.loss - whole.loss:+.3f} nats",
    )
    row("pass keys found", lambda side: f"{side.n_keys} of {result.n_keys}")
    out.print(figures)

    answers = table(*(Column(f"answer, {name}", ratio=1) for name in result.sides), expand=True)
    # Line breaks are removed, because a list of short items would fill the screen.
    answers.add_row(*(Text(" ".join(side.answer.split()) or "(none)") for side in sides))
    out.print(answers)
    n, n_threads = len(whole.timings), result.n_threads
    out.print(
        f"Times are {f'medians of {n} runs each, in turn,' if n > 1 else 'of one run each, in turn,'} on {n_threads} "
        f"CPU thread{'s' if n_threads > 1 else ''}. Answers take the likeliest tokens, at most {N_ANSWER}. "
        f"The demo took {elapsed_s:.0f} s.",
        style="dim",
    )
    out.print("Next, with your own model: adaskip-cpp tune model.gguf", style="dim")
