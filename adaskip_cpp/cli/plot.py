"""``adaskip-cpp plot``: the paper's figures from profiles, as pictures or on the terminal."""

import os
import re
from collections.abc import Sequence

import click
import numpy as np
from rich.console import Console

from ..model.frontier import Frontier
from ..model.plan import TIMED, SkipPlan
from ..model.plan_file import is_plan_file, load_plan
from ..model.skip_set import KIND_NAMES
from ..pictures import plots, profile_plots
from ..pictures.heatmap import print_heatmap, print_rows
from ..planning.profile import Profile
from ..planning.request import PlanRequest
from ..planning.strategies import make_plan
from .planning import plan_options
from .terminal import CHOOSING, OUTPUT, console, option, verb
from .tune_report import print_frontier


@verb(
    "Draw a profile, or what `tune` found.",
    example="adaskip-cpp plot smollm2.adaskip.json gemma3.adaskip.json -o pictures\n"
    "adaskip-cpp plot model.adaskip-plan.json -o pictures",
)
@click.argument("paths", metavar="PROFILE...", nargs=-1, required=True)
@option("-o", "--output", metavar="DIR", help="Folder for the pictures; made where it is missing.")
@option("--plan", "plan_file", group=CHOOSING, metavar="PLAN", help="A plan file to draw, of the one PROFILE.")
@plan_options
@option("--context", group=CHOOSING, type=click.IntRange(1), default=2048, help="Prompt length for --speedup.")
@option("--terminal", group=OUTPUT, is_flag=True, help="Print them instead; so it is where matplotlib is missing.")
def plot(
    paths: tuple[str, ...],
    output: str | None,
    plan_file: str | None,
    request: PlanRequest | None,
    context: int,
    terminal: bool,
) -> None:
    """Draw PROFILE: the IO similarity of layers, of attention and FFN, of both in prefill and decode, and a plan.

    Writes layers, sublayers and phases, and plan for each profile, as PNG and SVG. Several profiles share the pictures.
    The plan is that of the options, or of --plan.

    PROFILE may be a plan file that `tune` wrote instead. Then its plans are drawn as one picture, frontier: loss
    against predicted time to the first token, a curve for each prompt length.
    """
    profiles: dict[str, Profile] = {}
    frontiers: dict[str, Frontier] = {}
    for name, path in zip(_names(paths), paths, strict=True):
        if not any(map(is_plan_file, paths)):
            profiles[name] = Profile.load(path)
        elif is_plan_file(path) and (frontier := load_plan(path).frontier) is not None:
            frontiers[name] = frontier
        else:
            raise click.UsageError(f"{path} has no frontier; give profiles alone, or files that `tune` wrote")
    if plan_file is not None:
        if request is not None or len(profiles) != 1:
            raise click.UsageError("--plan is a whole plan, of one profile")
        found = load_plan(plan_file)
        if found.plan is None:
            raise click.UsageError("--plan has a frontier; give it alone, as PROFILE, to draw that")
        plans = dict.fromkeys(profiles, found.plan)
    else:
        wanted = (request or PlanRequest()).at(context)
        plans = {name: make_plan(profile, wanted) for name, profile in profiles.items()}
    missing = not plots.has_matplotlib()
    if terminal or missing:
        for frontier in frontiers.values():
            print_frontier(console(), frontier)
        _print(console(), profiles, plans)
        if missing and not terminal:
            console(stderr=True).print(
                'For pictures install matplotlib: pip install "adaskip-cpp[plot]"', style="dim", markup=False
            )
        return
    if output is None:
        raise click.UsageError("give a folder for the pictures with -o, or --terminal")
    if frontiers:
        figures = {"frontier": profile_plots.frontiers(frontiers)}
    else:
        shared = (profile_plots.layers, profile_plots.sublayers, profile_plots.phases)
        figures = {draw.__name__: draw(profiles) for draw in shared}
        for i, (name, plan) in enumerate(plans.items(), start=1):
            figures["plan" if len(plans) == 1 else f"plan-{i}"] = profile_plots.plan_strip(name, plan)
    for name, fig in figures.items():
        for picture in plots.save(fig, output, name):
            click.echo(picture)


def _names(paths: Sequence[str]) -> list[str]:
    """Short names of the files, whole paths where those are alike."""
    short = [re.sub(r"(\.adaskip(-plan)?)?(\.json)?$", "", os.path.basename(path)) for path in paths]
    names = short if len(set(short)) == len(short) else [path.removesuffix(".json") for path in paths]
    if len(set(names)) < len(names):
        raise click.UsageError("a file is named twice")
    return names


def _print(out: Console, profiles: dict[str, Profile], plans: dict[str, SkipPlan]) -> None:
    for name, profile in profiles.items():
        out.print(f"[bold]{name}[/]: IO similarity by layer, and the plan\n")
        rows = {"whole layers, prefill": profile.prefill.layer_similarity}
        for column, kind in enumerate(KIND_NAMES):
            for phase in TIMED:
                rows[f"{kind}, {phase}"] = getattr(profile, phase).similarity[:, column]
        print_rows(out, rows)
        out.print()
        print_heatmap(out, profile.similarity, np.any([each.skip for each in plans[name].sets], axis=0))
        out.print()
