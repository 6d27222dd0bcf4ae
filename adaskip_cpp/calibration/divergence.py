"""What skipping a sublayer in the bulk of a prompt costs the tokens behind it: how prompts choose what to skip.

Similarity of input and output does not tell it: what a late sublayer does is seen by few K and V, and what an attention
does by fewer than what an FFN does. So each sublayer is skipped alone, with what stands in for it, in the bulk of a few
pieces of text, and the next tokens' distributions are compared with the whole model's.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ..engine.llama import AdaSkipLlama
from ..measuring.distribution import Logits, kl_divergences
from ..model.skip_set import KINDS
from ..planning.profile import Profile
from ..planning.request import PlanRequest
from .cost import set_aside

N_PIECES, N_PROMPT, N_BEHIND = 3, 192, 48
"""Pieces of text, and of each the tokens that are read as a prompt, and those behind them that are judged.

Of SmolLM2, pieces of 512 and 128 tokens choose almost the same sublayers, and lose as much at 1.4 times the speed."""


def measure_divergence(
    llm: AdaSkipLlama,
    profile: Profile,
    pieces: Sequence[Sequence[int]],
    *,
    on_progress: Callable[[float], object] = lambda fraction: None,
) -> npt.NDArray[np.float64]:
    """Return what skipping each sublayer alone in the bulk costs, float64 ``[n_layer, 2]``, NaN where it cannot be.

    That is the mean Kullback-Leibler divergence, in nats, from the whole model's distributions behind the last tokens
    of each piece, a quarter of them or :data:`N_BEHIND`, which run whole behind the others as their prompt. The whole
    model reads the prompt in the same batches: the rounding of others is a divergence of 0.0017 on SmolLM2 by itself,
    more than what a few sublayers cost. The model's plan is set aside meanwhile; its KV cache is dropped.
    """
    may = np.argwhere(profile.in_bulk)
    cut = [(piece, len(piece) - max(min(N_BEHIND, len(piece) // 4), 1)) for piece in pieces]
    divergence = np.full(profile.in_bulk.shape, np.nan)

    def behind(**skipped: tuple[int, ...]) -> list[Logits]:
        llm.set_plan(profile.plan(PlanRequest(mode="prompt", strategy="manual", tail=1, **skipped)))  # type: ignore[arg-type]
        logits = []
        for piece, begin in cut:
            llm.reset()
            llm.eval(piece[:begin])
            logits.append(llm.logits_behind(piece[begin:]))
        return logits

    with set_aside(llm):
        whole = behind()
        for done, (layer, kind) in enumerate(may):
            both = zip(whole, behind(**{KINDS[kind]: (int(layer),)}), strict=True)
            divergence[layer, kind] = np.concatenate([kl_divergences(*pair) for pair in both]).mean()
            on_progress((done + 1) / len(may))
    return divergence
