"""adaskip_cpp.model.cost_model: predicted times, by hand, and the part of a profile's file."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from oracles.changed_json import LOST, put
from oracles.costs import SETTINGS, cost_model
from oracles.skip_sets import filled

from adaskip_cpp import SkipPlan
from adaskip_cpp.errors import PlanError
from adaskip_cpp.model.cost_model import CostModel
from adaskip_cpp.model.plan import Bulk
from adaskip_cpp.model.skip_set import SkipSet
from adaskip_cpp.model.stored import from_plain, plain


def test_a_prompt_is_the_sum_of_its_ubatches() -> None:
    # Per ubatch of 512: 1 s for the rest, 2 layers of attention 1 s + 1/256 s per cell, FFN 3 s, K and V 0.25 s.
    model = cost_model(1, [1, 1], [3, 3], growth=[1 / 256, 1 / 256], kept=[0.25, 0.25])
    # Without an output the last layer has K and V alone; with one its FFN and the rest see one token, a hundredth.
    unread = 1 + (1 + 2) + 3 + 0.25
    read, read_second = 1 + 2 * (1 + 2) + 3 + 0.04, 1 + 2 * (1 + 4) + 3 + 0.04
    assert model.seconds(None, 512, "prefill") == pytest.approx(read)
    assert model.seconds(None, 1024, "prefill") == pytest.approx(unread + read_second)
    skip = np.array([[True, False], [False, True]])
    assert model.seconds(skip, 512, "prefill") == pytest.approx(1 + 3 + 3 + 0.01)
    assert model.seconds(SkipSet(skip, np.ones((2, 2))), 512, "prefill") == pytest.approx(1 + 3 + 3 + 0.01)


def test_the_last_ubatch_lies_between_a_token_and_a_whole_one() -> None:
    model = cost_model(1, [1], [3])
    assert model.seconds(None, 1, "prefill") == pytest.approx(0.05)
    assert model.seconds(None, 256, "prefill") == pytest.approx(0.05 + (2.04 - 0.05) * 255 / 511)
    assert model.seconds(None, 513, "prefill") == pytest.approx(1 + 0.05)


def test_a_prompt_with_a_bulk_is_cut_into_head_pieces_and_tail() -> None:
    """Ubatches of 8 in pieces of 12: a head of 4, a bulk of 8 + 4, 8 + 4 and 6 tokens, a tail of 5."""
    model = cost_model(1, [1, 1, 1], [3, 3, 3], size=8, kept=[0.25, 0.5, 0.125])
    model = replace(model, settings=replace(SETTINGS, n_batch=12))
    skip = np.array([[False, False], [True, True], [False, False]])
    head = 0.09 + (1 + 4 + 4 + 0.125 - 0.09) * 3 / 7
    bulk = 5 * 0.05 + (1 + 4 + 0.5 + 0.125 - 0.05) * (7 + 3 + 7 + 3 + 5) / 7
    tail = 0.13 + (1 + 3 + 6 + 0.04 - 0.13) * 4 / 7
    none, around = SkipSet.none(3), Bulk(SkipSet(skip, np.ones((3, 2))), head=4, tail=5)
    assert model.seconds(skip, 39, "bulk", around=around) == pytest.approx(head + bulk + tail)
    plan = SkipPlan(none, none, bulk=around)
    assert model.seconds(plan, 39, "prefill") == pytest.approx(head + bulk + tail)
    assert model.speedup(plan, 39, "prefill") == model.seconds(None, 39, "prefill") / model.seconds(plan, 39, "prefill")
    assert model.speedup(plan, 39, "decode") == 1
    assert model.seconds(skip, 9, "bulk", around=around) == model.seconds(None, 9, "prefill"), "has no bulk"


def test_tokens_that_maps_are_fitted_to_run_whole() -> None:
    """A head of 4, 3 whole tokens, a bulk of 5 + 8 + 8 + 1 tokens: batches end with ubatches of 8; a tail of 5."""
    model = cost_model(1, [1, 1, 1], [3, 3, 3], size=8, kept=[0.25, 0.5, 0.125])
    skip = filled(np.array([[False, False], [True, True], [False, False]]), parts=("down", "up"))
    plan = SkipPlan(SkipSet.none(3), SkipSet.none(3), bulk=Bulk(skip, head=4, tail=5, refit=3))
    whole, skipping = (1 + 4 + 4 + 0.125 - 0.09) / 7, (1 + 4 + 0.5 + 0.125 - 0.05) / 7
    head, fit = 0.09 + whole * 3, 0.09 + whole * 2
    bulk = 3 * 0.05 + skipping * (7 + 7 + 5)
    tail = 0.13 + (1 + 3 + 6 + 0.04 - 0.13) * 4 / 7
    assert model.seconds(plan, 34, "prefill") == pytest.approx(head + fit + bulk + tail)


def test_windowed_attentions_stop_growing_in_the_bulk() -> None:
    costs = cost_model(1, [1, 1], [1, 1], size=256, growth=[0.01, 0.01], kept=[0.5, 0.5])
    context = 12 * 256 + 64
    none = SkipSet.none(2)
    around = Bulk(none, windowed=(0, 1), window_size=100)  # of layer 1, the last, nobody reads the attention
    narrow, wide = (costs.seconds(None, context, "bulk", around=each) for each in (around, None))
    cells = np.arange(256, context - 63, 256)  # the first ubatch, after the head, ends with the first block
    assert wide - narrow == pytest.approx(0.01 * np.maximum(cells - 512, 0).sum())
    plan = SkipPlan(none, none, bulk=around)
    assert costs.seconds(plan, context, "prefill") == narrow
    assert costs.seconds(plan, context, "decode") == costs.seconds(None, context, "decode")


def test_the_last_token_is_by_itself_where_upper_layers_have_no_kv_of_their_own() -> None:
    model = cost_model(1, [1, 1, 1], [3, 3, 3], kept=[0.25, 0.25, 0.25], n_layer_kv=2)
    assert model.seconds(None, 513, "prefill") == pytest.approx(1 + 4 + 0.25 + 0.13)
    assert model.seconds(None, 1, "prefill") == pytest.approx(0.13)


def test_a_token_reads_whole_blocks_of_cells() -> None:
    model = cost_model(0, [0], [0], growth=[100.0])  # a second per cell in decode
    assert [model.seconds(None, context, "decode") for context in (0, 255, 256, 512)] == [256, 256, 512, 768]


def test_impossible_predictions_are_refused() -> None:
    model = cost_model(1, [1, 1], [1, 1])
    for context, phase in ((0, "prefill"), (-1, "decode"), (math.nan, "prefill")):
        with pytest.raises(PlanError, match="give the length"):
            model.seconds(None, context, phase)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="phase"):
        model.seconds(None, 8, "both")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="use the profile of this model"):
        model.seconds(np.zeros((3, 2), bool), 8, "decode")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("settings", None),
        ("settings.n_batch", 0),
        ("prefill.n_tokens", 0),
        ("prefill.n_tokens", 2**31),
        ("prefill.fixed", -1.0),
        ("prefill.base", [[1.0, 2.0], [3.0]]),
        ("prefill.growth", [1e308, 0.0]),
        ("prefill.kept", [1.0]),
        ("decode.n_tokens", 2),
        ("decode.fixed", 1e9),
        ("decode.base", [[1.0, 2.0]]),
        ("decode.growth", [1.0, math.nan]),
        ("n_layer_kv", 3),
        ("limit", [None]),
        ("limit", [0.0, None]),
    ],
)
def test_a_damaged_cost_model_is_refused(path: str, value: Any) -> None:
    data = plain(cost_model(0.1, [1, 2], [3, 4]))[0]
    put(data, path, value)
    *_, name = path.split(".")
    with pytest.raises(ValueError, match=rf"{path.split('.')[0]}|the cost model.*; calibrate again"):
        from_plain(data, CostModel)
    put(data, path, LOST)
    with pytest.raises(ValueError, match=f"missing required field `{name}`"):
        from_plain(data, CostModel)
