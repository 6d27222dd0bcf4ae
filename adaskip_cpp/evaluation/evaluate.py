"""Runs an evaluation, for ``measure.py``: each contender on each item. Start at :func:`run`."""

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import TypeAlias

import msgspec
import numpy as np

from ..engine.llama import AdaSkipLlama
from ..files import content_hash
from ..measuring.judge import Judge
from ..measuring.memo import Memo
from ..measuring.probes import Probe
from ..measuring.tasks import QuestionItem, TextItem, greedy_text
from ..measuring.timing import N_SETTLE, RequestTime, in_turn, time_request
from .contenders import Contender

CONTINUATION, ANSWER, SPEED = "continuation", "answer", "speed"

_WARM_UP = 32, 4  # tokens of the prompt and tokens decoded before a contender is timed

Key: TypeAlias = tuple[str, str, str]  # item, contender and measure of a result


class Record(msgspec.Struct, frozen=True, omit_defaults=True):
    """One result."""

    values: dict[str, float | None] = {}  # figures by name; NaN is null on disk. msgspec copies the default
    text: str = ""  # the model's answer
    divergences: tuple[float | None, ...] = ()  # KL(whole model || contender) of each judged token, in nats


@dataclass(frozen=True)
class Work:
    """What to measure."""

    contenders: Sequence[Contender]  # the whole model first
    texts: Sequence[TextItem] = ()  # judged by their last tokens
    questions: Sequence[QuestionItem] = ()  # scored by their greedy answers
    n_continuation: int = 64  # judged tokens at the end of a text, and tokens decoded in a timed request
    speed_prompt: Sequence[int] = ()  # token ids of the prompt to time; () to time nothing
    n_rounds: int = 5  # how often each contender is timed

    def n_prompt(self, item: TextItem) -> int:
        """Return the number of prompt tokens of a text. The next token is given, because prefill predicts it."""
        return len(item.tokens) - self.n_continuation - 1

    @property
    def prompt_lengths(self) -> list[int]:
        """The lengths of all prompts in tokens, ascending."""
        found = {*map(self.n_prompt, self.texts), *(len(item.prompt) for item in self.questions)}
        return sorted(found | ({len(self.speed_prompt)} if self.speed_prompt else set()))

    def results(self) -> list[Key]:
        """Return the keys of all results."""
        items = [(f"round/{i}", SPEED) for i in range(self.n_rounds if self.speed_prompt else 0)]
        items += [(text.id, CONTINUATION) for text in self.texts]
        items += [(question.id, ANSWER) for question in self.questions]
        return [(item, each.name, what) for item, what in items for each in self.contenders]

    @property
    def hash(self) -> str:
        """A hash of everything that results depend on, and of their format (number 5)."""
        contenders = [(each.name, each.key) for each in self.contenders]
        items = self.texts, self.questions, self.n_continuation, self.speed_prompt, self.n_rounds
        return content_hash((contenders, items, 5))


def kept(work: Work, memo: Memo) -> dict[Key, Record]:
    """Return the results that a memo has."""
    found: dict[Key, Record | None] = {key: memo.find(_name(key), Record) for key in work.results()}
    return {key: record for key, record in found.items() if record is not None}


def _name(key: Key) -> str:
    return " | ".join(key)


def run(work: Work, memo: Memo, llm: AdaSkipLlama, on_progress: Callable[[float], None] = lambda _: None) -> None:
    """Measure the results that a memo lacks, and keep each one at once."""
    left = {*work.results()} - kept(work, memo).keys()
    total = len(left)
    for records in chain(_times(work, llm, left), _continuations(work, llm, left), _answers(work, llm, left)):
        memo.keep({_name(key): record for key, record in records.items()})
        left -= records.keys()
        on_progress(1.0 - len(left) / total)


def _times(work: Work, llm: AdaSkipLlama, left: Set[Key]) -> Iterator[dict[Key, Record]]:
    """Time all contenders, a round after the other. A round is kept as a whole, so it is not split over two runs."""
    contenders, prompt, n_decoded = work.contenders, work.speed_prompt, work.n_continuation
    rounds = [i for i in range(work.n_rounds) if any((f"round/{i}", each.name, SPEED) in left for each in contenders)]
    for contender in contenders if rounds else ():
        llm.set_plan(contender.plan_for(len(prompt)))
        time_request(llm, prompt[: _WARM_UP[0]], min(_WARM_UP[1], n_decoded))
    for i in rounds:
        records = {}
        for contender in (contenders[index] for index in in_turn(len(contenders), i)):
            llm.set_plan(contender.plan_for(len(prompt)))
            seconds = seconds_of(time_request(llm, prompt, n_decoded))
            records[f"round/{i}", contender.name, SPEED] = Record(seconds)
        yield records


def _continuations(work: Work, llm: AdaSkipLlama, left: Set[Key]) -> Iterator[dict[Key, Record]]:
    for item in work.texts:
        split = work.n_prompt(item)
        judge = Judge(llm, [Probe(item.id, "continuation", item.tokens, split, item.tokens[split:])])
        for contender in work.contenders:
            if (key := (item.id, contender.name, CONTINUATION)) in left:
                [scores] = judge(contender.plan_for(split))
                values: dict[str, float | None] = {
                    "loss": float(np.mean(judge.whole_losses[0] + scores.loss)),
                    "kl": float(scores.divergence.mean()),
                    "agreement": float(scores.agrees.mean()),
                }
                divergences = tuple(float(f"{each:.4g}") for each in scores.divergence)
                yield {key: Record(values, divergences=divergences)}


def _answers(work: Work, llm: AdaSkipLlama, left: Set[Key]) -> Iterator[dict[Key, Record]]:
    """Score answers. A prefix shared with the previous question, such as a document, is not read again."""
    for contender in work.contenders:
        llm.reset()
        for item in work.questions:
            if (key := (item.id, contender.name, ANSWER)) in left:
                llm.set_plan(contender.plan_for(len(item.prompt)))
                text = greedy_text(llm, item.prompt, item.max_tokens, first_line=item.first_line)
                yield {key: Record({"score": item.score(text)}, text)}


def seconds_of(time: RequestTime) -> dict[str, float | None]:
    """Return seconds by the names of speeds; per token their mean, as schedules and the online stage start slowly."""
    settled = time.token_s[min(N_SETTLE, len(time.token_s) - 1) :]
    request = time.first_token_s + sum(time.token_s)
    return {"first_token": time.first_token_s, "per_token": fmean(settled), "request": request}
