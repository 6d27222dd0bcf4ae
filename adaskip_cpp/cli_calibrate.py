"""``adaskip-cpp calibrate``: learn a model's profile and write it to a file."""

from __future__ import annotations

import json
import os

import click

from .errors import ProfileError
from .terminal import console, json_option, load_model, model_options, read_text

__all__ = ["calibrate"]


@click.command(
    short_help="Learn a model's profile.",
    epilog="\b\nExample:\n  adaskip-cpp calibrate model.gguf --data notes.txt -o model.adaskip.json",
)
@click.argument("model")
@click.option("-o", "--output", required=True, metavar="PROFILE", help="Profile file to write.")
@click.option(
    "--data",
    "files",
    multiple=True,
    metavar="FILE",
    help="UTF-8 text to calibrate on, - for stdin; may be repeated. Text like yours works best.  "
    "[default: pages of pydoc_data.topics, Python's language reference]",
)
@click.option("--requests", type=click.IntRange(min=1), default=20, show_default=True, help="Requests to cut from it.")
@click.option("--tokens", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens in each request.")
@model_options
@json_option
def calibrate(
    model: str,
    output: str,
    files: tuple[str, ...],
    requests: int,
    tokens: int,
    threads: int | None,
    gpu_layers: int,
    as_json: bool,
) -> None:
    """Learn which sublayers of MODEL, a GGUF file, change their input least, and write a profile.

    The text is cut into requests, spread evenly over it, which run through the full model.
    """
    from . import corpus
    from .calibrate import calibrate as run
    from .heatmap import print_heatmap

    _check_output(output)
    text = "\n\n".join(read_text(file) for file in files) if files else corpus.text()
    description = ", ".join(os.path.basename(file) for file in files) if files else corpus.DESCRIPTION
    llm = load_model(model, n_ctx=tokens, threads=threads, gpu_layers=gpu_layers)
    profile = run(llm, corpus.cut(llm, text, requests, tokens), description=description)
    profile.save(output)

    if as_json:
        click.echo(json.dumps({"path": output, **profile.to_dict()}, indent=1))
        return
    out = console()
    print_heatmap(out, profile.similarity)
    out.print()
    short = f", all that fit of the {requests} asked for" if profile.n_requests < requests else ""
    out.print(f"Calibrated on {profile.n_requests} requests{short}: {profile.n_tokens:,} tokens of {description}.")
    out.print(f"{profile.skippable.sum()} of {2 * profile.n_layer} sublayers can be skipped.")
    out.print(f"Profile written to {output}", soft_wrap=True)


def _check_output(path: str) -> None:
    """Refuse a file that cannot be written before minutes of work, not after."""
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise ProfileError(f"there is no folder {folder!r}; create it or choose another place for the profile")
    if os.path.isdir(path) or not os.access(folder, os.W_OK):
        raise ProfileError(f"cannot write a profile to {path!r}; choose another file")
