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
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import numpy as np

from ..errors import AdaSkipError
from ..measuring.timing import N_SETTLE, in_turn
from ..model.arrays import Flags
from ..model.cost_model import CostSettings
from ..model.frontier import Frontier
from ..model.plan import Bulk, Phase, SkipPlan
from ..model.skip_set import SkipSet
from ..progress import OnProgress
from .process import Usage, Worker
from .table import KEPT, NO_PLAN, REST, STOCK, BenchTimes, Row, table

_PAUSE_S = 0.03  # between two runs: the last contender's threads spin for some milliseconds before they sleep
_N_WARM_UP = 512  # most tokens that a new process reads untimed: one ubatch touches all weights and buffers
_IDEAL = "the ideal"  # name of the process that makes all runs for the ideals

_Parts: TypeAlias = dict[str, dict[Phase, tuple[str, str]]]


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
        usage: memory of each contender's last process, in bytes.
        machine: the machine; None before the whole model was loaded.
        ended_by: the reason if the benchmark ended early, else None.
        configuration: the model and the releases in words, by name.
        load_average: load of the machine before the benchmark; None if the system does not measure it.
    """

    settings: BenchSettings
    plans: Mapping[str, SkipPlan | Frontier]
    times: BenchTimes
    usage: dict[str, Usage] = field(default_factory=dict)
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
                    **(asdict(self.usage[name]) if name in self.usage else {}),
                }
                for name in self.times.contenders
            ],
            "times": [
                {
                    "run": name,
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

    ``tokens`` are repeated for longer contexts. ``skippable`` are the sublayers that can be skipped everywhere, and
    those that can be skipped in the bulk, each bool ``[n_layer, 2]``. With them, the ideal of each plan is measured
    too, but not of a frontier.
    """

    def __init__(
        self,
        settings: BenchSettings,
        plans: Mapping[str, SkipPlan | Frontier],
        tokens: Sequence[int],
        *,
        skippable: tuple[Flags, Flags] | None = None,
        stock: bool = True,
        on_progress: OnProgress = lambda fraction, words="": None,
    ) -> None:
        self._settings = settings
        self._on_progress = on_progress
        contenders = [*([STOCK] if stock else []), NO_PLAN, *plans]
        fixed = {name: plan for name, plan in plans.items() if isinstance(plan, SkipPlan)}
        parts, ideal = ({}, {}) if skippable is None else _ideal(fixed, *skippable)
        # Tokens that an online stage observes do not count, so that its choice is timed.
        windows = {name: plan.online.window for name, plan in fixed.items() if plan.online is not None}
        settle = {name: window + N_SETTLE for name, window in windows.items() if window < settings.n_decode}
        # The runs of a round. Each contender has its own process (value None); the runs for the ideals share one.
        self._runs: dict[str, SkipPlan | None] = {**dict.fromkeys(contenders), **ideal}
        self._tokens = list(itertools.islice(itertools.cycle(tokens), max(settings.contexts)))
        self._n_read = 0
        self.result = BenchResult(settings, dict(plans), BenchTimes(contenders, parts=parts, settle=settle))

    def run(self) -> BenchResult:
        """Run all rounds. Ctrl-C or a failed contender ends them early, and is raised only in the first round."""
        try:
            for n_round in range(self._settings.n_rounds):
                with ExitStack() as stack:
                    workers = self._start(stack, n_round)
                    for context in self._settings.contexts:
                        for index in in_turn(len(self._runs), n_round):
                            name = [*self._runs][index]
                            self._time(workers[self._process(name)], name, context, n_round)
        except (KeyboardInterrupt, AdaSkipError) as error:
            if not self.result.rows:
                raise
            self.result.ended_by = error
        return self.result

    def _start(self, stack: ExitStack, n_round: int) -> dict[str, Worker]:
        workers: dict[str, Worker] = {}
        for name in dict.fromkeys(map(self._process, self._runs)):
            if n_round == 0:
                self._on_progress(0.0, f"loading {name}")
            workers[name] = stack.enter_context(Worker(name, "stock" if name == STOCK else "ours"))
            reply = workers[name].open(self._settings.model, self._options(name))
            if name == NO_PLAN:
                self.result.machine = reply["settings"]
        prompt = self._tokens[: min(self._settings.contexts[0], _N_WARM_UP)]
        for name, plan in self._runs.items():
            if n_round == 0:
                self._on_progress(0.0, f"warming up: {name}")
            workers[self._process(name)].time(prompt, N_SETTLE, plan)
        return workers

    def _options(self, name: str) -> dict[str, Any]:
        settings, plans = self._settings, self.result.plans
        options = settings.stock_options if name == STOCK else settings.options
        plan = {"plan": plans[name]} if name in plans else {}
        return {**options, **plan, "n_ctx": max(settings.contexts) + settings.n_decode}

    def _time(self, worker: Worker, name: str, context: int, n_round: int) -> None:
        n_rounds, plan = self._settings.n_rounds, self._runs[name]
        share = self._n_read / (n_rounds * len(self._runs) * sum(self._settings.contexts))
        self._on_progress(share, f"round {n_round + 1} of {n_rounds}, {context:,} tokens: {name}")
        time.sleep(_PAUSE_S)
        result = worker.time(self._tokens[:context], self._settings.n_decode, plan)
        self._n_read += context
        self.result.times.times.setdefault((name, context), []).append(result)
        if plan is None:
            self.result.usage[name] = worker.usage

    def _process(self, name: str) -> str:
        return name if self._runs[name] is None else _IDEAL


def _ideal(plans: Mapping[str, SkipPlan], skippable: Flags, in_bulk: Flags) -> tuple[_Parts, dict[str, SkipPlan]]:
    """Return the names of the two runs that give each plan's ideal, by phase, and the plans of these runs by name."""
    names: dict[SkipPlan, str] = {}

    def pair(may: Flags, skip: Flags, name: str, rest: str, bulk: Bulk | None = None) -> tuple[str, str]:
        alone = names.setdefault(_skipping(may & ~skip, bulk), f"only what {name!r} skips")
        return alone, names.setdefault(_skipping(may, bulk), rest)

    parts: _Parts = {}
    for name, plan in plans.items():
        own: dict[Phase, tuple[str, str]] = {}
        if plan.bulk is None and plan.prefill.n_skip:
            own["prefill"] = pair(skippable, plan.prefill.skip, name, REST)
        elif plan.bulk and plan.bulk.skip.n_skip and not (plan.prefill.n_skip or plan.bulk.windowed):
            # A plan with another head or tail is compared with a run of its own.
            rest = f"{KEPT}, for {name!r}" if KEPT in names.values() else KEPT
            own["prefill"] = pair(in_bulk, plan.bulk.skip.skip, f"{name} in the bulk", rest, plan.bulk)
        if plan.decode.n_skip and not plan.schedule and plan.online is None:  # else the set changes within a request
            own["decode"] = pair(skippable, plan.decode.skip, f"{name} in decode" if own else name, REST)
        if own:
            parts[name] = own
    return parts, {name: plan for plan, name in names.items()}


def _skipping(skip: Flags, bulk: Bulk | None = None) -> SkipPlan:
    chosen, none = SkipSet(skip, np.ones(skip.shape)), SkipSet.none(len(skip))
    return SkipPlan(none, none, bulk=Bulk(chosen, head=bulk.head, tail=bulk.tail)) if bulk else SkipPlan(chosen, chosen)
