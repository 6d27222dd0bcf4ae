"""Several sequences on the bare context, copied, shifted and cut by llama.cpp's own functions, against NumPy.

Hypothesis draws what is done. ``llama_decode`` must refuse a batch whose sequences hold a position that the plan cannot
read. ``llama_memory_seq_div`` is not among the calls: llama.cpp turns its keys the wrong way, with and without a plan.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import llama_cpp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition
from oracles.drawn_plans import NOTHING, plans
from oracles.drawn_sequences import rule
from oracles.fixtures import Tiny
from oracles.readable import decode
from oracles.reference import ReferenceModel, ReferenceRun, Windows, relative_error
from oracles.sequence_oracle import Cell, is_readable
from oracles.skip_sets import same, skip_set
from oracles.stock import EXACT
from oracles.tiny_families import N_LAYER, N_VOCAB

from adaskip_cpp import AdaSkipLlama, SkipPlan
from adaskip_cpp.errors import NotSkippableError, PlanError
from adaskip_cpp.model.plan import Bulk, OnlineStage
from adaskip_cpp.model.skip_set import SkipSet

N_SEQ = 3
MAX_POSITION = 100
TOLERANCE = 1e-5


def open_with_sequences(path: Path, unified: bool, **options: Any) -> AdaSkipLlama:
    """A model whose context has room for ``N_SEQ`` sequences, which ``llama_cpp.Llama`` has no argument for."""
    params = llama_cpp.llama_context_default_params()
    params.n_seq_max, params.kv_unified = N_SEQ, unified
    with patch("llama_cpp.llama_cpp.llama_context_default_params", lambda: params):
        return AdaSkipLlama(str(path), n_ctx=384, n_batch=64, verbose=False, **EXACT, **options)


def logits_of(llm: AdaSkipLlama, index: int) -> np.ndarray:
    row = llama_cpp.llama_get_logits_ith(llm.ctx, index)
    return np.ctypeslib.as_array(row, shape=(N_VOCAB,)).copy()


@dataclass(eq=False)
class SharedCell:
    """One cell of the cache, which several sequences may share."""

    skip_set: SkipSet
    in_bulk: bool = False


@dataclass
class Sequence:
    """One sequence: what it holds, and the reference's K and V of it."""

    run: ReferenceRun
    cells: list[SharedCell] = field(default_factory=list)

    def copy(self) -> "Sequence":
        return Sequence(self.run.copy(), list(self.cells))

    def keep(self, chosen: np.ndarray) -> None:
        self.run.keep(chosen)
        self.cells = [cell for cell, kept in zip(self.cells, chosen, strict=True) if kept]

    @property
    def next_position(self) -> int:
        return int(self.run.positions.max(initial=-1)) + 1


sequence = st.integers(0, N_SEQ - 1)
texts = st.lists(st.integers(3, N_VOCAB - 1), min_size=1, max_size=8)


class Calls(RuleBasedStateMachine):
    """One context and its sequences, through calls in any order; an ``llm`` that is given is open, and stays so.

    ``unified`` says whether all sequences share one stream of cells, ``elided`` which attentions have no KV.
    """

    def __init__(
        self, path: Path, model: ReferenceModel, unified: bool, options: dict[str, Any], elided: Any, llm: Any = None
    ) -> None:
        super().__init__()
        self.model, self.unified, self.elided, self.stays_open = model, unified, elided, llm is not None
        self.plan = SkipPlan.manual(N_LAYER, elided) if elided else NOTHING
        self.readable: list[SkipPlan] = []
        self.with_bulk: list[SkipPlan] = []  # plans that were drawn, for others to read
        self.llm = llm or open_with_sequences(path, unified, plan=self.plan, **options)
        self.llm.set_plan(self.plan)
        self.memory = llama_cpp.llama_get_memory(self.llm.ctx)
        llama_cpp.llama_memory_clear(self.memory, True)
        self.sequences = [Sequence(ReferenceRun(model)) for _ in range(N_SEQ)]

    def teardown(self) -> None:
        if not self.stays_open:
            self.llm.close()

    def is_filled(self) -> bool:
        return any(each.cells for each in self.sequences)

    @rule(data=st.data())
    def set_plan(self, data: st.DataObject) -> None:
        plan, self.readable = data.draw(plans((), self.elided)), []
        self.plan = plan if plan.bulk is None else replace(plan, bulk=replace(plan.bulk, refit=0))
        if self.with_bulk:
            self.readable = data.draw(st.lists(st.sampled_from(self.with_bulk), max_size=3))
            if data.draw(st.booleans()):
                self.plan = data.draw(st.sampled_from(self.with_bulk))
        if self.plan.bulk is not None:
            self.with_bulk.append(self.plan)
        self.llm.set_plan(self.plan, readable=self.readable)

    @rule(texts=st.dictionaries(sequence, texts, min_size=1), in_turn=st.booleans(), in_bulk=st.booleans())
    def decode(self, texts: dict[int, list[int]], in_turn: bool, in_bulk: bool) -> None:
        """One batch of tokens of several sequences, one sequence after the other or token by token in turn."""
        texts = {i: text for i, text in texts.items() if self.sequences[i].next_position + len(text) < MAX_POSITION}
        starts = {i: self.sequences[i].next_position for i in texts}
        rows = [(i, k, token) for i, text in texts.items() for k, token in enumerate(text)]
        if in_turn:
            rows.sort(key=lambda row: row[1])
        if not rows:
            return
        skip_set = self.plan.prefill
        if in_bulk := in_bulk and self.plan.bulk is not None:
            skip_set = self.plan.bulk.skip
            self.llm._adaskip.set_phase("bulk")
        result = decode(self.llm.ctx, [(i, starts[i] + k, token, True) for i, k, token in rows])
        self.llm._adaskip.set_phase("prefill")
        if not all(
            is_readable(Cell(0, cell.skip_set, in_bulk=cell.in_bulk), self.plan, skip_set, self.readable)
            for i in texts
            for cell in self.sequences[i].cells
        ):
            assert result < 0
            for i, start in starts.items():  # what was computed before the refusal
                llama_cpp.llama_memory_seq_rm(self.memory, i, start, -1)
            return
        assert result == 0
        for i, text in texts.items():
            expected = self.sequences[i].run.eval(
                text, skip_set.skip, skip_set.scale, skip_set.bias, skip_set.down, skip_set.up, keeps_kv=in_bulk
            )
            self.sequences[i].cells += [SharedCell(skip_set, in_bulk) for _ in text]
            actual = [logits_of(self.llm, at) for at, row in enumerate(rows) if row[0] == i]
            assert relative_error(actual, expected.logits) < TOLERANCE

    @precondition(is_filled)
    @rule(source=sequence, into=sequence, part=st.floats(0, 1))
    def copy(self, source: int, into: int, part: float) -> None:
        """A part of a sequence into an empty one; between streams llama.cpp copies whole sequences only."""
        if source == into:
            return
        end = round(part * self.sequences[source].next_position) if self.unified else -1
        llama_cpp.llama_memory_seq_rm(self.memory, into, -1, -1)
        llama_cpp.llama_memory_seq_cp(self.memory, source, into, -1, end)
        self.sequences[into] = copied = self.sequences[source].copy()
        if self.unified:
            copied.keep(copied.run.positions < end)
        else:
            copied.cells = [SharedCell(cell.skip_set, cell.in_bulk) for cell in copied.cells]

    @precondition(is_filled)
    @rule(i=sequence)
    def keep(self, i: int) -> None:
        llama_cpp.llama_memory_seq_keep(self.memory, i)
        if self.unified:  # else it is for the stream of this sequence alone
            for other in {*range(N_SEQ)} - {i}:
                self.sequences[other] = Sequence(ReferenceRun(self.model))

    @precondition(is_filled)
    @rule(i=sequence, start=st.floats(0, 1), length=st.integers(1, 8), close=st.booleans())
    def remove(self, i: int, start: float, length: int, close: bool) -> None:
        """Some positions; the gap is closed, as for a context that is full, or left."""
        first = round(start * self.sequences[i].next_position)
        llama_cpp.llama_memory_seq_rm(self.memory, i, first, first + length)
        positions = self.sequences[i].run.positions
        self.sequences[i].keep((positions < first) | (positions >= first + length))
        if close:
            self.shift(i, first + length, -length)

    @precondition(is_filled)
    @rule(i=sequence, start=st.floats(0, 1), distance=st.integers(1, 8))
    def move(self, i: int, start: float, distance: int) -> None:
        if self.sequences[i].next_position + distance < MAX_POSITION:
            self.shift(i, round(start * self.sequences[i].next_position), distance)

    def shift(self, i: int, first: int, distance: int) -> None:
        """Cells move in every sequence that shares them."""
        llama_cpp.llama_memory_seq_add(self.memory, i, first, -1, distance)
        run, cells = self.sequences[i].run, self.sequences[i].cells
        moved = {id(cell) for cell, position in zip(cells, run.positions, strict=True) if position >= first}
        for each in self.sequences:
            chosen = np.array([id(cell) in moved for cell in each.cells], bool)
            each.run.positions = each.run.positions + distance * chosen


KINDS: dict[str, tuple[bool, dict[str, Any], tuple[int, ...]]] = {
    "one stream": (True, {}, ()),
    "one stream, small ubatches": (True, {"n_ubatch": 3}, ()),
    "a stream each": (False, {}, ()),
    "elided KV": (True, {}, (1,)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_calls_are_right_or_refused(kind: str, tiny: Tiny, explore: Callable[[Callable[[], Any]], None]) -> None:
    explore(partial(Calls, tiny(), ReferenceModel(tiny()), *KINDS[kind]))


@pytest.fixture
def llm(tiny: Tiny) -> Iterator[Any]:
    with closing(open_with_sequences(tiny(), True)) as opened:
        yield opened


def test_windows_read_one_sequence_at_a_time_and_a_common_cache(
    llm: Any, reference: ReferenceModel, tiny: Tiny
) -> None:
    run, text, none = ReferenceRun(reference), list(range(30, 38)), NOTHING.prefill
    for at in range(20):  # the cells of the two lie in turn
        assert decode(llm.ctx, [(0, at, 3 + at, True), (1, at, 4 + at, True)]) == 0
    run.eval(list(range(4, 24)))
    llm.set_plan(SkipPlan(none, none, bulk=Bulk(none, head=2, windowed=(0, 1, 2), window_size=5)))
    llm._adaskip.set_phase("bulk")
    expected = run.eval(text, windows=Windows((0, 1, 2), 5, 2)).logits
    assert decode(llm.ctx, [(1, 20 + i, token, True) for i, token in enumerate(text)]) == 0
    assert relative_error([logits_of(llm, i) for i in range(len(text))], expected) < TOLERANCE
    assert decode(llm.ctx, [(0, 20, 9, True), (1, 28, 9, True)]) < 0
    with pytest.raises(PlanError, match="look back at a window, which read one sequence at a time"):
        llm._adaskip.raise_failure(RuntimeError())
    with closing(open_with_sequences(tiny(), False)) as other:
        assert not any(row.windowable for row in other.sublayers)
        with pytest.raises(NotSkippableError, match="cannot look back at a window: it reads its K and V in another"):
            other.set_plan(SkipPlan(none, none, bulk=Bulk(none, windowed=(0,))))


def test_what_counts_the_tokens_of_one_request_is_refused(llm: Any) -> None:
    chosen = skip_set(ffn=(1, 2))
    for name, plan in {
        "a schedule": same(chosen, schedule=((0, chosen), (2, skip_set((1,), (2,))))),
        "an online stage": same(chosen, online=OnlineStage(2, -1.0, "paper")),
    }.items():
        with pytest.raises(PlanError, match=f"the plan has {name}.* for {N_SEQ} sequences"):
            llm.set_plan(plan)
        assert llm.plan is None


def test_divided_positions_are_read_as_what_they_were(llm: Any) -> None:
    llm.set_plan(same(skip_set(ffn=(1, 2))))
    assert decode(llm.ctx, [(0, i, 3 + i, True) for i in range(8)]) == 0
    llama_cpp.llama_memory_seq_div(llama_cpp.llama_get_memory(llm.ctx), 0, 0, -1, 2)
    assert llm._adaskip.kv_valid("prefill", 4) == 4
    llm.set_plan(None)
    assert llm._adaskip.kv_valid("prefill", 4) == 0 and decode(llm.ctx, [(0, 4, 7, True)]) < 0
