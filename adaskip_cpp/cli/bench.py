"""``adaskip-cpp bench``: measures the speed of a model with and without plans, against stock llama-cpp-python."""

from collections.abc import Sequence
from functools import partial
from typing import TypeAlias

import click

from ..benchmark import measure
from ..files import json_text
from ..measuring.running import Running
from ..model.frontier import Frontier
from ..model.mode import MODES, ModeName
from ..model.plan import SkipPlan
from ..model.plan_file import plan_beside
from ..planning.request import DEFAULT_N_SKIP, PlanRequest
from ..progress import progress_bar
from .bench_report import print_report
from .lists import LAYERS_OF_BOTH, numbers
from .planning import find_profile
from .terminal import CHOOSING, OUTPUT, console, model_options, option, verb

_Layers: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]  # of attentions, of FFNs

_chosen = partial(option, group=CHOOSING)
_measured = partial(option, group="What to measure")


@verb(
    "Measure the speed of plans.",
    example="adaskip-cpp bench model.gguf --profile model.adaskip.json --skip 6,12 --contexts 512,2048",
)
@click.argument("model")
@option("--profile", metavar="PROFILE",
        help="Profile to make plans from.  [default: X.adaskip.json beside MODEL, X.gguf]")  # fmt: skip
@option("--skip", type=numbers(int, "6,12"), help="Numbers of sublayers, a plan for each, as 6,12.  [default with "
        f"--profile: {DEFAULT_N_SKIP}]")  # fmt: skip
@option("--contexts", type=numbers(int, "512,2048"),
        help="Lengths of prompts, in tokens.  [default: 512,2048,8192, as far as the model allows]")  # fmt: skip
@option("--repeats", type=click.IntRange(min=1), default=12, help="Number of rounds.")
@_chosen("--layers", type=LAYERS_OF_BOTH, multiple=True, help="A plan that skips only these attentions/FFNs, as "
         "1,5-7/8,9 or 1,5-7/ or /8,9; may be repeated.")  # fmt: skip
@_chosen("--tuned", is_flag=True, help="The plans that `tune` found for MODEL, by the default promise.")
@_chosen("--mode", type=click.Choice(MODES), default="prompt", help="Phases that skip, see `generate --help`.")
@_measured("--decode-tokens", type=click.IntRange(min=1), default=32, help="Tokens to decode after each prompt.")
@_measured("--no-stock", is_flag=True, help="Do not measure stock llama-cpp-python.")
@model_options
@option("--json", "as_json", group=OUTPUT, is_flag=True, help="Print JSON with all times instead of tables.")
def bench(
    model: str, profile: str | None, skip: tuple[int, ...] | None, contexts: tuple[int, ...] | None, repeats: int,
    layers: tuple[_Layers, ...], tuned: bool, mode: ModeName, decode_tokens: int, no_stock: bool,
    running: Running, as_json: bool
) -> None:  # fmt: skip
    """Measure the time to the first token and per token of MODEL, a GGUF file.

    Stock llama-cpp-python, the whole model ("no plan") and each plan take turns, each round in new processes. Ratios
    compare times of the same round, with a 95% interval. If it contains 1, no difference was found. Run nothing else
    meanwhile. Ctrl-C prints the results so far.

    After `tune`, "no plan" and plans use its settings. Stock keeps its own defaults.

    "no plan" can be faster than stock, which also computes outputs of the prompt that nothing reads. In mode prompt, a
    plan makes the first token come earlier, and does not change the time per token.
    """
    if running.rpc_servers:
        context = click.get_current_context()
        raise click.UsageError("an rpc-server serves one process, but bench needs several; leave out --rpc", context)
    err = console(stderr=True)
    if skip is None:
        skip = (DEFAULT_N_SKIP,) if profile is not None and not (layers or tuned) else ()
    requests = _requests(skip, layers, mode)
    source, note = find_profile(model, profile) if requests else (None, "")
    if note:
        err.print(note)
    plans: dict[str, SkipPlan | PlanRequest | Frontier] = {**requests}
    if tuned and (tuned_plan := (found := plan_beside(model)).frontier or found.plan) is not None:
        plans = {"tuned": tuned_plan, **plans}
    with progress_bar("Measuring", still=True, lines=True) as on_progress:
        result = measure.bench(
            model,
            plans,
            profile=source,
            contexts=contexts,
            n_rounds=repeats,
            n_decode=decode_tokens,
            stock=not no_stock,
            running=running,
            on_progress=on_progress,
            tell=partial(err.print, style="yellow", markup=False, soft_wrap=True),
        )
    if as_json:
        click.echo(json_text(result.to_dict()), nl=False)
    else:
        print_report(console(), result)
    if result.ended_by is not None:
        raise result.ended_by


def _requests(n_skips: Sequence[int], layers: Sequence[_Layers], mode: ModeName) -> dict[str, PlanRequest]:
    """Return the requests by their names in tables; equal names get numbers."""
    wanted = [PlanRequest(n_skip, mode=mode) for n_skip in n_skips]
    wanted += [PlanRequest(mode=mode, strategy="manual", attention=first, ffn=second) for first, second in layers]
    named: dict[str, PlanRequest] = {}
    for request in wanted:
        n = sum(name.partition(" (")[0] == request.name for name in named)
        named[f"{request.name} ({n + 1})" if n else request.name] = request
    return named
