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
