"""The command line, ``adaskip-cpp``: one verb per module, dispatched here."""

from __future__ import annotations

import click

from .cli_calibrate import calibrate
from .cli_chat import chat
from .cli_demo import demo
from .cli_generate import generate
from .cli_inspect import inspect
from .cli_plan import plan
from .terminal import Verbs

__all__ = ["main"]


@click.group(
    cls=Verbs,
    invoke_without_command=True,
    epilog="\b\nExample:\n  adaskip-cpp demo",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="adaskip-cpp", message="%(prog)s %(version)s")
@click.pass_context
def main(context: click.Context) -> None:
    """Skip the least important sublayers of a GGUF model in llama.cpp.

    `calibrate` learns from a model which of its attention and FFN blocks change their input least; `plan` shows what
    would be skipped; `generate` and `chat` run without it. `demo` shows all on a small model.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (demo, inspect, calibrate, plan, generate, chat):
    main.add_command(command)
