"""Which cached positions a plan may read: those of the whole model, of its own sets, and of the bulks that it names.

test_sequences.py and test_several_sequences.py draw more. Oracles: a fresh model, counts, the bytes of saved states.
"""

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles.fixtures import Open, Tiny
from oracles.readable import ATTENTION, FFN, MAPS, NOTHING, decode, evaluated, logits
from oracles.skip_sets import same, skip_set
from oracles.stock import EXACT, environment
from oracles.tiny_families import N_EMBD, N_LAYER, tokens

from adaskip_cpp import SkipPlan
from adaskip_cpp.errors import NativeError
from adaskip_cpp.model.plan import Bulk, OnlineStage
from adaskip_cpp.model.skip_set import SkipSet

PLANS: dict[str, SkipPlan | None] = {
    "the whole model": None,
    "an FFN": same(FFN),
    "an FFN with a scale": same(skip_set(ffn=(1, 2), scale=0.9)),
    "an attention": same(ATTENTION),
    "vectors and maps": same(MAPS),
    "other maps": same(skip_set(ffn=(1,), seed=2)),
    "one other value": same(SkipSet(MAPS.skip, MAPS.scale, MAPS.bias * np.float32(1.001), MAPS.down, MAPS.up)),
    "decode alone": SkipPlan(NOTHING, FFN),
    "a schedule": same(FFN, schedule=((0, FFN), (2, ATTENTION))),
    "an online stage": same(FFN, online=OnlineStage(2, -1.0, "paper")),
    "another online stage": same(FFN, online=OnlineStage(3, -1.0, "paper")),
}


@pytest.mark.parametrize("after", PLANS)
@pytest.mark.parametrize("before", [name for name in PLANS if name != "decode alone"])
def test_a_prompt_under_another_plan_is_evaluated_again(before: str, after: str, open_tiny: Open) -> None:
    # Unless the whole model read it, or its set is one of the new plan's: then its last token alone is, for its logits.
    old, new = PLANS[before], PLANS[after]
    llm, fresh = open_tiny(under=old), open_tiny(under=new)
    next(llm.generate(tokens(20), temp=0))
    llm.set_plan(new)
    own = [] if new is None else [new.prefill, *(each for _, each in new.decode_sets)]
    keeps = old is None or (old.prefill in own and set(old.prefill.attention) <= set(new.prefill.attention))
    positions = evaluated(llm, lambda: next(llm.generate(tokens(20), temp=0)))
    assert positions == ([] if before == after else [19] if keeps else list(range(20)))
    if not keeps:
        next(fresh.generate(tokens(20), temp=0))
        np.testing.assert_array_equal(logits(llm), logits(fresh))


def test_an_equal_plan_reads_what_it_computed_before(open_tiny: Open) -> None:
    # By its contents: other objects, whose vectors were uploaded anew. Values of sublayers that run are no part of it.
    bias = MAPS.bias.copy()
    bias[0] = 5.0
    other = SkipSet(MAPS.skip, np.where(MAPS.skip, MAPS.scale, 3.0), bias, MAPS.down, MAPS.up)
    for again in (skip_set(ffn=(1,), seed=1), other):
        llm = open_tiny(under=same(MAPS))
        llm.eval(tokens(9))
        llm.set_plan(None)
        llm.set_plan(same(again))
        assert evaluated(llm, lambda: llm.eval([7])) == [9]  # noqa: B023


def test_embeddings_given_instead_of_tokens_are_remembered_too(open_tiny: Open) -> None:
    llm = open_tiny(under=same(FFN))
    embeddings = 0.01 * np.add.outer(range(4), range(N_EMBD))
    assert decode(llm.ctx, [(0, i, 0, True) for i in range(4)], embeddings) == 0
    assert llm._adaskip.kv_valid("prefill", 4) == 4
    llm.set_plan(None)
    assert llm._adaskip.kv_valid("prefill", 4) == 0


HEAD, TAIL, N = 2, 3, 20


def prompt_plan(chosen: SkipSet, **around: Any) -> SkipPlan:
    return SkipPlan(NOTHING, NOTHING, bulk=Bulk(chosen, **{"head": HEAD, "tail": TAIL, **around}))


BULKS = {
    "an FFN": prompt_plan(FFN),
    "an attention": prompt_plan(ATTENTION),
    "vectors and maps": prompt_plan(MAPS),
    "windows": prompt_plan(NOTHING, windowed=(0, 2), window_size=4),
    "windows beside a skipped attention": prompt_plan(ATTENTION, windowed=(0,), window_size=4),
}
READERS: dict[str, SkipPlan | None] = {
    "the whole model": None,
    "another bulk": prompt_plan(skip_set(ffn=(0,), scale=0.9)),
    "a bulk of the same set and other windows": prompt_plan(ATTENTION, windowed=(2,), window_size=3),
    "a plan that skips everywhere": same(ATTENTION),
}


@pytest.mark.parametrize("after", READERS)
@pytest.mark.parametrize("before", BULKS)
def test_a_bulk_is_read_by_the_plans_that_name_it_and_by_no_other(before: str, after: str, open_tiny: Open) -> None:
    llm, others = open_tiny(under=BULKS[before]), [plan for name, plan in BULKS.items() if name != before]
    llm.eval(tokens(N))
    llm.set_plan(READERS[after], readable=[*others, BULKS[before]])
    assert evaluated(llm, lambda: llm.eval([7])) == [N]
    llm.set_plan(READERS[after], readable=others)
    # The positions in front of the bulk are of the whole model, and any plan reads them.
    assert evaluated(llm, lambda: llm.eval([8])) == list(range(HEAD, N + 2))


def test_a_set_without_k_and_v_is_not_taken_for_the_same_set_in_a_bulk_that_is_named(open_tiny: Open) -> None:
    llm = open_tiny(under=same(ATTENTION))
    llm.eval(tokens(N))
    llm.set_plan(None, readable=[BULKS["an attention"]])
    assert evaluated(llm, lambda: llm.eval([7])) == list(range(N + 1))


def test_equal_plans_change_nothing_also_in_a_pickled_model(open_tiny: Open) -> None:
    first, second = BULKS["an FFN"], BULKS["vectors and maps"]
    llm = open_tiny()
    llm.set_plan(first, readable=[second, first])
    llm.eval(tokens(N))
    tag = llm._adaskip.plan_tag()
    copies = [pickle.loads(pickle.dumps(plan)) for plan in (first, first, second)]
    llm.set_plan(copies[0], readable=copies)
    assert llm._adaskip.plan_tag() == tag
    assert evaluated(llm, lambda: next(llm.generate(tokens(N), temp=0))) == []
    llm.set_plan(None, readable=[second, same(FFN), prompt_plan(NOTHING)])
    other = pickle.loads(pickle.dumps(llm))
    assert (llm.plan, llm.readable) == (other.plan, other.readable) == (None, (second,)), "others leave no bulk"
    other.close()


def test_the_id_tells_what_a_position_of_the_bulk_was_computed_with(open_tiny: Open) -> None:
    # The head counts where windows begin with it; the tail never does, nor the window of what is skipped.
    llm: Any = open_tiny()

    def id_of(plan: SkipPlan) -> int:
        return int(llm._adaskip.bulk_set_ids([plan])[0])

    windows, ffn = BULKS["windows"], BULKS["an FFN"]
    assert id_of(prompt_plan(FFN, head=7, tail=9)) == id_of(ffn)
    assert id_of(replace(windows, bulk=replace(windows.bulk, head=7))) != id_of(windows)
    assert id_of(replace(windows, bulk=replace(windows.bulk, tail=9))) == id_of(windows)
    assert id_of(prompt_plan(ATTENTION, windowed=(1,))) == id_of(BULKS["an attention"]) != 0
    assert id_of(prompt_plan(NOTHING)) == id_of(same(FFN)) == 0, "the whole model"


@pytest.mark.parametrize("phase", ["both", "bulk"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "jamba"])
def test_a_saved_state_is_read_where_its_plan_is_named_and_nowhere_else(
    family: str, phase: Any, open_tiny: Open
) -> None:
    plan, other = (SkipPlan.manual(N_LAYER, ffn=[1], scale=s, phase=phase) for s in (1.0, 0.9))
    reader, named = (other, [plan]) if phase == "bulk" else (plan, [])
    saver, loader, without = (open_tiny(family) for _ in range(3))
    saver.set_plan(plan)
    saver.eval_bulk(tokens(9))
    state = pickle.loads(pickle.dumps(saver.save_state()))
    for llm in (loader, without):
        llm.load_state(state)
    for llm in (saver, loader):
        llm.set_plan(reader, readable=named)
    without.set_plan(other)
    assert evaluated(loader, lambda: loader.eval([7])) == [9]
    assert evaluated(without, lambda: without.eval([7])) == list(range(10))
    saver.eval([7])
    np.testing.assert_allclose(logits(loader), logits(saver), rtol=1e-4, atol=1e-4)  # gemma3's cells lie elsewhere


STOCK = """
import sys
import llama_cpp
assert "adaskip_cpp" not in sys.modules
llm = llama_cpp.Llama(sys.argv[1], n_ctx=128, logits_all=True, verbose=False, **eval(sys.argv[2]))
llm.eval(eval(sys.argv[3]))
sys.stdout.buffer.write(llm.save_state().llama_state)
for name in sys.argv[4:]:
    data = open(name, "rb").read()
    buffer = (llama_cpp.ctypes.c_uint8 * len(data)).from_buffer_copy(data)
    is_read = llama_cpp.llama_state_set_data(llm.ctx, buffer, len(data)) == len(data)
    print("reads" if is_read else "refuses", file=sys.stderr)
"""


def test_states_of_the_whole_model_are_stocks_and_no_others(tiny: Tiny, open_tiny: Open, tmp_path: Path) -> None:
    names = []
    for name, plan in (("whole", None), ("skipped", same(FFN)), ("bulk", prompt_plan(FFN))):
        llm = open_tiny(under=plan)
        llm.eval(tokens(9))
        names.append(tmp_path / name)
        names[-1].write_bytes(llm.save_state().llama_state)
    command = [sys.executable, "-c", STOCK, str(tiny()), repr(EXACT), repr(tokens(9)), *map(str, names)]
    stock = subprocess.run(command, env=environment(), capture_output=True, check=True)
    said = [line for line in stock.stderr.decode().splitlines() if line in ("reads", "refuses")]
    assert said == ["reads", "refuses", "refuses"]
    assert stock.stdout == names[0].read_bytes()


def test_a_closed_model_has_no_plan_to_tell(open_tiny: Open) -> None:
    llm = open_tiny()
    llm.close()
    with pytest.raises(NativeError, match="the model is closed; open it again"):
        llm.plan  # noqa: B018
