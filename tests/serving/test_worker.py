"""The model in a process of its own: what its death costs, and that it never outlives who asks it."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest
from oracles.served import Server, serving

from adaskip_cpp.serving.process import _MOST_CALLS, Worker
from adaskip_cpp.serving.request import Refused
from adaskip_cpp.serving.worker import Call, Done, Opening

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes of models are ended by SIGKILL")

CTX = 8192
LONG = " ".join(f"the an{i} of to" for i in range(60))
# No end-of-sequence token ends this answer, of whole characters.
ENDLESS = {"prompt": "the to of", "max_tokens": CTX, "logit_bias": {"2": -100}, "grammar": "root ::= [a-z ]+"}

STOP, GRACE, LEAVE, LOADING = 8, 4, 2, 3
"""Seconds: instead of 28 to end in, of 20 for a running answer and of 5 without a client. And 10 limits to load in."""


@pytest.fixture(scope="module")
def server(served_model: Path, served_plan: Path) -> Iterator[Server]:
    sooner = f"from adaskip_cpp.serving import process; process.LEAVE = {LEAVE}; "
    with serving(served_model, "--plan", str(served_plan), "--ctx", str(CTX), before=sooner) as running:
        yield running


def until(holds: Callable[[], Any], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def events(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in answer.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def text(server: Server, prompt: str = LONG, **more: Any) -> str:
    answer = server.post("/v1/completions", {"prompt": prompt, "max_tokens": 4, "temperature": 0, **more})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_death_costs_the_request_that_was_worked_for_alone(server: Server) -> None:
    """Others wait, also one that comes before the death is known. Health tells it."""
    expected, n_deaths = text(server), server.metric("adaskip_worker_deaths")
    (before,) = server.workers()
    with ThreadPoolExecutor(4) as others:
        dying = others.submit(server.post, "/v1/completions", ENDLESS)
        until(lambda: server.metric("adaskip_requests_running"))
        waiting = [others.submit(text, server) for _ in range(3)]
        until(lambda: server.metric("adaskip_queue_waiting") == 3)
        os.kill(before, signal.SIGKILL)
        error = dying.result().json()["error"]
        assert dying.result().status_code == 500 and error["type"] == "internal_server_error"
        assert error["code"] == "worker_died" and "its process ended (Killed); ask again" in error["message"]
        assert [each.result() for each in waiting] == 3 * [expected]
    assert server.workers() != [before] and server.metric("adaskip_worker_deaths") == n_deaths + 1
    assert "tiny: its process ended (Killed); it is started again\n" in server.lines
    for _ in range(3):
        os.kill(server.workers()[0], signal.SIGKILL)
        assert text(server) == expected
    assert server.get("/health").json() == {"status": "ok"}
    os.kill(server.workers()[0], signal.SIGKILL)
    until(lambda: server.get("/health").status_code == 503)
    assert server.get("/health").json() == {"status": "restarting"}
    assert server.get("/v1/models").json()["data"][0]["status"] == {"value": "restarting"}
    assert server.post("/tokenize", {"prompt": "the"}).json()["tokens"], "it waits"


def told_at_its_end(model: Path, before: str = "") -> str:
    """What a server says that ends by itself."""
    command = [sys.executable, "-c", f"{before}from adaskip_cpp.cli.main import main; main()", "serve", str(model)]
    done = subprocess.run([*command, "--port", "0"], stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == 1
    return done.stderr


def test_a_model_that_cannot_be_loaded_ends_the_server(served_model: Path, tmp_path: Path) -> None:
    (tmp_path / "torn.gguf").write_bytes(b"GGUF" + bytes(100))
    told = told_at_its_end(tmp_path / "torn.gguf")
    assert "Error: llama.cpp cannot open" in told.splitlines()[-1] and "again" not in told
    dying = "from adaskip_cpp.serving import process; process._START = 'import os; os.kill(os.getpid(), 9)'; "
    told = " ".join(told_at_its_end(served_model, dying).split())
    assert "Error: 3 starts of tiny failed: its process ended (Killed); see the log, or" in told


def test_it_listens_while_the_model_is_loaded(served_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def ask() -> list[httpx.Response]:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            while True:
                with contextlib.suppress(httpx.ConnectError):
                    told = [client.get("/health"), client.get("/v1/models")]
                    return [*told, client.post("/v1/completions", json={"prompt": "the"})]

    slowly = (
        "from adaskip_cpp.serving import process; process._START = f'import time; time.sleep(2); {process._START}'; "
    )
    with ThreadPoolExecutor(1) as other:
        asked = other.submit(ask)
        with serving(served_model, "--plan", "none", "--port", str(port), before=slowly) as server:
            health, models, answer = asked.result()
            assert health.status_code == 503 and health.json() == {"status": "loading"}
            assert [each["id"] for each in models.json()["data"]] == ["tiny"] and answer.status_code == 200
            assert server.get("/health").status_code == 200 and server.stop() == 0


@pytest.fixture(scope="module")
def impatient(served_model: Path) -> Iterator[Server]:
    sooner = f"from adaskip_cpp.serving import process; process._LOADING = {LOADING}; "
    with serving(served_model, "--plan", "none", "--ctx", str(CTX), "--stuck-timeout", "2", before=sooner) as running:
        yield running


def test_a_process_that_does_not_load_is_ended(impatient: Server) -> None:
    (first,) = impatient.workers()
    os.kill(first, signal.SIGKILL)
    until(lambda: set(impatient.workers()) - {first})
    (second,) = impatient.workers()
    os.kill(second, signal.SIGSTOP)
    assert text(impatient)
    assert second not in impatient.workers()
    why = "it did not load within 6 seconds and was ended; use a larger --stuck-timeout"
    assert f"tiny: {why}; it is started again\n" in impatient.lines


def stopped(server: Server) -> int:
    (worker,) = server.workers()
    os.kill(worker, signal.SIGSTOP)
    return worker


def test_a_request_that_takes_no_step_has_its_process_ended(impatient: Server) -> None:
    expected, n_deaths = text(impatient), impatient.metric("adaskip_worker_deaths")
    with impatient.stream(ENDLESS) as answer:
        told = events(answer)
        next(told)
        worker, begin = stopped(impatient), time.monotonic()
        *_, last = told
    assert 1.5 < time.monotonic() - begin < 4 and not is_running(worker)
    assert last["error"]["code"] == "worker_died" and "stuck for 2 seconds" in last["error"]["message"]
    assert text(impatient) == expected
    stopped(impatient)
    assert text(impatient) == expected, "it had not begun, so it is asked again"
    assert impatient.metric("adaskip_worker_deaths") == n_deaths + 2
    stopped(impatient)
    answer = impatient.post("/tokenize", {"prompt": "the"})
    assert answer.status_code == 503 and "did not answer in time" in answer.json()["error"]["message"]
    assert text(impatient) == expected


def test_a_request_that_goes_on_without_its_client_has_its_process_ended(server: Server) -> None:
    expected = text(server)
    with server.stream(ENDLESS) as answer:
        told = events(answer)
        next(told)
        worker, begin = stopped(server), time.monotonic()
    assert text(server) == expected
    assert LEAVE - 0.5 < time.monotonic() - begin < 9 and worker not in server.workers()
    assert any(f"did not stop {LEAVE} seconds after its client had left" in line for line in server.lines)


def states(server: Server) -> dict[str, str]:
    listed = server.get("/v1/models").json()["data"]
    return {each["id"]: each["status"]["value"] for each in listed}


def test_models_are_asked_by_name_and_one_is_in_memory_at_a_time(served_model: Path, tmp_path: Path) -> None:
    two = shutil.copy(served_model, tmp_path / "two.gguf")
    options = "--plan", "none", "--alias", "first", "--cache-dir", str(tmp_path / "kept")
    with serving(served_model, str(two), *options) as server:
        text(server)
        assert states(server) == {"first": "ready", "two": "unloaded"} and len(server.workers()) == 1
        answer = server.post("/v1/completions", {"prompt": "the", "max_tokens": 1, "model": "two"})
        assert answer.json()["model"] == "two" and states(server) == {"first": "unloaded", "two": "ready"}
        assert len(server.workers()) == 1
        assert server.lines[-2:] == ["first: unloaded, to make room for two\n", "two: loading\n"]
        for name in ("tiny", "gpt-4"):
            answer = server.post("/v1/completions", {"prompt": "the", "model": name})
            assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
        assert server.post("/tokenize", {"prompt": "the", "model": "first"}).json()["tokens"]
        assert states(server) == {"first": "ready", "two": "unloaded"}
        answer = server.post("/v1/completions", {"prompt": LONG})
        assert answer.json()["adaskip"]["prompt_tokens_read"] == 1, "what was read is written when it is unloaded"
        assert answer.json()["model"] == "first" and server.stop() == 0


def test_a_model_that_nobody_asks_for_is_unloaded(served_model: Path) -> None:
    with serving(served_model, "--plan", "none", "--keep-alive", "0.02") as server:
        expected = text(server)
        until(lambda: states(server) == {"tiny": "unloaded"})
        assert server.workers() == [] and server.get("/health").status_code == 200
        assert server.metric("adaskip_kv_bytes") == 0 == server.metric("adaskip_worker_deaths")
        assert "tiny: unloaded, as there was no request for it\n" in server.lines
        assert text(server) == expected
        with server.stream({**ENDLESS, "max_tokens": 600}) as answer:  # which takes longer than that
            assert list(events(answer))[-1]["choices"][0]["finish_reason"] == "length"
        assert server.stop() == 0


def test_a_model_that_cannot_be_loaded_takes_none_of_the_others_away(served_model: Path, tmp_path: Path) -> None:
    """An error at once where it cannot be opened; three tries where its process dies. Two models are kept."""
    one, two, three = (tmp_path / f"{name}.gguf" for name in ("one", "two", "three"))
    for path in (one, two, three):
        shutil.copy(served_model, path)
    with serving(one, str(two), str(three), "--plan", "none", "--keep", "2") as server:
        content = two.read_bytes()
        two.write_bytes(content[:1000])
        answer = server.post("/v1/completions", {"prompt": "the", "model": "two"})
        assert answer.status_code == 500 and "the model 'two' cannot be loaded" in answer.json()["error"]["message"]
        until(lambda: "llama.cpp cannot open" in server.lines[-1])
        assert "Traceback" not in "".join(server.lines)
        two.write_bytes(content)
        assert text(server, model="two") == text(server, model="one")
        known = set(server.workers())
        assert states(server) == {"one": "ready", "two": "ready", "three": "unloaded"} and len(known) == 2
        killed: set[int] = set()
        with ThreadPoolExecutor(1) as client:
            dying = client.submit(server.post, "/v1/completions", {"prompt": "the", "model": "three"})
            while not dying.done():
                for each in set(server.workers()) - known - killed:
                    os.kill(each, signal.SIGKILL)
                    killed.add(each)
                time.sleep(0.01)
        assert dying.result().status_code == 500 and len(killed) == 3
        assert server.lines[-1].startswith("3 starts of three failed: its process ended (Killed); see the log, or")
        assert states(server) == {"one": "ready", "two": "unloaded", "three": "unloaded"}, "two was used least recently"
        assert text(server, model="one") and server.stop() == 0


@pytest.mark.parametrize("how", ["loading", "restarting", "waiting"])
def test_it_ends_when_it_is_told_to(served_model: Path, how: str) -> None:
    """In whatever state the model is; without an error, and at once where no answer is running."""
    with serving(served_model, "--plan", "none", "--ctx", str(CTX)) as server, ThreadPoolExecutor(1) as client:
        os.kill(server.workers()[0], signal.SIGKILL)
        if how == "waiting":
            refused = client.submit(server.post, "/v1/completions", {"prompt": "the"})
            until(lambda: server.metric("adaskip_requests_running"))
        else:
            until(lambda: server.get("/health").status_code == 503)
            until(lambda: how == "restarting" or server.workers())
        begin = time.monotonic()
        assert server.stop() == 0 and time.monotonic() - begin < 25
        assert how != "waiting" or refused.result().status_code in (200, 500, 503)


@pytest.mark.parametrize("is_answering", [False, True])
@pytest.mark.parametrize("is_stopped", [False, True])
def test_it_ends_in_time_whatever_runs(
    served_model: Path, tmp_path: Path, is_stopped: bool, is_answering: bool
) -> None:
    """An endless answer gets its time. Afterwards the cache is written, but by a process that does nothing."""
    options = "--plan", "none", "--ctx", "65536", "--cache-dir", str(tmp_path / "kept")
    sooner = f"server.STOP, server.GRACE, process.LEAVE = {STOP}, {GRACE}, {LEAVE}; "
    sooner = f"from adaskip_cpp.serving import process, server; {sooner}"
    with serving(served_model, *options, before=sooner) as server, contextlib.ExitStack() as asked:
        text(server)
        (worker,) = server.workers()
        told: Iterator[Any] = iter(())
        if is_answering:
            body = {**ENDLESS, "prompt": LONG, "max_tokens": 60_000}
            told = events(asked.enter_context(server.stream(body)))
            next(told)
        if is_stopped:
            stopped(server)
        begin = time.monotonic()
        server.process.send_signal(signal.SIGINT if is_answering == is_stopped else signal.SIGTERM)
        last = list(told)[-1:]
        assert [each["error"]["code"] for each in last] == is_answering * ["stopping"]
        assert server.process.wait(STOP + 4) == 0 and not is_running(worker)
        assert (time.monotonic() - begin < GRACE - 0.5) == (not is_stopped and not is_answering)
        assert bool(list(tmp_path.rglob("*.adaskip-prefix"))) == (not is_stopped)


def test_it_does_not_outlive_who_asks_it(served_model: Path) -> None:
    with serving(served_model, "--plan", "none", "--ctx", str(CTX)) as server:
        (worker,) = server.workers()
        with server.stream(ENDLESS) as answer:
            next(events(answer))
            server.process.kill()
        until(lambda: not is_running(worker), 5)


def test_texts_to_tokenize_are_bounded_and_late_ones_count_until_they_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> None:
        worker = Worker("a", Opening(lambda: None, logs_text=False), stuck_timeout=0.01)  # type: ignore[arg-type, return-value]
        asked: list[Call] = []
        monkeypatch.setattr(worker, "_tell", asked.append)
        for _ in range(_MOST_CALLS):
            with pytest.raises(Refused, match="in time"):
                await worker.call("tokenize", "the")
        with pytest.raises(Refused, match="other texts are being tokenized"):
            await worker.call("tokenize", "the")
        for each in asked:
            await worker._hear(Done(each.id, b"1"))
        await asyncio.sleep(0)
        with pytest.raises(Refused, match="in time"):
            await worker.call("tokenize", "the")

    asyncio.run(ask())
