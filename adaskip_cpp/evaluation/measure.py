"""Measures what skipping costs in quality and brings in speed: the function :func:`adaskip_cpp.evaluate`."""

import contextlib
import os
from collections.abc import Callable
from datetime import datetime, timezone

from ..engine.llama import AdaSkipLlama
from ..measuring.cores import is_busy, load_average
from ..measuring.running import Running, open_quietly
from ..planning.profile import Profile
from .conditions import configuration
from .evaluate import run
from .figures import evaluation_results
from .items import EvaluationOptions, prepare
from .report import write_results
from .results import About, Results
from .store import open_store


def evaluate(
    model: str | os.PathLike[str],
    profile: Profile | str | os.PathLike[str] | None,
    folder: str | os.PathLike[str],
    options: EvaluationOptions | None = None,
    *,
    running: Running | None = None,
    command: str = "",
    on_progress: Callable[[float], None] = lambda fraction: None,
    tell: Callable[[str], None] = lambda note: None,
) -> Results:
    """Compare plans with the whole model: loss, divergence, agreement, continuations and answers, at measured speed.

    Results are kept one by one in the folder: a second call with the same arguments goes on where the first ended.
    At the end, and after Ctrl-C, the folder has results.json, results.md, report.html and, with matplotlib, pictures.

    Args:
        model: a GGUF file.
        profile: of this model, from which plans are made; None to compare what `adaskip-cpp tune` found alone.
        folder: made where it is missing.
        options: what is measured, and on what.
        running: threads and devices, the same for all plans.
        command: how to repeat it, for the report; a call of this function by default.
        on_progress: takes the share of the work that is done, 0 to 1.
        tell: takes sentences for the user: plans left out, a busy machine, earlier results.

    Returns:
        Losses and divergences in nats per token, speeds in seconds, scores from 0 to 1, with standard errors. After
        Ctrl-C ``n_done`` is less than ``n_results``.

    Raises:
        AdaSkipError: the profile is another model's, a file cannot be read or written, there is nothing to compare, or
            the model allows no such context.
        PackageMissingError: a metric needs a package of ``adaskip-cpp[evaluate]``.
    """
    options, running, model = options or EvaluationOptions(), running or Running(), os.fspath(model)
    known = profile if profile is None or isinstance(profile, Profile) else Profile.load(profile)

    def open_model(n_ctx: int, logits_all: bool) -> AdaSkipLlama:
        return open_quietly(model, n_ctx, running, logits_all=logits_all)

    work, notes, words, settings = prepare(model, known, options, open_model)
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    command = (
        command
        or f"adaskip_cpp.evaluate({model!r}, {'profile' if known else None}, {os.fspath(folder)!r}, {options!r})"
    )
    facts = {"started": started, "command": command, "load_average": load_average()}
    with open_store(folder, settings, facts) as kept:
        load = kept.facts["load_average"]
        if work.speed_prompt and is_busy(load):
            notes.append(
                f"The load average was {load:.1f} at the beginning: unless that came from what you ran before, other "
                "programs disturb the speeds."
            )
        for note in notes:
            tell(note)
        if kept.set_aside is not None:
            tell(f"The settings have changed; earlier results are kept in {kept.set_aside}")
        if n_done := sum(key in kept.records for key in work.results()):
            tell(f"{n_done} of {len(work.results())} results are there already.")
        name, begun = os.path.basename(model), kept.facts["started"][:16].replace("T", " ")
        about = About(
            model=name.removesuffix(".gguf"),
            title=f"{name}: what skipping costs and brings",
            summary=f"{len(work.contenders) - 1} contenders against the full model, begun {begun} UTC.",
            configuration=configuration(model, known, work, settings, words),
            command=command,
            settings=settings,
            notes=tuple(notes),
        )
        with contextlib.suppress(KeyboardInterrupt):
            on_progress(0.0)
            run(work, kept, open_model, on_progress)
        found = evaluation_results(work, kept.records, about)
        write_results(found, kept.folder, known)
    return found
