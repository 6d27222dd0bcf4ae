"""``adaskip-cpp run``: an unchanged Python program, with our model in the place of ``llama_cpp.Llama``."""

import logging
import os
import runpy
import signal
import sys
from collections.abc import Callable
from types import ModuleType

import click

from ..engine.dropin import replace_llama
from .terminal import option, verb


@verb(
    "Run a Python program that uses llama_cpp.Llama.",
    "app.py --its-option",
    "-m package.module",
    context_settings={"allow_interspersed_args": False},
)
@option("-m", "is_module", is_flag=True, show_default=False, help="PROGRAM is a module, as for `python -m`.")
@click.argument("program")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(program: str, arguments: tuple[str, ...], is_module: bool) -> Callable[[], None]:
    """Run PROGRAM, a Python file or module, with ARGUMENTS, as `python` does.

    Where it opens a model by `llama_cpp.Llama`, it uses the plans that `adaskip-cpp tune` wrote beside the model. A
    line on stderr names the plan file, or says why the whole model runs. Python processes that PROGRAM starts use
    llama-cpp-python's own class.
    """
    if not is_module and not os.path.isfile(program):
        raise click.UsageError(f"there is no program {program!r}")
    return lambda: _run(program, arguments, is_module)


def _run(program: str, arguments: tuple[str, ...], is_module: bool) -> None:
    """Run the program with the signals, the path and the errors that it has under ``python``."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    log, handler = logging.getLogger(__package__.partition(".")[0]), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("adaskip-cpp: %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False  # a program that logs to stderr too would show the line twice
    replace_llama()
    sys.argv = [program, *arguments]
    if not getattr(sys.flags, "safe_path", False):  # else Python has put no folder in front
        sys.path[0] = os.getcwd() if is_module else os.path.dirname(os.path.realpath(program))
    try:
        if is_module:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            # `runpy.run_path` puts the whole path into sys.argv, and takes __main__ away at the end.
            main = sys.modules["__main__"] = ModuleType("__main__")
            main.__file__ = path = os.path.abspath(program)
            with open(path, "rb") as file:
                code = compile(file.read(), path, "exec")
            exec(code, vars(main))
    except SystemExit:
        raise
    except BaseException as error:
        _show(error)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 1)


def _show(error: BaseException) -> None:
    """Show an error as Python does, without the frames above the program's."""
    frames, above = error.__traceback__, (__file__, runpy.run_module.__code__.co_filename)
    while frames is not None and frames.tb_frame.f_code.co_filename in above:
        frames = frames.tb_next
    if frames is None and not isinstance(error, SyntaxError):  # runpy found no program
        sys.exit(f"Error: {error}")
    sys.excepthook(type(error), error.with_traceback(frames), frames)
