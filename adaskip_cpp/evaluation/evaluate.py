"""Runs an evaluation: every contender on every item, each result stored as soon as it is there.

- ``continuation``: the last tokens of a text follow the rest of it, the same ones for every contender: their loss, and
  how far the contender's predictions are from the full model's (:mod:`adaskip_cpp.measuring.judge`). Then the contender
  continues the same prompt by itself, which is compared with what the full model wrote (Rouge-L).
- ``answer``: the greedy answer to a question, and its score.
- ``speed``: first token and tokens behind it, all contenders in turn, round by round.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..engine.llama import AdaSkipLlama
from ..errors import DataError
from ..files import content_hash
from ..measuring.judge import Judge, Probe
from ..measuring.metrics import continuation_rouge_l
from ..measuring.tasks import QuestionItem, TextItem, greedy_text
from ..measuring.timing import in_turn, time_request
from .contenders import FULL, Contender
from .store import Key, Record, Store

CONTINUATION, ANSWER, SPEED = "continuation", "answer", "speed"
EVERYONE = "*"
"""Stands for the contender where a result is of all of them: a round of timing."""

_DECODE_WEIGHT = 4  # what decoding a token costs, in tokens of a prompt; for the estimate of what is left
_WARM_UP = 32, 4  # tokens of the prompt and tokens decoded before a contender is timed


@dataclass(frozen=True)
class Work:
    """What is to be measured.

    Attributes:
        contenders: the full model first.
        n_continuation: tokens at the end of a text that are judged, and tokens decoded for a measurement of speed.
        speed_prompt: token ids that speed is measured on, ``n_rounds`` times; () for no measurement.
    """

    contenders: Sequence[Contender]
    texts: Sequence[TextItem] = ()
    questions: Sequence[QuestionItem] = ()
    n_continuation: int = 64
    speed_prompt: Sequence[int] = ()
    n_rounds: int = 5

    def __post_init__(self) -> None:
        ids = [*(text.id for text in self.texts), *(question.id for question in self.questions)]
        twice = next((each for each in ids if ids.count(each) > 1), None)
        if twice is not None:
            raise DataError(f"two items are named {twice!r}; give each file once")
        least, n = self.n_continuation + 2, min((len(item.tokens) for item in self.texts), default=None)
        if n is not None and n < least:
            raise DataError(
                f"an item of {n} tokens has no prompt before a continuation of {self.n_continuation}; ask for at least "
                f"{least} tokens (--tokens), or for a shorter continuation (--continuation)"
            )

    def n_prompt(self, item: TextItem) -> int:
        """Return how many tokens of a text are a prompt: the first token behind it is given, as prefill predicts it."""
        return len(item.tokens) - self.n_continuation - 1

    @property
    def prompt_lengths(self) -> list[int]:
        """The tokens of each prompt that plans are chosen for, ascending."""
        found = {*map(self.n_prompt, self.texts), *(len(item.prompt) for item in self.questions)}
        return sorted(found | ({len(self.speed_prompt)} if self.speed_prompt else set()))

    def results(self) -> dict[Key, float]:
        """All results that there will be, and about what each takes, in tokens of a prompt."""
        n_decoded = _DECODE_WEIGHT * self.n_continuation
        found: dict[Key, float] = {}
        if self.speed_prompt:
            cost: float = len(self.contenders) * (len(self.speed_prompt) + n_decoded)
            found |= {(f"round/{i}", EVERYONE, SPEED): cost for i in range(self.n_rounds)}
        for text in self.texts:
            found |= {(text.id, each.name, CONTINUATION): len(text.tokens) + n_decoded for each in self.contenders}
        for question in self.questions:
            cost = len(question.prompt) + _DECODE_WEIGHT * question.max_tokens / 2
            found |= {(question.id, each.name, ANSWER): cost for each in self.contenders}
        return found

    @property
    def hash(self) -> str:
        """Of all that a result depends on, and of what a result consists of (its third form)."""
        contenders = [(each.name, each.key) for each in self.contenders]
        items = self.texts, self.questions, self.n_continuation, self.speed_prompt, self.n_rounds
        return content_hash((contenders, items, 3))


def run(
    work: Work, store: Store, llm: AdaSkipLlama, on_progress: Callable[[float], None] = lambda fraction: None
) -> None:
    """Measure what an open store lacks."""
    rest = _Rest(work, store, llm, on_progress)
    rest.time()
    for text in work.texts:
        rest.go_on(text)
    for question in work.questions:
        rest.answer(question)


class _Rest:
    def __init__(self, work: Work, store: Store, llm: AdaSkipLlama, on_progress: Callable[[float], None]) -> None:
        self._work, self._store, self._llm, self._on_progress = work, store, llm, on_progress
        self._left = {key: cost for key, cost in work.results().items() if key not in store.records}
        self._total = sum(self._left.values())

    def time(self) -> None:
        work, llm = self._work, self._llm
        rounds = [i for i in range(work.n_rounds) if (f"round/{i}", EVERYONE, SPEED) in self._left]
        for contender in work.contenders if rounds else ():
            llm.set_plan(contender.plan_for(len(work.speed_prompt)))
            time_request(llm, work.speed_prompt[: _WARM_UP[0]], min(_WARM_UP[1], work.n_continuation))
        for i in rounds:
            times = {}
            for index in in_turn(len(work.contenders), i):
                contender = work.contenders[index]
                llm.set_plan(contender.plan_for(len(work.speed_prompt)))
                times[contender.name] = time_request(llm, work.speed_prompt, work.n_continuation)
            self._keep(Record(f"round/{i}", EVERYONE, SPEED, times=times))

    def go_on(self, item: TextItem) -> None:
        """Judge the end of a text, and compare what the contender itself writes there with what the full model does."""
        split = self._work.n_prompt(item)
        prompt, answer = item.tokens[:split], item.tokens[split:]
        judge = Judge(self._llm, [Probe(item.id, "continuation", item.tokens, split, answer)])
        for contender in self._lacking(item.id, CONTINUATION):
            [scores] = judge(contender.plan_for(split))
            text = greedy_text(self._llm, prompt, self._work.n_continuation)  # the judge leaves the prompt in the cache
            reference = text if contender is FULL else self._store.records[item.id, FULL.name, CONTINUATION].text
            values: dict[str, float | None] = {
                "loss": float(np.mean(judge.whole_losses[0] + scores.loss)),
                "kl": float(scores.divergence.mean()),
                "agreement": float(scores.agrees.mean()),
                "rouge_l": continuation_rouge_l(reference, text),
            }
            divergences = tuple(float(f"{each:.4g}") for each in scores.divergence)
            self._keep(Record(item.id, contender.name, CONTINUATION, values, text, divergences))

    def answer(self, item: QuestionItem) -> None:
        for contender in self._lacking(item.id, ANSWER):
            self._llm.set_plan(contender.plan_for(len(item.prompt)))
            self._llm.reset()
            text = greedy_text(self._llm, item.prompt, item.max_tokens, first_line=item.first_line)
            self._keep(Record(item.id, contender.name, ANSWER, {"score": item.score(text)}, text))

    def _lacking(self, item: str, measure: str) -> list[Contender]:
        return [each for each in self._work.contenders if (item, each.name, measure) in self._left]

    def _keep(self, record: Record) -> None:
        self._store.append(record)
        del self._left[record.key]
        self._on_progress(1.0 - sum(self._left.values()) / self._total)
