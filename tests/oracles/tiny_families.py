"""The architecture families of the tests' tiny models: their metadata and their tensors.

Both follow ``src/models/<architecture>.cpp`` and ``llama_model_base::load_hparams`` of the vendored llama.cpp.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

__all__ = [
    "ENCODERS",
    "FAMILIES",
    "N_CTX_TRAIN",
    "N_EMBD",
    "N_FF",
    "N_HEAD",
    "N_VOCAB",
    "PARTLY",
    "SKIPPABLE",
    "Family",
    "tokens",
]

N_EMBD = 64
N_HEAD = 4
N_KV = 2
N_FF = 96
N_LAYER = 3
N_EXPERT = 4
N_FF_EXPERT = 32
N_CTX_TRAIN = 512
N_VOCAB = 272


def tokens(n: int, seed: int = 0) -> list[int]:
    """BOS and n - 1 random ids of the tiny vocabulary."""
    return [1, *np.random.default_rng(seed).integers(3, N_VOCAB, size=n - 1).tolist()]


@dataclass(frozen=True)
class Family:
    """How one architecture differs from plain llama."""

    architecture: str
    head_dim: int = 16
    n_kv: int = N_KV
    metadata: dict[str, Any] = field(default_factory=dict)  # below the architecture, besides the common or instead
    norm: str = "rms"  # or "layer" (with biases)
    qkv: str = "split"  # "bias" or "fused"
    ffn: str = "gated"  # "fused" (gate and up in one matrix), "plain" (no gate), "experts" or "none"
    before: tuple[str, ...] = ("attn_norm", "ffn_norm")  # norms in front of the two sublayers
    after: tuple[str, ...] = ()  # norms after the two output projections
    qk_norm: str = ""  # "head" or "row" (over all heads)
    biases: bool = False  # of every projection
    tied: bool = False  # the output reuses the token embedding
    mixer: dict[int, str] = field(default_factory=dict)  # layers whose first sublayer is "ssm" or "conv"
    parallel: bool = False  # attention and FFN both read the layer's input
    n_layer: int = N_LAYER
    block: str = "blk"  # begins the names of a layer's tensors
    attn_output: str = "attn_output"  # the projection that ends an attention
    output_norm: str = "output_norm"  # "" for none
    extra: dict[str, tuple[int, ...]] = field(default_factory=dict)  # further tensors, name -> NumPy shape

    def tensors(self, n_layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield every tensor's name and its NumPy shape (the reverse of ggml's)."""
        yield "token_embd.weight", (N_VOCAB, N_EMBD)
        yield from self._norm(self.output_norm, N_EMBD)
        if not self.tied:
            yield "output.weight", (N_VOCAB, N_EMBD)
        yield from self.extra.items()
        if per_layer := self.metadata.get("embedding_length_per_layer_input"):
            yield "per_layer_token_embd.weight", (N_VOCAB, per_layer * n_layer)
            yield "per_layer_model_proj.weight", (per_layer * n_layer, N_EMBD)
            yield "per_layer_proj_norm.weight", (per_layer,)
        for layer in range(n_layer):
            for name, shape in self._layer(layer):
                yield f"{self.block}.{layer}.{name}", shape

    def _norm(self, name: str, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (size,)
        if self.norm == "layer":
            yield f"{name}.bias", (size,)

    def _linear(self, name: str, n_in: int, n_out: int, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (n_out, n_in)
        if bias:
            yield f"{name}.bias", (n_out,)

    def _layer(self, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        for name in (*self.before, *self.after):
            yield from self._norm(name, N_EMBD)
        match self.mixer.get(layer):
            case "ssm":
                yield from self._ssm()
            case "conv":
                yield from self._linear("shortconv.in_proj", N_EMBD, 3 * N_EMBD, False)
                yield from self._linear("shortconv.out_proj", N_EMBD, N_EMBD, False)
                yield "shortconv.conv.weight", (N_EMBD, self.metadata["shortconv.l_cache"])
            case _:
                yield from self._attention(layer)
        yield from self._ffn()
        if per_layer := self.metadata.get("embedding_length_per_layer_input"):
            yield from self._linear("inp_gate", N_EMBD, per_layer, False)
            yield from self._linear("proj", per_layer, N_EMBD, False)
            yield "post_norm.weight", (N_EMBD,)

    def _attention(self, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        n_q, n_kv = N_HEAD * self.head_dim, self.n_kv * self.head_dim
        if self.qkv == "fused":
            yield from self._linear("attn_qkv", N_EMBD, n_q + 2 * n_kv, self.biases)
        else:
            for name, size in (("attn_q", n_q), ("attn_k", n_kv), ("attn_v", n_kv)):
                yield from self._linear(name, N_EMBD, size, self.qkv == "bias")
        if self.qk_norm:
            per_head = self.qk_norm == "head"
            yield from self._norm("attn_q_norm", self.head_dim if per_head else n_q)
            yield from self._norm("attn_k_norm", self.head_dim if per_head else n_kv)
        yield from self._linear(self.attn_output, n_q, N_EMBD, self.biases)

    def _ssm(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        inner, state, rank, conv = (
            self.metadata[f"ssm.{key}"] for key in ("inner_size", "state_size", "time_step_rank", "conv_kernel")
        )
        yield from self._linear("ssm_in", N_EMBD, 2 * inner, False)
        yield "ssm_conv1d.weight", (inner, conv)
        yield "ssm_conv1d.bias", (inner,)
        yield from self._linear("ssm_x", inner, rank + 2 * state, False)
        yield from self._linear("ssm_dt", rank, inner, True)
        yield "ssm_a", (inner, state)
        yield "ssm_d", (inner,)
        yield from self._linear("ssm_out", inner, N_EMBD, False)
        if self.architecture == "jamba":
            for name, size in (("ssm_dt_norm", rank), ("ssm_b_norm", state), ("ssm_c_norm", state)):
                yield f"{name}.weight", (size,)

    def _ffn(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        match self.ffn:
            case "none":
                return
            case "experts":
                yield from self._linear("ffn_gate_inp", N_EMBD, N_EXPERT, False)
                yield "ffn_gate_exps.weight", (N_EXPERT, N_FF_EXPERT, N_EMBD)
                yield "ffn_up_exps.weight", (N_EXPERT, N_FF_EXPERT, N_EMBD)
                yield "ffn_down_exps.weight", (N_EXPERT, N_EMBD, N_FF_EXPERT)
                return
            case "gated":
                yield from self._linear("ffn_gate", N_EMBD, N_FF, self.biases)
        yield from self._linear("ffn_up", N_EMBD, 2 * N_FF if self.ffn == "fused" else N_FF, self.biases)
        yield from self._linear("ffn_down", N_FF, N_EMBD, self.biases)


_SANDWICH = ("post_attention_norm", "post_ffw_norm")
_EXPERTS = {"expert_count": N_EXPERT, "expert_used_count": 2}
_SSM = {"ssm.conv_kernel": 4, "ssm.inner_size": 2 * N_EMBD, "ssm.state_size": 16, "ssm.time_step_rank": 4}
_GPTNEOX = Family("gptneox", n_kv=N_HEAD, norm="layer", qkv="fused", ffn="plain", biases=True)
_GEMMA4 = Family(
    "gemma4",
    tied=True,
    after=_SANDWICH,
    qk_norm="head",
    n_layer=4,
    metadata={
        "attention.sliding_window": 8,
        "attention.sliding_window_pattern": [True, False, True, False],
        "attention.shared_kv_layers": 2,
        "attention.key_length_swa": 16,
        "attention.value_length_swa": 16,
        "embedding_length_per_layer_input": 0,
    },
    extra={"rope_freqs.weight": (8,)},  # half a head
)

# Fixed in llama.cpp, as are the 20 layers of Gemma 3n that have KV of their own: the others share it.
_GEMMA3N_LAYERS, _ALTUP, _LAUREL, _PER_LAYER = 24, 4, 64, 256
_GEMMA3N: dict[str, tuple[int, ...]] = {
    "altup_proj.weight": (_ALTUP - 1, N_EMBD, N_EMBD),
    "altup_unembd_proj.weight": (_ALTUP - 1, N_EMBD, N_EMBD),
    **{
        f"blk.{layer}.{name}.weight": shape
        for layer in range(_GEMMA3N_LAYERS)
        for name, shape in {
            "altup_correct_coef": (_ALTUP, _ALTUP),
            "altup_correct_scale": (N_EMBD,),
            "altup_predict_coef": (_ALTUP * _ALTUP, _ALTUP),
            "altup_router": (_ALTUP, N_EMBD),
            "altup_router_norm": (N_EMBD,),
            "laurel_l": (_LAUREL, N_EMBD),
            "laurel_r": (N_EMBD, _LAUREL),
            "laurel_post_norm": (N_EMBD,),
        }.items()
    },
}

# Families in which every sublayer can be skipped.
SKIPPABLE: dict[str, Family] = {
    "llama": Family("llama"),
    "llama-tied": Family("llama", tied=True),
    "llama-bias": Family("llama", biases=True),
    "llama-experts": Family("llama", ffn="experts", metadata={**_EXPERTS, "feed_forward_length": N_FF_EXPERT}),
    "qwen2": Family("qwen2", qkv="bias"),
    "qwen3": Family("qwen3", head_dim=32, qk_norm="head"),
    "qwen3moe": Family(
        "qwen3moe", ffn="experts", qk_norm="head", metadata={**_EXPERTS, "expert_feed_forward_length": N_FF_EXPERT}
    ),
    "gemma2": Family(
        "gemma2",
        tied=True,
        after=_SANDWICH,
        n_layer=4,
        metadata={"attention.sliding_window": 8, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0},
    ),
    "gemma3": Family(
        "gemma3",
        tied=True,
        after=_SANDWICH,
        qk_norm="head",
        metadata={
            "attention.sliding_window": 8,
            "attention.sliding_window_pattern": 2,  # layers 0 and 2 slide, layer 1 is the only full one
            "rope.freq_base_swa": 1000.0,
        },
    ),
    "olmo2": Family("olmo2", before=(), after=_SANDWICH, qk_norm="row"),
    "phi3": Family("phi3", qkv="fused", ffn="fused"),
    "gptneox-parallel": replace(_GPTNEOX, parallel=True, metadata={"use_parallel_residual": True}),
    "gptneox-sequential": replace(_GPTNEOX, metadata={"use_parallel_residual": False}),
    "gpt2": replace(_GPTNEOX, architecture="gpt2", tied=True, extra={"position_embd.weight": (N_CTX_TRAIN, N_EMBD)}),
    "falcon": Family("falcon", n_kv=1, norm="layer", qkv="fused", ffn="plain", before=("attn_norm",), parallel=True),
    "falcon-two-norms": Family(
        "falcon", norm="layer", qkv="fused", ffn="plain", before=("attn_norm", "attn_norm_2"), parallel=True
    ),
}

# Families with sublayers that cannot be taken apart: state-space or convolution layers, KV shared between layers.
PARTLY: dict[str, Family] = {
    "mamba": Family(
        "mamba", ffn="none", before=("attn_norm",), mixer=dict.fromkeys(range(N_LAYER), "ssm"), metadata=_SSM
    ),
    "jamba": Family("jamba", mixer={0: "ssm", 2: "ssm"}, metadata=_SSM),
    "lfm2": Family(
        "lfm2",
        qk_norm="head",
        tied=True,
        output_norm="token_embd_norm",
        mixer={0: "conv", 2: "conv"},
        metadata={"shortconv.l_cache": 3},
    ),
    "gemma4": _GEMMA4,
    "gemma4-per-layer": replace(_GEMMA4, metadata={**_GEMMA4.metadata, "embedding_length_per_layer_input": 8}),
    "gemma3n": Family(
        "gemma3n",
        tied=True,
        after=_SANDWICH,
        qk_norm="head",
        n_layer=_GEMMA3N_LAYERS,
        metadata={"attention.sliding_window": 8, "embedding_length_per_layer_input": _PER_LAYER},
        extra=_GEMMA3N,
    ),
}

# Models that read a text at once and give embeddings; they have no KV.
ENCODERS: dict[str, Family] = {
    "bert": Family(
        "bert",
        n_kv=N_HEAD,
        norm="layer",
        qkv="bias",
        ffn="plain",
        biases=True,
        tied=True,
        before=(),
        after=("attn_output_norm", "layer_output_norm"),
        output_norm="token_embd_norm",
        extra={"token_types.weight": (2, N_EMBD), "position_embd.weight": (N_CTX_TRAIN, N_EMBD)},
        metadata={"attention.causal": False, "pooling_type": 1, "tokenizer.ggml.token_type_count": 2},
    ),
    "t5encoder": Family(
        "t5encoder",
        n_kv=N_HEAD,
        tied=True,
        block="enc.blk",
        attn_output="attn_o",
        output_norm="enc.output_norm",
        extra={"enc.blk.0.attn_rel_b.weight": (32, N_HEAD)},
        metadata={"attention.relative_buckets_count": 32, "pooling_type": 1},
    ),
}

FAMILIES: dict[str, Family] = {**SKIPPABLE, **PARTLY}
