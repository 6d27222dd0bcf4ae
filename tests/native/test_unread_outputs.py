"""A batch without outputs ends at its last store into the memory: the saved state and logits stay, to the bit."""

import ctypes
import sys
from typing import Any

import llama_cpp
import numpy as np
import pytest
from oracles.expected import last_logits
from oracles.fixtures import Open, Tiny
from oracles.reference import relative_error
from oracles.stock import EXACT, Job, run_stock
from oracles.tiny_families import FAMILIES, N_EMBD, tokens

N_KV = {"gemma3n": 20, "gemma4": 2, "gemma4-per-layer": 2}  # layers with KV of their own, where it is shared
N_BATCH = 16


def decode(llm: Any, tokens: list[int], *, reads_all: bool) -> list[tuple[int, int]]:
    """A prompt in batches of which only the last is read, or all; nodes of each graph as built and as computed."""
    nodes = []
    for start in range(0, len(tokens), N_BATCH):
        batch = tokens[start : start + N_BATCH]
        llm._batch.set_batch(batch=batch, n_past=start, logits_all=False)
        llm._batch.batch.logits[len(batch) - 1] = reads_all or start + N_BATCH >= len(tokens)
        llm._ctx.decode(llm._batch)
        nodes.append((llm.counters.nodes_full, llm.counters.nodes))
    return nodes


def rows(pointer: Any, n: int, n_embd: int) -> np.ndarray:
    """Rows that llama.cpp keeps until the next batch."""
    return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), shape=(n, n_embd)).copy()


@pytest.mark.parametrize(
    ("name", "is_steered"),
    [*((name, False) for name in FAMILIES), *((name, True) for name in ("llama", "gemma3", "gemma4-per-layer"))],
)
def test_state_and_logits_are_those_of_batches_that_are_read(name: str, is_steered: bool, open_tiny: Open) -> None:
    """Also with a control vector, which is in the stream of tokens that nobody reads."""
    results, n_layer = [], FAMILIES[name].n_layer
    vector = np.random.default_rng(7).normal(0, 0.5, (n_layer - 1, N_EMBD)).astype(np.float32)
    for reads_all in (True, False):
        llm = open_tiny(name, n_batch=N_BATCH, logits_all=False)
        if is_steered:
            data = vector.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            assert llama_cpp.llama_set_adapter_cvec(llm.ctx, data, vector.size, N_EMBD, 1, n_layer - 1) == 0
        nodes = decode(llm, tokens(40), reads_all=reads_all)
        results.append((bytes(llm.save_state().llama_state), last_logits(llm)))
        assert [full > computed for full, computed in nodes] == [not reads_all, not reads_all, False]
    (state, logits), (unread_state, unread_logits) = results
    assert unread_state == state
    assert np.array_equal(unread_logits, logits)
    # Of the layers above the last that has KV of its own, no node is left; of that one, K and V alone.
    (full, unread), n_kv = nodes[0], N_KV.get(name, n_layer)
    assert full - unread > (n_layer - n_kv) * full / n_layer / 2
    assert llm.n_layer_kv == n_kv


@pytest.mark.parametrize("name", ["llama", "gemma3", *N_KV])
def test_a_prompt_is_that_of_stock(name: str, tiny: Tiny, open_tiny: Open) -> None:
    """Bit for bit, and where KV is shared that of stock given the last token by itself.

    Stock's two ways differ by rounding: 3e-7 in Gemma 4, 6e-5 in Gemma 3n, whose sparse FFNs turn on thresholds. With
    ``exact_batches`` nothing differs, see test_architectures.py.
    """
    prompt, answer = tokens(40), [[token] for token in tokens(6, seed=1)[1:]]
    cut = [prompt[:-1], prompt[-1:]] if name in N_KV else [prompt]
    options = {"n_ctx": 128, "n_batch": N_BATCH, **EXACT}
    stock, whole = run_stock([Job(str(tiny(name)), pieces, options) for pieces in ([*cut, *answer], [prompt])])
    assert relative_error(stock[len(cut) - 1], whole[0]) < (5e-4 if name == "gemma3n" else 1e-5)
    llm = open_tiny(name, n_batch=N_BATCH, logits_all=False)
    for piece, expected in zip([prompt, *answer], stock[len(cut) - 1 :], strict=True):
        llm.eval(piece)
        assert np.array_equal(last_logits(llm), expected)


@pytest.mark.parametrize("name", sorted({*FAMILIES} - {"mamba", "gemma3n"}))  # of which nothing is observed
@pytest.mark.parametrize("keep_logits", [False, True], ids=["all tokens", "with logits"])
def test_statistics_are_those_of_batches_that_are_read(keep_logits: bool, name: str, open_tiny: Open) -> None:
    """With logits, llama.cpp runs the last layer's end on output tokens alone, of which such a batch has none."""
    seen: list[list[Any]] = []
    for reads_all in (True, False):
        llm = open_tiny(name, n_batch=N_BATCH, logits_all=False)
        seen.append([])
        with llm.collect_statistics(seen[-1].append, keep_logits=keep_logits):
            decode(llm, tokens(40), reads_all=reads_all)
    *unread, last = zip(*seen, strict=True)
    end = -1 if keep_logits else None
    for read, other in unread:
        for part in ("dot", "u_sq", "v_sq", "layer_dot", "sum_u"):
            np.testing.assert_array_equal(getattr(other, part)[:end], getattr(read, part)[:end])
    for part in ("dot", "u_sq", "v_sq", "layer_dot", "sum_u", "sum_v"):
        np.testing.assert_array_equal(getattr(last[1], part), getattr(last[0], part))


def test_a_prompt_of_a_model_for_embeddings_is_computed_whole(open_tiny: Open) -> None:
    llm, found = open_tiny(n_batch=N_BATCH, embedding=True, pooling_type=0, logits_all=False), []
    for n in (N_BATCH, 40, N_BATCH):
        llm.reset()
        llm.eval(tokens(40)[:n])
        assert llm.counters.nodes == llm.counters.nodes_full
        found.append(rows(llama_cpp.llama_get_embeddings(llm.ctx), n % N_BATCH or N_BATCH, N_EMBD))
    np.testing.assert_array_equal(found[2], found[0])


def test_nodes_begin_at_cache_lines(open_tiny: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in llama.cpp's own graphs: 32 bytes further, AVX-512 took a fifth longer. An output's id takes 32 bytes."""
    places, parameters = set[int](), llama_cpp.llama_context_default_params()

    def note(tensor: int, is_asked: bool, _: Any) -> bool:
        if ctypes.c_int64.from_address(tensor + 24).value > 1:  # ggml_tensor.ne[1]; 1 for markers
            places.add(ctypes.c_size_t.from_address(tensor + 248).value % 64)  # ggml_tensor.data
        return False

    parameters.cb_eval = llama_cpp.llama_cpp.ggml_backend_sched_eval_callback(note)
    monkeypatch.setattr("llama_cpp.llama_cpp.llama_context_default_params", lambda: parameters)
    decode(open_tiny(n_batch=N_BATCH, logits_all=False), tokens(40), reads_all=False)
    assert places == {0}


@pytest.mark.skipif(sys.platform == "win32", reason="of llama-ext.h a DLL exports what mtmd.dll calls alone")
@pytest.mark.parametrize("what", ["nextn", "layer_inp"])
def test_hidden_states_for_a_draft_model_are_there_for_every_token(what: str, open_tiny: Open) -> None:
    """What llama-ext.h offers to whoever drafts with blocks that predict further tokens, or with another model."""
    lib = llama_cpp.llama_cpp._lib
    found = []
    for reads_all in (True, False):
        llm = open_tiny("gemma4-per-layer", n_batch=N_BATCH, logits_all=False)
        ctx, layer, yes, no = ctypes.c_void_p(llm.ctx), ctypes.c_uint32(3), ctypes.c_bool(True), ctypes.c_bool(False)
        if what == "nextn":
            lib["_Z26llama_set_embeddings_nextnP13llama_contextbb"](ctx, yes, no)
            get, arguments = lib["_Z26llama_get_embeddings_nextnP13llama_context"], [ctx]
        else:
            lib["_Z30llama_set_embeddings_layer_inpP13llama_contextjb"](ctx, layer, yes)
            get, arguments = lib["_Z30llama_get_embeddings_layer_inpP13llama_contextj"], [ctx, layer]
        get.restype = ctypes.c_void_p
        llm._batch.set_batch(batch=tokens(N_BATCH), n_past=0, logits_all=False)
        llm._batch.batch.logits[N_BATCH - 1] = reads_all
        llm._ctx.decode(llm._batch)
        found.append(rows(get(*arguments), N_BATCH, N_EMBD))
    assert np.isfinite(found[0]).all() and found[0].any()
    np.testing.assert_array_equal(found[1], found[0])
