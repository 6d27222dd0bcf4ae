"""Judges quality: compares a plan with the whole model on known answers, token by token. Start at :class:`Judge`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ..engine.llama import AdaSkipLlama
from ..engine.runs import Saved
from ..errors import DataError
from ..model.arrays import Flags, Floats, Vectors
from ..model.plan import Bulk, SkipPlan
from ..model.skip_set import SkipSet
from .probes import Probe

Logits: TypeAlias = npt.NDArray[np.float32]

_MOST_KEPT = 1024
"""Likeliest tokens of the whole model whose probabilities are kept; the rest counts as one token. On 1,304 judged
tokens of SmolLM2 that lowers a mean divergence of 0.065 by 2.3%, 0.027 by 1.7%, 0.84 by 0.8%. Each token takes 8 KB."""


@dataclass(frozen=True)
class Scores:
    """A plan compared with the whole model on one probe: arrays with one value per judged token."""

    divergence: Floats  # KL(whole model || plan) in nats
    loss: Floats  # that the plan adds, in nats
    agrees: Flags  # whether both find the same token likeliest
    right: Flags  # whether the plan finds the answer's token likeliest
    whole_margin: Floats  # nats by which the whole model prefers the answer's token to the best other


class Judge:
    """Compares plans with the whole model, which reads the probes once, before the first plan is judged.

    Probes of one text must be adjacent, with growing ``n_prompt``: their prompts continue each other in the cache, and
    answers are removed from it. A plan and the whole model read the same batches, because other batches round
    differently. So a plan with another head, tail or ``refit`` than before makes the whole model read again. Judging
    changes the model's plan and its cache.
    """

    def __init__(self, llm: AdaSkipLlama, probes: Sequence[Probe], *, refit: int = 0) -> None:
        if not probes:
            raise DataError("there is nothing to judge; give at least one text")
        for probe in probes:
            if not (1 <= probe.n_cue < len(probe.answer) and 1 <= probe.n_prompt <= len(probe.tokens)):
                raise DataError(f"a probe of {probe.text!r} has no prompt or no answer to judge; give a longer text")
            if (n := probe.n_prompt + len(probe.answer)) > (most := llm.context_size):
                raise DataError(f"a probe of {probe.text!r} has {n} tokens, the context {most}; use a larger context")
        self._llm, self.probes = llm, tuple(probes)
        self._whole: list[_Reference] = []
        self._n_each = 0
        self._around = Bulk(SkipSet.none(llm.n_layer), refit=refit)  # the last plan's: how prompts are cut

    def __call__(self, plan: SkipPlan | None) -> tuple[Scores, ...]:
        """Return the scores of a plan, or of the whole model against itself, for each probe."""
        return tuple(self.each(plan))

    def each(self, plan: SkipPlan | None) -> Iterator[Scores]:
        """Yield what calling the judge returns, one by one, so that a caller may stop early."""
        if plan is not None and plan.bulk is not None:
            if any(getattr(plan.bulk, name) != getattr(self._around, name) for name in ("head", "tail", "refit")):
                self._whole = []
            self._around = plan.bulk
        self.read_whole()
        for whole, logits in zip(self._whole, self._answers(plan), strict=True):
            yield whole.scores(logits)

    def put_first(self, text: str) -> None:
        """Judge the probes of this text before all others from now on."""
        order = sorted(range(len(self.probes)), key=lambda i: self.probes[i].text != text)
        self.probes = tuple(self.probes[i] for i in order)
        self._whole = [self._whole[i] for i in order if self._whole]

    def edited(self, read: Callable[[Probe], object]) -> tuple[list[Probe], list[Scores]]:
        """Return the probes after the longest prompt of each text, and the scores of the whole model on them.

        The whole model reaches each prompt by edits: ``read`` fills the empty memory with earlier forms of a probe's
        prompt, and then with this prompt.
        """
        self.read_whole()
        longest = {probe.text: probe.n_prompt for probe in self.probes}  # the last of each text
        kept = [i for i, probe in enumerate(self.probes) if probe.n_prompt == longest[probe.text]]
        probes = [self.probes[i] for i in kept]
        answers = zip(kept, self._answers(None, probes, read), strict=True)
        return probes, [self._whole[i].scores(logits) for i, logits in answers]

    @property
    def whole_losses(self) -> tuple[Floats, ...]:
        """The whole model's loss at each judged token of each probe, in nats."""
        self.read_whole()
        return tuple(each.loss for each in self._whole)

    @property
    def n_each(self) -> int:
        """Tokens that the whole model reads for all probes, and each plan too."""
        self.read_whole()
        return self._n_each

    @property
    def n_evaluated(self) -> int:
        """Tokens that the model has read so far, for all its users."""
        return self._llm.n_evaluated

    def read_whole(self) -> None:
        """Let the whole model read the probes, unless it has already."""
        if not self._whole:
            before = self.n_evaluated
            answers = zip(self.probes, self._answers(None), strict=True)
            self._whole = [_Reference(probe.answer[probe.n_cue :], logits) for probe, logits in answers]
            self._n_each = self.n_evaluated - before

    def _answers(
        self, plan: SkipPlan | None, probes: Sequence[Probe] = (), read: Callable[[Probe], object] | None = None
    ) -> Iterator[Logits]:
        """Yield, for each probe, the logits that predict its judged tokens, float32 ``[n, n_vocab]``."""
        llm, around = self._llm, self._around
        llm.set_plan(plan)
        text, n_prompt, n_bulk = tuple[int, ...](), 0, 0  # in the cache: the text, its prompt, and that before the tail
        saved: Saved | None = None  # the prompt, for a model that cannot take an answer out of its memory
        for probe in probes or self.probes:
            tokens, begin = probe.tokens, max(probe.n_prompt - around.tail, 0)
            is_same = text is tokens
            if is_same and n_prompt == probe.n_prompt and saved is not None:
                llm.load_prompt(saved)
            elif is_same and n_prompt == probe.n_prompt:
                llm.truncate(n_prompt)
            elif read is not None:
                llm.reset()
                read(probe)
            else:
                if is_same and begin >= n_bulk and not llm.has_state:
                    llm.truncate(n_bulk)
                else:
                    llm.reset()
                    n_bulk = 0
                first, last = around.span(n_bulk, probe.n_prompt - n_bulk)
                start = n_bulk + first if last else begin
                llm.eval(tokens[n_bulk:start])
                for first, last, _ in around.pieces(start, begin, is_fitted=n_bulk > 0):
                    llm.eval_bulk(tokens[first:last])
                # The model itself cuts the tail of a plan. The whole model reads the same batches.
                for end in (probe.n_prompt - around.last, probe.n_prompt) if plan is None else (probe.n_prompt,):
                    llm.eval(tokens[llm.n_tokens : max(end, llm.n_tokens)])
                n_bulk = begin
                saved = llm.save_prompt() if llm.has_state else None
            llm.begin_request()
            logits = [llm.logits_after(each) for each in _pieces(probe.answer[:-1], plan)]
            text, n_prompt = tokens, probe.n_prompt
            yield (logits[0] if len(logits) == 1 else np.concatenate(logits))[probe.n_cue - 1 :]


def _pieces(tokens: Sequence[int], plan: SkipPlan | None) -> Iterator[Sequence[int]]:
    """Cut an answer where the skip set may change, because one batch has one set."""
    ends = [] if plan is None else [start for start, _ in plan.schedule]
    if plan is not None and plan.online is not None:
        ends.append(plan.online.window)
    for begin, end in pairwise(sorted({0, len(tokens), *(end for end in ends if end < len(tokens))})):
        yield tokens[begin:end]


class _Reference:
    """The whole model's distributions: of each, the likeliest tokens, and all others together. Changes ``logits``."""

    def __init__(self, targets: tuple[int, ...], logits: Logits) -> None:
        log_sums, at, n = _log_sums(logits), np.arange(len(logits)), min(_MOST_KEPT, logits.shape[1] - 1)
        self.targets = np.array(targets, np.int64)  # the answer's tokens
        self.ids = np.argpartition(logits, -n, axis=1)[:, -n:].astype(np.int32)  # [n, kept]
        self.log_p = _log_p(logits, log_sums, self.ids)  # [n, kept + 1]
        mine, self.best = logits[at, self.targets].astype(np.float64), logits.argmax(axis=1)
        logits[at, self.targets] = -np.inf
        self.loss, self.margin = log_sums - mine, mine - logits.max(axis=1)

    def scores(self, logits: Logits) -> Scores:
        log_sums = _log_sums(logits)
        other, mine = _log_p(logits, log_sums, self.ids), self.log_p.astype(np.float64)
        with np.errstate(invalid="ignore"):  # a token that cannot follow has minus infinity
            terms = np.exp(mine) * (mine - other)
        terms[np.isneginf(mine)] = 0.0
        best = logits.argmax(axis=1)
        loss = log_sums - logits[np.arange(len(logits)), self.targets] - self.loss
        divergence = np.maximum(terms.sum(axis=1), 0.0)
        return Scores(divergence, loss, best == self.best, best == self.targets, self.margin)


def _log_sums(logits: Logits) -> Floats:
    """Return the logarithm of the sum of exponentials of each row, float64 ``[n]``."""
    most = logits.max(axis=1)
    sums = np.array([np.exp(row - high).sum(dtype=np.float64) for row, high in zip(logits, most, strict=True)])
    return np.asarray(np.log(sums) + most)


def _log_p(logits: Logits, log_sums: Floats, ids: npt.NDArray[np.int32]) -> Vectors:
    """Return log probabilities of some tokens of each row, and last that of all other tokens together."""
    log_p = np.take_along_axis(logits, ids.astype(np.int64), axis=1) - log_sums[:, None]
    rest = np.maximum(1.0 - np.exp(log_p).sum(axis=1), 1e-12)
    return np.concatenate([log_p, np.log(rest)[:, None]], axis=1).astype(np.float32)
