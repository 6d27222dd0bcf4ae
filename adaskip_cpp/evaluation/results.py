"""What an evaluation found: the one result behind results.json, the tables, the pictures and the reports."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..files import json_text
from ..intervals import Interval
from ..model.mode import ModeName
from ..planning.compensation import DEFAULT_COMPENSATION

SPEEDS = {"prompt": "first_token", "prefill": "first_token", "decode": "per_token", "e2e": "request"}
"""By mode, the speed-up that quality is read against: of what the mode makes faster."""

TAILS = (99, 99.9)
"""Percent of the tokens that have at most this divergence from the full model, as llama-perplexity tells them."""

SPEED_NAMES = {"first_token": "first token", "per_token": "later tokens", "request": "whole request"}
_STRATEGY_NAMES = {
    "full": "full model",
    "adaskip": "AdaSkip",
    "early_exit": "Early Exit",
    "suffix": "suffix of layers",
    "skip_decode": "SkipDecode",
    "unified_skipping": "Unified Skipping",
    "tuned": "tuned plan",
}


@dataclass(frozen=True)
class Figure:
    """A mean over ``n`` items and its standard error, NaN of a single item; or a quantile of ``n`` tokens, without."""

    mean: float
    error: float
    n: int


@dataclass(frozen=True)
class Speed:
    """How many times as fast as the full model, over rounds in which both ran; and seconds."""

    speedup: Interval
    seconds: Figure


@dataclass(frozen=True)
class Cell:
    """Scores of the questions of one length, in tokens, and one depth, None without one."""

    length: int
    depth: float | None
    score: Figure


@dataclass(frozen=True)
class TaskScores:
    """Scores of one task's questions, 0 to 1.

    Attributes:
        difference: from the full model's, item by item; None if it has none.
        same_answer, same_score: shares of the questions with the full model's answer, word for word but for blanks
            around it, and with its score; likewise.
        cells: by length and depth, where the task has several of either that were chosen.
    """

    score: Figure
    difference: Figure | None = None
    same_answer: Figure | None = None
    same_score: Figure | None = None
    cells: tuple[Cell, ...] = ()


@dataclass(frozen=True)
class Named:
    """What a contender is known by; ``mode`` is None for the whole model.

    Attributes:
        name: tells it from the others, ``"adaskip-12-e2e-affine"``.
        budget: what was asked for, if anything: ``"12"`` sublayers, a speed-up of ``"1.2x"``, a promise of ``"0.05"``.
    """

    name: str
    strategy: str
    budget: str
    mode: ModeName | None
    compensation: str

    @property
    def series(self) -> str:
        """Name it for people without its budget, ``AdaSkip affine``."""
        name = _STRATEGY_NAMES.get(self.strategy, self.strategy)
        return name if self.compensation == "none" else f"{name} {self.compensation}"

    @property
    def label(self) -> str:
        """Name it for people, ``AdaSkip affine, 1.2 x asked``."""
        return f"{self.series}, {self.budget.replace('x', ' x asked')}" if self.budget else self.series

    @property
    def look(self) -> str:
        """How it looks: a key in :data:`adaskip_cpp.pictures.plots.STRATEGY`, or a compensation that has no look."""
        is_default = self.strategy != "adaskip" or self.compensation == DEFAULT_COMPENSATION
        return self.strategy if is_default else self.compensation


@dataclass(frozen=True)
class Row(Named):
    """A contender and its figures.

    Attributes:
        n_skip_prefill, n_skip_decode: sublayers skipped in prompts, or the bulk of the longest, and in decode.
        speed: by the names of :data:`SPEED_NAMES`; {} if nothing was timed.
        text: figures of text by kind of text (``"all"`` for all together) and by name: ``loss`` and ``added_loss`` in
            nats per token, ``perplexity``, ``kl`` in nats per token, its quantiles ``kl_99`` and ``kl_99.9`` over the
            tokens of all items, ``agreement``, ``rouge_l`` with the full model's text. Without what was not measured,
            or came out as no number for an item.
        questions: scores by task.
    """

    n_skip_prefill: int = 0
    n_skip_decode: int = 0
    speed: dict[str, Speed] = field(default_factory=dict)
    text: dict[str, dict[str, Figure]] = field(default_factory=dict)
    questions: dict[str, TaskScores] = field(default_factory=dict)

    @property
    def speedup(self) -> Interval | None:
        """The measured speed-up that its quality is read against; None if it was not timed."""
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
    """What was measured with what: for people by name, how to repeat it, and plain JSON values it all depends on."""

    title: str
    summary: str
    configuration: Mapping[str, str]
    command: str
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Results:
    """All figures, of an unfinished evaluation too.

    Attributes:
        n_done, n_results: single results that there are, and that there will be.
        contenders: the full model first.
    """

    n_done: int
    n_results: int
    about: About
    contenders: tuple[Row, ...]
    format: str = "adaskip-evaluation"
    version: int = 3

    def to_json(self) -> str:
        """Return the content of ``results.json``; what is no number is null."""
        return json_text(self)

    @property
    def full(self) -> Row:
        return self.contenders[0]

    def of_mode(self, mode: str) -> list[Row]:
        """The contenders in a mode, the slowest first: at equal speed, not at equal count, quality can be compared."""
        mine = [row for row in self.contenders if row.mode == mode]
        return sorted(mine, key=lambda row: 0.0 if row.speedup is None else row.speedup.value)

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(task for row in self.contenders for task in row.questions))

    @property
    def notes(self) -> list[str]:
        """What the reader must know, above all that this is not finished."""
        unfinished = f"This is not finished: {self.n_done} of {self.n_results} results are there. Run it again."
        return [*([unfinished] if self.n_done < self.n_results else []), *self.about.notes]
