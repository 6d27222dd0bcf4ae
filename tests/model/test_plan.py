"""adaskip_cpp.model.plan: skip sets and plans."""

import dataclasses
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from oracles.skip_sets import PARTS, only

from adaskip_cpp import SkipPlan
from adaskip_cpp.errors import PlanError
from adaskip_cpp.model.identity import ModelInfo
from adaskip_cpp.model.plan import Bulk, OnlineStage
from adaskip_cpp.model.skip_set import SkipSet


def skip_set(*sublayers: tuple[int, int], n_layer: int = 4, scale: float = 1.0, **parts: Any) -> SkipSet:
    return SkipSet(only(*sublayers, n_layer=n_layer), np.full((n_layer, 2), scale), **parts)


SMALL, LARGE = skip_set((1, 0)), skip_set((1, 0), (2, 0))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bad_compensation_is_refused_where_it_is_used(value: float) -> None:
    with pytest.raises(PlanError, match="FFN of layer 2"):
        skip_set((2, 1), scale=value)
    assert skip_set(scale=value).n_skip == 0


@pytest.mark.parametrize("shape", [(4,), (4, 3), (0, 2)])
def test_a_set_of_a_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match="n_layer, 2"):
        SkipSet(np.zeros(shape, bool), np.ones(shape))
    with pytest.raises(PlanError, match=r"'scale' has the shape \(5, 2\), not \[4, 2\]"):
        SkipSet(np.zeros((4, 2), bool), np.ones((5, 2)))


def filled_set(*sublayers: tuple[int, int], rank: int = 2, **changes: Any) -> SkipSet:
    """A set with vectors and maps of ones."""
    ones = {"bias": np.ones((4, 2, 3)), "down": np.ones((4, 2, rank, 3)), "up": np.ones((4, 2, 3, rank))}
    return skip_set(*sublayers, **{**ones, **changes})


def test_arrays_are_read_only_copies_and_scales_are_one_and_all_else_zero_where_nothing_is_skipped() -> None:
    given = {"skip": only((1, 1), n_layer=4), "scale": np.full((4, 2), 0.5)}
    given |= {name: np.ones((4, 2, *shape)) for name, shape in zip(PARTS, ((3,), (2, 3), (3, 2)), strict=True)}
    chosen = SkipSet(**given)
    for array in given.values():
        array[:] = 7
    assert np.argwhere(chosen.skip).tolist() == [[1, 1]]
    np.testing.assert_array_equal(chosen.scale, np.where(chosen.skip, 0.5, 1.0))
    for name in PARTS:
        kept = getattr(chosen, name)
        assert kept.dtype == np.float32 and (kept[1, 1] == 1).all() and kept.sum() == kept[1, 1].size
    for name in given:
        with pytest.raises(ValueError, match="read-only"):
            getattr(chosen, name)[1, 1] = 2


def test_the_length_of_the_vectors_is_that_of_the_bias_or_the_map() -> None:
    bias, maps = {"bias": np.ones((4, 2, 5))}, {"down": np.ones((4, 2, 2, 5)), "up": np.ones((4, 2, 5, 2))}
    assert skip_set((1, 1)).n_embd is None
    assert [skip_set((1, 1), **parts).n_embd for parts in (bias, maps, {**bias, **maps})] == [5] * 3


@pytest.mark.parametrize("name", PARTS)
def test_sets_with_another_vector_or_map_differ(name: str) -> None:
    one, other = filled_set((1, 0)), filled_set((1, 0))
    assert one == other and hash(one) == hash(other)
    changed = np.array(getattr(one, name))
    changed[2, 1] = 2
    assert filled_set((1, 0), **{name: changed}) == one, "the other sublayer's is not used"
    changed[1, 0].flat[-1] = 2
    assert filled_set((1, 0), **{name: changed}) != one
    for less in ({"bias": None}, {"down": None, "up": None}, {"rank": 1}, {"scale": 2.0}):
        assert filled_set((1, 0), **less) != one != filled_set((1, 1), **less)
    assert filled_set((1, 0), bias=np.zeros((4, 2, 3))) != filled_set((1, 0), bias=None)
    assert SkipPlan(one, one) == SkipPlan(other, other) != SkipPlan(skip_set((1, 0)), skip_set((1, 0)))


@pytest.mark.parametrize(
    "changes",
    [
        {"down": None},
        {"up": None},
        *({"down": np.ones(shape)} for shape in ((4, 2, 3), (4, 2, 3, 2), (5, 2, 2, 3))),
        *({"up": np.ones(shape)} for shape in ((4, 2, 4, 2), (4, 2, 3, 1))),
        {"down": np.ones((4, 2, 0, 3)), "up": np.ones((4, 2, 3, 0))},
        *({"bias": np.ones(shape)} for shape in ((4, 2), (4, 2, 4), (4, 3, 3), (4, 2, 0), (4, 2, 3, 1))),
    ],
    ids=lambda changes: ", ".join(f"{k} {None if v is None else v.shape}" for k, v in changes.items()),
)
def test_a_vector_or_a_map_of_a_wrong_shape_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=r"(up|down|bias).*(not \[4, 2, .*; give one row|; give both)"):
        filled_set((1, 0), **changes)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", PARTS)
def test_a_vector_or_a_map_that_is_not_finite_is_refused_where_it_is_used(name: str, value: float) -> None:
    bad = {name: np.full(getattr(filled_set((1, 0)), name).shape, value)}
    what = "attention of layer 1" if name == "bias" else r"linear map of attention of layer 1.*affine"
    with pytest.raises(PlanError, match=what):
        filled_set((1, 0), **bad)
    assert filled_set(**bad) == filled_set()


def test_a_manual_plan_skips_in_both_phases_or_leaves_prefill_whole() -> None:
    plan = SkipPlan.manual(4, attention=[2, 0], ffn=np.array([3]))
    assert (plan.prefill.attention, plan.prefill.ffn, plan.prefill.n_skip) == ((0, 2), (3,), 3)
    assert plan.prefill == plan.decode and plan.sets == (plan.prefill, plan.decode)
    bulk = SkipPlan.manual(4, attention=[1], ffn=[2], phase="bulk")
    assert bulk.bulk is not None and (bulk.bulk.skip.attention, bulk.bulk.skip.ffn) == ((1,), (2,))
    assert bulk.prefill.n_skip == bulk.decode.n_skip == 0
    decode = SkipPlan.manual(4, attention=[1], ffn=[1], phase="decode")
    assert (decode.prefill.n_skip, decode.decode.n_skip) == (0, 2)


def test_a_manual_plan_takes_one_scale_or_one_for_each() -> None:
    for scale, expected in ((0.5, 0.5), (np.arange(1.0, 9.0).reshape(4, 2), 4.0)):
        assert SkipPlan.manual(4, ffn=[1], scale=scale).prefill.scale[1, 1] == expected
    with pytest.raises(PlanError, match="shape"):
        SkipPlan.manual(4, ffn=[1], scale=np.ones((3, 2)))


@pytest.mark.parametrize("layer", [-1, 4, 1.5, "1"])
def test_a_layer_that_the_model_lacks_is_refused(layer: Any) -> None:
    with pytest.raises(PlanError, match="0 to 3"):
        SkipPlan.manual(4, attention=[layer])


def test_an_unknown_phase_or_mode_is_refused() -> None:
    unknown: Any = "prefill-only"
    with pytest.raises(PlanError, match="'both', 'bulk' or 'decode'"):
        SkipPlan.manual(4, phase=unknown)
    with pytest.raises(PlanError, match="prefill, decode, e2e"):
        SkipPlan(skip_set(), skip_set(), mode=unknown)


def test_no_phase_reads_kv_that_prefill_did_not_write() -> None:
    with pytest.raises(PlanError, match=r"attention of layers \[2\]"):
        SkipPlan(skip_set((2, 0)), skip_set((1, 0)))
    SkipPlan(skip_set((2, 0), (1, 1)), skip_set((2, 0), (3, 0)))  # an FFN has no KV
    # The head of a prompt runs as prefill and leaves no KV there, which the bulk would read.
    with pytest.raises(PlanError, match=r"prefill skips the attention of layers \[1\], which bulk runs"):
        SkipPlan(SMALL, SMALL, bulk=Bulk(skip_set((3, 0))))
    SkipPlan(SMALL, SMALL, bulk=Bulk(LARGE))  # decode may run what the bulk skips


def test_a_plan_is_for_one_number_of_layers() -> None:
    five = skip_set(n_layer=5)
    with pytest.raises(PlanError, match="4 layers but decode for 5"):
        SkipPlan(skip_set(), five)
    with pytest.raises(PlanError, match="prefill is for 4 layers but bulk for 5"):
        SkipPlan(skip_set(), skip_set(), bulk=Bulk(five))
    with pytest.raises(PlanError, match="its model has 4"):
        SkipPlan(five, five, model=ModelInfo("0" * 64, "llama", 4))


def test_a_bulk_set_is_one_of_the_plans_sets_and_what_its_phase_skips() -> None:
    plain = SkipPlan.manual(4, ffn=[1])
    plan = dataclasses.replace(plain, bulk=Bulk(LARGE))
    assert plan.sets == (LARGE, plain.prefill, plain.decode)
    assert (plan.skipped("bulk"), plan.skipped("prefill"), plan.skipped("decode")) == plan.sets
    assert plain.skipped("bulk") == plain.prefill, "without a bulk set, all of a prompt is prefill"


@pytest.mark.parametrize("name", ["head", "tail"])
@pytest.mark.parametrize("value", [-1, 1.5, "4", True, None, 2**31])
def test_an_impossible_head_or_tail_is_refused(name: str, value: Any) -> None:
    """A head may be empty, a tail may not."""
    with pytest.raises(PlanError, match=f"^{name} is .*; use a whole number from"):
        Bulk(skip_set(), **{name: value})
    assert Bulk(skip_set(), head=0, tail=np.int64(7)) == Bulk(skip_set(), head=0, tail=7)
    with pytest.raises(PlanError, match="from 1 on"):
        Bulk(skip_set(), tail=0)


def test_a_windowed_attention_that_is_skipped_looks_back_at_nothing() -> None:
    bulk = Bulk(skip_set((1, 0), (2, 1)), windowed=(2, 1))
    assert bulk.windowed == (1, 2) and SkipPlan(skip_set(), skip_set(), bulk=bulk).narrowed == bulk.narrowed == (2,)


@pytest.mark.parametrize(
    ("n_cached", "n_tokens", "n_ubatch", "expected"),
    [
        (4, 2000, 512, 508),  # after the head
        (0, 2000, 512, 2000),  # nothing to align, so no batch of its own
        (1000, 2000, 512, 512 - 1000 % 256),
        (4, 100, 512, 100),
        (200, 2000, 256, 2000),  # not 56 tokens by themselves
        (4, 2000, 128, 2000),  # ubatches smaller than a block
    ],
)
def test_the_first_batch_of_a_bulk_ends_with_a_block_of_cells(
    n_cached: int, n_tokens: int, n_ubatch: int, expected: int
) -> None:
    assert Bulk.first_batch(n_cached, n_tokens, n_ubatch) == expected


def test_maps_are_fitted_to_the_first_tokens_and_after_every_2048() -> None:
    maps = SkipSet(LARGE.skip, LARGE.scale, None, *np.ones((2, 4, 2, 4, 4), np.float32))
    for begin, end, is_fitted, whole in (
        (4, 5000, False, [(4, 132), (2048, 2176), (4096, 4224)]),
        (4, 100, False, [(4, 100)]),
        (3000, 4100, True, [(4096, 4100)]),
        (2000, 3000, False, [(2000, 2128)]),
    ):
        pieces = [*Bulk(maps, refit=128).pieces(begin, end, is_fitted=is_fitted)]
        assert [(first, last) for first, last, is_whole in pieces if is_whole] == whole
        assert [begin, *(last for _, last, _ in pieces)] == [*(first for first, _, _ in pieces), end]
    assert [*Bulk(maps).pieces(4, 5000, is_fitted=False)] == [(4, 5000, False)]


@pytest.mark.parametrize(
    ("context", "size", "tail"), [(16, 252, 64), (2048, 508, 64), (5000, 1276, 156), (8192, 2044, 256)]
)
def test_a_scaled_bulk_has_the_same_share_in_windows_and_tail(context: int, size: int, tail: int) -> None:
    scaled = Bulk(none := SkipSet.none(4), windowed=(1,), window_size=508).scaled(context, 2048)
    assert (scaled.window_size, scaled.tail, scaled.windowed) == (size, tail, (1,))
    assert Bulk(none).scaled(context, 2048) == Bulk(none, tail=tail)
    assert Bulk(none, tail=2**31 - 1).scaled(8192, 1).tail == 2**31 - 1
    assert Bulk(none, tail=300).scaled(1024, 2).tail == 1024


def test_without_a_bulk_a_plan_needs_no_kv_where_every_phase_skips_the_attention() -> None:
    assert SkipPlan(SMALL, LARGE).without_kv == SMALL.attention
    assert SkipPlan(SMALL, LARGE, bulk=Bulk(LARGE)).without_kv == ()


def test_the_set_in_force_is_that_of_the_schedule_and_a_phase_ends_with_the_last() -> None:
    plan = SkipPlan(SMALL, SMALL, schedule=((0, SMALL), (7, LARGE)))
    assert plan.schedule[1] == (7, LARGE) and plan != SkipPlan(SMALL, SMALL)
    assert [plan.decode_after(n) for n in (0, 6, 7, 100)] == [SMALL, SMALL, LARGE, LARGE]
    assert (plan.skipped("prefill"), plan.skipped("decode")) == (SMALL, LARGE)
    first = skip_set((1, 0), (1, 1))
    SkipPlan(SMALL, first, schedule=((0, first), (3, LARGE)))  # it may drop an FFN, which has no KV


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (((1, SMALL),), "does not begin"),
        (((0, LARGE),), "does not begin"),
        (((0, SMALL), (0, LARGE)), "do not ascend"),
        (((0, SMALL), (9, LARGE), (8, LARGE)), "do not ascend"),
        (((0, SMALL), (2**31, LARGE)), "use whole numbers below"),  # C's int32_t
        (((0, SMALL), (1.5, LARGE)), "use whole numbers below"),
        (
            ((0, SMALL), (3, LARGE), (5, SMALL)),
            r"at 3 tokens skips the attention of layers \[2\], which the schedule.s set at 5 tokens runs",
        ),
        (((0, SMALL), (3, skip_set(n_layer=5))), "4 layers but the schedule.s set at 3 tokens for 5"),
    ],
)
def test_a_malformed_schedule_is_refused(schedule: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        SkipPlan(SMALL, SMALL, schedule=schedule)


@pytest.mark.parametrize(
    "wrong", [{"window": 0}, {"window": 2.5}, {"threshold": float("nan")}, {"threshold": None}, {"scale": "x"}]
)
def test_an_impossible_online_stage_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="; use"):
        OnlineStage(**{"threshold": 0.9, **wrong})
    with pytest.raises(PlanError, match="not both"):
        SkipPlan(SMALL, SMALL, schedule=((0, SMALL), (7, LARGE)), online=OnlineStage())


def test_where_up_is_all_zeros_there_is_no_map() -> None:
    skip = SkipPlan.manual(3, [1], [2]).prefill
    down, up = np.ones((3, 2, 2, 4), np.float32), np.zeros((3, 2, 4, 2), np.float32)
    none = dataclasses.replace(skip, down=down, up=up)
    assert none == skip and none.up is None
    up[2, 1, 3, 1] = 1.0
    one = dataclasses.replace(skip, down=down, up=up)
    assert one.up is not None and one.up[2, 1].any() and one.down is not None
    assert one.down[2, 1].all() and not one.down[1, 0].any()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells how much memory is in use")
def test_maps_take_memory_for_what_is_skipped_alone() -> None:
    """In a process of its own, as others leave and take memory meanwhile."""
    code = """
import dataclasses, os, numpy as np
from pathlib import Path
from adaskip_cpp import SkipPlan
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
skip, before = SkipPlan.manual(32, [30, 31], [30, 31]).prefill, resident()
down, up = (np.broadcast_to(np.float32(0.5), (32, 2, *shape)) for shape in ((64, 4096), (4096, 64)))
chosen = dataclasses.replace(skip, down=down, up=up)
assert chosen.down.nbytes == 64 << 20
print(resident() - before)
"""
    taken = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(taken) < 32 << 20, "8 MiB of 128"
