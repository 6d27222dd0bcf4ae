"""The function :func:`adaskip_cpp.bench`: measures how fast a model is with and without plans."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing

from ..errors import DataError
from ..files import StrPath
from ..measuring import corpus
from ..measuring.cores import busy_warning, load_average
from ..measuring.running import Running, described, open_quietly, settings_here
from ..model.frontier import Frontier
from ..model.plan import SkipPlan
from ..model.plan_file import frontier_beside
from ..progress import OnProgress
from .bench import Bench, BenchResult, BenchSettings

_DEFAULT_CONTEXTS = (512, 2048, 8192)


def bench(
    model: StrPath,
    plans: Mapping[str, SkipPlan | Frontier] | None = None,
    *,
    contexts: Sequence[int] | None = None,
    n_rounds: int = 12,
    n_decode: int = 32,
    stock: bool = True,
    running: Running | None = None,
    on_progress: OnProgress = lambda fraction, words="": None,
    tell: Callable[[str], None] = lambda note: None,
) -> BenchResult:
    """Measure the speed of plans, of the whole model and of stock llama-cpp-python.

    Each contender runs in processes of its own, which take turns. Ctrl-C, or the end of a contender's process, ends the
    measurement early. After the first round, the result so far is returned, and its ``ended_by`` has the reason.

    If ``tune`` found settings for the model on this machine, the whole model and plans use them. Stock then keeps its
    own defaults, so the whole model against stock is the gain of the settings. Otherwise all use the same settings.

    Args:
        model: a GGUF file.
        plans: plans by name, to compare with the whole model. A frontier chooses for each prompt the plan that keeps
            the default promise.
        contexts: tokens of the prompts; None for 512, 2048 and 8192, or fewer if the model allows fewer.
        n_rounds: number of times that each contender reads each prompt.
        n_decode: tokens timed after each prompt.
        stock: whether stock llama-cpp-python is a contender.
        running: threads and devices of all contenders.
        on_progress: called with the share of the work that is done, 0 to 1, and the name of the current contender.
        tell: called with sentences for the user, such as a warning of a busy machine.

    Returns:
        All times in seconds. Its ``rows`` have medians, and ratios with 95% intervals.

    Raises:
        AdaSkipError: the file is not a model, a plan does not fit, the model does not allow such a context, or a
            process ended in the first round.

    Examples:
        >>> result = bench("model.gguf", {"12 skipped": profile.plan(12)}, contexts=[2048])
        >>> for row in result.rows:
        ...     print(row.contender, row.phase, row.median_s)
    """
    model, plans, running = os.fspath(model), plans or {}, running or Running()
    frontier = next((each for each in plans.values() if isinstance(each, Frontier)), None) or frontier_beside(model)
    tuned = settings_here(frontier)
    options = running.options(tuned)
    with closing(open_quietly(model, 512, running, **options)) as llm:
        about, load, fitting = described(llm), load_average(), fit_contexts(contexts, llm.n_ctx_train, n_decode)
        for plan in plans.values():  # a plan that does not fit is refused before anything is measured
            for each in [point.plan for point in plan.points] if isinstance(plan, Frontier) else [plan]:
                llm.set_plan(each)
        tokens = corpus.cut(llm, corpus.text(()), 1, max(fitting[-1], 2))[0]
    if warning := busy_warning(load):
        tell(warning)
    stock_options = {**running.given(), "n_gpu_layers": running.gpu_layers} if tuned else options
    settings = BenchSettings(model, fitting, n_rounds, n_decode, options, stock_options)
    run = Bench(settings, plans, tokens, stock=stock, on_progress=on_progress)
    run.result.configuration, run.result.load_average = about, load
    return run.run()


def fit_contexts(asked: Sequence[int] | None, n_ctx_train: int, n_decode: int) -> tuple[int, ...]:
    """Return the contexts to measure, ascending; DataError if the model has no room for one and the decoded tokens."""
    limit = n_ctx_train - n_decode if n_ctx_train else max(asked or _DEFAULT_CONTEXTS)
    wanted = sorted(set(asked or [each for each in _DEFAULT_CONTEXTS if each <= limit] or [limit]))
    if wanted[0] < 1 or wanted[-1] > limit:
        raise DataError(
            f"a prompt of {wanted[-1]:,} tokens and {n_decode} decoded tokens do not fit into the model's context of "
            f"{n_ctx_train:,}; use contexts from 1 to {limit:,} (contexts, --contexts), or decode fewer (n_decode, "
            "--decode-tokens)"
        )
    return tuple(wanted)
