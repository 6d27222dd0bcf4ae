"""Tunes a model: finds the fastest plan that keeps a promise on held-out text, and measures what it brings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..errors import BudgetError, DataError, PlanError
from ..intervals import Interval, mean_interval, ratio_interval
from ..measuring.tasks import TextItem, text_items
from ..measuring.text_quality import TextQuality
from ..measuring.timing import in_turn, time_request
from ..model.plan import Mode, SkipPlan
from ..model.tuned import Promise, SpeedUp, TunedPlan
from ..planning.compensation import DEFAULT_COMPENSATION
from ..planning.modes import compensated_plan
from ..planning.request import PlanRequest
from .search import Judge, Judged, Seconds, back_off, fastest_within, least_harm, n_bisections, rank

if TYPE_CHECKING:
    from ..engine.llama import AdaSkipLlama
    from ..measuring.corpus import Tokenizer
    from ..planning.profile import Profile

__all__ = ["HeldOut", "Tuner", "hold_out", "measure_speed", "request_seconds"]

_FEW_TEXTS = 4
"""From so many texts on, each goes to one side whole; of fewer, each is cut in half."""


@dataclass(frozen=True)
class HeldOut:
    """Text that calibration did not see, in two parts.

    Attributes:
        search: what the search judges plans by.
        check: what the plan that it finds is judged by at last; no part of it is in ``search``.
        search_names, check_names: the texts that these come from.
    """

    search: tuple[TextItem, ...]
    check: tuple[TextItem, ...]
    search_names: tuple[str, ...]
    check_names: tuple[str, ...]


def hold_out(tokenizer: Tokenizer, texts: Mapping[str, str], n_texts: int, n_tokens: int) -> HeldOut:
    """Cut texts into two parts of as many items each.

    Args:
        tokenizer: the model whose tokens are counted.
        texts: texts by name.
        n_texts: items in either part, at least 2.
        n_tokens: tokens of each item.

    Raises:
        DataError: there is too little text, or a number is too small.
    """
    if n_texts < 2 or n_tokens < 4:
        raise DataError(f"cannot judge by {n_texts} texts of {n_tokens} tokens; use at least 2 texts of 4 tokens")
    parts: tuple[dict[str, str], dict[str, str]] = ({}, {})
    if len(texts) >= _FEW_TEXTS:
        for name in sorted(texts, key=lambda name: (-len(texts[name]), name)):
            min(parts, key=lambda part: sum(map(len, part.values())))[name] = texts[name]
    else:
        for name, text in texts.items():
            middle = len(text) // 2
            parts[0][f"{name}, first half"], parts[1][f"{name}, second half"] = text[:middle], text[middle:]
    try:
        items = [text_items(tokenizer, part, n_items=n_texts, n_tokens=n_tokens, drop_short=True) for part in parts]
    except DataError as error:
        raise DataError(f"of either half of the held-out text: {error}") from error
    names = [tuple(sorted({"/".join(item.id.split("/")[1:-2]) for item in part})) for part in items]
    return HeldOut(tuple(items[0]), tuple(items[1]), names[0], names[1])


def request_seconds(profile: Profile, mode: Mode, context: int, n_answer: int) -> Seconds:
    """Return what predicts the seconds of a request under a skip set: a prompt and the tokens after it.

    Without a cost model in the profile it is the number of sublayers that run.

    Args:
        profile: of the model.
        mode: in ``"decode"`` the full model reads the prompt.
        context: tokens of the prompt.
        n_answer: tokens of the answer behind the first one.
    """
    cost = profile.cost
    if cost is None:
        return lambda skip: float(skip.size - skip.sum())
    prompt = cost.seconds(None, context, "prefill")

    def seconds(skip: npt.NDArray[np.bool_]) -> float:
        first = prompt if mode == "decode" else cost.seconds(skip, context, "prefill")
        return first + n_answer * cost.seconds(skip, context, "decode")

    return seconds


class Tuner:
    """The search for one promise on one model.

    Args:
        llm: the model, loaded with ``logits_all=True`` and a context of one text. Its plan is changed.
        profile: of this model.
        promise: what to keep.
        held_out: text to judge by.
        mode: mode of the plan.
        compensation: name of its compensation.
        online: whether it has an online stage, which the promise does not cover.
        context: tokens of the prompt for which the plan shall be fast.
        n_answer: tokens of the answer behind the first one.
        n_exchange: evaluations that local exchange may use.
        advance: called with the number of tokens after each text that is evaluated.

    Raises:
        DataError, RequestError: the texts cannot be judged, see
            :class:`adaskip_cpp.measuring.text_quality.TextQuality`.
        CompensationError: the compensation is unknown or the profile lacks what it needs.
        PlanError: a speed-up is promised and the profile has no cost model.
    """

    def __init__(
        self,
        llm: AdaSkipLlama,
        profile: Profile,
        promise: Promise,
        held_out: HeldOut,
        *,
        mode: Mode = "e2e",
        compensation: str = DEFAULT_COMPENSATION,
        online: bool = False,
        context: int = 2048,
        n_answer: int = 128,
        n_exchange: int = 16,
        advance: Callable[[int], None] = lambda n_tokens: None,
    ) -> None:
        if promise.kind == "speedup" and profile.cost is None:
            raise PlanError("the profile has no cost model to reach a speed-up by; calibrate again without --no-cost")
        self.profile, self.promise, self.held_out = profile, promise, held_out
        self.context, self.n_answer, self.n_exchange = context, n_answer, n_exchange
        self._request = PlanRequest(mode=mode, compensation=compensation, online=online)
        self._plan(profile.skippable)  # refuses a compensation that the profile lacks vectors for
        self._seconds = request_seconds(profile, mode, context, n_answer)
        self._search, self._check = (
            TextQuality(llm, [item.tokens for item in part], mode, advance=advance)
            for part in (held_out.search, held_out.check)
        )
        self.judge = Judge(lambda skip: self._harm(self._search, skip), self._seconds)
        self.check_judge = Judge(lambda skip: self._harm(self._check, skip), self._seconds)
        self.order = rank(profile.similarity, self._saved())

    @property
    def limit(self) -> float:
        """Largest harm that keeps the promise; infinite for a speed-up."""
        return {
            "max_loss": self.promise.value,
            "min_agreement": 1.0 - self.promise.value,
            "speedup": math.inf,
        }[self.promise.kind]

    @property
    def n_tokens(self) -> int:
        """Tokens that one evaluation takes."""
        return sum(len(item.tokens) for item in self.held_out.search)

    @property
    def most_evaluations(self) -> int:
        """How many evaluations :meth:`find` takes at most."""
        return self.n_exchange + (1 if self.promise.kind == "speedup" else n_bisections(len(self.order)))

    def evaluate_full(self) -> None:
        """Evaluate the full model on the search's text: what an evaluation takes at most."""
        self._search.evaluate_full()

    def find(self, speedup: float | None = None) -> Judged:
        """Search, on the search's text.

        Args:
            speedup: for a promised speed-up, the predicted one to aim at; None for the promised one.

        Raises:
            BudgetError: a speed-up is out of reach.
        """
        n_layer = self.profile.n_layer
        if self.promise.kind != "speedup":
            return fastest_within(self.judge, self.order, n_layer, self.limit, n_exchange=self.n_exchange)
        speedup = self.promise.value if speedup is None else speedup
        full = self._seconds(np.zeros((n_layer, 2), np.bool_))
        found = least_harm(self.judge, self.order, n_layer, full / speedup, n_exchange=self.n_exchange)
        if found is None:
            reachable = math.floor(100 * full / self._seconds(self.profile.skippable)) / 100
            raise BudgetError(
                f"a prompt of {self.context} tokens and {self.n_answer} tokens of an answer cannot take "
                f"1/{speedup:g} of the time: skipping all that can be skipped is predicted to make it {reachable:.2f} "
                f"times as fast; ask for at most {reachable:.2f}"
            )
        return found

    def confirm(self, skip: npt.NDArray[np.bool_]) -> Judged:
        """Judge a set by the text that the search did not see, and put sublayers back until the promise is kept."""
        return back_off(self.check_judge, self.order, skip, self.limit)

    def plan(self, skip: npt.NDArray[np.bool_]) -> SkipPlan:
        """Make the plan of a skip set, with its online stage."""
        return self._plan(skip)

    def result(
        self, skip: npt.NDArray[np.bool_], speedups: Sequence[SpeedUp], settings: Mapping[str, str | int | float | None]
    ) -> TunedPlan:
        """Return what is stored in the profile.

        Args:
            skip: bool ``[n_layer, 2]``.
            speedups: measured.
            settings: how it was found.

        Raises:
            PlanError: the loss under the plan is not finite.
        """
        loss, agreement = Interval(0.0, 0.0, 0.0, 0), Interval(1.0, 1.0, 1.0, 0)
        if skip.any():
            scores = self._check.scores(self._plan(skip))
            if not np.isfinite(scores.loss).all():
                raise PlanError("the plan that was found has no finite loss; ask for less")
            loss, agreement = mean_interval(scores.loss), mean_interval(scores.agreement)
        return TunedPlan(
            attention=tuple(np.flatnonzero(skip[:, 0]).tolist()),
            ffn=tuple(np.flatnonzero(skip[:, 1]).tolist()),
            promise=self.promise,
            loss=loss,
            agreement=agreement,
            n_texts=self._check.n_texts if skip.any() else 0,
            n_tokens=self._check.n_tokens if skip.any() else 0,
            speedups=tuple(speedups),
            compensation=self._request.compensation,
            mode=self._request.mode,
            online=self._request.online,
            settings=settings,
        )

    def _harm(self, quality: TextQuality, skip: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
        scores = quality.scores(self._plan(skip))
        return 1.0 - scores.agreement if self.promise.kind == "min_agreement" else scores.loss

    def _plan(self, skip: npt.NDArray[np.bool_]) -> SkipPlan:
        return compensated_plan(self.profile, skip, self._request, "tuned")

    def _saved(self) -> npt.NDArray[np.float64]:
        """Seconds of a request that each sublayer alone saves, float64 ``[n_layer, 2]``."""
        saved = np.zeros((self.profile.n_layer, 2))
        skip = np.zeros(saved.shape, np.bool_)
        full = self._seconds(skip)
        for where in np.ndindex(*saved.shape):
            skip[where] = True
            saved[where] = full - self._seconds(skip)
            skip[where] = False
        return saved


def measure_speed(
    llm: AdaSkipLlama,
    plan: SkipPlan,
    prompt: Sequence[int],
    n_answer: int,
    *,
    n_rounds: int = 5,
    on_progress: Callable[[float], None] | None = None,
) -> tuple[SpeedUp, ...]:
    """Time requests of the full model and of a plan in turn, after one of each that is not counted.

    Args:
        llm: the model; its context holds the prompt and the answer. Its plan is changed.
        plan: the plan.
        prompt: token ids.
        n_answer: tokens of the answer behind the first one, at least 1.
        n_rounds: requests of either.
        on_progress: called with the fraction of the work done.

    Returns:
        How many times as fast the plan reaches the first token, decodes, and answers the whole request.
    """
    contenders = (None, plan)
    first: tuple[list[float], list[float]] = ([], [])
    decode: tuple[list[float], list[float]] = ([], [])
    whole: tuple[list[float], list[float]] = ([], [])
    for n_round in range(-1, n_rounds):
        for which in in_turn(2, max(n_round, 0)):
            llm.set_plan(contenders[which])
            time = time_request(llm, prompt, n_answer)
            if n_round >= 0:
                first[which].append(time.first_token_s)
                decode[which].append(time.per_token_s())
                whole[which].append(time.first_token_s + sum(time.token_s))
            if on_progress is not None:
                on_progress((2 * n_round + 3) / (2 * n_rounds + 2))
    llm.reset()
    return tuple(
        SpeedUp(of, len(prompt), n_answer, ratio_interval(*times))  # type: ignore[arg-type]  # the names are literals
        for of, times in (("first token", first), ("decode", decode), ("request", whole))
    )
