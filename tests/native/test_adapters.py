"""LoRA adapters and control vectors beside a plan: what stock computes without one, what the reference does with one.

For the reference the adapter is merged into the weights, and the control vector added after each layer.
"""

import ctypes
from itertools import pairwise
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from gguf import GGUFReader
from oracles.expected import error, error_under, history_of
from oracles.fixtures import Open, Tiny
from oracles.observed import collect
from oracles.reference import ReferenceModel, ReferenceRun, mean_similarity, norm_ratio, relative_error
from oracles.skip_sets import same, skip_set
from oracles.stock import OPTIONS, Job, eval_logits, run_stock
from oracles.tiny_families import N_EMBD, N_LAYER, tokens
from oracles.tiny_models import write_lora

from adaskip_cpp import SkipPlan
from adaskip_cpp.model.plan import Bulk
from adaskip_cpp.model.skip_set import SkipSet

RANK, ALPHA, SCALE = 4, 2.0, 1.5
PIECES = (0, 35, 36, 37, 40)  # a prompt, two tokens alone, three more
TOLERANCE = 1e-5  # float32 against float64: 2e-6 is measured
CHOSEN = skip_set((1,), (2,), 1.1, seed=3)
ALONE = [skip_set(**{kind: (layer,)}) for layer in range(N_LAYER) for kind in ("attention", "ffn")]


def pieces() -> list[list[int]]:
    return [tokens(40)[start:end] for start, end in pairwise(PIECES)]


Changed = tuple[Any, ReferenceModel]
"""A model with an adapter or a control vector, in llama.cpp and in NumPy."""


@pytest.fixture
def lora(tiny: Tiny, tmp_path: Path, open_tiny: Open) -> Changed:
    """An adapter, merged into the weights for NumPy: W + scale * alpha / rank * B A."""
    path = write_lora(tmp_path / "lora.gguf", rank=RANK, alpha=ALPHA)
    model, matrices = ReferenceModel(tiny()), {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    for name in {name.rpartition(".")[0] for name in matrices}:
        b, a = (matrices[f"{name}.lora_{each}"].astype(np.float64) for each in "ba")
        model.weights[name] += SCALE * ALPHA / RANK * b @ a
    return open_tiny(lora_path=str(path), lora_scale=SCALE), model


@pytest.fixture
def control_vector(tiny: Tiny, open_tiny: Open) -> Changed:
    """A vector after each layer but the first, which llama.cpp has none for."""
    model = ReferenceModel(tiny())
    model.control = np.random.default_rng(7).normal(0, 0.5, model.control.shape).astype(np.float32)
    model.control[0] = 0
    llm, values = open_tiny(), np.ascontiguousarray(model.control[1:])
    data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    assert llama_cpp.llama_set_adapter_cvec(llm.ctx, data, values.size, N_EMBD, 1, N_LAYER - 1) == 0
    return llm, model


@pytest.fixture(params=["lora", "control_vector"])
def changed(request: pytest.FixtureRequest) -> Changed:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


def test_an_adapter_without_a_plan_is_bit_identical_to_stock(lora: Changed, tiny: Tiny) -> None:
    llm, model = lora
    options = {**OPTIONS, "lora_path": llm.lora_path, "lora_scale": SCALE}
    (expected,) = run_stock([Job(str(tiny()), pieces(), options)])
    assert relative_error(expected, ReferenceRun(model).eval(tokens(40)).logits) < TOLERANCE
    np.testing.assert_array_equal(eval_logits(llm, pieces()), expected)
    with llm.collect_statistics(lambda batch: None, keep_logits=True):
        np.testing.assert_array_equal(eval_logits(llm, pieces()), expected)


def test_the_whole_model_each_sublayer_skipped_alone_and_a_bulk_are_the_references(changed: Changed) -> None:
    (llm, model), none = changed, SkipSet.none(N_LAYER)
    for chosen in (None, CHOSEN, *ALONE):
        llm.set_plan(None if chosen is None else same(chosen))
        assert error_under(llm, model, chosen, pieces()) < TOLERANCE
    plan = SkipPlan(none, none, bulk=Bulk(CHOSEN, head=2, tail=6))
    history = history_of(model, plan)
    llm.set_plan(plan)
    llm.reset()
    for each in (llm, history):
        each.eval(tokens(40))
    assert error(llm, history) < TOLERANCE


def test_statistics_are_those_of_the_changed_models_sublayers(changed: Changed) -> None:
    # What a control vector adds belongs to none: it comes after the FFN's output and before the next input.
    llm, model = changed
    expected = ReferenceRun(model).eval(tokens(40))
    for size in (40, 7, 1):
        actual = collect(llm, tokens(40), size)
        np.testing.assert_allclose(mean_similarity(actual), mean_similarity(expected), rtol=0, atol=2e-6)
        np.testing.assert_allclose(norm_ratio(actual), norm_ratio(expected), rtol=0, atol=5e-6)
