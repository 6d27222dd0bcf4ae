"""Runs a benchmark: contenders take turns, each in its own process, round after round. Start at :class:`Bench`.

Each round starts new processes. Two processes of one program differ in speed by a few percent as long as they live,
because their memory lies in other places. Kept processes would repeat this difference in every round: it would not
average out, and the intervals would be too narrow.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from ..errors import AdaSkipError
from ..measuring.timing import N_SETTLE, in_turn
from ..model.cost_model import CostSettings
from ..model.frontier import Frontier
from ..model.plan import SkipPlan
from ..progress import OnProgress
from .process import Worker
from .table import NO_PLAN, STOCK, BenchTimes, Row, table

_PAUSE_S = 0.03  # between two runs: the last contender's threads spin for some milliseconds before they sleep
_N_WARM_UP = 512  # most tokens that a new process reads untimed: one ubatch touches all weights and buffers


@dataclass(frozen=True)
class BenchSettings:
    """The settings of a benchmark.

    Attributes:
        model: the GGUF file.
        contexts: tokens of the prompts, ascending.
        n_rounds: number of times that each contender reads each prompt.
        n_decode: tokens timed after each prompt.
        options: arguments of ``AdaSkipLlama`` for the whole model and for plans, such as ``n_threads``.
        stock_options: arguments of ``llama_cpp.Llama`` for stock.
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
                {
                    "name": name,
                    "plans": {n: plan and plan.to_dict() for n, plan in self.plans_of(name).items()},
                }
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
    """A benchmark of plans and frontiers, by the names of their contenders, with or without stock.

    ``tokens`` are repeated for longer contexts.
    """

    def __init__(
        self,
        settings: BenchSettings,
        plans: Mapping[str, SkipPlan | Frontier],
        tokens: Sequence[int],
        *,
        stock: bool = True,
        on_progress: OnProgress = lambda fraction, words="": None,
    ) -> None:
        self._settings = settings
        self._on_progress = on_progress
        contenders = [*([STOCK] if stock else []), NO_PLAN, *plans]
        # Tokens that an online stage observes do not count, so that its choice is timed.
        fixed = [(name, plan.online) for name, plan in plans.items() if isinstance(plan, SkipPlan)]
        windows = {name: online.window for name, online in fixed if online is not None}
        settle = {name: window + N_SETTLE for name, window in windows.items() if window < settings.n_decode}
        self._tokens = list(itertools.islice(itertools.cycle(tokens), max(settings.contexts)))
        self._n_read = 0
        self.result = BenchResult(settings, dict(plans), BenchTimes(contenders, settle=settle))

    def run(self) -> BenchResult:
        """Run all rounds. Ctrl-C or a failed contender ends them early, and is raised only in the first round."""
        try:
            for n_round in range(self._settings.n_rounds):
                with ExitStack() as stack:
                    workers = self._start(stack, n_round)
                    for context in self._settings.contexts:
                        for index in in_turn(len(workers), n_round):
                            name = self.result.times.contenders[index]
                            self._time(workers[name], name, context, n_round)
        except (KeyboardInterrupt, AdaSkipError) as error:
            if not self.result.rows:
                raise
            self.result.ended_by = error
        return self.result

    def _start(self, stack: ExitStack, n_round: int) -> dict[str, Worker]:
        workers: dict[str, Worker] = {}
        for name in self.result.times.contenders:
            if n_round == 0:
                self._on_progress(0.0, f"loading {name}")
            workers[name] = stack.enter_context(Worker(name, "stock" if name == STOCK else "ours"))
            reply = workers[name].open(self._settings.model, self._options(name))
            if name == NO_PLAN:
                self.result.machine = reply["settings"]
        prompt = self._tokens[: min(self._settings.contexts[0], _N_WARM_UP)]
        for name, worker in workers.items():
            if n_round == 0:
                self._on_progress(0.0, f"warming up: {name}")
            worker.time(prompt, N_SETTLE)
        return workers

    def _options(self, name: str) -> dict[str, Any]:
        settings, plans = self._settings, self.result.plans
        options = settings.stock_options if name == STOCK else settings.options
        plan = {"plan": plans[name]} if name in plans else {}
        return {**options, **plan, "n_ctx": max(settings.contexts) + settings.n_decode}

    def _time(self, worker: Worker, name: str, context: int, n_round: int) -> None:
        n_rounds, contenders = self._settings.n_rounds, self.result.times.contenders
        share = self._n_read / (n_rounds * len(contenders) * sum(self._settings.contexts))
        self._on_progress(share, f"round {n_round + 1} of {n_rounds}, {context:,} tokens: {name}")
        time.sleep(_PAUSE_S)
        result = worker.time(self._tokens[:context], self._settings.n_decode)
        self._n_read += context
        self.result.times.times.setdefault((name, context), []).append(result)
