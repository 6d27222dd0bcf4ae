"""The command line, ``adaskip-cpp``: one verb per module, dispatched here."""

from __future__ import annotations

import click

from .cli_calibrate import calibrate
from .cli_demo import demo
from .cli_generate import generate
from .cli_inspect import inspect
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

    `calibrate` learns from a model which of its attention and FFN blocks change their input least; `generate` runs
    without them. `demo` shows both on a small model.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (demo, inspect, calibrate, generate):
    main.add_command(command)
