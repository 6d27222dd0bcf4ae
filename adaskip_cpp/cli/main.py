"""Entry point of ``adaskip-cpp``: registers the verbs. The code of each verb is in the module of its name."""

import click

from .bench import bench
from .calibrate import calibrate
from .chat import chat
from .demo import demo
from .evaluate import evaluate
from .generate import generate
from .inspect import inspect
from .plan import plan
from .plot import plot
from .run import run
from .serve import serve
from .terminal import Verbs
from .tune import tune


@click.group(
    cls=Verbs,
    commands=(demo, inspect, tune, generate, chat, serve, run, calibrate, plan, plot, bench, evaluate),
    invoke_without_command=True,
    epilog="\b\nExample:\n  adaskip-cpp demo",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="adaskip-cpp", message="%(prog)s %(version)s")
@click.pass_context
def main(context: click.Context) -> None:
    """Skip the least important sublayers of a GGUF model in llama.cpp, so that it reads long prompts faster.

    `tune` finds the fastest plan that keeps a promise about quality. `generate`, `chat`, `serve` and `run` use this
    plan. To go step by step: `calibrate` measures the sublayers (attention and FFN blocks), `plan` and `plot` show the
    result, `bench` measures the speed, and `evaluate` the quality. `demo` compares two plans with the whole model, on a
    small model of its own.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
