"""``adaskip-cpp generate``: answer a prompt, with or without skipping."""

from contextlib import closing

import click

from ..engine.generation import Generation, chat_tokens, has_chat_template
from ..engine.llama import AdaSkipLlama
from ..files import read_text
from ..measuring.running import Running, open_quietly
from ..model.mode import MODES
from ..progress import progress_bar
from .planning import PlanSource, source_options
from .report import first_token_line, kv_line, skipped_lines, speed_lines
from .terminal import RUNNING, answer_options, console, option, verb

_LEAST_LENGTH = 512
"""Tokens: a shorter prompt has too little bulk for most speed-ups, and gets the plan of one that has."""


@verb(
    "Answer a prompt, with or without skipping.",
    example="adaskip-cpp generate model.gguf -f question.txt\n"
    "adaskip-cpp generate model.gguf -f question.txt --profile model.adaskip.json --skip 12",
)
@click.argument("model")
@option("-p", "--prompt", help="The prompt.")
@option("-f", "--file", metavar="FILE", help="Read the prompt from a file, - for stdin.")
@source_options
@option(
    "--chat/--raw",
    group=RUNNING,
    default=None,
    help="Wrap the prompt in the model's chat template, or continue it as it is.  [default: --chat if there is one]",
)
@answer_options(max_tokens=256)
def generate(
    model: str,
    prompt: str | None,
    file: str | None,
    source: PlanSource,
    max_tokens: int,
    ctx: int,
    temp: float,
    seed: int | None,
    chat: bool | None,
    running: Running,
) -> None:
    """Answer a prompt with MODEL, a GGUF file. The text goes to stdout, the speed to stderr.

    With a plan, the sublayers that matter least are skipped, and no KV memory is kept for attentions that never run.
    Without any option that says what to skip, plans and settings are those that `adaskip-cpp tune` wrote beside MODEL.
    """
    err = console(stderr=True)
    if (prompt is None) == (file is None):
        raise click.UsageError("give a prompt either with -p or with -f")
    text = prompt if prompt is not None else read_text(file or "")
    length = 1
    if source.asks_speedup:
        # How long the prompt is, only the model's tokenizer knows, and the plan must be there before the model.
        with closing(open_quietly(model, 256, Running(1, 0), vocab_only=True)) as tokenizer:
            length = max(len(_tokens(tokenizer, text, chat)), 1)
        if source.request is None or MODES[source.request.mode].in_bulk:
            length = max(length, _LEAST_LENGTH)
    llm = open_quietly(model, ctx, running, **source.opening(length))
    source.tell(err, llm)
    if seed is not None:
        llm.set_seed(seed)
    prompt_tokens = _tokens(llm, text, chat)
    answer = Generation(llm, prompt_tokens, max_tokens=max_tokens, temperature=temp, on_stage=progress_bar)
    for piece in answer:
        click.echo(piece, nl=False)
    click.echo()
    if answer.timing is None:
        return
    cost = None if source.profile is None else source.profile.cost
    lines = [
        first_token_line(answer.timing, llm.plan, cost, llm.point(answer.timing.n_prompt)),
        *speed_lines(answer.timing),
        *skipped_lines(llm, answer.timing.n_generated),
        kv_line(llm),
    ]
    if answer.timing.is_cut:
        lines.append("the answer stops where the context is full; --ctx gives more room")
    err.print("\n".join(lines), style="dim")


def _tokens(llm: AdaSkipLlama, text: str, chat: bool | None) -> list[int]:
    if not text:  # which would still have the tokens of the template around it
        return []
    if has_chat_template(llm) if chat is None else chat:
        return chat_tokens(llm, [("user", text)])
    return llm.tokenize(text.encode("utf-8", "replace"), special=True)
