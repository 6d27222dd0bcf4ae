"""Models in several files, and KV in fewer bits: without a plan stock's logits, with one those of the plain model."""

from pathlib import Path

import numpy as np
import pytest
from oracles.fixtures import Open, Tiny
from oracles.reference import relative_error
from oracles.stock import EXACT, Job, eval_logits, run_stock
from oracles.tiny_families import N_LAYER, tokens
from oracles.tiny_models import write_model

from adaskip_cpp import SkipPlan

PLAN = SkipPlan.manual(N_LAYER, attention=[1], ffn=[2], scale=0.9)
Q8_0 = 8


PIECES = [tokens(40)[:36], *([token] for token in tokens(40)[36:])]


# -- a model in several files ----------------------------------------------------------------------------------------


def test_a_model_in_several_files_computes_what_it_computes_in_one(
    tmp_path: Path, open_model: Open, open_tiny: Open
) -> None:
    first = write_model(tmp_path / "split.gguf", split=10)
    assert len(list(tmp_path.glob("split-*.gguf"))) == 3
    options = {"n_ctx": 128, "logits_all": True, **EXACT}
    (expected,) = run_stock([Job(str(first), PIECES, options)])
    split, whole = open_model(first), open_tiny()
    np.testing.assert_array_equal(eval_logits(split, PIECES), expected)
    assert split.sublayers == whole.sublayers
    for llm in (split, whole):
        llm.set_plan(PLAN)
    np.testing.assert_array_equal(*(eval_logits(llm, PIECES) for llm in (split, whole)))


# -- KV in Q8_0 ------------------------------------------------------------------------------------------------------

# qwen3's heads of 32 fill a block of Q8_0.
QUANTISED = {"type_k": Q8_0, "type_v": Q8_0, "flash_attn": True}


def test_quantised_kv_without_a_plan_is_bit_identical_to_stock(tiny: Tiny, open_tiny: Open) -> None:
    options = {"n_ctx": 128, "logits_all": True, **EXACT, **QUANTISED}
    (expected,) = run_stock([Job(str(tiny("qwen3")), PIECES, options)])
    llm = open_tiny("qwen3", **QUANTISED)
    np.testing.assert_array_equal(eval_logits(llm, PIECES), expected)
    with llm.collect_statistics(lambda batch: None, keep_logits=True):
        np.testing.assert_array_equal(eval_logits(llm, PIECES), expected)


@pytest.mark.parametrize(
    "plan",
    [
        SkipPlan.manual(N_LAYER, attention=[1], ffn=[0, 2], scale=0.9),
        SkipPlan.manual(N_LAYER, attention=[0, 2]),
        SkipPlan.manual(N_LAYER, ffn=[0, 1, 2], scale=1.1),
    ],
    ids=["both kinds", "attentions", "FFNs"],
)
def test_a_plan_over_quantised_kv_is_near_the_same_plan_over_f32(plan: SkipPlan, open_tiny: Open) -> None:
    # 0.005 to 0.015 is measured, the rounding of K and V to 8 bits; another layer's KV gives more than 0.1.
    plain = open_tiny("qwen3", under=plan)
    llm = open_tiny("qwen3", plan=plan, **QUANTISED)
    actual, expected = (eval_logits(each, PIECES) for each in (llm, plain))
    assert relative_error(actual, expected) < 0.03
