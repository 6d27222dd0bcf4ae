"""``adaskip-cpp generate``: answer a prompt, with or without skipping."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from .terminal import console, load_model, model_options, plan_options, read_text

if TYPE_CHECKING:
    from .generation import Timing
    from .plan import SkipPlan

__all__ = ["generate"]


@click.command(
    short_help="Answer a prompt, with or without skipping.",
    epilog="\b\nExample:\n  adaskip-cpp generate model.gguf -f question.txt --profile model.adaskip.json --skip 12",
)
@click.argument("model")
@click.option("-p", "--prompt", help="The prompt.")
@click.option("-f", "--file", metavar="FILE", help="Read the prompt from a file, - for stdin.")
@click.option("--profile", "profile_path", metavar="PROFILE", help="Profile of this model, written by `calibrate`.")
@click.option(
    "--skip", type=click.IntRange(min=0), default=None, help="Sublayers to skip.  [default: 12 with --profile]"
)
@plan_options
@click.option("--max-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Longest answer.")
@click.option("--ctx", type=click.IntRange(min=8), default=8192, show_default=True, help="Context in tokens.")
@click.option("--temp", type=click.FloatRange(min=0), default=0.8, show_default=True, help="0: always the likeliest.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 2), default=None, help="Seed of sampling.  [default: random]")
@click.option(
    "--chat/--raw",
    default=None,
    help="Wrap the prompt in the model's chat template, or continue it as it is.  [default: --chat if there is one]",
)
@model_options
def generate(
    model: str,
    prompt: str | None,
    file: str | None,
    profile_path: str | None,
    skip: int | None,
    compensation: str,
    max_tokens: int,
    ctx: int,
    temp: float,
    seed: int | None,
    chat: bool | None,
    threads: int | None,
    gpu_layers: int,
) -> None:
    """Answer a prompt with MODEL, a GGUF file. The text goes to stdout, the speed to stderr."""
    from .generation import Generation, chat_tokens, has_chat_template
    from .profile import Profile

    if (prompt is None) == (file is None):
        raise click.UsageError("give a prompt either with -p or with -f", click.get_current_context())
    if skip and profile_path is None:
        raise click.UsageError("--skip needs --profile", click.get_current_context())
    text = prompt if prompt is not None else read_text(str(file))
    plan = Profile.load(profile_path).plan(12 if skip is None else skip, compensation) if profile_path else None

    llm = load_model(model, n_ctx=ctx, threads=threads, gpu_layers=gpu_layers)
    llm.set_plan(plan)
    if seed is not None:
        llm.set_seed(seed)
    as_chat = has_chat_template(llm) if chat is None else chat
    # An empty text still has the tokens of the template around it.
    tokens = [] if not text else chat_tokens(llm, text) if as_chat else llm.tokenize(text.encode(), special=True)
    answer = Generation(llm, tokens, max_tokens=max_tokens, temperature=temp)
    for piece in answer:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    if answer.timing is not None:
        console(stderr=True).print(_summary(answer.timing, plan), style="dim")


def _summary(timing: Timing, plan: SkipPlan | None) -> str:
    lines = [
        f"prompt: {timing.n_prompt:,} tokens in {timing.first_token_s:.2f} s, "
        f"{timing.prompt_tokens_per_s:,.0f} tokens/s"
    ]
    if timing.token_s is not None:
        lines.append(
            f"decode: {timing.n_generated - 1:,} tokens in {timing.decode_s:.2f} s, {1 / timing.token_s:,.1f} tokens/s"
        )
    if plan is not None:
        lines.append(
            f"skipped: {plan.n_skip} of {2 * plan.n_layer} sublayers "
            f"({len(plan.attention)} attention, {len(plan.ffn)} FFN)"
        )
    return "\n".join(lines)
