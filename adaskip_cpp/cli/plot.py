"""``adaskip-cpp plot``: draws a profile or a frontier as a picture."""

import click

from ..model.plan_file import is_plan_file, load_plan
from ..pictures import plots, profile_plots
from ..planning.profile import Profile
from .terminal import option, verb


@verb("Draw a profile or a frontier.", "model.adaskip.json -o pictures", "model.adaskip-plan.json -o pictures")
@click.argument("path", metavar="FILE")
@option("-o", "--output", metavar="DIR", required=True, help="Folder for the picture; made if it does not exist.")
def plot(path: str, output: str) -> None:
    """Draw FILE, a profile or a plan file of `tune`, as PNG and SVG.

    The picture "similarity" shows the IO similarity of a profile: of whole layers, of attentions and of FFNs, in
    prefill and decode. "frontier" shows the plans that `tune` found: loss against predicted time to the first token,
    with a curve for each prompt length.
    """
    if not is_plan_file(path):
        name, figure = "similarity", profile_plots.similarity(Profile.load(path))
    elif (frontier := load_plan(path).frontier) is not None:
        name, figure = "frontier", profile_plots.losses(frontier)
    else:
        raise click.UsageError(f"{path} has no frontier; give a profile, or a file that `tune` wrote")
    for picture in plots.save(figure, output, name):
        click.echo(picture)
