"""``adaskip-cpp demo``: calibrates a small model, and compares plans with the whole model, in under three minutes."""

import time
from collections.abc import Callable, Mapping
from functools import partial

from rich.console import Console
from rich.table import Column
from rich.text import Text

from ..demo import N_ANSWER, PAPERS, PROMPT, WHOLE, DemoResult, Side, packaged_model, run
from ..measuring.running import Running, open_quietly
from ..planning.profile import Profile
from .plan import print_plan
from .terminal import console, model_options, option, table, tell, verb


@verb("Show how skipping works, on a small model.", "")
@option("--model", metavar="MODEL", help="Another GGUF file with a chat template.  [default: packaged SmolLM2-135M]")
@model_options
def demo(model: str | None, running: Running) -> None:
    """Show on a small model how much faster a long prompt is read with a plan, and how much worse the answers are.

    It calibrates the model on text from Python's own library. Then it compares the whole model, mode prompt with a
    predicted speed-up of 1.4, and the paper's mode e2e at the same predicted speed. Each answers a question about a
    page that calibration did not read. Each also predicts the text that follows other prompts, and looks for pass keys.
    """
    out, err = console(), console(stderr=True)
    start = time.monotonic()
    open_model = partial(open_quietly, model or packaged_model(), running=running)
    with err.status("Loading the model") as status:
        on_stage: Callable[[str], None] = status.update if err.is_terminal else tell
        result = run(open_model, on_stage=on_stage, on_plans=partial(_print_plans, out))
    _print_result(out, result, time.monotonic() - start)


def _print_plans(out: Console, profile: Profile, sides: Mapping[str, Side]) -> None:
    chosen, papers = sides[PROMPT].plan, sides[PAPERS].plan
    assert chosen is not None and papers is not None
    out.print(
        f"Measured on {profile.n_tokens:,} tokens in {profile.n_requests} requests how much each of the "
        f"{2 * profile.n_layer} sublayers changes its input.\n"
    )
    print_plan(out, chosen)
    out.print(
        f"\nFor the same predicted speed, {PAPERS} e2e skips {papers.prefill.n_skip} sublayers for all tokens "
        "of prompt and answer.\n"
    )


def _print_result(out: Console, result: DemoResult, elapsed_s: float) -> None:
    sides, whole = result.sides.values(), result.sides[WHOLE]

    def column(side: Side) -> list[Text | str]:
        first, loss = Text(f"{side.first_token_s:.2f} s"), Text(f"{side.loss:.3f} nats")
        if side is not whole:
            first.append(f"\n{whole.first_token_s / side.first_token_s:.2f} x as fast", "bold")
            loss.append(f"\n{side.loss - whole.loss:+.3f} nats", "bold")
        token = "-" if side.token_s is None else f"{side.token_s * 1e3:.1f} ms"
        return [first, token, loss, f"{side.n_keys} of {result.n_keys}"]

    first, loss = f"first token, {result.n_prompt:,}-token prompt", f"loss on {result.n_judged:,} tokens"
    names = [first, "each token after it", f"{loss}\nafter new prompts", "pass keys found"]
    figures = table("", *result.sides)
    for row in zip(names, *map(column, sides), strict=True):
        figures.add_row(*row)
    out.print(figures)

    answers = table(*(Column(f"answer, {name}", ratio=1) for name in result.sides), expand=True)
    # Line breaks are removed, because a list of short items would fill the screen.
    answers.add_row(*(Text(" ".join(side.answer.split()) or "(none)") for side in sides))
    out.print(answers)
    n, n_threads = len(whole.timings), result.n_threads
    out.print(
        f"Times are {f'medians of {n} runs each, in turn,' if n > 1 else 'of one run each, in turn,'} on {n_threads} "
        f"CPU thread{'s' if n_threads > 1 else ''}. Answers take the likeliest tokens, at most {N_ANSWER}. "
        f"The demo took {elapsed_s:.0f} s.\nNext, with your own model: adaskip-cpp tune model.gguf",
        style="dim",
    )
