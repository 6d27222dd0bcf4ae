"""Runs an evaluation: every contender on every item, each result stored as soon as it is there.

Three measures of quality, and one of speed:

- ``prompt``: an item of text is one prompt; the loss of its tokens, and the KL divergence from the full model. For the
  mode ``prefill``.
- ``continuation``: the last tokens of an item are decoded one by one behind the rest of it. They are forced, whatever
  the model finds likeliest, so that both models continue the same text while phases, schedules and the online stage
  are those of any request; the same figures. For all modes but ``prefill``. Then the contender continues the
  same prompt by itself, which is compared with what the full model wrote (Rouge-L); for every mode.
- ``answer``: the greedy answer to a question, and its score.
- ``speed``: first token and tokens behind it, all contenders in turn, round by round.
"""

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..engine.llama import AdaSkipLlama
from ..errors import DataError
from ..files import content_hash
from ..measuring.distribution import Logits, prompt_logits
from ..measuring.metrics import continuation_rouge_l
from ..measuring.tasks import QuestionItem, TextItem
from ..measuring.timing import in_turn, time_request
from ..model.mode import MODES
from .contenders import FULL, Contender
from .requests import SharedPrompt, figures, forced_logits, greedy_text
from .store import Key, Record, Store

OpenModel = Callable[[int, bool], AdaSkipLlama]
"""Opens the model with a context of so many tokens, and with the logits of all of them or of the last one only."""

PROMPT, CONTINUATION, ANSWER, SPEED = "prompt", "continuation", "answer", "speed"
EVERYONE = "*"
"""Stands for the contender where a result is of all of them: a round of timing."""

_DECODE_WEIGHT = 4  # what decoding a token costs, in tokens of a prompt; for the estimate of what is left
_WARM_UP = 32, 4  # tokens of the prompt and tokens decoded before a contender is timed


@dataclass(frozen=True)
class Work:
    """What is to be measured.

    Attributes:
        contenders: the full model first.
        n_continuation: tokens at the end of a text that are decoded, and tokens decoded for a measurement of speed.
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

    @property
    def longest_prompt(self) -> int:
        """Tokens."""
        return max(prompt_lengths(self.texts, self.questions, self.n_continuation, self.speed_prompt), default=0)

    @property
    def n_ctx(self) -> int:
        answers = (len(item.prompt) + item.max_tokens + 1 for item in self.questions)
        speed = len(self.speed_prompt) + self.n_continuation + 1 if self.speed_prompt else 0
        return max(speed, *answers, *(len(item.tokens) for item in self.texts), 0)

    def results(self) -> dict[Key, float]:
        """All results that there will be, and about what each takes, in tokens of a prompt."""
        n_decoded = _DECODE_WEIGHT * self.n_continuation
        found: dict[Key, float] = {}
        if self.speed_prompt:
            cost: float = len(self.contenders) * (len(self.speed_prompt) + n_decoded)
            found |= {(f"round/{i}", EVERYONE, SPEED): cost for i in range(self.n_rounds)}
        # The loss of a prompt is that of the mode prefill, and of the full model where there is something to compare.
        read = [each for each in self.contenders if each.mode in (None, "prefill")]
        for text in self.texts:
            cost = len(text.tokens) + n_decoded
            found |= {(text.id, each.name, CONTINUATION): cost for each in self.contenders}
            found |= {(text.id, each.name, PROMPT): cost for each in read if len(read) > 1}
        for question in self.questions:
            cost = len(question.prompt) + _DECODE_WEIGHT * question.max_tokens / 2
            found |= {(question.id, each.name, ANSWER): cost for each in self.contenders}
        return found

    def to_settings(self) -> dict[str, Any]:
        """Return plain JSON values that change whenever a result could."""
        return {
            "contenders": {each.name: content_hash(each.key) for each in self.contenders},
            "texts": content_hash(self.texts),
            "questions": content_hash(self.questions),
            "continuation": self.n_continuation,
            "speed_prompt": content_hash(self.speed_prompt),
            "rounds": self.n_rounds,
            "kept": 2,  # what a result consists of
        }


def n_prompt(item: TextItem, n_continuation: int) -> int:
    """Return how many tokens of a text are the prompt of its continuation.

    One more token is decoded than is measured: the first one behind a prompt is predicted by prefill.
    """
    return len(item.tokens) - n_continuation - 1


def prompt_lengths(
    texts: Sequence[TextItem], questions: Sequence[QuestionItem], n_continuation: int, speed_prompt: Sequence[int]
) -> list[int]:
    """Return the tokens of each prompt that plans are chosen for."""
    found = {n_prompt(item, n_continuation) for item in texts} | {len(item.prompt) for item in questions}
    return sorted(found | ({len(speed_prompt)} if speed_prompt else set()))


def run(
    work: Work, store: Store, open_model: OpenModel, on_progress: Callable[[float], None] = lambda fraction: None
) -> None:
    """Measure what an open store lacks."""
    continuation_rouge_l("", "")  # before any work: are the packages there?
    for question in work.questions:
        question.score("")
    rest = _Rest(work, store, on_progress)
    if rest.lacks(SPEED, CONTINUATION, ANSWER):
        with _closed(open_model(work.n_ctx, False)) as llm:
            if rest.lacks(SPEED):
                rest.time(llm)
            shared = SharedPrompt(llm)
            for text in work.texts:
                rest.go_on(text, shared)
            for question in work.questions:
                rest.answer(question, shared)
    if rest.lacks(PROMPT):
        # All logits of a prompt are as large as its tokens times the vocabulary, so this context is no larger.
        with _closed(open_model(max(len(item.tokens) for item in work.texts), True)) as llm:
            for text in work.texts:
                rest.read(text, llm)


@contextlib.contextmanager
def _closed(llm: AdaSkipLlama) -> Iterator[AdaSkipLlama]:
    """Close a model at the end, without llama.cpp's remark that its graphs took other memory than the full model's."""
    try:
        yield llm
    finally:
        with contextlib.redirect_stderr(io.StringIO()):
            llm.close()


class _Rest:
    def __init__(self, work: Work, store: Store, on_progress: Callable[[float], None]) -> None:
        self._work, self._store, self._on_progress = work, store, on_progress
        self._left = {key: cost for key, cost in work.results().items() if key not in store.records}
        self._total = sum(self._left.values())

    def lacks(self, *measures: str) -> bool:
        return any(measure in measures for _, _, measure in self._left)

    def time(self, llm: AdaSkipLlama) -> None:
        work = self._work
        for contender in work.contenders:
            llm.set_plan(contender.plan_for(len(work.speed_prompt)))
            time_request(llm, work.speed_prompt[: _WARM_UP[0]], min(_WARM_UP[1], work.n_continuation))
        for i in range(work.n_rounds):
            if (f"round/{i}", EVERYONE, SPEED) in self._left:
                times = {}
                for index in in_turn(len(work.contenders), i):
                    contender = work.contenders[index]
                    llm.set_plan(contender.plan_for(len(work.speed_prompt)))
                    times[contender.name] = time_request(llm, work.speed_prompt, work.n_continuation)
                self._keep(Record(f"round/{i}", EVERYONE, SPEED, times=times))

    def go_on(self, item: TextItem, shared: SharedPrompt) -> None:
        """Decode the end of a text, forced, and what the contender itself would write there."""
        lacking = self._lacking(item.id, CONTINUATION)
        split = n_prompt(item, self._work.n_continuation)
        prompt, targets = item.tokens[:split], item.tokens[split:]
        decodes = any(each.mode in ("prompt", "decode", "e2e") for each in self._work.contenders)
        full: Logits | None = None
        if decodes and any(each.mode != "prefill" for each in lacking):
            full = forced_logits(shared.take(prompt, None), prompt, targets)[1:]
        for contender in lacking:
            values: dict[str, float | None] = {}
            divergences: tuple[float | None, ...] = ()
            llm = shared.take(prompt, contender.plan_for(len(prompt)))
            if full is not None and contender.mode != "prefill":
                logits = full if contender is FULL else forced_logits(llm, prompt, targets)[1:]
                values, divergences = figures(full, logits, targets[1:])
            text = greedy_text(llm, prompt, self._work.n_continuation)
            reference = text if contender is FULL else self._store.records[item.id, FULL.name, CONTINUATION].text
            values["rouge_l"] = continuation_rouge_l(reference, text)
            self._keep(Record(item.id, contender.name, CONTINUATION, values, text, divergences))

    def answer(self, item: QuestionItem, shared: SharedPrompt) -> None:
        for contender in self._lacking(item.id, ANSWER):
            llm = shared.take(item.prompt, contender.plan_for(len(item.prompt)))
            text = greedy_text(llm, item.prompt, item.max_tokens, first_line=item.first_line)
            self._keep(Record(item.id, contender.name, ANSWER, {"score": item.score(text)}, text))

    def read(self, item: TextItem, llm: AdaSkipLlama) -> None:
        full: Logits | None = None
        for contender in self._lacking(item.id, PROMPT):
            if full is None:
                llm.set_plan(None)
                full = prompt_logits(llm, item.tokens).copy()
            llm.set_plan(contender.plan)
            logits = full if contender is FULL else prompt_logits(llm, item.tokens)
            values, divergences = figures(full, logits, item.tokens[1:])
            self._keep(Record(item.id, contender.name, PROMPT, values, divergences=divergences))

    def _lacking(self, item: str, measure: str) -> list[Contender]:
        """The full model first, as others are compared with it, then those that read a prompt as it does."""
        found = [each for each in self._work.contenders if (item, each.name, measure) in self._left]
        return sorted(found, key=lambda each: each is not FULL and (each.mode is None or MODES[each.mode].in_prompt))

    def _keep(self, record: Record) -> None:
        self._store.append(record)
        del self._left[record.key]
        self._on_progress(1.0 - sum(self._left.values()) / self._total)
