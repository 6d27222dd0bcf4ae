"""The C ABI refuses every bad argument with a code and a message, and goes on working."""

import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from oracles import skip_sets
from oracles.fixtures import Open
from oracles.tiny_families import tokens

from adaskip_cpp import SkipPlan
from adaskip_cpp.engine.binding import ffi, lib
from adaskip_cpp.engine.native import elide_kv
from adaskip_cpp.errors import AdaSkipError, NativeError, NotSkippableError, PlanError
from adaskip_cpp.model.plan import OnlineStage

OK, KV_ELIDED = 0, -5
ON, ALL_TOKENS, VECTORS, ACTIVATIONS = 1, 2, 4, 8
NAN, INFINITY = float("nan"), float("inf")

NOTHING, FFN_1, ATTENTION_1 = [0] * 6, [0, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0]
ATTENTION_0 = [1, 0, 0, 0, 0, 0]  # which Jamba has not, nor that of layer 2

FIXED = skip_sets.skip_set((1,), (0,), 0.9, seed=1)
IN_FORCE = {
    "a schedule": skip_sets.same(FIXED, schedule=((0, FIXED), (3, skip_sets.skip_set((1,), (0, 2), seed=2)))),
    "an online stage": skip_sets.same(FIXED, online=OnlineStage(window=3, threshold=-1.0)),
}


@pytest.fixture(params=IN_FORCE.values(), ids=IN_FORCE.keys())
def in_force(request: pytest.FixtureRequest) -> SkipPlan:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def llm(open_tiny: Open) -> Any:
    return open_tiny("jamba")


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


_owned: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""The arrays that a set points at, which live as long as the set."""


def skip_set(skip: Any, scale: Any = (1,) * 6, n_layer: int = 3) -> Any:
    result = ffi.new("struct adaskip_set *")
    _owned[result] = arrays = [ffi.new("uint8_t[]", list(skip)), ffi.new("float[]", list(scale))]
    result.n_layer, result.skip, result.scale = n_layer, *arrays
    return result


def vectors(n_embd: int = 64, value: float = 0.0, skip: Any = FFN_1) -> Any:
    """A set with vectors of zeros that end with ``value``."""
    result = skip_set(skip)
    data = ffi.new("float[]", ([0.0] * (n_embd - 1) + [value]) * 6)
    _owned[result].append(data)
    result.n_embd, result.bias = n_embd, data
    return result


def maps(
    n_rank: int = 2, n_embd: int = 64, down: bool = True, up: bool = True, value: float = 0.0, skip: Any = FFN_1
) -> Any:
    """A set with low-rank maps that are ``value`` everywhere."""
    result = skip_set(skip)
    data = ffi.new("float[]", [value] * (6 * abs(n_rank * n_embd) or 1))
    _owned[result].append(data)
    result.n_embd, result.n_rank = n_embd, n_rank
    result.down, result.up = data if down else ffi.NULL, data if up else ffi.NULL
    return result


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
        steps = ffi.new("struct adaskip_step[]", [(start, part[0]) for start, part in zip(starts, parts)])  # noqa: B905
        plan.decode, plan.prefill = steps, parts[0]
    return int(lib.adaskip_set_plan(ctx, plan))


def online(ctx: Any, window: int, threshold: float, scale: int) -> int:
    params = ffi.new("struct adaskip_online_params *", {"window": window, "threshold": threshold, "scale": scale})
    return int(lib.adaskip_set_plan(ctx, ffi.new("struct adaskip_plan *", {"online": params})))


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


def answer(llm: Any, plan: SkipPlan, call: Callable[[], None] = lambda: None) -> np.ndarray:
    """Logits of a prompt and an answer under a plan, and what the online stage learned; after two tokens the call."""
    llm.set_plan(plan)
    llm.reset()
    llm.begin_request()
    llm.eval(tokens(9))
    rows = [llm.scores[:9].copy(), llm.logits_after([5]), llm.logits_after([6])]
    call()
    rows += [llm.logits_after([token]) for token in (7, 8)]
    assert llm.plan == plan
    return np.concatenate(rows)


@ffi.callback("adaskip_statistics_callback")  # type: ignore[untyped-decorator]
def ignore(statistics: Any, user_data: Any) -> None:
    pass


BAD_CALLS = {
    "no context": lambda ctx: lib.adaskip_n_layer(ffi.NULL),
    "no context for a plan": lambda ctx: lib.adaskip_set_plan(ffi.NULL, ffi.NULL),
    "no context for counters": lambda ctx: lib.adaskip_get_counters(ffi.NULL, ffi.new("struct adaskip_counters *")),
    "no counters": lambda ctx: lib.adaskip_get_counters(ctx, ffi.NULL),
    **{f"phase {phase}": lambda ctx, phase=phase: lib.adaskip_set_phase(ctx, phase) for phase in (3, -1)},
    "a plan of another length": lambda ctx: prefill(ctx, skip_set([0] * 8, [1] * 8, 4)),
    "a plan of negative length": lambda ctx: decode(ctx, skip_set(NOTHING, n_layer=-3)),
    "a plan without arrays": lambda ctx: prefill(ctx, ffi.new("struct adaskip_set *", {"n_layer": 3})),
    "a plan's tag into nothing": lambda ctx: lib.adaskip_get_plan_tag(ctx, ffi.NULL),
    "sublayers into nothing": lambda ctx: lib.adaskip_sublayers(ctx, ffi.NULL, 6),
    "sublayers into too little": lambda ctx: lib.adaskip_sublayers(ctx, ffi.new("struct adaskip_sublayer[5]"), 5),
    **{f"a plan with vectors of {n} values": lambda ctx, n=n: prefill(ctx, vectors(n)) for n in (63, 65, 0, -64)},
    "a map without its second half": lambda ctx: prefill(ctx, maps(up=False)),
    "a map without its first half": lambda ctx: prefill(ctx, maps(down=False)),
    **{f"a map of rank {rank}": lambda ctx, rank=rank: decode(ctx, maps(rank)) for rank in (0, -2)},
    **{f"a map of vectors of {n} values": lambda ctx, n=n: decode(ctx, maps(2, n)) for n in (63, 65, 0)},
    "a schedule of no context": lambda ctx: schedule(ffi.NULL, [0], NOTHING),
    "a schedule without sets": lambda ctx: schedule(ctx, [0], n=1),
    "a schedule of negative length": lambda ctx: schedule(ctx, [0], NOTHING, n=-1),
    "a schedule that does not start at 0": lambda ctx: schedule(ctx, [1], NOTHING),
    "a schedule that descends": lambda ctx: schedule(ctx, [0, 5, 4], NOTHING, FFN_1, FFN_1),
    "a schedule with two sets at once": lambda ctx: schedule(ctx, [0, 0], NOTHING, FFN_1),
    "a schedule that runs an attention again": lambda ctx: schedule(ctx, [0, 4], ATTENTION_1, FFN_1),
    "a schedule that runs an attention again later": lambda ctx: schedule(ctx, [0, 2, 4], NOTHING, ATTENTION_1, FFN_1),
    "a schedule of another length": lambda ctx: schedule(ctx, [0, 4], NOTHING, [0] * 8),
    "an online stage without a window": lambda ctx: online(ctx, 0, 0.5, 1),
    "an online stage with a negative window": lambda ctx: online(ctx, -20, 0.5, 1),
    "an online threshold that is no number": lambda ctx: online(ctx, 20, NAN, 1),
    "an online threshold without end": lambda ctx: online(ctx, 20, INFINITY, 1),
    "an unknown online scale": lambda ctx: online(ctx, 20, 0.5, 3),
    "a negative online scale": lambda ctx: online(ctx, 20, 0.5, -1),
    "readable sets that are not there": lambda ctx: readable(ctx, 1),
    "a negative number of readable sets": lambda ctx: readable(ctx, -1, ffi.new("uint64_t[1]")),
    "the id of no context's bulk": lambda ctx: bulk_set_id(ffi.NULL, ffi.NULL),
    "the id of no plan's bulk": lambda ctx: bulk_set_id(ctx, None),
    "the id of a bulk into nothing": lambda ctx: bulk_set_id(ctx, ffi.NULL, ffi.NULL),
    "the id of a bulk of another length": lambda ctx: bulk_set_id(ctx, skip_set([0] * 8, [1] * 8, 4)),
    "the id of a bulk without arrays": lambda ctx: bulk_set_id(ctx, ffi.new("struct adaskip_set *", {"n_layer": 3})),
    "the id of a bulk with shorter vectors": lambda ctx: bulk_set_id(ctx, vectors(63)),
    "the id of a bulk with a window of no tokens": lambda ctx: bulk_set_id(
        ctx, skip_set(FFN_1), windowed=ffi.new("uint8_t[3]", [0, 1, 0])
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
    # Unknown ones, and those of statistics that are off.
    **{
        f"statistics {flags}": lambda ctx, flags=flags: lib.adaskip_set_statistics(ctx, flags, ignore, ffi.NULL)
        for flags in (ON | 16, -1, VECTORS, ACTIVATIONS, ALL_TOKENS)
    },
    "statistics for nobody": lambda ctx: lib.adaskip_set_statistics(ctx, 1, ffi.NULL, ffi.NULL),
    "stale KV of an unknown phase": lambda ctx: lib.adaskip_kv_first_stale(ctx, 0, 5, ffi.new("int32_t *")),
    "stale KV into nothing": lambda ctx: lib.adaskip_kv_first_stale(ctx, 0, 0, ffi.NULL),
    "stale KV of no sequence": lambda ctx: lib.adaskip_kv_first_stale(ctx, -1, 0, ffi.new("int32_t *")),
    "stale KV of a sequence too many": lambda ctx: lib.adaskip_kv_first_stale(ctx, 1, 0, ffi.new("int32_t *")),
}


REFUSED: dict[str, tuple[type[AdaSkipError], Callable[[Any], int]]] = {
    "no attention": (NotSkippableError, lambda ctx: prefill(ctx, skip_set(ATTENTION_0))),
    "no attention, later": (NotSkippableError, lambda ctx: schedule(ctx, [0, 4], NOTHING, ATTENTION_0)),
    "no attention, in a bulk": (NotSkippableError, lambda ctx: bulk_set_id(ctx, skip_set(ATTENTION_0))),
    **{
        f"a scale of {value}": (PlanError, lambda ctx, value=value: decode(ctx, skip_set(FFN_1, [value] * 6)))
        for value in (0.0, -1.0, NAN, INFINITY)
    },
    "a scale of 0 in a bulk": (PlanError, lambda ctx: bulk_set_id(ctx, skip_set(FFN_1, NOTHING))),
    **{
        f"a {make.__name__[:-1]} with {value}": (
            PlanError,
            lambda ctx, make=make, value=value: prefill(ctx, make(value=value)),
        )
        for make in (vectors, maps)
        for value in (NAN, INFINITY, -INFINITY)
    },
}


@pytest.mark.parametrize("what", [*BAD_CALLS, *REFUSED])
def test_a_bad_argument_is_an_error_with_a_message_and_changes_nothing(
    what: str, ctx: Any, llm: Any, in_force: SkipPlan
) -> None:
    error, call = REFUSED.get(what) or (NativeError, BAD_CALLS[what])

    def make() -> None:
        with pytest.raises(error, match="^layer [01]: " if what in REFUSED else "^[^;]+; ") as caught:
            llm._adaskip._check(call(ctx))
        assert caught.type is error
        assert lib.adaskip_n_layer(ctx) == 3 and message() == ""

    np.testing.assert_array_equal(answer(llm, in_force, make), answer(llm, in_force))


def test_what_stands_where_nothing_is_skipped_is_not_read(ctx: Any) -> None:
    for value in (0.0, -1.0, NAN, INFINITY):
        assert decode(ctx, skip_set(FFN_1, [value, 1, 1, 2, 1, value])) == OK
        assert prefill(ctx, vectors(value=value, skip=NOTHING)) == prefill(ctx, maps(value=value, skip=NOTHING)) == OK
    good = skip_set(FFN_1)
    good.n_rank = -5  # of which there are no maps
    assert prefill(ctx, good) == OK


def test_without_kv_for_every_attention_no_bulk_set_is_read(without_kv_1: Any) -> None:
    ctx = without_kv_1
    chosen = skip_set(ATTENTION_1)
    assert bulk_set_id(ctx, chosen) == KV_ELIDED
    steps, ids = ffi.new("struct adaskip_step[]", [(0, chosen[0])]), ffi.new("uint64_t[]", [1 << 31])
    plan = {"prefill": chosen, "decode": steps, "n_decode": 1, "readable": ids, "n_readable": 1}
    assert lib.adaskip_set_plan(ctx, ffi.new("struct adaskip_plan *", plan)) == KV_ELIDED
    assert prefill(ctx, chosen) == KV_ELIDED, "decode would run it"
    assert decode(ctx, chosen) == OK


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
