"""``SkipPlan``: the sublayers that each phase skips, with their compensation, for every package above."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Literal, SupportsIndex, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from ..errors import PlanError
from . import stored
from .identity import ModelInfo
from .skip_set import SkipSet, marked

Phase: TypeAlias = Literal["bulk", "prefill", "decode"]
PHASES: tuple[Phase, ...] = get_args(Phase)  # each token is evaluated in one, in the order of enum adaskip_phase
TIMED: tuple[Phase, Phase] = ("prefill", "decode")  # calibrated and timed: a whole prompt, and each token of an answer
ModeName: TypeAlias = Literal["prompt", "prefill", "decode", "e2e"]  # which phases skip: ``MODES`` in ``planning``
OnlineScale: TypeAlias = Literal["none", "paper", "median"]

# From docs/dev/method.md: a head of 1 would do for SmolLM2, and tails above 64 cost more than they gain.
DEFAULT_HEAD, DEFAULT_TAIL = 4, 64
CELLS = 256  # attention reads KV cells in blocks of this size, filled or not: ``llama_kv_cache::get_n_kv`` pads to it
DEFAULT_REFIT, REFIT_EVERY = 128, 2048
DEFAULT_WINDOW = 252  # with a head of 4 and ubatches of 512 it makes 3 blocks


def window_size_for(context: int, share: int = 8) -> int:
    """Return the window for prompts of ``context`` tokens: one ``share``-th, in blocks of 256 with the head."""
    return DEFAULT_WINDOW + CELLS * max(-(-context // (CELLS * share)) - 1, 0)


def whole_number(name: str, value: Any, least: int) -> int:
    """Return the value of a field as an int; raise a PlanError if it is no whole number from ``least`` on."""
    if isinstance(value, bool) or not (isinstance(value, int | np.integer) and least <= value < 2**31):
        raise PlanError(f"{name} is {value!r}; use a whole number from {least} on")
    return int(value)


@dataclass(frozen=True)
class OnlineStage:
    """The online stage: after its first decoded tokens, a request skips more FFNs. Impossible values raise a PlanError.

    Attributes:
        window: number of these tokens, from 1 on. They run under the decode set, and every other FFN is observed; the
            paper's authors use 20.
        threshold: IO similarity. An FFN whose mean over these tokens is at least this is skipped from then on.
        scale: the compensation of such an FFN, measured over these tokens: ``"paper"`` is the ratio of Frobenius norms
            of output and input, ``"median"`` the median of the tokens' ratios of norms, ``"none"`` is 1.
    """

    window: int = 20
    threshold: float = 1.0
    scale: OnlineScale = "paper"

    def __post_init__(self) -> None:
        if not (isinstance(self.threshold, int | float | np.number) and np.isfinite(self.threshold)):
            raise PlanError(f"the online threshold is {self.threshold!r}; use a similarity, a number of at most 1")
        if self.scale not in get_args(OnlineScale):
            raise PlanError(f"unknown online scale {self.scale!r}; use one of: {', '.join(get_args(OnlineScale))}")
        object.__setattr__(self, "window", whole_number("the online window", self.window, 1))
        object.__setattr__(self, "threshold", float(self.threshold))


@dataclass(frozen=True)
class Bulk:
    """The bulk of a prompt: its tokens between head and tail, and the sublayers that they skip.

    Later tokens need only K and V of the bulk. Skipped attentions still compute and store these. Impossible numbers,
    and windowed layers that the model lacks, raise a PlanError.

    Attributes:
        skip: the set that the bulk skips.
        head: tokens at the beginning of a sequence that are no bulk, from 0 on. Later tokens attend to them most.
        tail: tokens at the end of a prompt that are no bulk, from 1 on.
        windowed: layers, ascending. If the bulk runs such a layer's attention, it sees only the last ``window_size``
            tokens, the token itself included, and the head. The prompt's tail and the answer see all tokens. A sliding
            window of the model's own limits both.
        window_size: tokens that a windowed attention sees, from 1 on.
        refit: tokens of every 2,048 that skip nothing, and to which the maps of ``skip`` are fitted again for the other
            tokens; 0 if the maps stay as they are. With fits, these tokens have the windows too, but for those at the
            beginning of a prompt, and so do the tokens of the tail before its ``last`` ones.

    Examples:
        >>> from adaskip_cpp.model.skip_set import SkipSet
        >>> none = SkipSet.none(llm.n_layer)
        >>> SkipPlan(none, none, bulk=Bulk(none, windowed=(20, 21, 22), window_size=508))
    """

    skip: SkipSet
    _: KW_ONLY
    head: int = DEFAULT_HEAD
    tail: int = DEFAULT_TAIL
    windowed: tuple[int, ...] = ()
    window_size: int = DEFAULT_WINDOW
    refit: int = 0

    def __post_init__(self) -> None:
        # The tail is 1 or more, as somebody reads the last token's logits.
        for name, least in (("head", 0), ("tail", 1), ("window_size", 1), ("refit", 0)):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least))
        if self.refit >= REFIT_EVERY:
            raise PlanError(f"refit is {self.refit}; use a whole number from 0 to {REFIT_EVERY - 1}")
        windowed = np.flatnonzero(marked(self.skip.n_layer, self.windowed, ())[:, 0])
        object.__setattr__(self, "windowed", tuple(windowed.tolist()))

    @property
    def narrowed(self) -> tuple[int, ...]:
        """Layers whose attention runs and sees only a window: those windowed and not skipped."""
        return tuple(layer for layer in self.windowed if not self.skip.skip[layer, 0])

    @property
    def narrows(self) -> bool:
        """Whether tokens that skip nothing have the windows too: see ``refit``."""
        return bool(self.refit and self.narrowed)

    @property
    def last(self) -> int:
        """Tokens at the end of a tail that are read apart, and see all tokens: with fits 64 at most."""
        return min(self.tail, DEFAULT_TAIL) if self.refit else self.tail

    def scaled(self, context: int, of: int) -> "Bulk":
        """Return the bulk scaled from prompts of ``of`` tokens to ``context``: windows and tail keep their share."""
        share = max(round(of / (self.window_size + CELLS - DEFAULT_WINDOW)), 1)
        size = window_size_for(context, share) if self.narrowed else self.window_size
        tail = max(min(self.tail * context // of, context), self.tail)  # grows to the prompt at most
        return replace(self, window_size=size, tail=tail)

    def span(self, n_cached: int, n_tokens: int) -> tuple[int, int]:
        """Return begin and end of the bulk in ``n_tokens`` of a prompt after ``n_cached``; ``(0, 0)`` for none."""
        has_own_head = n_cached > 0 or self.head >= self.refit  # else it is read with the whole tokens of the fit
        begin, end = max(self.head - n_cached, 0) * has_own_head, n_tokens - self.tail
        return (begin, end) if begin < end else (0, 0)

    def pieces(self, begin: int, end: int, *, is_fitted: bool) -> Iterator[tuple[int, int, bool]]:
        """Cut positions of the bulk into pieces; yield begin and end of each, and whether it runs whole.

        With ``refit``, the first tokens run whole, unless the maps are fitted to the text before them, and the first
        after each multiple of 2,048.
        """
        while begin < end:
            is_whole = self.refit > 0 and not (is_fitted and begin % REFIT_EVERY)
            stop = begin + self.refit if is_whole else (begin // REFIT_EVERY + 1) * REFIT_EVERY if self.refit else end
            yield begin, min(stop, end), is_whole
            begin, is_fitted = stop, True

    @staticmethod
    def first_batch(n_cached: int, n_tokens: int, n_ubatch: int) -> int:
        """Return the size of the first batch, of a bulk of ``n_tokens`` after ``n_cached``.

        Each ubatch after it ends where a block of KV cells does. Otherwise each would read a block more: after a head
        of 4, ubatches of 512 would read 768, 1,280, ... cells instead of 512, 1,024, ...
        """
        past = n_cached % CELLS
        aligns = past and n_ubatch >= max(CELLS, 2 * past)  # small batches take long for each token
        return min(n_ubatch - past, n_tokens) if aligns else n_tokens


@dataclass(frozen=True)
class SkipPlan:
    """The sublayers that each phase of a request skips.

    ``SkipPlan.manual`` makes a plan from lists of layers, ``Profile.plan`` from a calibration. Sets that differ in
    their number of layers, and what the rules below forbid, raise a PlanError.

    Attributes:
        prefill: the set for a prompt, except for its bulk.
        decode: the set for an answer. It must skip each attention that ``prefill`` skips, because the prompt has no K
            and V there.
        schedule: several decode sets, ``((0, decode), (n1, set1), ...)``: each is in force after so many decoded tokens
            of the request. A set must skip each attention of the set before it. () if ``decode`` is always in force.
        online: the online stage of decode, or None. A plan has no schedule and online stage together.
        bulk: the bulk of prompts; None if whole prompts run under ``prefill``. It must skip each attention that
            ``prefill`` skips.
        model: the model that the plan was made for; None for any model with as many layers.
        strategy: name of the strategy that chose the sets, ``"manual"`` for lists of layers.
        compensation: name of the compensation, ``"manual"`` if it was given as numbers.
        mode: the mode, ``"manual"`` for sets given by hand.
    """

    prefill: SkipSet
    decode: SkipSet
    _: KW_ONLY
    schedule: tuple[tuple[int, SkipSet], ...] = ()
    online: OnlineStage | None = None
    bulk: Bulk | None = None
    model: ModelInfo | None = None
    strategy: str = "manual"
    compensation: str = "manual"
    mode: ModeName | Literal["manual"] = "manual"

    def __post_init__(self) -> None:
        if self.model is not None and self.model.n_layer != self.n_layer:
            raise PlanError(f"the plan has {self.n_layer} layers, its model has {self.model.n_layer}; make them equal")
        if self.mode not in (*get_args(ModeName), "manual"):
            raise PlanError(f"unknown mode {self.mode!r}; use one of: {', '.join(get_args(ModeName))}")
        if self.schedule:
            starts = [start for start, _ in self.schedule]
            if self.online is not None:
                raise PlanError("a plan has a decode schedule or an online stage, not both; leave one out")
            if self.schedule[0] != (0, self.decode):
                raise PlanError("the schedule does not begin with (0, decode); give the decode set first")
            if not all(isinstance(each, int | np.integer) and each < 2**31 for each in starts):
                raise PlanError(f"the schedule's token counts are {starts}; use whole numbers below 2,147,483,648")
            if starts != sorted({*starts}):
                raise PlanError(f"the schedule's token counts {starts} do not ascend; sort its sets by token count")
        later = [(f"the schedule's set at {start} tokens", each) for start, each in self.schedule[1:]]
        in_turn = [("prefill", self.prefill), ("decode", self.decode), *later]
        pairs = [*itertools.pairwise(in_turn), (in_turn[0], ("bulk", self.skipped("bulk")))]
        for (name, first), (other, then) in pairs:
            if first.n_layer != then.n_layer:
                raise PlanError(f"{name} is for {first.n_layer} layers but {other} for {then.n_layer}; make them equal")
            if holes := sorted({*first.attention} - {*then.attention}):
                raise PlanError(
                    f"{name} skips the attention of layers {holes}, which {other} runs: it would read KV that was "
                    "never written; skip it there too"
                )

    @classmethod
    def manual(
        cls,
        n_layer: int,
        attention: Iterable[SupportsIndex] = (),
        ffn: Iterable[SupportsIndex] = (),
        scale: npt.ArrayLike | None = None,
        phase: Literal["both", "bulk", "decode"] = "both",
    ) -> "SkipPlan":
        """Make a plan from lists of layers. Layers that the model lacks and other impossible values raise a PlanError.

        Args:
            n_layer: number of layers of the model.
            attention: layers whose attention is skipped, counted from 0.
            ffn: layers whose FFN is skipped, counted from 0.
            scale: compensation: a number, or float ``[n_layer, 2]`` with columns attention and FFN, of which only the
                values of skipped sublayers are used; 1.0 if None.
            phase: ``"both"`` skips in prompt and answer, ``"decode"`` in the answer alone, ``"bulk"`` in the bulk of a
                prompt alone, with the default head and tail.

        Examples:
            >>> plan = SkipPlan.manual(llm.n_layer, attention=[20, 21], ffn=[20, 21, 22], phase="bulk")
            >>> llm.set_plan(plan)
        """
        if n_layer < 1:
            raise PlanError(f"n_layer is {n_layer}; pass the model's number of layers, llm.n_layer")
        if phase not in ("both", "bulk", "decode"):
            raise PlanError(f"unknown phase {phase!r}; use 'both', 'bulk' or 'decode'")
        skip = marked(n_layer, attention, ffn)
        values = np.asarray(1.0 if scale is None else scale, np.float64)
        chosen = SkipSet(skip, values if values.ndim else np.full(skip.shape, values))
        none, name = SkipSet.none(n_layer), "none" if scale is None else "manual"
        if phase == "bulk":
            return cls(none, none, bulk=Bulk(chosen), compensation=name)
        return cls(chosen if phase == "both" else none, chosen, compensation=name)

    @property
    def n_layer(self) -> int:
        """Number of layers of the model."""
        return self.prefill.n_layer

    @property
    def decode_sets(self) -> tuple[tuple[int, SkipSet], ...]:
        """The schedule, or ``((0, decode),)`` without one."""
        return self.schedule or ((0, self.decode),)

    def decode_after(self, n_decoded: int) -> SkipSet:
        """Return the decode set in force after ``n_decoded`` decoded tokens of an answer."""
        return next(each for start, each in reversed(self.decode_sets) if start <= n_decoded)

    @property
    def sets(self) -> tuple[SkipSet, ...]:
        """All sets of the plan: bulk, prefill, and those of decode."""
        return (*([self.bulk.skip] if self.bulk else []), self.prefill, *(each for _, each in self.decode_sets))

    @property
    def is_whole(self) -> bool:
        """Whether the plan changes nothing in the model, apart from an online stage."""
        return not (self.narrowed or any(each.n_skip for each in self.sets))

    @property
    def prompt_phase(self) -> Literal["bulk", "prefill"]:
        """The phase of most tokens of a prompt: the bulk if there is one."""
        return "bulk" if self.bulk else "prefill"

    @property
    def narrowed(self) -> tuple[int, ...]:
        """Layers whose attention sees only a window in the bulk; none without a bulk."""
        return self.bulk.narrowed if self.bulk else ()

    @property
    def without_kv(self) -> tuple[int, ...]:
        """Layers that need no memory for K and V, because every phase skips their attention; none with a bulk."""
        return () if self.bulk else self.prefill.attention

    def skipped(self, phase: Phase) -> SkipSet:
        """Return the set of a phase: for the bulk, without one, that of prefill; for decode the schedule's last."""
        if phase == "decode":
            return self.decode_sets[-1][1]
        return self.bulk.skip if phase == "bulk" and self.bulk else self.prefill

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, as a plan file has them, without vectors and maps."""
        return stored.plain(vars(self))[0]
