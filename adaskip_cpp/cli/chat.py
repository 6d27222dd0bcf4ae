"""``adaskip-cpp chat``: talk to a model, with or without skipping."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import click

from ..errors import AdaSkipError, RequestError
from ..planning.request import PlanRequest
from ..planning.strategies import make_plan
from .planning import choose, plan_options, profile_options
from .report import skipped_counts
from .terminal import CONTEXT, RUNNING, console, load_model, model_options, option, users_error, verb

if TYPE_CHECKING:
    from rich.console import Console

    from ..engine.generation import Generation, Message, Timing
    from ..engine.llama import AdaSkipLlama
    from ..planning.profile import Profile

__all__ = ["chat"]

_HELP = """\
/reset   begin a new conversation
/plan    show what is skipped
/skip N  skip N sublayers from now on (with --profile)
/quit    leave; Ctrl-D does too, Ctrl-C stops an answer
In the line below an answer, /s is tokens per second, and 12+3 is 12 sublayers
of the plan and 3 FFNs that this answer added."""


@verb(
    "Chat with a model, with or without skipping.",
    example="adaskip-cpp chat model.gguf\nadaskip-cpp chat model.gguf --profile model.adaskip.json --skip 8",
)
@click.argument("model")
@profile_options
@plan_options
@option("--system", metavar="TEXT", help="What the model is told before the conversation.")
@option("--max-tokens", type=click.IntRange(min=1), default=1024, show_default=True, help="Longest answer.")
@option("--ctx", group=RUNNING, type=CONTEXT, default=8192, help="Context in tokens.")
@option(
    "--temp",
    group=RUNNING,
    type=click.FloatRange(min=0),
    default=0.8,
    show_default=True,
    help="0: always the likeliest.",
)
@option(
    "--seed",
    group=RUNNING,
    type=click.IntRange(0, 2**32 - 2),
    default=None,
    help="Seed of sampling.  [default: random]",
)
@model_options
def chat(
    model: str,
    profile_path: str | None,
    full: bool,
    request: PlanRequest | None,
    system: str | None,
    max_tokens: int,
    ctx: int,
    temp: float,
    seed: int | None,
    threads: int | None,
    gpu_layers: int,
) -> None:
    """Chat with MODEL, a GGUF file with a chat template; /help lists the commands.

    What the model has read stays in memory, so that each turn reads the new message only. Piped input is one message a
    line. A speed-up is predicted for a conversation that fills half of --ctx. The plan is that of the options; without
    any, the one that `adaskip-cpp tune` put into the profile.
    """
    from ..engine.generation import has_chat_template

    chosen = choose(model, profile_path, request, full)
    plan = chosen.plan(max(ctx // 2, 1))
    llm = load_model(model, n_ctx=ctx, threads=threads, gpu_layers=gpu_layers)
    if not has_chat_template(llm):
        raise RequestError("this model has no chat template; use `adaskip-cpp generate --raw`")
    # With KV for all layers, so that /skip can choose other ones.
    llm.set_plan(plan)
    if seed is not None:
        llm.set_seed(seed)
    conversation = Conversation(llm, system, max_tokens=max_tokens, temperature=temp)
    err = console(stderr=True)
    if chosen.note:
        err.print(chosen.note, style="dim", markup=False)
    _talk(conversation, _Commands(conversation, chosen.profile, chosen.request or PlanRequest(), err))


@dataclass
class Conversation:
    """The messages so far, and how to answer the next one.

    Attributes:
        llm: the model, with the plan to use.
        system: what it is told before the first message, or None.
        max_tokens: longest answer.
        temperature: 0 takes the most likely token each time.
        messages: what was said.
    """

    llm: AdaSkipLlama
    system: str | None
    max_tokens: int
    temperature: float
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system's text."""
        self.messages = [("system", self.system)] if self.system else []

    def ask(self, text: str) -> Generation:
        """Begin the answer to a message; the message is kept when :meth:`answered` is called.

        Raises:
            RequestError: the context has no room for it, or the chat template fails.
        """
        from ..engine.generation import Generation, chat_tokens

        prompt = chat_tokens(self.llm, [*self.messages, ("user", text)])
        n_ctx = self.llm.context_size
        if len(prompt) >= n_ctx:
            raise RequestError(
                f"the context is full: with this message the conversation has {len(prompt):,} tokens of {n_ctx:,}; "
                "/reset begins a new one, a start with a larger --ctx gives more room"
            )
        return Generation(self.llm, prompt, max_tokens=self.max_tokens, temperature=self.temperature)

    def answered(self, text: str, answer: str) -> None:
        """Keep a message and its answer."""
        self.messages += [("user", text), ("assistant", answer)]


def _talk(conversation: Conversation, commands: _Commands) -> None:
    if sys.stdin.isatty():
        commands.err.print(commands.banner(), style="dim")
    for text in _messages():
        if text.startswith("/"):
            if not commands.run(text):
                return
            continue
        try:
            _answer(conversation, text, commands.err)
        except Exception as error:
            if isinstance(error, BrokenPipeError) or not commands.complain(error):
                raise


def _messages() -> Iterator[str]:
    """What is typed or piped, a message a line, until its end. Ctrl-C drops a line that is being typed."""
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  (gives input() its line editing and history)
    while True:
        try:
            line = input("> ") if interactive else sys.stdin.readline()
        except KeyboardInterrupt:
            if not interactive:
                raise
            click.echo("\n(Ctrl-D or /quit leaves)", err=True)
            continue
        except EOFError:
            click.echo(err=True)
            return
        except UnicodeDecodeError as error:
            raise RequestError(f"the input is not UTF-8 text ({error.reason}); convert it first") from error
        if not interactive and not line:
            return
        if line.strip():
            yield line.strip()


def _answer(conversation: Conversation, text: str, err: Console) -> None:
    """Stream the answer to stdout and its figures to stderr; Ctrl-C ends the answer and keeps what there is of it."""
    generation = conversation.ask(text)
    said: list[str] = []
    stopped = False
    try:
        with closing(iter(generation)) as pieces:
            for piece in pieces:
                said.append(piece)
                sys.stdout.write(piece)
                sys.stdout.flush()
    except KeyboardInterrupt:
        stopped = True
    sys.stdout.write("\n")
    sys.stdout.flush()
    if not said and not stopped:
        err.print("(the model ended its answer at once)", style="dim")
    if said or not stopped:
        conversation.answered(text, "".join(said))
    if stopped:
        err.print("(stopped)" if said else "(stopped; the message is forgotten)", style="dim")
    if generation.timing is not None:
        err.print(_status(conversation.llm, generation.timing), style="dim", soft_wrap=True)
        if generation.timing.end == "context":
            err.print("(the context is full; /reset begins a new conversation)", style="dim")


def _status(llm: AdaSkipLlama, timing: Timing) -> str:
    """One line of at most 80 columns for contexts of five digits."""
    parts = [f"prompt {timing.prompt_tokens_per_s:,.0f}/s"]
    if timing.token_s is not None:
        speed = 1 / timing.token_s
        parts.append(f"decode {speed:,.{0 if speed >= 100 else 1}f}/s")
    if llm.plan is not None:
        prefill, decode, added = skipped_counts(llm, timing.n_generated)
        parts.append(f"skipped {prefill} prefill, {decode}{f'+{added}' if llm.plan.online else ''} decode")
    parts.append(f"context {timing.n_prompt + timing.n_generated}/{llm.context_size}")
    return "  ".join(parts)


@dataclass
class _Commands:
    """What a line that begins with / does."""

    conversation: Conversation
    profile: Profile | None
    request: PlanRequest
    err: Console

    def banner(self) -> str:
        """What stands above the first message."""
        plan = self.conversation.llm.plan
        skips = "the full model" if plan is None else f"{plan.prefill.n_skip} of {2 * plan.n_layer} sublayers skipped"
        return f"Chatting with {skips}. /help lists the commands, Ctrl-D leaves."

    def complain(self, error: Exception) -> bool:
        """Tell an error that a user can cause; False for a mistake of ours."""
        line = users_error(error)
        if line is not None:
            self.err.print(f"Error: {' '.join(line.split())}", markup=False, soft_wrap=True)
        return line is not None

    def run(self, line: str) -> bool:
        """Do what a command says; False if it ends the chat."""
        name, *arguments = line.split()
        if name in ("/quit", "/exit"):
            return False
        if name == "/reset":
            self.conversation.reset()
            self.err.print("(a new conversation)", style="dim")
        elif name == "/plan":
            self._show_plan()
        elif name == "/skip":
            self._skip(arguments)
        else:
            if name != "/help":
                self.err.print(f"There is no command {name}.", markup=False)
            self.err.print(_HELP, style="dim", markup=False)
        return True

    def _show_plan(self) -> None:
        from .plan import print_plan

        plan = self.conversation.llm.plan
        if self.profile is None or plan is None:
            self.err.print("Nothing is skipped; start the chat with --profile to skip sublayers.")
        else:
            print_plan(self.err, self.profile, plan)

    def _skip(self, arguments: list[str]) -> None:
        if self.profile is None:
            self.err.print("/skip needs a profile; start the chat with --profile.")
            return
        try:
            (n_skip,) = map(int, arguments)
        except ValueError:
            self.err.print("/skip takes a number of sublayers, as /skip 8.")
            return
        try:
            strategy = "adaskip" if self.request.strategy == "manual" else self.request.strategy
            request = replace(
                self.request, n_skip=n_skip, speedup=None, phase=None, strategy=strategy, attention=(), ffn=()
            )
            plan = make_plan(self.profile, request)
            self.conversation.llm.set_plan(plan)
        except AdaSkipError as error:
            self.complain(error)
            return
        self.request = request
        self.err.print(
            f"({plan.prefill.n_skip} sublayers skipped in prefill, {plan.decode.n_skip} in decode; the conversation is "
            "read again where needed)",
            style="dim",
        )
