"""Where any one allocation fails while the plan is changed, or all from it on: an error of ours, and the model goes on.

What a model computes afterwards is compared with one that has seen no failure, on one thread and bit for bit. As a
program this file changes plans, and prints of each trial ``n``, the allocation that fails, ``error`` and ``wrong``.

Left out are ggml's own small allocations with malloc, 9 in a change of plan without vectors, with which ggml ends the
process: ggml_init's (ggml.c), the allocator's lists (ggml-alloc.c) and the CPU's thread pool (ggml-cpu.c).
"""

import ctypes
import json
import random
import sys
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from faults.preloaded import build, trials
from oracles.every_plan import every_plan
from oracles.expected import last_logits
from oracles.fixtures import Tiny
from oracles.stock import EXACT
from oracles.tiny_families import N_EMBD, N_LAYER

from adaskip_cpp import AdaSkipLlama, SkipPlan
from adaskip_cpp.errors import AdaSkipError, NativeError, PlanError

_EVERY = every_plan(N_LAYER, N_EMBD)
_ATTENTION, _FFN = SkipPlan.manual(3, attention=[1]), SkipPlan.manual(3, ffn=[1, 2], scale=1.1)
_OF_JAMBA = SkipPlan.manual(3, attention=[1], ffn=[0])

CASES: dict[str, tuple[str, SkipPlan | None, SkipPlan | None]] = {
    "first plan": ("llama", None, _ATTENTION),
    "another plan": ("llama", _ATTENTION, _FFN),
    "no plan": ("llama", _FFN, None),
    "maps": ("llama", _ATTENTION, _EVERY["maps"]),
    "windows": ("llama", _EVERY["a bulk"], _EVERY["windows in the bulk"]),
    "online": ("llama", _FFN, _EVERY["an online stage"]),
    "unread": ("llama", _ATTENTION, _FFN),
    "statistics": ("llama", _ATTENTION, _FFN),
    "gemma3": ("gemma3", _ATTENTION, _FFN),
    "gemma4": ("gemma4", SkipPlan.manual(4, ffn=[1]), SkipPlan.manual(4, ffn=[3])),
    "jamba": ("jamba", _ATTENTION, _OF_JAMBA),
    "refused": ("jamba", _ATTENTION, _OF_JAMBA),
}
"""What is changed while allocations fail: the family of the model, the plan in force, and the one that is set."""

REFUSED = SkipPlan.manual(3, attention=[0])
"""A plan that only native code finds fault with: its layer keeps a state."""

PROMPT, MORE = [1, *range(20, 50)], [*range(60, 72)]


def main(case: str, model: str, beyond: int, first: int, step: int, last: int) -> None:
    failing = ctypes.CDLL(None)
    failing.failing_arm.argtypes = [ctypes.c_int64, ctypes.c_int32]
    failing.failing_disarm.restype = ctypes.c_int64
    _, old, new = CASES[case]

    def opened() -> Any:
        return AdaSkipLlama(model, verbose=False, n_ctx=256, **EXACT, logits_all=case != "unread")

    def before(llm: Any) -> None:
        from_the_start(llm, old, PROMPT)

    def change(llm: Any) -> bytes:
        if case == "refused":
            with suppress(PlanError):
                llm.set_plan(REFUSED)
        llm.set_plan(new)
        with llm.collect_statistics(lambda batch: None, keep_logits=True) if case == "statistics" else nullcontext():
            llm.eval(MORE)
        for token in MORE if case == "online" else ():  # what is decoded fills its window, and a new set is made
            llm.eval_decode([token])
        return logits(llm)

    def unharmed(compute: Callable[[Any], Any]) -> Any:
        """What a model that has not seen a failure computes."""
        with closing(opened()) as llm:
            before(llm)
            return compute(llm)

    expected, expected_token = unharmed(change), unharmed(next_token)
    expected_old, expected_new = (unharmed(partial(from_the_start, plan=plan)) for plan in (old, new))
    llm = opened()
    for n in range(first, last + 1, step):
        if case == "first plan":  # what can be skipped is found out once per model
            llm.close()
            llm = opened()
        before(llm)
        error: BaseException | None = None
        failing.failing_arm(n, beyond)
        try:
            change(llm)
        except BaseException as caught:
            error = caught
        n_seen, is_right = failing.failing_disarm(), dict[str, bool]()
        if error is not None:
            is_right["the class of the error"] = isinstance(error, AdaSkipError | MemoryError)
            is_right["what the error says"] = not isinstance(error, NativeError) or "free memory" in str(error)
            if llm.plan == old:
                is_right["the token sampled after the old prompt"] = next_token(llm) == expected_token
                before(llm)
            if llm.plan == new and llm.n_tokens == len(PROMPT) and case != "online":
                llm.eval(MORE)  # only the evaluation failed: it is made again, as it is
            else:
                before(llm)
                change(llm)
        # Where the memory had to be emptied, the prompt is read again under the new plan.
        is_right["logits after the change, made again"] = logits(llm) in (expected, expected_new)
        is_right["logits of the old plan"] = from_the_start(llm, old) == expected_old
        is_right["logits of the new plan"] = from_the_start(llm, new) == expected_new
        wrong = [words for words, is_it in is_right.items() if not is_it]
        if n_seen < n:
            assert error is None and not wrong, f"nothing failed, and yet: {error!r} {wrong}"
            return
        print(json.dumps({"n": n, "error": error and repr(error), "wrong": wrong}), flush=True)


def from_the_start(llm: Any, plan: SkipPlan | None, tokens: Sequence[int] = (*PROMPT, *MORE)) -> bytes:
    llm.reset()
    llm.set_plan(plan)
    llm.eval(tokens)
    return logits(llm)


def logits(llm: Any) -> bytes:
    return bytes(last_logits(llm).tobytes())


def next_token(llm: Any) -> int:
    return int(next(llm.generate(PROMPT, temp=0)))


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("failing_allocations.cpp", tmp_path_factory.mktemp("failing"))


@pytest.mark.parametrize("beyond", [0, 1], ids=["one", "all from it on"])
@pytest.mark.parametrize("case", CASES)
def test_a_failed_allocation_is_an_error_and_the_model_goes_on(
    case: str, beyond: int, failing: Path, tiny: Tiny, pytestconfig: pytest.Config
) -> None:
    step = pytestconfig.option.allocations_step
    numbers = beyond, random.randint(1, step), step, sys.maxsize
    found = trials(failing, "test_memory_faults.py", case, tiny(CASES[case][0]), *numbers)
    assert [trial for trial in found if trial["wrong"]] == []
    assert sum(trial["error"] is not None for trial in found) * step > 500


def test_where_a_refusal_finds_no_memory_for_its_words_it_is_an_error(failing: Path, tiny: Tiny) -> None:
    # Those are the first allocations of all; the exception that carries the words ended the process.
    found = trials(failing, "test_memory_faults.py", "refused", tiny("jamba"), 1, 1, 1, 40)
    assert len(found) == 40 and [trial for trial in found if trial["error"] is None or trial["wrong"]] == []


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
