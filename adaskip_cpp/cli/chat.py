"""``adaskip-cpp chat``: a conversation with a model, with or without a plan. Start at :class:`Conversation`."""

import contextlib
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field

import click

from ..engine.generation import Generation, Message, Timing, chat_tokens, has_chat_template
from ..engine.llama import AdaSkipLlama
from ..errors import RequestError
from ..measuring.running import Running
from ..progress import progress_bar
from .plan import print_plan
from .planning import PlanSource, source_options
from .report import first_token_line, skipped_counts, skipped_words
from .terminal import answer_options, console, is_broken_pipe, option, tell, users_error, verb

_HELP = """\
/reset  begin a new conversation
/plan   show which sublayers are skipped
/quit   end the chat, like Ctrl-D (Windows: Ctrl-Z); Ctrl-C stops an answer
In the lines below an answer, "/s" means tokens per second. "12+3" means
12 sublayers of the plan, and 3 FFNs that this answer added to them."""


@verb("Chat with a model.", "model.gguf", "model.gguf --max-loss 0.02")
@click.argument("model")
@source_options
@option("--system", metavar="TEXT", help="System message: instructions before the conversation.  [default: none]")
@answer_options(max_tokens=1024)
def chat(
    model: str, source: PlanSource, system: str | None, max_tokens: int, ctx: int, temp: float, seed: int | None,
    running: Running
) -> None:  # fmt: skip
    """Chat with MODEL, a GGUF file with a chat template; /help lists the commands.

    The conversation stays in memory, so each turn reads only the new message. Piped input has one message per line. It
    uses the plans and settings that `adaskip-cpp tune` wrote beside MODEL, or else the whole model.
    """
    llm = source.open(model, ctx, running, seed)
    if not has_chat_template(llm):
        raise RequestError("this model has no chat template; use `adaskip-cpp generate --raw`")
    Conversation(llm, max_tokens, temp, system).run()


@dataclass
class Conversation:
    """Reads messages from stdin until its end. Answers go to stdout, all other text to stderr."""

    llm: AdaSkipLlama
    max_tokens: int
    temperature: float
    system: str | None = None
    messages: list[Message] = field(default_factory=list)

    def run(self) -> None:
        llm = self.llm
        if sys.stdin.isatty():
            skips = "the whole model" if llm.plan is None or llm.plan.is_whole else skipped_words(llm.plan)
            if llm.frontier is not None:
                skips = "a plan chosen by the length of the conversation"
            tell(f"Chatting with {skips}. /help lists the commands, /quit ends the chat.")
        for text in _messages():
            try:
                if not text.startswith("/"):
                    self.answer(text)
                elif text.split()[0] in ("/quit", "/exit"):
                    return
                else:
                    self.command(text.split()[0])
            except Exception as error:
                if is_broken_pipe(error) or (line := users_error(error)) is None:
                    raise
                tell(f"Error: {' '.join(line.split())}", style="")

    def ask(self, text: str) -> Generation:
        llm = self.llm
        system: list[Message] = [("system", self.system)] if self.system else []
        prompt = chat_tokens(llm, [*system, *self.messages, ("user", text)])
        if len(prompt) >= llm.context_size:
            raise RequestError(
                f"with this message the conversation has {len(prompt):,} tokens, but the context has "
                f"{llm.context_size:,}; begin a new one with /reset, or start the chat with a larger --ctx"
            )
        return Generation(llm, prompt, max_tokens=self.max_tokens, temperature=self.temperature, on_stage=progress_bar)

    def answer(self, text: str) -> None:
        """Print the answer as it comes, then its figures. Ctrl-C ends the answer; its text so far is kept."""
        generation, said, stopped = self.ask(text), list[str](), False
        try:
            with closing(iter(generation)) as pieces:
                for piece in pieces:
                    said.append(piece)
                    click.echo(piece, nl=False)
        except KeyboardInterrupt:
            stopped = True
        click.echo()
        if said or not stopped:
            self.messages += [("user", text), ("assistant", "".join(said))]
        if stopped:
            tell("(stopped)" if said else "(stopped; the message is forgotten)")
        elif not said:
            tell("(the model ended its answer at once)")
        if generation.timing is not None:
            tell(first_token_line(self.llm, generation.timing))
            tell(_status(self.llm, generation.timing))
            if generation.timing.is_cut:
                tell("(the context is full; /reset begins a new conversation)")

    def command(self, name: str) -> None:
        if name == "/reset":
            self.messages = []
            tell("(a new conversation)")
        elif name == "/plan" and (plan := self.llm.plan) is not None:
            print_plan(console(stderr=True), plan)
        elif name == "/plan":
            tell("Nothing is skipped now. For plans, run `adaskip-cpp tune`, or start with --plan.", style="")
        else:
            if name != "/help":
                tell(f"There is no command {name}.", style="")
            tell(_HELP)


def _messages() -> Iterator[str]:
    """Yield the non-empty lines of stdin, which are messages."""
    try:
        lines = _typed() if sys.stdin.isatty() else click.open_file("-", encoding="utf-8")
        yield from filter(None, map(str.strip, lines))
    except UnicodeDecodeError as error:
        raise RequestError(f"the input is not UTF-8 text ({error.reason}); convert it to UTF-8") from error


def _typed() -> Iterator[str]:
    """Yield lines as they are typed, until Ctrl-D. Ctrl-C drops the current line."""
    with contextlib.suppress(ImportError):  # Windows lacks this module, and its console edits lines itself
        import readline  # noqa: F401  (gives input() its line editing and history)
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            click.echo("\n(/quit ends the chat)", err=True)
        except EOFError:
            click.echo(err=True)
            return


def _status(llm: AdaSkipLlama, timing: Timing) -> str:
    parts = [f"prompt {timing.prompt_tokens_per_s:,.0f}/s"]
    if timing.token_s is not None:
        speed = 1 / timing.token_s
        parts.append(f"decode {speed:,.{0 if speed >= 100 else 1}f}/s")
    if llm.plan is not None:
        prompt, decode, added = skipped_counts(llm, timing.n_generated)
        more = f"+{added}" if llm.plan.online else ""
        parts.append(f"skipped {prompt} {llm.plan.prompt_phase}, {decode}{more} decode")
    parts.append(f"context {timing.n_prompt + timing.n_generated}/{llm.context_size}")
    return "  ".join(parts)
