"""What the verbs of the command line share: help in groups, one-line errors, the options of a model, loading one."""

import contextlib
import errno
import functools
import io
import os
import re
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

from ..engine.rpc import add_rpc_server
from ..errors import AdaSkipError
from ..files import write_atomically
from ..measuring.running import Running

_Command = TypeVar("_Command", bound=Callable[..., Any])

CHOOSING, RUNNING, OUTPUT = "Choosing what is skipped", "Running the model", "Output"  # headings of groups of options


class _Option(click.Option):
    """An option that knows the heading it stands under. A number is N or X, where click says INTEGER RANGE."""

    def __init__(self, *args: Any, group: str, **settings: Any) -> None:
        self.group = group
        super().__init__(*args, **settings)
        usual = {click.IntRange: "N", click.FloatRange: "X"}
        self.metavar = self.metavar or usual.get(type(self.type)) or getattr(self.type, "metavar", None)


class _Verb(click.Command):
    """A command whose help has an example above its options, and these in groups, in order of appearance."""

    def __init__(self, *args: Any, example: str, **settings: Any) -> None:
        self.example = example
        super().__init__(*args, **settings)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the arguments in ``ctx.meta["arguments"]``, for who tells how to repeat the command."""
        ctx.meta["arguments"] = list(args)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the example and the groups; those without a heading come first, as "Options"."""
        with formatter.section("Example"):
            formatter.write_text(f"\b\n{self.example}")
        groups: dict[str, list[tuple[str, str]]] = {"Options": []}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)) is not None:
                groups.setdefault(getattr(parameter, "group", "Options"), []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def verb(short_help: str, *, example: str, **settings: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """Make a function a command; ``short_help`` stands in the list of commands."""
    return click.command(cls=_Verb, short_help=short_help, example=example, **settings)


def option(*names: str, group: str = "Options", **settings: Any) -> Callable[[_Command], _Command]:
    """Add an option with its default, under a heading of the help; without one among the few that matter most."""
    return click.option(*names, cls=_Option, group=group, **{"show_default": True, **settings})


class Verbs(click.Group):
    """A group of commands that tells the user's errors in one line on stderr, without a traceback."""

    def main(  # type: ignore[override]  # click overloads it by the value of standalone_mode
        self, args: Sequence[str] | None = None, *, standalone_mode: bool = True, **extra: Any
    ) -> Any:
        if not standalone_mode:
            return super().main(args, standalone_mode=False, **extra)
        try:
            with _interruptible(), _printable():
                code = super().main(args, standalone_mode=False, **extra)
        except click.UsageError as error:
            help_ = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
            _fail(error.format_message() + help_, error.exit_code)
        except click.ClickException as error:
            _fail(error.format_message(), error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            _fail("interrupted", 130)
        except Exception as error:
            _drop_unprinted()
            if is_broken_pipe(error):  # nobody reads on, as behind `| head`
                sys.exit(1)
            if (line := users_error(error)) is None:
                raise
            _fail(line, 1)
        if callable(code):  # a program that is not ours: its errors and signals are its own
            code()
        sys.exit(code if isinstance(code, int) else 0)


def is_broken_pipe(error: Exception) -> bool:
    """Whether nobody reads what is printed any more; Windows calls that an invalid argument."""
    return isinstance(error, BrokenPipeError) or (
        sys.platform == "win32" and isinstance(error, OSError) and (error.errno, error.filename) == (errno.EINVAL, None)
    )


def users_error(error: Exception) -> str | None:
    """What to tell of an error that a user can cause; None for a mistake of ours, whose traceback is wanted."""
    if isinstance(error, AdaSkipError):
        return str(error)
    if isinstance(error, MemoryError):
        return "out of memory; use a smaller --ctx"
    if isinstance(error, OSError):
        if error.strerror is None:  # one of ours, which says what to do
            return str(error)
        file = f"{error.filename!r}: " if error.filename else ""
        return f"{file}{error.strerror}; check the path, its permissions and the space left"
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    # llama-cpp-python raises these for whatever llama.cpp refuses; not all of them pass through AdaSkipLlama.eval.
    if isinstance(error, RuntimeError) and frame.f_globals.get("__name__", "").startswith("llama_cpp."):
        return f"llama.cpp failed: {error}; try a smaller --ctx or --gpu-layers 0"
    return None


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Make a KeyboardInterrupt of Ctrl-C, and of the SIGTERM of `timeout` and service managers: what is known is told.

    Outside, the package ends its script at once. Where SIGINT is ignored, as behind `nohup`, that stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    hook, sys.unraisablehook = sys.unraisablehook, _raise_again
    try:
        for number, handler in before.items():
            if number == signal.SIGTERM or handler is not signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook


@contextlib.contextmanager
def _printable() -> Iterator[None]:
    """Let stdout escape what its encoding lacks, as stderr does: models write in all languages, and Windows' pipes not.

    UTF-8 lacks what the name of a file may have that is none.
    """
    out = sys.stdout
    if not isinstance(out, io.TextIOWrapper) or out.errors != "strict":
        yield
        return
    out.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        out.reconfigure(errors="strict")


def _drop_unprinted() -> None:
    """Forget what stdout cannot take: Python would try again when it ends, and print an exception."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _raise_again(unraisable: Any) -> None:
    """Interrupt once more where Ctrl-C landed in a call from C or from a destructor, out of which nothing is raised."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        threading.Timer(0.01, signal.raise_signal, [signal.SIGINT]).start()
    else:
        sys.__unraisablehook__(unraisable)


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"Error: {' '.join(message.split())}", err=True)
    sys.exit(code)


def console(*, stderr: bool = False) -> Console:
    return Console(stderr=stderr, highlight=False)


@contextlib.contextmanager
def save_svg(path: str, title: str) -> Iterator[Console]:
    """Yield a console; what is printed on it becomes an SVG without references to the network."""
    out = Console(
        file=io.StringIO(),
        highlight=False,
        record=True,
        width=80,
        force_terminal=True,
        color_system="truecolor",
        legacy_windows=False,
    )
    yield out
    write_atomically(path, re.sub(r"@font-face \{.*?\}\s*", "", out.export_svg(title=title), flags=re.DOTALL))


def options(*added: Callable[..., Any]) -> Callable[[_Command], _Command]:
    return lambda command: functools.reduce(lambda decorated, add: add(decorated), reversed(added), command)


def table(*columns: str | Column, **settings: Any) -> Table:
    """Return an empty table. Of columns that are names alone, all but the first are figures."""
    first, *others = columns
    figures = (Column(each, justify="right") if isinstance(each, str) else each for each in others)
    return Table(first, *figures, **{"box": SIMPLE_HEAD, "pad_edge": False, "title_justify": "left", **settings})


json_option = option("--json", "as_json", group=OUTPUT, is_flag=True, help="Print JSON instead.")


def made_of(make: Callable[..., Any], name: str, *parts: str, kept: str = "") -> Callable[[_Command], _Command]:
    """Let a command take, as ``name``, what ``make`` returns of other values, in their place but for the one kept."""

    def wrap(command: _Command) -> _Command:
        @functools.wraps(command)
        def run(*args: Any, **values: Any) -> Any:
            known = {kept: values[kept]} if kept else {}
            made = make(**known, **{part: values.pop(part) for part in parts})
            return command(*args, **{name: made}, **values)

        return cast(_Command, run)

    return wrap


def _run_with(threads: int | None, gpu_layers: int, flash_attn: bool | None, rpc: tuple[str, ...]) -> Running:
    for endpoint in rpc:
        add_rpc_server(endpoint)
    return Running(threads, gpu_layers, flash_attn, rpc)


_running = functools.partial(option, group=RUNNING)

model_options = options(
    _running("--threads", type=click.IntRange(1, 512), help="CPU threads.  [default: as tuned, else physical cores]"),
    _running(
        "--gpu-layers",
        type=click.IntRange(-1),
        default=-1,
        help="Layers to run on a GPU, if llama-cpp-python is built for one; -1 for all.",
    ),
    _running(
        "--flash-attn/--no-flash-attn",
        default=None,
        help="Compute attention as one operation, or not.  [default: as tuned, else not]",
    ),
    _running(
        "--rpc",
        multiple=True,
        metavar="HOST:PORT",
        help="An rpc-server of llama.cpp that takes layers too, before this machine's GPUs; may be repeated.",
    ),
    made_of(_run_with, "running", "threads", "gpu_layers", "flash_attn", "rpc"),
)


def answer_options(max_tokens: int) -> Callable[[_Command], _Command]:
    return options(
        option("--max-tokens", type=click.IntRange(min=1), default=max_tokens, help="Longest answer."),
        _running("--ctx", type=click.IntRange(8, 2**31 - 1), default=8192, help="Context in tokens."),
        _running("--temp", type=click.FloatRange(0), default=0.8, help="0: always the likeliest."),
        _running("--seed", type=click.IntRange(0, 2**32 - 2), help="Seed of sampling.  [default: random]"),
        model_options,
    )
