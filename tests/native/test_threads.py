"""Contexts in two threads compute what each computes alone, to the bit. `make test-tsan` runs it under a sanitizer."""

import ctypes
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier
from typing import Any

import llama_cpp
import numpy as np
import pytest
from oracles.every_plan import every_plan
from oracles.fixtures import Open
from oracles.readable import decode
from oracles.tiny_families import N_EMBD, N_LAYER, N_VOCAB

from adaskip_cpp import SkipPlan
from adaskip_cpp.engine.native import NativeContext, elide_kv

N_ROUNDS = 12
Plans = Sequence[SkipPlan | None]
Results = list[np.ndarray]

PLANS: Plans = [*every_plan(N_LAYER, N_EMBD).values()]
ELIDED: Plans = [plan for plan in PLANS if plan is not None and N_LAYER - 1 in plan.without_kv]


@contextmanager
def new_context(model: Any, elided: bool) -> Iterator[Any]:
    """A ``llama_context`` that no other object knows, without KV for the last layer if it is elided."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 256, 1, 1
    with elide_kv(np.arange(N_LAYER) == N_LAYER - 1 if elided else None):
        ctx = llama_cpp.llama_init_from_model(model, params)
    try:
        yield ctx
    finally:
        llama_cpp.llama_free(ctx)


def logits_after(ctx: Any, start: int, tokens: Sequence[int]) -> np.ndarray:
    """The logits after the last of these tokens, which stand at the positions from ``start`` on."""
    assert decode(ctx, [(0, start + i, token, i + 1 == len(tokens)) for i, token in enumerate(tokens)]) == 0
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(ctx, -1), (N_VOCAB,)).copy()


def use(model: Any, plans: Plans, elided: bool, seed: int) -> Results:
    """Opens a context and answers under one plan after the other; all logits and statistics of that."""
    results: Results = []
    tokens = np.random.default_rng(seed).integers(3, N_VOCAB, 20).tolist()
    with new_context(model, elided) as ctx:
        native, memory = NativeContext(int(ctx)), llama_cpp.llama_get_memory(ctx)
        for i in range(N_ROUNDS):
            plan = plans[(i + seed) % len(plans)]
            native.set_plan(plan, 0 if plan is None else i + 1)
            if i % 2:
                native.start_statistics(lambda batch: results.append(batch.dot), keep_logits=True, activations=False)
            native.set_phase(plan.prompt_phase if plan else "prefill")
            results.append(logits_after(ctx, 0, tokens[:12]))
            native.begin_request()
            native.set_phase("decode")
            results.extend(logits_after(ctx, position, tokens[position : position + 1]) for position in range(12, 20))
            if i % 2:
                native.stop_statistics()
            llama_cpp.llama_memory_clear(memory, True)
    return results


@contextmanager
def unordered() -> Iterator[None]:
    """Between the calls of two threads lies Python's lock; ThreadSanitizer, if it runs, takes no order from that."""
    process = ctypes.CDLL(None) if os.name == "posix" else None
    is_watched = hasattr(process, "AnnotateIgnoreSyncBegin")
    if is_watched:
        process.AnnotateIgnoreSyncBegin(None, 0)
    try:
        yield
    finally:
        if is_watched:
            process.AnnotateIgnoreSyncEnd(None, 0)


@pytest.mark.parametrize("elided", [False, True], ids=["all KV", "elided KV"])
@pytest.mark.parametrize("same_model", [True, False], ids=["one model", "two models"])
def test_two_contexts_in_threads_compute_what_each_does_alone(same_model: bool, elided: bool, open_tiny: Open) -> None:
    model = open_tiny().model
    work = [
        (model, PLANS, False, 0),
        (model if same_model else open_tiny("qwen3").model, ELIDED if elided else PLANS, elided, 1),
    ]
    alone = [use(*each) for each in work]
    both = Barrier(2, timeout=60)

    def use_at_once(*each: Any) -> Results:
        both.wait()
        with unordered():
            return use(*each)

    with ThreadPoolExecutor(2) as pool:
        together = [*pool.map(use_at_once, *zip(*work, strict=True))]
    for actual, expected in zip(together, alone, strict=True):
        for each, right in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(each, right)
