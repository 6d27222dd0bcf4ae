"""What nobody reads is not computed: a batch without outputs ends at its last store into the memory.

Against stock llama-cpp-python and against the same calls with all outputs: the whole saved state and the logits are
equal bit for bit, as the rows of a batch do not depend on what is computed behind them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from reference import relative_error
from stock import EXACT, Job, run_stock
from tiny_families import FAMILIES

from adaskip_cpp import SkipPlan

SHARED_KV = ("gemma3n", "gemma4", "gemma4-per-layer")
N_BATCH = 16


def decode(llm: Any, tokens: list[int], *, reads_all: bool) -> list[tuple[int, int]]:
    """A prompt in batches of which only the last is read, or all; nodes of each graph as built and as computed."""
    nodes = []
    for start in range(0, len(tokens), N_BATCH):
        batch = tokens[start : start + N_BATCH]
        llm._batch.set_batch(batch=batch, n_past=start, logits_all=False)
        llm._batch.batch.logits[len(batch) - 1] = reads_all or start + N_BATCH >= len(tokens)
        llm._ctx.decode(llm._batch)
        nodes.append((llm.counters.nodes_full, llm.counters.nodes))
    return nodes


def last_logits(llm: Any) -> np.ndarray:
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),)).copy()


@pytest.mark.parametrize("name", [*FAMILIES])
def test_state_and_logits_are_those_of_batches_that_are_read(
    name: str, tiny: Callable[..., Path], tokens: Callable[..., list[int]], open_model: Callable[..., Any]
) -> None:
    results = []
    for reads_all in (True, False):
        llm = open_model(tiny(name), n_batch=N_BATCH, logits_all=False)
        nodes = decode(llm, tokens(40), reads_all=reads_all)
        results.append((bytes(llm.save_state().llama_state), last_logits(llm)))
        assert [full > computed for full, computed in nodes] == [not reads_all, not reads_all, False]
    (state, logits), (unread_state, unread_logits) = results
    assert unread_state == state
    assert np.array_equal(unread_logits, logits)


@pytest.mark.parametrize("name", ["llama", *SHARED_KV])
def test_more_dies_the_more_layers_share_kv(
    name: str, tiny: Callable[..., Path], tokens: Callable[..., list[int]], open_model: Callable[..., Any]
) -> None:
    """Of the layers above the last that has KV of its own, no node is left; of that one, K and V alone."""
    family = FAMILIES[name]
    n_kv = {"llama": family.n_layer, "gemma3n": 20}.get(name, family.n_layer - 2)
    llm = open_model(tiny(name), n_batch=N_BATCH, logits_all=False)
    (full, unread), *_ = decode(llm, tokens(40), reads_all=False)
    per_layer = full / family.n_layer
    assert full - unread > (family.n_layer - n_kv) * per_layer / 2
    assert llm.n_layer_kv == n_kv


@pytest.mark.parametrize("exact_batches", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma3", *SHARED_KV])
def test_a_prompt_is_that_of_stock(
    name: str,
    exact_batches: bool,
    tiny: Callable[..., Path],
    tokens: Callable[..., list[int]],
    open_model: Callable[..., Any],
) -> None:
    """Bit for bit, and where KV is shared that of stock given the last token by itself, unless batches are exact."""
    prompt, answer = tokens(40), [[token] for token in tokens(6, seed=1)[1:]]
    alone = name in SHARED_KV and not exact_batches
    cut = [prompt[:-1], prompt[-1:]] if alone else [prompt]
    [stock] = run_stock([Job(str(tiny(name)), [*cut, *answer], {"n_ctx": 128, "n_batch": N_BATCH, **EXACT})])
    llm = open_model(tiny(name), n_batch=N_BATCH, logits_all=False, exact_batches=exact_batches)
    for piece, expected in zip([prompt, *answer], stock[len(cut) - 1 :], strict=True):
        llm.eval(piece)
        assert np.array_equal(last_logits(llm), expected)


@pytest.mark.parametrize("name", SHARED_KV)
def test_a_last_token_by_itself_differs_by_rounding(
    name: str, tiny: Callable[..., Path], tokens: Callable[..., list[int]]
) -> None:
    """Stock against stock, cut in two ways: 3e-7 in Gemma 4, 6e-5 in Gemma 3n, whose sparse FFNs turn on thresholds."""
    options = {"n_ctx": 128, "n_batch": N_BATCH, **EXACT}
    prompt = tokens(40)
    whole, cut = run_stock([Job(str(tiny(name)), pieces, options) for pieces in ([prompt], [prompt[:-1], prompt[-1:]])])
    assert relative_error(cut[-1:], whole[-1:]) < (5e-4 if name == "gemma3n" else 1e-5)


def test_all_logits_are_there_where_all_are_asked_for(
    tiny: Callable[..., Path], tokens: Callable[..., list[int]], open_model: Callable[..., Any]
) -> None:
    prompt = tokens(40)
    options = {"n_ctx": 128, "n_batch": N_BATCH, "logits_all": True, **EXACT}
    [stock] = run_stock([Job(str(tiny()), [prompt], options)])
    llm = open_model(tiny(), n_batch=N_BATCH)
    llm.eval(prompt)
    assert np.array_equal(llm.scores[: len(prompt)], stock)


def test_statistics_and_plans_go_with_batches_that_nobody_reads(
    tiny: Callable[..., Path], tokens: Callable[..., list[int]], open_model: Callable[..., Any]
) -> None:
    """The same plan, with and without all logits, leaves the same KV; statistics see every token."""
    plan = SkipPlan.manual(FAMILIES["llama"].n_layer, [1], [2], scale=0.9)
    states, seen = [], []
    for logits_all in (True, False):
        llm = open_model(tiny(), n_batch=N_BATCH, logits_all=logits_all)
        llm.set_plan(plan)
        with llm.collect_statistics(lambda batch: seen.append(batch.dot[0, 0]), keep_logits=True):
            llm.eval(tokens(40))
        states.append(bytes(llm.save_state().llama_state))
    assert states[0] == states[1]
    half = len(seen) // 2
    assert np.array_equal(np.concatenate(seen[:half]), np.concatenate(seen[half:]))
