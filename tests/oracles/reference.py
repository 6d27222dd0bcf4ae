"""A NumPy forward pass of llama, Gemma 3 and GPT-NeoX, with sublayers skipped: the oracle of the native evaluator.

Written from the equations, not from any code under test: RMS norm, rotary embedding, grouped-query attention, SwiGLU.
Gemma 3 has norms after the sublayers and on queries and keys, GEGLU, and sliding windows. GPT-NeoX has layer norms,
biases and GELU, and its attention and FFN both read the layer's input. They are taken in chain order, attention first:
``a = x + attention(x)``, then ``y = a + ffn(x)``.

``ReferenceModel`` holds the weights, ``ReferenceRun`` one sequence. Its KV grows with each ``eval``, so a prompt may
come in pieces. Keys are kept as they are before the rotary embedding, so that positions can move.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize
from oracles.gguf_files import write

Array = npt.NDArray[np.floating[Any]]
ATTENTION, FFN = 0, 1


class KvHoleError(ValueError):
    """An attention would read a position whose K and V it never wrote."""


@dataclass(frozen=True)
class Windows:
    """Attentions of ``layers`` look back at ``size`` tokens, the token's own included, and at the first ``n_sinks``."""

    layers: tuple[int, ...]
    size: int
    n_sinks: int


@dataclass(frozen=True)
class Trace:
    """What one call of ``eval`` computed; sublayers u -> v; None where it is not computed."""

    logits: Array  # [n_tokens, n_vocab]
    dot: npt.NDArray[np.float64]  # u . v [n_layer, 2, n_tokens]
    u_sq: npt.NDArray[np.float64]
    v_sq: npt.NDArray[np.float64]
    layer_dot: npt.NDArray[np.float64] | None = None  # a layer's input times its output [n_layer, n_tokens]
    sum_u: npt.NDArray[np.float64] | None = None  # over the tokens [n_layer, 2, n_embd]
    sum_v: npt.NDArray[np.float64] | None = None
    u: Array | None = None  # [n_layer, 2, n_tokens, n_embd]
    v: Array | None = None

    @staticmethod
    def concatenate(traces: Sequence["Trace"]) -> "Trace":
        """Join the logits and the figures per sublayer of consecutive pieces along the token axis; nothing else."""
        joined = [np.concatenate([getattr(t, name) for t in traces], axis=-1) for name in ("dot", "u_sq", "v_sq")]
        return Trace(np.concatenate([t.logits for t in traces]), *joined)

    def part(self, of: slice) -> "Trace":
        """The logits, streams and figures per sublayer of some tokens; nothing else."""
        u, v = (None if each is None else each[:, :, of] for each in (self.u, self.v))
        return Trace(self.logits[of], self.dot[..., of], self.u_sq[..., of], self.v_sq[..., of], u=u, v=v)


class ReferenceModel:
    """The weights and hyperparameters of a GGUF file of one of these architectures, dequantised to ``dtype``."""

    def __init__(self, path: str | Path, dtype: npt.DTypeLike = np.float64) -> None:
        reader = GGUFReader(path)
        values = {name: field.contents() for name, field in reader.fields.items()}
        name = values["general.architecture"]
        is_known = name in ("llama", "gemma3") or values.get("gptneox.use_parallel_residual", False)
        if not is_known or any(t.name.startswith("rope") for t in reader.tensors):
            raise ValueError(f"{path}: only plain llama, Gemma 3 and parallel GPT-NeoX are computed here")

        def value(key: str, default: Any = None) -> Any:
            return values.get(f"{name}.{key}", default)

        self.is_gemma, self.is_parallel = name == "gemma3", name == "gptneox"
        self.dtype: Any = np.dtype(dtype)
        self.n_layer = int(value("block_count"))
        self.n_embd = int(value("embedding_length"))
        self.n_head = int(value("attention.head_count"))
        self.n_head_kv = int(value("attention.head_count_kv", self.n_head))
        self.head_dim = int(value("attention.key_length", self.n_embd // self.n_head))
        self.epsilon = float(value(f"attention.layer_norm_{'' if self.is_parallel else 'rms_'}epsilon"))
        # Of every ``pattern`` layers the last one sees everything.
        pattern = int(value("attention.sliding_window_pattern", 1))
        slides = [layer % pattern < pattern - 1 for layer in range(self.n_layer)]
        self.window = [value("attention.sliding_window") if each else None for each in slides]
        base = float(value("rope.freq_base", 10000.0))
        self.rope_base = [float(value("rope.freq_base_swa", base)) if each else base for each in slides]
        self.weights = {t.name: dequantize(t.data, t.tensor_type).astype(self.dtype) for t in reader.tensors}
        self.output = self.weights.get("output.weight", self.weights["token_embd.weight"])
        self.control = np.zeros((self.n_layer, self.n_embd))  # is added to the stream after each layer

    def embed(self, tokens: Sequence[int]) -> Array:
        """The stream's first values; Gemma multiplies them by sqrt(n_embd)."""
        rows: Array = self.weights["token_embd.weight"][np.asarray(tokens)]
        return rows * math.sqrt(self.n_embd) if self.is_gemma else rows

    def linear(self, x: Array, layer: int, name: str) -> Array:
        """Multiply by a layer's projection and add its bias, if it has one."""
        y: Array = x @ self.weights[f"blk.{layer}.{name}.weight"].T
        bias = self.weights.get(f"blk.{layer}.{name}.bias")
        return y if bias is None else y + bias

    def project(self, x: Array, layer: int, name: str) -> Array:
        """Queries, keys or values, by ``name`` "q", "k" or "v". GPT-NeoX has one matrix for all three."""
        if not self.is_parallel:
            return self.linear(x, layer, f"attn_{name}")
        return np.split(self.linear(x, layer, "attn_qkv"), 3, axis=-1)["qkv".index(name)]

    def norm(self, x: Array, name: str) -> Array:
        """RMS norm: x / sqrt(mean(x^2) + epsilon) * weight; a layer norm subtracts the mean first, and adds a bias."""
        bias = self.weights.get(f"{name}.bias")
        x = x if bias is None else x - x.mean(axis=-1, keepdims=True)
        size = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        y = np.asarray(x / size * self.weights[f"{name}.weight"])
        return y if bias is None else y + bias

    def rotate(self, x: Array, layer: int, positions: npt.NDArray[np.int64]) -> Array:
        """Rotary embedding of pairs of each head by the angle position * base^(-2i/head_dim).

        The i-th pair is (2i, 2i+1), in Gemma and GPT-NeoX (i, i + head_dim/2). Angles round as ggml's do, in float32
        from pair to pair: at position 500 that alone moves logits by 2e-5 of what they are.
        """
        step = np.float32(self.rope_base[layer] ** (-2 / self.head_dim))
        angle = np.full((len(positions), 1, self.head_dim // 2), step)
        angle[..., 0] = positions[:, None]
        angle = np.cumprod(angle, axis=-1, dtype=np.float32)
        cos, sin = np.cos(angle).astype(self.dtype), np.sin(angle).astype(self.dtype)
        in_halves = self.is_gemma or self.is_parallel
        pairs = (*x.shape[:-1], 2, -1) if in_halves else (*x.shape[:-1], -1, 2)
        axis = -2 if in_halves else -1
        first, second = np.moveaxis(x.reshape(pairs), axis, 0)
        return np.stack([first * cos - second * sin, first * sin + second * cos], axis=axis).reshape(x.shape)

    def activate(self, x: Array) -> Array:
        """SiLU in llama; GELU else, by llama.cpp's table, which is exact for values in F16 and rounds to F16."""
        if not (self.is_gemma or self.is_parallel):
            return np.asarray(x / (1 + np.exp(-x)))
        x = x.astype(np.float16).astype(np.float64)
        gelu = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * x * (1 + 0.044715 * x * x)))
        return gelu.astype(np.float16).astype(self.dtype)


class ReferenceRun:
    """One sequence of a reference model: the K and V of every position that each attention has seen."""

    def __init__(self, model: ReferenceModel) -> None:
        self.model = model
        self.positions = np.zeros(0, np.int64)
        empty = np.zeros((0, model.n_head_kv, model.head_dim), model.dtype)
        self._keys = [empty] * model.n_layer  # before the rotary embedding; NaN where the attention did not run
        self._values = [empty] * model.n_layer

    def copy(self) -> "ReferenceRun":
        """The same sequence, from here on independent of this one."""
        other = ReferenceRun(self.model)
        other.take(self, 0, len(self.positions))
        other.positions = self.positions.copy()
        return other

    def eval(
        self,
        tokens: Sequence[int],
        skip: npt.ArrayLike | None = None,
        scale: npt.ArrayLike | None = None,
        bias: npt.ArrayLike | None = None,
        down: npt.ArrayLike | None = None,
        up: npt.ArrayLike | None = None,
        keeps_kv: bool = False,
        windows: Windows | None = None,
    ) -> Trace:
        """Append tokens to the sequence, at the positions after its last one.

        A sublayer of ``skip``, bool [n_layer, 2], has the output ``scale * input + bias + up (down input)``, with
        scale [n_layer, 2], bias [n_layer, 2, n_embd], down [n_layer, 2, rank, n_embd], up [n_layer, 2, n_embd, rank].
        A skipped attention writes no K and V, unless it ``keeps_kv``, of its input as it is. An attention that runs
        after positions at which it was skipped raises a KvHoleError.
        """
        model, shape = self.model, (self.model.n_layer, 2)
        skipped = np.asarray(np.zeros(shape) if skip is None else skip, bool)
        factor = np.asarray(np.ones(shape) if scale is None else scale, model.dtype)
        vector = np.asarray(np.zeros((*shape, model.n_embd)) if bias is None else bias, model.dtype)
        maps = None if down is None or up is None else (np.asarray(down, model.dtype), np.asarray(up, model.dtype))
        u, v = np.zeros((2, *shape, len(tokens), model.n_embd), model.dtype)
        self._advance(len(tokens))
        nothing = np.full((len(tokens), model.n_head_kv, model.head_dim), np.nan, model.dtype)
        x = model.embed(tokens)
        for layer in range(model.n_layer):
            layer_input = x
            for kind, branch in ((ATTENTION, self._attention), (FFN, self._ffn)):
                at = layer, kind
                u[at] = x
                if not skipped[at]:
                    source = layer_input if model.is_parallel else x
                    x = x + branch(source, layer, windows if windows and layer in windows.layers else None)
                else:
                    if kind == ATTENTION:
                        self._store(layer, *(self._kv(x, layer) if keeps_kv else (nothing, nothing)))
                    x = x * factor[at] + vector[at]
                    if maps is not None:
                        x = x + u[at] @ maps[0][at].T @ maps[1][at].T
                v[at] = x
            x = x + model.control[layer].astype(model.dtype)
        sums: list[Any] = [np.sum(a * b, axis=-1, dtype=np.float64) for a, b in ((u, v), (u, u), (v, v))]
        layer_dot = np.sum(u[:, ATTENTION] * v[:, FFN], axis=-1, dtype=np.float64)
        totals: list[Any] = [np.sum(each, axis=2, dtype=np.float64) for each in (u, v)]
        return Trace(model.norm(x, "output_norm") @ model.output.T, *sums, layer_dot, *totals, u, v)

    def rewind(self, n_past: int) -> None:
        """Forget every token from the ``n_past``-th on."""
        self.keep(np.arange(len(self.positions)) < n_past)

    def keep(self, chosen: npt.NDArray[np.bool_]) -> None:
        """Forget every token but those in ``chosen``, bool [n_past]."""
        self.positions = self.positions[chosen]
        self._keys = [part[chosen] for part in self._keys]
        self._values = [part[chosen] for part in self._values]

    def take(self, other: "ReferenceRun", start: int, n: int) -> None:
        """Append positions of another sequence, with the K and V that they have there."""
        self._advance(n)
        for layer in range(self.model.n_layer):
            self._store(layer, *(part[layer][start : start + n] for part in (other._keys, other._values)))

    def _advance(self, n: int) -> None:
        start = self.positions.max(initial=-1) + 1
        self.positions = np.concatenate([self.positions, np.arange(start, start + n)])

    def _store(self, layer: int, keys: Array, values: Array) -> None:
        self._keys[layer] = np.concatenate([self._keys[layer], keys])
        self._values[layer] = np.concatenate([self._values[layer], values])

    def _kv(self, x: Array, layer: int) -> tuple[Array, Array]:
        """K, before the rotary embedding, and V of a layer's input, [n_tokens, n_head_kv, head_dim] each."""
        model = self.model
        h = model.norm(x, f"blk.{layer}.attn_norm")
        k, v = (model.project(h, layer, name).reshape(len(x), model.n_head_kv, -1) for name in "kv")
        return model.norm(k, f"blk.{layer}.attn_k_norm") if model.is_gemma else k, v

    def _attention(self, x: Array, layer: int, windows: Windows | None) -> Array:
        model, n = self.model, len(x)
        if np.isnan(self._keys[layer]).any():
            raise KvHoleError(f"attention of layer {layer} did not run for all earlier positions")
        h = model.norm(x, f"blk.{layer}.attn_norm")
        q = model.project(h, layer, "q").reshape(n, model.n_head, model.head_dim)
        if model.is_gemma:
            q = model.norm(q, f"blk.{layer}.attn_q_norm")
        self._store(layer, *self._kv(x, layer))
        own = self.positions[-n:]
        q = model.rotate(q, layer, own).transpose(1, 0, 2)
        group = model.n_head // model.n_head_kv
        keys, values = (
            np.repeat(part.transpose(1, 0, 2), group, axis=0)
            for part in (model.rotate(self._keys[layer], layer, self.positions), self._values[layer])
        )
        scores = q @ keys.transpose(0, 2, 1) / math.sqrt(model.head_dim)
        distance = own[:, None] - self.positions
        unseen = (distance < 0) | (distance >= (model.window[layer] or np.inf))
        if windows is not None:
            unseen |= (distance >= windows.size) & (self.positions >= windows.n_sinks)
        scores = np.where(unseen, -np.inf, scores)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        y = model.linear((weights @ values).transpose(1, 0, 2).reshape(n, -1), layer, "attn_output")
        return model.norm(y, f"blk.{layer}.post_attention_norm") if model.is_gemma else y

    def _ffn(self, x: Array, layer: int, _: Windows | None) -> Array:
        model = self.model
        h = model.norm(x, f"blk.{layer}.ffn_norm")
        up = model.linear(h, layer, "ffn_up")
        inner = model.activate(up if model.is_parallel else model.linear(h, layer, "ffn_gate"))
        y = model.linear(inner if model.is_parallel else inner * up, layer, "ffn_down")
        return model.norm(y, f"blk.{layer}.post_ffw_norm") if model.is_gemma else y


class OnlineReference:
    """Online importance learning of one request, written from the method (AdaSkip, section on decoding).

    The first ``window`` decoded tokens run under the fixed set, ``skip`` and ``factor`` [n_layer, 2]. Then each FFN
    outside it whose mean IO similarity over those tokens is at least ``threshold`` is skipped as well, for the rest of
    the request. In its place is ``scale``: "none" (1), "paper" (the norm ratio), "median" (the median of |v|/|u|).
    """

    def __init__(
        self, window: int, threshold: float, scale: str, skip: npt.ArrayLike, factor: npt.ArrayLike | None = None
    ) -> None:
        self.window, self.threshold = window, threshold
        self.skip = np.array(skip, bool)
        self.factor = np.ones(self.skip.shape) if factor is None else np.array(factor, np.float64)
        self.similarity = np.full(len(self.skip), np.nan)
        self.ratio = np.full(len(self.skip), np.nan)
        self.ffn: tuple[int, ...] = ()
        self.n_tokens = 0
        ones = np.ones(self.skip.shape)
        self._ratio_of = {"none": lambda trace: ones, "paper": norm_ratio, "median": median_ratio}[scale]
        self._seen: list[Trace] = []

    def observe(self, trace: Trace) -> None:
        """Tell what the next decoded tokens, computed under ``skip`` and ``factor``, were like."""
        if self.n_tokens == self.window:
            return
        self._seen.append(trace)
        seen = Trace.concatenate(self._seen).part(slice(self.window))
        self.n_tokens = seen.dot.shape[-1]
        observed = ~self.skip[:, FFN]
        self.similarity = np.where(observed, mean_similarity(seen)[:, FFN], np.nan)
        self.ratio = np.where(observed, self._ratio_of(seen)[:, FFN], np.nan)
        if self.n_tokens == self.window:
            self.ffn = tuple(np.flatnonzero(self.similarity >= self.threshold).tolist())
            self.skip[list(self.ffn), FFN] = True
            self.factor[list(self.ffn), FFN] = self.ratio[list(self.ffn)]


def mean_similarity(trace: Trace) -> npt.NDArray[np.float64]:
    """IO similarity of one request: the cosine of u and v per token, then the mean over tokens; [n_layer, 2]."""
    return np.asarray(np.mean(trace.dot / np.sqrt(trace.u_sq * trace.v_sq), axis=-1))


def norm_ratio(trace: Trace) -> npt.NDArray[np.float64]:
    """Norm ratio of one request: ||V||_F / ||U||_F over all its tokens; [n_layer, 2]."""
    return np.asarray(np.sqrt(trace.v_sq.sum(axis=-1) / trace.u_sq.sum(axis=-1)))


def median_ratio(trace: Trace) -> npt.NDArray[np.float64]:
    """The median over tokens of |v| / |u|; [n_layer, 2]."""
    return np.asarray(np.median(np.sqrt(trace.v_sq / trace.u_sq), axis=-1))


def relative_error(actual: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    """The largest relative error of one token's logits: max over rows of |actual - expected| / |expected|."""
    a, b = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"shapes {a.shape} and {b.shape} differ")
    return float(np.max(np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1)))


def write_dequantised(
    source: str | Path, target: str | Path, matrices: GGMLQuantizationType = GGMLQuantizationType.F32
) -> Path:
    """Copy a GGUF model, dequantised to F32, so that llama.cpp computes on exactly our weights.

    With ``matrices`` those of two dimensions get this type instead.
    """
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        writer.add_key_value(name, field.contents(), kind, field.types[-1] if kind == GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        kind = matrices if len(tensor.shape) == 2 else GGMLQuantizationType.F32
        values = dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, quantize(values, kind), raw_dtype=kind)
    write(writer)
    return Path(target)
