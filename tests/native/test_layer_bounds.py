"""Layers that a graph has beyond those of the model: next-token-prediction heads, and decoders deeper than encoders."""

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from oracles.fixtures import Open
from oracles.tiny_families import N_EMBD, N_EXPERT, N_FF, N_FF_EXPERT, N_LAYER, N_VOCAB, Family, tokens
from oracles.tiny_models import write_model

from adaskip_cpp import SkipPlan
from adaskip_cpp.engine.native import NativeContext


class Glm4Moe(Family):
    """GLM-4.5 with a head that predicts the token after the next one, in the block after the last layer."""

    def _layer(self, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from super()._layer(layer)
        yield "exp_probs_b.bias", (N_EXPERT,)
        yield "ffn_gate_shexp.weight", (N_FF_EXPERT, N_EMBD)
        yield "ffn_up_shexp.weight", (N_FF_EXPERT, N_EMBD)
        yield "ffn_down_shexp.weight", (N_EMBD, N_FF_EXPERT)
        if layer == N_LAYER:
            yield "nextn.eh_proj.weight", (N_EMBD, 2 * N_EMBD)
            yield "nextn.enorm.weight", (N_EMBD,)
            yield "nextn.hnorm.weight", (N_EMBD,)


class T5(Family):
    """A model with an encoder, and a decoder that is one layer shallower."""

    def tensors(self, n_layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "token_embd.weight", (N_VOCAB, N_EMBD)
        for part, depth in (("enc", n_layer), ("dec", n_layer - 1)):
            yield f"{part}.output_norm.weight", (N_EMBD,)
            yield f"{part}.blk.0.attn_rel_b.weight", (8, 4)
            for layer in range(depth):
                for block in ("attn", "cross_attn")[: 1 + (part == "dec")]:
                    yield f"{part}.blk.{layer}.{block}_norm.weight", (N_EMBD,)
                    for name in "qkvo":
                        yield f"{part}.blk.{layer}.{block}_{name}.weight", (N_EMBD, N_EMBD)
                yield f"{part}.blk.{layer}.ffn_norm.weight", (N_EMBD,)
                yield f"{part}.blk.{layer}.ffn_up.weight", (N_FF, N_EMBD)
                yield f"{part}.blk.{layer}.ffn_down.weight", (N_EMBD, N_FF)


@pytest.fixture(scope="module")
def glm4moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    metadata = {
        "expert_count": N_EXPERT,
        "expert_used_count": 2,
        "expert_feed_forward_length": N_FF_EXPERT,
        "expert_shared_count": 1,
        "leading_dense_block_count": 0,
        "nextn_predict_layers": 1,
    }
    family = Glm4Moe("glm4moe", ffn="experts", before=("attn_norm", "post_attention_norm"), metadata=metadata)
    return write_model(tmp_path_factory.mktemp("glm") / "glm4moe.gguf", family, n_layer=N_LAYER + 1)


@pytest.fixture
def prediction_head(glm4moe: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """A context of the head alone, as llama.cpp's own drafts open it: its only layer has the number n_layer."""
    model_params = llama_cpp.llama_model_default_params()
    model_params.load_mtp = True
    model = llama_cpp.llama_model_load_from_file(str(glm4moe).encode(), model_params)
    if f"unused tensor blk.{N_LAYER}.nextn.eh_proj.weight" in capfd.readouterr().err:
        llama_cpp.llama_model_free(model)
        pytest.skip("this llama.cpp computes no prediction head of glm4moe")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_threads, params.ctx_type = 128, 1, llama_cpp.LLAMA_CONTEXT_TYPE_MTP
    ctx = llama_cpp.llama_init_from_model(model, params)
    assert ctx is not None
    yield ctx
    llama_cpp.llama_free(ctx)
    llama_cpp.llama_model_free(model)


def test_a_prediction_head_is_no_layer_of_the_model(glm4moe: Path, open_model: Open) -> None:
    llm = open_model(glm4moe)
    assert llm.n_layer == N_LAYER
    assert all(sublayer.skippable for sublayer in llm.sublayers)
    llm.set_plan(SkipPlan.manual(N_LAYER, attention=[N_LAYER - 1], ffn=[0, N_LAYER - 1]))
    llm.eval(tokens(9))
    assert np.isfinite(llm.scores[:9]).all()


@pytest.mark.parametrize("n_tokens", [4, 20], ids=["host", "device"])
def test_in_the_graph_of_a_prediction_head_nothing_is_observed_or_skipped(prediction_head: Any, n_tokens: int) -> None:
    native = NativeContext(prediction_head)
    assert native.n_layer == N_LAYER
    assert not any(sublayer.skippable for sublayer in native.sublayers())
    batches = []
    native.start_statistics(batches.append, keep_logits=False, activations=True)
    batch = llama_cpp.llama_batch_init(n_tokens, N_EMBD, 1)
    ids = (ctypes.c_int32 * n_tokens)(*[5] * n_tokens)
    batch.token, batch.n_tokens = ids, n_tokens
    np.ctypeslib.as_array(batch.embd, (n_tokens, N_EMBD))[:] = 0.1
    for i in range(n_tokens):
        batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = i, 1, 0, i == n_tokens - 1
    for _ in range(3):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(prediction_head), True)
        assert llama_cpp.llama_decode(prediction_head, batch) == 0
    batch.token = None
    llama_cpp.llama_batch_free(batch)
    native.stop_statistics()
    assert all(np.isnan(each.dot).all() for each in batches)


def test_a_decoder_may_have_fewer_layers_than_its_encoder(tmp_path: Path, open_model: Open) -> None:
    metadata = {"decoder_block_count": 2, "attention.relative_buckets_count": 8}
    llm = open_model(write_model(tmp_path / "t5.gguf", T5("t5", n_kv=4, metadata=metadata), n_layer=3))
    skippable = [(sublayer.layer, sublayer.kind) for sublayer in llm.sublayers if sublayer.skippable]
    assert skippable == [(0, "ffn"), (1, "ffn")]  # a decoder's layer has two attentions; all share biases
    llm._batch.set_batch(batch=tokens(9), n_past=0, logits_all=True)
    llm._ctx.encode(llm._batch)
    llm.set_plan(SkipPlan.manual(3, ffn=[1]))
    with llm.collect_statistics(lambda batch: None, keep_logits=True):
        llm.eval(tokens(9))
    assert np.isfinite(llm.scores[:9]).all()
