"""One model that two threads use at a time is refused, as llama.cpp would crash; so are two answers at a time."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from oracles.fixtures import Open
from oracles.readable import logits
from oracles.tiny_families import tokens

from adaskip_cpp import AdaSkipLlama
from adaskip_cpp.errors import StateError

Use = Callable[[AdaSkipLlama, dict[str, Any]], object]
USES: dict[str, Use] = {
    "eval": lambda llm, given: llm.eval([5]),
    "eval_decode": lambda llm, given: llm.eval_decode([5]),
    "eval_bulk": lambda llm, given: llm.eval_bulk([5]),
    "logits_after": lambda llm, given: llm.logits_after([5]),
    "generate": lambda llm, given: next(llm.generate(tokens(5), temp=0)),
    "a step": lambda llm, given: next(given["steps"]),
    "an answer": lambda llm, given: llm("the", max_tokens=1),
    "sample": lambda llm, given: llm.sample(),
    "embed": lambda llm, given: llm.embed("the"),
    "reset": lambda llm, given: llm.reset(),
    "truncate": lambda llm, given: llm.truncate(1),
    "set_plan": lambda llm, given: llm.set_plan(None),
    "set_reuse": lambda llm, given: llm.set_reuse("edits"),
    "save_state": lambda llm, given: llm.save_state(),
    "load_state": lambda llm, given: llm.load_state(given["state"]),
    "save_prompt": lambda llm, given: llm.save_prompt(),
    "load_prompt": lambda llm, given: llm.load_prompt(given["prompt"]),
    "close": lambda llm, given: llm.close(),
}


@pytest.mark.parametrize("name", USES)
def test_a_second_thread_is_refused_during_an_evaluation_which_goes_on(name: str, open_tiny: Open) -> None:
    llm, alone, found = open_tiny(), open_tiny(), list[BaseException | None]()
    steps = llm.generate(tokens(9), temp=0)
    next(steps)
    given = {"steps": steps, "state": llm.save_state(), "prompt": llm.save_prompt()}

    def use(n_tokens: int) -> None:
        llm.on_batch = lambda n: None
        found.append(thread.submit(USES[name], llm, given).exception())

    with ThreadPoolExecutor(1) as thread:
        llm.on_batch = use
        llm.eval(tokens(7, seed=1))
    assert isinstance(found[0], StateError)
    assert "another thread uses this model now" in str(found[0])
    alone.eval([*tokens(9), *tokens(7, seed=1)][: llm.n_tokens])
    assert np.array_equal(llm.input_ids[: llm.n_tokens], [*tokens(9), *tokens(7, seed=1)])
    assert np.allclose(logits(llm), logits(alone), atol=1e-4), "batches are cut otherwise"


def test_threads_may_take_turns_also_between_the_steps_of_an_answer(open_tiny: Open) -> None:
    """As web servers do that run each step of a generator in any thread of a pool."""
    llm, other = open_tiny(), open_tiny()
    steps, expected = llm.generate(tokens(9), temp=0), other.generate(tokens(9), temp=0)
    for _ in range(5):
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(next, steps).result() == next(expected)


def test_an_answer_does_not_go_on_after_another_was_begun(open_tiny: Open) -> None:
    """Its next token would come after the other's tokens."""
    llm, other = open_tiny(), open_tiny()
    first, second = llm.generate(tokens(9), temp=0), llm.generate(tokens(9, seed=1), temp=0)
    next(first)
    found = [next(second)]
    with pytest.raises(StateError, match="another answer was begun meanwhile"):
        next(first)
    found.append(next(second))
    expected = other.generate(tokens(9, seed=1), temp=0)
    assert found == [next(expected), next(expected)], "the second answer is as before"


def test_a_refused_prompt_leaves_the_answer_that_is_being_generated(open_tiny: Open) -> None:
    llm, other = open_tiny(), open_tiny()
    steps, expected = llm.generate(tokens(9), temp=0), other.generate(tokens(9), temp=0)
    next(expected)
    next(steps)
    with pytest.raises(ValueError, match="exceed context window"):
        next(llm.generate(tokens(llm.context_size + 1), temp=0))
    assert next(steps) == next(expected)
