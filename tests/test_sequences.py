"""Any sequence of calls, found by Hypothesis, against the NumPy reference.

The oracle keeps, per position, its token and the set that it was computed under. It applies the documented rule: before
tokens run, every position that lacks an attention which is to run is evaluated again as prompt. A fresh context of the
reference, which refuses to read a position without K and V, then evaluates that history. Tolerances: F32 against
float64, where 1.3e-6 was the largest relative error; with flash attention, which rounds to F16 on the CPU, 3.6e-3.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from llama_cpp import LlamaRAMCache
from reference import OnlineReference, ReferenceModel, ReferenceRun, Trace, relative_error
from stock import EXACT
from tiny_families import N_EMBD, N_LAYER, N_VOCAB

from adaskip_cpp import AdaSkipLlama, SkipPlan
from adaskip_cpp.model.plan import OnlineStage, SkipSet

TOLERANCE = {False: 1e-5, True: 1e-2}  # with and without flash attention
N_CTX = 512
NOTHING = SkipPlan(SkipSet.none(N_LAYER), SkipSet.none(N_LAYER))


class Cells:
    """The reference's context for a history of (token, set), evaluated no further than asked for."""

    def __init__(self, model: ReferenceModel) -> None:
        self._run = ReferenceRun(model)
        self._done: list[tuple[int, SkipSet]] = []
        self._traces: list[Trace] = []

    def last(self, cells: list[tuple[int, SkipSet]]) -> Trace:
        """The trace of the last position of this history."""
        common = 0
        while common < min(len(cells), len(self._done)) and cells[common] == self._done[common]:
            common += 1
        self._run.rewind(common)
        del self._done[common:], self._traces[common:]
        for token, each in cells[common:]:
            self._traces.append(self._run.eval([token], each.skip, each.scale, each.bias))
            self._done.append((token, each))
        return self._traces[-1]


@dataclass
class History:
    """What the cache must hold, and what the next decoded token must run under."""

    reference: Cells
    cells: list[tuple[int, SkipSet]] = field(default_factory=list)
    plan: SkipPlan = NOTHING
    logits_are_current: bool = False
    n_decoded: int = 0
    stage: OnlineReference | None = None

    def set_plan(self, plan: SkipPlan) -> None:
        if plan != self.plan:
            self.plan, self.logits_are_current = plan, False
            self.begin_request()

    def begin_request(self) -> None:
        online, fixed = self.plan.online, self.plan.decode
        self.n_decoded, self.stage = 0, None
        if online is not None:
            self.stage = OnlineReference(online.window, online.threshold, online.scale, fixed.skip, fixed.scale)

    def decode_set(self) -> SkipSet:
        if self.stage is not None:
            return SkipSet(self.stage.skip, self.stage.factor, self.plan.decode.bias)
        return [each for start, each in self.plan.schedule or ((0, self.plan.decode),) if start <= self.n_decoded][-1]

    def eval(self, tokens: list[int], skip_set: SkipSet) -> None:
        """Evaluate tokens behind what is cached, after evaluating again what ``skip_set`` cannot read."""
        if self._n_readable(skip_set) < len(self.cells):
            start = self._n_readable(self.plan.prefill)
            self.cells[start:] = [(token, self.plan.prefill) for token, _ in self.cells[start:]]
        self.cells += [(token, skip_set) for token in tokens]
        self.logits_are_current = True

    def _n_readable(self, skip_set: SkipSet) -> int:
        for position, (_, have) in enumerate(self.cells):
            if set(have.attention) - set(skip_set.attention):
                return position
        return len(self.cells)

    def prompt(self, tokens: list[int]) -> None:
        """A new request: llama-cpp-python keeps the common prefix, and evaluates at least one token."""
        self.begin_request()
        common = 0
        for (token, _), other in zip(self.cells, tokens, strict=False):
            if token != other:
                break
            common += 1
        if common == len(tokens):
            if len(self.cells) == len(tokens) and self.logits_are_current:
                return
            common -= 1
        del self.cells[common:]
        self.eval(tokens[common:], self.plan.prefill)

    def decode(self, token: int) -> None:
        """Evaluate one generated token."""
        self.eval([token], self.decode_set())
        self.n_decoded += 1
        if self.stage is not None:
            self.stage.observe(self.reference.last(self.cells))

    def logits(self) -> np.ndarray:
        """Logits of the last position."""
        return np.asarray(self.reference.last(self.cells).logits[-1])


class WatchedLlama(AdaSkipLlama):
    """Tells which saved states ``create_completion`` loads from its cache and saves to it."""

    loaded: list[Any]
    saved: list[Any]

    def load_state(self, state: Any) -> None:
        self.loaded.append(state)
        super().load_state(state)

    def save_state(self) -> Any:
        self.saved.append(super().save_state())
        return self.saved[-1]


flags = st.lists(st.booleans(), min_size=2 * N_LAYER, max_size=2 * N_LAYER).map(
    lambda row: np.array(row).reshape(N_LAYER, 2)
)


@st.composite
def skip_sets(draw: st.DrawFn, skip: np.ndarray) -> SkipSet:
    """A set that skips exactly these, with compensations of each kind."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    scale = rng.uniform(0.7, 1.4, (N_LAYER, 2)) if draw(st.booleans()) else np.ones((N_LAYER, 2))
    bias = rng.normal(0, 0.3, (N_LAYER, 2, N_EMBD)).astype(np.float32) if draw(st.booleans()) else None
    return SkipSet(skip, scale, bias)


@st.composite
def plans(draw: st.DrawFn, thresholds: list[float]) -> SkipPlan:
    """Nothing, or sets of which each skips every attention of the one before, in every form that a plan has."""
    form = draw(st.sampled_from(["nothing", "same", "decode only", "growing", "schedule", "online"]))
    if form == "nothing":
        return NOTHING
    first = draw(flags)
    prefill = draw(skip_sets(first)) if form != "decode only" else SkipSet.none(N_LAYER)
    second = draw(flags)
    second[:, 0] |= prefill.skip[:, 0]
    decode = prefill if form == "same" else draw(skip_sets(second))
    if form == "online":
        stage = OnlineStage(
            window=draw(st.integers(1, 4)),
            threshold=draw(st.sampled_from(thresholds)),
            scale=draw(st.sampled_from(["none", "paper", "median"])),
        )
        return SkipPlan(prefill, decode, online=stage)
    if form == "schedule":
        third = draw(flags)
        third[:, 0] |= decode.skip[:, 0]
        return SkipPlan(prefill, decode, schedule=((0, decode), (draw(st.integers(1, 4)), draw(skip_sets(third)))))
    return SkipPlan(prefill, decode)


tokens = st.lists(st.integers(3, N_VOCAB - 1), min_size=1, max_size=8)


class Calls(RuleBasedStateMachine):
    """One model and its history, through calls in any order.

    Args:
        path: a tiny model of the llama architecture.
        model: the same in NumPy.
        flash_attn: whether llama.cpp computes with flash attention; then the online threshold is never near a figure.
        n_batch: tokens per call of llama_decode.
    """

    def __init__(self, path: Path, model: ReferenceModel, flash_attn: bool, n_batch: int) -> None:
        super().__init__()
        self.flash_attn = flash_attn
        self.llm = WatchedLlama(
            str(path),
            n_ctx=N_CTX,
            n_batch=n_batch,
            logits_all=True,
            verbose=False,
            **{**EXACT, "flash_attn": flash_attn},
        )
        self.llm.loaded, self.llm.saved = [], []
        self.history = History(Cells(model))
        self.saved: list[tuple[Any, list[tuple[int, SkipSet]]]] = []

    def teardown(self) -> None:
        self.llm.close()

    def has_room(self) -> bool:
        return len(self.history.cells) < N_CTX - 64

    def draw_plan(self, data: st.DataObject) -> SkipPlan:
        return data.draw(plans([-1.0, 2.0] if self.flash_attn else [-1.0, 0.6, 0.7, 0.75, 0.8, 0.85, 2.0]))

    def check_token(self, token: int) -> None:
        if not self.flash_attn:
            assert token == int(self.history.logits().argmax())

    @precondition(has_room)
    @rule(new=tokens)
    def evaluate(self, new: list[int]) -> None:
        self.llm.eval(new)
        self.history.eval(new, self.history.plan.prefill)

    @precondition(has_room)
    @rule(
        data=st.data(), new=tokens, n=st.integers(1, 8), kept=st.floats(0, 1), ends=st.sampled_from(["close", "drop"])
    )
    def generate(self, data: st.DataObject, new: list[int], n: int, kept: float, ends: str) -> None:
        """A prompt that shares a part of what is cached (1: a chat's next turn), then n tokens."""
        shared = [token for token, _ in self.history.cells][: round(kept * len(self.history.cells))]
        self.generate_from([*shared, *new], n, None)

    @precondition(has_room)
    @rule(data=st.data(), new=tokens, n=st.integers(2, 8))
    def change_the_plan_while_generating(self, data: st.DataObject, new: list[int], n: int) -> None:
        """From any plan to any plan; or to one that reads what the prompt left, but not what decode left."""
        plan = self.draw_plan(data)
        if data.draw(st.booleans()):
            one, other, _ = data.draw(st.permutations(range(N_LAYER)))
            fewer, more = SkipPlan.manual(N_LAYER, [one]).prefill, SkipPlan.manual(N_LAYER, [one, other]).prefill
            self.change_plan(SkipPlan(fewer, more))
            plan = SkipPlan(SkipSet.none(N_LAYER), fewer)
        self.generate_from(
            [token for token, _ in self.history.cells] + new, n, (data.draw(st.integers(1, n - 1)), plan)
        )

    @precondition(lambda self: self.history.cells)
    @rule(n=st.integers(1, 4))
    def generate_from_what_is_cached(self, n: int) -> None:
        self.generate_from([token for token, _ in self.history.cells], n, None)

    def generate_from(self, prompt: list[int], n: int, change: tuple[int, SkipPlan] | None) -> None:
        steps = self.llm.generate(prompt, temp=0.0)
        token = next(steps)
        self.history.prompt(prompt)
        self.check_token(token)
        for i in range(1, n):
            if change is not None and change[0] == i:
                self.change_plan(change[1])
            following = next(steps)
            self.history.decode(token)
            token = following
            self.check_token(token)
        steps.close()

    @precondition(has_room)
    @rule(new=tokens, n=st.integers(1, 6), kept=st.floats(0, 1), data=st.data())
    def complete_with_a_cache(self, new: list[int], n: int, kept: float, data: st.DataObject) -> None:
        """LlamaRAMCache: a prompt that shares something with a saved one loads that one's state."""
        source = data.draw(st.sampled_from([self.history.cells, *(cells for _, cells in self.saved)]))
        prompt = [token for token, _ in source][: round(kept * len(source))] + new
        self.llm.loaded, self.llm.saved = [], []
        self.llm.create_completion(prompt, max_tokens=n, temperature=0.0)
        for state in self.llm.loaded:
            self.load_history(next(cells for known, cells in self.saved if known is state))
        self.history.prompt(prompt)
        for token in self.llm.input_ids[len(prompt) : self.llm.n_tokens].tolist():
            self.check_token(token)
            self.history.decode(token)
        self.saved += [(state, list(self.history.cells)) for state in self.llm.saved]

    @rule()
    def use_a_cache(self) -> None:
        self.llm.set_cache(LlamaRAMCache())

    @rule(data=st.data())
    def set_plan(self, data: st.DataObject) -> None:
        self.change_plan(self.draw_plan(data))

    def change_plan(self, plan: SkipPlan) -> None:
        self.llm.set_plan(plan)
        self.history.set_plan(plan)

    @rule()
    def clear_the_plan(self) -> None:
        # None and a plan that skips nothing run alike; set_plan tells them apart, so the logits count as old.
        self.llm.set_plan(None)
        self.history.set_plan(NOTHING)
        self.history.logits_are_current = False
        self.llm.set_plan(NOTHING)

    @rule()
    def reset(self) -> None:
        self.llm.reset()
        self.history.cells, self.history.logits_are_current = [], False

    @rule()
    def save(self) -> None:
        self.saved.append((self.llm.save_state(), list(self.history.cells)))

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), through_a_file=st.booleans())
    def load(self, data: st.DataObject, through_a_file: bool) -> None:
        state, cells = data.draw(st.sampled_from(self.saved))
        self.llm.load_state(pickle.loads(pickle.dumps(state)) if through_a_file else state)
        self.load_history(cells)

    def load_history(self, cells: list[tuple[int, SkipSet]]) -> None:
        self.history.cells, self.history.logits_are_current = list(cells), False

    @invariant()
    def the_cache_holds_these_tokens(self) -> None:
        assert self.llm.input_ids[: self.llm.n_tokens].tolist() == [token for token, _ in self.history.cells]

    @invariant()
    def the_logits_are_those_of_the_reference(self) -> None:
        if self.history.cells and self.history.logits_are_current:
            actual = self.llm.scores[self.llm.n_tokens - 1]
            assert relative_error(actual[None], self.history.logits()[None]) < TOLERANCE[self.flash_attn]


@pytest.mark.parametrize(("flash_attn", "n_batch"), [(False, 3), (False, 512), (True, 3)])
def test_any_sequence_of_calls_gives_the_logits_of_a_fresh_model(
    flash_attn: bool, n_batch: int, tiny: Callable[..., Path]
) -> None:
    model = ReferenceModel(tiny())
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        partial(Calls, tiny(), model, flash_attn, n_batch),
        settings=settings(
            max_examples=100,
            stateful_step_count=20,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )
