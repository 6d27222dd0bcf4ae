"""The result of an evaluation, which results.json, tables, pictures and reports show. Start at :class:`Results`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..files import json_text
from ..intervals import Interval
from ..model.mode import ModeName
from ..planning.compensation import DEFAULT_COMPENSATION

SPEEDS = {"prompt": "first_token", "prefill": "first_token", "decode": "per_token", "e2e": "request"}
"""By mode, the speed-up that quality is compared with: that of the part which the mode makes faster."""

TAILS = (99, 99.9)  # percentiles of the tokens' divergences, those that llama-perplexity reports
SPEED_NAMES = {"first_token": "first token", "per_token": "later tokens", "request": "whole request"}
_STRATEGY_NAMES = {
    "full": "whole model",
    "adaskip": "AdaSkip",
    "early_exit": "Early Exit",
    "suffix": "suffix of layers",
    "skip_decode": "SkipDecode",
    "unified_skipping": "Unified Skipping",
    "tuned": "tuned plan",
}


@dataclass(frozen=True)
class Figure:
    """A mean over ``n`` items and its standard error; or a quantile over ``n`` tokens. The error is NaN if unknown."""

    mean: float
    error: float
    n: int


@dataclass(frozen=True)
class Speed:
    """The speed-up against the whole model, over the rounds in which both ran; and seconds."""

    speedup: Interval
    seconds: Figure


@dataclass(frozen=True)
class Cell:
    """Scores of the questions of one length in tokens and one depth, None for tasks without depth."""

    length: int
    depth: float | None
    score: Figure


@dataclass(frozen=True)
class TaskScores:
    """Scores of one task's questions, 0 to 1. Comparisons are None if the whole model has no scores."""

    score: Figure
    difference: Figure | None = None  # from the whole model's scores, item by item
    same_answer: Figure | None = None  # share of the questions with the whole model's answer, apart from outer blanks
    same_score: Figure | None = None  # share of the questions with the whole model's score
    cells: tuple[Cell, ...] = ()  # by length and depth, if the task has several of either


@dataclass(frozen=True)
class Named:
    """The identity of a contender."""

    name: str  # unique, such as "adaskip-12-e2e-affine"
    strategy: str
    budget: str  # the request: "12" sublayers, a speed-up of "1.2x", a promise of "0.05", or ""
    mode: ModeName | None  # None for the whole model
    compensation: str

    @property
    def series(self) -> str:
        """A name for people without the budget, such as ``AdaSkip affine``."""
        name = _STRATEGY_NAMES.get(self.strategy, self.strategy)
        return name if self.compensation == "none" else f"{name} {self.compensation}"

    @property
    def label(self) -> str:
        """A name for people, such as ``AdaSkip affine, 1.2 x asked``."""
        return f"{self.series}, {self.budget.replace('x', ' x asked')}" if self.budget else self.series

    @property
    def look(self) -> str:
        """A key in :data:`adaskip_cpp.pictures.plots.STRATEGY`, or a compensation, which may not be in it."""
        is_default = self.strategy != "adaskip" or self.compensation == DEFAULT_COMPENSATION
        return self.strategy if is_default else self.compensation


@dataclass(frozen=True)
class Row(Named):
    """A contender and its figures.

    ``text`` has figures by kind of text (``"all"`` for all kinds) and by name: ``loss``, ``added_loss`` and ``kl`` in
    nats per token, ``perplexity``, the quantiles ``kl_99`` and ``kl_99.9`` over the tokens of all items, ``agreement``,
    ``rouge_l`` with the whole model's text. Figures that are unknown or not finite are missing.
    """

    n_skip_prefill: int = 0  # sublayers skipped in prompts, or in the bulk of the longest one
    n_skip_decode: int = 0
    speed: dict[str, Speed] = field(default_factory=dict)  # by the names in SPEED_NAMES; {} if nothing was timed
    text: dict[str, dict[str, Figure]] = field(default_factory=dict)
    questions: dict[str, TaskScores] = field(default_factory=dict)  # by task

    @property
    def speedup(self) -> Interval | None:
        """The measured speed-up of its mode, see :data:`SPEEDS`; None if it was not timed."""
        return self.speed[SPEEDS[self.mode]].speedup if self.mode and self.speed else None

    def figure(self, name: str, kind: str = "all") -> Figure | None:
        return self.text.get(kind, {}).get(name)

    def score(self, task: str) -> Figure | None:
        return self.questions[task].score if task in self.questions else None

    def cells(self, task: str) -> dict[tuple[int, float | None], Figure]:
        cells = self.questions[task].cells if task in self.questions else ()
        return {(cell.length, cell.depth): cell.score for cell in cells}


@dataclass(frozen=True)
class About:
    """The conditions of an evaluation: in words for people, as a command, and as JSON values (``settings``)."""

    title: str
    summary: str
    configuration: Mapping[str, str]
    command: str
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Results:
    """All figures of an evaluation, which may be unfinished."""

    n_done: int  # single results so far
    n_results: int  # single results in the end
    about: About
    contenders: tuple[Row, ...]  # the whole model first
    format: str = "adaskip-evaluation"
    version: int = 3

    def to_json(self) -> str:
        """Return the content of ``results.json``, with null for NaN."""
        return json_text(self)

    @property
    def full(self) -> Row:
        return self.contenders[0]

    def of_mode(self, mode: str) -> list[Row]:
        """Return the contenders in a mode, the slowest first, so that those of equal speed can be compared."""
        mine = [row for row in self.contenders if row.mode == mode]
        return sorted(mine, key=lambda row: 0.0 if row.speedup is None else row.speedup.value)

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(task for row in self.contenders for task in row.questions))

    @property
    def notes(self) -> list[str]:
        """Notes for the reader; the first one says if the evaluation is unfinished."""
        unfinished = f"This is not finished: {self.n_done} of {self.n_results} results. Run the same command again."
        return [*([unfinished] if self.n_done < self.n_results else []), *self.about.notes]
