"""The bulk of a prompt: skipped, with K and V kept; head, tail and answer whole. Against NumPy, and node by node.

Tolerances are those of test_sequences.py: float32 against float64, and with Gemma's GELU a table in F16.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from oracles.bulks import NOTHING, TOLERANCE, chosen, phases, plan
from oracles.expected import error, last_logits
from oracles.fixtures import Open
from oracles.reference import relative_error
from oracles.sequence_oracle import Cells, History
from oracles.tiny_families import N_LAYER, tokens

from adaskip_cpp import SkipPlan
from adaskip_cpp.errors import NotSkippableError, PlanError
from adaskip_cpp.model.plan import Bulk
from adaskip_cpp.model.skip_set import SkipSet

F16 = 1  # GGML_TYPE_F16
REFERENCED = ["llama", "gemma3"]  # test_architectures.py has the others, bit for bit
SUBLAYERS = [(layer, kind) for layer in range(N_LAYER) for kind in (0, 1)]


def drawn(seed: int, attention: tuple[int, ...] = ()) -> SkipSet:
    """Each sublayer with probability a half, these attentions always."""
    skip = np.random.default_rng(seed).random((N_LAYER, 2)) < 0.5
    skip[list(attention), 0] = True
    return chosen(*map(tuple, np.argwhere(skip).tolist()), seed=seed)


def ask(llm: Any, expected: History, prompt: list[list[int]], answer: Iterable[int] = ()) -> None:
    """Have both read a prompt in pieces, and an answer token by token."""
    for piece in prompt:
        llm.eval(piece)
        expected.eval(piece)
    for token in answer:
        llm.eval_decode([token])
        expected.decode([token])


# -- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "kind"), SUBLAYERS)
@pytest.mark.parametrize("name", [*REFERENCED, "gptneox-parallel"])
def test_each_sublayer_can_be_skipped_in_the_bulk(name: str, layer: int, kind: int, both: Open) -> None:
    of = plan(chosen((layer, kind)))
    llm, expected = both(of, name, n_batch=16)
    ask(llm, expected, [tokens(50)], (7, 8, 9))
    assert error(llm, expected) < TOLERANCE[name]
    cells = [replace(cell, skip_set=NOTHING) for cell in expected.cells]
    without = Cells(expected.reference.model).trace(cells, -1).logits
    # Nobody reads what the last layer makes of the bulk; and Gemma's last layer looks back at 8 tokens alone.
    matters = relative_error(llm.scores[llm.n_tokens - 1][None], without) > 20 * TOLERANCE[name]
    assert matters == (layer < (1 if name == "gemma3" else 2))


@pytest.mark.parametrize("options", [{}, {"n_batch": 7}, {"n_ubatch": 3}, {"swa_full": False}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("seed", range(3))
def test_any_sets_in_all_phases_and_any_cut_give_the_reference(
    seed: int, name: str, options: dict[str, Any], both: Open
) -> None:
    prefill = drawn(seed) if seed else NOTHING
    of = plan(drawn(10 + seed, prefill.attention), prefill, drawn(20 + seed, prefill.attention), head=seed, tail=5)
    llm, expected = both(of, name, **options)
    text = tokens(60)  # each piece has a tail, the second and the last a bulk
    ask(llm, expected, [text[:1], text[1:17], text[17:22], text[22:]], (7, 8, 9))
    assert {cell.in_bulk for cell in expected.cells[:16]} == {cell.in_bulk for cell in expected.cells} == {True, False}
    assert error(llm, expected) < TOLERANCE[name]


@pytest.mark.parametrize(
    "options",
    [{}, {"n_batch": 7}, {"n_ubatch": 3}, {"flash_attn": True}, {"flash_attn": True, "type_k": F16, "type_v": F16}],
    ids=str,
)
@pytest.mark.parametrize("size", [1, 5, 30])
@pytest.mark.parametrize("name", REFERENCED)
def test_attentions_look_back_at_a_window_in_the_bulk(
    name: str, size: int, options: dict[str, Any], both: Open
) -> None:
    layers = (1,) if name == "gemma3" else (0, 1)  # Gemma's others have windows of their own
    of = plan(chosen((2, 0), (0, 1)), windowed=layers, window_size=size, tail=5)
    llm, expected = both(of, name, **options)
    ask(llm, expected, [tokens(90)[:30], tokens(90)[30:]])
    tolerance = max(TOLERANCE[name], 1e-2 if options.get("flash_attn") else 0.0)  # flash attention rounds to F16
    assert error(llm, expected) < tolerance
    if name != "gemma3":  # the sliding layer after its full one sees 8 tokens alone, all of the tail
        cells = [replace(cell, windows=None) for cell in expected.cells]
        without = Cells(expected.reference.model).trace(cells, -1).logits
        assert relative_error(llm.scores[llm.n_tokens - 1][None], without) > 2 * tolerance


def test_who_has_a_window_already_gets_no_other(open_tiny: Open) -> None:
    llm = open_tiny("gemma3")
    assert [each.windowable for each in llm.sublayers if each.kind == "attention"] == [False, True, False]
    assert not any(each.windowable for each in llm.sublayers if each.kind == "ffn")
    with pytest.raises(NotSkippableError, match="layer 0: the attention cannot look back at a window: it has one"):
        llm.set_plan(plan(NOTHING, windowed=(0,)))
    assert llm.plan is None


@pytest.mark.parametrize(("options", "n_nodes"), [({}, 9), ({"flash_attn": True, "type_k": F16, "type_v": F16}, 6)])
def test_a_window_adds_so_many_nodes_whatever_the_context_and_no_split(
    options: dict[str, Any], n_nodes: int, open_tiny: Open
) -> None:
    """View, gather, cast, reshape, permute of K and V for view and permute; a V that is transposed is turned round."""
    llm = open_tiny(n_ctx=1024, n_batch=128, logits_all=False, **options)
    counted = []
    for windowed in ((2,), (1,), (0, 1)):  # nobody reads the last layer's attention
        llm.set_plan(plan(chosen((1, 1)), windowed=windowed, window_size=50))
        llm.reset()
        seen = set()
        for start in range(0, 1000, 125):
            llm.eval_bulk(tokens(1000)[start : start + 125])
            seen.add((llm.counters.nodes, llm.counters.splits))
        counted.extend(seen)
    (nodes, splits), *others = counted
    assert splits > 0 and others == [(nodes + n_nodes, splits), (nodes + 2 * n_nodes, splits)]


@pytest.mark.parametrize(
    "changes",
    [{"window_size": 90}, {"window_size": 2**31 - 1}, {"head": 2**31 - 1}, {"window_size": 2**31 - 1, "head": 9}],
    ids=str,
)
def test_a_window_or_a_head_of_any_size_sees_what_there_is(changes: dict[str, Any], open_tiny: Open) -> None:
    llm, logits = open_tiny(), []
    for windowed in ((), (0, 1, 2)):
        llm.set_plan(plan(NOTHING, **{"windowed": windowed, "window_size": 1, **changes}))
        for evaluate, first in ((llm.eval, 0), (llm.eval_bulk, 90)):
            llm.reset()
            evaluate(tokens(90))
            llm.eval(tokens(9, 1))
            logits.append(llm.scores[first:99].copy())
    for whole, windowed in (logits[::2], logits[1::2]):
        assert relative_error(windowed, whole) < 1e-6  # other products of the same numbers


def test_impossible_windows_are_refused() -> None:
    with pytest.raises(PlanError, match="the model has no attention of layer 3"):
        Bulk(NOTHING, windowed=(3,))
    with pytest.raises(PlanError, match="window_size is 0; use a whole number from 1 on"):
        Bulk(NOTHING, windowed=(0,), window_size=0)


def test_a_map_whose_half_is_zero_is_no_map(open_tiny: Open) -> None:
    full, nodes = chosen((1, 0), (1, 1), bias=False), []
    up = full.up.copy()
    up[1, 1] = 0
    llm = open_tiny(logits_all=False)
    for each in (full, SkipSet(full.skip, full.scale, None, full.down, up), SkipSet(full.skip, full.scale)):
        of = plan(each)
        llm.set_plan(of)
        llm.eval_bulk(tokens(20))
        nodes.append(llm.counters.nodes)
    assert nodes[0] == nodes[1] + 3 == nodes[2] + 6  # two products and a sum each


def test_a_bulk_has_fewer_nodes_and_more_than_where_k_and_v_are_not_kept(open_tiny: Open) -> None:
    """Of attentions but the last layer's, of which K and V are all that is left anyway."""
    llm = open_tiny(logits_all=False)
    for attention in ([0], [0, 1]):
        skipped = SkipPlan.manual(N_LAYER, attention).prefill
        nodes = []
        for of in (None, plan(skipped), SkipPlan(skipped, skipped)):
            llm.set_plan(of)
            llm.reset()
            llm.eval_bulk(tokens(20))
            nodes.append(llm.counters.nodes)
        whole, kept, dropped = nodes
        assert whole > kept > dropped


# -- which tokens are in the bulk ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_tokens", "head", "tail", "bulk"),
    [
        (50, 4, 16, range(4, 34)),
        (50, 0, 16, range(34)),
        (50, 0, 1, range(49)),
        (21, 4, 16, range(4, 5)),
        (20, 4, 16, ()),
        (9, 4, 16, ()),
        (3, 4, 1, ()),
        (50, 60, 1, ()),
    ],
)
def test_the_bulk_is_what_is_neither_head_nor_tail(
    n_tokens: int, head: int, tail: int, bulk: Any, open_tiny: Open
) -> None:
    llm = open_tiny(n_batch=16, under=plan(chosen((1, 1)), head=head, tail=tail))
    seen = phases(llm, lambda: llm.eval(tokens(n_tokens)))
    assert seen.pop("bulk", []) == list(bulk)
    assert seen == {"prefill": [i for i in range(n_tokens) if i not in bulk]}


def test_the_head_is_that_of_the_sequence_and_each_call_has_a_tail(open_tiny: Open) -> None:
    llm = open_tiny(under=plan(chosen((1, 1))))
    assert phases(llm, lambda: llm.eval(tokens(3))) == {"prefill": [0, 1, 2]}
    assert phases(llm, lambda: llm.eval(tokens(20)))["bulk"] == list(range(4, 15))
    assert phases(llm, lambda: llm.eval(tokens(8))) == {"prefill": list(range(23, 31))}
    assert phases(llm, lambda: llm.eval(tokens(10))) == {"bulk": [31, 32], "prefill": list(range(33, 41))}


@pytest.mark.parametrize(
    "of",
    [plan(chosen((0, 0), (1, 1), (2, 0))), SkipPlan.manual(N_LAYER, [1], [2], scale=0.9), None],
    ids=["a bulk", "no bulk", "no plan"],
)
def test_whoever_asks_for_logits_or_calls_prefill_a_bulk_leaves_the_same_kv(
    of: SkipPlan | None, open_tiny: Open
) -> None:
    states = []
    for logits_all, call in ((True, "eval"), (False, "eval"), (False, "eval_bulk")):
        llm = open_tiny(n_batch=16, logits_all=logits_all, under=of)
        if call == "eval" or of is None or of.bulk is None:
            getattr(llm, call)(tokens(50)[:32])
            llm.eval(tokens(50)[32:])
            states.append(bytes(llm.save_state().llama_state))
    assert len(states) > 1 and len(set(states)) == 1


@pytest.mark.parametrize("logits_all", [False, True])
def test_a_bulk_can_be_evaluated_in_pieces(logits_all: bool, both: Open) -> None:
    """All of each piece is bulk, and no logits are computed for it."""
    of = plan(chosen((0, 0), (1, 1), (2, 0)))
    llm, expected = both(of, n_batch=16, logits_all=logits_all)
    llm.scores[:] = 0
    for start, end in ((0, 20), (20, 21), (21, 45)):
        for each in (llm, expected):
            each.eval_bulk(tokens(50)[start:end])
        assert llm.n_tokens == end and llm.counters.nodes < llm.counters.nodes_full
    assert not np.any(llm.scores)
    for each in (llm, expected):
        each.eval(tokens(50)[45:])
    assert relative_error(last_logits(llm)[None], expected.trace().logits) < TOLERANCE["llama"]


@pytest.mark.parametrize("family", REFERENCED)
def test_masks_that_nobody_reads_may_grow_with_the_context(family: str, both: Open) -> None:
    """llama.cpp writes them all the same: of attentions that are all skipped, one for 256 cells, then one for 512.

    No node of the graph grows then, so that ggml kept the memory of the small one, and where K and V go was lost.
    """
    of = plan(chosen(*((layer, 0) for layer in range(N_LAYER)), bias=False))
    llm, expected = both(of, family, n_ctx=512, n_batch=32, logits_all=False)
    for each in (llm, expected):
        each.eval(tokens(400))
    assert relative_error(last_logits(llm)[None], expected.trace().logits) < TOLERANCE[family]
