"""How a model's next-token distributions compare with the text and with the full model's, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import DataError

__all__ = ["Divergence", "compare", "losses"]

_ROWS = 64
"""Rows of logits turned to float64 at once: 25 MB for a vocabulary of 49,000."""

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Divergence:
    """How one model's next-token distributions differ from the full model's, at each of n positions.

    Attributes:
        kl: float64 [n], KL(full || other) in nats: what the other model's beliefs cost where the full model is right.
        agree: bool [n], whether both find the same token most likely.
    """

    kl: npt.NDArray[np.float64]
    agree: npt.NDArray[np.bool_]


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


def compare(full: Logits, other: Logits) -> Divergence:
    """Compare a model's logits with the full model's at the same positions of the same text.

    Args:
        full: the full model's, float32 [n, n_vocab]; a token that cannot follow may have minus infinity.
        other: the other model's, of the same shape.

    Raises:
        DataError: the shapes differ.
    """
    if full.ndim != 2 or full.shape != other.shape:
        raise DataError(
            f"logits {list(other.shape)} cannot be compared with the full model's {list(full.shape)}; "
            "evaluate both on the same tokens"
        )
    kl, agree = np.empty(len(full)), np.empty(len(full), bool)
    for rows in _chunks(len(full)):
        log_p, log_q = _log_softmax(full[rows]), _log_softmax(other[rows])
        p = np.exp(log_p)
        with np.errstate(invalid="ignore"):  # -inf - -inf, where p is 0 and nothing is to be added
            kl[rows] = np.where(p > 0, p * (log_p - log_q), 0.0).sum(axis=1)
        agree[rows] = full[rows].argmax(axis=1) == other[rows].argmax(axis=1)
    return Divergence(np.maximum(kl, 0.0), agree)  # rounding can leave -1e-17 where the two are equal


def _chunks(n: int) -> Iterator[slice]:
    for start in range(0, n, _ROWS):
        yield slice(start, min(start + _ROWS, n))


def _log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    """Log-probabilities in float64, with the highest logit taken out so that no exponential overflows."""
    shifted: npt.NDArray[np.float64] = np.asarray(logits, dtype=np.float64)
    shifted = shifted - shifted.max(axis=1, keepdims=True)
    normal: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return normal
