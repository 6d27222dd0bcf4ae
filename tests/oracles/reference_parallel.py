"""A NumPy forward pass of GPT-NeoX with parallel residual, whose attention and FFN both read the layer's input.

The residual stream is taken in chain order, attention first: ``a = x + attention(x)``, then ``y = a + ffn(x)``, so the
FFN's input u is ``a`` and its output v is ``y``, although its branch reads ``x``.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader
from oracles.reference import Trace

__all__ = ["eval_parallel"]

Array = npt.NDArray[np.float64]


def eval_parallel(
    path: str | Path,
    tokens: Sequence[int],
    skip: npt.ArrayLike | None = None,
    scale: npt.ArrayLike | None = None,
    bias: npt.ArrayLike | None = None,
    down: npt.ArrayLike | None = None,
    up: npt.ArrayLike | None = None,
    bulk: slice | None = None,
) -> Trace:
    """Evaluate tokens in a fresh context, in float64; skip and what stands in as for ``ReferenceRun.eval``.

    With ``bulk`` only those tokens skip, and their K and V are read by the others.
    """
    reader = GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items()}
    weights = {t.name: np.asarray(t.data, np.float64) for t in reader.tensors}
    if values["general.architecture"] != "gptneox" or not values["gptneox.use_parallel_residual"]:
        raise ValueError(f"{path}: only gptneox with parallel residual is computed here")
    n_layer, n_head = int(values["gptneox.block_count"]), int(values["gptneox.attention.head_count"])
    epsilon, base = float(values["gptneox.attention.layer_norm_epsilon"]), float(values["gptneox.rope.freq_base"])
    skipped = np.zeros((n_layer, 2), bool) if skip is None else np.asarray(skip, bool)
    factor = np.ones((n_layer, 2)) if scale is None else np.asarray(scale, np.float64)
    vector = np.zeros((n_layer, 2, 1)) if bias is None else np.asarray(bias, np.float64)

    def linear(x: Array, name: str) -> Array:
        return np.asarray(x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"])

    def norm(x: Array, name: str) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        unit = centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + epsilon)
        return np.asarray(unit * weights[f"{name}.weight"] + weights[f"{name}.bias"])

    def rotate(x: Array) -> Array:  # [head, token, dim]; pairs (i, i + dim/2)
        half = x.shape[-1] // 2
        angle = np.arange(x.shape[1])[:, None] * base ** (-np.arange(half) / half)
        first, second = x[..., :half], x[..., half:]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)

    def attention(x: Array, layer: int) -> Array:
        n = len(x)
        fused = linear(norm(x, f"blk.{layer}.attn_norm"), f"blk.{layer}.attn_qkv")
        q, k, v = (part.reshape(n, n_head, -1).transpose(1, 0, 2) for part in np.split(fused, 3, axis=-1))
        scores = rotate(q) @ rotate(k).transpose(0, 2, 1) / np.sqrt(q.shape[-1])
        scores = np.where(np.tri(n, dtype=bool), scores, -np.inf)
        probability = np.exp(scores - scores.max(axis=-1, keepdims=True))
        probability /= probability.sum(axis=-1, keepdims=True)
        return linear((probability @ v).transpose(1, 0, 2).reshape(n, -1), f"blk.{layer}.attn_output")

    def ffn(x: Array, layer: int) -> Array:
        h = linear(norm(x, f"blk.{layer}.ffn_norm"), f"blk.{layer}.ffn_up")
        gelu = h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        return linear(gelu, f"blk.{layer}.ffn_down")

    sums = np.zeros((3, n_layer, 2, len(tokens)))
    streams = np.zeros((2, n_layer, 2, len(tokens), weights["token_embd.weight"].shape[1]))
    x = weights["token_embd.weight"][np.asarray(tokens)]
    skips = np.zeros((len(tokens), 1), bool)
    skips[slice(None) if bulk is None else bulk] = True
    for layer in range(n_layer):
        stream = x
        for kind, branch in enumerate((attention, ffn)):
            u = stream
            stands_in = factor[layer, kind] * u + vector[layer, kind]
            if down is not None and up is not None:
                stands_in = stands_in + u @ np.asarray(down)[layer, kind].T @ np.asarray(up)[layer, kind].T
            stream = np.where(skips & skipped[layer, kind], stands_in, u + branch(x, layer))
            streams[:, layer, kind] = u, stream
            sums[:, layer, kind] = [(a * b).sum(axis=-1) for a, b in ((u, stream), (u, u), (stream, stream))]
        x = stream
    return Trace(norm(x, "output_norm") @ weights["output.weight"].T, *sums, u=streams[0], v=streams[1])
