"""Every architecture family: sublayers found, nothing changed without a plan, and each one skipped.

The oracle is stock llama-cpp-python in another process, and needs no reference code: a sublayer skipped with
compensation 1 must equal the same model with that sublayer's output projection set to zero. Both are compared bit for
bit: adding zero changes no float, and all other operations are the same.
"""

import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_cpp import Llama
from oracles.fixtures import Open, Tiny
from oracles.reference import relative_error
from oracles.stock import OPTIONS, Job, eval_logits, run_stock
from oracles.tiny_families import FAMILIES, SKIPPABLE, tokens
from oracles.tiny_models import write_model

from adaskip_cpp import SkipPlan
from adaskip_cpp.errors import NotSkippableError
from adaskip_cpp.model.plan import Bulk
from adaskip_cpp.model.skip_set import KINDS, SkipSet

FLASH = {"flash_attn": True}
Q8_0 = {"type_k": 8, "type_v": 8, **FLASH}
LAST = {"logits_all": False}  # llama.cpp drops the other tokens' rows inside the last layer then: another graph

# Sublayers that cannot be taken out in every phase: no attention at all, or K and V that a later layer reads.
NOT_SKIPPABLE = {
    "mamba": {(layer, kind) for layer in range(3) for kind in ("attention", "ffn")},
    "jamba": {(0, "attention"), (2, "attention")},
    "lfm2": {(0, "attention"), (2, "attention")},
    "gemma4": {(0, "attention"), (1, "attention")},  # layer 2 reads the KV of layer 0, layer 3 that of layer 1
    "gemma4-per-layer": {(0, "attention"), (1, "attention")},
    "gemma3n": {(layer, kind) for layer in range(24) for kind in ("attention", "ffn")},  # mixes four streams
}
SHARED_KV = {"gemma4", "gemma4-per-layer"}  # those can be skipped where their K and V are kept


def cut(tokens: list[int]) -> list[list[int]]:
    """A prompt of 40 tokens in two pieces, the last 4 tokens one by one."""
    return [tokens[:29], tokens[29:36], *([token] for token in tokens[36:])]


@pytest.mark.parametrize(
    ("name", "changes"), [*((name, each) for name in FAMILIES for each in ({}, LAST)), ("llama", FLASH)]
)
def test_the_whole_model_equals_stock_and_sublayers_skipped_stock_on_the_zeroed_model(
    name: str, changes: dict[str, Any], tiny: Tiny, open_tiny: Open
) -> None:
    options = {**OPTIONS, **changes}
    llm = open_tiny(name, **options, exact_batches=True)
    rows = [row for row in llm.sublayers if row.in_bulk]
    assert rows or name in ("mamba", "gemma3n")
    # With no attention left, or none of one cache of a sliding-window model, the graph's inputs lose their readers.
    all_of_a_kind = [[row for row in rows if row.kind == kind and row.skippable] for kind in KINDS]
    groups = [*([row] for row in rows), *filter(None, all_of_a_kind)]
    zeroed = [[(row.layer, row.kind) for row in group] for group in groups]
    jobs = [Job(str(tiny(name, zero=each)), cut(tokens(40)), options) for each in ([], *zeroed)]
    whole, *expected = run_stock(jobs)
    np.testing.assert_array_equal(eval_logits(llm, cut(tokens(40))), whole)
    assert np.isfinite(whole).all()
    wrong = {}
    for group, logits in zip(groups, expected, strict=True):
        # Silencing a sublayer moves the logits by 0.2 to 1.4 of their norm; below 0.1 a wrong skip could hide.
        assert changes is LAST or np.linalg.norm(logits - whole) > 0.1 * np.linalg.norm(whole)
        if all(row.skippable for row in group):
            llm.set_plan(SkipPlan.manual(llm.n_layer, **{group[0].kind: [row.layer for row in group]}))
            actual = eval_logits(llm, cut(tokens(40)))
            if not np.array_equal(actual, logits):
                wrong[str(group)] = float(np.linalg.norm(actual - logits) / np.linalg.norm(logits))
    assert not wrong


@pytest.mark.parametrize(
    ("name", "changes"), [*((name, each) for name in FAMILIES for each in ({}, FLASH)), ("qwen3", Q8_0)]
)
def test_a_window_sees_the_same_cells_gathered_or_not(name: str, changes: dict[str, Any], open_tiny: Open) -> None:
    """In one ubatch, all cells are in use and read in place. Of two blocks of 256, small ones gather one at the end."""
    llm = open_tiny(name, **{**OPTIONS, **changes, "n_ctx": 512, "n_batch": 512, "n_ubatch": 512}, exact_batches=True)
    may = [row for row in llm.sublayers if row.windowable and not row.window]
    windowed = tuple(row.layer for row in may if row.layer < llm.n_layer_kv - 1)
    if not windowed:
        pytest.skip(f"{name} has no attention that could look back at a window and be read")
    none, logits = SkipSet.none(llm.n_layer), []
    for size, piece in ((500, 450), (50, 450), (50, 90)):
        llm.set_plan(SkipPlan(none, none, bulk=Bulk(none, windowed=windowed, window_size=size, tail=1)))
        llm.reset()
        for start in range(0, 450, piece):
            llm.eval_bulk(tokens(450)[start : start + piece])
        llm.eval(tokens(1, 1))
        logits.append(llm.scores[450].copy())
    whole, in_place, gathered = logits
    # What is gathered of a quantised cache is multiplied in F16. Flash attention sums other tiles.
    tolerance = 5e-3 if changes is Q8_0 else 1e-3 if changes else 1e-4
    assert relative_error(gathered, in_place) < tolerance and relative_error(in_place, whole) > 4 * tolerance


@pytest.mark.parametrize(
    ("name", "changes"), [*((name, {}) for name in FAMILIES), ("llama", FLASH), ("gemma3", FLASH), ("qwen3", Q8_0)]
)
def test_each_sublayer_skipped_in_the_bulk_leaves_the_memory_of_the_zeroed_model(
    name: str, changes: dict[str, Any], open_tiny: Open
) -> None:
    # What the bulk leaves is seen by the tail, which runs whole: on the memory of the zeroed model, whose K and V
    # weights are the same, it must give the same logits. Both memories are loaded, which puts their cells in order.
    bulk, tail = tokens(40)[:30], tokens(40)[30:]
    options = {**OPTIONS, **changes}
    llm, whole = open_tiny(name, **options), open_tiny(name, **options)
    rows = [row for row in llm.sublayers if row.in_bulk]
    assert rows or name in ("mamba", "gemma3n")
    wrong = {}
    for row in rows:
        zeroed = open_tiny(name, zero=[(row.layer, row.kind)], **options)
        zeroed.eval(bulk)
        Llama.load_state(whole, Llama.save_state(zeroed))
        whole.eval(tail)
        none = SkipSet.none(llm.n_layer)
        chosen = SkipPlan.manual(llm.n_layer, **{row.kind: [row.layer]}).prefill
        llm.set_plan(SkipPlan(none, none, bulk=Bulk(chosen, head=0, tail=len(tail))))
        llm.reset()
        llm.eval_bulk(bulk)
        Llama.load_state(llm, Llama.save_state(llm))
        llm.eval(tail)
        if not np.array_equal(llm.scores[30:40], whole.scores[30:40]):
            wrong[row.layer, row.kind] = float(np.abs(llm.scores[30:40] - whole.scores[30:40]).max())
    assert not wrong


@pytest.mark.parametrize("name", SKIPPABLE)
def test_a_skipped_sublayer_leaves_no_node(name: str, open_tiny: Open, open_model: Open, tmp_path: Path) -> None:
    # Without its first layer a model's graph is that of a model of one layer less, as llama.cpp builds it.
    llm, n_layer = open_tiny(name), SKIPPABLE[name].n_layer
    shallow = open_model(write_model(tmp_path / "shallow.gguf", name, n_layer=n_layer - 1))
    llm.set_plan(SkipPlan.manual(n_layer, [0], [0]))
    for each in (llm, shallow):
        each.eval(tokens(9))
    assert llm.counters.nodes == shallow.counters.nodes_full


@pytest.mark.parametrize("name", FAMILIES)
def test_every_sublayer_is_found_and_those_that_cannot_be_skipped_in_a_phase_are_refused_there(
    name: str, open_tiny: Open
) -> None:
    llm, expected = open_tiny(name), NOT_SKIPPABLE.get(name, set())
    rows, none = llm.sublayers, SkipSet.none(llm.n_layer)
    assert [(row.layer, row.kind) for row in rows] == list(itertools.product(range(llm.n_layer), KINDS))
    assert {(row.layer, row.kind) for row in rows if not row.skippable} == expected
    assert {(row.layer, row.kind) for row in rows if not row.in_bulk} == (set() if name in SHARED_KV else expected)
    assert all(bool(row.reason) != row.skippable for row in rows)
    if name == "gemma3n":
        told = {"the model keeps several residual streams, and each layer mixes all of them"}
        assert {row.reason for row in rows} == told
    for row in rows:
        everywhere = SkipPlan.manual(llm.n_layer, **{row.kind: [row.layer]})
        in_bulk = SkipPlan(none, none, bulk=Bulk(everywhere.prefill))
        for plan, is_taken in ((everywhere, row.skippable), (in_bulk, row.in_bulk)):
            with nullcontext() if is_taken else pytest.raises(NotSkippableError, match=f"layer {row.layer}"):
                llm.set_plan(plan)
            assert llm.plan == (plan if is_taken else None)
            llm.set_plan(None)
