"""Writes what an evaluation found: results.json, results.md, pictures, report.html."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_atomically
from ..pictures import plots
from .contenders import content_hash
from .report import Picture, html_report, markdown_report
from .results import evaluation_results, to_json

if TYPE_CHECKING:
    from ..engine.llama import AdaSkipLlama
    from ..planning.profile import Profile
    from .evaluate import Work
    from .store import Store

__all__ = ["configuration", "evaluation_settings", "write_results"]

_CAPTIONS = {
    "quality": "Each point is a plan, the number beside it what it was asked to skip; right is faster, low is closer "
    "to the full model, the star. Read it at equal speed. Bars: 95% intervals of the speed-up, standard errors of the "
    "loss. The vertical axis is logarithmic above 0.1.",
    "agreement": "How often the most likely next token is the full model's; high is better.",
    "rouge-l": "How much of the full model's own continuation a plan's shares; high is better.",
}
_TITLES = {"quality": "Added loss", "agreement": "Agreement", "rouge-l": "Continuations"}


def evaluation_settings(llm: AdaSkipLlama, profile: Profile, work: Work) -> dict[str, Any]:
    """Return plain JSON values on which results depend: with others, a new evaluation begins.

    Args:
        llm: the model, opened as it will be.
        profile: that the plans come from.
        work: what is to be measured.
    """
    from ..model.cost_settings import CostSettings

    machine = CostSettings.of(llm).to_dict()
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


def write_results(work: Work, store: Store, about: Mapping[str, Any], profile: Profile) -> dict[str, Any]:
    """Write all files of the results into the store's folder, also of an unfinished evaluation.

    Without matplotlib there are no pictures, which the results say.

    Args:
        work: what was to be measured.
        store: what has been.
        about: ``model`` (its name), ``title``, ``about``, ``configuration``, ``command``, ``notes``.
        profile: for the pictures of similarity.

    Returns:
        What stands in ``results.json``.

    Raises:
        OSError: a file cannot be written.
    """
    results = evaluation_results(work, store.records, about)
    folder = store.folder
    write_atomically(folder / "results.json", to_json(results))
    first: list[Picture] = []
    scores: list[Picture] = []
    last: list[Picture] = []
    files: list[str] = []
    if plots.has_matplotlib():
        from .plots import quality_pictures, score_maps

        for name, figure in quality_pictures(results).items():
            files += _saved(plots.save(figure, folder, name))
            title = _TITLES.get(name, name.replace("score-", "Score of "))
            caption = _CAPTIONS.get(name, "The mean score of the task's questions; high is better.")
            wide = figure.get_figwidth() > 1.5 * figure.get_figheight()
            first.append(Picture(title, caption, plots.to_svg(figure, name=title), wide))
        for name, figure in score_maps(results).items():
            files += _saved(plots.save(figure, folder, name))
            caption = f"Score of {name.removeprefix('map-')} by length and depth."
            scores.append(Picture("", caption, plots.to_svg(figure, name=caption)))
        last, more = _similarity(results["model"], profile, folder)
        files += more
    else:
        results = {**results, "notes": [*results["notes"], 'There are no pictures: pip install "adaskip-cpp[plot]"']}
    write_atomically(folder / "results.md", markdown_report(results, files))
    write_atomically(folder / "report.html", html_report(results, first=first, scores=scores, last=last))
    return results


def _saved(paths: list[Path]) -> list[str]:
    return [path.name for path in paths if path.suffix == ".png"]


def _similarity(name: str, profile: Profile, folder: Path) -> tuple[list[Picture], list[str]]:
    """The paper's figures of a profile: pictures for the page, and names of files."""
    from ..pictures import profile_plots

    of_one = {name: profile}
    figures = {
        "similarity-layers": (profile_plots.layers(of_one), "Whole layers in prefill."),
        "similarity-sublayers": (profile_plots.sublayers(of_one), "Attention and FFN by layer, in prefill."),
        "similarity-phases": (profile_plots.phases(of_one), "Attention and FFN in prefill and in decode."),
    }
    pictures, files = [], []
    for file, (figure, caption) in figures.items():
        files += _saved(plots.save(figure, folder, file))
        text = f"{caption} The nearer to 1, the less a block changes what passes through it."
        pictures.append(Picture("", text, plots.to_svg(figure, name=caption)))
    return pictures, files
