"""adaskip_cpp.serving.server: bounds for connections, by clients of raw sockets."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
from oracles.served import Nobody
from starlette.responses import Response

from adaskip_cpp.serving import server
from adaskip_cpp.serving.queue import FairQueue
from adaskip_cpp.serving.server import listen


def served_by(app: Any, clients: Callable[[int], Any]) -> None:
    """Run a server of an application in this process, and what ``clients`` does with its port."""

    async def scenario() -> None:
        listener = listen("127.0.0.1", 0)
        running = server.Server(app, FairQueue(1), Nobody(), listener, lambda: None)
        serving = asyncio.create_task(running.serve())
        while not running.started:
            await asyncio.sleep(0.01)
        try:
            await asyncio.wait_for(clients(listener.getsockname()[1]), 30)
        finally:
            running.should_exit = True
            await serving

    asyncio.run(scenario())


ASKING = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"


def test_headers_that_do_not_come_end_their_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """One client sends a byte now and then. Another asks no more after an answer."""
    monkeypatch.setattr(server, "HEAD", 0.5)

    async def clients(port: int) -> None:
        for first in (b"", ASKING):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            begin = time.monotonic()
            writer.write(first + b"GET / HTTP/1.1\r\n")
            with contextlib.suppress(OSError):
                while not reader.at_eof():
                    writer.write(b"a")
                    with contextlib.suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(reader.read(1000), 0.1)
            assert 0.4 < time.monotonic() - begin < 10
            writer.close()

    served_by(Response(), clients)


def test_a_connection_more_takes_the_place_of_one_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight may be open, four of one address. Those that wait for a head or a body give way, those that run do not."""
    monkeypatch.setattr(server, "_most_connections", lambda: 8)
    go, n_running = asyncio.Event(), 0

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        nonlocal n_running
        if scope["path"] == "/slow":
            n_running += 1
            await go.wait()
        await Response()(scope, receive, send)

    async def clients(port: int) -> None:
        opened = []

        async def open_(content: bytes) -> asyncio.StreamReader:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            opened.append(writer)
            writer.write(content)
            await asyncio.sleep(0.05)
            return reader

        idle = [await open_(begun) for begun in (b"", b"GET /", b"", ASKING.replace(b"GET", b"PUT"))]
        first = await open_(ASKING.replace(b"/", b"/slow", 1))
        assert await idle[0].read() == b"" and not idle[1].at_eof()
        running = [first, *[await open_(ASKING.replace(b"/", b"/slow", 1)) for _ in range(3)]]
        assert n_running == 4 and [await each.read() for each in idle[1:3]] == [b"", b""]
        with contextlib.suppress(ConnectionResetError):
            assert await (await open_(ASKING)).read() == b"", "there is no room"
        go.set()
        for each in running:
            assert b" 200 " in await each.readline()
        assert b" 200 " in await (await open_(ASKING)).readline(), "they are between two requests"
        for each in opened:
            each.close()

    served_by(slow, clients)


def test_what_repeats_itself_is_logged_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    log = server._Seldom()
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def passes(text: str) -> bool:
        return log.filter(logging.LogRecord("uvicorn.error", logging.WARNING, "", 1, text, (), None))

    assert [passes(text) for text in ("a", "a\nmore", "b", "a")] == [True, False, True, False]
    now += 61
    assert passes("a") and not passes("a")
