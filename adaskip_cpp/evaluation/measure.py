"""The function :func:`adaskip_cpp.evaluate`: measures how much quality skipping costs and how much speed it brings."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path

from ..engine.cores import busy_warning, load_average
from ..engine.settings import cost_settings
from ..files import StrPath, content_hash, write_error
from ..measuring.memo import Memo
from ..measuring.running import Running, described, open_quietly, settings_here
from ..model.plan_file import frontier_beside, frontier_of
from ..planning.profile import Profile
from .evaluate import kept, run
from .figures import evaluation_results
from .items import EvaluationOptions, prepared
from .report import write_results
from .results import About, Results


def evaluate(
    model: StrPath,
    profile: Profile | StrPath | None,
    folder: StrPath,
    options: EvaluationOptions | None = None,
    *,
    running: Running | None = None,
    command: str = "",
    on_progress: Callable[[float], None] = lambda fraction: None,
    tell: Callable[[str], None] = lambda note: None,
) -> Results:
    """Measure the quality and the speed of plans against the whole model.

    Each result is kept in the folder, so a second call with the same arguments continues. At the end, and after Ctrl-C,
    the folder has results.json, report.html and, with matplotlib, a picture.

    Args:
        model: a GGUF file.
        profile: a profile of this model or its file, from which plans are made; None to compare only the result of
            ``tune``.
        folder: the folder of the results; it is created if it is missing.
        options: the plans, texts and tasks; None for the defaults.
        running: threads and devices, the same for all plans.
        command: a command that repeats the evaluation, for the report; by default a call of this function.
        on_progress: called with the share of the work that is done, 0 to 1.
        tell: called with sentences for the user, such as plans that are left out.

    Returns:
        Losses and divergences in nats per token, speeds in seconds, scores from 0 to 1, with standard errors. After
        Ctrl-C, ``n_done`` is less than ``n_results``.

    Raises:
        AdaSkipError: the profile is of another model, a file cannot be read or written, there is nothing to compare, or
            the model does not allow such a context.
        PackageMissingError: a metric needs a package of ``adaskip-cpp[evaluate]``.

    Examples:
        >>> options = EvaluationOptions(text_files=("mine.txt",), max_losses=(0.02, 0.05))
        >>> results = evaluate("model.gguf", None, "results", options)
        >>> for row in results.contenders:
        ...     print(row.label, row.speedup, row.figure("added_loss"))
    """
    options, running, model = options or EvaluationOptions(), running or Running(), os.fspath(model)
    known = profile if profile is None or isinstance(profile, Profile) else Profile.load(profile)
    arguments = f"{model!r}, {'profile' if known else None}, {os.fspath(folder)!r}, {options!r}"
    load, begun = load_average() or 0.0, datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M")
    named = None if options.plan_file is None else frontier_of(options.plan_file)
    tuned = settings_here(named or frontier_beside(model))
    opened = partial(open_quietly, model, running=running, **running.options(tuned))
    with prepared(model, known, options, opened) as (llm, work, notes, words):
        machine = cost_settings(llm)
        settings = {  # other settings begin a new evaluation
            "model": asdict(llm.model_info),
            "profile": None if known is None else content_hash(known),
            "work": work.hash,
            "machine": asdict(machine),
            "package": metadata.version("adaskip-cpp"),
        }
        memo = _memo(Path(folder), content_hash(settings))
        begun, load = memo.get("begun", tuple[str, float], lambda: (begun, load))
        if work.speed_prompt and busy_warning(load):
            why = f"The load average was {load:.1f} at the beginning. If other programs were running, they"
            notes.append(f"{why} disturbed the speeds: close them, and evaluate again into another folder.")
        for note in notes:
            tell(note)
        if n_done := len(kept(work, memo)):
            tell(f"{n_done} of {len(work.results())} results are there already.")
        elif others := [str(each) for each in sorted(Path(folder).glob("items-*.json")) if str(each) != memo.path]:
            tell(f"The settings have changed. Earlier results are kept in {', '.join(others)}")
        configuration = described(llm)
        if known is not None:
            read = f"{known.n_requests} requests, {known.n_tokens:,} tokens of {known.corpus or 'unknown text'}"
            configuration["Profile"] = read + (f", {known.created}" if known.created else "")
        if frontier := next((each.frontier for each in work.contenders if each.frontier), None):
            plans = f"for each prompt, the fastest of {len(frontier.points)} plans that keeps the promise"
            configuration["Promises"] = f"{plans}, in nats per token"
        about = About(
            title=f"{os.path.basename(model)}: what skipping costs and brings",
            summary=f"{len(work.contenders) - 1} contenders against the whole model, begun {begun} UTC.",
            configuration={**configuration, **words, "Machine": machine.words},
            command=command or f"adaskip_cpp.evaluate({arguments})",
            settings=settings,
            notes=tuple(notes),
        )
        with contextlib.suppress(KeyboardInterrupt):
            on_progress(0.0)
            run(work, memo, llm, on_progress)
        found = evaluation_results(work, kept(work, memo), about)
        write_results(found, Path(folder))
    return found


def _memo(folder: Path, key: str) -> Memo:
    """Return the memo of the results with these settings; the folder is made if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error
    return Memo(folder / f"items-{key[:12]}.json", key)
