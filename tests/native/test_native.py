"""The C ABI refuses every bad argument with a code and a message, and goes on working."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from faults.abi_calls import Arguments
from oracles import skip_sets
from oracles.fixtures import Open
from oracles.tiny_families import N_EMBD, N_LAYER, tokens

from adaskip_cpp import SkipPlan
from adaskip_cpp.engine.binding import ffi, lib
from adaskip_cpp.engine.native import elide_kv
from adaskip_cpp.errors import AdaSkipError, NativeError, NotSkippableError, PlanError
from adaskip_cpp.model.plan import OnlineStage

OK, BAD_ARGUMENT, KV_ELIDED = 0, -1, -5
ON, ALL_TOKENS, VECTORS, ACTIVATIONS = 1, 2, 4, 8
NAN, INFINITY = float("nan"), float("inf")

# Sets as ``Arguments`` takes them, of 3 layers and vectors of 64 values.
NOTHING, FFN_1, ATTENTION_1 = {"skip": [0] * 6}, {"skip": [0, 0, 0, 1, 0, 0]}, {"skip": [0, 0, 1, 0, 0, 0]}
ATTENTION_0 = {"skip": [1, 0, 0, 0, 0, 0]}  # which Jamba has not, nor that of layer 2
LONGER = {"skip": [0], "n_layer": 4}

FIXED = skip_sets.skip_set((1,), (0,), 0.9, seed=1)
IN_FORCE = {
    "a schedule": skip_sets.same(FIXED, schedule=((0, FIXED), (3, skip_sets.skip_set((1,), (0, 2), seed=2)))),
    "an online stage": skip_sets.same(FIXED, online=OnlineStage(window=3, threshold=-1.0)),
}


@pytest.fixture
def llm(open_tiny: Open) -> Any:
    return open_tiny("jamba")


def context(llm: Any) -> Any:
    return ffi.cast("struct llama_context *", llm.ctx)


def set_plan(ctx: Any, plan: dict[str, Any]) -> int:
    arguments = Arguments(N_LAYER, N_EMBD)
    return int(lib.adaskip_set_plan(ctx, arguments.plan(plan)))


def bulk_set_ids(ctx: Any, bulk: dict[str, Any], **more: Any) -> int:
    arguments = Arguments(N_LAYER, N_EMBD)
    return int(lib.adaskip_bulk_set_ids(ctx, arguments.plan({"bulk": bulk, **more}), ffi.new("uint64_t *"), 1))


def schedule(*steps: tuple[int, dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"decode": [{"start": start, "set": each} for start, each in steps], **more}


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


MAP: dict[str, Any] = {**FFN_1, "down": [0.0], "up": [0.0], "n_rank": 2}
BAD_PLANS: dict[str, dict[str, Any]] = {
    "another length": {"prefill": LONGER},
    "a negative length": schedule((0, {**NOTHING, "n_layer": -3})),
    "no arrays": {"prefill": {"scale": None}},
    **{f"vectors of {n} values": {"prefill": {**FFN_1, "bias": [0.0], "n_embd": n}} for n in (63, 65, 0, -64)},
    "a map without its second half": {"prefill": {**MAP, "up": None}},
    "a map without its first half": {"prefill": {**MAP, "down": None}},
    **{f"a map of rank {rank}": schedule((0, {**MAP, "n_rank": rank})) for rank in (0, -2)},
    **{f"a map of vectors of {n} values": schedule((0, {**MAP, "n_embd": n})) for n in (63, 65, 0)},
    "a schedule without sets": {"n_decode": 1},
    "a schedule of negative length": schedule((0, NOTHING), n_decode=-1),
    "a schedule that does not start at 0": schedule((1, NOTHING)),
    "a schedule that descends": schedule((0, NOTHING), (5, FFN_1), (4, FFN_1)),
    "a schedule with two sets at once": schedule((0, NOTHING), (0, FFN_1)),
    "a schedule that runs an attention again": schedule((0, NOTHING), (2, ATTENTION_1), (4, FFN_1)),
    "a schedule of another length": schedule((0, NOTHING), (4, LONGER)),
    **{f"an online window of {n}": {"online": {"window": n}} for n in (0, -20)},
    **{f"an online threshold of {value}": {"online": {"threshold": value}} for value in (NAN, INFINITY)},
    **{f"an online scale of {n}": {"online": {"scale": n}} for n in (3, -1)},
    "readable sets that are not there": {"n_readable": 1},
    "a negative number of readable sets": {"readable": [0], "n_readable": -1},
}
BAD_BULKS: dict[str, dict[str, Any]] = {
    "another length": {"bulk": LONGER},
    "no arrays": {"bulk": {"scale": None}},
    "shorter vectors": {"bulk": {**FFN_1, "bias": [0.0], "n_embd": 63}},
    "a window of no tokens": {"bulk": FFN_1, "windowed": [0, 1, 0]},
}
NULL, ROOM = ffi.NULL, ffi.new("uint8_t[3]")
# Names of functions, and what follows the context.
BAD_ARGUMENTS: list[tuple[Any, ...]] = [
    ("get_counters", NULL),
    ("get_plan_tag", NULL),
    ("get_online", NULL),
    ("sublayers", NULL, 6),
    ("sublayers", ffi.new("struct adaskip_sublayer[5]"), 5),
    ("bulk_set_ids", NULL, ffi.new("uint64_t *"), 1),
    ("bulk_set_ids", ffi.new("struct adaskip_plan *"), NULL, 1),
    ("bulk_set_ids", ffi.new("struct adaskip_plan *"), ffi.new("uint64_t *"), -1),
    ("get_elided_kv", NULL, 3),
    ("get_elided_kv", ROOM, 2),
    *(("set_phase", phase) for phase in (4, -1)),
    ("set_statistics", ON, NULL, NULL),
    # Unknown ones, and those of statistics that are off.
    *(("set_statistics", flags, ignore, NULL) for flags in (ON | 16, -1, VECTORS, ACTIVATIONS, ALL_TOKENS)),
    ("kv_first_stale", 0, 0, NULL),
    *(("kv_first_stale", *of, ffi.new("int32_t *")) for of in ((0, 5), (-1, 0), (1, 0))),
]
BAD_CALLS: dict[str, Callable[[Any], int]] = {
    "elided KV of no layers": lambda ctx: lib.adaskip_elide_kv(ROOM, 0),
    "elided KV of negative layers": lambda ctx: lib.adaskip_elide_kv(NULL, -1),
    **{f"a plan with {what}": lambda ctx, plan=plan: set_plan(ctx, plan) for what, plan in BAD_PLANS.items()},
    **{f"a bulk with {what}": lambda ctx, plan=plan: bulk_set_ids(ctx, **plan) for what, plan in BAD_BULKS.items()},
    **{
        f"{name} {i}": lambda ctx, name=name, values=values: getattr(lib, f"adaskip_{name}")(ctx, *values)
        for i, (name, *values) in enumerate(BAD_ARGUMENTS)
    },
}
REFUSED: dict[str, tuple[type[AdaSkipError], Callable[[Any], int]]] = {
    "no attention": (NotSkippableError, lambda ctx: set_plan(ctx, {"prefill": ATTENTION_0})),
    "no attention, later": (NotSkippableError, lambda ctx: set_plan(ctx, schedule((0, NOTHING), (4, ATTENTION_0)))),
    "no attention, in a bulk": (NotSkippableError, lambda ctx: bulk_set_ids(ctx, ATTENTION_0)),
    **{
        f"{part} of {value}": (
            PlanError,
            lambda ctx, part=part, value=value: set_plan(ctx, schedule((0, {**MAP, part: [value]}))),
        )
        for part, values in {
            "scale": (0, -1, NAN, INFINITY),
            **dict.fromkeys(("bias", "down", "up"), (NAN, INFINITY, -INFINITY)),
        }.items()
        for value in values
    },
    "a scale of 0 in a bulk": (PlanError, lambda ctx: bulk_set_ids(ctx, {**FFN_1, "scale": [0]})),
}


@pytest.mark.parametrize("in_force", IN_FORCE.values(), ids=IN_FORCE.keys())
@pytest.mark.parametrize("what", [*BAD_CALLS, *REFUSED])
def test_a_bad_argument_is_an_error_with_a_message_and_changes_nothing(what: str, llm: Any, in_force: SkipPlan) -> None:
    error, call = REFUSED.get(what) or (NativeError, BAD_CALLS[what])
    ctx = context(llm)

    def make() -> None:
        with pytest.raises(error, match="^layer [01]: " if what in REFUSED else "^[^;]+; ") as caught:
            llm._adaskip._check(call(ctx))
        assert caught.type is error
        assert lib.adaskip_n_layer(ctx) == 3 and not ffi.string(lib.adaskip_last_error())

    np.testing.assert_array_equal(answer(llm, in_force, make), answer(llm, in_force))


def test_what_stands_where_nothing_is_skipped_is_not_read(llm: Any) -> None:
    ctx = context(llm)
    for value in (0.0, -1.0, NAN, INFINITY):
        assert set_plan(ctx, schedule((0, {**FFN_1, "scale": [value, 1, 1, 2, 1, value]}))) == OK
        for part in ({"bias": [value]}, {"down": [value], "up": [value], "n_rank": 2}):
            assert set_plan(ctx, {"prefill": {**NOTHING, **part}}) == OK
    assert set_plan(ctx, {"prefill": {**FFN_1, "n_rank": -5}}) == OK, "there are no maps of this rank"


def test_without_kv_for_every_attention_no_bulk_set_is_read(open_tiny: Open) -> None:
    with elide_kv(np.array([False, True, False])):
        ctx = context(open_tiny())
    both = schedule((0, ATTENTION_1), prefill=ATTENTION_1)
    assert bulk_set_ids(ctx, ATTENTION_1) == KV_ELIDED
    assert set_plan(ctx, {**both, "readable": [1 << 31]}) == KV_ELIDED
    assert set_plan(ctx, {"prefill": ATTENTION_1}) == KV_ELIDED, "decode would run it"
    assert set_plan(ctx, both) == OK


def test_no_context_is_an_error() -> None:
    for name, values in {
        "n_layer": (),
        "set_plan": (NULL,),
        "bulk_set_ids": (ffi.new("struct adaskip_plan *"), ffi.new("uint64_t *"), 1),
        "get_counters": (ffi.new("struct adaskip_counters *"),),
        "get_online": (ffi.new("struct adaskip_online_state *"),),
        "begin_request": (),
        "get_elided_kv": (ROOM, 3),
    }.items():
        assert getattr(lib, f"adaskip_{name}")(NULL, *values) == BAD_ARGUMENT
        assert ffi.string(lib.adaskip_last_error()) == b"the context is null"


def test_a_mask_of_elided_kv_is_of_one_thread_and_one_constructor(open_tiny: Open) -> None:
    with elide_kv(np.array([False, True, False])), ThreadPoolExecutor(1) as pool:
        whole = pool.submit(open_tiny).result()
    with pytest.raises(KeyError), elide_kv(np.array([False, True, False])):
        raise KeyError
    for llm in (whole, open_tiny()):
        assert llm._adaskip.elided_kv() == ()
