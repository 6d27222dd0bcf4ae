"""Profiles by hand."""

from pathlib import Path
from typing import Any

import numpy as np
from oracles.tiny_families import N_EMBD

from adaskip_cpp import Profile
from adaskip_cpp.model.identity import ModelInfo, fingerprint
from adaskip_cpp.model.statistics import LinearMaps, PhaseStatistics

NAN = float("nan")
FIGURES = ("similarity", "norm_ratio", "median_ratio", "layer_similarity", "mean_u", "mean_v")


def statistics(similarity: Any, *, ratio: float = 1.5, **changes: Any) -> PhaseStatistics:
    similarity = np.array(similarity, float)
    observed = ~np.isnan(similarity)
    rng = np.random.default_rng(len(similarity))
    mean_u, mean_v = rng.normal(size=(2, *similarity.shape, 5)).astype(np.float32)
    fields = {
        "norm_ratio": np.where(observed, ratio, NAN),
        "median_ratio": np.where(observed, ratio / 2, NAN),
        "layer_similarity": similarity.mean(axis=1) if similarity.size else similarity,
        "mean_u": mean_u,
        "mean_v": mean_v,
        "n_tokens": 100,
        **changes,
    }
    return PhaseStatistics(similarity, **fields)


def measured(u: np.ndarray, v: np.ndarray) -> PhaseStatistics:
    """Those of inputs and outputs, float64 [n_layer, 2, n_tokens, n_embd], by whole matrices.

    A layer's input is that of its attention, its output that of its FFN.
    """
    norm_u, norm_v = np.linalg.norm(u, axis=3), np.linalg.norm(v, axis=3)
    return PhaseStatistics(
        ((u * v).sum(axis=3) / (norm_u * norm_v)).mean(axis=2),
        np.sqrt((v**2).sum(axis=(2, 3)) / (u**2).sum(axis=(2, 3))),
        np.median(norm_v / norm_u, axis=2),
        ((u[:, 0] * v[:, 1]).sum(axis=2) / (norm_u[:, 0] * norm_v[:, 1])).mean(axis=1),
        u.mean(axis=2).astype(np.float32),
        v.mean(axis=2).astype(np.float32),
        u.shape[2],
    )


def profile(similarity: Any, **changes: Any) -> Profile:
    """A profile whose ratios are 1.5 and 0.75 in prefill, 1.2 and 0.6 in decode."""
    fields = {
        "prefill": statistics(similarity),
        "decode": statistics(similarity, ratio=1.2),
        "n_requests": 2,
        "n_tokens": 100,
        "model": ModelInfo("ab" * 32, "llama", len(similarity)),
        "corpus": "some text [with brackets], two pages",
        "package_version": "0.1.0",
        "created": "2026-01-02T03:04:05+00:00",
        **changes,
    }
    return Profile(**fields)


EXAMPLE = profile([[0.5, 0.9], [0.99, NAN], [0.7, 0.99]])
"""A profile in which the FFN of layer 1 was not observed."""

MAPPED = [0, 1, 2, 3, 6, 7, 8]
"""What :func:`maps` has maps of, counted over layers and columns."""


def maps(n_layer: int = 3, rank: int = 2, n_embd: int = 5) -> LinearMaps:
    """Random maps of all sublayers but one, the FFN of layer 1, and of the layers but this."""
    rng = np.random.default_rng(rank)
    shapes = (n_layer, 3, rank, n_embd), (n_layer, 3, n_embd, rank)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    for array in arrays:
        array[1, 1:] = NAN
    return LinearMaps(*arrays)


MAPPED_EXAMPLE = profile([[0.5, 0.9], [0.99, NAN], [0.7, 0.99]], maps=maps())
"""The same with linear maps."""


def tiny_profile(model: Path, **changes: Any) -> Profile:
    """A profile of a tiny model, whose last layer is the most similar: FFN 2, attention 2, FFN 1, and so on.

    In the bulk of a prompt attention 2 comes before FFN 2.
    """
    similarity = np.linspace(0.5, 0.99, 6).reshape(3, 2)
    ones, zeros = np.ones((3, 2)), np.zeros((3, 2, N_EMBD), np.float32)
    of_both = PhaseStatistics(similarity, ones, 2 * ones, np.ones(3), zeros, zeros, 10)
    known = ModelInfo(fingerprint(model), "llama", 3)
    return Profile(of_both, of_both, 1, 10, known, **changes)
