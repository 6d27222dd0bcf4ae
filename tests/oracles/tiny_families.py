"""The architecture families of the tests' tiny models: their metadata and their tensors.

Both follow ``src/models/<architecture>.cpp`` and ``llama_model_base::load_hparams`` of the vendored llama.cpp.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

N_EMBD = 64
N_HEAD = 4
N_KV = 2
N_FF = 96
N_LAYER = 3
N_EXPERT = 4
N_FF_EXPERT = 32
N_CTX_TRAIN = 512
N_VOCAB = 272

Tensors = Iterator[tuple[str, tuple[int, ...]]]


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
    n_layer: int = N_LAYER
    block: str = "blk"  # begins the names of a layer's tensors
    attn_output: str = "attn_output"  # the projection that ends an attention
    output_norm: str = "output_norm"
    extra: dict[str, tuple[int, ...]] = field(default_factory=dict)  # further tensors, name -> NumPy shape

    def tensors(self, n_layer: int) -> Tensors:
        """Yield every tensor's name and its NumPy shape (the reverse of ggml's)."""
        yield from _weight("token_embd", N_VOCAB, N_EMBD)
        yield from self._norm(self.output_norm)
        if not self.tied:
            yield from _weight("output", N_VOCAB, N_EMBD)
        yield from self.extra.items()
        if per_layer := self.metadata.get("embedding_length_per_layer_input"):
            yield from _weight("per_layer_token_embd", N_VOCAB, per_layer * n_layer)
            yield from _weight("per_layer_model_proj", per_layer * n_layer, N_EMBD)
            yield from _weight("per_layer_proj_norm", per_layer)
        for layer in range(n_layer):
            for name, shape in self._layer(layer):
                yield f"{self.block}.{layer}.{name}", shape

    def _norm(self, name: str, size: int = N_EMBD) -> Tensors:
        yield from _weight(name, size, bias=self.norm == "layer")

    def _layer(self, layer: int) -> Tensors:
        for name in (*self.before, *self.after):
            yield from self._norm(name)
        match self.mixer.get(layer):
            case "ssm":
                yield from self._ssm()
            case "conv":
                yield from _weight("shortconv.in_proj", 3 * N_EMBD, N_EMBD)
                yield from _weight("shortconv.out_proj", N_EMBD, N_EMBD)
                yield from _weight("shortconv.conv", N_EMBD, self.metadata["shortconv.l_cache"])
            case _:
                yield from self._attention()
        yield from self._ffn()
        if per_layer := self.metadata.get("embedding_length_per_layer_input"):
            yield from _weight("inp_gate", per_layer, N_EMBD)
            yield from _weight("proj", N_EMBD, per_layer)
            yield from _weight("post_norm", N_EMBD)

    def _attention(self) -> Tensors:
        n_q, n_kv = N_HEAD * self.head_dim, self.n_kv * self.head_dim
        if self.qkv == "fused":
            yield from _weight("attn_qkv", n_q + 2 * n_kv, N_EMBD, bias=self.biases)
        else:
            for name, size in (("attn_q", n_q), ("attn_k", n_kv), ("attn_v", n_kv)):
                yield from _weight(name, size, N_EMBD, bias=self.qkv == "bias")
        if self.qk_norm:
            yield from self._norm("attn_q_norm", self.head_dim if self.qk_norm == "head" else n_q)
            yield from self._norm("attn_k_norm", self.head_dim if self.qk_norm == "head" else n_kv)
        yield from _weight(self.attn_output, N_EMBD, n_q, bias=self.biases)

    def _ssm(self) -> Tensors:
        inner, state, rank = (self.metadata[f"ssm.{key}"] for key in ("inner_size", "state_size", "time_step_rank"))
        yield from _weight("ssm_in", 2 * inner, N_EMBD)
        yield from _weight("ssm_conv1d", inner, self.metadata["ssm.conv_kernel"], bias=True)
        yield from _weight("ssm_x", rank + 2 * state, inner)
        yield from _weight("ssm_dt", inner, rank, bias=True)
        yield "ssm_a", (inner, state)
        yield "ssm_d", (inner,)
        yield from _weight("ssm_out", N_EMBD, inner)
        if self.architecture == "jamba":
            for name, size in (("ssm_dt_norm", rank), ("ssm_b_norm", state), ("ssm_c_norm", state)):
                yield from _weight(name, size)

    def _ffn(self) -> Tensors:
        if self.ffn == "experts":
            yield from _weight("ffn_gate_inp", N_EXPERT, N_EMBD)
            yield from _weight("ffn_gate_exps", N_EXPERT, N_FF_EXPERT, N_EMBD)
            yield from _weight("ffn_up_exps", N_EXPERT, N_FF_EXPERT, N_EMBD)
            yield from _weight("ffn_down_exps", N_EXPERT, N_EMBD, N_FF_EXPERT)
        elif self.ffn != "none":
            if self.ffn == "gated":
                yield from _weight("ffn_gate", N_FF, N_EMBD, bias=self.biases)
            yield from _weight("ffn_up", 2 * N_FF if self.ffn == "fused" else N_FF, N_EMBD, bias=self.biases)
            yield from _weight("ffn_down", N_EMBD, N_FF, bias=self.biases)


def _weight(name: str, *shape: int, bias: bool = False) -> Tensors:
    yield f"{name}.weight", shape
    if bias:
        yield f"{name}.bias", shape[:1]


_SANDWICH = ("post_attention_norm", "post_ffw_norm")
_EXPERTS = {"expert_count": N_EXPERT, "expert_used_count": 2}
_SSM = {"ssm.conv_kernel": 4, "ssm.inner_size": 2 * N_EMBD, "ssm.state_size": 16, "ssm.time_step_rank": 4}
_WINDOW = {"attention.sliding_window": 8}
_SOFTCAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0}
_GEMMA3 = {**_WINDOW, "attention.sliding_window_pattern": 2, "rope.freq_base_swa": 1000.0}  # of 3 layers 0 and 2 slide
_POSITIONS: dict[str, tuple[int, ...]] = {"position_embd.weight": (N_CTX_TRAIN, N_EMBD)}
_GPTNEOX = Family("gptneox", n_kv=N_HEAD, norm="layer", qkv="fused", ffn="plain", biases=True)
_FALCON = Family("falcon", norm="layer", qkv="fused", ffn="plain", before=("attn_norm", "attn_norm_2"))
_GEMMA4 = Family(
    "gemma4",
    tied=True,
    after=_SANDWICH,
    qk_norm="head",
    n_layer=4,
    metadata={
        **_WINDOW,
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
_GEMMA3N = {
    "altup_correct_coef": (_ALTUP, _ALTUP),
    "altup_correct_scale": (N_EMBD,),
    "altup_predict_coef": (_ALTUP * _ALTUP, _ALTUP),
    "altup_router": (_ALTUP, N_EMBD),
    "altup_router_norm": (N_EMBD,),
    "laurel_l": (_LAUREL, N_EMBD),
    "laurel_r": (N_EMBD, _LAUREL),
    "laurel_post_norm": (N_EMBD,),
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
    "gemma2": Family("gemma2", tied=True, after=_SANDWICH, n_layer=4, metadata={**_WINDOW, **_SOFTCAPS}),
    "gemma3": Family("gemma3", tied=True, after=_SANDWICH, qk_norm="head", metadata=_GEMMA3),
    "olmo2": Family("olmo2", before=(), after=_SANDWICH, qk_norm="row"),
    "phi3": Family("phi3", qkv="fused", ffn="fused"),
    "gptneox-parallel": replace(_GPTNEOX, metadata={"use_parallel_residual": True}),
    "gptneox-sequential": replace(_GPTNEOX, metadata={"use_parallel_residual": False}),
    "gpt2": replace(_GPTNEOX, architecture="gpt2", tied=True, extra=_POSITIONS),
    "falcon": replace(_FALCON, n_kv=1, before=("attn_norm",)),
    "falcon-two-norms": _FALCON,
}

# Families with sublayers that cannot be taken apart: state-space or convolution layers, KV shared between layers.
PARTLY: dict[str, Family] = {
    "mamba": Family("mamba", ffn="none", before=("attn_norm",), mixer=dict.fromkeys(range(3), "ssm"), metadata=_SSM),
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
        metadata={**_WINDOW, "embedding_length_per_layer_input": _PER_LAYER},
        extra={
            "altup_proj.weight": (_ALTUP - 1, N_EMBD, N_EMBD),
            "altup_unembd_proj.weight": (_ALTUP - 1, N_EMBD, N_EMBD),
            **{f"blk.{i}.{name}.weight": _GEMMA3N[name] for i in range(_GEMMA3N_LAYERS) for name in _GEMMA3N},
        },
    ),
}

# Models that read a text at once and give embeddings; they have no KV.
ENCODERS: dict[str, Family] = {
    "bert": replace(
        _GPTNEOX,
        architecture="bert",
        qkv="bias",
        tied=True,
        before=(),
        after=("attn_output_norm", "layer_output_norm"),
        output_norm="token_embd_norm",
        extra={"token_types.weight": (2, N_EMBD), **_POSITIONS},
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
