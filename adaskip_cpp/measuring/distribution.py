"""How a model's next-token distributions compare with the text and with the full model's, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..errors import DataError, RequestError

if TYPE_CHECKING:
    from ..engine.llama import AdaSkipLlama

__all__ = ["Logits", "kl_divergences", "losses", "prompt_logits", "token_losses"]

_ROWS = 64
"""Rows of logits turned to float64 at once: 25 MB for a vocabulary of 49,000."""

Logits = npt.NDArray[np.float32]


def prompt_logits(llm: AdaSkipLlama, tokens: Sequence[int]) -> Logits:
    """Return the logits behind each token of a text but the last, read as one prompt under the present plan.

    Whatever the model has cached is forgotten first, and what it caches here stays.

    Args:
        llm: a model loaded with ``logits_all=True``.
        tokens: at least 2 and at most ``llm.context_size`` token ids.

    Returns:
        float32 ``[len(tokens) - 1, n_vocab]``, valid until the next evaluation.

    Raises:
        RequestError: too few or too many tokens, or the model keeps the last token's logits only.
    """
    if not llm.logits_all:
        raise RequestError("the model keeps only the last token's logits; load it with logits_all=True")
    if not 2 <= len(tokens) <= llm.context_size:
        raise RequestError(
            f"cannot judge a text of {len(tokens)} tokens; use from 2 to {llm.context_size} (the model's context)"
        )
    llm.reset()
    llm.eval(list(tokens))
    return llm.scores[: len(tokens) - 1]


def token_losses(llm: AdaSkipLlama, tokens: Sequence[int]) -> npt.NDArray[np.float64]:
    """Return the :func:`losses` of a text's tokens but the first, float64 ``[len(tokens) - 1]``, in nats.

    The text is evaluated as by :func:`prompt_logits`, which tells the arguments and errors; the KV cache is dropped.
    """
    try:
        return losses(prompt_logits(llm, tokens), tokens[1:])
    finally:
        llm.reset()


def losses(logits: Logits, targets: Sequence[int] | npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """Return the negative log-likelihood of each target, float64 [n], in nats.

    Args:
        logits: float32 [n, n_vocab]; a token that cannot follow may have minus infinity.
        targets: the n token ids that did follow.

    Raises:
        DataError: as many logits as targets are needed.
    """
    ids = np.asarray(targets)
    if logits.ndim != 2 or ids.shape != (len(logits),):
        raise DataError(
            f"logits {list(logits.shape)} do not fit targets {list(ids.shape)}; pass [n, n_vocab] and n targets"
        )
    result = np.empty(len(logits))
    for rows in _chunks(len(logits)):
        log_p = _log_softmax(logits[rows])
        result[rows] = -log_p[np.arange(len(log_p)), ids[rows]]
    return result


def kl_divergences(full: Logits, other: Logits) -> npt.NDArray[np.float64]:
    """Return KL(full || other) at each position, float64 [n], in nats: what other beliefs cost where the full is right.

    Args:
        full: the full model's logits, float32 [n, n_vocab]; a token that cannot follow may have minus infinity.
        other: another model's at the same positions of the same text, of the same shape.

    Raises:
        DataError: the shapes differ.
    """
    if full.ndim != 2 or full.shape != other.shape:
        raise DataError(
            f"logits {list(other.shape)} cannot be compared with the full model's {list(full.shape)}; "
            "evaluate both on the same tokens"
        )
    result = np.empty(len(full))
    for rows in _chunks(len(full)):
        log_p, log_q = _log_softmax(full[rows]), _log_softmax(other[rows])
        p = np.exp(log_p)
        with np.errstate(invalid="ignore"):  # -inf - -inf, where p is 0 and nothing is to be added
            result[rows] = np.where(p > 0, p * (log_p - log_q), 0.0).sum(axis=1)
    return np.maximum(result, 0.0)  # rounding can leave -1e-17 where the two are equal


def _chunks(n: int) -> Iterator[slice]:
    for start in range(0, n, _ROWS):
        yield slice(start, min(start + _ROWS, n))


def _log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    """Log-probabilities in float64, with the highest logit taken out so that no exponential overflows."""
    shifted: npt.NDArray[np.float64] = np.asarray(logits, dtype=np.float64)
    shifted = shifted - shifted.max(axis=1, keepdims=True)
    normal: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return normal
