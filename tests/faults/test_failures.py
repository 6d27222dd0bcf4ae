"""What fails inside llama_decode becomes an error that says why, and never ends the process."""

import ctypes
from pathlib import Path

import pytest
from faults.preloaded import build
from oracles.fixtures import Open
from oracles.tiny_families import tokens

from adaskip_cpp import SkipPlan
from adaskip_cpp.engine.binding import ffi, lib
from adaskip_cpp.errors import NativeError, StateError


def test_why_kv_may_not_be_read_is_told_once(open_tiny: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = open_tiny(under=SkipPlan.manual(3, attention=[1]))
    llm.eval(tokens(9))
    llm.set_plan(None)  # which may not read what lacks an attention
    llm._batch.set_batch(batch=[7], n_past=9, logits_all=True)
    with pytest.raises(RuntimeError) as bare:  # whoever decodes without AdaSkipLlama can ask for the reason
        llm._ctx.decode(llm._batch)
    with pytest.raises(StateError, match="position 0 of sequence 0"):
        llm._adaskip.raise_failure(bare.value)
    with pytest.raises(NativeError, match=r"llama\.cpp failed"):
        llm._adaskip.raise_failure(bare.value)
    with monkeypatch.context() as patch:  # as if AdaSkipLlama had overlooked the holes
        patch.setattr(llm._adaskip, "kv_valid", lambda phase, n: n)
        with pytest.raises(StateError, match=r"position 0 of sequence 0 .*; .* or call reset\(\)"):
            llm.eval([7])
    llm.eval([7])  # evaluates all again
    assert llm.n_tokens == 10


def test_without_room_the_error_says_what_to_do(open_tiny: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = open_tiny(n_ctx=256)
    monkeypatch.setattr(type(llm), "context_size", 512)  # more than it has
    with pytest.raises(NativeError, match=r"llama_decode returned 1.*n_ctx"):
        llm.eval(tokens(257))


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
