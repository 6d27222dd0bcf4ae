"""How well a model predicts a text under its present plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..errors import RequestError
from .distribution import losses

if TYPE_CHECKING:
    from ..engine.llama import AdaSkipLlama

__all__ = ["mean_loss", "token_losses"]


def token_losses(llm: AdaSkipLlama, tokens: Sequence[int]) -> npt.NDArray[np.float64]:
    """Return the negative log-likelihood of every token but the first, given those before it.

    Runs as one prompt, in prefill, and drops the model's KV cache.

    Args:
        llm: a model loaded with ``logits_all=True``.
        tokens: at least 2 and at most ``llm.n_ctx()`` token ids.

    Returns:
        float64 ``[len(tokens) - 1]``, in nats.

    Raises:
        RequestError: too few or too many tokens, or the model keeps the last token's logits only.
    """
    if not llm._logits_all:
        raise RequestError("the model keeps only the last token's logits; load it with logits_all=True")
    if not 2 <= len(tokens) <= llm.context_size:
        raise RequestError(
            f"cannot compute the loss of {len(tokens)} tokens; pass from 2 to {llm.context_size} (the model's n_ctx)"
        )
    llm.reset()
    try:
        llm.eval(list(tokens))
        return losses(llm.scores[: len(tokens) - 1], tokens[1:])
    finally:
        llm.reset()


def mean_loss(llm: AdaSkipLlama, tokens: Sequence[int]) -> float:
    """Return the mean of :func:`token_losses`, in nats per token.

    Raises:
        RequestError: as :func:`token_losses`.
    """
    return float(token_losses(llm, tokens).mean())
