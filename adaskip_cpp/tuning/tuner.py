"""Finds the fastest plan of a model that keeps a promise, by text that calibration did not see."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ..engine.llama import AdaSkipLlama
from ..errors import BudgetError, PlanError
from ..intervals import Interval, mean_interval
from ..measuring.tasks import QuestionItem
from ..measuring.text_quality import TextQuality
from ..model.plan import TIMED, SkipPlan
from ..model.plan_file import PlanFile
from ..model.promise import Passkeys, Promise, SpeedUp, Tuning
from ..planning.modes import compensated_plan
from ..planning.profile import Profile
from ..planning.request import PlanRequest
from ..planning.speedup import seconds_saved
from ..planning.strategies import what_is_lost
from .hold_out import HeldOut
from .passkeys import Retrieval
from .search import N_PREDICTED, Judge, SkipFlags, back_off, fastest_within, least_harm, rank

Measure: TypeAlias = Callable[[SkipPlan], tuple[SpeedUp, ...]]
"""Measures the speed of a plan; what it returns last is what a speed-up is promised of."""

Stage: TypeAlias = Callable[[str], AbstractContextManager[Callable[[float], object]]]
"""Entered for each stage with its name; what it yields is called with the fraction that is done."""

_Found: TypeAlias = tuple[SkipFlags, tuple[SpeedUp, ...], Passkeys | None]

_N_AIMS = 3
"""A speed-up that was predicted but not measured is aimed at anew, higher, so many times at most."""


class Tuner:
    """The search for one promise on one model.

    Args:
        llm: the model, with a context of one text or pass key, and loaded as :class:`TextQuality` needs it. Its plan is
            changed.
        request: the plan's mode, compensation and online stage. In mode ``"decode"`` texts are judged with the FFNs
            that they add online; in the others the promise does not cover these.
        context, n_answer: tokens of the prompt, and of the answer behind its first one, to be fast at. In mode
            ``"prompt"`` the prompt alone counts.
        n_exchange: evaluations that local exchange may use.
        passkeys: prompts with a pass key. A plan that loses one which the full model finds is no plan that keeps a
            promise, unless ``may_lose_passkeys``.

    Raises:
        DataError, RequestError: the texts cannot be judged, see :class:`TextQuality`.
        CompensationError: the profile lacks what the compensation needs.
        PlanError: a speed-up is promised and the profile has no cost model.
    """

    def __init__(
        self,
        llm: AdaSkipLlama,
        profile: Profile,
        promise: Promise,
        held_out: HeldOut,
        request: PlanRequest,
        *,
        context: int = 2048,
        n_answer: int = 128,
        n_exchange: int = 16,
        passkeys: Sequence[QuestionItem] = (),
        may_lose_passkeys: bool = False,
        stage: Stage = lambda label: nullcontext(lambda fraction: None),
    ) -> None:
        if promise.kind == "speedup" and profile.cost is None:
            raise PlanError("the profile has no cost model to reach a speed-up by; calibrate again without --no-cost")
        self.profile, self.promise, self.held_out, self.request = profile, promise, held_out, request
        self.context, self.n_answer, self.n_exchange, self._stage = context, n_answer, n_exchange, stage
        if request.mode == "prompt" and profile.divergence is None:
            self.request = replace(request, ranking="similarity")
        # Refuses a compensation that the profile lacks vectors for.
        self.plan(profile.in_bulk if request.mode == "prompt" else profile.skippable)
        self.retrieval, self._may_lose = Retrieval(llm, passkeys, advance=self._advance), may_lose_passkeys
        self._full, self._saved = self._predicted()

        def quality(part: str) -> TextQuality:
            texts = [item.tokens for item in getattr(held_out, part)]
            return TextQuality(llm, texts, request.mode, advance=self._advance)

        self._search, self._confirm = quality("search"), quality("confirm")
        self._report = quality("report") if held_out.report else self._confirm
        self.order = rank(what_is_lost(profile, self.request), self._saved)

    @property
    def n_tokens(self) -> int:
        return sum(len(item.tokens) for item in self.held_out.search)

    @property
    def most_evaluations(self) -> int:
        if self.promise.kind == "speedup":
            return self.n_exchange + 1
        return self.n_exchange + (len(self.order).bit_length() if self._expected(()) is None else N_PREDICTED)

    def evaluate_full(self) -> None:
        with self._shown("Evaluating the full model", self.n_tokens):
            self._search.evaluate_full()

    def tune(self, measure: Measure, settings: Mapping[str, str | int | float | None] | None = None) -> PlanFile:
        """Search, confirm, measure the speed of a plan that skips something, and report; ``settings`` are told besides.

        Raises:
            BudgetError: a promised speed-up is out of reach, as predicted, or loses pass keys.
            PlanError: the loss under the plan is not finite.
        """
        skip, speedups, passkeys = (self._reach if self.promise.kind == "speedup" else self._keep)(measure)
        plan = self.plan(skip)
        figures: tuple[Interval, Interval, int, int] = Interval(0.0, 0.0, 0.0, 0), Interval(1.0, 1.0, 1.0, 0), 0, 0
        divergence: Interval | None = None
        if skip.any():
            with self._shown("Reporting", 2 * self.n_tokens):
                scores = self._report.scores(plan, divergence=True)
            if not np.isfinite(scores.loss).all():
                raise PlanError("the plan that was found has no finite loss; ask for less")
            n = self._report.n_texts, self._report.n_tokens
            figures = mean_interval(scores.loss), mean_interval(scores.agreement), *n
            if scores.divergence is not None and np.isfinite(scores.divergence).all():
                divergence = mean_interval(scores.divergence)
        # For a speed-up nothing is put back, so that the second part decides nothing.
        unbiased = bool(self.held_out.report) or self.promise.kind == "speedup"
        told = {**(settings or {}), **self.held_out.names(), "tokens_per_text": len(self.held_out.search[0].tokens)}
        return PlanFile(plan, Tuning(self.promise, *figures, unbiased, speedups, told, divergence, passkeys))

    def plan(self, skip: SkipFlags) -> SkipPlan:
        return compensated_plan(self.profile, skip, self.request, "tuned")

    def _keep(self, measure: Measure) -> _Found:
        """The fastest plan that keeps the quality promised, also on text that the search did not see."""
        limit = 1.0 - self.promise.value if self.promise.kind == "min_agreement" else self.promise.value
        with self._shown("Searching", self.most_evaluations * self.n_tokens):
            judge, expected = self._judge(self._search), self._expected(self.order)
            skip = fastest_within(judge, self.order, limit, n_exchange=self.n_exchange, predicted=expected).skip
        if skip.any():
            with self._shown("Confirming", 2 * self.n_tokens):
                confirm = self._judge(self._confirm)
                chosen = [index for index in self.order if skip.flat[index]]
                if (expected := self._expected(chosen)) is None:
                    skip = back_off(lambda each: confirm(each).keeps(limit), self.order, skip)
                else:  # all of it first, then as much as is to be expected from what that harms
                    expected *= limit / max(float(expected[-1]), 1e-9)
                    skip = fastest_within(confirm, chosen, limit, n_exchange=0, predicted=expected).skip
        skip, passkeys = self._kept_passkeys(skip)
        return skip, measure(self.plan(skip)) if skip.any() else (), passkeys

    def _kept_passkeys(self, skip: SkipFlags) -> tuple[SkipFlags, Passkeys | None]:
        """Put sublayers back until no pass key is lost, where none may be; and say what is found then."""
        ask = self.retrieval
        if not ask.items or not skip.any():
            return skip, None
        with self._shown("Asking for pass keys", 2 * ask.n_tokens):
            if self._may_lose:
                return skip, Passkeys(len(ask.items), len(ask.found), ask.n_found(self.plan(skip)))
            skip = back_off(lambda each: not ask.loses(self.plan(each)), self.order, skip, faster=True)
            return skip, Passkeys(len(ask.items), len(ask.found), len(ask.found))

    def _reach(self, measure: Measure) -> _Found:
        """The plan of the least loss that is as fast as promised, as measured; else as near as prediction leads."""
        judge, aim, promised = self._judge(self._search), self.promise.value, self.promise.value
        found: tuple[SkipFlags, tuple[SpeedUp, ...]] | None = None
        for _ in range(_N_AIMS):
            with self._shown("Searching", self.most_evaluations * self.n_tokens):
                again = least_harm(judge, self.order, self._full / aim, n_exchange=self.n_exchange)
            if again is None or (found is not None and np.array_equal(again.skip, found[0])):
                break
            speedups = measure(self.plan(again.skip)) if again.skip.any() else ()
            found = again.skip, speedups
            if not speedups or speedups[-1].ratio.value >= promised:
                break
            aim *= 1.005 * promised / speedups[-1].ratio.value
        if found is None:
            most = np.zeros_like(self._saved, np.bool_)
            most.flat[self.order] = True
            reachable = math.floor(100 * self._full / self._seconds(most)) / 100
            answer = "" if self.request.mode == "prompt" else f" and {self.n_answer} tokens of an answer"
            raise BudgetError(
                f"a prompt of {self.context} tokens{answer} cannot take 1/{promised:g} of the time: skipping all that "
                f"can be skipped is predicted to make it {reachable:.2f} times as fast; ask for at most {reachable:.2f}"
            )
        skip, speedups = found
        kept, passkeys = self._kept_passkeys(skip)
        if not np.array_equal(kept, skip):
            raise BudgetError(
                f"a plan {promised:g} times as fast loses pass keys that the full model finds; ask for a smaller "
                "speed-up, or allow it (--allow-lost-passkeys)"
            )
        return skip, speedups, passkeys

    @contextmanager
    def _shown(self, label: str, n_tokens: int) -> Iterator[None]:
        self._done, self._total = 0, n_tokens
        with self._stage(label) as self._on_progress:
            yield

    def _advance(self, n_tokens: int) -> None:
        self._done += n_tokens
        self._on_progress(min(self._done / self._total, 1.0))

    def _predicted(self) -> tuple[float, npt.NDArray[np.float64]]:
        """Seconds of a request of the full model, and what each sublayer saves of them, which adds up.

        Without a cost model in the profile it is the number of sublayers that run; the last layer saves nothing where
        nobody reads its outputs.
        """
        cost, saved = self.profile.cost, np.ones((self.profile.n_layer, 2))
        in_prompt = self.request.mode == "prompt"
        if cost is None:
            saved[-1] = 0.0 if in_prompt else 1.0
            return float(saved.size), saved
        if in_prompt:
            return cost.seconds(None, self.context, "prefill"), seconds_saved(cost, self.context, "bulk")
        saved = self.n_answer * seconds_saved(cost, self.context, "decode")
        if self.request.mode != "decode":
            saved += seconds_saved(cost, self.context, "prefill")
        full = (cost.seconds(None, self.context, phase) for phase in TIMED)
        return float(np.dot((1, self.n_answer), tuple(full))), saved

    def _expected(self, order: Sequence[int]) -> npt.NDArray[np.float64] | None:
        """What skipping the first of an order is expected to harm, by their number; None where nothing tells.

        Divergences of single sublayers add up to a guess of that of all, which is an added loss. Of SmolLM2 and Gemma
        3, about 0.6 times the square root of that is the share of tokens that come out otherwise.
        """
        divergence = self.profile.divergence
        if self.request.mode != "prompt" or divergence is None:
            return None
        total = np.concatenate([[0.0], np.cumsum(divergence.flat[list(order)])])
        return 0.6 * np.sqrt(total) if self.promise.kind == "min_agreement" else total

    def _seconds(self, skip: SkipFlags) -> float:
        return float(self._full - self._saved[skip].sum())

    def _judge(self, quality: TextQuality) -> Judge:
        of_agreement = self.promise.kind == "min_agreement"

        def harm(skip: SkipFlags) -> npt.NDArray[np.float64]:
            scores = quality.scores(self.plan(skip), divergence=self.request.mode == "prompt" and not of_agreement)
            if of_agreement:
                return 1.0 - scores.agreement
            if scores.divergence is None:
                return scores.loss
            # What a text adds to the loss varies more than what plans differ by. The divergence is what is to be
            # expected of it, and varies little; by how much the loss is greater for certain is added.
            excess = scores.loss - scores.divergence
            if not np.isfinite(excess).all():
                return excess  # no plan
            return scores.divergence + max(mean_interval(excess).low, 0.0)

        return Judge(self.profile.n_layer, harm, self._seconds)
