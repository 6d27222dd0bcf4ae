"""The C ABI refuses every bad argument with a code and a message, and goes on working."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from oracles.fixtures import Open

from adaskip_cpp.engine.binding import ffi, lib
from adaskip_cpp.engine.native import elide_kv

OK, ARGUMENT = 0, -1
NOT_SKIPPABLE, COMPENSATION, KV_ELIDED = -2, -3, -5
ON, ALL_TOKENS, VECTORS, ACTIVATIONS = 1, 2, 4, 8


@pytest.fixture
def llm(open_tiny: Open) -> Any:
    return open_tiny("jamba")  # layers 0 and 2 have no attention


def context(llm: Any) -> Any:
    return ffi.cast("struct llama_context *", llm.ctx)


@pytest.fixture
def ctx(llm: Any) -> Any:
    return context(llm)


@pytest.fixture
def without_kv_1(open_tiny: Open) -> Any:
    """A context that has no KV for the attention of layer 1."""
    with elide_kv(np.array([False, True, False])):
        return context(open_tiny())


NOTHING, FFN_1, ATTENTION_1 = [0] * 6, [0, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0]


def skip_set(skip: Any, scale: Any, n_layer: int = 3) -> tuple[Any, Any]:
    arrays = ffi.new("uint8_t[]", list(skip)), ffi.new("float[]", list(scale))
    result = ffi.new("struct adaskip_set *")
    result.n_layer, result.skip, result.scale = n_layer, *arrays
    return result, arrays


def vectors(values: Any, n_embd: int = 64, skip: Any = (0, 0, 1, 1, 0, 0)) -> tuple[Any, Any]:
    """A set that skips layer 1, with the same vector values everywhere."""
    result, arrays = skip_set(skip, [1] * 6)
    data = ffi.new("float[]", list(values) * 6)
    result.n_embd, result.bias = n_embd, data
    return result, (arrays, data)


def maps(
    n_rank: int = 2, n_embd: int = 64, down: bool = True, up: bool = True, value: float = 0.0, skip: Any = FFN_1
) -> tuple[Any, Any]:
    """A set with low-rank maps that are ``value`` everywhere."""
    result, arrays = skip_set(skip, [1] * 6)
    data = ffi.new("float[]", [value] * (6 * abs(n_rank * n_embd) or 1))
    result.n_embd, result.n_rank = n_embd, n_rank
    result.down, result.up = data if down else ffi.NULL, data if up else ffi.NULL
    return result, (arrays, data)


def prefill(ctx: Any, chosen: Any) -> int:
    """Sets a plan with this set in prefill alone."""
    return int(lib.adaskip_set_plan(ctx, ffi.new("struct adaskip_plan *", {"prefill": chosen})))


def decode(ctx: Any, chosen: Any) -> int:
    """Sets a plan with this set in both phases."""
    steps = ffi.new("struct adaskip_step[]", [(0, chosen[0])])
    return int(
        lib.adaskip_set_plan(ctx, ffi.new("struct adaskip_plan *", {"prefill": chosen, "decode": steps, "n_decode": 1}))
    )


def schedule(ctx: Any, starts: Any, *skips: Any, n: int | None = None) -> int:
    """Sets a plan with sets of these flags in decode, and the first in prefill."""
    parts = [skip_set(skip, [1] * len(skip), len(skip) // 2) for skip in skips]
    plan = ffi.new("struct adaskip_plan *", {"n_decode": len(parts) if n is None else n})
    if parts:
        steps = ffi.new("struct adaskip_step[]", [(start, part[0][0]) for start, part in zip(starts, parts)])  # noqa: B905
        plan.decode, plan.prefill = steps, parts[0][0]
    return int(lib.adaskip_set_plan(ctx, plan))


def online(ctx: Any, window: int, threshold: float, scale: int) -> int:
    params = ffi.new("struct adaskip_online_params *", {"window": window, "threshold": threshold, "scale": scale})
    return int(lib.adaskip_set_plan(ctx, ffi.new("struct adaskip_plan *", {"online": params})))


WITHOUT_FFN_1 = skip_set(FFN_1, [1] * 6)


def readable(ctx: Any, n: int, ids: Any = None) -> int:
    """Sets a plan that skips nothing and reads other plans' bulk sets."""
    given = ffi.NULL if ids is None else ids
    return int(lib.adaskip_set_plan(ctx, ffi.new("struct adaskip_plan *", {"readable": given, "n_readable": n})))


def bulk_set_id(ctx: Any, chosen: Any, id: Any = None, **windows: Any) -> int:
    """Asks for the id of a bulk set, of no plan where ``chosen`` is None."""
    plan = ffi.NULL if chosen is None else ffi.new("struct adaskip_plan *", {"bulk": chosen, **windows})
    return int(lib.adaskip_bulk_set_id(ctx, plan, ffi.new("uint64_t *") if id is None else id))


def message() -> str:
    return str(ffi.string(lib.adaskip_last_error()).decode())


@ffi.callback("adaskip_statistics_callback")  # type: ignore[untyped-decorator]
def ignore(statistics: Any, user_data: Any) -> None:
    pass


BAD_CALLS = {
    "no context": lambda ctx: lib.adaskip_n_layer(ffi.NULL),
    "no context for a plan": lambda ctx: lib.adaskip_set_plan(ffi.NULL, ffi.NULL),
    "no context for counters": lambda ctx: lib.adaskip_get_counters(ffi.NULL, ffi.new("struct adaskip_counters *")),
    "no counters": lambda ctx: lib.adaskip_get_counters(ctx, ffi.NULL),
    "an unknown phase": lambda ctx: lib.adaskip_set_phase(ctx, 3),
    "a negative phase": lambda ctx: lib.adaskip_set_phase(ctx, -1),
    "a plan of another length": lambda ctx: prefill(ctx, skip_set([0] * 8, [1] * 8, 4)[0]),
    "a plan of negative length": lambda ctx: decode(ctx, skip_set([0] * 6, [1] * 6, -3)[0]),
    "a plan without arrays": lambda ctx: prefill(ctx, ffi.new("struct adaskip_set *", {"n_layer": 3})),
    "a plan's tag into nothing": lambda ctx: lib.adaskip_get_plan_tag(ctx, ffi.NULL),
    "sublayers into nothing": lambda ctx: lib.adaskip_sublayers(ctx, ffi.NULL, 6),
    "sublayers into too little": lambda ctx: lib.adaskip_sublayers(ctx, ffi.new("struct adaskip_sublayer[5]"), 5),
    "a plan with shorter vectors": lambda ctx: prefill(ctx, vectors([0.0] * 63, 63)[0]),
    "a plan with vectors of no length": lambda ctx: decode(ctx, vectors([0.0], 0)[0]),
    "a plan with vectors of negative length": lambda ctx: decode(ctx, vectors([0.0], -64)[0]),
    "a map without its second half": lambda ctx: prefill(ctx, maps(up=False)[0]),
    "a map without its first half": lambda ctx: prefill(ctx, maps(down=False)[0]),
    "a map of rank 0": lambda ctx: prefill(ctx, maps(0)[0]),
    "a map of negative rank": lambda ctx: decode(ctx, maps(-2)[0]),
    "a map of shorter vectors": lambda ctx: prefill(ctx, maps(2, 63)[0]),
    "a map of vectors of no length": lambda ctx: decode(ctx, maps(2, 0)[0]),
    "a schedule of no context": lambda ctx: schedule(ffi.NULL, [0], NOTHING),
    "a schedule without sets": lambda ctx: schedule(ctx, [0], n=1),
    "a schedule of negative length": lambda ctx: schedule(ctx, [0], NOTHING, n=-1),
    "a schedule that does not start at 0": lambda ctx: schedule(ctx, [1], NOTHING),
    "a schedule that descends": lambda ctx: schedule(ctx, [0, 5, 4], NOTHING, FFN_1, FFN_1),
    "a schedule with two sets at once": lambda ctx: schedule(ctx, [0, 0], NOTHING, FFN_1),
    "a schedule that runs an attention again": lambda ctx: schedule(ctx, [0, 4], ATTENTION_1, FFN_1),
    "a schedule of another length": lambda ctx: schedule(ctx, [0, 4], NOTHING, [0] * 8),
    "an online stage without a window": lambda ctx: online(ctx, 0, 0.5, 1),
    "an online stage with a negative window": lambda ctx: online(ctx, -20, 0.5, 1),
    "an online threshold that is no number": lambda ctx: online(ctx, 20, float("nan"), 1),
    "an online threshold without end": lambda ctx: online(ctx, 20, float("inf"), 1),
    "an unknown online scale": lambda ctx: online(ctx, 20, 0.5, 3),
    "a negative online scale": lambda ctx: online(ctx, 20, 0.5, -1),
    "readable sets that are not there": lambda ctx: readable(ctx, 1),
    "a negative number of readable sets": lambda ctx: readable(ctx, -1, ffi.new("uint64_t[1]")),
    "the id of no context's bulk": lambda ctx: bulk_set_id(ffi.NULL, ffi.NULL),
    "the id of no plan's bulk": lambda ctx: bulk_set_id(ctx, None),
    "the id of a bulk into nothing": lambda ctx: bulk_set_id(ctx, ffi.NULL, ffi.NULL),
    "the id of a bulk of another length": lambda ctx: bulk_set_id(ctx, skip_set([0] * 8, [1] * 8, 4)[0]),
    "the id of a bulk without arrays": lambda ctx: bulk_set_id(ctx, ffi.new("struct adaskip_set *", {"n_layer": 3})),
    "the id of a bulk with shorter vectors": lambda ctx: bulk_set_id(ctx, vectors([0.0] * 63, 63)[0]),
    "the id of a bulk with a window of no tokens": lambda ctx: bulk_set_id(
        ctx, WITHOUT_FFN_1[0], windowed=ffi.new("uint8_t[3]", [0, 1, 0])
    ),
    "what was learned of no context": lambda ctx: lib.adaskip_get_online(
        ffi.NULL, ffi.new("struct adaskip_online_state *")
    ),
    "what was learned into nothing": lambda ctx: lib.adaskip_get_online(ctx, ffi.NULL),
    "a request of no context": lambda ctx: lib.adaskip_begin_request(ffi.NULL),
    "elided KV of no context": lambda ctx: lib.adaskip_get_elided_kv(ffi.NULL, ffi.new("uint8_t[3]"), 3),
    "elided KV into nothing": lambda ctx: lib.adaskip_get_elided_kv(ctx, ffi.NULL, 3),
    "elided KV into too little": lambda ctx: lib.adaskip_get_elided_kv(ctx, ffi.new("uint8_t[2]"), 2),
    "elided KV of no layers": lambda ctx: lib.adaskip_elide_kv(ffi.new("uint8_t[3]"), 0),
    "elided KV of negative layers": lambda ctx: lib.adaskip_elide_kv(ffi.NULL, -1),
    "unknown statistics": lambda ctx: lib.adaskip_set_statistics(ctx, ON | 16, ignore, ffi.NULL),
    "negative statistics": lambda ctx: lib.adaskip_set_statistics(ctx, -1, ignore, ffi.NULL),
    "flags of statistics that are off": lambda ctx: lib.adaskip_set_statistics(ctx, VECTORS, ignore, ffi.NULL),
    "activations of statistics that are off": lambda ctx: lib.adaskip_set_statistics(
        ctx, ACTIVATIONS, ignore, ffi.NULL
    ),
    "all tokens of statistics that are off": lambda ctx: lib.adaskip_set_statistics(ctx, ALL_TOKENS, ignore, ffi.NULL),
    "statistics for nobody": lambda ctx: lib.adaskip_set_statistics(ctx, 1, ffi.NULL, ffi.NULL),
    "stale KV of an unknown phase": lambda ctx: lib.adaskip_kv_first_stale(ctx, 0, 5, ffi.new("int32_t *")),
    "stale KV into nothing": lambda ctx: lib.adaskip_kv_first_stale(ctx, 0, 0, ffi.NULL),
    "stale KV of no sequence": lambda ctx: lib.adaskip_kv_first_stale(ctx, -1, 0, ffi.new("int32_t *")),
    "stale KV of a sequence too many": lambda ctx: lib.adaskip_kv_first_stale(ctx, 1, 0, ffi.new("int32_t *")),
}


@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_bad_argument_is_an_error_with_a_message(call: Callable[[Any], int], ctx: Any, llm: Any) -> None:
    assert call(ctx) == ARGUMENT
    assert message()
    assert lib.adaskip_n_layer(ctx) == 3 and message() == ""
    llm.eval([1, 5, 6])


def test_a_layer_without_attention_is_refused(ctx: Any) -> None:
    bad, _arrays = skip_set([1, 0, 0, 0, 0, 0], [1] * 6)
    assert prefill(ctx, bad) == NOT_SKIPPABLE
    assert "layer 0: the attention cannot be skipped" in message()


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_no_positive_number_is_refused(scale: float, ctx: Any) -> None:
    bad, _arrays = skip_set([0, 0, 0, 1, 0, 0], [1, 1, 1, scale, 1, 1])
    assert decode(ctx, bad) == COMPENSATION
    good, _arrays = skip_set([0, 0, 0, 1, 0, 0], [scale, 1, 1, 2, 1, 1])  # not read where nothing is skipped
    assert decode(ctx, good) == OK


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "make",
    [lambda value, skip: vectors([0.0] * 63 + [value], skip=skip), lambda value, skip: maps(value=value, skip=skip)],
    ids=["vector", "map"],
)
def test_a_vector_or_a_map_that_is_not_finite_is_refused(make: Any, value: float, ctx: Any) -> None:
    bad, _arrays = make(value, FFN_1)
    assert prefill(ctx, bad) == COMPENSATION
    assert "layer 1" in message()
    good, _arrays = make(value, NOTHING)  # not read where nothing is skipped
    assert prefill(ctx, good) == OK


def test_without_maps_the_rank_is_not_read(ctx: Any) -> None:
    good, _arrays = skip_set(FFN_1, [1] * 6)
    good.n_rank = -5
    assert prefill(ctx, good) == OK


def test_a_schedule_checks_every_one_of_its_plans(ctx: Any) -> None:
    assert schedule(ctx, [0, 4], NOTHING, [1, 0, 0, 0, 0, 0]) == NOT_SKIPPABLE
    assert schedule(ctx, [0, 4], NOTHING, FFN_1) == OK


def test_a_plan_that_runs_an_attention_without_kv_is_refused(without_kv_1: Any) -> None:
    ctx = without_kv_1
    elided = ffi.new("uint8_t[3]")
    (runs_it, _a), (skips_it, _b) = skip_set(FFN_1, [1] * 6), skip_set(ATTENTION_1, [1] * 6)
    assert lib.adaskip_get_elided_kv(ctx, elided, 3) == OK and list(elided) == [0, 1, 0]
    assert lib.adaskip_set_plan(ctx, ffi.NULL) == KV_ELIDED
    assert prefill(ctx, skips_it) == KV_ELIDED, "decode would run it"
    assert decode(ctx, runs_it) == KV_ELIDED
    assert decode(ctx, skips_it) == OK
    assert schedule(ctx, [0, 3], ATTENTION_1, ATTENTION_1) == OK
    assert schedule(ctx, [0], FFN_1) == KV_ELIDED


def test_without_kv_for_every_attention_no_bulk_set_is_read(without_kv_1: Any) -> None:
    ctx = without_kv_1
    chosen, _arrays = skip_set(ATTENTION_1, [1] * 6)
    assert bulk_set_id(ctx, chosen) == KV_ELIDED
    steps, ids = ffi.new("struct adaskip_step[]", [(0, chosen[0])]), ffi.new("uint64_t[]", [1 << 31])
    plan = {"prefill": chosen, "decode": steps, "n_decode": 1, "readable": ids, "n_readable": 1}
    assert lib.adaskip_set_plan(ctx, ffi.new("struct adaskip_plan *", plan)) == KV_ELIDED
    assert decode(ctx, chosen) == OK


def test_the_id_of_a_bulk_is_of_what_may_be_skipped_there(ctx: Any) -> None:
    bad, _bad = skip_set([1, 0, 0, 0, 0, 0], [1] * 6)
    assert bulk_set_id(ctx, bad) == NOT_SKIPPABLE
    worse, _worse = skip_set(FFN_1, [0] * 6)
    assert bulk_set_id(ctx, worse) == COMPENSATION
    found, (nothing, _arrays) = ffi.new("uint64_t *", 7), skip_set(NOTHING, [1] * 6)
    assert bulk_set_id(ctx, nothing, found) == OK and found[0] == 0
    assert bulk_set_id(ctx, ffi.NULL, found) == OK and found[0] == 0


def test_what_was_learned_may_be_asked_for_in_part(ctx: Any, llm: Any) -> None:
    state = ffi.new("struct adaskip_online_state *")
    similarity = ffi.new("double[3]")
    assert online(ctx, 5, 0.5, 1) == OK
    assert lib.adaskip_get_online(ctx, state) == OK and (state.n_tokens, state.done) == (0, 0)
    state.similarity = similarity
    assert lib.adaskip_get_online(ctx, state) == OK
    assert np.isnan(list(similarity)).all()
    assert lib.adaskip_set_plan(ctx, ffi.NULL) == OK


def test_the_library_is_of_the_version_of_its_header() -> None:
    assert lib.adaskip_abi_version() == lib.ADASKIP_ABI_VERSION == 13


def test_a_mask_of_elided_kv_is_of_one_thread_and_one_constructor(open_tiny: Open) -> None:
    with elide_kv(np.array([False, True, False])), ThreadPoolExecutor(1) as pool:
        whole = pool.submit(open_tiny).result()
    with pytest.raises(KeyError), elide_kv(np.array([False, True, False])):
        raise KeyError
    for llm in (whole, open_tiny()):
        assert llm._adaskip.elided_kv() == ()
