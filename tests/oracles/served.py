"""A server in a process of its own, as a user starts it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
from click.testing import CliRunner
from oracles.frontiers import edit_points, frontier, point

from adaskip_cpp import Frontier, SkipPlan
from adaskip_cpp.cli.main import main
from adaskip_cpp.model.edits import FEW, MANY, Edits
from adaskip_cpp.serving.process import Worker
from adaskip_cpp.serving.worker import Service
from adaskip_cpp.serving.workers import Workers

BULK_PLAN = SkipPlan.manual(3, attention=[1], ffn=[2], phase="bulk")
"""A plan for a tiny model of three layers."""


def frontier_of(n_layer: int, **more: Any) -> Frontier:
    """Two plans with made-up figures: in prompts of 1,024 tokens they lose 0.03 and 0.06 nats per token.

    In prompts of twice as many tokens losses are taken for 1.3 times as large: 0.039 and 0.078.
    """
    careful, fast = (SkipPlan.manual(n_layer, attention=each, ffn=[2], phase="bulk") for each in ([], [1]))
    points = [
        point(careful, 0.03, {1024: 1.2, 2048: 1.3}, judged_at=1024),
        point(fast, 0.06, {1024: 1.5, 2048: 1.6}, judged_at=1024),
    ]
    return frontier(points, **more)


FRONTIER = frontier_of(3)


def edited_frontier(*losses: float) -> Frontier:
    """``FRONTIER``, and edited prompts of 1,024 tokens that lose so many nats in few moves, and in many."""
    return replace(FRONTIER, edits=edit_points(losses, [Edits(most_moves=FEW), Edits(most_moves=MANY)]))


class Nobody(Workers):
    """What a server has that serves no model."""

    failure = None

    def __init__(self) -> None:
        super().__init__([Worker("nobody", None)], n_ctx=256)  # type: ignore[arg-type]

    async def load(self, worker: Worker) -> None:
        pass


class InProcess(Worker):
    """A worker whose process is a thread of this one."""

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def tell(message: Any) -> None:
            asyncio.run_coroutine_threadsafe(self._hear(message), loop)

        def run() -> None:
            self._service.run(self._opening.open)
            loop.call_soon_threadsafe(ended.set_result, None)

        self._service = Service(tell, logs_text=False)
        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        await ended

    def _tell(self, message: Any) -> None:
        self._service.hear(message)

    def kill(self, why: str = "") -> None:
        """A thread cannot be ended."""

    def end(self) -> None:
        """Close the model, where no loop runs any more."""
        self._tell(None)
        self._thread.join()


IN_ONE_PROCESS = (
    f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r}); from oracles.served import InProcess; "
    "from adaskip_cpp.serving import process; process.Worker = InProcess; "
)
"""Runs a server in one process: beside that of ``adaskip-cpp serve`` the pipe can be seen, and what it costs."""

END: int = getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM)
"""The signal that asks a server to end; on Windows SIGTERM does not ask."""

_RUN = "from adaskip_cpp.cli.main import main; main()"


@dataclass
class Server:
    """A running server: its address, its process, and what that wrote to stderr."""

    url: str
    model: Path
    process: subprocess.Popen[str]
    lines: list[str]
    reader: threading.Thread

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """Send JSON, or bytes as they are."""
        options["content" if isinstance(body, bytes) else "json"] = body
        return httpx.post(self.url + path, timeout=60, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **options)

    def metric(self, name: str) -> float:
        """The sum of a metric's values."""
        found = re.findall(rf"^{name}(?:\{{[^}}]*\}})? (\S+)$", self.get("/metrics").text, re.MULTILINE)
        return sum(map(float, found))

    def stream(self, body: dict[str, Any]) -> AbstractContextManager[httpx.Response]:
        """The answer to a completion, as it comes."""
        return httpx.stream("POST", f"{self.url}/v1/completions", json={**body, "stream": True}, timeout=60)

    def workers(self) -> list[int]:
        """The processes that hold models, none before it runs: a fork that is stopped earlier stops the server too."""
        try:
            server = psutil.Process(self.process.pid)
            return [child.pid for child in server.children() if child.cmdline() != server.cmdline()]
        except psutil.NoSuchProcess:
            return []

    def stop(self) -> int:
        """End it by a signal, and return its exit code."""
        self.process.send_signal(END)
        code = self.process.wait(60)
        self.reader.join()
        return code


def refusal(*words: object) -> str:
    """What ``adaskip-cpp serve`` says, in this process, when it does not start. Its port is taken, so it never does."""
    with socket.create_server(("", 0)) as taken:
        command = ["serve", *map(str, words), "--port", str(taken.getsockname()[1])]
        result = CliRunner().invoke(main, command, prog_name="adaskip-cpp")
    assert result.exit_code in (1, 2), result.output
    return " ".join(result.stderr.split())


@contextmanager
def serving(
    model: Path,
    *options: str,
    environment: dict[str, str] | None = None,
    descriptors: int | None = None,
    before: str = "",
) -> Iterator[Server]:
    """Start a server on a free port with one thread; when the context is left it is ended, if it still runs.

    ``environment`` is added to that of the tests; ``descriptors`` is how many files and sockets it may have open,
    ``before`` Python that it runs first.
    """
    command = [sys.executable, "-c", before + _RUN, "serve", str(model), "--port", "0", "--threads", "1", *options]
    group = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)  # Windows sends signals to groups alone
    if descriptors is not None:
        command = ["sh", "-c", f'ulimit -n {descriptors}; exec "$@"', "sh", *command]
    variables = {**os.environ, **(environment or {})}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, creationflags=group, env=variables)
    assert process.stderr is not None
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"A page to try it: (http://\S+)\. ", " ".join("".join(lines).split()) + " "):
            break
    else:
        raise AssertionError(f"no server: {lines}")
    reader = threading.Thread(target=lines.extend, args=[process.stderr], daemon=True)
    reader.start()
    try:
        yield Server(found[1], model, process, lines, reader)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
