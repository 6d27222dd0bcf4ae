"""``adaskip-cpp bench``: how fast a model is with and without plans, against stock llama-cpp-python."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from ..bench.plans import WantedPlans
from ..errors import ProfileMissingError
from ..model.plan import MODES, Mode
from ..planning.compensation import COMPENSATIONS, DEFAULT_COMPENSATION
from ..planning.request import DEFAULT_N_SKIP
from ..planning.strategies import STRATEGIES
from ..progress import told_progress
from .lists import LAYERS, LAYERS_OF_BOTH, names, numbers
from .terminal import console, json_option, load_model, model_options

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ..bench.bench import BenchProgress, BenchResult
    from ..engine.llama import AdaSkipLlama
    from ..model.plan import SkipPlan
    from ..planning.profile import Profile

__all__ = ["bench"]

_N_REQUESTS, _N_TOKENS, _N_DECODE = 6, 512, 16
"""Calibration without a profile: enough for a plan to be timed, not for one to be used."""

_STRATEGIES = [name for name in STRATEGIES if name != "manual"]


@click.command(
    short_help="Measure the speed, against stock llama-cpp-python.",
    epilog="\b\nExample:\n  adaskip-cpp bench model.gguf --profile model.adaskip.json --skip 6,12 --contexts 512,2048",
)
@click.argument("model")
@click.option(
    "--profile",
    "profile_path",
    metavar="PROFILE",
    help="Profile of the model, for the plans.  [default: the one beside MODEL, X.adaskip.json for X.gguf; without one "
    "the model is calibrated briefly]",
)
@click.option(
    "--contexts",
    metavar="LIST",
    type=numbers(int, "512,2048"),
    help="Tokens of the prompts.  [default: 512,2048,8192, cut to what the model allows]",
)
@click.option(
    "--skip",
    "skips",
    metavar="LIST",
    type=numbers(int, "6,12"),
    help=f"Plans that skip so many sublayers, as 6,12,15.  [default with --strategy, or with a --profile that is not "
    f"tuned: {DEFAULT_N_SKIP}]",
)
@click.option(
    "--strategy",
    "strategies",
    metavar="LIST",
    type=names(_STRATEGIES),
    help=f"How they choose: {', '.join(_STRATEGIES)}.  [default: adaskip]",
)
@click.option(
    "--speedup",
    "speedups",
    metavar="LIST",
    type=numbers(float, "1.2,1.4"),
    help="Plans predicted to be so many times as fast at the longest context, as 1.2,1.4.",
)
@click.option(
    "--attention",
    multiple=True,
    metavar="LAYERS",
    type=LAYERS,
    help="A plan that skips just these attentions, as 1,5-7; may be repeated.",
)
@click.option(
    "--ffn", multiple=True, metavar="LAYERS", type=LAYERS, help="A plan that skips just these FFNs; likewise."
)
@click.option(
    "--both",
    multiple=True,
    metavar="LAYERS/LAYERS",
    type=LAYERS_OF_BOTH,
    help="A plan that skips these attentions and these FFNs; likewise.",
)
@click.option("--tuned", is_flag=True, help="The plan that `tune` put into the profile.")
@click.option(
    "--mode",
    type=click.Choice(MODES),
    default="prefill",
    show_default=True,
    help="As for generate. prefill skips the same sublayers in both phases, e2e adds FFNs after 20 tokens.",
)
@click.option(
    "--compensation",
    type=click.Choice(list(COMPENSATIONS)),
    default=DEFAULT_COMPENSATION,
    show_default=True,
    help="What stands in for a skipped sublayer.",
)
@click.option("--repeats", type=click.IntRange(min=1), default=12, show_default=True, help="Rounds.")
@click.option(
    "--decode-tokens",
    "n_decode",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Tokens to time behind each prompt.",
)
@click.option("--flash-attn", is_flag=True, help="Compute attention as one operation, in all contenders.")
@click.option("--no-stock", is_flag=True, help="Leave stock llama-cpp-python out.")
@click.option("--no-ideal", is_flag=True, help="Do not time the skipped sublayers by themselves.")
@click.option("--plot", "plot_to", metavar="PATH", help="Draw PNG and SVG: a folder, or how their names begin.")
@model_options
@json_option
def bench(
    model: str,
    profile_path: str | None,
    contexts: tuple[int, ...] | None,
    skips: tuple[int, ...] | None,
    strategies: tuple[str, ...] | None,
    speedups: tuple[float, ...] | None,
    attention: tuple[tuple[int, ...], ...],
    ffn: tuple[tuple[int, ...], ...],
    both: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...],
    tuned: bool,
    mode: Mode,
    compensation: str,
    repeats: int,
    n_decode: int,
    flash_attn: bool,
    no_stock: bool,
    no_ideal: bool,
    plot_to: str | None,
    threads: int | None,
    gpu_layers: int,
    as_json: bool,
) -> None:
    """Measure the time to the first token and per token of MODEL, a GGUF file.

    Stock llama-cpp-python, ours with no plan and ours with each plan take turns, each in a process of its own, a new
    one each round. Ratios are of pairs in the same round, with a 95% interval; where it contains 1, there is no real
    difference. Ctrl-C prints what was measured so far. Run it on an idle machine.
    """
    from ..bench.bench import Bench, BenchSettings
    from ..bench.plots import plot
    from ..bench.table import table
    from ..measuring.cores import physical_cores
    from .bench_report import print_report

    if strategies and not skips and not speedups:
        skips = (DEFAULT_N_SKIP,)
    wanted = WantedPlans(
        strategies or ("adaskip",), skips or (), speedups or (), attention, ffn, mode, compensation, tuned, both
    )
    if plot_to is not None:
        from ..pictures.plots import figure

        figure()  # a missing matplotlib is told now, and not after the measurement
    err = console(stderr=True)
    subject = _prepare(model, profile_path, wanted, contexts, n_decode, threads, gpu_layers, err.print)
    if subject.about["busy"]:
        err.print(
            f"Warning: the load average is {subject.about['load_average']}; unless that comes from what you ran just "
            "before, other programs disturb the times.",
            style="yellow",
        )
    settings = BenchSettings(
        model, subject.contexts, repeats, n_decode, threads or physical_cores(), gpu_layers, flash_attn
    )
    with _progress() as show:
        result = Bench(
            settings,
            subject.plans,
            subject.tokens,
            skippable=None if no_ideal else subject.skippable,
            stock=not no_stock,
            on_progress=show,
        ).run()
    rows = table(result.times)
    if as_json:
        data = {"configuration": subject.about, **result.to_dict(), "rows": [row.to_dict() for row in rows]}
        click.echo(json.dumps(data, indent=1, allow_nan=False))
    else:
        print_report(console(), result, rows, subject.about)
    if plot_to is not None and rows:
        for path in plot(rows, result.times, plot_to):
            err.print(f"Drawn: {path}", style="dim", soft_wrap=True)
    _end(result)


def _end(result: BenchResult) -> None:
    """Say why it ended early."""
    if result.error is not None:
        raise result.error
    if not result.complete:
        raise click.Abort


@dataclass(frozen=True)
class _Subject:
    """What must be known of the model before it is measured."""

    about: dict[str, Any]
    contexts: tuple[int, ...]
    tokens: list[int]
    skippable: npt.NDArray[np.bool_]
    plans: dict[str, SkipPlan]


def _prepare(
    model: str,
    profile_path: str | None,
    wanted: WantedPlans,
    contexts: Sequence[int] | None,
    n_decode: int,
    threads: int | None,
    gpu_layers: int,
    say: Callable[[str], None],
) -> _Subject:
    """Open the model, read or learn its profile, make the plans, and close it again."""
    import numpy as np

    from ..bench.subject import configuration, fit_contexts
    from ..calibration.calibrate import calibrate
    from ..measuring import corpus
    from ..model.identity import check_gguf

    check_gguf(model)
    profile = _profile(model, profile_path, wanted, say)
    if profile is not None and not wanted.any:
        wanted = replace(wanted, tuned=True) if profile.tuned else replace(wanted, skips=(DEFAULT_N_SKIP,))
    calibrates = wanted.needs_profile and profile is None
    n_ctx = _N_TOKENS + _N_DECODE
    if calibrates and wanted.speedups:
        n_ctx = max(n_ctx, *(contexts or (2048,)))
    llm = load_model(model, n_ctx=n_ctx, threads=threads, gpu_layers=gpu_layers)
    try:
        about = configuration(llm)
        fitting, note = fit_contexts(contexts, _n_ctx_train(llm), n_decode)
        if note:
            say(note)
        if calibrates:
            say(
                f"No --profile: calibrating on {_N_REQUESTS} requests of {_N_TOKENS} tokens"
                + (", and timing the sublayers." if wanted.speedups else ".")
            )
            requests = corpus.cut(llm, corpus.text(), _N_REQUESTS, min(_N_TOKENS, n_ctx - _N_DECODE))
            profile = calibrate(llm, requests, n_decode=_N_DECODE, cost=bool(wanted.speedups))
        plans = wanted.make(llm.n_layer if profile is None else profile, fitting[-1]) if wanted.any else {}
        for plan in plans.values():
            llm.set_plan(plan)  # what this model cannot skip is told here
        tokens = corpus.cut(llm, corpus.text(()), 1, max(fitting[-1], 2))[0]
        skippable = np.array([sublayer.skippable for sublayer in llm.sublayers]).reshape(-1, 2)
    finally:
        llm.close()
    return _Subject(about, fitting, tokens, skippable, plans)


def _profile(model: str, path: str | None, wanted: WantedPlans, say: Callable[[str], None]) -> Profile | None:
    """Read the profile that is named, or where plans need one that beside the model; None if there is none."""
    from ..engine import auto
    from ..planning.profile import Profile

    if path is None:
        path = auto.profile_path(model)
        if not wanted.needs_profile or not os.path.exists(path):
            if wanted.tuned:
                raise ProfileMissingError(
                    f"there is no profile {path!r} beside the model; run `adaskip-cpp tune {model}`"
                )
            return None
        say(f"The profile is {path}.")
    profile = Profile.load(path)
    auto.check_model(profile, model, path)
    return profile


def _n_ctx_train(llm: AdaSkipLlama) -> int:
    architecture = llm.metadata.get("general.architecture", "")
    try:
        return int(llm.metadata.get(f"{architecture}.context_length", 0))
    except ValueError:
        return 0


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[BenchProgress], None]]:
    """Yield what shows progress on stderr: a bar on a terminal, elsewhere a line a minute once there is an estimate."""
    if not sys.stderr.isatty():
        with told_progress("Measuring") as line:
            told = False

            def tell(progress: BenchProgress) -> None:
                nonlocal told
                if not told and not math.isnan(progress.left_s):
                    told = True
                    left = _minutes(progress.left_s)
                    click.echo(f"Measuring for about {left}; Ctrl-C prints what is known.", err=True)
                line(progress.fraction)

            yield tell
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = (
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.description}"),
    )
    # Drawn before every run and never during one: a bar that moves would take time from what is measured.
    with Progress(*columns, console=console(stderr=True), transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=1.0, left="")

        def update(progress: BenchProgress) -> None:
            left = "" if math.isnan(progress.left_s) else f"{_minutes(progress.left_s)} left"
            bar.update(task, completed=progress.fraction, description=progress.doing, left=left, refresh=True)

        yield update


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
