"""Models in several files, and KV in fewer bits: without a plan stock's logits, with one those of the plain model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles.reference import ReferenceModel, ReferenceRun, relative_error
from oracles.stock import EXACT, Job, eval_logits, run_stock
from oracles.tiny_families import N_LAYER
from oracles.tiny_models import write_model

from adaskip_cpp import SkipPlan

Tiny = Callable[..., Path]
Tokens = Callable[..., list[int]]
Open = Callable[..., Any]
PLAN = SkipPlan.manual(N_LAYER, attention=[1], ffn=[2], scale=0.9)
Q8_0 = 8


def pieces(tokens: list[int]) -> list[list[int]]:
    return [tokens[:36], *([token] for token in tokens[36:])]


# -- a model in several files ----------------------------------------------------------------------------------------


def test_a_model_in_several_files_computes_what_it_computes_in_one(
    tiny: Tiny, tokens: Tokens, tmp_path: Path, open_model: Open
) -> None:
    first = write_model(tmp_path / "split.gguf", split=10)
    assert len(list(tmp_path.glob("split-*.gguf"))) == 3
    options = {"n_ctx": 128, "logits_all": True, **EXACT}
    (expected,) = run_stock([Job(str(first), pieces(tokens(40)), options)])
    split, whole = open_model(first), open_model(tiny())
    np.testing.assert_array_equal(eval_logits(split, pieces(tokens(40))), expected)
    assert split.sublayers == whole.sublayers
    for llm in (split, whole):
        llm.set_plan(PLAN)
    np.testing.assert_array_equal(*(eval_logits(llm, pieces(tokens(40))) for llm in (split, whole)))


def test_a_model_in_several_files_is_opened_with_a_plan(tokens: Tokens, tmp_path: Path, open_model: Open) -> None:
    first = write_model(tmp_path / "split.gguf", split=10)
    llm = open_model(first, plan=PLAN)
    assert llm.elided_kv == (1,)
    plain = ReferenceModel(write_model(tmp_path / "whole.gguf"))
    expected = ReferenceRun(plain).eval(tokens(40), PLAN.prefill.skip, PLAN.prefill.scale).logits
    assert relative_error(eval_logits(llm, pieces(tokens(40))), expected) < 1e-5


# -- KV in Q8_0 ------------------------------------------------------------------------------------------------------

# qwen3's heads of 32 fill a block of Q8_0.
QUANTISED = {"type_k": Q8_0, "type_v": Q8_0, "flash_attn": True}


def test_quantised_kv_without_a_plan_is_bit_identical_to_stock(tiny: Tiny, tokens: Tokens, open_model: Open) -> None:
    options = {"n_ctx": 128, "logits_all": True, **EXACT, **QUANTISED}
    (expected,) = run_stock([Job(str(tiny("qwen3")), pieces(tokens(40)), options)])
    llm = open_model(tiny("qwen3"), **QUANTISED)
    np.testing.assert_array_equal(eval_logits(llm, pieces(tokens(40))), expected)
    with llm.collect_statistics(lambda batch: None, keep_logits=True):
        np.testing.assert_array_equal(eval_logits(llm, pieces(tokens(40))), expected)


@pytest.mark.parametrize(
    "plan",
    [
        SkipPlan.manual(N_LAYER, attention=[1], ffn=[0, 2], scale=0.9),
        SkipPlan.manual(N_LAYER, attention=[0, 2]),
        SkipPlan.manual(N_LAYER, ffn=[0, 1, 2], scale=1.1),
    ],
    ids=["both kinds", "attentions", "FFNs"],
)
def test_a_plan_over_quantised_kv_is_near_the_same_plan_over_f32(
    plan: SkipPlan, tiny: Tiny, tokens: Tokens, open_model: Open
) -> None:
    # 0.005 to 0.015 is measured, the rounding of K and V to 8 bits; another layer's KV gives more than 0.1.
    plain = open_model(tiny("qwen3"))
    plain.set_plan(plan)
    llm = open_model(tiny("qwen3"), plan=plan, **QUANTISED)
    actual, expected = (eval_logits(each, pieces(tokens(40))) for each in (llm, plain))
    assert relative_error(actual, expected) < 0.03
