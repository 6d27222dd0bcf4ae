"""The C ABI refuses every bad argument with a code and a message, and goes on working."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaskip_cpp import SkipPlan
from adaskip_cpp._native import KVRun, _ffi, _lib

OK, ARGUMENT = 0, -1
NOT_SKIPPABLE, COMPENSATION = -2, -3


@pytest.fixture
def llm(tiny: Callable[..., Path], open_model: Callable[..., Any]) -> Any:
    return open_model(tiny("jamba"))  # layers 0 and 2 have no attention


@pytest.fixture
def ctx(llm: Any) -> Any:
    return _ffi.cast("struct llama_context *", llm.ctx)


def plan(skip: Any, scale: Any, n_layer: int = 3) -> tuple[Any, Any]:
    arrays = _ffi.new("uint8_t[]", list(skip)), _ffi.new("float[]", list(scale))
    result = _ffi.new("struct adaskip_plan *")
    result.n_layer, result.skip, result.scale = n_layer, *arrays
    return result, arrays


def message() -> str:
    return str(_ffi.string(_lib.adaskip_last_error()).decode())


@_ffi.callback("adaskip_statistics_callback")  # type: ignore[untyped-decorator]
def ignore(statistics: Any, user_data: Any) -> None:
    pass


BAD_CALLS = {
    "no context": lambda ctx: _lib.adaskip_n_layer(_ffi.NULL),
    "no context for a plan": lambda ctx: _lib.adaskip_set_plan(_ffi.NULL, 0, _ffi.NULL),
    "no context for counters": lambda ctx: _lib.adaskip_get_counters(_ffi.NULL, _ffi.new("struct adaskip_counters *")),
    "no counters": lambda ctx: _lib.adaskip_get_counters(ctx, _ffi.NULL),
    "an unknown phase": lambda ctx: _lib.adaskip_set_phase(ctx, 2),
    "a negative phase": lambda ctx: _lib.adaskip_set_phase(ctx, -1),
    "a plan for an unknown phase": lambda ctx: _lib.adaskip_set_plan(ctx, 7, _ffi.NULL),
    "a plan of another length": lambda ctx: _lib.adaskip_set_plan(ctx, 0, plan([0] * 8, [1] * 8, 4)[0]),
    "a plan of negative length": lambda ctx: _lib.adaskip_check_plan(ctx, plan([0] * 6, [1] * 6, -3)[0]),
    "a plan without arrays": lambda ctx: _lib.adaskip_check_plan(
        ctx, _ffi.new("struct adaskip_plan *", {"n_layer": 3})
    ),
    "sublayers into nothing": lambda ctx: _lib.adaskip_sublayers(ctx, _ffi.NULL, 6),
    "sublayers into too little": lambda ctx: _lib.adaskip_sublayers(ctx, _ffi.new("struct adaskip_sublayer[5]"), 5),
    "an unknown statistics mode": lambda ctx: _lib.adaskip_set_statistics(ctx, 3, ignore, _ffi.NULL),
    "statistics for nobody": lambda ctx: _lib.adaskip_set_statistics(ctx, 1, _ffi.NULL, _ffi.NULL),
    "stale KV of an unknown phase": lambda ctx: _lib.adaskip_kv_first_stale(ctx, 0, 5, _ffi.new("int32_t *")),
    "stale KV into nothing": lambda ctx: _lib.adaskip_kv_first_stale(ctx, 0, 0, _ffi.NULL),
    "runs into nothing": lambda ctx: _lib.adaskip_kv_get_runs(ctx, 0, _ffi.NULL, _ffi.NULL, 4),
    "a negative number of runs": lambda ctx: _lib.adaskip_kv_set_runs(ctx, 0, _ffi.NULL, _ffi.NULL, -1),
    "runs out of order": lambda ctx: _lib.adaskip_kv_set_runs(
        ctx, 0, _ffi.new("int32_t[]", [5, 5]), _ffi.new("uint8_t[6]"), 2
    ),
    "a run at a negative position": lambda ctx: _lib.adaskip_kv_set_runs(
        ctx, 0, _ffi.new("int32_t[]", [-1]), _ffi.new("uint8_t[3]"), 1
    ),
}


@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_bad_argument_is_an_error_with_a_message(call: Callable[[Any], int], ctx: Any, llm: Any) -> None:
    assert call(ctx) == ARGUMENT
    assert message()
    assert _lib.adaskip_n_layer(ctx) == 3 and message() == ""
    llm.eval([1, 5, 6])


def test_a_layer_without_attention_is_refused(ctx: Any) -> None:
    bad, _arrays = plan([1, 0, 0, 0, 0, 0], [1] * 6)
    assert _lib.adaskip_set_plan(ctx, 0, bad) == NOT_SKIPPABLE
    assert "layer 0: the attention cannot be skipped" in message()


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_no_positive_number_is_refused(scale: float, ctx: Any) -> None:
    bad, _arrays = plan([0, 0, 0, 1, 0, 0], [1, 1, 1, scale, 1, 1])
    assert _lib.adaskip_set_plan(ctx, 1, bad) == COMPENSATION
    good, _arrays = plan([0, 0, 0, 1, 0, 0], [scale, 1, 1, 2, 1, 1])  # not read where nothing is skipped
    assert _lib.adaskip_set_plan(ctx, 1, good) == OK


def test_the_record_of_skipped_attention_round_trips(llm: Any) -> None:
    native = llm._adaskip
    runs = (KVRun(3, (1,)), KVRun(7, ()), KVRun(9, (0, 2)))
    native.set_kv_runs(runs)
    assert native.kv_runs() == runs
    assert native.kv_valid("prefill", 100) == 3
    assert native.kv_valid("prefill", 2) == 2
    native.set_kv_runs(())
    assert native.kv_valid("prefill", 100) == 100


def test_the_record_agrees_with_an_array(
    tiny: Callable[..., Path], open_model: Callable[..., Any], tokens: Callable[..., list[int]]
) -> None:
    # Overlapping batches under random sets, against one cell per position.
    llm = open_model(tiny())
    native = llm._adaskip
    rng = np.random.default_rng(0)
    cells: list[tuple[int, ...]] = [()] * 64
    n_refused = 0
    for _ in range(200):
        start, n = int(rng.integers(0, 40)), int(rng.integers(1, 12))
        attention = [layer for layer in range(3) if rng.random() < 0.4]
        plan = SkipPlan.manual(3, attention=attention)
        native.set_plan("prefill", plan.prefill.skip, plan.prefill.scale)
        stale = [i for i, cell in enumerate(cells[:start]) if set(cell) - set(attention)]
        assert native.kv_valid("prefill", start) == (stale[0] if stale else start)
        llm._ctx.kv_cache_clear()
        llm._batch.set_batch(batch=tokens(n), n_past=start, logits_all=False)
        if stale:
            n_refused += 1
            with pytest.raises(RuntimeError):
                llm._ctx.decode(llm._batch)
            continue
        llm._ctx.decode(llm._batch)
        cells[start : start + n] = [tuple(attention)] * n
        runs = native.kv_runs()
        for position, cell in enumerate(cells):
            covering = [run.skipped for run in runs if run.start <= position]
            assert (covering[-1] if covering else ()) == cell
        assert all(first.skipped != second.skipped for first, second in pairwise(runs))
    assert 20 < n_refused < 180
