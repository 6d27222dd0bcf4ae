"""Any sequence of prompts, generation, changes of plan, resets and saved states, against the NumPy reference.

The oracle keeps, per position, its token and the sets that it was computed under, applies the documented rule (a
position is read again only if every attention that is to run now ran for it), and evaluates that history in a fresh
ReferenceRun, which refuses to read a position without K and V. Tolerances: F32 against float64, where 1.3e-6 was the
largest relative error over 40 seeds; with flash attention, which rounds to F16 on the CPU, 3.6e-3.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import ReferenceModel, ReferenceRun, relative_error
from tiny_families import N_LAYER, N_VOCAB

from adaskip_cpp import SkipPlan
from adaskip_cpp.plan import SkipSet

TOLERANCE = {False: 1e-5, True: 1e-2}  # with and without flash attention
NOTHING = SkipPlan(SkipSet.none(N_LAYER), SkipSet.none(N_LAYER))


@dataclass
class History:
    """What the cache must hold: (token, the set that it was computed under) per position."""

    cells: list[tuple[int, SkipSet]] = field(default_factory=list)
    plan: SkipPlan = NOTHING
    logits_are_current: bool = False

    def run(self, tokens: list[int], skip_set: SkipSet) -> None:
        """Evaluate tokens behind what is cached, after evaluating again what ``skip_set`` cannot read."""
        for position, (_, have) in enumerate(self.cells):
            if set(have.attention) - set(skip_set.attention):
                self.cells[position:] = [(token, self.plan.prefill) for token, _ in self.cells[position:]]
                break
        self.cells += [(token, skip_set) for token in tokens]
        self.logits_are_current = True

    def prompt(self, tokens: list[int]) -> None:
        """A new request: llama-cpp-python keeps the common prefix, and evaluates at least one token."""
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
        self.run(tokens[common:], self.plan.prefill)

    def logits(self, model: ReferenceModel) -> np.ndarray:
        """Logits of the last position, from scratch."""
        run = ReferenceRun(model)
        for token, skip_set in self.cells:
            trace = run.eval([token], skip_set.skip, skip_set.scale)
        return np.asarray(trace.logits[-1])


def random_plan(rng: np.random.Generator) -> SkipPlan:
    """Nothing, the same set in both phases, or more in decode than in prefill."""
    kind = rng.integers(4)
    if kind == 0:
        return NOTHING
    sets = []
    skip = np.zeros((N_LAYER, 2), bool)
    for _ in range(2):
        if kind > 1 or not sets:
            skip = skip | (rng.random((N_LAYER, 2)) < 0.3)
        sets.append(SkipSet(skip.copy(), rng.uniform(0.7, 1.4, (N_LAYER, 2))))
    return SkipPlan(sets[0], sets[1] if kind > 1 else sets[0])


@pytest.mark.parametrize("flash_attn", [False, True], ids=["no flash", "flash"])
@pytest.mark.parametrize("seed", range(12))
def test_any_sequence_of_calls_reads_no_stale_kv(
    seed: int, flash_attn: bool, tiny: Callable[..., Path], open_model: Callable[..., Any]
) -> None:
    rng = np.random.default_rng(seed)
    path = tiny()
    model = ReferenceModel(path)
    llm = open_model(path, n_ctx=512, n_batch=int(rng.choice([4, 16, 512])), flash_attn=flash_attn)
    history, saved = History(), None

    def draw(n: int) -> list[int]:
        return [int(token) for token in rng.integers(3, N_VOCAB, n)]

    for _ in range(14):
        match rng.choice(["eval", "generate", "chat", "plan", "plan", "reset", "save", "load"]):
            case "eval":
                tokens = draw(int(rng.integers(1, 9)))
                llm.eval(tokens)
                history.run(tokens, history.plan.prefill)
            case "generate" | "chat" as call:
                n_kept = int(rng.integers(0, len(history.cells) + 1)) if call == "generate" else len(history.cells)
                prompt = [token for token, _ in history.cells[:n_kept]] + draw(int(rng.integers(1, 6)))
                n_steps = int(rng.integers(1, 7))
                steps = llm.generate(prompt, temp=0)
                generated = [next(steps) for _ in range(n_steps)]
                steps.close()
                history.prompt(prompt)
                for token in generated[:-1]:
                    history.run([token], history.plan.decode)
            case "plan":
                plan = random_plan(rng)
                llm.set_plan(plan)
                history.logits_are_current &= plan == history.plan
                history.plan = plan
            case "reset":
                llm.reset()
                history.cells, history.logits_are_current = [], False
            case "save":
                saved = llm.save_state(), list(history.cells)
            case "load" if saved is not None:
                llm.load_state(saved[0])
                history.cells, history.logits_are_current = list(saved[1]), False
        assert llm.input_ids[: llm.n_tokens].tolist() == [token for token, _ in history.cells]
        if history.cells and history.logits_are_current:
            actual = llm.scores[llm.n_tokens - 1]
            assert relative_error(actual[None], history.logits(model)[None]) < TOLERANCE[flash_attn]
