"""Finds the fastest settings of the whole model on this machine, for ``tune.py``. Start at :func:`fastest_settings`."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median
from time import perf_counter
from types import MappingProxyType
from typing import Any

from ..calibration.cost import can_fill, fill
from ..engine.cores import logical_cores, physical_cores
from ..engine.llama import AdaSkipLlama
from ..errors import AdaSkipError, RequestError
from ..measuring.timing import SecondsByDepth
from ..model.settings import Repack, Settings, Tried, in_words
from ..progress import OnProgress

MOST_TOKENS = 14_000  # that all trials together read through the model

_DEEPEST = 8192  # tokens of the longest prompts whose last tokens are timed; longer ones are extrapolated
_READ_DEPTH = 1280  # tokens before a piece is timed again, if these must be read
_PIECE, _SHORT_PIECE = 512, 256  # timed tokens of a prompt: a ubatch if depth matters; half to compare matrix products
_N_DECODE = 12  # timed tokens of an answer, after an untimed one that builds the graph
_WARM_UP = 2, 1  # untimed tokens of prompt and answer: they read the weights into memory and wake the threads
# A candidate that takes so many times as long in the first round gets no second one. Times of one setting vary by 20%.
_CLEARLY_SLOWER = 1.2
_MARGIN, _MARGIN_OF_ONE = 0.03, 0.10  # share of the time that must be saved in several rounds, or in a single one
_LEAST_SHARE = 0.1  # of the weights that can be unpacked: types with less are not tried
_NOT_QUANTIZED = {"0", "1", "32"}  # general.file_type of F32, F16 and BF16: llama.cpp repacks quantized weights only
_FAILURES = (AdaSkipError, RuntimeError, ValueError, MemoryError, OSError)


@dataclass(frozen=True)
class FoundSettings:
    """The fastest ``settings``, all that were ``tried``, in order, and the number of tokens read for that."""

    settings: Settings
    tried: tuple[Tried, ...]
    n_tokens: int


def fastest_settings(
    open_model: Callable[[Settings, int], AdaSkipLlama],
    *,
    context: int,
    n_answer: int,
    given: Mapping[str, Any] = MappingProxyType({}),
    on_progress: OnProgress = lambda fraction, words="": None,
) -> FoundSettings:
    """Find the settings under which the whole model answers a request fastest on this machine.

    Settings are varied one at a time: threads for answers, flash attention, repacking, repacking of Q5_0 too, unpacking
    of one type of weights after the other, threads for prompts, batch size. If flash attention makes answers slower, it
    is also tried in prompts alone. Each candidate is timed in turn with the best settings so far (best, candidate,
    candidate, best), in newly opened models. It replaces them if it is faster in both rounds and saves 3% of the
    request's time on average. If two rounds disagree, the median of three decides. For threads, the time of their own
    phase counts. A candidate that fails is not chosen. All trials together read at most ``MOST_TOKENS`` tokens.
    Settings that are not reached keep their defaults.

    First and last tokens of a prompt of up to 8,192 tokens are timed. Those between skip every sublayer, so they cost
    little, and are not counted. If a sublayer cannot be skipped, times are extrapolated from a shorter prompt.

    ``open_model`` opens the model without a plan, with settings and a context of so many tokens. A prompt has
    ``context`` tokens, its answer ``n_answer``. The user's ``given`` settings are not varied.

    Raises:
        RequestError: ``context`` or ``n_answer`` is too small.
        AdaSkipError: the model cannot be opened or run with ``given`` and the defaults.
    """
    for name, value, least in (("context", context, 1), ("n_answer", n_answer, 0)):
        if value < least:
            raise RequestError(f"{name} is {value}; use {least} or more tokens")
    return _Search(open_model, context, n_answer, given, on_progress).run()


@dataclass(frozen=True)
class _Rates:
    prompt: SecondsByDepth
    token: SecondsByDepth


@dataclass(frozen=True)
class _Trial:
    rates: _Rates | None = None  # of the changed settings; None if they were not tried, or failed
    chosen: bool = False


@dataclass(frozen=True)
class _Shape:
    """The tokens of prompt and answer that are timed for a candidate, at depth 0 and, if not 0, again at ``depth``."""

    piece: int
    n_decode: int
    depth: int = 0
    fills: bool = True  # whether the tokens up to ``depth`` skip every sublayer; else they are read, and counted

    @property
    def part(self) -> int:
        """Tokens that one measurement at one depth reads."""
        return self.piece + (self.n_decode + 1 if self.n_decode else 0)

    @property
    def first(self) -> int:
        """Tokens that a newly opened model reads up to the end of its first measurement."""
        return sum(_WARM_UP) + self.part + (0 if not self.depth else self.part if self.fills else self.depth)

    @property
    def size(self) -> int:
        """Most tokens in the context: a second measurement follows the first."""
        return self.depth + 2 * self.part

    def fitted(self, llm: AdaSkipLlama) -> "_Shape":
        """Return the shape with a depth for which this model has room. It is less if the tokens must be read."""
        fills = can_fill(llm)
        depth = min(self.depth if fills else _READ_DEPTH, self.depth, llm.context_size - 2 * self.part)
        return replace(self, depth=depth if depth >= self.part else 0, fills=fills)


class _Visit:
    """An opened model. It measures (depth, seconds per token) for the tokens of a prompt and of an answer."""

    def __init__(self, llm: AdaSkipLlama, shape: _Shape, count: Callable[[int], None]) -> None:
        self._llm, self._shape, self._count = llm, shape, count
        self._tokens = [index * 7919 % llm.n_vocab() for index in range(max(shape.piece, shape.depth, *_WARM_UP))]
        self._short: tuple[list[tuple[float, float]], list[tuple[float, float]]] | None = None
        self._read(_WARM_UP[0])
        self._decode(_WARM_UP[1])

    def measure(self, base: _Rates) -> _Rates:
        """Time one round. Rates that this shape does not time are taken from ``base``."""
        if self._short is None or not self._shape.depth:
            self._llm.reset()
            self._short = self._part()
        prompt, token = ([*points] for points in self._short)
        if self._shape.depth:
            n = max(self._shape.depth - self._llm.n_tokens, 0)  # in the second round the cache is deeper already
            if n and self._shape.fills:
                fill(self._llm, self._tokens[:n])
            else:
                self._read(n)
            for points, more in zip((prompt, token), self._part(), strict=True):
                points.extend(more)
        return _Rates(
            SecondsByDepth.through(prompt, base.prompt.growth) if prompt else base.prompt,
            SecondsByDepth.through(token, base.token.growth) if token else base.token,
        )

    def _part(self) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
        prompt, token, shape = [], [], self._shape
        if shape.piece:
            depth = self._llm.n_tokens
            prompt.append((depth + shape.piece / 2, self._read(shape.piece) / shape.piece))
        if shape.n_decode:
            self._decode(1)
            depth = self._llm.n_tokens
            token.append((depth + shape.n_decode / 2, median(self._decode(shape.n_decode))))
        return prompt, token

    def _read(self, n: int) -> float:
        return self._timed(self._llm.eval_bulk, self._tokens[:n]) if n else 0.0

    def _decode(self, n: int) -> list[float]:
        return [self._timed(self._llm.eval_decode, self._tokens[:1]) for _ in range(n)]

    def _timed(self, evaluate: Callable[[list[int]], None], tokens: list[int]) -> float:
        self._count(len(tokens))
        start = perf_counter()
        evaluate(tokens)
        self._llm.synchronize()
        return perf_counter() - start


@dataclass
class _Search:
    open_model: Callable[[Settings, int], AdaSkipLlama]
    context: int
    n_answer: int
    given: Mapping[str, Any]
    on_progress: OnProgress

    def __post_init__(self) -> None:
        self._best, self._words, self._left = Settings(**self.given), "", MOST_TOKENS
        self._rates = _Rates(SecondsByDepth(0.0, 0.0), SecondsByDepth(0.0, 0.0))  # of the best settings
        self._tried: list[Tried] = []
        self._unpackable: dict[Repack, dict[str, int]] = {}

    def run(self) -> FoundSettings:
        piece, n_decode = min(_PIECE, self.context), _N_DECODE if self.n_answer else 0
        self._deep = _Shape(piece, n_decode, max(min(self.context, _DEEPEST) - piece, 0))
        short = _Shape(min(_SHORT_PIECE, self.context), n_decode)
        self._rates = self._measure(self._best, self._deep)
        self._record(self._best, [self._rates], chosen=True)
        cores = [n for n in dict.fromkeys((physical_cores(), physical_cores() - 1, logical_cores())) if n >= 1]
        for n in cores:
            if n != self._threads["n_threads"] and n_decode:
                self._try(replace(short, piece=0), n_threads=n)
        # With more threads for answers, slow answers under flash attention weigh less against fast prompts.
        before, flash_attn = self._rates, not self._best.flash_attn
        flash = self._try(self._deep, flash_attn=flash_attn).rates
        if flash_attn and flash and flash.token.at(self.context) > before.token.at(self.context):
            self._try(replace(self._deep, piece=0), base=flash, flash_attn="prompts")
        if self._file_type not in _NOT_QUANTIZED:
            self._try(short, repack=not self._best.repack)
            if self._repackable:
                self._try(short, repack="all")
        unpackable = self._unpackable[self._best.repack]
        for name in sorted(unpackable, key=lambda each: -unpackable[each]):
            if unpackable[name] >= _LEAST_SHARE * sum(unpackable.values()):
                self._try(replace(short, n_decode=0), unpack=(*self._best.unpack, name))
        for n in cores:
            if n != self._threads["n_threads_batch"]:
                self._try(replace(short, n_decode=0), n_threads_batch=n)
        self._try_batch_sizes()
        self.on_progress(1.0)
        return FoundSettings(self._best, tuple(self._tried), MOST_TOKENS - self._left)

    def _try_batch_sizes(self) -> None:
        """Try larger batches while they are faster; if none is, try a smaller one."""
        default = self._best.n_batch
        for size in (1024, 2048):
            if self.context <= self._best.n_batch or not self._try_batch(size).chosen:
                break
        if self._best.n_batch == default and self.context > 256:
            self._try_batch(256)

    def _try_batch(self, size: int) -> _Trial:
        whole = _Shape(min(size, self.context), 0)  # one batch of either size, or the whole prompt if it fits into one
        best = _Shape(self._best.n_batch, 0) if size <= self.context else whole
        return self._try(whole, best, n_batch=size, n_ubatch=size)

    def _try(
        self, shape: _Shape, best_shape: _Shape | None = None, base: _Rates | None = None, **change: Any
    ) -> _Trial:
        """Time the best settings and changed ones in turn. The better ones are now the best.

        ``base``: the changed settings' rates of what ``shape`` does not time; None for those of the best settings.
        """
        candidate, best_shape = replace(self._best, **change), best_shape or shape
        is_first = len(self._tried) == 1 and shape == self._deep  # the best settings were timed just now
        n_first, n_second = shape.first + (0 if is_first else best_shape.first), shape.part + best_shape.first
        if change.keys() & self.given.keys() or self._left < n_first:
            return _Trial()
        self._words = in_words(change)
        ours = [self._rates if is_first else self._measure(self._best, best_shape)]
        theirs: list[_Rates] = []
        try:
            with self._visit(candidate, shape) as visit:
                theirs.append(visit.measure(base or self._rates))
                if self._ratio(ours[0], theirs[0], change) < _CLEARLY_SLOWER and self._left >= n_second:
                    theirs.append(visit.measure(base or self._rates))
        except _FAILURES:
            theirs.clear()
        if len(theirs) > 1:
            ours.append(self._measure(self._best, best_shape))
        ratios = [self._ratio(a, b, change) for a, b in zip(ours, theirs, strict=False)]
        is_open = len(ratios) > 1 and min(ratios) <= 1 - _MARGIN and max(ratios) > 1
        if is_open and self._left >= shape.first + best_shape.first:
            # One round was disturbed. A third one, between two turns of the best settings, decides.
            with contextlib.suppress(*_FAILURES):
                theirs.append(self._measure(candidate, shape, base))
                ratios.append(self._ratio(_mean([ours[1], self._measure(self._best, best_shape)]), theirs[2], change))
                theirs = [theirs[ratios.index(median(ratios))]]
        chosen = _saves_time(ratios)
        self._record(candidate, theirs, chosen=chosen)
        if chosen:
            self._best, self._rates = candidate, _mean(theirs)
        return _Trial(_mean(theirs) if theirs else None, chosen)

    def _ratio(self, ours: _Rates, theirs: _Rates, change: Mapping[str, Any]) -> float:
        """Return the changed settings' time over the best ones', of a request or, for threads, of their phase."""
        if "n_threads" in change:
            before, after = ours.token.start, theirs.token.start
        elif "n_threads_batch" in change:
            before, after = ours.prompt.start, theirs.prompt.start
        else:
            before, after = self._request_s(ours), self._request_s(theirs)
        return after / before if before > 0 else 1.0

    def _request_s(self, rates: _Rates) -> float:
        prompt = self.context * rates.prompt.at(self.context / 2)
        return prompt + self.n_answer * rates.token.at(self.context + self.n_answer / 2)

    def _record(self, settings: Settings, rates: list[_Rates], *, chosen: bool) -> None:
        known = _mean(rates) if rates else _Rates(SecondsByDepth(math.inf, 0.0), SecondsByDepth(math.inf, 0.0))
        prompt, token = known.prompt, known.token.at(self.context)
        times = prompt.at(0), prompt.at(self.context), token, self._request_s(known) if rates else math.inf
        self._tried.append(Tried(settings, *times, chosen))

    def _measure(self, settings: Settings, shape: _Shape, base: _Rates | None = None) -> _Rates:
        with self._visit(settings, shape) as visit:
            return visit.measure(base or self._rates)

    @contextlib.contextmanager
    def _visit(self, settings: Settings, shape: _Shape) -> Iterator[_Visit]:
        size = max(self.context + self.n_answer, shape.size, sum(_WARM_UP))
        with contextlib.closing(self.open_model(settings, size)) as llm:
            if not self._tried:
                shape = self._deep = shape.fitted(llm)
                self._repackable = llm.repackable
                self._file_type = str(llm.metadata.get("general.file_type", ""))
                parameters: Any = llm.context_params
                self._threads = {name: int(getattr(parameters, name)) for name in ("n_threads", "n_threads_batch")}
            self._unpackable[settings.repack] = llm.unpackable
            yield _Visit(llm, shape, self._count)

    def _count(self, n: int) -> None:
        self._left -= n
        self.on_progress(min(1 - self._left / MOST_TOKENS, 1.0), self._words)


def _saves_time(ratios: Sequence[float]) -> bool:
    """Return whether rounds agree that a candidate is faster; ``ratios`` are its times over the best settings'."""
    if len(ratios) > 2:
        return median(ratios) <= 1 - _MARGIN
    margin = _MARGIN if len(ratios) > 1 else _MARGIN_OF_ONE
    return bool(ratios) and max(ratios) < 1 and mean(ratios) <= 1 - margin


def _mean(rates: Sequence[_Rates]) -> _Rates:
    def line(lines: Sequence[SecondsByDepth]) -> SecondsByDepth:
        return SecondsByDepth(mean(each.start for each in lines), mean(each.growth for each in lines))

    return _Rates(line([each.prompt for each in rates]), line([each.token for each in rates]))
