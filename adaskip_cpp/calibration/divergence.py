"""What skipping a sublayer in the bulk of a prompt costs the tokens behind it: how prompts choose what to skip.

Similarity of input and output does not tell it: what a late sublayer does is seen by few K and V, and what an attention
does by fewer than what an FFN does. So each sublayer is skipped alone, with what stands in for it, in the bulk of a few
pieces of text, and the next tokens' distributions are compared with the whole model's.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ..engine.llama import AdaSkipLlama
from ..measuring.distribution import Logits, kl_divergences
from ..model.plan import Bulk, SkipPlan
from ..model.profile import Windows
from ..model.skip_set import KINDS, SkipSet
from ..planning.profile import Profile
from ..planning.request import PlanRequest
from .cost import set_aside

N_PIECES, N_PROMPT, N_BEHIND = 3, 192, 48
"""Pieces of text, and of each the tokens that are read as a prompt, and those behind them that are judged.

Of SmolLM2, pieces of 512 and 128 tokens choose almost the same sublayers, and lose as much at 1.4 times the speed."""


N_DEPTHS, SHORTEST = 5, 256
"""Numbers of windowed attentions that are measured, what lies between being interpolated, and the tokens of a piece
that has a bulk of several windows."""


def measure_divergence(
    llm: AdaSkipLlama,
    profile: Profile,
    pieces: Sequence[Sequence[int]],
    *,
    on_progress: Callable[[float], object] = lambda fraction: None,
) -> npt.NDArray[np.float64]:
    """Return what skipping each sublayer alone in the bulk costs, float64 ``[n_layer, 2]``, NaN where it cannot be.

    That is the mean Kullback-Leibler divergence, in nats, from the whole model's distributions behind the last tokens
    of each piece, a quarter of them or :data:`N_BEHIND`, which run whole behind the others as their prompt. All are
    skipped in the first piece, in the others the half that costs less there, as the rest is chosen last. The whole
    model reads the prompt in the same batches: the rounding of others is a divergence of 0.0017 on SmolLM2 by itself,
    more than what a few sublayers cost. The model's plan is set aside meanwhile; its KV cache is dropped.
    """
    may, divergence = np.argwhere(profile.in_bulk), np.full(profile.in_bulk.shape, np.nan)
    request, seen = PlanRequest(mode="prompt", strategy="manual", tail=1), 0.0
    first, others = pieces[:1], pieces[1:]
    share = 1 / (1 + len(others) / 2)  # of the time, for the first piece

    def measured(which: npt.NDArray[np.intp], of: Sequence[Sequence[int]], share: float) -> list[float]:
        skipped: list[dict[str, tuple[int, ...]]] = [{KINDS[kind]: (int(layer),)} for layer, kind in which]
        plans = [[profile.plan(PlanRequest.of(request, **each))] * len(of) for each in ({}, *skipped)]
        return list(_divergences(llm, of, plans, lambda fraction: on_progress(seen + share * fraction)))

    divergence[tuple(may.T)] = measured(may, first, share)
    if others:
        seen, cheaper = share, may[np.argsort(divergence[tuple(may.T)], kind="stable")[: -(-len(may) // 2)]]
        n_first, n_others = (sum(_n_behind(piece) for piece in of) for of in (first, others))
        both = np.array([divergence[tuple(cheaper.T)], measured(cheaper, others, 1 - share)])
        divergence[tuple(cheaper.T)] = np.average(both, axis=0, weights=[n_first, n_others])
    return divergence


def measure_windows(
    llm: AdaSkipLlama,
    pieces: Sequence[Sequence[int]],
    *,
    on_progress: Callable[[float], object] = lambda fraction: None,
) -> Windows | None:
    """Return what it costs that attentions look back at an eighth of a prompt, at several depths.

    None where none can, or no piece has :data:`SHORTEST` tokens: in a shorter one a window would seem to cost nothing.

    It is measured as :func:`measure_divergence` does, in the bulk of each piece as it is. What a window costs goes by
    its share of the prompt, so that short ones tell: with all attentions windowed so, SmolLM2 diverges by 0.015, 0.021,
    0.024 and 0.028 nats at 448, 1,024, 2,048 and 6,000 tokens, Qwen2.5 0.5B by 0.020, 0.020 and, at 8,000, 0.040.
    """
    layers = tuple(row.layer for row in llm.sublayers if row.windowable)
    pieces = [piece for piece in pieces if len(piece) >= SHORTEST]
    if not layers or not pieces:
        return None
    numbers = sorted({math.ceil(len(layers) * i / N_DEPTHS) for i in range(N_DEPTHS + 1)})
    none, plans = SkipSet.none(llm.n_layer), []
    for n in numbers:
        bulk = Bulk(none, windowed=layers[len(layers) - n :])
        bulks = (replace(bulk, window_size=max(len(piece) // 8, 1)) for piece in pieces)
        plans.append([SkipPlan(none, none, bulk=each) for each in bulks])
    divergence = np.maximum.accumulate([0.0, *_divergences(llm, pieces, plans, on_progress)])
    return Windows(layers, tuple(np.interp(range(len(layers) + 1), numbers, divergence).tolist()))


def _n_behind(piece: Sequence[int]) -> int:
    """Tokens of a piece that are judged."""
    return max(min(N_BEHIND, len(piece) // 4), 1)


def _divergences(
    llm: AdaSkipLlama,
    pieces: Sequence[Sequence[int]],
    plans: Sequence[Sequence[SkipPlan]],
    on_progress: Callable[[float], object],
) -> Iterator[float]:
    """Yield the mean divergence under all but the first of some plans from the first; each is one plan per piece."""

    def behind(of: Sequence[SkipPlan]) -> list[Logits]:
        logits = []
        for piece, plan in zip(pieces, of, strict=True):
            begin = len(piece) - _n_behind(piece)
            llm.set_plan(plan)
            llm.reset()
            llm.eval(piece[:begin])
            logits.append(llm.logits_behind(piece[begin:]))
        return logits

    with set_aside(llm):
        whole = behind(plans[0])
        for done, each in enumerate(plans[1:]):
            yield float(
                np.concatenate([kl_divergences(*pair) for pair in zip(whole, behind(each), strict=True)]).mean()
            )
            on_progress((done + 1) / (len(plans) - 1))
