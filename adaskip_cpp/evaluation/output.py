"""Writes what an evaluation found: results.json, results.md, pictures, report.html."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_atomically
from ..pictures import plots
from .report import Picture, html_report, markdown_report
from .store import content_hash

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

    from ..engine.llama import AdaSkipLlama
    from ..planning.profile import Profile
    from .evaluate import Work
    from .results import Results

__all__ = ["configuration", "evaluation_settings", "write_results"]

_QUALITY = {
    "quality": (
        "Added loss",
        "Each point is a plan, the number beside it what it was asked to skip; right is faster, low is closer to the "
        "full model, the star. Read it at equal speed. Bars: 95% intervals of the speed-up, standard errors of the "
        "loss. The vertical axis is logarithmic above 0.1.",
    ),
    "agreement": ("Agreement", "How often the most likely next token is the full model's; high is better."),
    "rouge-l": ("Continuations", "How much of the full model's own continuation a plan's shares; high is better."),
}
"""Title and caption of pictures by file name."""


def evaluation_settings(llm: AdaSkipLlama, profile: Profile, work: Work) -> dict[str, Any]:
    """Return plain JSON values on which results depend: with others, a new evaluation begins.

    Args:
        llm: the model, opened as it will be.
        profile: that the plans come from.
        work: what is to be measured.
    """
    from ..engine.settings import cost_settings

    machine = asdict(cost_settings(llm))
    return {
        "model": asdict(llm.model_info),
        "profile": content_hash(profile),
        **work.to_settings(),
        # Batch sizes follow the context, which follows the work.
        "machine": {name: value for name, value in machine.items() if name not in ("n_batch", "n_ubatch")},
        "package": metadata.version("adaskip-cpp"),
    }


def configuration(
    model: str, profile: Profile, work: Work, settings: Mapping[str, Any], words: Mapping[str, str]
) -> dict[str, str]:
    """Return what was measured with what, for people.

    Args:
        model: path of the model.
        profile: that the plans come from.
        work: what was to be measured.
        settings: of :func:`evaluation_settings`.
        words: more lines, about the items.
    """
    machine, info = settings["machine"], settings["model"]
    layers = machine["n_gpu_layers"]
    lines = {
        "Model": f"{os.path.basename(model)} ({info['architecture']}, {info['n_layer']} layers, "
        f"{os.path.getsize(model) / 1e6:,.0f} MB, fingerprint {info['fingerprint'][:12]})",
        "Profile": f"{profile.n_requests} requests, {profile.n_tokens:,} tokens of {profile.corpus or 'unknown text'}"
        + (f", {profile.created}" if profile.created else ""),
        **words,
    }
    if work.speed_prompt:
        lines["Speed"] = (
            f"{work.n_rounds} rounds of a prompt of {len(work.speed_prompt):,} tokens and {work.n_continuation} more, "
            "all contenders in turn, the order reversed every second round"
        )
    return {
        **lines,
        "Machine": f"{machine['cpu']}; {machine['n_threads']} threads; devices: {', '.join(machine['devices'])}; "
        f"layers on a GPU: {'all that fit' if layers < 0 else layers}",
        "Evaluation": f"KV cache {machine['type_k']} and {machine['type_v']}, flash attention "
        f"{'on' if machine['flash_attention'] else 'off'}, batches of up to 512 tokens",
        "Versions": f"adaskip-cpp {settings['package']}, llama-cpp-python {machine['llama_cpp_python']}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}",
    }


def write_results(results: Results, folder: Path, profile: Profile) -> None:
    """Write all files of the results, also of an unfinished evaluation.

    Without matplotlib there are no pictures, which the reports say.

    Args:
        results: what was found.
        folder: where to.
        profile: for the pictures of similarity.

    Raises:
        OSError: a file cannot be written.
    """
    write_atomically(folder / "results.json", results.to_json())
    pictures: dict[str, list[Picture]] = {}
    files: list[str] = []
    if plots.has_matplotlib():
        for name, (section, drawing, picture) in _drawings(results, profile).items():
            files += [path.name for path in plots.save(drawing, folder, name) if path.suffix == ".png"]
            svg = plots.to_svg(drawing, name=picture.title or picture.caption)
            pictures.setdefault(section, []).append(replace(picture, svg=svg))
    else:
        notes = (*results.about.notes, 'There are no pictures: pip install "adaskip-cpp[plot]"')
        results = replace(results, about=replace(results.about, notes=notes))
    write_atomically(folder / "results.md", markdown_report(results, files))
    write_atomically(folder / "report.html", html_report(results, **pictures))


def _drawings(results: Results, profile: Profile) -> dict[str, tuple[str, Drawing, Picture]]:
    """By file name: the section of the page, the drawing, and what is said about it."""
    from ..pictures import profile_plots
    from .plots import quality_pictures, score_maps

    found: dict[str, tuple[str, Drawing, Picture]] = {}
    for name, drawing in quality_pictures(results).items():
        title, caption = _QUALITY.get(
            name, (name.replace("score-", "Score of "), "The mean score of the task's questions; high is better.")
        )
        wide = drawing.get_figwidth() > 1.5 * drawing.get_figheight()
        found[name] = "quality", drawing, Picture(title, caption, wide=wide)
    for name, drawing in score_maps(results).items():
        found[name] = "scores", drawing, Picture("", f"Score of {name.removeprefix('map-')} by length and depth.")
    of_one = {results.about.model: profile}
    for name, draw, caption in (
        ("similarity-layers", profile_plots.layers, "Whole layers in prefill."),
        ("similarity-sublayers", profile_plots.sublayers, "Attention and FFN by layer, in prefill."),
        ("similarity-phases", profile_plots.phases, "Attention and FFN in prefill and in decode."),
    ):
        text = f"{caption} The nearer to 1, the less a block changes what passes through it."
        found[name] = "similarity", draw(of_one), Picture("", text)
    return found
