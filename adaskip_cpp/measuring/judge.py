"""Judges quality: compares a plan with the whole model, token by token, on known answers that follow prompts.

For calibration, tuning, evaluation and the demo. Start at :class:`Judge`; :func:`probes_of` makes its probes.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from ..engine.llama import AdaSkipLlama
from ..errors import DataError
from ..model.plan import DEFAULT_HEAD, DEFAULT_TAIL, SkipPlan
from .corpus import tokens_of

Logits: TypeAlias = npt.NDArray[np.float32]
ProbeKind: TypeAlias = Literal["continuation", "copying", "retrieval"]
KINDS: tuple[ProbeKind, ...] = get_args(ProbeKind)

N_CONTINUED, N_COPIED, N_CUE = 48, 72, 8  # tokens of continuing and copying answers; the cue of a copy is not judged

_MOST_KEPT = 1024
"""Likeliest tokens of the whole model whose probabilities are kept; the rest counts as one token. On 1,304 judged
tokens of SmolLM2 that lowers a mean divergence of 0.065 by 2.3%, 0.027 by 1.7%, 0.84 by 0.8%. Each token takes 8 KB."""


@dataclass(frozen=True)
class Probe:
    """A prompt and an answer of known tokens."""

    text: str  # name of its text; probes of different texts are independent, those of one text are not
    kind: ProbeKind  # whether the answer continues the prompt, copies a part of it, or is a pass key
    tokens: tuple[int, ...]  # the text, one object for all its probes; the prompt is its first n_prompt tokens
    n_prompt: int
    answer: tuple[int, ...]  # tokens that follow the prompt
    n_cue: int = 1  # tokens of the answer that are given and not judged, at least 1


@dataclass(frozen=True)
class Scores:
    """A plan compared with the whole model on one probe: arrays with one value per judged token."""

    divergence: npt.NDArray[np.float64]  # KL(whole model || plan) in nats
    loss: npt.NDArray[np.float64]  # that the plan adds, in nats
    agrees: npt.NDArray[np.bool_]  # whether both find the same token likeliest
    right: npt.NDArray[np.bool_]  # whether the plan finds the answer's token likeliest
    whole_margin: npt.NDArray[np.float64]  # nats by which the whole model prefers the answer's token to the best other


class Judge:
    """Compares plans with the whole model, which reads the probes once, before the first plan is judged.

    Probes of one text must be adjacent, with growing ``n_prompt``: their prompts continue each other in the cache, and
    answers are removed from it. A plan and the whole model read the same batches, because other batches round
    differently. So a plan with another head or tail than before makes the whole model read again. Judging changes the
    model's plan and its cache.
    """

    def __init__(self, llm: AdaSkipLlama, probes: Sequence[Probe]) -> None:
        if not probes:
            raise DataError("there is nothing to judge; give at least one text")
        for probe in probes:
            if not (1 <= probe.n_cue < len(probe.answer) and 1 <= probe.n_prompt <= len(probe.tokens)):
                raise DataError(f"a probe of {probe.text!r} has no prompt or no answer to judge; give a longer text")
            if probe.n_prompt + len(probe.answer) > llm.context_size:
                raise DataError(
                    f"a probe of {probe.text!r} has {probe.n_prompt + len(probe.answer)} tokens, the context "
                    f"{llm.context_size}; use a larger context"
                )
        self._llm, self.probes = llm, tuple(probes)
        self._whole: list[_Reference] = []
        self._around = DEFAULT_HEAD, DEFAULT_TAIL

    def __call__(self, plan: SkipPlan | None) -> tuple[Scores, ...]:
        """Return the scores of a plan, or of the whole model against itself, for each probe."""
        if plan is not None and plan.bulk is not None and (plan.bulk.head, plan.bulk.tail) != self._around:
            self._around, self._whole = (plan.bulk.head, plan.bulk.tail), []
        self.read_whole()
        pairs = zip(self._whole, self._answers(plan), self.probes, strict=True)
        return tuple(whole.scores(logits, _targets(probe)) for whole, logits, probe in pairs)

    def edited(self, texts: Collection[str], read: Callable[[Probe], object]) -> tuple[list[Probe], list[Scores]]:
        """Return the probes of these texts, and the scores of the whole model that reaches each prompt by edits.

        ``read`` fills the empty memory with earlier forms of a probe's prompt, and then with this prompt.
        """
        self.read_whole()
        kept = [(probe, whole) for probe, whole in zip(self.probes, self._whole, strict=True) if probe.text in texts]
        probes = [probe for probe, _ in kept]
        answers = zip(kept, self._answers(None, probes, read), strict=True)
        return probes, [whole.scores(logits, _targets(probe)) for (probe, whole), logits in answers]

    @property
    def whole_losses(self) -> tuple[npt.NDArray[np.float64], ...]:
        """The whole model's loss at each judged token of each probe, in nats."""
        self.read_whole()
        return tuple(each.loss for each in self._whole)

    def read_whole(self) -> None:
        """Let the whole model read the probes, unless it has already."""
        if not self._whole:
            answers = zip(self.probes, self._answers(None), strict=True)
            self._whole = [_Reference.of(logits, _targets(probe)) for probe, logits in answers]

    def _answers(
        self,
        plan: SkipPlan | None,
        probes: Sequence[Probe] | None = None,
        read: Callable[[Probe], object] | None = None,
    ) -> Iterator[Logits]:
        """Yield, for each probe, the logits that predict its judged tokens, float32 ``[n, n_vocab]``."""
        llm = self._llm
        bulk = None if plan is None else plan.bulk
        head, tail = self._around if bulk is None else (bulk.head, bulk.tail)
        llm.set_plan(plan)
        text, n_prompt, n_bulk = tuple[int, ...](), 0, 0  # in the cache: the text, its prompt, and that before the tail
        for probe in self.probes if probes is None else probes:
            tokens, begin = probe.tokens, max(probe.n_prompt - tail, 0)
            is_same = text is tokens and not llm.has_state
            if is_same and n_prompt == probe.n_prompt:
                llm.truncate(n_prompt)
            elif read is not None:
                llm.reset()
                read(probe)
            else:
                if is_same and begin >= n_bulk:
                    llm.truncate(n_bulk)
                else:
                    llm.reset()
                    n_bulk = 0
                llm.eval(tokens[n_bulk : min(head, begin)])
                llm.eval_bulk(tokens[max(n_bulk, min(head, begin)) : begin])
                llm.eval(tokens[begin : probe.n_prompt])
                n_bulk = begin
            llm.begin_request()
            logits = np.concatenate([llm.logits_after(each) for each in _pieces(probe.answer[:-1], plan)])
            text, n_prompt = tokens, probe.n_prompt
            yield logits[probe.n_cue - 1 :]


def _targets(probe: Probe) -> npt.NDArray[np.int64]:
    return np.array(probe.answer[probe.n_cue :], np.int64)


def _pieces(tokens: Sequence[int], plan: SkipPlan | None) -> Iterator[Sequence[int]]:
    """Cut an answer where the skip set may change, because one batch has one set."""
    ends = [] if plan is None else [start for start, _ in plan.schedule]
    if plan is not None and plan.online is not None:
        ends.append(plan.online.window)
    for begin, end in pairwise(sorted({0, len(tokens), *(end for end in ends if end < len(tokens))})):
        yield tokens[begin:end]


@dataclass(frozen=True)
class _Reference:
    """The whole model's distributions: of each, the likeliest tokens, and all others together."""

    ids: npt.NDArray[np.int32]  # [n, kept]
    log_p: npt.NDArray[np.float32]  # [n, kept + 1]
    loss: npt.NDArray[np.float64]
    best: npt.NDArray[np.int64]
    margin: npt.NDArray[np.float64]

    @classmethod
    def of(cls, logits: Logits, targets: npt.NDArray[np.int64]) -> "_Reference":
        log_sums = _log_sums(logits)
        n = min(_MOST_KEPT, logits.shape[1] - 1)
        ids = np.argpartition(logits, -n, axis=1)[:, -n:]
        kept = np.take_along_axis(logits, ids, axis=1) - log_sums[:, None]
        at = np.arange(len(logits))
        mine = logits[at, targets].astype(np.float64)
        others = logits.copy()
        others[at, targets] = -np.inf
        return cls(
            ids.astype(np.int32), _with_rest(kept), log_sums - mine, logits.argmax(axis=1), mine - others.max(axis=1)
        )

    def scores(self, logits: Logits, targets: npt.NDArray[np.int64]) -> Scores:
        log_sums = _log_sums(logits)
        kept = np.take_along_axis(logits, self.ids.astype(np.int64), axis=1) - log_sums[:, None]
        other, mine = _with_rest(kept), self.log_p.astype(np.float64)
        with np.errstate(invalid="ignore"):  # a token that cannot follow has minus infinity
            terms = np.exp(mine) * (mine - other)
        terms[np.isneginf(mine)] = 0.0
        best = logits.argmax(axis=1)
        loss = log_sums - logits[np.arange(len(logits)), targets] - self.loss
        divergence = np.maximum(terms.sum(axis=1), 0.0)
        return Scores(divergence, loss, best == self.best, best == targets, self.margin)


def _log_sums(logits: Logits) -> npt.NDArray[np.float64]:
    """Return the logarithm of the sum of exponentials of each row, float64 ``[n]``."""
    most = logits.max(axis=1)
    sums = np.array([np.exp(row - high).sum(dtype=np.float64) for row, high in zip(logits, most, strict=True)])
    return np.asarray(np.log(sums) + most)


def _with_rest(log_p: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Append to each row the logarithm of 1 minus the sum of its probabilities."""
    rest = np.maximum(1.0 - np.exp(log_p.astype(np.float64)).sum(axis=1), 1e-12)
    return np.concatenate([log_p, np.log(rest)[:, None]], axis=1).astype(np.float32)


_SHIPS = "Ophelia", "Endeavour", "Kestrel", "Aurora", "Nautilus", "Meridian", "Calypso", "Halcyon", "Sirius", "Tempest"
_HIDDEN = "The pass key", "The name of the ship"
_LATER = "\n\nThe captain says that the ship sails at dawn.\n\n"


def passkeys(i: int) -> tuple[str, str]:
    """Return what the prompt of the i-th text hides: a number and the name of a ship; those of -1 - i are others."""
    return str(10007 + 7919 * i % 89989), _SHIPS[i % len(_SHIPS)]


def passkey_lines(tokenizer: AdaSkipLlama, i: int) -> list[int]:
    """Return the tokens that hide the pass keys of the i-th text in a prompt."""
    pairs = zip(_HIDDEN, passkeys(i), strict=True)
    lines = [f"{name} is {word}. Remember it. {word} is {name.lower()}.\n\n" for name, word in pairs]
    return tokens_of(tokenizer, "\n\n" + "".join(lines))


def probes_of(
    tokenizer: AdaSkipLlama,
    text: str,
    tokens: Sequence[int],
    cuts: Sequence[int],
    *,
    n_continued: int = N_CONTINUED,
    n_copied: int = N_COPIED,
    key: tuple[int, float] | None = None,
) -> list[Probe]:
    """Return the probes of a text: for each prompt length in ``cuts`` a continuation and, if it fits, a copy.

    A copy repeats the prompt from a quarter of its length on. If pass keys stand there, it begins after them, where the
    prompt is long enough: models copy these more easily than text. ``key`` hides the pass keys of that number at a
    depth, 0 to 1, of the longest prompt, and asks for them after that prompt. Half-way between, a line speaks of the
    ship without its name. Raises DataError if the text is too short: it must have ``n_continued`` tokens after the last
    cut.
    """
    if not cuts or len(tokens) < max(cuts) + n_continued:
        raise DataError(f"text {text!r} has {len(tokens)} tokens, prompts up to {max(cuts, default=0)} need "
                        f"{max(cuts, default=0) + n_continued}; give a longer text")  # fmt: skip
    given, hidden = list(tokens), range(0)
    if key is not None:
        at = max(round(key[1] * max(cuts)), 1)
        later = (at + max(cuts)) // 2
        given[later:later] = tokens_of(tokenizer, _LATER)
        lines = passkey_lines(tokenizer, key[0])
        given[at:at] = lines
        hidden = range(at, at + len(lines))
    whole, found = tuple(given), list[Probe]()
    for cut in sorted(cuts):
        found.append(Probe(text, "continuation", whole, cut, whole[cut : cut + n_continued]))
        begin = cut // 4
        if begin < hidden.stop and hidden.start < begin + n_copied and hidden.stop + n_copied <= cut:
            begin = hidden.stop
        copied = whole[begin : begin + n_copied]
        if len(copied) > 2 * N_CUE and begin + n_copied <= cut:
            found.append(Probe(text, "copying", whole, cut, copied, N_CUE))
    for name, word in () if key is None else zip(_HIDDEN, passkeys(key[0]), strict=True):
        question, stated = (tokens_of(tokenizer, f"\n\n{name} is{rest}") for rest in ("", f" {word}"))
        n_same = next((i for i, (a, b) in enumerate(zip(question, stated, strict=False)) if a != b), len(question))
        found.append(Probe(text, "retrieval", whole, max(cuts), tuple(stated), n_same))
    return found
