"""Run as a program: changes plans while one allocation after the other fails, and prints what became of each trial.

- ``n``: the n-th allocation fails, or all from it on;
- ``error``: what was raised, or null;
- ``wrong``: what was not as it should be.
"""

import ctypes
import json
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from typing import Any

import numpy as np
from oracles.every_plan import every_plan
from oracles.stock import EXACT
from oracles.tiny_families import N_EMBD, N_LAYER

from adaskip_cpp import AdaSkipLlama, SkipPlan
from adaskip_cpp.errors import AdaSkipError, NativeError, PlanError

__all__ = ["CASES"]

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
        llm.reset()
        llm.set_plan(old)
        llm.eval(PROMPT)

    def change(llm: Any) -> bytes:
        if case == "refused":
            with suppress(PlanError):
                llm.set_plan(REFUSED)
        llm.set_plan(new)
        if case == "statistics":
            with llm.collect_statistics(lambda batch: None, keep_logits=True):
                llm.eval(MORE)
        else:
            llm.eval(MORE)
        if case == "online":
            for token in MORE:  # what is decoded fills its window, and a new set is made
                llm.eval_decode([token])
        return logits(llm)

    def from_the_start(llm: Any, plan: SkipPlan | None) -> bytes:
        llm.reset()
        llm.set_plan(plan)
        llm.eval([*PROMPT, *MORE])
        return logits(llm)

    def unharmed(compute: Callable[[Any], Any]) -> Any:
        """What a model that has not seen a failure computes."""
        with closing(opened()) as llm:
            before(llm)
            return compute(llm)

    expected, expected_token = unharmed(change), unharmed(next_token)
    expected_old = unharmed(lambda llm: from_the_start(llm, old))
    expected_new = unharmed(lambda llm: from_the_start(llm, new))

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
        n_seen = failing.failing_disarm()
        wrong = []
        if error is not None:
            if not isinstance(error, AdaSkipError | MemoryError):
                wrong.append("the class of the error")
            if isinstance(error, NativeError) and "free memory" not in str(error):
                wrong.append("what the error says")
            if llm.plan == old:
                if next_token(llm) != expected_token:
                    wrong.append("the token sampled after the old prompt")
                before(llm)
            if llm.plan == new and llm.n_tokens == len(PROMPT) and case != "online":
                llm.eval(MORE)  # only the evaluation failed: it is made again, as it is
            else:
                before(llm)
                change(llm)
        # Where the memory had to be emptied, the prompt is read again under the new plan.
        if logits(llm) not in (expected, expected_new):
            wrong.append("logits after the change, made again")
        if from_the_start(llm, old) != expected_old:
            wrong.append("logits of the old plan")
        if from_the_start(llm, new) != expected_new:
            wrong.append("logits of the new plan")
        if n_seen < n:
            if error is not None or wrong:
                raise AssertionError(f"nothing failed, and yet: {error!r} {wrong}")
            return
        print(json.dumps({"n": n, "error": error and repr(error), "wrong": wrong}), flush=True)


def logits(llm: Any) -> bytes:
    """Those of the last token that was evaluated."""
    import llama_cpp  # after adaskip_cpp

    row = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
    return np.ctypeslib.as_array(row, shape=(llm.n_vocab(),)).tobytes()


def next_token(llm: Any) -> int:
    return int(next(llm.generate(PROMPT, temp=0)))


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
