"""Measures how fast a model is with and without plans, in rounds. Start at :func:`adaskip_cpp.bench`.

Contenders take turns, each in its own process, and each round starts new processes. Two processes of one program differ
in speed by a few percent as long as they live, because their memory lies in other places. Kept processes would repeat
this difference in every round: it would not average out, and the intervals would be too narrow.
"""

import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any

from ..engine.cores import busy_warning, load_average
from ..errors import AdaSkipError, DataError
from ..files import StrPath
from ..measuring import corpus
from ..measuring.running import Running, described, open_quietly, settings_here
from ..measuring.timing import N_SETTLE, in_turn
from ..model.cost_model import CostSettings
from ..model.frontier import Frontier
from ..model.plan import SkipPlan
from ..model.plan_file import frontier_beside
from ..progress import OnProgress
from .process import Worker
from .table import NO_PLAN, STOCK, BenchTimes, Row, table

_DEFAULT_CONTEXTS = (512, 2048, 8192)
_PAUSE_S = 0.03  # between two runs: the last contender's threads spin for some milliseconds before they sleep
_N_WARM_UP = 512  # most tokens that a new process reads untimed: one ubatch touches all weights and buffers


@dataclass(frozen=True)
class BenchSettings:
    """The settings of a benchmark: arguments of ``bench``, with ``contexts`` ascending.

    ``options`` are arguments of ``AdaSkipLlama`` for the whole model and for plans, such as ``n_threads``, and
    ``stock_options`` those of ``llama_cpp.Llama`` for stock.
    """

    model: str
    contexts: tuple[int, ...]
    n_rounds: int
    n_decode: int
    options: Mapping[str, Any]
    stock_options: Mapping[str, Any]


@dataclass
class BenchResult:
    """The result of ``bench``, by contender.

    Attributes:
        settings: contexts, rounds and the arguments of both libraries.
        plans: the plans by name. A frontier chooses a plan for each prompt.
        times: the time of each run, in seconds.
        machine: the machine; None before the whole model was loaded.
        ended_by: the reason if the benchmark ended early, else None.
        configuration: the model and the releases in words, by name.
        load_average: load of the machine before the benchmark; None if the system does not measure it.
    """

    settings: BenchSettings
    plans: Mapping[str, SkipPlan | Frontier]
    times: BenchTimes
    machine: CostSettings | None = None
    ended_by: AdaSkipError | KeyboardInterrupt | None = None
    configuration: Mapping[str, str] = field(default_factory=dict)
    load_average: float | None = None

    @property
    def rows(self) -> list[Row]:
        """Medians and ratios of all complete rounds, one row for each phase, context and contender."""
        return table(self.times)

    def plans_of(self, name: str) -> dict[int, SkipPlan | None]:
        """Return the plans of a contender by context; None for the whole model."""
        plan = self.plans.get(name)
        if isinstance(plan, Frontier):
            return {context: plan.choose(context) for context in self.settings.contexts}
        return dict.fromkeys(self.settings.contexts, plan)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "configuration": self.configuration,
            "load_average": self.load_average,
            "settings": self.settings,
            "machine": self.machine,
            "complete": self.ended_by is None,
            "error": str(self.ended_by) if isinstance(self.ended_by, AdaSkipError) else None,
            "contenders": [
                {"name": name, "plans": {n: plan and plan.to_dict() for n, plan in self.plans_of(name).items()}}
                for name in self.times.contenders
            ],
            "times": [
                {
                    "contender": name,
                    "context": context,
                    "first_token_s": [run.first_token_s for run in runs],
                    "token_s": [run.token_s for run in runs],
                }
                for (name, context), runs in self.times.times.items()
            ],
            "rows": [row.to_dict() for row in self.rows],
        }


class Bench:
    """A benchmark of plans and frontiers, by contender, with or without stock. Longer contexts repeat ``tokens``."""

    def __init__(
        self,
        settings: BenchSettings,
        plans: Mapping[str, SkipPlan | Frontier],
        tokens: Sequence[int],
        *,
        stock: bool = True,
        on_progress: OnProgress = lambda fraction, words="": None,
    ) -> None:
        self._settings, self._on_progress = settings, on_progress
        self._tokens = list(itertools.islice(itertools.cycle(tokens), max(settings.contexts)))
        contenders = [*([STOCK] if stock else []), NO_PLAN, *plans]
        # Tokens that an online stage observes do not count, so that its choice is timed.
        stages = {name: plan.online for name, plan in plans.items() if isinstance(plan, SkipPlan)}
        windows = {name: stage.window for name, stage in stages.items() if stage is not None}
        settle = {name: window + N_SETTLE for name, window in windows.items() if window < settings.n_decode}
        self.result = BenchResult(settings, dict(plans), BenchTimes(contenders, settle=settle))

    def run(self) -> BenchResult:
        """Run all rounds. Ctrl-C or a failed contender ends them early, and is raised only in the first round."""
        try:
            for n_round in range(self._settings.n_rounds):
                with ExitStack() as stack:
                    workers = self._start(stack, n_round)
                    for context in self._settings.contexts:
                        for index in in_turn(len(workers), n_round):
                            self._time(workers[index], context, n_round)
        except (KeyboardInterrupt, AdaSkipError) as error:
            if not self.result.rows:
                raise
            self.result.ended_by = error
        return self.result

    def _start(self, stack: ExitStack, n_round: int) -> list[Worker]:
        settings, plans = self._settings, self.result.plans
        n_ctx = max(settings.contexts) + settings.n_decode
        workers: list[Worker] = []
        for name in self.result.times.contenders:
            if n_round == 0:
                self._on_progress(0.0, f"loading {name}")
            worker = stack.enter_context(Worker(name, "stock" if name == STOCK else "ours"))
            workers.append(worker)
            options = settings.stock_options if name == STOCK else settings.options
            plan = {"plan": plans[name]} if name in plans else {}
            reply = worker.open(settings.model, {**options, **plan, "n_ctx": n_ctx})
            if name == NO_PLAN:
                self.result.machine = reply["settings"]
        for worker in workers:
            if n_round == 0:
                self._on_progress(0.0, f"warming up: {worker.name}")
            worker.time(self._tokens[: min(settings.contexts[0], _N_WARM_UP)], min(N_SETTLE, settings.n_decode))
        return workers

    def _time(self, worker: Worker, context: int, n_round: int) -> None:
        times, n_rounds = self.result.times, self._settings.n_rounds
        n_read = sum(of * len(runs) for (_, of), runs in times.times.items())
        share = n_read / (n_rounds * len(times.contenders) * sum(self._settings.contexts))
        self._on_progress(share, f"round {n_round + 1} of {n_rounds}, {context:,} tokens: {worker.name}")
        time.sleep(_PAUSE_S)
        run = worker.time(self._tokens[:context], self._settings.n_decode)
        times.times.setdefault((worker.name, context), []).append(run)


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
    stock_options = {**running.given(), "n_gpu_layers": running.gpu_layers} if tuned else {**options}
    if stock_options.get("flash_attn") == "prompts":  # which stock would take for everywhere
        del stock_options["flash_attn"]
    settings = BenchSettings(model, fitting, n_rounds, n_decode, options, stock_options)
    run = Bench(settings, plans, tokens, stock=stock, on_progress=on_progress)
    run.result.configuration, run.result.load_average = about, load
    return run.run()


def fit_contexts(asked: Sequence[int] | None, n_ctx_train: int, n_decode: int) -> tuple[int, ...]:
    """Return the contexts to measure, ascending; DataError if the model has no room for one and the decoded tokens."""
    limit = n_ctx_train - n_decode if n_ctx_train else max(asked or _DEFAULT_CONTEXTS)
    wanted = sorted(set(asked or [each for each in _DEFAULT_CONTEXTS if each <= limit] or [limit]))
    if wanted[0] < 1 or wanted[-1] > limit:
        lengths = f"a prompt of {wanted[-1]:,} tokens and {n_decode} decoded tokens"
        advice = f"use contexts from 1 to {limit:,} (contexts, --contexts), or decode fewer (n_decode, --decode-tokens)"
        raise DataError(f"{lengths} do not fit into the model's context of {n_ctx_train:,}; {advice}")
    return tuple(wanted)
