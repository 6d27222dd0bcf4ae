"""Profiles by hand."""

from dataclasses import replace
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
    ratios = np.where(np.isnan(similarity), NAN, ratio)
    of_layers = similarity.mean(axis=1) if similarity.size else similarity
    u, v = np.random.default_rng(len(similarity)).normal(size=(2, *similarity.shape, 5)).astype(np.float32)
    return replace(PhaseStatistics(similarity, ratios, ratios / 2, of_layers, u, v, 100), **changes)


def measured(u: np.ndarray, v: np.ndarray) -> PhaseStatistics:
    """Those of inputs and outputs, float64 [n_layer, 2, n_tokens, n_embd], by whole matrices.

    A layer's input is that of its attention, its output that of its FFN.
    """
    norm_u, norm_v = np.linalg.norm(u, axis=3), np.linalg.norm(v, axis=3)
    similarity = ((u * v).sum(axis=3) / (norm_u * norm_v)).mean(axis=2)
    of_layers = ((u[:, 0] * v[:, 1]).sum(axis=2) / (norm_u[:, 0] * norm_v[:, 1])).mean(axis=1)
    norm_ratio = np.sqrt((v**2).sum(axis=(2, 3)) / (u**2).sum(axis=(2, 3)))
    median_ratio, n_tokens = np.median(norm_v / norm_u, axis=2), u.shape[2]
    mean_u, mean_v = (each.mean(axis=2).astype(np.float32) for each in (u, v))
    return PhaseStatistics(similarity, norm_ratio, median_ratio, of_layers, mean_u, mean_v, n_tokens)


def profile(similarity: Any, **changes: Any) -> Profile:
    """A profile whose ratios are 1.5 and 0.75 in prefill, 1.2 and 0.6 in decode."""
    model = ModelInfo("ab" * 32, "llama", len(similarity))
    about = "some text [with brackets], two pages", "0.1.0", "2026-01-02T03:04:05+00:00"
    phases = statistics(similarity), statistics(similarity, ratio=1.2)
    return replace(Profile(*phases, 2, 100, model, *about), **changes)


EXAMPLE = profile([[0.5, 0.9], [0.99, NAN], [0.7, 0.99]])
"""A profile in which the FFN of layer 1 was not observed."""

MAPPED = [0, 1, 2, 3, 6, 7, 8]
"""What :func:`maps` has maps of, counted over layers and columns."""


def maps(n_layer: int = 3, rank: int = 2, n_embd: int = 5) -> LinearMaps:
    """Random maps of all sublayers but one, the FFN of layer 1, and of the layers but this."""
    rng = np.random.default_rng(rank)
    arrays = [rng.normal(size=(n_layer, 3, *size)).astype(np.float32) for size in ((rank, n_embd), (n_embd, rank))]
    for array in arrays:
        array[1, 1:] = NAN
    return LinearMaps(*arrays)


MAPPED_EXAMPLE = replace(EXAMPLE, maps=maps())


def tiny_profile(model: Path, **changes: Any) -> Profile:
    """A profile of a tiny model, whose last layer is the most similar: FFN 2, attention 2, FFN 1, and so on.

    In the bulk of a prompt attention 2 comes before FFN 2.
    """
    similarity = np.linspace(0.5, 0.99, 6).reshape(3, 2)
    ones, zeros = np.ones((3, 2)), np.zeros((3, 2, N_EMBD), np.float32)
    of_both = PhaseStatistics(similarity, ones, 2 * ones, np.ones(3), zeros, zeros, 10)
    known = ModelInfo(fingerprint(model), "llama", 3)
    return Profile(of_both, of_both, 1, 10, known, **changes)
