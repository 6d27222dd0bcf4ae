"""Measures how fast a model is with and without plans: the function :func:`adaskip_cpp.bench`."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing

from ..engine.settings import cost_settings
from ..measuring.cores import physical_cores
from ..measuring.running import Running, open_quietly
from ..model.frontier import Frontier
from ..model.identity import check_gguf
from ..model.plan import SkipPlan
from ..planning.profile import Profile
from ..planning.request import PlanRequest
from ..planning.strategies import make_plan
from ..progress import OnProgress
from . import subject
from .bench import Bench, BenchResult, BenchSettings


def bench(
    model: str | os.PathLike[str],
    plans: Mapping[str, SkipPlan | PlanRequest | Frontier] | None = None,
    *,
    profile: Profile | None = None,
    contexts: Sequence[int] | None = None,
    n_rounds: int = 12,
    n_decode: int = 32,
    stock: bool = True,
    ideal: bool = True,
    running: Running | None = None,
    on_progress: OnProgress = lambda fraction, words="": None,
    tell: Callable[[str], None] = lambda note: None,
) -> BenchResult:
    """Measure the time to the first token and per token, each contender in processes of its own that take turns.

    Ctrl-C, or the end of a contender's process, ends it early. From the second round on, what was measured is returned
    all the same, and its ``ended_by`` says why.

    Args:
        model: a GGUF file.
        plans: plans by name, beside the whole model. A request becomes a plan for the longest prompt, a frontier the
            plan that it chooses for that.
        profile: of this model, for the requests. Without one the model is calibrated briefly where they need it.
        contexts: tokens of the prompts; None for 512, 2048 and 8192, cut to what the model allows.
        n_rounds: how often each contender reads each prompt.
        n_decode: tokens timed after each prompt.
        stock: whether stock llama-cpp-python is a contender.
        ideal: whether the skipped sublayers are timed by themselves.
        running: threads and devices, the same for all contenders.
        on_progress: takes the share of the expected time that has passed, 0 to 1, and what runs now.
        tell: takes sentences for the user: shorter prompts, a calibration, a busy machine.

    Returns:
        All times in seconds; ``rows`` are medians, and ratios with 95% intervals.

    Raises:
        AdaSkipError: the file is no model, the profile is another model's, a plan does not fit, the model allows no
            such context, or a process ended in the first round.
    """
    model, plans, running = os.fspath(model), plans or {}, running or Running()
    requests = [each for each in plans.values() if isinstance(each, PlanRequest)]
    predicts = any(each.speedup is not None for each in requests)
    calibrates = profile is None and any(map(subject.learns, requests))
    check_gguf(model)
    n_ctx = max([subject.N_TOKENS + subject.N_DECODE, *((contexts or (2048,)) if calibrates and predicts else ())])
    with closing(open_quietly(model, n_ctx, running)) as llm:
        if profile is not None:
            profile.model.check(llm.model_info, "the profile", model)
        about = subject.configuration(llm)
        fitting, note = subject.fit_contexts(contexts, llm.n_ctx_train, n_decode)
        if note:
            tell(note)
        if calibrates:
            timing = ", and timing the sublayers" if predicts else ""
            size = f"{subject.N_REQUESTS} requests of {subject.N_TOKENS} tokens"
            tell(f"No profile: calibrating on {size}{timing}.")
            profile = subject.brief_profile(llm, cost=predicts)
        source, longest = profile or llm.n_layer, fitting[-1]
        made: dict[str, SkipPlan] = {}
        for name, each in plans.items():
            if isinstance(each, PlanRequest):
                made[name] = make_plan(source, each.at(longest))
            elif (plan := each.choose(longest) if isinstance(each, Frontier) else each) is not None:
                made[name] = plan
            else:
                tell(f"No plan of {name!r} keeps the default promise for {longest:,} tokens: it is left out.")
        if predicts and profile and profile.cost and (note := profile.cost.settings.note(cost_settings(llm))):
            tell(note)
        tokens, skippable, in_bulk = subject.material(llm, made.values(), longest)
    if about.busy:
        tell(
            f"Warning: the load average is {about.load_average}; unless that comes from what you ran just before, "
            "other programs disturb the times."
        )
    settings = BenchSettings(
        model,
        fitting,
        n_rounds,
        n_decode,
        running.n_threads or physical_cores(),
        running.gpu_layers,
        bool(running.flash_attn),
    )
    run = Bench(
        settings,
        made,
        tokens,
        skippable=skippable if ideal else None,
        in_bulk=in_bulk,
        stock=stock,
        on_progress=on_progress,
    )
    run.result.about = about
    return run.run()
