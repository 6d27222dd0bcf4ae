"""Shared by all verbs: help in groups, errors in one line, tables, groups of options. Start at :func:`verb`."""

import contextlib
import errno
import functools
import io
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar, cast

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from ..errors import AdaSkipError
from ..measuring.running import Running
from ..model.settings import FlashAttention

_Command = TypeVar("_Command", bound=Callable[..., Any])


class Real(click.FloatRange):
    """A range of numbers. Click's own takes NaN into every range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


class _Option(click.Option):
    """An option that knows its heading in the help. The help shows numbers as N or X, not as click's INTEGER RANGE."""

    def __init__(self, *args: Any, group: str, **settings: Any) -> None:
        self.group = group
        super().__init__(*args, **settings)
        usual = {click.IntRange: "N", Real: "X"}
        self.metavar = self.metavar or usual.get(type(self.type)) or getattr(self.type, "metavar", None)


class _Verb(click.Command):
    """A command whose help has examples, then its options in groups, in order of appearance."""

    def __init__(self, *args: Any, examples: Sequence[str], **settings: Any) -> None:
        self.examples = examples
        super().__init__(*args, **settings)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["arguments"] = list(args)  # for messages that say how to repeat the command
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        examples = [f"adaskip-cpp {self.name} {each}".rstrip() for each in self.examples]
        with formatter.section("Example"):
            formatter.write_text("\b\n" + "\n".join(examples))
        groups: dict[str, list[tuple[str, str]]] = {"Options": []}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)) is not None:
                groups.setdefault(getattr(parameter, "group", "Options"), []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def verb(short_help: str, *examples: str, **settings: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """Make a function a command. The list of commands shows ``short_help``; its own help, examples of arguments."""
    return click.command(cls=_Verb, short_help=short_help, examples=examples, **settings)


def option(*names: str, group: str = "Options", **settings: Any) -> Callable[[_Command], _Command]:
    """Add an option to a command. Its help shows its default, under the heading ``group``."""
    return click.option(*names, cls=_Option, group=group, **{"show_default": True, **settings})


skip_option = functools.partial(option, group="What to skip")
run_option = functools.partial(option, group="Running the model")
output_option = functools.partial(option, group="Output")


class Verbs(click.Group):
    """A group of commands. It prints a user's error as one line on stderr, without a traceback."""

    def main(  # type: ignore[override]  # click overloads it by the value of standalone_mode
        self, args: Sequence[str] | None = None, *, standalone_mode: bool = True, **extra: Any
    ) -> Any:
        if not standalone_mode:
            return super().main(args, standalone_mode=False, **extra)
        try:
            with _interruptible(), _printable():
                code = super().main(args, standalone_mode=False, **extra)
        except click.ClickException as error:
            context = error.ctx if isinstance(error, click.UsageError) else None
            help_ = f" (see {context.command_path} --help)" if context else ""
            _fail(error.format_message() + help_, error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            _fail("interrupted", 130)
        except Exception as error:
            _drop_unprinted()
            if is_broken_pipe(error):  # the reader has ended, as in `| head`
                sys.exit(1)
            if (line := users_error(error)) is None:
                raise
            _fail(line, 1)
        if callable(code):  # a program that is not ours: its errors and signals are its own
            code()
        sys.exit(code if isinstance(code, int) else 0)


def is_broken_pipe(error: Exception) -> bool:
    """Whether the reader of stdout has ended. Windows reports that as an invalid argument."""
    return isinstance(error, BrokenPipeError) or (
        sys.platform == "win32" and isinstance(error, OSError) and (error.errno, error.filename) == (errno.EINVAL, None)
    )


def users_error(error: Exception) -> str | None:
    """Return one line about an error that a user can cause; None for a bug, which needs its traceback."""
    if isinstance(error, MemoryError):
        return "out of memory; use a smaller --ctx"
    if isinstance(error, AdaSkipError) or (isinstance(error, OSError) and error.strerror is None):
        return str(error)  # raised by this package; its message says what to do
    if isinstance(error, OSError):
        file = f"{error.filename!r}: " if error.filename else ""
        return f"{file}{error.strerror}; check the path, its permissions and the space left"
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    # llama-cpp-python raises RuntimeError when llama.cpp refuses something. AdaSkipLlama.eval does not see all of them.
    if isinstance(error, RuntimeError) and frame.f_globals.get("__name__", "").startswith("llama_cpp."):
        return f"llama.cpp failed: {error}; try a smaller --ctx or --gpu-layers 0"
    return None


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Make SIGINT (Ctrl-C) and SIGTERM (`timeout`, service managers) a KeyboardInterrupt, so results are printed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    hook, sys.unraisablehook = sys.unraisablehook, _raise_again
    try:
        for number, handler in before.items():
            if number == signal.SIGTERM or handler is not signal.SIG_IGN:  # `nohup` ignores SIGINT, and that stays so
                signal.signal(number, signal.default_int_handler)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook


@contextlib.contextmanager
def _printable() -> Iterator[None]:
    r"""Make stdout escape characters that it cannot encode (``\x..``), as stderr does."""
    out = sys.stdout
    # Models write in all languages, but pipes on Windows have no UTF-8. Names of files may contain invalid UTF-8.
    if not isinstance(out, io.TextIOWrapper) or out.errors != "strict":
        yield
        return
    out.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        out.reconfigure(errors="strict")


def _drop_unprinted() -> None:
    """Drop output that stdout cannot take: Python would write it again at exit, and print an exception."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _raise_again(unraisable: Any) -> None:
    """Repeat a Ctrl-C that arrived in a callback from C or in a destructor, because Python drops exceptions there."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        threading.Timer(0.01, signal.raise_signal, [signal.SIGINT]).start()
    else:
        sys.__unraisablehook__(unraisable)


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"Error: {' '.join(message.split())}", err=True)
    sys.exit(code)


def console(*, stderr: bool = False) -> Console:
    return Console(stderr=stderr, highlight=False, markup=False)  # names of files and models are printed as they are


def tell(text: str, style: str = "dim") -> None:
    """Print a line on stderr, unwrapped."""
    console(stderr=True).print(text, style=style, soft_wrap=True)


warn = functools.partial(tell, style="yellow")


def options(*added: Callable[..., Any]) -> Callable[[_Command], _Command]:
    return lambda command: functools.reduce(lambda decorated, add: add(decorated), reversed(added), command)


def table(*columns: str | Column, **settings: Any) -> Table:
    """Return an empty table. Columns given as strings are aligned right, except the first."""
    first, *others = columns
    figures = (Column(each, justify="right") if isinstance(each, str) else each for each in others)
    return Table(first, *figures, **{"box": SIMPLE_HEAD, "pad_edge": False, "title_justify": "left", **settings})


def made_of(make: Callable[..., Any], name: str, *parts: str, kept: str = "") -> Callable[[_Command], _Command]:
    """Pass a command ``name=make(**parts)`` in place of the options ``parts``. It also gets the option ``kept``."""

    def wrap(command: _Command) -> _Command:
        @functools.wraps(command)
        def run(**values: Any) -> Any:
            known = {kept: values[kept]} if kept else {}
            made = make(**known, **{part: values.pop(part) for part in parts})
            return command(**{name: made}, **values)

        return cast(_Command, run)

    return wrap


_FLASH_ATTENTION: dict[str, FlashAttention] = {"on": True, "off": False, "prompts": "prompts"}


def model_options_with(threads: str, flash_attn: str) -> Callable[[_Command], _Command]:
    """The options of a model, with the defaults that the help shows for two of them."""
    return options(
        run_option("--threads", "n_threads", type=click.IntRange(1, 512), help=f"CPU threads.  [default: {threads}]"),
        run_option("--gpu-layers", type=click.IntRange(-1), default=-1,
                   help="Layers on GPUs, if there is one; -1: all."),
        run_option("--flash-attn", type=click.Choice([*_FLASH_ATTENTION]),
                   callback=lambda context, parameter, value: _FLASH_ATTENTION.get(value),
                   help=f"Use flash attention everywhere, nowhere, or in prompts alone.  [default: {flash_attn}]"),
        made_of(Running, "running", "n_threads", "gpu_layers", "flash_attn"),
    )  # fmt: skip


model_options = model_options_with("as tuned, else physical cores", "as tuned, else off")


def answer_options(max_tokens: int) -> Callable[[_Command], _Command]:
    return options(
        option("--max-tokens", type=click.IntRange(min=1), default=max_tokens, help="Tokens of the longest answer."),
        run_option("--ctx", type=click.IntRange(8, 2**31 - 1), default=8192, help="Size of the context, in tokens."),
        run_option("--temp", type=Real(0), default=0.8, help="Temperature; 0: always the likeliest token."),
        run_option("--seed", type=click.IntRange(0, 2**32 - 2), help="Random seed of sampling.  [default: random]"),
        model_options,
    )
