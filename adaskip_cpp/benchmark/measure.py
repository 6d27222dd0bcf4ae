"""Measures how fast a model is with and without plans: the function :func:`adaskip_cpp.bench`."""

import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from importlib import metadata

import numpy as np

from ..calibration.calibrate import calibrate
from ..engine.llama import AdaSkipLlama
from ..engine.settings import cost_settings
from ..errors import DataError
from ..files import StrPath
from ..measuring import corpus
from ..measuring.cores import is_busy, load_average, physical_cores
from ..measuring.running import Running, open_quietly
from ..model.arrays import Flags
from ..model.frontier import Frontier
from ..model.plan import SkipPlan
from ..planning.profile import Profile
from ..planning.request import PlanRequest
from ..planning.strategies import make_plan
from ..progress import OnProgress
from .bench import Bench, BenchResult, BenchSettings, Configuration

_DEFAULT_CONTEXTS = (512, 2048, 8192)
N_REQUESTS, N_TOKENS, N_DECODE = 6, 512, 16
"""Of a brief calibration: enough for a plan to be timed, not for one to be used."""


def bench(
    model: StrPath,
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
        on_progress: takes the share of the prompts' tokens that were read, 0 to 1, and what runs now.
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
    calibrates = profile is None and any(map(learns, requests))
    n_ctx = max([N_TOKENS + N_DECODE, *((contexts or (2048,)) if calibrates and predicts else ())])
    with closing(open_quietly(model, n_ctx, running)) as llm:
        if profile is not None:
            profile.model.check(llm.model_info, "the profile", model)
        about = _configuration(llm)
        fitting, note = fit_contexts(contexts, llm.n_ctx_train, n_decode)
        if note:
            tell(note)
        if calibrates:
            timing = ", and timing the sublayers" if predicts else ""
            size = f"{N_REQUESTS} requests of {N_TOKENS} tokens"
            tell(f"No profile: calibrating on {size}{timing}.")
            profile = calibrate(llm, corpus.requests(llm, N_REQUESTS, N_TOKENS), n_decode=N_DECODE, cost=predicts)
        source, longest = profile or Profile.blank(llm.model_info), fitting[-1]
        made: dict[str, SkipPlan] = {}
        for name, each in plans.items():
            if isinstance(each, PlanRequest):
                made[name] = make_plan(source, each.at(longest))
            elif (plan := each.choose(longest, edited=True) if isinstance(each, Frontier) else each) is not None:
                made[name] = plan
            else:
                tell(f"No plan of {name!r} keeps the default promise for {longest:,} tokens: it is left out.")
        if predicts and profile and profile.cost and (note := profile.cost.settings.note(cost_settings(llm))):
            tell(note)
        tokens, skippable = _material(llm, made.values(), longest)
    if about.busy:
        tell(
            f"Warning: the load average is {about.load_average}; unless that comes from what you ran just before, "
            "other programs disturb the times."
        )
    n_threads, flash_attention = running.n_threads or physical_cores(), bool(running.flash_attn)
    settings = BenchSettings(model, fitting, n_rounds, n_decode, n_threads, running.gpu_layers, flash_attention)
    may = skippable if ideal else None
    run = Bench(settings, made, tokens, skippable=may, stock=stock, on_progress=on_progress)
    run.result.about = about
    return run.run()


def learns(request: PlanRequest) -> bool:
    """Whether a request needs a profile; lists of layers without compensation need the number of layers only."""
    return request.strategy != "manual" or request.compensation != "none"


def _configuration(llm: AdaSkipLlama) -> Configuration:
    from gguf import LlamaFileType

    try:
        file_type = LlamaFileType(int(llm.metadata.get("general.file_type", "")))
        quantisation = file_type.name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        quantisation = "unknown"
    load = load_average()
    file = os.path.basename(llm.model_path)
    return Configuration(
        model=llm.metadata.get("general.name") or file,
        file=file,
        architecture=llm.model_info.architecture,
        fingerprint=llm.model_info.fingerprint,
        n_layer=llm.n_layer,
        file_bytes=os.path.getsize(llm.model_path),
        quantisation=quantisation,
        adaskip_cpp=metadata.version("adaskip-cpp"),
        llama_cpp_python=metadata.version("llama-cpp-python"),
        python=platform.python_version(),
        os=f"{platform.system()} {platform.release()}",
        load_average=None if load is None else round(load, 2),
        busy=is_busy(load),
    )


def fit_contexts(asked: Sequence[int] | None, n_ctx_train: int, n_decode: int) -> tuple[tuple[int, ...], str]:
    """Return the contexts to measure, ascending, and a line that says what was changed, "" if nothing."""
    wanted = sorted(set(_DEFAULT_CONTEXTS if asked is None else asked))
    limit = n_ctx_train - n_decode if n_ctx_train else wanted[-1]
    if wanted[0] < 1 or limit < 1:
        raise DataError(
            f"no prompt of {wanted[0]} tokens with {n_decode} decoded behind it fits into the model's context of "
            f"{n_ctx_train:,}; use contexts of 1 or more (--contexts) and decode fewer (n_decode, --decode-tokens)"
        )
    if asked is not None and n_ctx_train and wanted[-1] > n_ctx_train:
        raise DataError(
            f"a context of {wanted[-1]:,} tokens is beyond the model's {n_ctx_train:,}; use less (contexts, --contexts)"
        )
    fitting = sorted({min(context, limit) for context in wanted})
    listed = ", ".join(f"{context:,}" for context in fitting)
    note = f"Contexts are {listed}: the model's {n_ctx_train:,} tokens also hold the {n_decode} that are decoded."
    return tuple(fitting), "" if fitting == wanted else note


def _material(llm: AdaSkipLlama, plans: Iterable[SkipPlan], n_tokens: int) -> tuple[list[int], tuple[Flags, Flags]]:
    """Return text for prompts, and what can be skipped, bool ``[n_layer, 2]``, everywhere and in the bulk."""
    for plan in plans:
        llm.set_plan(plan)
    tokens = corpus.cut(llm, corpus.text(()), 1, max(n_tokens, 2))[0]
    may = np.array([(sublayer.skippable, sublayer.in_bulk) for sublayer in llm.sublayers])
    return tokens, (may[:, 0].reshape(-1, 2), may[:, 1].reshape(-1, 2))
