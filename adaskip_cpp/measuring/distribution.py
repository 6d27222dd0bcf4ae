"""How a model's next-token distributions compare with the text and with the full model's, token by token."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ..engine.llama import AdaSkipLlama
from ..errors import DataError, RequestError

_ROWS = 8  # rows of logits at once: what is computed of them stays in the processor's cache

Logits = npt.NDArray[np.float32]


def check_logits_all(llm: AdaSkipLlama) -> None:
    if not llm.logits_all:
        raise RequestError("the model keeps only the last token's logits; load it with logits_all=True")


def check_length(llm: AdaSkipLlama, tokens: Sequence[int], least: int) -> None:
    if not least <= len(tokens) <= llm.context_size:
        raise RequestError(
            f"cannot judge a text of {len(tokens)} tokens; use from {least} to {llm.context_size} (the model's context)"
        )


def prompt_logits(llm: AdaSkipLlama, tokens: Sequence[int]) -> Logits:
    """Return the logits behind each token of a text but the last, read as one prompt under the present plan.

    They are float32 [len(tokens) - 1, n_vocab], valid until the next evaluation. Whatever the model has cached is
    forgotten first, and what it caches here stays.
    """
    check_logits_all(llm)
    check_length(llm, tokens, 2)
    llm.reset()
    llm.eval(list(tokens))
    return llm.scores[: len(tokens) - 1]


def token_losses(llm: AdaSkipLlama, tokens: Sequence[int]) -> npt.NDArray[np.float64]:
    """Return the :func:`losses` of a text's tokens but the first, read as by :func:`prompt_logits`; KV is dropped."""
    try:
        return losses(prompt_logits(llm, tokens), tokens[1:])
    finally:
        llm.reset()


def losses(logits: Logits, targets: Sequence[int] | npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """Return the negative log-likelihood of each of n targets, float64 [n], in nats.

    The logits are float32 [n, n_vocab]; a token that cannot follow may have minus infinity.
    """
    ids = np.asarray(targets)
    if logits.ndim != 2 or ids.shape != (len(logits),):
        raise DataError(
            f"logits {list(logits.shape)} do not fit targets {list(ids.shape)}; pass [n, n_vocab] and n targets"
        )

    def of(rows: slice) -> npt.NDArray[np.float64]:
        shifted, _, log_sum = _exponentials(logits[rows])
        return np.asarray(log_sum - shifted[np.arange(len(shifted)), ids[rows]])

    return _by_rows(len(logits), of)


def kl_divergences(full: Logits, other: Logits) -> npt.NDArray[np.float64]:
    """Return KL(full || other) at each position, float64 [n], in nats: what other beliefs cost where the full is right.

    Both are float32 [n, n_vocab], at the same positions; a token that cannot follow may have minus infinity. What is
    summed is float32, the sums are float64: right to 1e-6, in less than a quarter of the time of float64 (0.08 s for
    128 tokens of a vocabulary of 152,000, where it was 0.36 s).
    """
    if full.ndim != 2 or full.shape != other.shape:
        raise DataError(
            f"logits {list(other.shape)} cannot be compared with the full model's {list(full.shape)}; "
            "evaluate both on the same tokens"
        )

    def divergences(rows: slice) -> npt.NDArray[np.float64]:
        (apart, weights, log_sum), (shifted, _, other_sum) = _exponentials(full[rows]), _exponentials(other[rows])
        with np.errstate(invalid="ignore"):  # -inf - -inf, where the weight is 0 and nothing is to be added
            apart -= shifted
            apart *= weights
        if not np.isfinite(apart).all():
            apart[weights == 0] = 0.0
        return np.asarray(apart.sum(axis=1, dtype=np.float64) / np.exp(log_sum) + other_sum - log_sum)

    return np.maximum(_by_rows(len(full), divergences), 0.0)  # rounding can leave -1e-8 where the two are close


def _by_rows(n: int, compute: Callable[[slice], npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    return np.concatenate([np.empty(0), *(compute(slice(i, i + _ROWS)) for i in range(0, n, _ROWS))])


def _exponentials(logits: Logits) -> tuple[Logits, Logits, npt.NDArray[np.float64]]:
    """Of each row the logits less the highest, so that none overflows, their exponentials, the logarithm of the sum."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    weights = np.exp(shifted)
    return shifted, weights, np.log(weights.sum(axis=1, dtype=np.float64))
