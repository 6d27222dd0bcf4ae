"""Which cached positions a plan may read: those of the whole model and of its own sets, if no attention is missing.

Oracles: a fresh model, which equals the one under test bit for bit where it evaluates the same batches, and the NumPy
pass.
"""

import ctypes
import itertools
import subprocess
import sys
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from oracles.fixtures import Open, Tiny
from oracles.readable import ATTENTION, FFN, MAPS, NOTHING, TOLERANCE, decode, evaluated, logits
from oracles.reference import ReferenceModel, ReferenceRun, Windows, relative_error
from oracles.skip_sets import arguments, same, skip_set
from oracles.stock import EXACT, environment
from oracles.tiny_families import N_EMBD, tokens

from adaskip_cpp import SkipPlan
from adaskip_cpp.errors import NativeError, NotSkippableError, PlanError, StateError
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


# -- which positions -------------------------------------------------------------------------------------------------


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


LEFT: dict[str, tuple[SkipPlan, list[SkipPlan | None]]] = {
    "decode": (SkipPlan(NOTHING, FFN), [SkipPlan(NOTHING, MAPS), SkipPlan(NOTHING, ATTENTION)]),
    "an online stage": (
        SkipPlan(NOTHING, NOTHING, online=OnlineStage(2, -1.0, "paper")),
        [None, SkipPlan(NOTHING, NOTHING), SkipPlan(NOTHING, NOTHING, online=OnlineStage(2, -0.9, "paper"))],
    ),
}


@pytest.mark.parametrize("what", LEFT)
def test_what_an_answer_left_is_read_by_its_own_plan_and_by_no_other(what: str, open_tiny: Open) -> None:
    # A chat's next turn. Before its window is full, an online stage leaves what the whole model does.
    plan, others = LEFT[what]
    whole = 9 if plan.online is None else 9 + plan.online.window
    for after, kept in ((plan, 14), *((other, whole) for other in others)):
        llm, full = open_tiny(under=plan), open_tiny()
        answer = list(itertools.islice(llm.generate(tokens(9), temp=0), 6))
        assert llm.online is None or llm.online.ffn == (0, 1, 2)
        llm.set_plan(after)
        turn = [*tokens(9), *answer, 7, 8]
        assert evaluated(llm, lambda: next(llm.generate(turn, temp=0))) == list(range(kept, 17))  # noqa: B023
        if kept < 14:
            full.eval(turn)
            np.testing.assert_allclose(logits(llm), logits(full), rtol=1e-4, atol=1e-5)


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


def test_a_sliding_window_that_is_still_there_is_not_read_from_the_start(open_tiny: Open) -> None:
    llm, full = (open_tiny("gemma3", swa_full=False) for _ in range(2))
    llm.eval(tokens(20))
    llm.set_plan(SkipPlan.manual(3, ffn=[1]))
    llm.eval([5])
    llm.set_plan(None)
    assert evaluated(llm, lambda: llm.eval([7])) == [20, 21]
    full.eval([*tokens(20), 5, 7])
    np.testing.assert_allclose(logits(llm), logits(full), rtol=1e-4, atol=1e-4)


def test_embeddings_given_instead_of_tokens_are_remembered_too(open_tiny: Open) -> None:
    llm = open_tiny(under=same(FFN))
    embeddings = 0.01 * np.add.outer(range(4), range(N_EMBD))
    assert decode(llm.ctx, [(0, i, 0, True) for i in range(4)], embeddings) == 0
    assert llm._adaskip.kv_valid("prefill", 4) == 4
    llm.set_plan(None)
    assert llm._adaskip.kv_valid("prefill", 4) == 0


# -- saved states ----------------------------------------------------------------------------------------------------


def test_the_bare_contexts_saved_sequences_carry_it(open_tiny: Open) -> None:
    llm, other = open_tiny(), open_tiny()
    llm.eval(tokens(4))
    llm.set_plan(same(FFN))
    llm.eval(tokens(5, seed=1))
    size = llama_cpp.llama_state_seq_get_size(llm.ctx, 0)
    data = (ctypes.c_uint8 * size)()
    assert llama_cpp.llama_state_seq_get_data(llm.ctx, data, size, 0) == size
    assert llama_cpp.llama_state_seq_set_data(other.ctx, data, size, 0) == size
    assert other._adaskip.kv_valid("prefill", 9) == 4
    other.set_plan(same(FFN))
    assert other._adaskip.kv_valid("prefill", 9) == 9


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


def test_states_of_the_whole_model_are_stocks_and_others_stock_refuses(
    tiny: Tiny, open_tiny: Open, tmp_path: Path
) -> None:
    names = []
    bulk = SkipPlan(NOTHING, NOTHING, bulk=Bulk(FFN, tail=1))
    for name, plan in (("whole", None), ("skipped", same(FFN)), ("bulk", bulk)):
        llm = open_tiny(under=plan)
        llm.eval(tokens(9))
        names.append(tmp_path / name)
        names[-1].write_bytes(llm.save_state().llama_state)
    command = [sys.executable, "-c", STOCK, str(tiny()), repr(EXACT), repr(tokens(9)), *map(str, names)]
    stock = subprocess.run(command, env=environment(), capture_output=True, check=True)
    assert [line for line in stock.stderr.decode().splitlines() if line in ("reads", "refuses")] == [
        "reads",
        "refuses",
        "refuses",
    ]
    assert stock.stdout == names[0].read_bytes()


# -- the bare context ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unified", [True, False])
def test_one_stale_sequence_fails_its_batch_and_no_other(unified: bool, bare: Open, reference: ReferenceModel) -> None:
    context, run = bare(unified=unified), ReferenceRun(reference)
    context.decode(s0=(0, tokens(5)))
    context.set_plan(same(FFN))
    context.decode(s1=(0, tokens(7)))
    context.set_plan(None)
    with pytest.raises(StateError, match="position 0 of sequence 1"):
        context.decode(s0=(5, [7]), s1=(7, [8]))
    run.eval(tokens(5))
    assert relative_error(context.decode(s0=(5, [7]))["s0"], run.eval([7]).logits) < TOLERANCE
    llama_cpp.llama_memory_seq_rm(context.memory, 1, 0, -1)
    fresh = ReferenceRun(reference).eval(tokens(7)).logits
    assert relative_error(context.decode(s1=(0, tokens(7)))["s1"], fresh) < TOLERANCE


@pytest.mark.parametrize("unified", [True, False])
def test_a_copied_sequence_is_read_as_the_one_it_is_of(unified: bool, bare: Open, reference: ReferenceModel) -> None:
    context, run = bare(unified=unified), ReferenceRun(reference)
    context.set_plan(same(ATTENTION))
    context.decode(s0=(0, tokens(9)))
    llama_cpp.llama_memory_seq_cp(context.memory, 0, 1, -1, -1)
    context.set_plan(None)
    with pytest.raises(StateError, match="sequence 1"):
        context.decode(s1=(9, [7]))
    context.set_plan(same(ATTENTION))
    run.eval(tokens(9), *arguments(ATTENTION))
    expected = run.eval([7], *arguments(ATTENTION)).logits
    assert relative_error(context.decode(s1=(9, [7]))["s1"], expected) < TOLERANCE


def test_shifted_positions_are_read_as_what_they_were(bare: Open, reference: ReferenceModel) -> None:
    # The whole model's positions 0 to 3 go, and those of a bulk move to where they were. test_several_sequences.py
    # draws plans for this, but none with windows.
    plan = SkipPlan(NOTHING, NOTHING, bulk=Bulk(ATTENTION, head=2, tail=3, windowed=(0, 2), window_size=4))
    context, run = bare(), ReferenceRun(reference)
    context.decode(s0=(0, tokens(4)))
    context.set_plan(plan)
    context.native.set_phase("bulk")
    context.decode(s0=(4, tokens(6, seed=1)))
    context.native.set_phase("prefill")
    llama_cpp.llama_memory_seq_rm(context.memory, 0, 0, 4)
    llama_cpp.llama_memory_seq_add(context.memory, 0, 4, -1, -4)
    context.set_plan(None)
    assert context.native.kv_valid("prefill", 6) == 0
    with pytest.raises(StateError, match="position 0 of sequence 0"):
        context.decode(s0=(6, [7]))
    context.native.set_plan(None, 99, [context.native.bulk_set_id(plan)])
    run.eval(tokens(4))
    run.eval(tokens(6, seed=1), *arguments(ATTENTION), keeps_kv=True, windows=Windows((0, 2), 4, 2))
    run.keep(np.arange(10) >= 4)
    run.positions -= 4
    assert relative_error(context.decode(s0=(6, [7]))["s0"], run.eval([7]).logits) < TOLERANCE


def test_divided_positions_are_read_as_what_they_were(bare: Open) -> None:
    # Against a fresh context: this llama.cpp moves divided keys the wrong way, with and without a plan.
    context, fresh = bare(), bare()
    for each in (context, fresh):
        each.set_plan(same(FFN))
        each.decode(s0=(0, tokens(8)))
        llama_cpp.llama_memory_seq_div(each.memory, 0, 0, -1, 2)
    context.set_plan(None)
    with pytest.raises(StateError, match="position 0 of sequence 0"):
        context.decode(s0=(4, [7]))
    context.set_plan(same(FFN))
    np.testing.assert_array_equal(context.decode(s0=(4, [7]))["s0"], fresh.decode(s0=(4, [7]))["s0"])


@pytest.mark.parametrize("name", ["a schedule", "an online stage"])
def test_what_counts_the_tokens_of_one_request_is_refused_for_several_sequences(
    name: str, bare: Open, reference: ReferenceModel
) -> None:
    context = bare()
    context.set_plan(same(FFN))
    with pytest.raises(PlanError, match=f"the plan has {name}.* for 2 sequences"):
        context.set_plan(PLANS[name])
    actual = context.decode(s0=(0, tokens(9)))["s0"]
    assert relative_error(actual, ReferenceRun(reference).eval(tokens(9), *arguments(FFN)).logits) < TOLERANCE


# -- all or nothing --------------------------------------------------------------------------------------------------


def test_a_refused_plan_leaves_the_one_in_force_and_the_logits_at_hand(open_tiny: Open) -> None:
    llm = open_tiny("jamba", under=same(FFN))  # whose layers 0 and 2 have no attention
    llm.eval(tokens(9))
    for bad in (same(skip_set((0,))), SkipPlan(FFN, skip_set((2,), (1, 2)))):
        with pytest.raises(NotSkippableError):
            llm.set_plan(bad)
        assert llm.plan == same(FFN)
    assert evaluated(llm, lambda: next(llm.generate(tokens(9), temp=0))) == []
    llm.set_plan(None)
    assert llm.plan is None


def test_a_closed_model_has_no_plan_to_tell(open_tiny: Open) -> None:
    llm = open_tiny()
    llm.close()
    with pytest.raises(NativeError, match="the model is closed; open it again"):
        llm.plan  # noqa: B018
