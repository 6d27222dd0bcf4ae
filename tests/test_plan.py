"""adaskip_cpp.plan: skip sets and plans."""

import json
from typing import Any

import numpy as np
import pytest

from adaskip_cpp import SkipPlan
from adaskip_cpp.errors import CompensationError, PlanError, SublayerRangeError
from adaskip_cpp.model import ModelInfo
from adaskip_cpp.plan import SkipSet

MODEL = ModelInfo("0" * 64, "llama", 4)


def skip_set(*sublayers: tuple[int, int], n_layer: int = 4, scale: float = 1.0) -> SkipSet:
    skip = np.zeros((n_layer, 2), bool)
    for layer, kind in sublayers:
        skip[layer, kind] = True
    return SkipSet(skip, np.full((n_layer, 2), scale))


def test_a_set_lists_its_layers_in_order() -> None:
    chosen = skip_set((3, 0), (1, 0), (2, 1))
    assert (chosen.attention, chosen.ffn, chosen.n_skip, chosen.n_layer) == ((1, 3), (2,), 3, 4)


def test_compensation_is_one_where_nothing_is_skipped() -> None:
    chosen = skip_set((1, 1), scale=0.5)
    expected = np.ones((4, 2))
    expected[1, 1] = 0.5
    np.testing.assert_array_equal(chosen.scale, expected)


def test_the_arrays_are_copies_and_read_only() -> None:
    skip = np.zeros((4, 2), bool)
    chosen = SkipSet(skip, np.ones((4, 2)))
    skip[0, 0] = True
    assert chosen.n_skip == 0
    with pytest.raises(ValueError, match="read-only"):
        chosen.skip[0, 0] = True
    with pytest.raises(ValueError, match="read-only"):
        chosen.scale[0, 0] = 2


def test_sets_are_equal_by_value() -> None:
    assert skip_set((1, 0), scale=0.9) == skip_set((1, 0), scale=0.9)
    assert hash(skip_set((1, 0), scale=0.9)) == hash(skip_set((1, 0), scale=0.9))
    assert skip_set((1, 0), scale=0.9) != skip_set((1, 0), scale=0.8)
    assert skip_set((1, 0)) != skip_set((1, 1))
    assert skip_set() == SkipSet.none(4) != SkipSet.none(5)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bad_compensation_is_refused_where_it_is_used(value: float) -> None:
    with pytest.raises(CompensationError, match="FFN of layer 2"):
        skip_set((2, 1), scale=value)
    assert skip_set(scale=value).n_skip == 0


@pytest.mark.parametrize("shape", [(4,), (4, 3), (0, 2), (4, 2, 1)])
def test_a_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match="n_layer, 2"):
        SkipSet(np.zeros(shape, bool), np.ones(shape))


def test_shapes_must_agree() -> None:
    with pytest.raises(PlanError, match="n_layer, 2"):
        SkipSet(np.zeros((4, 2), bool), np.ones((5, 2)))


def test_a_manual_plan_skips_in_both_phases() -> None:
    plan = SkipPlan.manual(4, attention=[2, 0], ffn=np.array([3]))
    assert (plan.attention, plan.ffn, plan.n_skip) == ((0, 2), (3,), 3)
    assert plan.prefill == plan.decode
    assert (plan.model, plan.strategy, plan.compensation) == (None, "manual", "none")


def test_a_manual_plan_can_leave_prefill_whole() -> None:
    plan = SkipPlan.manual(4, attention=[1], ffn=[1], phase="decode")
    assert plan.prefill.n_skip == plan.n_skip == 0
    assert plan.decode.n_skip == 2


def test_a_manual_plan_takes_one_scale_or_one_for_each() -> None:
    assert SkipPlan.manual(4, ffn=[1], scale=0.5).prefill.scale[1, 1] == 0.5
    scale = np.arange(1.0, 9.0).reshape(4, 2)
    assert SkipPlan.manual(4, ffn=[1], scale=scale).prefill.scale[1, 1] == 4.0
    with pytest.raises(PlanError, match="shape"):
        SkipPlan.manual(4, ffn=[1], scale=np.ones((3, 2)))
    with pytest.raises(CompensationError, match="FFN of layer 1"):
        SkipPlan.manual(4, ffn=[1], scale=0)


@pytest.mark.parametrize("layer", [-1, 4, 1.5, "1"])
def test_a_layer_that_the_model_lacks_is_refused(layer: Any) -> None:
    with pytest.raises(SublayerRangeError, match="0 to 3"):
        SkipPlan.manual(4, attention=[layer])


def test_an_unknown_phase_is_refused() -> None:
    with pytest.raises(PlanError, match="prefill-only"):
        SkipPlan.manual(4, phase="prefill-only")  # type: ignore[arg-type]


def test_decode_never_reads_kv_that_prefill_did_not_write() -> None:
    with pytest.raises(PlanError, match=r"attention of layers \[2\]"):
        SkipPlan(skip_set((2, 0)), skip_set((1, 0)))
    SkipPlan(skip_set((2, 0), (1, 1)), skip_set((2, 0), (3, 0)))  # an FFN has no KV


def test_a_plan_is_for_one_number_of_layers() -> None:
    with pytest.raises(PlanError, match="4 layers but decode for 5"):
        SkipPlan(skip_set(), skip_set(n_layer=5))
    with pytest.raises(PlanError, match="its model has 4"):
        SkipPlan(skip_set(n_layer=5), skip_set(n_layer=5), MODEL)


@pytest.mark.parametrize("model", [None, MODEL])
def test_a_plan_survives_json(model: ModelInfo | None) -> None:
    plan = SkipPlan(skip_set((0, 1), scale=1 / 3), skip_set((0, 1), (2, 0), scale=0.1), model, "adaskip", "paper")
    assert SkipPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize(
    "change",
    [
        {"n_layer": 0},
        {"n_layer": "4"},
        {"prefill": None},
        {"decode": {"attention": []}},
        {"model": {"fingerprint": 1}},
        {"prefill": {"attention": [{"layer": 9, "scale": 1}], "ffn": []}},
        {"prefill": {"attention": [], "ffn": [{"layer": 1, "scale": -1}]}},
    ],
)
def test_a_malformed_plan_is_refused(change: dict[str, Any]) -> None:
    data = SkipPlan.manual(4, attention=[1]).to_dict()
    with pytest.raises(PlanError):
        SkipPlan.from_dict({**data, **change})
