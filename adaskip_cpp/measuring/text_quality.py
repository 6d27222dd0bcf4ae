"""What a plan costs on texts, against the full model: added loss, agreement and divergence, one of each per text."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..engine.llama import AdaSkipLlama
from ..errors import DataError
from ..model.mode import MODES, ModeName
from ..model.plan import SkipPlan
from .distribution import Logits, check_length, check_logits_all, kl_divergences, losses

N_BEHIND = 128
"""Tokens of a text that follow its prompt in mode ``"prompt"``, or a quarter of a text that is shorter than four times
as many."""

_MOST_KEPT = 1 << 30
"""Bytes of the full model's logits that are kept, for divergences; where there are more, it is evaluated again."""


@dataclass(frozen=True)
class TextScores:
    """What a plan costs on each text.

    Attributes:
        loss: float64 [n], mean over its tokens of the loss that the plan adds, in nats.
        agreement: float64 [n], share of its tokens for which the plan finds the same token most likely.
        divergence: float64 [n], mean over its tokens of KL(full model || plan), in nats; None unless asked for.
    """

    loss: npt.NDArray[np.float64]
    agreement: npt.NDArray[np.float64]
    divergence: npt.NDArray[np.float64] | None = None


class TextQuality:
    """Compares plans with the full model, which is evaluated once, when it is first needed.

    In the modes ``"prefill"`` and ``"e2e"`` a text is evaluated as one prompt and judged everywhere, which takes a
    model that keeps all logits (``logits_all=True``). In the others it is a request of its own: its beginning is the
    prompt, the rest is evaluated as the tokens of an answer are, and only these are judged, but for the first. In mode
    ``"prompt"`` they are the last ``n_behind`` tokens, in mode ``"decode"`` half of them, with the plan's online stage
    and schedule.

    The model's plan is set and left as it was last compared; its KV cache is dropped. ``advance`` is called with the
    number of tokens after each text.
    """

    def __init__(
        self,
        llm: AdaSkipLlama,
        texts: Sequence[Sequence[int]],
        mode: ModeName = "e2e",
        *,
        n_behind: int = N_BEHIND,
        advance: Callable[[int], None] = lambda n_tokens: None,
    ) -> None:
        self._answers = MODES[mode].answer_share > 0
        if not self._answers:
            check_logits_all(llm)
        if len(texts) < 2:
            raise DataError(f"{len(texts)} texts have no interval; give at least 2, or shorter ones")
        for tokens in texts:
            check_length(llm, tokens, 4)
        self._llm, self._advance = llm, advance

        def begin(n: int) -> int:
            """The first token that is judged of n."""
            if mode == "prompt":
                return n - max(min(n_behind, n // 4), 2) + 1
            return n // 2 + 1 if mode == "decode" else 1

        self._texts = [(tokens, begin(len(tokens))) for tokens in texts]
        self._last: tuple[SkipPlan, TextScores] | None = None
        self._full: list[_Judged] = []
        self._full_logits: list[Logits] = []
        self._keeps_logits = 4 * self.n_tokens * llm.n_vocab() <= _MOST_KEPT

    @property
    def n_texts(self) -> int:
        return len(self._texts)

    @property
    def n_tokens(self) -> int:
        return sum(len(tokens) - begin for tokens, begin in self._texts)

    def evaluate_full(self) -> None:
        if self._full:
            return
        full, full_logits = [], []
        for judged, logits in self._evaluate(None):
            full.append(judged)
            if self._keeps_logits:
                full_logits.append(logits)
        self._full, self._full_logits = full, full_logits

    def scores(self, plan: SkipPlan, *, divergence: bool = False) -> TextScores:
        """Return what a plan costs on each text.

        For the divergence the full model is evaluated again, text by text, where its logits of all texts together take
        more than 1 GiB.
        """
        if self._last is None or self._last[0] != plan or (divergence and self._last[1].divergence is None):
            again = divergence and not self._keeps_logits
            found = self._side_by_side(plan) if again else self._compared(plan, divergence)
            self._last = plan, TextScores(*np.transpose(list(found)))
        return self._last[1]

    def _compared(self, plan: SkipPlan, divergence: bool) -> Iterator[tuple[float, ...]]:
        self.evaluate_full()
        for index, (own, logits) in enumerate(self._evaluate(plan)):
            scores = own.against(self._full[index])
            yield (*scores, float(kl_divergences(self._full_logits[index], logits).mean())) if divergence else scores

    def _side_by_side(self, plan: SkipPlan) -> Iterator[tuple[float, ...]]:
        for text in self._texts:
            ((full, full_logits),) = self._evaluate(None, [text])
            ((own, logits),) = self._evaluate(plan, [text])
            yield *own.against(full), float(kl_divergences(full_logits, logits).mean())

    def _evaluate(
        self, plan: SkipPlan | None, texts: "Sequence[tuple[Sequence[int], int]] | None" = None
    ) -> "Iterator[tuple[_Judged, Logits]]":
        """Per text what is judged, and the logits that it is judged by, float32 ``[n_judged, n_vocab]``."""
        llm = self._llm
        llm.set_plan(plan)
        try:
            for tokens, begin in self._texts if texts is None else texts:
                if self._answers:
                    logits = answer_logits(llm, tokens, begin - 1)
                else:
                    llm.reset()
                    llm.eval(tokens)
                    logits = llm.scores[begin - 1 : len(tokens) - 1].copy()
                yield _Judged(losses(logits, tokens[begin:]), logits.argmax(axis=1)), logits
                self._advance(len(tokens))
        finally:
            llm.reset()


@dataclass(frozen=True)
class _Judged:
    """The loss of each judged token of a text, and the token that was most likely in its place."""

    losses: npt.NDArray[np.float64]
    best: npt.NDArray[np.intp]

    def against(self, full: "_Judged") -> tuple[float, float]:
        """Added loss and agreement."""
        return float((self.losses - full.losses).mean()), float((self.best == full.best).mean())


def answer_logits(llm: AdaSkipLlama, tokens: Sequence[int], begin: int) -> Logits:
    """Read the first ``begin`` tokens of a text as a prompt and the rest as its answer, under the plan in force.

    Returned are the logits behind each token of the answer but the last, float32.
    """
    llm.reset()
    llm.begin_request()
    llm.eval(tokens[:begin])
    return np.concatenate([llm.logits_behind(each) for each in _answer(tokens[begin:-1], llm.plan)])


def _answer(tokens: Sequence[int], plan: SkipPlan | None) -> Iterator[Sequence[int]]:
    """Cut an answer where the set that is skipped may change: within one batch it cannot."""
    ends = [] if plan is None else [start for start, _ in plan.schedule]
    if plan is not None and plan.online is not None:
        ends.append(plan.online.window)
    for begin, end in itertools.pairwise(sorted({0, len(tokens), *(end for end in ends if end < len(tokens))})):
        yield tokens[begin:end]
