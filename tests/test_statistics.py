"""Statistics computed inside llama.cpp against NumPy passes that share no code with them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import ReferenceModel, ReferenceRun, Trace, mean_similarity, norm_ratio
from reference_parallel import eval_parallel
from stock import EXACT, Job, eval_logits, run_stock
from tiny_families import N_EMBD, SKIPPABLE
from tiny_models import write_model

Tiny = Callable[..., Path]
Tokens = Callable[..., list[int]]
Open = Callable[..., Any]
SPLITS = {
    "one piece": (40, {}),
    "pieces of 7": (7, {}),
    "token by token": (1, {}),
    "n_ubatch 16": (40, {"n_ubatch": 16}),
    "n_batch 7": (40, {"n_batch": 7}),
    "last logits": (40, {"logits_all": False}),
}


def collect(llm: Any, tokens: list[int], size: int | None = None) -> Trace:
    """Evaluate a request in pieces of ``size`` tokens and put its ubatches together by position."""
    n_layer, size = llm.n_layer, size or len(tokens)
    sums, seen = np.full((3, n_layer, 2, len(tokens)), np.nan), []

    def sink(batch: Any) -> None:
        for index, values in enumerate((batch.dot, batch.u_sq, batch.v_sq)):
            assert values.shape == (n_layer, 2, len(batch.positions)) and values.dtype == np.float32
            sums[index][:, :, batch.positions] = values
        seen.extend(batch.positions.tolist())

    llm.reset()
    with llm.collect_statistics(sink):
        for start in range(0, len(tokens), size):
            llm.eval(tokens[start : start + size])
    assert seen == list(range(len(tokens))), "each token is delivered exactly once, in order"
    return Trace(np.empty((0, 0)), *sums)


def assert_equal(actual: Trace, expected: Trace, tolerance: float) -> None:
    """Compare IO similarity and norm ratio of the request, absolute, and every token's cosine."""
    np.testing.assert_allclose(mean_similarity(actual), mean_similarity(expected), rtol=0, atol=tolerance)
    np.testing.assert_allclose(norm_ratio(actual), norm_ratio(expected), rtol=0, atol=tolerance)
    cosines = [trace.dot / np.sqrt(trace.u_sq * trace.v_sq) for trace in (actual, expected)]
    np.testing.assert_allclose(*cosines, rtol=0, atol=tolerance)


@pytest.mark.parametrize("split", SPLITS)
def test_similarity_and_norm_ratio_equal_the_reference_however_the_request_is_split(
    split: str, tiny: Tiny, tokens: Tokens, open_model: Open
) -> None:
    # float32 sums of 64 products against float64: 3e-7 is measured. The last layer's FFN is one of the rows and every
    # token one of its columns, also where llama.cpp needs the last token's logits only.
    size, options = SPLITS[split]
    actual = collect(open_model(tiny(), **options), tokens(40), size)
    assert_equal(actual, ReferenceRun(ReferenceModel(tiny())).eval(tokens(40)), 2e-6)


def test_statistics_of_parallel_sublayers_follow_the_chain_attention_then_ffn(
    tiny: Tiny, tokens: Tokens, open_model: Open
) -> None:
    # a = x + attention(x), y = a + ffn(x). Stock's F16 GELU table puts a token's cosine 1.3e-4 off (the
    # request's similarity and ratio 1e-5), the other order or a shared input more than 0.1.
    path = tiny("gptneox-parallel")
    assert_equal(collect(open_model(path), tokens(40)), eval_parallel(path, tokens(40)), 5e-4)


@pytest.mark.parametrize("name", SKIPPABLE)
def test_the_output_of_each_sublayer_is_the_input_of_the_next(
    name: str, tiny: Tiny, tokens: Tokens, open_model: Open
) -> None:
    # The same tensor reduced twice: equal to float32 rounding.
    trace = collect(open_model(tiny(name)), tokens(40), 30)
    n_layer = SKIPPABLE[name].n_layer
    u_sq, v_sq = (values.reshape(2 * n_layer, -1) for values in (trace.u_sq, trace.v_sq))
    np.testing.assert_allclose(v_sq[:-1], u_sq[1:], rtol=1e-5)


@pytest.mark.parametrize("name", SKIPPABLE)
def test_the_first_input_is_the_token_embedding(name: str, tiny: Tiny, tokens: Tokens, open_model: Open) -> None:
    # Read from the file; gemma models scale the embedding by sqrt(n_embd).
    from gguf import GGUFReader

    table = next(t.data for t in GGUFReader(tiny(name)).tensors if t.name == "token_embd.weight")
    scale = N_EMBD if name.startswith("gemma") else 1
    expected = scale * (np.asarray(table, np.float64)[tokens(40)] ** 2).sum(axis=-1)
    np.testing.assert_allclose(collect(open_model(tiny(name)), tokens(40)).u_sq[0, 0], expected, rtol=1e-5)


@pytest.mark.parametrize("name", SKIPPABLE)
def test_collecting_statistics_changes_no_bit_of_the_logits(
    name: str, tiny: Tiny, tokens: Tokens, open_model: Open
) -> None:
    options, pieces = {"n_ctx": 128, "logits_all": True, **EXACT}, [tokens(40)[:36], *([t] for t in tokens(40)[36:])]
    (expected,) = run_stock([Job(str(tiny(name)), pieces, options)])
    llm, seen = open_model(tiny(name)), []
    llm._adaskip.start_statistics(lambda batch: seen.extend(batch.positions.tolist()), keep_logits=True)
    np.testing.assert_array_equal(eval_logits(llm, pieces), expected)
    assert seen == list(range(40))


@pytest.mark.parametrize("name", SKIPPABLE)
def test_a_sublayer_that_adds_nothing_has_similarity_one_and_ratio_one(
    name: str, tmp_path: Path, tokens: Tokens, open_model: Open
) -> None:
    # A model whose FFN of layer 1 has a zero output projection: u = v to the last bit, so dot = |u|^2 = |v|^2.
    path = write_model(tmp_path / "zero.gguf", name, zero=[(1, "ffn")])
    trace = collect(open_model(path), tokens(40))
    np.testing.assert_allclose(trace.dot[1, 1], trace.u_sq[1, 1], rtol=1e-5)
    np.testing.assert_allclose(trace.v_sq[1, 1], trace.u_sq[1, 1], rtol=1e-5)
    assert (np.abs(trace.dot[1, 0] / trace.u_sq[1, 0] - 1) > 1e-3).any(), "the attention beside it does add"


def test_an_error_in_the_sink_reaches_the_caller_and_the_model_works_afterwards(
    tiny: Tiny, tokens: Tokens, open_model: Open
) -> None:
    class SinkError(Exception):
        pass

    def fail(batch: Any) -> None:
        raise SinkError

    llm = open_model(tiny())
    with pytest.raises(SinkError), llm.collect_statistics(fail):
        llm.eval(tokens(40))
    llm.reset()
    expected = ReferenceRun(ReferenceModel(tiny())).eval(tokens(40))
    assert_equal(collect(llm, tokens(40)), expected, 2e-6)


def test_a_last_piece_of_one_token_is_prefill(tiny: Tiny, tokens: Tokens, open_model: Open) -> None:
    llm, phases = open_model(tiny(), n_batch=19), []
    with llm.collect_statistics(lambda batch: phases.append((len(batch.positions), batch.phase))):
        llm.eval(tokens(20))
    assert phases == [(19, "prefill"), (1, "prefill")]


@pytest.mark.model
def test_similarity_and_norm_ratio_of_smollm2_equal_a_numpy_float32_pass(
    smollm2_f32_path: Path, open_model: Open
) -> None:
    # Measured: 6e-8 for the similarity, 2e-6 to 8e-6 for ratios of up to 21 (the first token's norm is huge).
    prompt = [1, *np.random.default_rng(0).integers(100, 49000, size=299).tolist()]
    expected = ReferenceRun(ReferenceModel(smollm2_f32_path, np.float32)).eval(prompt)
    actual = collect(open_model(smollm2_f32_path, n_ctx=512, n_ubatch=128, n_threads_batch=2), prompt, 256)
    np.testing.assert_allclose(mean_similarity(actual), mean_similarity(expected), rtol=0, atol=1e-5)
    np.testing.assert_allclose(norm_ratio(actual), norm_ratio(expected), rtol=0, atol=1e-4)
