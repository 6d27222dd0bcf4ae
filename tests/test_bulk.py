"""The bulk of a prompt: skipped, with K and V kept. Against the NumPy reference."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from reference import ReferenceModel, ReferenceRun, relative_error
from tiny_families import N_EMBD

from adaskip_cpp import SkipPlan
from adaskip_cpp.model.skip_set import SkipSet


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_each_sublayer_skipped_in_the_bulk_is_the_reference(
    family: str, tiny: Callable[..., Path], tokens: Callable[..., list[int]], open_model: Callable[..., Any]
) -> None:
    path = tiny(family)
    model = ReferenceModel(path)
    rng = np.random.default_rng(0)
    llm = open_model(path, n_batch=16, logits_all=False)
    none = SkipSet.none(model.n_layer)
    for index in range(2 * model.n_layer):
        skip = np.zeros((model.n_layer, 2), bool)
        skip.flat[index] = True
        shape = skip.shape
        bulk = SkipSet(
            skip,
            rng.uniform(0.7, 1.3, shape),
            None,
            rng.normal(0, 0.1, (*shape, 2, N_EMBD)).astype(np.float32),
            rng.normal(0, 0.5, (*shape, N_EMBD, 2)).astype(np.float32),
        )
        llm.set_plan(SkipPlan(none, none, bulk=bulk, head=4, tail=8))
        llm.reset()
        llm.eval(tokens(50))
        run = ReferenceRun(model)
        run.eval(tokens(50)[:4])
        run.eval(tokens(50)[4:42], bulk.skip, bulk.scale, None, bulk.down, bulk.up, keeps_kv=True)
        trace = run.eval(tokens(50)[42:])

        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),))
        assert relative_error(logits, trace.logits[-1]) < 1e-4


@pytest.mark.parametrize("logits_all", [False, True])
def test_a_bulk_can_be_evaluated_in_pieces(
    logits_all: bool, tiny: Callable[..., Path], tokens: Callable[..., list[int]], open_model: Callable[..., Any]
) -> None:
    """All of each piece is bulk, and no logits are computed for it; what follows is the reference's."""
    model = ReferenceModel(tiny())
    llm = open_model(tiny(), n_batch=16, logits_all=logits_all)
    prompt, none = tokens(50), SkipSet.none(model.n_layer)
    bulk = SkipPlan.manual(model.n_layer, [0, 2], [1], scale=0.9).prefill
    llm.set_plan(SkipPlan(none, none, bulk=bulk, head=4, tail=8))
    run = ReferenceRun(model)
    llm.scores[:] = 0
    for start, end in ((0, 20), (20, 21), (21, 45)):
        llm.eval_bulk(prompt[start:end])
        run.eval(prompt[start:end], bulk.skip, bulk.scale, keeps_kv=True)
        assert llm.n_tokens == end and llm.counters.nodes < llm.counters.nodes_full
    assert not np.any(llm.scores)
    llm.eval(prompt[45:])
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),))
    assert relative_error(logits, run.eval(prompt[45:]).logits[-1]) < 1e-4


@pytest.mark.parametrize("plan", [None, SkipPlan.manual(3, [1], [2], scale=0.9)])
def test_a_bulk_without_a_bulk_set_is_prefill(
    plan: SkipPlan | None,
    tiny: Callable[..., Path],
    tokens: Callable[..., list[int]],
    open_model: Callable[..., Any],
) -> None:
    llm, states = open_model(tiny(), n_batch=16, logits_all=False), []
    for evaluate in (llm.eval, llm.eval_bulk):
        llm.set_plan(plan)
        llm.reset()
        evaluate(tokens(32))
        llm.eval(tokens(40)[32:])
        states.append(bytes(llm.save_state().llama_state))
    assert states[0] == states[1]
