"""Fixtures: tiny models written on demand, the two real models, models opened for one test, and drawn sequences."""

import contextlib
import functools
import os
import random
import signal
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from oracles.drawn_sequences import run_drawn_sequences
from oracles.fixtures import Open, Tiny
from oracles.models import ModelMissingError, gemma3, smollm2, smollm2_f32
from oracles.reference import ReferenceModel
from oracles.rpc_server import register_rpc_server, start_rpc_servers
from oracles.served import BULK_PLAN
from oracles.stock import OPTIONS, RPC_SERVERS
from oracles.tiny_models import add_chat_template, write_model

import adaskip_cpp
from adaskip_cpp.model.plan_file import save_plan


@pytest.fixture(autouse=True)
def one_core(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models run on one thread: two wait for each other many times longer than they compute."""
    if hasattr(os, "sched_getaffinity") and request.node.get_closest_marker("model") is None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """``tiny(name="llama", zero=(), seed=0)``: the path of a tiny model, written on first use."""
    folder = tmp_path_factory.mktemp("tiny")

    def path(name: str = "llama", zero: Collection[tuple[int, str]] = (), seed: int = 0) -> Path:
        target = folder / "-".join([name, str(seed), *(f"{layer}{kind}" for layer, kind in zero), "f32.gguf"])
        return target if target.exists() else write_model(target, name, seed=seed, zero=zero)

    return path


@pytest.fixture(scope="session")
def served_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of three layers, with a chat template, for servers."""
    folder = tmp_path_factory.mktemp("served")
    return add_chat_template(write_model(folder / "bare.gguf"), folder / "tiny.gguf")


@pytest.fixture(scope="session")
def served_plan(served_model: Path) -> Path:
    """The file of ``BULK_PLAN``, not beside that model."""
    path = served_model.with_name("plan.json")
    save_plan(path, BULK_PLAN)
    return path


@pytest.fixture
def open_model() -> Iterator[Open]:
    """``open_model(path, **options)``: an AdaSkipLlama with F32 KV and all logits, closed after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda path, **options: stack.enter_context(
            contextlib.closing(adaskip_cpp.AdaSkipLlama(str(path), verbose=False, **{**OPTIONS, **options}))
        )


@pytest.fixture
def open_tiny(tiny: Tiny, open_model: Open) -> Open:
    """``open_tiny(name="llama", zero=(), under=None, **options)``: that tiny model, with ``under`` as its plan."""

    def open_(name: str = "llama", zero: Any = (), under: Any = None, **options: Any) -> Any:
        llm = open_model(tiny(name, zero), **options)
        if under is not None:
            llm.set_plan(under)
        return llm

    return open_


@pytest.fixture(scope="session")
def numpy_model(tiny: Tiny) -> Callable[..., ReferenceModel]:
    """``numpy_model(name="llama")``: that tiny model in NumPy, in float64; not to be changed."""
    return functools.cache(lambda name="llama": ReferenceModel(tiny(name)))


@pytest.fixture(scope="session")
def model_cache(request: pytest.FixtureRequest) -> Path:
    """A folder that survives the session, for models that are joined or dequantised."""
    cache = request.config.cache
    assert cache is not None
    return cache.mkdir("models")


def _real_model(locate: Callable[[Path], Path]) -> Any:
    """A fixture: the path of a real model, for which a folder is kept; without its package the test is skipped."""

    def path(model_cache: Path) -> Path:
        try:
            return locate(model_cache)
        except ModelMissingError as error:
            pytest.skip(str(error))

    return pytest.fixture(path, scope="session")


smollm2_path = _real_model(lambda _: smollm2())
smollm2_f32_path = _real_model(smollm2_f32)
gemma3_path = _real_model(gemma3)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sequences", "sequences of calls that Hypothesis draws anew in every run")
    group.addoption("--sequences-blob", help="repeat the sequence that @reproduce_failure(VERSION, b'BLOB') names")
    group.addoption("--sequences-seconds", type=float, default=2, help="of the processor per test (default: 2)")
    parser.addoption("--allocations-step", type=int, default=61, help="fail every n-th one; 1 for all (default: 61)")
    parser.addoption("--sigint-trials", type=int, default=6, help="times that verbs are interrupted (default: 6)")
    parser.addoption("--deaths-seconds", type=float, default=4, help="kill a server's process as often (default: 4)")
    parser.addoption("--rpc-servers", type=int, default=0, help="run tests of devices on so many rpc-servers")


def pytest_configure(config: pytest.Config) -> None:
    # Some tests press Ctrl-C, which a shell's background jobs ignore.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # With xdist each worker has its own, as a server serves one process; so has the process of the stock library.
    if (n_servers := config.option.rpc_servers) and (hasattr(config, "workerinput") or not config.option.numprocesses):
        os.environ[RPC_SERVERS] = str(n_servers)
        for endpoint in start_rpc_servers(n_servers):
            register_rpc_server(endpoint)


@pytest.fixture
def explore(pytestconfig: pytest.Config) -> Callable[[Callable[[], Any]], None]:
    """``explore(machine)``: run this state machine on drawn sequences until the time for it is over."""

    def run(machine: Callable[[], Any]) -> None:
        if (blob := pytestconfig.option.sequences_blob) is not None:
            again = hypothesis.reproduce_failure(hypothesis.__version__, blob.encode())
            run_drawn_sequences(again(functools.partial(machine)))
            return
        end = time.process_time() + pytestconfig.option.sequences_seconds
        while time.process_time() < end:
            run_drawn_sequences(hypothesis.seed(random.randrange(2**32))(functools.partial(machine)))

    return run
