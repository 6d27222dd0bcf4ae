"""The function :func:`adaskip_cpp.bench`: measures how fast a model is with and without plans."""

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
N_REQUESTS, N_TOKENS, N_DECODE = 6, 512, 16  # of a brief calibration: enough to time a plan, not to use it


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
    """Measure the speed of plans, of the whole model and of stock llama-cpp-python.

    Each contender runs in processes of its own, which take turns. Ctrl-C, or the end of a contender's process, ends the
    measurement early. After the first round, the result so far is returned, and its ``ended_by`` has the reason.

    Args:
        model: a GGUF file.
        plans: plans by name, to compare with the whole model. A request becomes a plan for the longest prompt. A
            frontier becomes the plan that keeps the default promise there.
        profile: a profile of this model, for requests. None calibrates the model briefly if a request needs it.
        contexts: tokens of the prompts; None for 512, 2048 and 8192, or fewer if the model allows fewer.
        n_rounds: number of times that each contender reads each prompt.
        n_decode: tokens timed after each prompt.
        stock: whether stock llama-cpp-python is a contender.
        ideal: whether the skipped sublayers are timed by themselves, for the ideal speed-up.
        running: threads and devices of all contenders.
        on_progress: called with the share of the work that is done, 0 to 1, and the name of the current contender.
        tell: called with sentences for the user, such as a warning of a busy machine.

    Returns:
        All times in seconds. Its ``rows`` have medians, and ratios with 95% intervals.

    Raises:
        AdaSkipError: the file is not a model, the profile is of another model, a plan does not fit, the model does not
            allow such a context, or a process ended in the first round.

    Examples:
        >>> result = bench("model.gguf", {"12 skipped": PlanRequest(12)}, contexts=[2048])
        >>> for row in result.rows:
        ...     print(row.contender, row.phase, row.median_s)
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
                tell(f"No plan of {name!r} keeps the default promise for {longest:,} tokens. It is left out.")
        if predicts and profile and profile.cost and (note := profile.cost.settings.note(cost_settings(llm))):
            tell(note)
        tokens, skippable = _material(llm, made.values(), longest)
    if about.busy:
        tell(
            f"Warning: the load average is {about.load_average}. If other programs are running, they disturb the "
            "times: close them, and start again."
        )
    n_threads, flash_attention = running.n_threads or physical_cores(), bool(running.flash_attn)
    settings = BenchSettings(model, fitting, n_rounds, n_decode, n_threads, running.gpu_layers, flash_attention)
    may = skippable if ideal else None
    run = Bench(settings, made, tokens, skippable=may, stock=stock, on_progress=on_progress)
    run.result.about = about
    return run.run()


def learns(request: PlanRequest) -> bool:
    """Return whether a request needs a profile. Lists of layers without compensation need none."""
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
    """Return the contexts to measure, ascending, and a note for the user if they differ from those asked for."""
    wanted = sorted(set(_DEFAULT_CONTEXTS if asked is None else asked))
    limit = n_ctx_train - n_decode if n_ctx_train else wanted[-1]
    if wanted[0] < 1 or limit < 1:
        raise DataError(
            f"a prompt of {wanted[0]} tokens and {n_decode} decoded tokens do not fit into the model's context of "
            f"{n_ctx_train:,}; use contexts of 1 or more (--contexts) and decode fewer (n_decode, --decode-tokens)"
        )
    if asked is not None and n_ctx_train and wanted[-1] > n_ctx_train:
        raise DataError(
            f"a context of {wanted[-1]:,} tokens is beyond the model's {n_ctx_train:,}; use less (contexts, --contexts)"
        )
    fitting = sorted({min(context, limit) for context in wanted})
    listed = ", ".join(f"{context:,}" for context in fitting)
    note = f"Contexts are {listed}: the model's context of {n_ctx_train:,} must also hold {n_decode} decoded tokens."
    return tuple(fitting), "" if fitting == wanted else note


def _material(llm: AdaSkipLlama, plans: Iterable[SkipPlan], n_tokens: int) -> tuple[list[int], tuple[Flags, Flags]]:
    """Check the plans; return tokens for prompts, and the sublayers that can be skipped, see :class:`Bench`."""
    for plan in plans:
        llm.set_plan(plan)
    tokens = corpus.cut(llm, corpus.text(()), 1, max(n_tokens, 2))[0]
    may = np.array([(sublayer.skippable, sublayer.in_bulk) for sublayer in llm.sublayers])
    return tokens, (may[:, 0].reshape(-1, 2), may[:, 1].reshape(-1, 2))
