"""What fails inside llama_decode becomes an error that says why, and never ends the process."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults.preloaded import build
from oracles.fixtures import Open, Tiny
from oracles.gguf_files import changed_model
from oracles.stock import EXACT
from oracles.tiny_families import tokens

from adaskip_cpp import AdaSkipLlama, SkipPlan
from adaskip_cpp.engine.binding import ffi, lib
from adaskip_cpp.engine.native import elide_kv
from adaskip_cpp.errors import ElidedKVError, ModelFileError, NativeError, StateError

ATTENTION_1 = SkipPlan.manual(3, attention=[1])


@pytest.mark.parametrize(
    "kv",
    [
        {"tokenizer.ggml.tokens": [9, 8, ["<unk>", "<s>", "</s>", *["a"] * 269]]},
        {"llama.block_count": [4, 0]},
        {"llama.attention.head_count": [4, 5]},
        {"llama.attention.layer_norm_rms_epsilon": [6, -1.0]},
    ],
    ids=["the same token twice", "no layers", "heads that do not divide", "a negative epsilon"],
)
def test_a_file_that_llama_cpp_asserts_against_is_refused(kv: dict[str, Any], tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "changed.gguf"
    path.write_bytes(changed_model(tiny(), {"kv": kv}))
    with pytest.raises(ModelFileError, match=r"llama\.cpp cannot open .* \(.+\); check"):
        AdaSkipLlama(str(path), n_ctx=128, verbose=False)


def with_holes(llm: Any, tokens: list[int]) -> Any:
    """The model with KV that the plan in force may not read."""
    llm.set_plan(ATTENTION_1)
    llm.eval(tokens)
    llm.set_plan(None)
    return llm


def test_why_kv_may_not_be_read_reaches_the_caller(open_tiny: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = with_holes(open_tiny(), tokens(9))
    with monkeypatch.context() as patch:  # as if AdaSkipLlama had overlooked the holes
        patch.setattr(llm._adaskip, "kv_valid", lambda phase, n: n)
        with pytest.raises(StateError, match=r"position 0 of sequence 0 .*; .* or call reset\(\)"):
            llm.eval([7])
    llm.eval([7])  # evaluates all again
    assert llm.n_tokens == 10


def test_a_reason_is_told_once_and_not_for_the_next_failure(open_tiny: Open) -> None:
    llm = with_holes(open_tiny(n_ctx=256), tokens(9))
    llm._batch.set_batch(batch=[7], n_past=9, logits_all=True)
    with pytest.raises(RuntimeError) as bare:  # whoever decodes without AdaSkipLlama can ask for the reason
        llm._ctx.decode(llm._batch)
    with pytest.raises(StateError, match="position 0 of sequence 0"):
        llm._adaskip.raise_failure(bare.value)
    with pytest.raises(NativeError, match=r"llama\.cpp failed"):
        llm._adaskip.raise_failure(bare.value)


def test_where_llama_cpp_has_no_room_the_error_says_what_to_do(
    open_tiny: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = open_tiny(n_ctx=256)
    monkeypatch.setattr(type(llm), "context_size", 512)  # more than it has
    with pytest.raises(NativeError, match=r"llama_decode returned 1.*n_ctx"):
        llm.eval(tokens(257))


def test_a_graph_that_does_not_fit_the_context_is_refused_with_its_layer(tiny: Tiny) -> None:
    with elide_kv(np.array([False, True, False])):  # a context without KV for layer 1, and no plan that skips it
        llm = AdaSkipLlama(str(tiny()), n_ctx=128, verbose=False, **EXACT)
    try:
        with pytest.raises(ElidedKVError, match=r"layer 1: .*open the model without plan="):
            llm.eval(tokens(5))
    finally:
        llm.close()


def test_an_exception_of_ggmls_own_runtime_is_taken_for_lack_of_memory(open_tiny: Open, tmp_path: Path) -> None:
    library = ctypes.CDLL(str(build("foreign_exception.cpp", tmp_path)))
    throws = ffi.cast("adaskip_statistics_callback", ctypes.cast(library.throw_foreign, ctypes.c_void_p).value)
    llm = open_tiny()
    ctx = ffi.cast("struct llama_context *", llm.ctx)
    lib.adaskip_set_statistics(ctx, 1, throws, ffi.NULL)
    with pytest.raises(NativeError, match=r"^error of ggml; free memory"):
        llm.eval(tokens(9))
    lib.adaskip_set_statistics(ctx, 0, ffi.NULL, ffi.NULL)
    llm.eval(tokens(9))
    assert llm.n_tokens == 9
