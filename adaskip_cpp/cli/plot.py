"""``adaskip-cpp plot``: draws profiles, plans and frontiers as pictures, or in the terminal."""

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
    "Draw a profile or a frontier.",
    example="adaskip-cpp plot smollm2.adaskip.json gemma3.adaskip.json -o pictures\n"
    "adaskip-cpp plot model.adaskip-plan.json -o pictures",
)
@click.argument("paths", metavar="PROFILE...", nargs=-1, required=True)
@option("-o", "--output", metavar="DIR", help="Folder for the pictures; it is made if it does not exist.")
@option("--plan", "plan_file", group=CHOOSING, metavar="PLAN", help="Plan file to draw; needs exactly one PROFILE.")
@plan_options
@option("--context", group=CHOOSING, type=click.IntRange(1), default=2048, help="Prompt tokens for --speedup.")
@option("--terminal", group=OUTPUT, is_flag=True, help="Print instead of drawing; the default without matplotlib.")
def plot(
    paths: tuple[str, ...], output: str | None, plan_file: str | None, request: PlanRequest | None, context: int,
    terminal: bool
) -> None:  # fmt: skip
    """Draw each PROFILE as PNG and SVG.

    The pictures "layers", "sublayers" and "phases" show the IO similarity: of layers, of attention and FFN, and of both
    in prefill and decode. All profiles share these pictures. "plan" shows the plan of the options or of --plan, one
    picture for each profile.

    PROFILE may also be a plan file of `tune`. Then the one picture "frontier" shows loss against predicted time to the
    first token, with a curve for each prompt length.
    """
    profiles: dict[str, Profile] = {}
    frontiers: dict[str, Frontier] = {}
    for name, path in zip(_names(paths), paths, strict=True):
        if not any(map(is_plan_file, paths)):
            profiles[name] = Profile.load(path)
        elif is_plan_file(path) and (frontier := load_plan(path).frontier) is not None:
            frontiers[name] = frontier
        else:
            raise click.UsageError(f"{path} has no frontier; give only profiles, or only files that `tune` wrote")
    if plan_file is not None:
        if request is not None or len(profiles) != 1:
            raise click.UsageError("--plan is complete; leave out other options for plans, and give one PROFILE")
        found = load_plan(plan_file)
        if found.plan is None:
            raise click.UsageError("the file of --plan has a frontier; to draw it, give it as the only PROFILE")
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
                'For pictures, install matplotlib: pip install "adaskip-cpp[plot]"', style="dim", markup=False
            )
        return
    if output is None:
        raise click.UsageError("there is no folder for the pictures; give one with -o, or use --terminal")
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
    """Return short names of the files, or their paths if two short names are equal."""
    short = [re.sub(r"(\.adaskip(-plan)?)?(\.json)?$", "", os.path.basename(path)) for path in paths]
    names = short if len(set(short)) == len(short) else [path.removesuffix(".json") for path in paths]
    if len(set(names)) < len(names):
        raise click.UsageError("a file is given twice; give each once")
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
