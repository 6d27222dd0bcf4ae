"""``adaskip-cpp generate``: answers one prompt, with or without a plan."""

import click

from ..engine.generation import Generation, chat_tokens, has_chat_template
from ..files import read_text
from ..measuring.running import Running
from ..progress import progress_bar
from .planning import PlanSource, source_options
from .report import first_token_line, kv_line, skipped_lines, speed_lines
from .terminal import answer_options, console, option, run_option, verb


@verb("Answer one prompt.", "model.gguf -f question.txt", "model.gguf -f question.txt --max-loss 0.02")
@click.argument("model")
@option("-p", "--prompt", help="The prompt. Give this or -f.")
@option("-f", "--file", metavar="FILE", help="UTF-8 file with the prompt; - for stdin.")
@source_options
@run_option("--chat/--raw", default=None, help="Put the prompt into the model's chat template, or use it as it is.  "
            "[default: --chat if there is one]")  # fmt: skip
@answer_options(max_tokens=256)
def generate(
    model: str, prompt: str | None, file: str | None, source: PlanSource, max_tokens: int, ctx: int, temp: float,
    seed: int | None, chat: bool | None, running: Running
) -> None:  # fmt: skip
    """Answer a prompt with MODEL, a GGUF file. The answer goes to stdout, the speed to stderr.

    A plan skips the sublayers that matter least. It uses the plans and settings that `adaskip-cpp tune` wrote beside
    MODEL, or else the whole model.
    """
    if (prompt is None) == (file is None):
        raise click.UsageError("there must be one prompt; give it with -p, or a file with -f")
    text = prompt if prompt is not None else read_text(file or "")
    llm = source.open(model, ctx, running, seed)
    if not text:  # the chat template would add its own tokens
        tokens: list[int] = []
    elif has_chat_template(llm) if chat is None else chat:
        tokens = chat_tokens(llm, [("user", text)])
    else:
        tokens = llm.tokenize(text.encode("utf-8", "replace"), special=True)
    answer = Generation(llm, tokens, max_tokens=max_tokens, temperature=temp, on_stage=progress_bar)
    for piece in answer:
        click.echo(piece, nl=False)
    click.echo()
    if (timing := answer.timing) is None:
        return
    lines = [first_token_line(llm, timing), *speed_lines(timing), *skipped_lines(llm, timing), kv_line(llm)]
    if timing.is_cut:
        lines.append("the answer stops because the context is full; use a larger --ctx")
    console(stderr=True).print("\n".join(lines), style="dim")
