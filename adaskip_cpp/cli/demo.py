"""``adaskip-cpp demo``: calibrates a small model, and compares plans with the whole model, in a few minutes."""

import time
from collections.abc import Sequence
from functools import partial

from rich.console import Console
from rich.table import Column
from rich.text import Text

from ..demo import N_ANSWER, PAPERS, PROMPT, WHOLE, DemoResult, packaged_model, run
from ..evaluation.contenders import Contender
from ..evaluation.results import Row
from ..measuring.running import Running, open_quietly
from ..planning.profile import Profile
from ..progress import progress_bar
from .plan import print_plan
from .terminal import console, model_options, option, table, verb


@verb("Show how skipping works, on a small model.", "")
@option("--model", metavar="MODEL", help="Another GGUF file with a chat template.  [default: packaged SmolLM2-135M]")
@model_options
def demo(model: str | None, running: Running) -> None:
    """Show on a small model how much faster a long prompt is read with a plan, and how much worse the answers are.

    It calibrates the model on text from Python's own library. Then it compares the whole model, mode prompt with a
    predicted speed-up of 1.4, and the paper's mode e2e at the same predicted speed. Each answers a question about a
    page that calibration did not read. Each also predicts the text that follows other prompts, and looks for pass keys.
    """
    out, start = console(), time.monotonic()
    open_model = partial(open_quietly, model or packaged_model(), running=running)
    result = run(open_model, on_stage=partial(progress_bar, lines=True), on_plans=partial(_print_plans, out))
    _print_result(out, result, time.monotonic() - start)


def _print_plans(out: Console, profile: Profile, contenders: Sequence[Contender]) -> None:
    _, chosen, papers = (each.plan for each in contenders)
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
    def column(row: Row) -> list[Text | str]:
        first, later = row.speed["first_token"], row.speed["per_token"]
        loss, keys = row.text["all"], row.questions["passkey"]
        time_, nats = Text(f"{first.seconds.mean:.2f} s"), Text(f"{loss['loss'].mean:.3f} nats")
        if row.mode is not None:
            time_.append(f"\n{first.speedup.value:.2f} x as fast", "bold")
            nats.append(f"\n{loss['added_loss'].mean:+.3f} nats", "bold")
        found = f"{round(keys.score.mean * keys.score.n)} of {keys.score.n}"
        return [time_, f"{later.seconds.mean * 1e3:.1f} ms", nats, found]

    first, loss = f"first token, {result.n_prompt:,}-token prompt", f"loss on {result.n_judged:,} tokens"
    names = [first, "each token after it", f"{loss}\nafter new prompts", "pass keys found"]
    sides = WHOLE, PROMPT, PAPERS
    figures = table("", *sides)
    for cells in zip(names, *map(column, result.rows), strict=True):
        figures.add_row(*cells)
    out.print(figures)

    answers = table(*(Column(f"answer, {name}", ratio=1) for name in sides), expand=True)
    # Line breaks are removed, because a list of short items would fill the screen.
    answers.add_row(*(Text(" ".join(answer.split()) or "(none)") for answer in result.answers))
    out.print(answers)
    n, n_threads = result.n_rounds, result.n_threads
    out.print(
        f"Times are {f'means of {n} runs each, in turn,' if n > 1 else 'of one run each, in turn,'} on {n_threads} "
        f"CPU thread{'s' if n_threads > 1 else ''}. Answers take the likeliest tokens, at most {N_ANSWER}. "
        f"The demo took {elapsed_s:.0f} s.\nNext, with your own model: adaskip-cpp tune model.gguf",
        style="dim",
    )
