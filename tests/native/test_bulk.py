"""The bulk of a prompt: skipped, with K and V kept; head, tail and answer whole. Against NumPy, and node by node.

test_sequences.py draws sets of all phases, and which tokens are in the bulk. test_architectures.py skips each sublayer
of every family, bit for bit. Tolerances: float32 against float64, and with Gemma's GELU a table in F16.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from oracles.bulks import NOTHING, TOLERANCE, chosen, plan
from oracles.expected import error, last_logits
from oracles.fixtures import Open
from oracles.reference import relative_error
from oracles.sequence_oracle import Cells
from oracles.skip_sets import filled
from oracles.tiny_families import N_LAYER, tokens

from adaskip_cpp import SkipPlan
from adaskip_cpp.errors import PlanError
from adaskip_cpp.model.plan import Bulk

F16 = 1  # GGML_TYPE_F16
REFERENCED = ["llama", "gemma3"]
FITTED = filled(chosen((2, 0), (1, 1)).skip, parts=["down", "up"])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_batch": 7},
        {"n_ubatch": 3},
        {"flash_attn": True},
        {"flash_attn": True, "type_k": F16, "type_v": F16},
        {"flash_attn": "prompts"},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [1, 5, 30])
@pytest.mark.parametrize("n", [90, 400])
@pytest.mark.parametrize("name", REFERENCED)
def test_attentions_look_back_at_a_window_in_the_bulk(
    name: str, n: int, size: int, options: dict[str, Any], both: Open
) -> None:
    """Where the cells in use are one block of 256, they are read in place; of two blocks, one is gathered."""
    options = {"n_ctx": 512, "n_ubatch": 100, **options} if n > 256 else options
    of = plan(chosen((2, 0), (0, 1)), windowed=(0, 1), window_size=size, tail=5)
    llm, expected = both(of, name, **options)
    for each in (llm, expected):
        each.eval(tokens(n)[:30])
        each.eval(tokens(n)[30:])
    # flash attention rounds to F16; in prompts alone, it computes ubatches of 64 and more tokens
    is_flash = options.get("flash_attn") is True or (n > 256 and options.get("flash_attn") == "prompts")
    tolerance = max(TOLERANCE[name], 1e-2 if is_flash else 0.0)
    assert error(llm, expected) < tolerance
    if name != "gemma3":  # the sliding layer after its full one sees 8 tokens alone, all of the tail
        cells = [replace(cell, windows=None) for cell in expected.cells]
        without = Cells(expected.reference.model).trace(cells, -1).logits
        assert relative_error(llm.scores[llm.n_tokens - 1][None], without) > 2 * tolerance


@pytest.mark.parametrize("swa_full", [True, False])
def test_a_sliding_window_becomes_smaller_and_never_larger(swa_full: bool, both: Open) -> None:
    """Layer 0 of the tiny Gemma sees 8 tokens. A small cache no longer has the head, which it would not see either."""
    rows = []
    for size in (3, 8, 20):
        of = plan(NOTHING, windowed=(0,), window_size=size)
        llm, expected = both(of, "gemma3", swa_full=swa_full, n_ctx=512, n_batch=5)
        assert [each.windowable for each in llm.sublayers if each.kind == "attention"] == [True] * 3
        assert not any(each.windowable for each in llm.sublayers if each.kind == "ffn")
        for each in (llm, expected):
            each.eval(tokens(300)[:200])
            each.eval(tokens(300)[200:])
        assert error(llm, expected) < TOLERANCE["gemma3"]
        rows.append(llm.scores[llm.n_tokens - 1].copy())
    smaller, equal, larger = rows
    assert relative_error(equal, larger) < 1e-6 and relative_error(smaller, equal) > 2 * TOLERANCE["gemma3"]


@pytest.mark.parametrize(("options", "n_nodes"), [({}, 9), ({"flash_attn": True, "type_k": F16, "type_v": F16}, 6)])
def test_a_window_adds_so_many_nodes_whatever_the_context_and_no_split(
    options: dict[str, Any], n_nodes: int, open_tiny: Open
) -> None:
    """View, gather, cast, reshape, permute of K and V for view and permute; a V that is transposed is turned round.

    Up to 256 cells are read in place.
    """
    llm = open_tiny(n_ctx=1024, n_batch=128, logits_all=False, **options)
    counted = list[list[tuple[int, int]]]()
    for windowed in ((2,), (1,), (0, 1)):  # nobody reads the last layer's attention
        llm.set_plan(plan(chosen((1, 1)), windowed=windowed, window_size=50))
        llm.reset()
        seen = set()
        for start in range(0, 1000, 125):
            llm.eval_bulk(tokens(1000)[start : start + 125])
            seen.add((llm.counters.nodes, llm.counters.splits))
        counted.append(sorted(seen))
    ((nodes, splits),), *others = counted
    assert splits > 0
    assert others == [[(nodes, splits), (nodes + n * n_nodes, splits)] for n in (1, 2)]


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
    for windowed, size in (((3,), 9), ((0,), 0)):
        with pytest.raises(PlanError):
            Bulk(NOTHING, windowed=windowed, window_size=size)


def test_a_bulk_has_fewer_nodes_and_more_than_where_k_and_v_are_not_kept(open_tiny: Open) -> None:
    """Of attentions but the last layer's, of which K and V are all that is left anyway."""
    llm = open_tiny(logits_all=False)
    skipped, nodes = SkipPlan.manual(N_LAYER, [0, 1]).prefill, []
    for of in (None, plan(skipped), SkipPlan(skipped, skipped)):
        llm.set_plan(of)
        llm.reset()
        llm.eval_bulk(tokens(20))
        nodes.append(llm.counters.nodes)
    whole, kept, dropped = nodes
    assert whole > kept > dropped


def test_the_middle_of_a_prompt_has_no_logits(both: Open) -> None:
    """All of each piece is bulk. The rest of the prompt sees it."""
    llm, expected = both(plan(chosen((0, 0), (1, 1), (2, 0))), n_batch=16)
    llm.scores[:] = 0
    for start, end in ((0, 20), (20, 21), (21, 45)):
        for each in (llm, expected):
            each.eval_bulk(tokens(50)[start:end])
        assert llm.n_tokens == end and llm.counters.nodes < llm.counters.nodes_full
    assert not np.any(llm.scores)
    for each in (llm, expected):
        each.eval(tokens(50)[45:])
    assert error(llm, expected, 45) < TOLERANCE["llama"]


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


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_with_fits_the_tail_before_its_last_64_tokens_has_the_windows_too(name: str, both: Open) -> None:
    """So have later fits, here those of the second prompt, which goes on after another text."""
    of = plan(FITTED, windowed=(0, 1), window_size=5, tail=90, refit=9)
    seen: list[list[int]] = []
    llm, expected = both(of, name, n_ctx=512)
    for new in (tokens(200), tokens(150, 1)):
        for each in (llm, expected):
            each.eval(new)
        seen.append([cell.windows is not None for cell in expected.cells])
        assert error(llm, expected) < TOLERANCE[name]
    assert seen[0] == [False] * 9 + [True] * 127 + [False] * 64
    assert sum(seen[1]) == 127 + 150 - 64 and not any(seen[1][-64:])
    llm.set_plan(None)
    assert llm._adaskip.kv_valid("prefill", 350) == 9, "the whole model reads no token that had a window"
