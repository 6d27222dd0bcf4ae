"""Statistics computed inside llama.cpp against a NumPy pass that shares no code with them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from oracles.fixtures import Open, Tiny
from oracles.observed import collect
from oracles.reference import ReferenceModel, ReferenceRun, Trace, mean_similarity, norm_ratio
from oracles.stock import OPTIONS, Job, eval_logits, run_stock
from oracles.tiny_families import N_EMBD, SKIPPABLE, tokens

from adaskip_cpp import SkipPlan
from adaskip_cpp.model.plan import Bulk
from adaskip_cpp.model.skip_set import SkipSet

SPLITS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "one piece": ("llama", 40, {}),
    "pieces of 7": ("llama", 7, {}),
    "token by token": ("llama", 1, {}),
    "n_ubatch 16": ("llama", 40, {"n_ubatch": 16}),
    "n_batch 7": ("llama", 40, {"n_batch": 7}),
    "last logits": ("llama", 40, {"logits_all": False}),
    # a = x + attention(x), y = a + ffn(x). The other order, or one input for both, puts a cosine more than 0.1 off.
    "parallel sublayers": ("gptneox-parallel", 40, {}),
}


@pytest.mark.parametrize("split", SPLITS)
def test_statistics_equal_the_reference_however_it_is_split(split: str, open_tiny: Open, numpy_model: Open) -> None:
    # float32 sums of 64 products against float64: 3e-7 is measured, and of 40 tokens 1e-6 of their largest value. The
    # last layer's FFN is one of the rows and every token one of its columns, also where llama.cpp needs the last
    # token's logits only.
    name, size, options = SPLITS[split]
    actual = collect(open_tiny(name, **options), tokens(40), size)
    expected = ReferenceRun(numpy_model(name)).eval(tokens(40))
    gelu = 100 if name == "gptneox-parallel" else 1  # a table in F16
    for figure in (mean_similarity, norm_ratio, lambda trace: trace.dot / np.sqrt(trace.u_sq * trace.v_sq)):
        np.testing.assert_allclose(figure(actual), figure(expected), rtol=0, atol=2e-6 * gelu)
    for part in ("sum_u", "sum_v", "layer_dot"):
        np.testing.assert_allclose(getattr(actual, part), getattr(expected, part), rtol=1e-5 * gelu, atol=1e-4 * gelu)
    assert np.abs(expected.sum_u).max() > 10


@pytest.mark.parametrize("name", SKIPPABLE)
@pytest.mark.parametrize("size", [1, 8, 9])
def test_every_architecture_is_observed_on_its_own_stream(size: int, name: str, tiny: Tiny, open_tiny: Open) -> None:
    # The embedding is read from the file. Gemma's models scale it by sqrt(n_embd), and GPT-2 adds that of the position.
    # The FFN of layer 1 has a zero output projection: u = v to the last bit, so dot = |u|^2 = |v|^2.
    llm, n_layer = open_tiny(name, zero=[(1, "ffn")]), SKIPPABLE[name].n_layer
    tables = {t.name: np.asarray(t.data, np.float64) for t in GGUFReader(tiny(name)).tensors if "_embd." in t.name}
    first = tables["token_embd.weight"][tokens(36)] * np.sqrt(N_EMBD if name.startswith("gemma") else 1)
    first += tables["position_embd.weight"][:36] if name == "gpt2" else 0
    trace = collect(llm, tokens(36), size)
    np.testing.assert_allclose(trace.u_sq[0, 0], (first**2).sum(axis=-1), rtol=1e-5)
    u_sq, v_sq = (values.reshape(2 * n_layer, -1) for values in (trace.u_sq, trace.v_sq))
    np.testing.assert_allclose(v_sq[:-1], u_sq[1:], rtol=1e-5)
    for values in (trace.dot, trace.v_sq):
        np.testing.assert_allclose(values[1, 1], trace.u_sq[1, 1], rtol=1e-5)
    assert (np.abs(trace.dot[1, 0] / trace.u_sq[1, 0] - 1) > 1e-3).any(), "the attention beside it does add"
    # Up to 8 tokens the host reduces what it copies: each stream once, that after llama.cpp's gather of the outputs
    # too. Beyond that the device does.
    assert (llm.counters.nodes <= llm.counters.nodes_full) == (size <= 8)
    n_streams = llm.counters.statistics_bytes / (36 * 4 * N_EMBD)
    assert size > 8 or n_streams in (2 * n_layer + 1, 2 * n_layer + 2)


@pytest.mark.parametrize("name", SKIPPABLE)
def test_collecting_statistics_changes_no_bit_of_the_logits(name: str, tiny: Tiny, open_tiny: Open) -> None:
    pieces = [tokens(40)[:36], *([token] for token in tokens(40)[36:])]
    (expected,) = run_stock([Job(str(tiny(name)), pieces, OPTIONS)])
    llm = open_tiny(name)
    for asked in ({}, {"activations": True}):
        seen: list[int] = []
        with llm.collect_statistics(lambda batch, seen=seen: seen.extend(batch.positions), keep_logits=True, **asked):
            np.testing.assert_array_equal(eval_logits(llm, pieces), expected)
        assert seen == list(range(40))
    np.testing.assert_array_equal(eval_logits(llm, pieces), expected)


@pytest.mark.parametrize("options", [{}, {"n_batch": 7}, {"logits_all": False}], ids=str)
def test_in_the_bulk_what_runs_is_observed(options: dict[str, Any], open_tiny: Open, reference: ReferenceModel) -> None:
    # Skipped in layers 0 and 1 and in the last one, whose other sublayer runs for nobody but who observes.
    llm, none = open_tiny(**options), SkipSet.none(3)
    bulk = SkipPlan.manual(3, attention=[0, 2], ffn=[1], scale=0.9).prefill
    llm.set_plan(SkipPlan(none, none, bulk=Bulk(bulk, head=4, tail=8)))
    actual, run = collect(llm, tokens(40)), ReferenceRun(reference)
    head = run.eval(tokens(40)[:4])
    middle = run.eval(tokens(40)[4:32], bulk.skip, bulk.scale, keeps_kv=True)
    expected = Trace.concatenate([head, middle, run.eval(tokens(40)[32:])])
    for name in ("dot", "u_sq", "v_sq"):
        values = getattr(expected, name)
        values[bulk.skip, 4:32] = np.nan
        np.testing.assert_allclose(getattr(actual, name), values, rtol=1e-5, atol=1e-4)
    assert np.isnan(actual.layer_dot).any(axis=0).tolist() == [4 <= position < 32 for position in range(40)]
    for sums in (actual.sum_u, actual.sum_v):
        np.testing.assert_array_equal(np.isnan(sums), np.broadcast_to(bulk.skip[..., None], sums.shape))


@pytest.mark.parametrize("options", [{}, {"n_batch": 32, "n_ubatch": 8}], ids=str)
def test_with_logits_output_tokens_are_observed(
    options: dict[str, Any], open_tiny: Open, reference: ReferenceModel
) -> None:
    # Without logits_all, llama.cpp runs the last FFN for the prompt's last token only. In ubatches of 8 none of the
    # first two has an output: reductions of no rows must not be computed, as ggml divides by their number.
    llm, seen = open_tiny(logits_all=False, **options), []
    with llm.collect_statistics(seen.append, keep_logits=True):
        llm.eval(tokens(20))
    assert [len(batch.positions) for batch in seen] == ([8, 8, 4] if options else [20])
    for batch in seen[:-1]:
        assert np.isnan(batch.sum_u[2, 1]).all() and np.isnan(batch.sum_v[2, 1]).all()
    dot, layer_dot = (np.concatenate([getattr(each, name) for each in seen], axis=-1) for name in ("dot", "layer_dot"))
    observed, expected = ~np.isnan(dot), ReferenceRun(reference).eval(tokens(20))
    assert observed[:2].all()
    assert not observed[2, 1, :-1].any() and observed[2, 1, -1]
    np.testing.assert_allclose(dot[observed], expected.dot[observed], rtol=1e-4, atol=1e-4)
    assert np.isnan(layer_dot[2]).tolist() == [True] * 19 + [False]
    np.testing.assert_allclose(layer_dot[2, -1], expected.layer_dot[2, -1], rtol=1e-4)
    np.testing.assert_allclose(seen[-1].sum_u[2, 1], expected.u[2, 1, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.model
def test_similarity_and_norm_ratio_of_smollm2_equal_a_numpy_pass(smollm2_f32_path: Path, open_model: Open) -> None:
    # Measured: 6e-8 for the similarity, 2e-6 to 8e-6 for ratios of up to 21 (the first token's norm is huge).
    prompt = [1, *np.random.default_rng(0).integers(100, 49000, size=299).tolist()]
    expected = ReferenceRun(ReferenceModel(smollm2_f32_path, np.float32)).eval(prompt)
    actual = collect(open_model(smollm2_f32_path, n_ctx=512, n_ubatch=128, n_threads_batch=2), prompt, 256)
    np.testing.assert_allclose(mean_similarity(actual), mean_similarity(expected), rtol=0, atol=1e-5)
    np.testing.assert_allclose(norm_ratio(actual), norm_ratio(expected), rtol=0, atol=1e-4)
