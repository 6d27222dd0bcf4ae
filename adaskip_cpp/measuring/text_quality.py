"""What a plan costs on texts, against the full model: added loss and agreement, one figure of each per text."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..engine.llama import AdaSkipLlama
from ..errors import DataError
from ..model.plan import Mode, SkipPlan
from .distribution import check_length, check_logits_all, losses


@dataclass(frozen=True)
class TextScores:
    """What a plan costs on each text.

    Attributes:
        loss: float64 [n], mean over its tokens of the loss that the plan adds, in nats.
        agreement: float64 [n], share of its tokens for which the plan finds the same token most likely.
    """

    loss: npt.NDArray[np.float64]
    agreement: npt.NDArray[np.float64]


class TextQuality:
    """Compares plans with the full model, which is evaluated once, when it is first needed.

    A text is evaluated as one prompt. In mode ``"decode"`` it is a request of its own: its first half is the prompt,
    which the full model reads, and the rest is evaluated as the tokens of an answer are, with the plan's online stage
    and schedule; only these are judged then.

    The model's plan is set and left as it was last compared; its KV cache is dropped. ``advance`` is called with the
    number of tokens after each text.
    """

    def __init__(
        self,
        llm: AdaSkipLlama,
        texts: Sequence[Sequence[int]],
        mode: Mode = "e2e",
        *,
        advance: Callable[[int], None] = lambda n_tokens: None,
    ) -> None:
        check_logits_all(llm)
        if len(texts) < 2:
            raise DataError(f"{len(texts)} texts have no interval; give at least 2, or shorter ones")
        for tokens in texts:
            check_length(llm, tokens, 4)
        self._llm, self._mode, self._advance = llm, mode, advance
        # Each text with the first of its tokens that is judged.
        self._texts = [(tokens, len(tokens) // 2 + 1 if mode == "decode" else 1) for tokens in texts]
        self._last: tuple[SkipPlan, TextScores] | None = None
        self._full: list[tuple[npt.NDArray[np.float64], npt.NDArray[np.intp]]] = []

    @property
    def n_texts(self) -> int:
        return len(self._texts)

    @property
    def n_tokens(self) -> int:
        return sum(len(tokens) - begin for tokens, begin in self._texts)

    def evaluate_full(self) -> None:
        self._full = self._full or list(self._evaluate(None))

    def scores(self, plan: SkipPlan) -> TextScores:
        if self._last is None or self._last[0] != plan:
            self.evaluate_full()
            pairs = zip(self._full, self._evaluate(plan), strict=True)
            found = [((own - full).mean(), (best == full_best).mean()) for (full, full_best), (own, best) in pairs]
            self._last = plan, TextScores(*np.transpose(found))
        return self._last[1]

    def _evaluate(self, plan: SkipPlan | None) -> Iterator[tuple[npt.NDArray[np.float64], npt.NDArray[np.intp]]]:
        """Per text the loss of each judged token, and the token that was most likely in its place."""
        llm = self._llm
        llm.set_plan(plan)
        try:
            for tokens, begin in self._texts:
                llm.reset()
                if self._mode == "decode":
                    llm.begin_request()
                    llm.eval(tokens[: begin - 1])
                    for piece in _answer(tokens[begin - 1 :], plan):
                        llm.eval_decode(piece)
                else:
                    llm.eval(tokens)
                logits = llm.scores[begin - 1 : len(tokens) - 1]
                yield losses(logits, tokens[begin:]), logits.argmax(axis=1)
                self._advance(len(tokens))
        finally:
            llm.reset()


def _answer(tokens: Sequence[int], plan: SkipPlan | None) -> Iterator[Sequence[int]]:
    """Cut an answer where the set that is skipped may change: within one batch it cannot."""
    ends = [] if plan is None else [start for start, _ in plan.schedule]
    if plan is not None and plan.online is not None:
        ends.append(plan.online.window)
    for begin, end in itertools.pairwise(sorted({0, len(tokens), *(end for end in ends if end < len(tokens))})):
        yield tokens[begin:end]
