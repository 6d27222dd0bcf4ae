"""Embeddings: under a plan as NumPy's, of encoders as stock's, on a model that is zero where a sublayer is skipped."""

from collections.abc import Callable
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from oracles.fixtures import Open, Tiny
from oracles.reference import ReferenceRun, relative_error
from oracles.skip_sets import arguments
from oracles.stock import EXACT, Job, run_stock
from oracles.tiny_families import ENCODERS, N_CTX_TRAIN, N_LAYER
from oracles.tiny_models import write_model

from adaskip_cpp import SkipPlan
from adaskip_cpp.errors import NotSkippableError, RequestError
from adaskip_cpp.model.skip_set import SkipSet

TEXTS = ["the other of the", "in an", "on the other"]
SUBLAYERS = [(layer, kind) for layer in range(N_LAYER) for kind in ("attention", "ffn")]


POOLINGS: dict[str, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {
    "mean": (llama_cpp.LLAMA_POOLING_TYPE_MEAN, lambda rows: rows.mean(axis=0)),
    "first": (llama_cpp.LLAMA_POOLING_TYPE_CLS, lambda rows: rows[0]),
    "last": (llama_cpp.LLAMA_POOLING_TYPE_LAST, lambda rows: rows[-1]),
    "none": (llama_cpp.LLAMA_POOLING_TYPE_NONE, lambda rows: rows),
}
PLANS = {
    "no plan": None,
    "attention and FFNs": SkipPlan.manual(N_LAYER, attention=[1], ffn=[0, 2], scale=0.9),
    "whole layers": SkipPlan.manual(N_LAYER, attention=[0, 2], ffn=[0, 2]),
}


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("plan", PLANS)
def test_texts_are_embedded_under_the_prefill_set(plan: str, pooling: str, open_tiny: Open, numpy_model: Open) -> None:
    # Float32 against float64: 1e-6 is measured. All texts are in one batch, as sequences of their own; but alone where
    # nothing is pooled, since llama-cpp-python then mixes up the texts of a batch.
    kind, pool = POOLINGS[pooling]
    llm = open_tiny(embedding=True, pooling_type=kind, plan=PLANS[plan])
    chosen = SkipSet.none(N_LAYER) if llm.plan is None else llm.plan.prefill
    assert llm.elided_kv == chosen.attention
    embedded = [llm.embed(text) for text in TEXTS] if pooling == "none" else llm.embed(TEXTS)
    for text, actual in zip(TEXTS, embedded, strict=True):
        trace = ReferenceRun(numpy_model()).eval(llm.tokenize(text.encode()), *arguments(chosen))
        assert trace.v is not None
        expected = pool(numpy_model().norm(trace.v[-1, 1], "output_norm"))
        assert relative_error(np.atleast_2d(actual), np.atleast_2d(expected)) < 5e-6


@pytest.mark.parametrize("name", [*ENCODERS, "llama", "gemma3", "gemma3n", "gemma4-per-layer"])
def test_without_a_plan_embeddings_are_stocks(name: str, tiny: Tiny, open_tiny: Open) -> None:
    poolings = [] if name in ENCODERS else [POOLINGS["none"][0], POOLINGS["mean"][0]]
    for options in [{"pooling_type": each} for each in poolings] or [{}]:
        texts = TEXTS[:1] if poolings and options["pooling_type"] == poolings[0] else TEXTS
        (expected,) = run_stock([Job(str(tiny(name)), [], {**EXACT, "embedding": True, **options}, texts)])
        assert np.isfinite(expected).all() and len({row.tobytes() for row in expected}) == len(expected)
        llm = open_tiny(name, logits_all=False, embedding=True, **options)
        np.testing.assert_array_equal(llm.embed(texts), expected)


def test_each_sublayer_of_an_encoder_skipped_equals_stock_on_the_zeroed_model(tiny: Tiny, open_tiny: Open) -> None:
    # x + 0 is x: measured is no difference at all.
    jobs = [Job(str(tiny("bert", zero=[at])), [], {**EXACT, "embedding": True}, TEXTS) for at in SUBLAYERS]
    llm = open_tiny("bert", embedding=True)
    assert [(each.layer, each.kind, each.skippable) for each in llm.sublayers] == [(*at, True) for at in SUBLAYERS]
    whole = llm.embed(TEXTS)
    for (layer, kind), expected in zip(SUBLAYERS, run_stock(jobs), strict=True):
        llm.set_plan(SkipPlan.manual(N_LAYER, **{kind: [layer]}))
        actual = llm.embed(TEXTS)
        assert relative_error(actual, expected) < 1e-6 and relative_error(actual, whole) > 0.1
    llm.set_plan(None)
    np.testing.assert_array_equal(llm.embed(TEXTS), whole)


def test_an_encoder_whose_sublayers_are_not_found_says_so_and_still_runs(open_tiny: Open) -> None:
    llm = open_tiny("t5encoder", embedding=True)
    whole = llm.embed(TEXTS)
    assert all(not each.skippable and "was found on the residual stream" in each.reason for each in llm.sublayers)
    with pytest.raises(NotSkippableError, match="leave it out of the plan"):
        llm.set_plan(SkipPlan.manual(N_LAYER, ffn=[1]))
    np.testing.assert_array_equal(llm.embed(TEXTS), whole)


def test_a_text_beyond_the_learned_positions_is_cut(open_tiny: Open) -> None:
    """ggml ends the process at a position without an embedding. Stock cuts texts at n_batch tokens."""
    text, size = "the other " * 400, N_CTX_TRAIN + 256
    longer = open_tiny("bert", embedding=True, n_ctx=size, n_batch=size, n_ubatch=size)
    same = open_tiny("bert", embedding=True, n_ctx=N_CTX_TRAIN, n_batch=N_CTX_TRAIN, n_ubatch=N_CTX_TRAIN)
    assert len(longer.tokenize(text.encode())) > N_CTX_TRAIN
    np.testing.assert_array_equal(longer.embed(text), same.embed(text))


def test_a_text_without_tokens_is_not_embedded(open_model: Open, tmp_path: Path) -> None:
    """Its vocabulary begins texts with no token. Stock writes out of bounds for it."""
    llm = open_model(write_model(tmp_path / "bytes.gguf", pre="gpt-2"), embedding=True)
    with pytest.raises(RequestError, match="a text to embed is empty"):
        llm.embed(["the", ""])
