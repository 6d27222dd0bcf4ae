"""``adaskip-cpp plan``: shows the plan that a profile gives, with all ranks, and the predicted speed-up."""

import click
import numpy as np
from click.core import ParameterSource
from rich.console import Console
from rich.table import Column
from rich.text import Text

from ..model.plan import PHASES, REFIT_EVERY, TIMED, Phase, SkipPlan
from ..model.plan_file import is_plan_file, load_plan, save_plan
from ..model.skip_set import KIND_NAMES, SkipSet, ranked
from ..model.stored import check_output
from ..planning.profile import Profile
from ..planning.request import PlanRequest
from ..planning.strategies import make_plan, ranking
from .planning import plan_options
from .report import PHASE_WORDS, layer_list, seconds, window_words
from .terminal import console, option, output_option, table, verb
from .tune_report import print_frontier


@verb(
    "Show a plan and its predicted speed-up.",
    "model.adaskip.json --speedup 1.25 --context 4096",
    "model.adaskip.json --skip 12 -o model.adaskip-plan.json",
    "model.adaskip-plan.json",
)
@click.argument("profile_path", metavar="PROFILE")
@plan_options
@option("--context", type=click.IntRange(min=1), default=2048, help="Prompt length for predictions, in tokens.")
@output_option("-o", "--output", metavar="PLAN", help="Also write the plan to a file, for --plan of other verbs.")
def plan(profile_path: str, request: PlanRequest, context: int, output: str | None) -> None:
    """Show the plan that PROFILE gives with these options: the sublayers that it skips, and the rank of each sublayer.

    PROFILE may also be a plan file, written by `tune` or with -o. Then its plans are shown, with the measurements of
    `tune`. A plan file takes no options.

    The table has these columns for each sublayer. "rank": rank 1 is skipped first. Mode prompt begins with the last
    layer, the other modes with the largest similarity. "similarity": the mean cosine of its input and output in
    prompts. "ms": the predicted milliseconds that skipping it alone saves for a whole prompt, or with --mode decode for
    one decoded token. "skip": b, p, d if bulk, prefill, decode skip it. "scale": the factor of its input.
    """
    out = console()
    if is_plan_file(profile_path):
        source = click.get_current_context().get_parameter_source("context")
        if request != PlanRequest() or output is not None or source is not ParameterSource.DEFAULT:
            raise click.UsageError("PROFILE is a plan file, which is shown as it is; leave out other options")
        found = load_plan(profile_path)
        if found.frontier is not None:
            print_frontier(out, found.frontier)
        elif found.plan is not None:
            print_plan(out, found.plan)
            out.print()
            _print_elided(out, found.plan)
        return
    if output is not None:
        check_output(output, profile_path)
    profile = Profile.load(profile_path)
    chosen = make_plan(profile, request.at(context))
    if output is not None:
        save_plan(output, chosen)
    print_plan(out, chosen)
    _print_ranks(out, profile, request, chosen, context)
    cost, phase = profile.cost, request.faster_phase
    if cost is None:
        out.print("No speed-up is predicted, because the profile has no times; calibrate again.")
    else:
        speedups = ", ".join(f"{name} {cost.speedup(chosen, context, name):.2f} x" for name in TIMED)
        first, first_whole = (seconds(cost.seconds(each, context, "prefill")) for each in (chosen, None))
        basis = f"predicted from times of {cost.settings.words}, up to {cost.deepest:,} tokens"
        out.print(f"ms: time saved in {'a prompt' if phase == 'bulk' else phase}, {basis}", style="dim")
        out.print(f"Predicted speed-up at {context:,} tokens: {speedups}.")
        out.print(f"Predicted first token: after {first}, whole model {first_whole}.")
    _print_elided(out, chosen)
    if output is not None:
        out.print(f"\nPlan written to {output}; use it with --plan {output}.", soft_wrap=True)


def _phases(plan: SkipPlan) -> list[tuple[Phase, SkipSet]]:
    """Return the phases to show, with their sets: that of the prompt, decode, and prefill if it skips anything."""
    own = {plan.prompt_phase, "decode", *(("prefill",) if plan.prefill.n_skip else ())}
    return [(phase, plan.skipped(phase)) for phase in PHASES if phase in own]


def print_plan(out: Console, chosen: SkipPlan) -> None:
    phases = [(name, chosen.decode if name == "decode" else each) for name, each in _phases(chosen)]
    (name, first), *others = phases
    counts = "".join(f", {each.n_skip} in {name}" for name, each in others)
    where = f"{PHASE_WORDS[name]}{window_words(chosen)}{counts}"
    how = f": strategy {chosen.strategy}, mode {chosen.mode}, compensation {chosen.compensation}"
    out.print(Text.assemble((f"{first.n_skip} of {2 * chosen.n_layer} sublayers skipped in {where}", "bold"), how))
    alike = all(np.array_equal(first.skip, each.skip) for _, each in phases)
    told = [phases[0], *(pair for pair in others if pair[1].n_skip)] if name == "bulk" else phases
    for name, each in phases[-1:] if alike else told:
        within = "" if alike else " in the bulk" if name == "bulk" else f" in {name}"
        out.print(f"\nattention skipped{within} in layers: {layer_list(each.attention)}")
        out.print(f"FFN skipped{within} in layers: {layer_list(each.ffn)}")
    if bulk := chosen.bulk:
        if bulk.narrowed:
            looks = f"attention in the bulk looks back at {bulk.window_size:,} tokens"
            out.print(f"\n{looks} in layers: {layer_list(bulk.narrowed)}")
        out.print(f"\nThe bulk is the prompt without its first {bulk.head} and its last {bulk.tail} tokens.")
        if bulk.refit:
            out.print(f"Of each {REFIT_EVERY:,} tokens, {bulk.refit} run whole, and maps are fitted to them.")
    for start, each in chosen.schedule[1:]:
        out.print(f"from token {start} of an answer: {each.n_skip} skipped")
    if stage := chosen.online:
        out.print(
            f"online: after {stage.window} tokens of an answer, it also skips every FFN whose similarity in these "
            f"tokens is at least {stage.threshold:.4f}"
        )


def _print_ranks(out: Console, profile: Profile, request: PlanRequest, chosen: SkipPlan, context: int) -> None:
    saved = None if profile.cost is None else 1e3 * profile.cost.seconds_saved(context, request.faster_phase)
    values, phases = ranking(profile, request.mode), _phases(chosen)
    ranks = {divmod(index, 2): str(rank) for rank, index in enumerate(ranked(values), start=1)}

    def cells(at: tuple[int, int]) -> list[Text | str]:
        times = [] if saved is None else [f"{saved[at]:.1f}" if saved[at] >= 10 else f"{saved[at]:.2f}"]
        if not profile.in_bulk[at]:
            return ["-", "-", *("-" for _ in times), "", ""]
        skipped = {name: each for name, each in phases if each.skip[at]}
        scale = next((f"{each.scale[at]:.3f}" for each in skipped.values()), "")
        rank = "-" if np.isnan(values[at]) else ranks[at]
        found = [rank, f"{profile.similarity[at]:.4f}", *times, "".join(name[0] for name in skipped), scale]
        return [Text(cell, "bold" if skipped else "") for cell in found]

    of_each = ("simi-\nlarity", *(["\nms"] if saved is not None else []), "\nskip", "\nscale")
    columns = [column for name in KIND_NAMES for column in (f"{name}\nrank", *of_each)]
    printed = table(Column("\nlayer", justify="right"), *columns, collapse_padding=True)
    for layer in range(profile.n_layer):
        printed.add_row(str(layer), *cells((layer, 0)), *cells((layer, 1)))
    out.print(printed)


def _print_elided(out: Console, plan: SkipPlan) -> None:
    if elided := plan.without_kv:
        out.print(f"No KV memory is needed for {len(elided)} layer{'s' * (len(elided) > 1)}: {layer_list(elided)}.")
    else:
        why = "the bulk keeps its K and V" if plan.bulk else "no attention is skipped in both prefill and decode"
        out.print(f"KV memory is needed for all layers: {why}.")
