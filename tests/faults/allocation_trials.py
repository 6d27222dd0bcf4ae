"""Run as a program: changes plans while one allocation after the other fails, and tells what became of each.

A line of JSON per trial on stdout, its number first on a line of its own: if the process ends there, it is known where.
:func:`trials` starts it, and starts it again after a trial that ended it.
"""

import contextlib
import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["BUFFERS", "CASES", "GGML", "LLAMA", "Outcome", "trials"]

LLAMA, BUFFERS, GGML = 1, 2, 4
"""Whose allocations fail: enum who of failing_allocations.cpp."""

CASES = (
    *("first plan", "another plan", "no plan", "maps", "windows", "online"),
    *("gemma3", "jamba", "gemma4", "unread", "refused"),
)
"""What is changed while allocations fail."""


@dataclass(frozen=True)
class Outcome:
    """What became of a trial: ``end`` is "raised", "worked" or "died"; ``wrong`` what was not as it should be."""

    n: int
    end: str
    error: str = ""
    wrong: tuple[str, ...] = ()


def trials(
    library_environment: dict[str, str],
    model: Path,
    case: str,
    who: int,
    beyond: bool,
    *,
    first: int = 1,
    step: int = 1,
    last: int = sys.maxsize,
) -> list[Outcome]:
    """Trials of a case: the n-th allocation fails, and with ``beyond`` all after it, for n = first, first + step ..."""
    found: list[Outcome] = []
    while True:
        words = map(str, (model, case, who, int(beyond), first, step, last))
        command = [sys.executable, __file__, *words]
        process = subprocess.run(command, env=library_environment, capture_output=True, text=True, check=False)
        *_, reached = [0, *(int(line) for line in process.stdout.splitlines() if line.isdigit())]
        lines = [json.loads(line) for line in process.stdout.splitlines() if not line.isdigit()]
        found += [Outcome(each["n"], each["end"], each["error"], tuple(each["wrong"])) for each in lines]
        if process.returncode == 0:
            return found
        if reached < first:  # before any trial
            raise RuntimeError(process.stderr[-3000:])
        found.append(Outcome(reached, "died", f"{process.returncode}: {process.stderr.splitlines()[-1:]}"))
        first = reached + step


def main(model: str, case: str, who: int, beyond: int, first: int, step: int, last: int) -> None:
    import adaskip_cpp
    from adaskip_cpp.errors import AdaSkipError, PlanError

    llama_cpp = sys.modules["llama_cpp"]  # which adaskip_cpp imports

    failing = ctypes.CDLL(None)
    failing.failing_arm.argtypes = [ctypes.c_int32, ctypes.c_int64, ctypes.c_int32]
    failing.failing_disarm.restype = ctypes.c_int64

    old, new = _plans(case)
    options: dict[str, Any] = {"type_k": 0, "type_v": 0, "n_threads": 1, "n_threads_batch": 1, "n_ctx": 256}
    prompt, more = [1, *range(20, 50)], [*range(60, 72)]

    def opened() -> Any:
        return adaskip_cpp.AdaSkipLlama(model, verbose=False, logits_all=case != "unread", **options)

    def logits(llm: Any) -> npt.NDArray[np.float32]:
        row = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
        return np.ctypeslib.as_array(row, shape=(llm.n_vocab(),)).copy()

    def before(llm: Any) -> None:
        llm.reset()
        llm.set_plan(old)
        llm.eval(prompt)

    def change(llm: Any) -> None:
        if case == "refused":
            with contextlib.suppress(PlanError):
                llm.set_plan(_refused())
        llm.set_plan(new)
        llm.eval(more)
        if case == "online":
            for token in more:  # what is decoded fills its window, and a new set is made
                llm.eval_decode([token])

    def changed(llm: Any) -> npt.NDArray[np.float32]:
        change(llm)
        return logits(llm)

    def again(llm: Any, plan: Any) -> npt.NDArray[np.float32]:
        llm.reset()
        llm.set_plan(plan)
        llm.eval([*prompt, *more])
        return logits(llm)

    def told(what: Callable[[], Any]) -> Any:
        """What a model that has not seen a failure computes."""
        nonlocal llm
        llm = opened()
        before(llm)
        result = what()
        llm.close()
        return result

    llm: Any = None
    expected = told(lambda: changed(llm))
    expected_old, expected_new = told(lambda: again(llm, old)), told(lambda: again(llm, new))
    expected_token = told(lambda: next(llm.generate(prompt, temp=0)))

    is_fresh = case == "first plan"  # what can be skipped is found out once per model
    llm = opened()
    for n in range(first, last + 1, step):
        if is_fresh:
            llm.close()
            llm = opened()
        before(llm)
        print(n, flush=True)
        error: BaseException | None = None
        failing.failing_arm(who, n, beyond)
        try:
            change(llm)
        except BaseException as caught:
            error = caught
        n_seen = failing.failing_disarm()
        wrong = []
        if error is not None and not isinstance(error, (AdaSkipError, MemoryError)):
            wrong.append(f"{type(error).__name__}: {error}")
        if error is not None and llm.plan == old:
            token = next(llm.generate(prompt, temp=0))
            if token != expected_token:
                wrong.append("the token sampled after the old prompt")
            before(llm)
        if error is not None and llm.plan == new and llm.n_tokens == len(prompt) and case != "online":
            llm.eval(more)  # only the evaluation failed: it is made again, as it is
        elif error is not None:
            before(llm)
            change(llm)
        # Where the memory had to be emptied, the prompt is read again under the new plan.
        if not any(np.array_equal(logits(llm), each) for each in (expected, expected_new)):
            wrong.append("logits after the change, made again")
        if not np.array_equal(again(llm, old), expected_old):
            wrong.append("logits of the old plan")
        if not np.array_equal(again(llm, new), expected_new):
            wrong.append("logits of the new plan")
        if n_seen < n:
            if error is not None or wrong:
                raise AssertionError(f"nothing failed, and yet: {error!r} {wrong}")
            return
        end = "worked" if error is None else "raised"
        print(json.dumps({"n": n, "end": end, "error": f"{type(error).__name__}: {error}", "wrong": wrong}), flush=True)


def _refused() -> Any:
    """A plan that only native code finds fault with: its layer keeps a state."""
    from adaskip_cpp import SkipPlan

    return SkipPlan.manual(3, attention=[0])


def _plans(case: str) -> tuple[Any, Any]:
    """The plan in force, and the one that is set."""
    from adaskip_cpp import SkipPlan
    from adaskip_cpp.model.plan import Bulk, OnlineStage
    from adaskip_cpp.model.skip_set import SkipSet

    attention, ffn = SkipPlan.manual(3, attention=[1]), SkipPlan.manual(3, ffn=[1, 2], scale=1.1)
    if case == "first plan":
        return None, attention
    if case == "no plan":
        return ffn, None
    if case == "maps":
        rng = np.random.default_rng(0)
        skip = np.array([[0, 1], [1, 0], [0, 1]], bool)
        down, up = rng.normal(0, 0.1, (2, 3, 2, 2, 64)).astype(np.float32)
        bias = rng.normal(0, 0.3, (3, 2, 64)).astype(np.float32)
        maps = SkipSet(skip, np.full((3, 2), 0.9), bias, down, up.swapaxes(2, 3).copy())
        return attention, SkipPlan(maps, maps)
    if case == "windows":
        from dataclasses import replace

        bulk = SkipPlan.manual(3, ffn=[1], phase="bulk")
        return bulk, replace(bulk, bulk=Bulk(bulk.skipped("bulk"), windowed=(0, 2), window_size=4, head=2, tail=4))
    if case == "online":
        return ffn, SkipPlan(attention.prefill, attention.decode, online=OnlineStage(window=4, threshold=-1.0))
    if case in ("jamba", "refused"):
        return attention, SkipPlan.manual(3, attention=[1], ffn=[0])
    if case == "gemma4":
        return SkipPlan.manual(4, ffn=[1]), SkipPlan.manual(4, ffn=[3])
    return attention, ffn


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
