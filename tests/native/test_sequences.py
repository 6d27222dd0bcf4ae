"""Any sequence of calls, found by Hypothesis, against an oracle that evaluates the history in NumPy.

Every run draws anew, for a while per kind of model. Tolerances: float32 against float64, where 1.3e-6 was the largest
relative error; 3.6e-3 with flash attention, which rounds to F16 on the CPU, and 1.02e-2 on an Intel Xeon; 9e-5 with
Gemma's GELU, a table in F16.
"""

import pickle
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition
from llama_cpp import LlamaRAMCache, llama_get_memory, llama_memory_seq_pos_min
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from oracles.drawn_plans import NOTHING, plans
from oracles.drawn_sequences import rule
from oracles.fixtures import Tiny
from oracles.reference import ReferenceModel, relative_error
from oracles.sequence_oracle import Cell, Cells, History
from oracles.stock import EXACT
from oracles.tiny_families import N_LAYER, N_VOCAB

from adaskip_cpp import AdaSkipLlama, Edits, SkipPlan
from adaskip_cpp.errors import PlanError
from adaskip_cpp.model import plan as plan_module
from adaskip_cpp.model.edits import APART, WIDE, Reuse, edits_of

N_CTX = 512
SAVED = 64  # tokens of a saved prompt: the memory has room for it beside what a prompt takes from elsewhere
EDITS = Edits(mend=1, least=2, tail=2, most_moves=APART + WIDE)


class Drafts(LlamaPromptLookupDecoding):
    """What followed the same two tokens before; else two tokens, which are wrong nearly always."""

    def __init__(self) -> None:
        super().__init__(max_ngram_size=2, num_pred_tokens=5)

    def __call__(self, input_ids: Any, /, **_: Any) -> Any:
        found = super().__call__(input_ids)
        return found if len(found) else 3 + (input_ids[-1] * np.array([7, 11])) % (N_VOCAB - 3)


@dataclass(frozen=True)
class Kind:
    """One way to open a model."""

    family: str = "llama"
    options: dict[str, Any] = field(default_factory=dict)
    reuse: Reuse = "prefix"  # of the prompt in memory; where it may be edited, no logits are kept but the last
    tolerance: float = 1e-5  # of the logits, relative
    elided: tuple[int, ...] = ()  # layers whose attention has no KV
    drafts: bool = False

    @property
    def thresholds(self) -> list[float]:
        """Of the online stage: some that a rounded similarity may reach or not only where there is little rounding."""
        return [-1.0, 0.6, 0.7, 0.75, 0.8, 0.85, 2.0] if self.tolerance <= 1e-5 else [-1.0, 2.0]

    @property
    def all_options(self) -> dict[str, Any]:
        how = {"logits_all": self.reuse == "prefix", "reuse": self.reuse}
        return {"n_ctx": N_CTX, "verbose": False, **how, **EXACT, **self.options}

    @property
    def opened_with(self) -> SkipPlan | None:
        return SkipPlan.manual(N_LAYER, self.elided, scale=0.9) if self.elided else None


KINDS = {
    "as it is": Kind(),
    "batches of 3": Kind(options={"n_batch": 3}),
    "flash attention": Kind(options={"n_batch": 3, "flash_attn": True}, tolerance=2e-2),
    "flash attention in prompts": Kind(options={"n_batch": 3, "flash_attn": "prompts"}),
    "sliding windows": Kind("gemma3", options={"n_batch": 5}, tolerance=1e-3),
    "small sliding windows": Kind("gemma3", options={"n_batch": 5, "swa_full": False}, tolerance=1e-3),
    "elided KV": Kind(elided=(1,)),
    "elided sliding windows": Kind("gemma3", tolerance=1e-3, elided=(0,)),
    "drafts": Kind(options={"n_ubatch": 3}, drafts=True),
    "edited": Kind(options={"n_batch": 5}, reuse=EDITS),
    "edited sliding windows": Kind("gemma3", reuse=EDITS, tolerance=1e-3),
}


class WatchedLlama(AdaSkipLlama):
    """Tells what ``create_completion`` generates, which saved states it loads and saves, and which evaluations restart.

    And the first position that the memory still has where a prompt comes. ``limit`` bounds what it generates: of tokens
    that begin a character any number, in search of the character's end.
    """

    @classmethod
    def open(cls, path: Path, kind: Kind) -> "WatchedLlama":
        drafts = Drafts() if kind.drafts else None
        return cls(str(path), plan=kind.opened_with, draft_model=drafts, **kind.all_options)

    def begin(self) -> None:
        """Forget every call before this one."""
        self.limit, self.is_evaluating = N_CTX, False
        self.generated: list[int] = []
        self.loaded: list[Any] = []
        self.saved: list[Any] = []
        self.restarted: deque[bool] = deque()
        self.oldest: deque[int] = deque()
        self.saved_prompts = []
        self.set_cache(None)
        self.reset()

    def _eval(self, phase: Any, tokens: list[int]) -> None:
        if tokens:
            self.restarted.append(False)
            self.is_evaluating = True
            super()._eval(phase, tokens)
            self.is_evaluating = False

    def reset(self) -> None:
        if self.is_evaluating:
            self.restarted[-1] = True
        super().reset()

    def _read_edited(self, prompt: list[int]) -> None:
        self.oldest.append(llama_memory_seq_pos_min(llama_get_memory(self.ctx), 0))
        super()._read_edited(prompt)

    def generate(self, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        with closing(super().generate(tokens, *args, **kwargs)) as steps:
            for token in islice(steps, self.limit):
                self.generated.append(token)
                yield token

    def load_state(self, state: Any) -> None:
        self.loaded.append(state)
        super().load_state(state)

    def save_state(self) -> Any:
        self.saved.append(super().save_state())
        return self.saved[-1]


tokens = st.lists(st.integers(3, N_VOCAB - 1), min_size=1, max_size=8)
reuses = st.sampled_from(["prefix", EDITS, replace(EDITS, mend=3, most_moves=WIDE + 1)])


@st.composite
def edited(draw: st.DrawFn, text: list[int]) -> list[int]:
    """Another text that has much of this one, in other places."""
    for _ in range(draw(st.integers(1, 3))):
        new = draw(tokens)
        a, b = sorted(draw(st.tuples(*[st.integers(0, len(text))] * 2)))
        forms = {
            "replaced": text[:a] + new + text[a + len(new) :],
            "inserted": text[:a] + new + text[a:],
            "deleted": text[:a] + text[b:],
            "swapped": text[b:] + text[a:b] + text[:a],
            "the oldest dropped": text[a:],
            "repeated": text[:b] + text[a:],
        }
        text = forms[draw(st.sampled_from(list(forms)))] or new
    return text[: N_CTX - 64]


class Calls(RuleBasedStateMachine):
    """One model and its history, through calls in any order; an ``llm`` that is given is open, and stays so."""

    def __init__(self, path: Path, model: ReferenceModel, kind: Kind, llm: WatchedLlama | None = None) -> None:
        super().__init__()
        self.kind, self.stays_open = kind, llm is not None
        self.with_bulk: list[SkipPlan] = []  # plans that were drawn, for others to read
        self.llm = llm or WatchedLlama.open(path, kind)
        self.llm.begin()
        drafts = self.llm.draft_model
        self.history = History(Cells(model), kind.options.get("n_ubatch", self.llm.n_batch))
        if kind.family == "gemma3":
            self.history.restarts, self.history.oldest = self.llm.restarted.popleft, self.llm.oldest.popleft
        if drafts is not None:
            self.history.draft = lambda ids: drafts(np.array(ids, np.intc)).tolist()
        self.change_plan(kind.opened_with or NOTHING)  # None runs alike, but is another plan: logits would count as old
        self.change_reuse(kind.reuse)
        self.saved: list[tuple[Any, list[Cell]]] = []
        self.watching: ExitStack | None = None
        self.observed: dict[int, np.ndarray] = {}

    def teardown(self) -> None:
        self.stop_collecting()
        if self.stays_open:
            self.llm.begin()  # else the states that were saved stay until its next turn
        else:
            self.llm.close()

    def has_room(self) -> bool:
        return len(self.history.cells) < N_CTX - 128

    def draw_plan(self, data: st.DataObject) -> SkipPlan:
        plan = data.draw(plans(self.kind.thresholds, self.kind.elided, windowable=range(N_LAYER)))
        if plan.bulk is not None:
            self.with_bulk.append(plan)
        return plan

    @precondition(has_room)
    @rule(new=tokens)
    def evaluate(self, new: list[int]) -> None:
        self.llm.eval(new)
        self.history.eval(new)

    @precondition(has_room)
    @rule(new=tokens)
    def evaluate_as_the_bulk_of_a_prompt(self, new: list[int]) -> None:
        self.llm.eval_bulk(new)
        self.history.eval_bulk(new)

    @precondition(has_room)
    @rule(new=tokens, begins=st.booleans())
    def evaluate_as_an_answer(self, new: list[int], begins: bool) -> None:
        if begins:
            self.llm.begin_request()
            self.history.begin_request()
        # Of tokens without logits the online stage does not see the last FFN.
        for piece in [new] if self.llm.logits_all else [[token] for token in new]:
            self.llm.eval_decode(piece)
            self.history.decode(piece)

    @precondition(has_room)
    @rule(new=tokens, n=st.integers(1, 8), kept=st.floats(0, 1))
    def generate(self, new: list[int], n: int, kept: float) -> None:
        """A prompt that shares a part of what is cached (1: a chat's next turn), then n tokens."""
        self.generate_from([*self.history.tokens[: round(kept * len(self.history.cells))], *new], n)

    @precondition(has_room)
    @rule(data=st.data(), new=tokens, n=st.integers(2, 8))
    def change_the_plan_while_generating(self, data: st.DataObject, new: list[int], n: int) -> None:
        """From any plan to any plan; or to one that reads what the prompt left, but not what decode left."""
        plan = self.draw_plan(data)
        if data.draw(st.booleans()):
            one, other, _ = data.draw(st.permutations(range(N_LAYER)))
            fewer, more = (
                SkipPlan.manual(N_LAYER, {*self.kind.elided, *layers}).prefill for layers in ([one], [one, other])
            )
            self.change_plan(SkipPlan(fewer, more))
            plan = SkipPlan(SkipPlan.manual(N_LAYER, self.kind.elided).prefill, fewer)
        change = partial(self.change_plan, plan)
        self.generate_from(self.history.tokens + new, n, (data.draw(st.integers(1, n - 1)), change))

    @precondition(lambda self: self.kind.reuse != "prefix")
    @precondition(has_room)
    @rule(data=st.data(), text=st.lists(st.integers(3, N_VOCAB - 1), min_size=10, max_size=30), turns=st.integers(1, 4))
    def generate_from_edited_prompts(self, data: st.DataObject, text: list[int], turns: int) -> None:
        """One edit after the other of what is cached, or of a new text where that is too short; plans may change."""
        if len(self.history.cells) < len(text):
            self.generate_from(self.history.tokens + text, 1)
        for _ in range(turns):
            if data.draw(st.integers(0, 2)) == 0:
                self.change_plan(self.draw_plan(data), self.with_bulk[-3:])
            self.generate_from(data.draw(edited(self.history.tokens)), data.draw(st.integers(1, 8)))

    @precondition(lambda self: self.kind.reuse != "prefix")
    @precondition(has_room)
    @rule(data=st.data(), n=st.integers(2, 4), reuse=reuses)
    def change_the_reuse_while_generating(self, data: st.DataObject, n: int, reuse: Reuse) -> None:
        change = partial(self.change_reuse, reuse)
        self.generate_from(data.draw(edited(self.history.tokens)), n, (data.draw(st.integers(1, n - 1)), change))

    @precondition(lambda self: self.kind.reuse != "prefix" and self.kind.family == "llama")  # nothing is ever lost
    @precondition(lambda self: 0 < len(self.history.cells) <= SAVED)
    @rule()
    def save_the_prompt(self) -> None:
        own = replace(
            self.history, reference=Cells(self.history.reference.model), cells=[*self.history.cells], saved=()
        )
        self.llm.saved_prompts = [*self.llm.saved_prompts[-1:], self.llm.save_prompt()]
        self.history.saved = [*self.history.saved[-1:], own]

    @precondition(lambda self: self.history.saved)
    @precondition(has_room)
    @rule(data=st.data(), new=tokens)
    def generate_from_saved_prompts(self, data: st.DataObject, new: list[int]) -> None:
        parts = [new, self.history.tokens[:100], *(each.tokens for each in self.history.saved)]
        prompt = [token for part in data.draw(st.permutations(parts)) for token in part]
        self.generate_from(data.draw(edited(prompt)) if data.draw(st.booleans()) else prompt, 3)

    @precondition(lambda self: self.kind.reuse != "prefix")
    @rule(reuse=reuses)
    def change_reuse(self, reuse: Reuse) -> None:
        self.llm.set_reuse(reuse)
        self.history.set_edits(edits_of(reuse))

    @precondition(lambda self: self.history.cells)
    @precondition(has_room)
    @rule(n=st.integers(1, 4))
    def generate_from_what_is_cached(self, n: int) -> None:
        self.generate_from(self.history.tokens, n)

    def generate_from(self, prompt: list[int], n: int, change: tuple[int, Callable[[], None]] | None = None) -> None:
        steps, expected = self.llm.generate(prompt, temp=0.0), self.history.generate(prompt)
        token, index = next(steps), next(expected)
        for i in range(1, n):
            self.check_token(token, index)
            if change is not None and change[0] == i:
                change[1]()
            following = next(steps)
            index = expected.send(token)
            token = following
        self.check_token(token, index)
        steps.close()

    def check_token(self, token: int, index: int) -> None:
        """It is the most likely one, or as good as that."""
        logits = self.history.trace(index).logits[0]
        assert logits[token] >= logits.max() - self.kind.tolerance * np.linalg.norm(logits)

    @precondition(has_room)
    @rule(new=tokens, n=st.integers(1, 6), kept=st.floats(0, 1), data=st.data())
    def complete_with_a_cache(self, new: list[int], n: int, kept: float, data: st.DataObject) -> None:
        """LlamaRAMCache: a prompt that shares something with a saved one loads that one's state."""
        source = data.draw(st.sampled_from([self.history.cells, *(cells for _, cells in self.saved)]))
        prompt = [cell.token for cell in source][: round(kept * len(source))] + new
        if self.kind.reuse != "prefix" and data.draw(st.booleans()):
            prompt = data.draw(edited(prompt))
        self.llm.generated, self.llm.loaded, self.llm.saved = [], [], []
        self.llm.limit = n + 3
        self.llm.create_completion(prompt, max_tokens=n, temperature=0.0)
        self.llm.limit = N_CTX
        for state in self.llm.loaded:
            self.load_history(next(cells for known, cells in self.saved if known is state))
        expected = self.history.generate(prompt)
        index = next(expected)
        for token, following in zip(self.llm.generated, [*self.llm.generated[1:], None], strict=True):
            self.check_token(token, index)
            if following is not None:
                index = expected.send(token)
        self.saved += [(state, list(self.history.cells)) for state in self.llm.saved]

    @rule()
    def use_a_cache(self) -> None:
        self.llm.set_cache(LlamaRAMCache())

    @rule(data=st.data())
    def set_plan(self, data: st.DataObject) -> None:
        self.change_plan(self.draw_plan(data))

    @precondition(lambda self: self.with_bulk)
    @rule(data=st.data())
    def set_a_plan_that_reads_others(self, data: st.DataObject) -> None:
        plan = data.draw(st.sampled_from(self.with_bulk)) if data.draw(st.booleans()) else self.draw_plan(data)
        self.change_plan(plan, data.draw(st.lists(st.sampled_from(self.with_bulk), max_size=3)))

    def change_plan(self, plan: SkipPlan, readable: Sequence[SkipPlan] = ()) -> None:
        self.llm.set_plan(plan, readable=readable)
        self.history.set_plan(plan, readable)

    @rule()
    def clear_the_plan(self) -> None:
        if self.kind.elided:
            with pytest.raises(PlanError, match="open the model without plan="):
                self.llm.set_plan(None)
            return
        # As above: the logits count as old.
        self.llm.set_plan(None)
        self.history.set_plan(NOTHING)
        self.history.logits_are_current = False
        self.llm.set_plan(NOTHING)

    @rule()
    def reset(self) -> None:
        self.llm.reset()
        self.load_history([])

    @rule()
    def save(self) -> None:
        self.saved.append((self.llm.save_state(), list(self.history.cells)))

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), through_a_file=st.booleans())
    def load(self, data: st.DataObject, through_a_file: bool) -> None:
        state, cells = data.draw(st.sampled_from(self.saved))
        self.llm.load_state(pickle.loads(pickle.dumps(state)) if through_a_file else state)
        self.load_history(cells)

    def load_history(self, cells: list[Cell]) -> None:
        self.history.cells, self.history.logits_are_current = list(cells), False

    @rule()
    def collect_statistics_from_here_on(self) -> None:
        self.stop_collecting()
        self.watching = ExitStack()
        self.watching.enter_context(self.llm.collect_statistics(self.observe, keep_logits=True))
        self.history.collects = True

    @rule()
    def stop_collecting(self) -> None:
        if self.watching is not None:
            self.watching.close()
            self.watching = None
            self.history.collects = False
            self.observed.clear()
            self.history.logits_are_current = False

    def observe(self, batch: Any) -> None:
        figures = np.stack([batch.dot, batch.u_sq, batch.v_sq], axis=-1)
        self.observed.update((position, figures[:, :, i]) for i, position in enumerate(batch.positions.tolist()))

    @invariant()
    def the_cache_holds_these_tokens(self) -> None:
        assert self.llm.input_ids[: self.llm.n_tokens].tolist() == self.history.tokens

    @invariant()
    def the_logits_are_those_of_the_reference(self) -> None:
        if self.history.cells and self.history.logits_are_current:
            if self.llm.logits_all:
                actual = self.llm.scores[self.llm.n_tokens - 1]
            else:
                actual = np.ctypeslib.as_array(self.llm._ctx.get_logits_ith(-1), (N_VOCAB,))
            assert relative_error(actual[None], self.history.trace().logits) < self.kind.tolerance

    @invariant()
    def what_runs_is_observed_and_nothing_else(self) -> None:
        last = len(self.history.cells) - 1
        if not (self.history.logits_are_current and last in self.observed):
            return
        runs, trace = ~self.history.cells[last].skip_set.skip, self.history.trace()
        if runs.any():  # where nothing runs, the sink is not called
            figures = self.observed[last]
            np.testing.assert_array_equal(np.isfinite(figures).all(axis=-1), runs)
            expected = np.stack([trace.dot, trace.u_sq, trace.v_sq], axis=-1)[:, :, 0]
            # Relative to the largest of the three: a dot product may be near 0.
            error = np.abs(figures - expected).max(axis=-1) / np.abs(expected).max(axis=-1)
            assert error[runs].max(initial=0.0) < 10 * self.kind.tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_any_calls_give_the_right_logits(
    kind: str, tiny: Tiny, explore: Callable[[Callable[[], Any]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "REFIT_EVERY", 24)  # so that short texts have several fits
    path = tiny(KINDS[kind].family)
    explore(partial(Calls, path, ReferenceModel(path), KINDS[kind]))


def test_a_saved_prompt_gives_what_stays_at_its_place_after_a_run_from_memory(tiny: Tiny) -> None:
    """Drawn by chance in one of many runs. Such tokens count no move, but have K and V of the saved prompt."""
    path = tiny()
    calls = Calls(path, ReferenceModel(path), KINDS["edited"])
    saved, in_memory = [4, 3, 3, 3, 4, 3, 3, 3, 3, 3], [3, 3, 4, 3, 3, 3, 3, 3]
    calls.generate_from(saved, 1)
    calls.save_the_prompt()
    calls.generate_from(in_memory, 2)
    calls.generate_from([*saved, *in_memory, 23, 3], 1)
    cells = calls.history.cells
    assert [each.n_moves for each in cells[:10]] == [0, 64, 64, 64, 0, 0, 0, 0, 0, 0] and cells[5].computed is not None
    calls.the_logits_are_those_of_the_reference()
    calls.teardown()
