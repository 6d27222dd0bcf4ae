"""Listens: a socket, uvicorn, bounds for connections, and an end that lets the running answer finish."""

import asyncio
import contextlib
import functools
import logging
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import HANDLED_SIGNALS

from ..errors import DataError
from .answer import LEFT
from .middleware import network_of
from .queue import FairQueue
from .request import Refused
from .workers import Workers

STOP = 28.0  # seconds in which all ends when the server is told to stop
GRACE = 20  # of these, for the running answer
HEAD = 10.0  # seconds from a connection, or the answer before, until all headers of a request are there

MOST_CONNECTIONS = 1024
_RESERVED = 64  # descriptors that are no connections: the model, the cache, sockets that are being closed
_SELDOM = 60.0  # seconds

_BACKLOG = 1024  # connections that wait to be accepted


class _Seldom(logging.Filter):
    """Lets what begins with the same line pass once in a minute: a client can cause most of what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self._passed: dict[tuple[str, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        now, kind = time.monotonic(), (record.name, str(record.msg).partition("\n")[0])
        if now - self._passed.get(kind, -_SELDOM) < _SELDOM:
            return False
        self._passed[kind] = now
        return True


_LOG: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "filters": {"seldom": {"()": _Seldom}},
    "formatters": {"plain": {"format": "%(levelname)s: %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "filters": ["seldom"], "formatter": "plain"}},
    "loggers": {name: {"handlers": ["stderr"], "level": "WARNING"} for name in ("asyncio", "uvicorn")},
}


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens there; port 0 takes a free one. A DataError where the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        raise DataError(f"cannot listen on {host}:{port} ({error}); choose another --host or --port") from error
    listener.setblocking(False)
    return listener


class _Connection(H11Protocol):
    """A connection that knows whose it is, and since when the client has to do something."""

    network, since = "", 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.network, self.since = network_of(self.client[0]) if self.client else "", time.monotonic()

    def on_response_complete(self) -> None:
        self.since = time.monotonic()
        super().on_response_complete()

    @property
    def is_between(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def waits(self) -> bool:
        """Whether the client has to send more, or to take the rest of an answer."""
        return self.is_between or self.cycle.more_body

    @property
    def is_late(self) -> bool:
        """Whether the client has had its time for that, or is not answered any more."""
        if not self.is_between:  # the application has a limit of its own for bodies
            return self.transport.is_closing()
        limit = LEFT if self.transport.get_write_buffer_size() else HEAD
        return time.monotonic() - self.since > limit

    def drop(self) -> None:
        """Close it, whatever it still has to send."""
        self.connections.discard(self)
        self.transport.abort()


class Server(uvicorn.Server):
    """Accepts within bounds, and turns those away that wait as soon as it is told to stop.

    There are as many connections as descriptors allow, half of them of one client. One more takes the place of the one
    that has waited longest for its client, of the client with the most. Where none waits, it is closed at once.
    """

    def __init__(
        self,
        app: ASGIApp,
        queue: FairQueue,
        workers: Workers,
        listener: socket.socket,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        config = uvicorn.Config(
            app,
            log_config=_LOG,
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=GRACE,
            server_header=False,
            proxy_headers=False,  # who asks is not for the client to say
        )
        super().__init__(config)
        self.most = _most_connections()
        self._queue, self._workers, self._listener, self._on_ready = queue, workers, listener, on_ready
        self._tasks: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        tasks = self._load(), self._accept(), self._workers.unload_idle(self._queue)
        self._tasks = [asyncio.create_task(each) for each in tasks]

    async def _load(self) -> None:
        """Load the first model."""
        with contextlib.suppress(Refused):
            async with self._queue.turn(""):
                await self._workers.load(self._workers.all[0])
            self._on_ready()

    async def _accept(self) -> None:
        """Listen by a loop of our own: asyncio's accepts all that wait before it asks whether there is room."""
        loop = asyncio.get_running_loop()
        connection = functools.partial(_Connection, self.config, self.server_state, self.lifespan.state)
        while True:
            try:
                accepted, address = await loop.sock_accept(self._listener)
                if self._has_room(network_of(address[0])):
                    await loop.connect_accepted_socket(connection, accepted)
                else:
                    accepted.close()
                await asyncio.sleep(0)  # one that was dropped for it closes now
            except OSError as error:  # it was gone already, or there is no descriptor for it
                logging.getLogger("uvicorn.error").warning("cannot accept a connection: %s", error.strerror)
                await asyncio.sleep(0.1)

    def _has_room(self, network: str) -> bool:
        """Return whether a client may have one connection more; drop another one for it where that is needed."""
        connections: list[Any] = list(self.server_state.connections)
        counts = Counter(each.network for each in connections)
        if counts[network] >= self.most // 2:
            connections = [each for each in connections if each.network == network]
        elif len(connections) < self.most:
            return True
        waiting = [each for each in connections if each.waits]
        if waiting:
            max(waiting, key=lambda each: (counts[each.network], -each.since)).drop()
        return bool(waiting)

    async def on_tick(self, counter: int) -> bool:
        """Drop connections whose clients are late, once a second."""
        if counter % 10 == 0:
            connections: list[Any] = list(self.server_state.connections)
            for each in connections:
                if each.is_late:
                    each.drop()
        return await super().on_tick(counter) or self._workers.failure is not None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        end = time.monotonic() + STOP
        self._queue.close()
        for each in self._tasks:
            each.cancel()
        self._listener.close()
        await super().shutdown()
        await self._workers.close(end - time.monotonic())


def _most_connections() -> int:
    """Return how many connections there may be, by how many descriptors the process may have."""
    if sys.platform == "win32":
        return MOST_CONNECTIONS
    import resource

    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_CONNECTIONS if most == resource.RLIM_INFINITY else min(MOST_CONNECTIONS, max(most - _RESERVED, 16))


def run(
    app: ASGIApp, queue: FairQueue, workers: Workers, listener: socket.socket, on_ready: Callable[[], None]
) -> None:
    """Serve until SIGTERM or Ctrl-C, which end all within :data:`STOP` seconds.

    Raises:
        NativeError: the model cannot be loaded.
    """
    server = Server(app, queue, workers, listener, on_ready)

    def end(number: int, frame: FrameType | None) -> None:
        """End the server as uvicorn's handler does, before it sets that, and when it raises the signal once more."""
        server.should_exit = True

    before = {each: signal.signal(each, end) for each in HANDLED_SIGNALS}
    try:
        server.run()
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    if workers.failure is not None:
        raise workers.failure
