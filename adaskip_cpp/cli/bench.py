"""``adaskip-cpp bench``: measures the speed of a model with and without plans, against stock llama-cpp-python."""

import os
from functools import partial
from typing import Any

import click

from ..benchmark import measure
from ..benchmark.plots import plot
from ..files import check_output, json_text
from ..measuring.running import Running
from ..model.frontier import Frontier
from ..model.identity import profile_path
from ..model.mode import MODES
from ..model.plan import SkipPlan
from ..model.plan_file import plan_beside
from ..pictures import plots
from ..planning.compensation import COMPENSATIONS, DEFAULT_COMPENSATION
from ..planning.request import DEFAULT_N_SKIP, PlanRequest
from ..planning.strategies import STRATEGIES
from ..progress import told_progress
from .bench_report import print_report
from .lists import LAYERS, LAYERS_OF_BOTH, names, numbers
from .planning import load_profile
from .terminal import CHOOSING, OUTPUT, console, json_option, model_options_with, option, verb

_STRATEGIES = [name for name in STRATEGIES if name != "manual"]
_chosen = partial(option, group=CHOOSING)
_chosen_layers = partial(option, group=CHOOSING, multiple=True)
_measured = partial(option, group="What to measure")


@verb(
    "Measure the speed of plans.",
    example="adaskip-cpp bench model.gguf --profile model.adaskip.json --skip 6,12 --contexts 512,2048",
)
@click.argument("model")
@option("--profile", metavar="PROFILE", help="Profile to make plans from.  [default: X.adaskip.json beside MODEL, "
        "X.gguf; else a brief calibration]")  # fmt: skip
@option("--skip", type=numbers(int, "6,12"), help="Numbers of sublayers, a plan for each, as 6,12.  [default with "
        f"--strategy or --profile: {DEFAULT_N_SKIP}]")  # fmt: skip
@option("--contexts", type=numbers(int, "512,2048"),
        help="Lengths of prompts, in tokens.  [default: 512,2048,8192, as far as the model allows]")  # fmt: skip
@option("--repeats", type=click.IntRange(min=1), default=12, help="Number of rounds.")
@_chosen("--strategy", type=names(_STRATEGIES), help=f"How to choose: {', '.join(_STRATEGIES)}.  [default: adaskip]")
@_chosen("--speedup", type=numbers(float, "1.2,1.4"), help="One plan for each speed-up, predicted at the longest "
         "context: 1.2,1.4 are 1.2 and 1.4 times as fast.")  # fmt: skip
@_chosen_layers("--attention", type=LAYERS, help="A plan that skips only these attentions, as 1,5-7; may be repeated.")
@_chosen_layers("--ffn", type=LAYERS, help="A plan that skips only these FFNs, as 1,5-7; may be repeated.")
@_chosen_layers("--both", type=LAYERS_OF_BOTH, help="A plan for attentions/FFNs, as 1,5-7/8,9; may be repeated.")
@_chosen("--tuned", is_flag=True, help="The plan for the longest context in the file that `tune` wrote beside MODEL.")
@_chosen("--mode", type=click.Choice(MODES), default="prompt", help="Phases that skip, see `generate --help`.")
@_chosen("--compensation", type=click.Choice(list(COMPENSATIONS)),
         help=f"See `generate --help`.  [default: {DEFAULT_COMPENSATION}; none with --strategy suffix]")  # fmt: skip
@_measured("--decode-tokens", type=click.IntRange(min=1), default=32, help="Tokens to decode after each prompt.")
@_measured("--no-stock", is_flag=True, help="Do not measure stock llama-cpp-python.")
@_measured("--no-ideal", is_flag=True, help="Do not time the skipped sublayers alone.")
@model_options_with("physical cores", "no")
@option("--plot", "plot_to", group=OUTPUT, metavar="PATH",
        help="Draw pictures: into the folder PATH, or as PATH-times.png and so on.")  # fmt: skip
@json_option
def bench(
    model: str, profile: str | None, contexts: tuple[int, ...] | None, tuned: bool, repeats: int, decode_tokens: int,
    no_stock: bool, no_ideal: bool, plot_to: str | None, running: Running, as_json: bool, **choice: Any
) -> None:  # fmt: skip
    """Measure the time to the first token and per token of MODEL, a GGUF file.

    Stock llama-cpp-python, the whole model ("no plan") and each plan take turns, each round in new processes. Ratios
    compare times of the same round, with a 95% interval. If it contains 1, no difference was found. Run nothing else
    meanwhile. Ctrl-C prints the results so far.

    "no plan" can be faster than stock, which also computes outputs of the prompt that nothing reads. In mode prompt, a
    plan makes the first token come earlier, and does not change the time per token.
    """
    if running.rpc_servers:
        context = click.get_current_context()
        raise click.UsageError("an rpc-server serves one process, but bench needs several; leave out --rpc", context)
    if plot_to is not None:
        plots.panels()  # if matplotlib is missing, this raises now, not after the measurement
        if not os.path.isdir(plot_to):
            check_output(plot_to, "--plot")
    err = console(stderr=True)
    requests = _requests(choice)
    if profile is None and any(map(measure.learns, requests.values())) and os.path.exists(profile_path(model)):
        profile = profile_path(model)
        err.print(f"The profile is {profile}.")
    source = None if profile is None else load_profile(model, profile)
    if source is not None and not requests and not tuned:
        requests = _requests({**choice, "skip": (DEFAULT_N_SKIP,)})
    plans: dict[str, SkipPlan | PlanRequest | Frontier] = {**requests}
    if tuned and (tuned_plan := (found := plan_beside(model)).frontier or found.plan) is not None:
        plans = {"tuned": tuned_plan, **plans}
    with told_progress("Measuring", still=True, late=True) as on_progress:
        result = measure.bench(
            model,
            plans,
            profile=source,
            contexts=contexts,
            n_rounds=repeats,
            n_decode=decode_tokens,
            stock=not no_stock,
            ideal=not no_ideal,
            running=running,
            on_progress=on_progress,
            tell=partial(err.print, style="yellow", markup=False, soft_wrap=True),
        )
    if as_json:
        click.echo(json_text(result.to_dict()), nl=False)
    else:
        print_report(console(), result)
    if plot_to is not None and result.rows:
        for path in plot(result.rows, plot_to):
            err.print(f"Drawn: {path}", style="dim", soft_wrap=True)
    if result.ended_by is not None:
        raise result.ended_by


def _requests(choice: dict[str, Any]) -> dict[str, PlanRequest]:
    """Return the requests by their names in tables; equal names get numbers."""
    budgets = [{"n_skip": n} for n in choice["skip"] or ()] + [{"speedup": ratio} for ratio in choice["speedup"] or ()]
    if choice["strategy"] and not budgets:
        budgets = [{"n_skip": DEFAULT_N_SKIP}]
    wanted = [{"strategy": name, **budget} for name in choice["strategy"] or ("adaskip",) for budget in budgets]
    lists = [(layers, ()) for layers in choice["attention"]] + [((), layers) for layers in choice["ffn"]]
    lists += choice["both"]
    wanted += [{"strategy": "manual", "attention": first, "ffn": second} for first, second in lists]
    named: dict[str, PlanRequest] = {}
    for each in wanted:
        request = PlanRequest(mode=choice["mode"], compensation=choice["compensation"], **each)
        n = sum(name.partition(" (")[0] == request.name for name in named)
        named[f"{request.name} ({n + 1})" if n else request.name] = request
    return named
