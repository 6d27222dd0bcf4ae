"""Ctrl-C at any moment: a verb ends with its code and its line, files are whole, and a model in a program goes on.

What a model computes afterwards is compared with one that was never interrupted.
"""

import ctypes
import inspect
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from faults.interrupt_trials import VERBS, interrupt, prepare
from oracles.fixtures import Open
from oracles.readable import logits
from oracles.served import Nobody

from adaskip_cpp import SkipPlan
from adaskip_cpp.cli.terminal import Verbs, verb

ATTENTION, FFN = SkipPlan.manual(3, attention=[1]), SkipPlan.manual(3, ffn=[1], scale=1.1)
PROMPT, MORE = [1, *range(20, 32)], [*range(40, 44)]


# --- verbs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted")
    prepare(folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the processes that it starts are found in /proc")
@pytest.mark.parametrize("verb", VERBS)
def test_an_interrupted_verb_ends_with_its_code_and_whole_files(
    verb: str, folder: Path, pytestconfig: pytest.Config
) -> None:
    if verb == "serve":
        pytest.importorskip("uvicorn")
    n = max(round(pytestconfig.option.sigint_trials * VERBS[verb]), 1)
    assert interrupt(verb, folder, n) == []


AMONG_IMPORTS = """
import signal, sys
from importlib.abc import MetaPathFinder

class Finder(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == sys.argv[1]:
            signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Finder())
sys.argv[0] = "/usr/bin/adaskip-cpp"
from adaskip_cpp.cli.main import main
"""


@pytest.mark.parametrize("module", ["adaskip_cpp.errors", "llama_cpp", "rich.console"])
def test_ctrl_c_among_the_imports_of_the_script_is_one_line(module: str) -> None:
    command = [sys.executable, "-c", AMONG_IMPORTS, module]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr) == (130, "Error: interrupted\n")


def test_ctrl_c_in_a_callback_from_c_still_ends_the_verb() -> None:
    # Nothing can be raised through C: Python would tell a traceback, and the verb would go on.
    @ctypes.CFUNCTYPE(None)
    def callback() -> None:
        signal.raise_signal(signal.SIGINT)

    @verb("Wait.", example="wait")
    def wait() -> None:
        callback()
        for _ in range(1000):
            time.sleep(0.01)

    result = CliRunner().invoke(Verbs(commands={"wait": wait}), ["wait"])
    assert (result.exit_code, result.stderr.strip()) == (130, "Error: interrupted")


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
def test_a_server_that_is_just_starting_hears_ctrl_c() -> None:
    pytest.importorskip("uvicorn")
    from adaskip_cpp.serving.queue import FairQueue
    from adaskip_cpp.serving.server import Server, listen

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("nobody asks")

    class Ended(Nobody):
        async def close(self, seconds: float) -> None:
            ended.append(True)

    ended: list[bool] = []
    with listen("127.0.0.1", 0) as listener, interrupted_after(30):  # which it does not come to
        Server(app, FairQueue(1), Ended(), listener, lambda: signal.raise_signal(signal.SIGINT)).run()
    assert ended == [True]


# --- in a program -----------------------------------------------------------------------------------------------------


class InterruptedAt:
    """Raises a KeyboardInterrupt at the n-th moment at which Python would: where a function begins, or has returned.

    Python looks at signals there and where a loop goes round. ``seen`` counts the moments.
    """

    def __init__(self, n: int) -> None:
        self._n, self.seen = n, 0

    def __enter__(self) -> "InterruptedAt":
        sys.setprofile(self._moment)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.setprofile(None)

    def _moment(self, frame: Any, event: str, argument: Any) -> None:
        name, is_generator = frame.f_code.co_filename, frame.f_code.co_flags & inspect.CO_GENERATOR
        # Where a generator yields nothing is raised in it, but in who asked it.
        if event == "c_call" or (event == "return" and is_generator):
            return
        if any(part in name for part in ("adaskip_cpp", "llama_cpp", "contextlib")):
            self.seen += 1
            if self.seen == self._n:
                sys.setprofile(None)
                raise KeyboardInterrupt


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Raise a KeyboardInterrupt as Ctrl-C does, by a signal, after so many seconds."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def generate(llm: Any) -> None:
    tokens = llm.generate([*PROMPT, *MORE], temp=0)
    for _ in range(3):
        next(tokens)
    tokens.close()


def change_plan(llm: Any) -> None:
    llm.set_plan(FFN)
    llm.eval(MORE)


def collect(llm: Any) -> None:
    with llm.collect_statistics(lambda batch: None, keep_logits=True):
        llm.eval(MORE)


CALLS = {"evaluate": lambda llm: llm.eval(MORE), "generate": generate, "change plan": change_plan, "collect": collect}


def check(llm: Any, fresh: Any) -> None:
    """It goes on from where it is, generates and takes plans as one that was never interrupted."""
    assert llm.plan in (ATTENTION, FFN)
    fresh.set_plan(llm.plan)
    fresh.reset()
    fresh.eval([*llm.input_ids[: llm.n_tokens].tolist(), 7, 8])
    llm.eval([7, 8])
    # F32, but other batch sizes; and recurrent states are carried over.
    np.testing.assert_allclose(logits(llm), logits(fresh), rtol=1e-3, atol=1e-4)
    for each in (llm, fresh):
        next(each.generate([*PROMPT, 9], temp=0))
    np.testing.assert_allclose(logits(llm), logits(fresh), rtol=1e-3, atol=1e-4)
    with llm.collect_statistics(lambda batch: None):
        llm.eval([5])
    for plan in (None, FFN):
        for each in (llm, fresh):
            each.reset()
            each.set_plan(plan)
            each.eval([*PROMPT, *MORE])
        np.testing.assert_array_equal(logits(llm), logits(fresh))


@pytest.mark.parametrize("family", ["llama", "gemma3", "jamba"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_model_goes_on_wherever_a_call_is_interrupted(
    call: Callable[[Any], None], family: str, open_tiny: Open
) -> None:
    llm, fresh = (open_tiny(family, swa_full=False) for _ in range(2))
    n, n_interrupted = -random.randrange(2), 0  # every second moment
    while True:
        n += 2
        llm.reset()
        llm.set_plan(ATTENTION)
        llm.eval(PROMPT)
        moments = InterruptedAt(n)
        with suppress(KeyboardInterrupt), moments:
            call(llm)
        if moments.seen < n:
            break
        n_interrupted += 1
        try:
            check(llm, fresh)
        except BaseException as error:
            error.add_note(f"interrupted at moment {n}") if hasattr(error, "add_note") else None
            raise
    assert n_interrupted > 10


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
@pytest.mark.parametrize("family", ["llama", "gemma3", "jamba"])
def test_a_model_goes_on_after_signals_at_random_moments(family: str, open_tiny: Open) -> None:
    llm, fresh = (open_tiny(family, swa_full=False) for _ in range(2))
    for call in [*CALLS.values()] * 12:
        llm.reset()
        llm.set_plan(ATTENTION)
        llm.eval(PROMPT)
        with suppress(KeyboardInterrupt), interrupted_after(random.uniform(1e-5, 4e-3)):
            call(llm)
        check(llm, fresh)
