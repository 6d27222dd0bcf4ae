"""``adaskip-cpp bench``: how fast a model is with and without plans, against stock llama-cpp-python."""

import contextlib
import itertools
import math
import os
import sys
from functools import partial
from typing import Any

import click

from ..benchmark import subject
from ..benchmark.bench import Bench, BenchSettings, Progress
from ..benchmark.plots import plot
from ..benchmark.table import table
from ..engine.settings import cost_settings
from ..files import check_output, json_text
from ..model.identity import check_gguf, profile_path
from ..model.plan import MODES
from ..model.plan_file import plan_beside
from ..pictures import plots
from ..planning.compensation import COMPENSATIONS, DEFAULT_COMPENSATION
from ..planning.request import DEFAULT_N_SKIP, PlanRequest
from ..planning.strategies import STRATEGIES
from ..progress import OnProgress, told_progress
from .bench_report import print_report
from .lists import LAYERS, LAYERS_OF_BOTH, names, numbers
from .planning import load_profile, print_cost_note
from .terminal import (
    CHOOSING,
    OUTPUT,
    Running,
    console,
    json_option,
    model_options,
    open_quietly,
    option,
    verb,
)

_STRATEGIES = [name for name in STRATEGIES if name != "manual"]
_chosen = partial(option, group=CHOOSING)
_chosen_layers = partial(option, group=CHOOSING, multiple=True)
_measured = partial(option, group="What is measured")


@verb(
    "Measure the speed, against stock llama-cpp-python.",
    example="adaskip-cpp bench model.gguf --profile model.adaskip.json --skip 6,12 --contexts 512,2048",
)
@click.argument("model")
@option(
    "--profile",
    metavar="PROFILE",
    help="Profile of the model, for the plans.  [default: the one beside MODEL, X.adaskip.json for X.gguf; without one "
    "the model is calibrated briefly]",
)
@option(
    "--skip",
    type=numbers(int, "6,12"),
    help=f"Plans that skip so many sublayers, as 6,12,15.  [default with --strategy or --profile: {DEFAULT_N_SKIP}]",
)
@option(
    "--contexts",
    type=numbers(int, "512,2048"),
    help="Tokens of the prompts.  [default: 512,2048,8192, cut to what the model allows]",
)
@option("--repeats", type=click.IntRange(min=1), default=12, help="Rounds.")
@_chosen("--strategy", type=names(_STRATEGIES), help=f"How they choose: {', '.join(_STRATEGIES)}.  [default: adaskip]")
@_chosen(
    "--speedup",
    type=numbers(float, "1.2,1.4"),
    help="Plans predicted to be so many times as fast at the longest context, as 1.2,1.4.",
)
@_chosen_layers("--attention", type=LAYERS, help="A plan that skips just these attentions, as 1,5-7; may be repeated.")
@_chosen_layers("--ffn", type=LAYERS, help="A plan that skips just these FFNs; likewise.")
@_chosen_layers("--both", type=LAYERS_OF_BOTH, help="A plan that skips these attentions and these FFNs; likewise.")
@_chosen("--tuned", is_flag=True, help="The plan that `tune` wrote beside MODEL.")
@_chosen(
    "--mode",
    type=click.Choice(MODES),
    default="prompt",
    help="As for generate: prompt skips in the bulk of prompts alone, prefill the same sublayers in both phases.",
)
@_chosen(
    "--compensation",
    type=click.Choice(list(COMPENSATIONS)),
    help=f"What stands in for a skipped sublayer.  [default: {DEFAULT_COMPENSATION}, with --strategy suffix none]",
)
@_measured("--decode-tokens", type=click.IntRange(min=1), default=32, help="Tokens to time behind each prompt.")
@_measured("--no-stock", is_flag=True, help="Leave stock llama-cpp-python out.")
@_measured("--no-ideal", is_flag=True, help="Do not time the skipped sublayers by themselves.")
@model_options
@option("--plot", "plot_to", group=OUTPUT, metavar="PATH", help="Draw PNG and SVG: a folder, or how their names begin.")
@json_option
def bench(
    model: str,
    profile: str | None,
    contexts: tuple[int, ...] | None,
    tuned: bool,
    repeats: int,
    decode_tokens: int,
    no_stock: bool,
    no_ideal: bool,
    plot_to: str | None,
    running: Running,
    as_json: bool,
    **choice: Any,
) -> None:
    """Measure the time to the first token and per token of MODEL, a GGUF file.

    Stock llama-cpp-python, ours with no plan and ours with each plan take turns, each in a process of its own, a new
    one each round. Ratios are of pairs in the same round, with a 95% interval; where it contains 1, there is no real
    difference. Ctrl-C prints what was measured so far. Run it on an idle machine.

    "no plan" is the whole model; it computes nothing of a prompt that nobody reads, which stock does. In mode prompt a
    plan makes the first token come earlier, and leaves the time per token as it is.
    """
    if running.rpc_servers:
        context = click.get_current_context()
        raise click.UsageError("leave out --rpc: a server serves one process, and bench compares several", context)
    if plot_to is not None:
        plots.figure()  # a missing matplotlib is told now, and not after the measurement
        if not os.path.isdir(plot_to):
            check_output(plot_to, "--plot")
    err = console(stderr=True)
    requests = _requests(choice)
    learns = any(each.strategy != "manual" or each.compensation != "none" for each in requests)
    check_gguf(model)
    plans = {"tuned": plan_beside(model).plan} if tuned else {}
    if profile is None and learns and os.path.exists(profile_path(model)):
        profile = profile_path(model)
        err.print(f"The profile is {profile}.")
    source = None if profile is None else load_profile(model, profile)
    if source is not None and not requests and not tuned:
        requests = _requests({**choice, "skip": (DEFAULT_N_SKIP,)})
    calibrates = learns and source is None
    predicts = any(each.speedup is not None for each in requests)

    n_ctx = max([subject.N_TOKENS + subject.N_DECODE, *((contexts or (2048,)) if calibrates and predicts else ())])
    with contextlib.closing(open_quietly(model, n_ctx, running)) as llm:
        about = subject.configuration(llm)
        fitting, note = subject.fit_contexts(contexts, llm.n_ctx_train, decode_tokens)
        if note:
            err.print(note)
        if calibrates:
            timing = ", and timing the sublayers" if predicts else ""
            size = f"{subject.N_REQUESTS} requests of {subject.N_TOKENS} tokens"
            err.print(f"No --profile: calibrating on {size}{timing}.")
            source = subject.brief_profile(llm, cost=predicts)
        plans |= subject.make_plans(source or llm.n_layer, requests, fitting[-1])
        if predicts:
            print_cost_note(err, source, cost_settings(llm))
        tokens, skippable, in_bulk = subject.material(llm, plans.values(), fitting[-1])
    if about["busy"]:
        err.print(
            f"Warning: the load average is {about['load_average']}; unless that comes from what you ran just before, "
            "other programs disturb the times.",
            style="yellow",
        )
    running_as = running.n_threads, running.gpu_layers, running.flash_attn
    settings = BenchSettings(model, fitting, repeats, decode_tokens, *running_as)
    ideal = None if no_ideal else skippable
    with told_progress("Measuring", still=True) as show:
        tell = _with_estimate(show)
        result = Bench(
            settings, plans, tokens, skippable=ideal, in_bulk=in_bulk, stock=not no_stock, on_progress=tell
        ).run()
    rows = table(result.times)
    if as_json:
        data = {"configuration": about, **result.to_dict(), "rows": [row.to_dict() for row in rows]}
        click.echo(json_text(data), nl=False)
    else:
        print_report(console(), result, rows, about)
    if plot_to is not None and rows:
        for path in plot(rows, result.times, plot_to):
            err.print(f"Drawn: {path}", style="dim", soft_wrap=True)
    if result.ended_by is not None:
        raise result.ended_by


def _requests(choice: dict[str, Any]) -> list[PlanRequest]:
    budgets = [{"n_skip": n} for n in choice["skip"] or ()] + [{"speedup": ratio} for ratio in choice["speedup"] or ()]
    if choice["strategy"] and not budgets:
        budgets = [{"n_skip": DEFAULT_N_SKIP}]
    wanted = [{"strategy": name, **budget} for name in choice["strategy"] or ("adaskip",) for budget in budgets]
    lists = [(layers, ()) for layers in choice["attention"]] + [((), layers) for layers in choice["ffn"]]
    lists += choice["both"]
    wanted += [{"strategy": "manual", "attention": first, "ffn": second} for first, second in lists]
    return [PlanRequest(mode=choice["mode"], compensation=choice["compensation"], **each) for each in wanted]


def _with_estimate(show: OnProgress) -> Progress:
    estimates = itertools.count()

    def tell(doing: str, fraction: float, left_s: float) -> None:
        if not sys.stderr.isatty() and not math.isnan(left_s) and next(estimates) == 0:
            left = f"{left_s:.0f} s" if left_s < 90 else f"{left_s / 60:.0f} min"
            click.echo(f"Measuring for about {left}; Ctrl-C prints what is known.", err=True)
        show(fraction, doing)

    return tell
