"""Losses and KL divergence against hand-computed figures and scipy."""

import numpy as np
import pytest

from adaskip_cpp.errors import DataError
from adaskip_cpp.measuring.distribution import kl_divergences, losses

# Two positions over three tokens. Probabilities 1/4, 1/4, 1/2 and 1/2, 1/4, 1/4 for the full model, 1/3 each and
# 2/3, 1/6, 1/6 for the other; logits are logarithms of these, each row shifted by a constant of its own.
FULL = np.array([[0.0, 0.0, np.log(2)], [np.log(2) + 5, 5.0, 5.0]], np.float32)
OTHER = np.array([[-3.0, -3.0, -3.0], [np.log(4), 0.0, 0.0]], np.float32)


def random_logits(n: int, n_vocab: int = 257, seed: int = 0) -> np.ndarray:
    return (4 * np.random.default_rng(seed).normal(size=(n, n_vocab))).astype(np.float32)


def test_a_loss_is_the_negative_logarithm_of_the_target_s_probability() -> None:
    np.testing.assert_allclose(losses(FULL, [2, 1]), [np.log(2), np.log(4)], rtol=1e-6)
    np.testing.assert_allclose(losses(OTHER, np.array([0, 0])), [np.log(3), np.log(3 / 2)], rtol=1e-6)


def test_kl_is_the_full_model_s_expectation_of_the_log_ratio() -> None:
    first = 1 / 4 * np.log(3 / 4) + 1 / 4 * np.log(3 / 4) + 1 / 2 * np.log(3 / 2)
    second = 1 / 2 * np.log(3 / 4) + 2 * 1 / 4 * np.log(3 / 2)
    np.testing.assert_allclose(kl_divergences(FULL, OTHER), [first, second], rtol=1e-6)


@pytest.mark.parametrize("n", [1, 64, 65, 200])
def test_all_figures_are_those_of_scipy(n: int) -> None:
    """scipy computes in float64; terms are float32 here, whose rounding is 6e-8 of logits up to 30 apart."""
    special = pytest.importorskip("scipy.special")
    full, other = random_logits(n, seed=1), random_logits(n, seed=2)
    targets = np.random.default_rng(3).integers(0, 257, n)
    p, q = (special.softmax(logits.astype(np.float64), axis=1) for logits in (full, other))
    log_q = special.log_softmax(other.astype(np.float64), axis=1)
    difference = kl_divergences(full, other)
    np.testing.assert_allclose(difference, special.rel_entr(p, q).sum(axis=1), rtol=1e-6)
    np.testing.assert_allclose(losses(other, targets), -log_q[np.arange(n), targets], rtol=1e-6)
    assert difference.dtype == np.float64 and difference.shape == (n,)


def test_a_model_does_not_differ_from_itself() -> None:
    assert (kl_divergences(random_logits(100), random_logits(100)) == 0).all()


def test_huge_logits_neither_overflow_nor_lose_the_answer() -> None:
    full, other = np.array([[3e38, 0.0]], np.float32), np.array([[10000.0, 9999.0]], np.float32)
    assert kl_divergences(full, other)[0] == pytest.approx(np.log(1 + np.exp(-1)))
    assert losses(full, [0])[0] == 0.0


def test_a_token_that_cannot_follow_adds_nothing() -> None:
    full, other = np.array([[0.0, 0.0, -np.inf]], np.float32), np.array([[0.0, 0.0, 0.0]], np.float32)
    assert kl_divergences(full, other)[0] == pytest.approx(np.log(3 / 2))
    assert kl_divergences(full, full)[0] == 0.0
    assert kl_divergences(other, full)[0] == np.inf


def test_nothing_compared_gives_nothing() -> None:
    empty = np.empty((0, 5), np.float32)
    assert kl_divergences(empty, empty).shape == losses(empty, []).shape == (0,)


def test_logits_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(DataError, match="evaluate both on the same tokens"):
        kl_divergences(FULL, OTHER[:1])
    with pytest.raises(DataError, match="n targets"):
        losses(FULL, [1])
