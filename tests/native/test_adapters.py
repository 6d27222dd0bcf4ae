"""LoRA adapters and control vectors beside a plan: what stock computes without one, what the reference does with one.

For the reference the adapter is merged into the weights, and the control vector added behind each layer.
"""

import ctypes
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from gguf import GGUFReader
from oracles.observed import collect
from oracles.reference import ReferenceModel, ReferenceRun, mean_similarity, norm_ratio, relative_error
from oracles.sequence_oracle import Cells, History
from oracles.stock import EXACT, Job, eval_logits, run_stock
from oracles.tiny_families import N_EMBD, N_LAYER
from oracles.tiny_models import write_lora

from adaskip_cpp import SkipPlan
from adaskip_cpp.model.plan import Bulk
from adaskip_cpp.model.skip_set import SkipSet

Tiny = Callable[..., Path]
Tokens = Callable[..., list[int]]
Open = Callable[..., Any]
RANK, ALPHA, SCALE = 4, 2.0, 1.5
OPTIONS = {"n_ctx": 128, "logits_all": True, **EXACT}
PIECES = (0, 35, 36, 37, 40)  # a prompt, two tokens alone, three more
TOLERANCE = 1e-5  # float32 against float64: 2e-6 is measured


def pieces(tokens: list[int]) -> list[list[int]]:
    return [tokens[start:end] for start, end in pairwise(PIECES)]


def plan() -> SkipPlan:
    """Attention of layer 1 and FFN of layer 2, with a scale, a vector and a linear map."""
    rng = np.random.default_rng(3)
    skip = np.array([[False, False], [True, False], [False, True]])
    chosen = SkipSet(
        skip,
        rng.uniform(0.8, 1.2, skip.shape),
        rng.normal(0, 0.2, (*skip.shape, N_EMBD)).astype(np.float32),
        rng.normal(0, 0.1, (*skip.shape, 2, N_EMBD)).astype(np.float32),
        rng.normal(0, 0.3, (*skip.shape, N_EMBD, 2)).astype(np.float32),
    )
    return SkipPlan(chosen, chosen)


def bulk(model: ReferenceModel, tokens: list[int]) -> tuple[SkipPlan, np.ndarray]:
    """The same sublayers skipped in the bulk alone, and the reference's logits of this prompt."""
    none = SkipSet.none(N_LAYER)
    of, history = SkipPlan(none, none, bulk=Bulk(plan().prefill, head=2, tail=6)), History(Cells(model), n_ubatch=512)
    history.set_plan(of)
    history.eval(tokens)
    return of, np.concatenate([history.trace(index).logits for index in range(len(tokens))])


def under(plan: SkipPlan, model: ReferenceModel, tokens: list[int]) -> np.ndarray:
    """The reference's logits with everything under the plan's prefill set."""
    each = plan.prefill
    return np.asarray(ReferenceRun(model).eval(tokens, each.skip, each.scale, each.bias, each.down, each.up).logits)


# -- LoRA ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_lora(tmp_path / "lora.gguf", rank=RANK, alpha=ALPHA)


@pytest.fixture
def merged(tiny: Tiny, adapter: Path) -> ReferenceModel:
    """The model with the adapter merged into its weights: W + scale * alpha / rank * B A."""
    model, matrices = ReferenceModel(tiny()), {tensor.name: tensor.data for tensor in GGUFReader(adapter).tensors}
    for name in {name.rpartition(".")[0] for name in matrices}:
        b, a = (matrices[f"{name}.lora_{each}"].astype(np.float64) for each in "ba")
        model.weights[name] += SCALE * ALPHA / RANK * b @ a
    return model


def test_an_adapter_without_a_plan_is_bit_identical_to_stock(
    tiny: Tiny, tokens: Tokens, adapter: Path, merged: ReferenceModel, open_model: Open
) -> None:
    options = {**OPTIONS, "lora_path": str(adapter), "lora_scale": SCALE}
    (expected,) = run_stock([Job(str(tiny()), pieces(tokens(40)), options)])
    assert relative_error(expected, ReferenceRun(merged).eval(tokens(40)).logits) < TOLERANCE
    llm = open_model(tiny(), **options)
    np.testing.assert_array_equal(eval_logits(llm, pieces(tokens(40))), expected)
    with llm.collect_statistics(lambda batch: None, keep_logits=True):
        np.testing.assert_array_equal(eval_logits(llm, pieces(tokens(40))), expected)


def test_an_adapter_with_a_plan_equals_the_reference_with_merged_weights(
    tiny: Tiny, tokens: Tokens, adapter: Path, merged: ReferenceModel, open_model: Open
) -> None:
    llm = open_model(tiny(), lora_path=str(adapter), lora_scale=SCALE)
    llm.set_plan(plan())
    assert relative_error(eval_logits(llm, pieces(tokens(40))), under(plan(), merged, tokens(40))) < TOLERANCE


def test_k_and_v_that_a_bulk_keeps_are_those_of_the_adapted_model(
    tiny: Tiny, tokens: Tokens, adapter: Path, merged: ReferenceModel, open_model: Open
) -> None:
    of, expected = bulk(merged, tokens(40))
    llm = open_model(tiny(), lora_path=str(adapter), lora_scale=SCALE, plan=of)
    assert relative_error(eval_logits(llm, [tokens(40)]), expected) < TOLERANCE


def test_every_sublayer_with_an_adapter_can_be_skipped_alone(
    tiny: Tiny, tokens: Tokens, adapter: Path, merged: ReferenceModel, open_model: Open
) -> None:
    llm = open_model(tiny(), lora_path=str(adapter), lora_scale=SCALE)
    assert [(each.layer, each.kind, each.skippable) for each in llm.sublayers] == [
        (layer, kind, True) for layer in range(N_LAYER) for kind in ("attention", "ffn")
    ]
    for layer in range(N_LAYER):
        for alone in (SkipPlan.manual(N_LAYER, attention=[layer]), SkipPlan.manual(N_LAYER, ffn=[layer])):
            llm.set_plan(alone)
            assert relative_error(eval_logits(llm, [tokens(20)]), under(alone, merged, tokens(20))) < TOLERANCE


def test_statistics_are_those_of_the_adapted_model(
    tiny: Tiny, tokens: Tokens, adapter: Path, merged: ReferenceModel, open_model: Open
) -> None:
    actual = collect(open_model(tiny(), lora_path=str(adapter), lora_scale=SCALE), tokens(40), 7)
    expected = ReferenceRun(merged).eval(tokens(40))
    np.testing.assert_allclose(mean_similarity(actual), mean_similarity(expected), rtol=0, atol=2e-6)
    np.testing.assert_allclose(norm_ratio(actual), norm_ratio(expected), rtol=0, atol=5e-6)


# -- control vectors -------------------------------------------------------------------------------------------------


@pytest.fixture
def steered(tiny: Tiny) -> ReferenceModel:
    """A vector behind each layer but the first, which llama.cpp has none for."""
    model = ReferenceModel(tiny())
    model.control = np.random.default_rng(7).normal(0, 0.5, model.control.shape).astype(np.float32)
    model.control[0] = 0
    return model


def steer(llm: Any, model: ReferenceModel | None) -> None:
    """Set the control vector of all layers, or clear it."""
    data, n = None, 0
    if model is not None:
        values = np.ascontiguousarray(model.control[1:], np.float32)
        data, n = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), values.size
    assert llama_cpp.llama_set_adapter_cvec(llm.ctx, data, n, N_EMBD, 1, N_LAYER - 1) == 0


def test_a_control_vector_with_and_without_a_plan_equals_the_reference(
    tiny: Tiny, tokens: Tokens, steered: ReferenceModel, open_model: Open
) -> None:
    llm = open_model(tiny())
    steer(llm, steered)
    expected = ReferenceRun(steered).eval(tokens(40)).logits
    assert relative_error(eval_logits(llm, pieces(tokens(40))), expected) < TOLERANCE
    llm.set_plan(plan())
    assert relative_error(eval_logits(llm, pieces(tokens(40))), under(plan(), steered, tokens(40))) < TOLERANCE


def test_a_control_vector_goes_with_a_bulk(
    tiny: Tiny, tokens: Tokens, steered: ReferenceModel, open_model: Open
) -> None:
    of, expected = bulk(steered, tokens(40))
    llm = open_model(tiny(), plan=of)
    steer(llm, steered)
    assert relative_error(eval_logits(llm, [tokens(40)]), expected) < TOLERANCE


def test_every_sublayer_before_a_control_vector_can_be_skipped_alone(
    tiny: Tiny, tokens: Tokens, steered: ReferenceModel, open_model: Open
) -> None:
    llm = open_model(tiny())
    steer(llm, steered)
    for layer in range(N_LAYER):
        for alone in (SkipPlan.manual(N_LAYER, attention=[layer]), SkipPlan.manual(N_LAYER, ffn=[layer])):
            llm.set_plan(alone)
            assert relative_error(eval_logits(llm, pieces(tokens(40))), under(alone, steered, tokens(40))) < TOLERANCE


def test_statistics_beside_a_control_vector_are_those_of_the_sublayers_alone(
    tiny: Tiny, tokens: Tokens, steered: ReferenceModel, open_model: Open
) -> None:
    # What the vector adds belongs to no sublayer: it comes behind the FFN's output and before the next input.
    llm = open_model(tiny())
    steer(llm, steered)
    expected = ReferenceRun(steered).eval(tokens(40))
    for size in (40, 1):
        actual = collect(llm, tokens(40), size)
        np.testing.assert_allclose(mean_similarity(actual), mean_similarity(expected), rtol=0, atol=2e-6)
        np.testing.assert_allclose(norm_ratio(actual), norm_ratio(expected), rtol=0, atol=5e-6)


def test_a_control_vector_that_is_cleared_leaves_the_logits_of_stock(
    tiny: Tiny, tokens: Tokens, steered: ReferenceModel, open_model: Open
) -> None:
    (expected,) = run_stock([Job(str(tiny()), pieces(tokens(40)), OPTIONS)])
    llm = open_model(tiny())
    steer(llm, steered)
    llm.set_plan(plan())
    eval_logits(llm, pieces(tokens(40)))
    steer(llm, None)
    llm.set_plan(None)
    np.testing.assert_array_equal(eval_logits(llm, pieces(tokens(40))), expected)
