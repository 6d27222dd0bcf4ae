"""Runs the application with uvicorn: limits connections, lets a running answer finish. Start at :meth:`Server.run`."""

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

STOP = 28.0  # seconds in which the server ends when it is told to
GRACE = 20  # of these, seconds for the running answer
HEAD = 10.0  # seconds for all headers of a request, from the connection or the last answer on

MOST_CONNECTIONS = 1024  # open ones; as many more may wait to be accepted
_RESERVED = 64  # descriptors for other files: the model, the cache, sockets that are being closed
_SELDOM = 60.0  # seconds


class _Seldom:
    """Passes messages with the same first line once per minute, because clients can cause most messages."""

    def __init__(self) -> None:
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
    """Return a listening socket; port 0 takes a free one. Raise DataError if that is not possible."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=MOST_CONNECTIONS)
    except (OSError, OverflowError) as error:
        raise DataError(f"cannot listen on {host}:{port} ({error}); choose another --host or --port") from error
    listener.setblocking(False)
    return listener


class _Connection(H11Protocol):
    """A connection that knows its client's network, and since when it waits for the client."""

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
        """Whether the client must send more, or read the rest of an answer."""
        return self.is_between or self.cycle.more_body

    @property
    def is_late(self) -> bool:
        """Whether the client's time for that is over, or its connection is closing."""
        if not self.is_between:  # for bodies, the application has its own limit
            return self.transport.is_closing()
        limit = LEFT if self.transport.get_write_buffer_size() else HEAD
        return time.monotonic() - self.since > limit

    def drop(self) -> None:
        """Close it, without sending the rest."""
        self.connections.discard(self)
        self.transport.abort()


class Server(uvicorn.Server):
    """A uvicorn server with limits for connections. When it is told to stop, it refuses the waiting requests. It has at
    most as many connections as descriptors allow, and half of them for one client. A further connection replaces one:
    of the client with the most, the one that has waited longest for its client. If none waits, the new one is closed.
    """

    def __init__(
        self, app: ASGIApp, queue: FairQueue, workers: Workers, listener: socket.socket, on_ready: Callable[[], None]
    ) -> None:
        options: dict[str, Any] = {"log_config": _LOG, "log_level": "warning", "access_log": False, "ws": "none"}
        options |= {"lifespan": "off", "server_header": False, "timeout_graceful_shutdown": GRACE}
        options["proxy_headers"] = False  # a client could claim any address with these
        super().__init__(uvicorn.Config(app, **options))
        self.most = _most_connections()
        self._queue, self._workers, self._listener, self._on_ready = queue, workers, listener, on_ready

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until SIGTERM or Ctrl-C, then end within :data:`STOP` seconds. NativeError: no model can be loaded."""
        # uvicorn sets this handler later, and raises the signal again after it has removed it.
        before = {each: signal.signal(each, self.handle_exit) for each in HANDLED_SIGNALS}
        try:
            super().run()
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)
        if self._workers.failure is not None:
            raise self._workers.failure

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        tasks = self._load(), self._accept(), self._workers.unload_idle(self._queue)
        self._tasks = [asyncio.create_task(each) for each in tasks]

    async def _load(self) -> None:
        with contextlib.suppress(Refused):
            async with self._queue.turn(""):
                await self._workers.load(self._workers.all[0])
            self._on_ready()

    async def _accept(self) -> None:
        """Accept connections one by one. asyncio's own loop would accept all waiting ones without asking for room."""
        loop = asyncio.get_running_loop()
        connection = functools.partial(_Connection, self.config, self.server_state, self.lifespan.state)
        while True:
            try:
                accepted, address = await loop.sock_accept(self._listener)
                if self._has_room(network_of(address[0])):
                    await loop.connect_accepted_socket(connection, accepted)
                else:
                    accepted.close()
                await asyncio.sleep(0)  # lets a dropped connection close
            except OSError as error:  # the client is gone, or there is no descriptor
                logging.getLogger("uvicorn.error").warning("cannot accept a connection: %s", error.strerror)
                await asyncio.sleep(0.1)

    def _has_room(self, network: str) -> bool:
        """Return whether a client may have one more connection. Drop another connection for it if necessary."""
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
            for each in list(self.server_state.connections):
                if isinstance(each, _Connection) and each.is_late:
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
    if sys.platform == "win32":
        return MOST_CONNECTIONS
    import resource

    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_CONNECTIONS if most == resource.RLIM_INFINITY else min(MOST_CONNECTIONS, max(most - _RESERVED, 16))
