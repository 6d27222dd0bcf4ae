"""Which cached positions a plan may read: those of the whole model and of its own sets, if no attention is missing.

Oracles: a fresh model, which equals the one under test bit for bit where it evaluates the same batches, and the NumPy
pass.
"""

import ctypes
import itertools
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp
import numpy as np
import pytest
from llama_cpp import LlamaRAMCache
from oracles.fixtures import Open, Tiny
from oracles.readable import ATTENTION, FFN, MAPS, NOTHING, TOLERANCE, Bare, evaluated, logits
from oracles.reference import ReferenceModel, ReferenceRun, Windows, relative_error
from oracles.skip_sets import arguments, same, skip_set
from oracles.stock import EXACT, environment
from oracles.tiny_families import N_EMBD, tokens

from adaskip_cpp import SkipPlan
from adaskip_cpp.engine.native import NativeContext
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


def test_what_is_readable_before_the_first_stale_position_is_kept(open_tiny: Open) -> None:
    llm, full = open_tiny(), open_tiny()
    llm.eval(tokens(9))
    llm.set_plan(same(FFN))
    llm.eval(tokens(5, seed=1))
    llm.set_plan(None)
    assert evaluated(llm, lambda: llm.eval([7])) == list(range(9, 15))
    full.eval([*tokens(9), *tokens(5, seed=1), 7])
    np.testing.assert_allclose(logits(llm), logits(full), rtol=1e-4, atol=1e-5)


def test_an_answer_is_read_by_its_own_plan_and_by_no_other(open_tiny: Open) -> None:
    # A chat's next turn: what decode left is kept under the same plan, and evaluated again under another.
    for plan, kept in ((SkipPlan(NOTHING, FFN), 12), (SkipPlan(NOTHING, MAPS), 9), (SkipPlan(NOTHING, ATTENTION), 9)):
        llm, full = open_tiny(under=SkipPlan(NOTHING, FFN)), open_tiny()
        answer = list(itertools.islice(llm.generate(tokens(9), temp=0), 4))
        llm.set_plan(plan)
        turn = [*tokens(9), *answer, 7, 8]
        assert evaluated(llm, lambda: next(llm.generate(turn, temp=0))) == list(range(kept, 15))  # noqa: B023
        if kept == 9:
            full.eval(turn)
            np.testing.assert_allclose(logits(llm), logits(full), rtol=1e-4, atol=1e-5)


def test_what_an_online_stage_made_is_read_by_its_own_plan_alone(open_tiny: Open) -> None:
    plan = SkipPlan(NOTHING, NOTHING, online=OnlineStage(2, -1.0, "paper"))
    others = [None, SkipPlan(NOTHING, NOTHING), SkipPlan(NOTHING, NOTHING, online=OnlineStage(2, -0.9, "paper"))]
    for after, kept in ((plan, 14), *((other, 11) for other in others)):
        llm = open_tiny(under=plan)
        answer = list(itertools.islice(llm.generate(tokens(9), temp=0), 6))
        assert llm.online.ffn == (0, 1, 2)
        llm.set_plan(after)
        turn = [*tokens(9), *answer, 7]
        assert evaluated(llm, lambda: next(llm.generate(turn, temp=0))) == list(range(kept, 16))  # noqa: B023


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
    batch = llama_cpp.llama_batch_init(4, N_EMBD, 1)
    batch.n_tokens = 4
    for i in range(4):
        batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = i, 1, 0, True
        for k in range(N_EMBD):
            batch.embd[i * N_EMBD + k] = 0.01 * (i + k)
    assert llama_cpp.llama_decode(llm.ctx, batch) == 0
    llama_cpp.llama_batch_free(batch)
    assert llm._adaskip.kv_valid("prefill", 4) == 4
    llm.set_plan(None)
    assert llm._adaskip.kv_valid("prefill", 4) == 0


# -- saved states ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "jamba"])
def test_a_saved_state_is_read_by_its_plan_and_evaluated_again_by_another(family: str, open_tiny: Open) -> None:
    plan = SkipPlan.manual(3, ffn=[1])
    saver, whole = open_tiny(family, under=plan), open_tiny(family)
    saver.eval(tokens(9))
    state = pickle.loads(pickle.dumps(saver.save_state()))
    whole.load_state(state)
    assert evaluated(whole, lambda: whole.eval([7])) == list(range(10))
    whole.load_state(state)
    whole.set_plan(plan)
    assert evaluated(whole, lambda: whole.eval([7])) == [9]
    saver.eval([7])
    np.testing.assert_allclose(logits(whole), logits(saver), rtol=1e-4, atol=1e-4)  # gemma3's cells lie elsewhere


def test_a_cache_of_prompts_gives_no_plan_what_another_computed(open_tiny: Open) -> None:
    llm, fresh = open_tiny(), open_tiny()
    llm.set_cache(LlamaRAMCache())
    llm.set_plan(same(FFN))
    llm.create_completion(tokens(20), max_tokens=2, temperature=0.0)
    llm.set_plan(None)
    llm.reset()
    told = [each.create_completion(tokens(20), max_tokens=6, temperature=0.0)["choices"] for each in (llm, fresh)]
    assert told[0] == told[1]
    np.testing.assert_allclose(logits(llm), logits(fresh), rtol=1e-4, atol=1e-5)


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
@pytest.mark.parametrize("chosen", [FFN, ATTENTION, MAPS], ids=["FFN", "attention", "maps"])
def test_sequences_of_several_lengths_run_under_one_plan(
    chosen: SkipSet, unified: bool, bare: Open, reference: ReferenceModel
) -> None:
    context, runs = bare(n_seq=3, unified=unified), [ReferenceRun(reference) for _ in range(3)]
    context.set_plan(same(chosen))
    done = [0, 0, 0]
    for lengths in ((5, 9, 2), (1, 1, 1), (3, 1, 4)):
        pieces = {f"s{i}": (done[i], tokens(n, seed=n + i)) for i, n in enumerate(lengths)}
        for i, actual in enumerate(context.decode(**pieces).values()):
            expected = runs[i].eval(tokens(lengths[i], seed=lengths[i] + i), *arguments(chosen)).logits
            assert relative_error(actual, expected) < TOLERANCE
            done[i] += lengths[i]


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


class Written(NamedTuple):
    """What positions are computed under, for llama.cpp and for NumPy; in a bulk, of which others have to be told."""

    plan: SkipPlan
    under: dict[str, Any]
    in_bulk: bool = False

    def write(self, context: Bare, run: ReferenceRun, start: int, tokens: list[int]) -> None:
        context.set_plan(self.plan)
        context.native.set_phase("bulk" if self.in_bulk else "prefill")
        context.decode(s0=(start, tokens))
        context.native.set_phase("prefill")
        run.eval(tokens, **self.under)

    def allow(self, context: Bare) -> dict[str, Any]:
        """Set a plan that may read it; returns under what that one reads."""
        context.set_plan(self.plan)
        if not self.in_bulk:
            return self.under
        context.native.set_plan(None, 99, [context.native.bulk_set_id(self.plan)])
        return {}


def as_names(chosen: SkipSet, **more: Any) -> dict[str, Any]:
    return {**dict(zip(("skip", "scale", "bias", "down", "up"), arguments(chosen), strict=True)), **more}


NARROW = Bulk(NOTHING, head=2, tail=3, windowed=(0, 2), window_size=4)
WRITTEN = {
    "FFN": Written(same(FFN), as_names(FFN)),
    "attention": Written(same(ATTENTION), as_names(ATTENTION)),
    "bulk": Written(SkipPlan(NOTHING, NOTHING, bulk=Bulk(ATTENTION)), as_names(ATTENTION, keeps_kv=True), True),
    "windows": Written(
        SkipPlan(NOTHING, NOTHING, bulk=NARROW), as_names(NOTHING, keeps_kv=True, windows=Windows((0, 2), 4, 2)), True
    ),
}


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("how", ["FFN", "attention", "bulk"])
def test_a_copied_sequence_is_read_as_the_one_it_is_of(
    how: str, unified: bool, bare: Open, reference: ReferenceModel
) -> None:
    context, run, written = bare(unified=unified), ReferenceRun(reference), WRITTEN[how]
    written.write(context, run, 0, tokens(9))
    llama_cpp.llama_memory_seq_cp(context.memory, 0, 1, -1, -1)
    context.set_plan(None)
    with pytest.raises(StateError, match="sequence 1"):
        context.decode(s1=(9, [7]))
    expected = run.eval([7], **written.allow(context)).logits
    assert relative_error(context.decode(s1=(9, [7]))["s1"], expected) < TOLERANCE


def test_a_copy_over_skipped_positions_makes_them_readable(bare: Open, reference: ReferenceModel) -> None:
    context, run = bare(), ReferenceRun(reference)
    context.decode(s0=(0, tokens(9)))
    context.set_plan(same(ATTENTION))
    context.decode(s1=(0, tokens(5)))
    context.set_plan(None)
    llama_cpp.llama_memory_seq_rm(context.memory, 1, -1, -1)
    llama_cpp.llama_memory_seq_cp(context.memory, 0, 1, -1, -1)
    run.eval(tokens(9))
    assert relative_error(context.decode(s1=(9, [7]))["s1"], run.eval([7]).logits) < TOLERANCE


@pytest.mark.parametrize("how", ["attention", "bulk", "windows"])
def test_shifted_positions_are_read_as_what_they_were(how: str, bare: Open, reference: ReferenceModel) -> None:
    # The whole model's positions 0 to 3 go, and those of the plan move to where they were.
    context, run, written = bare(), ReferenceRun(reference), WRITTEN[how]
    context.decode(s0=(0, tokens(4)))
    run.eval(tokens(4))
    written.write(context, run, 4, tokens(6, seed=1))
    llama_cpp.llama_memory_seq_rm(context.memory, 0, 0, 4)
    llama_cpp.llama_memory_seq_add(context.memory, 0, 4, -1, -4)
    context.set_plan(None)
    assert context.native.kv_valid("prefill", 6) == 0
    with pytest.raises(StateError, match="position 0 of sequence 0"):
        context.decode(s0=(6, [7]))
    run.keep(np.arange(10) >= 4)
    run.positions -= 4
    expected = run.eval([7], **written.allow(context)).logits
    assert relative_error(context.decode(s0=(6, [7]))["s0"], expected) < TOLERANCE


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


@pytest.mark.parametrize("unified", [True, False])
def test_a_kept_sequence_is_read_as_before(unified: bool, bare: Open, reference: ReferenceModel) -> None:
    context, run = bare(unified=unified), ReferenceRun(reference)
    context.decode(s0=(0, tokens(5)))
    context.set_plan(same(FFN))
    context.decode(s1=(0, tokens(7)))
    context.set_plan(None)
    llama_cpp.llama_memory_seq_keep(context.memory, 0)
    run.eval(tokens(5))
    assert relative_error(context.decode(s0=(5, [7]))["s0"], run.eval([7]).logits) < TOLERANCE
    if unified:  # else llama.cpp keeps what is in other streams
        assert relative_error(context.decode(s1=(0, [7]))["s1"], ReferenceRun(reference).eval([7]).logits) < TOLERANCE


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


def test_a_plan_whose_decode_set_is_refused_leaves_all_as_it_was(open_tiny: Open) -> None:
    # Jamba's layers 0 and 2 have no attention.
    llm, other = open_tiny("jamba"), open_tiny("jamba")
    for each in (llm, other):
        each.set_plan(SkipPlan.manual(3, ffn=[1], scale=0.9))
    bad = SkipPlan(skip_set(ffn=(0,)), skip_set((2,), (0,)))
    for _ in range(2):
        with pytest.raises(NotSkippableError):
            llm.set_plan(bad)
        assert llm.plan == other.plan
    assert next(llm.generate(tokens(9), temp=0)) == next(other.generate(tokens(9), temp=0))
    np.testing.assert_array_equal(logits(llm), logits(other))
    llm.set_plan(None)
    assert llm.plan is None


def test_a_refused_plan_leaves_the_logits_at_hand_those_of_the_prompt(open_tiny: Open) -> None:
    llm = open_tiny("jamba")
    llm.eval(tokens(9))
    with pytest.raises(NotSkippableError):
        llm.set_plan(same(skip_set((0,))))
    assert evaluated(llm, lambda: next(llm.generate(tokens(9), temp=0))) == []


@pytest.mark.parametrize("moment", ["before", "after"])
def test_ctrl_c_around_the_native_call_leaves_one_plan_or_the_other(
    moment: str, open_tiny: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = same(FFN), SkipPlan(NOTHING, ATTENTION)
    llm, fresh = open_tiny(under=old), open_tiny()
    llm.eval(tokens(9))
    real = NativeContext.set_plan

    def interrupted(self: NativeContext, *args: Any) -> None:
        if moment == "after":
            real(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(NativeContext, "set_plan", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.set_plan(new)
    assert llm.plan == (old if moment == "before" else new)
    fresh.set_plan(llm.plan)
    for each in (llm, fresh):
        next(each.generate(tokens(9), temp=0))
    np.testing.assert_allclose(logits(llm), logits(fresh), rtol=1e-4, atol=1e-5)
    llm.set_plan(None)
    assert llm.plan is None and llm._adaskip.plan_tag() == 0


def test_a_closed_model_has_no_plan_to_tell(open_tiny: Open) -> None:
    llm = open_tiny()
    llm.close()
    with pytest.raises(NativeError, match="open it again"):
        llm.plan  # noqa: B018
