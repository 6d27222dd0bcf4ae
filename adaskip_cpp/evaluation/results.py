"""The result of an evaluation, which results.json, tables, pictures and reports show. Start at :class:`Results`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..files import json_text
from ..intervals import Interval
from ..model.plan import ModeName
from ..planning.compensation import DEFAULT_COMPENSATION

SPEEDS = {"prompt": "first_token", "prefill": "first_token", "decode": "per_token", "e2e": "request"}
"""By mode, the speed-up that quality is compared with: that of the part which the mode makes faster."""

TAILS = (99, 99.9)  # percentiles of the tokens' divergences, those that llama-perplexity reports
SPEED_NAMES = {"first_token": "first token", "per_token": "later tokens", "request": "whole request"}
_STRATEGY_NAMES = {
    "full": "whole model",
    "adaskip": "AdaSkip",
    "early_exit": "Early Exit",
    "skip_decode": "SkipDecode",
    "unified_skipping": "Unified Skipping",
    "tuned": "tuned plan",
}


@dataclass(frozen=True)
class Figure:
    """A mean over ``n`` items and its standard error, NaN for one item; or a quantile over ``n`` tokens, with NaN."""

    mean: float
    error: float
    n: int


@dataclass(frozen=True)
class Speed:
    """How many times as fast as the whole model, over rounds in which both ran, and the time in seconds."""

    speedup: Interval
    seconds: Figure


@dataclass(frozen=True)
class TaskScores:
    """The mean score of one task, 0 to 1, and the shares of its questions with the whole model's answer and score.

    The shares are None without an answer of the whole model.
    """

    score: Figure
    same_answer: Figure | None = None
    same_score: Figure | None = None


@dataclass(frozen=True)
class Named:
    """The names of a contender.

    Attributes:
        name: unique name, such as ``"adaskip-12-e2e-affine"``.
        strategy: strategy of the plan, ``"full"`` for the whole model.
        budget: ``"12"`` sublayers, or a promise of ``"0.05"``; "" for none.
        mode: mode of the plan; None for the whole model.
    """

    name: str
    strategy: str
    budget: str
    mode: ModeName | None
    compensation: str

    @property
    def series(self) -> str:
        """Name for people without the budget, such as ``AdaSkip affine``."""
        name = _STRATEGY_NAMES.get(self.strategy, self.strategy)
        return name if self.compensation == "none" else f"{name} {self.compensation}"

    @property
    def label(self) -> str:
        """Name for people, such as ``AdaSkip affine, 12``."""
        return f"{self.series}, {self.budget}" if self.budget else self.series

    @property
    def look(self) -> str:
        """Key of its line and marker in ``adaskip_cpp.pictures.plots.STRATEGY``, or a compensation without these."""
        is_default = self.strategy != "adaskip" or self.compensation == DEFAULT_COMPENSATION
        return self.strategy if is_default else self.compensation


@dataclass(frozen=True)
class Row(Named):
    """A contender with its figures.

    Attributes:
        n_skip_prefill: sublayers skipped in prompts, or in the bulk of the longest prompt.
        n_skip_decode: sublayers skipped in decode.
        speed: speeds of ``"first_token"``, ``"per_token"`` and ``"request"``; {} if nothing was timed.
        text: figures by kind of text (``"all"`` for all kinds) and by name: ``loss`` and ``added_loss`` in nats per
            token, ``perplexity``, divergence ``kl`` in nats per token, its quantiles ``kl_99`` and ``kl_99.9`` over all
            tokens, ``agreement``. A figure is missing if it was not measured or is not a number.
        questions: scores by task.
    """

    n_skip_prefill: int = 0
    n_skip_decode: int = 0
    speed: dict[str, Speed] = field(default_factory=dict)
    text: dict[str, dict[str, Figure]] = field(default_factory=dict)
    questions: dict[str, TaskScores] = field(default_factory=dict)

    @property
    def speedup(self) -> Interval | None:
        """The measured speed-up of the part that its mode makes faster; None if it was not timed."""
        return self.speed[SPEEDS[self.mode]].speedup if self.mode and self.speed else None

    def figure(self, name: str, kind: str = "all") -> Figure | None:
        """Return a figure of ``text`` by name, such as ``"added_loss"``, for a kind of text; None if it is missing."""
        return self.text.get(kind, {}).get(name)

    def score(self, task: str) -> Figure | None:
        """Return the score of a task, by name; None if it is missing."""
        return self.questions[task].score if task in self.questions else None


@dataclass(frozen=True)
class About:
    """A description of an evaluation, with a title, a summary and notes for people.

    Attributes:
        configuration: model, machine and texts in words, by name.
        command: a command that repeats the evaluation.
        settings: the settings that results depend on, as plain JSON values.
    """

    title: str
    summary: str
    configuration: Mapping[str, str]
    command: str
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Results:
    """The result of ``evaluate``, also of an unfinished evaluation, as it is in ``results.json``.

    Attributes:
        n_done: number of single results that are measured.
        n_results: number of all single results.
        contenders: contenders with their figures, the whole model first.
    """

    n_done: int
    n_results: int
    about: About
    contenders: tuple[Row, ...]
    format: str = "adaskip-evaluation"
    version: int = 4

    def to_json(self) -> str:
        """Return the content of ``results.json``. NaN is null there."""
        return json_text(self)

    @property
    def full(self) -> Row:
        """The whole model."""
        return self.contenders[0]

    def of_mode(self, mode: str) -> list[Row]:
        """Return the contenders in a mode, the slowest first."""
        mine = [row for row in self.contenders if row.mode == mode]
        return sorted(mine, key=lambda row: 0.0 if row.speedup is None else row.speedup.value)

    @property
    def tasks(self) -> list[str]:
        """Names of all tasks."""
        return list(dict.fromkeys(task for row in self.contenders for task in row.questions))

    @property
    def notes(self) -> list[str]:
        """Notes for the reader, the first one if the evaluation is not finished."""
        unfinished = f"This is not finished: {self.n_done} of {self.n_results} results. Run the same command again."
        return [*([unfinished] if self.n_done < self.n_results else []), *self.about.notes]
