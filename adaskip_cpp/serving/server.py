"""Listens: a socket, uvicorn, and an end that lets the running answer finish."""

import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp
from uvicorn.server import HANDLED_SIGNALS

from ..errors import DataError
from .queue import FairQueue

GRACE = 30  # seconds that the running answer has when the server is told to stop


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens there; port 0 takes a free one. A DataError where the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise DataError(f"cannot listen on {host}:{port} ({error}); choose another --host or --port") from error


class _Server(uvicorn.Server):
    """Turns those away that wait, as soon as it is told to stop."""

    def __init__(self, config: uvicorn.Config, queue: FairQueue) -> None:
        super().__init__(config)
        self._queue = queue

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._queue.close()
        await super().shutdown(sockets)


def run(
    app: ASGIApp, queue: FairQueue, listener: socket.socket, *, on_ready: Callable[[], None], on_end: Callable[[], None]
) -> None:
    """Serve until SIGTERM or Ctrl-C; the running answer then has :data:`GRACE` seconds to end, ``on_end`` its time."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=GRACE,
        server_header=False,
        proxy_headers=False,  # who asks is not for the client to say
    )
    server = _Server(config, queue)

    def end(number: int, frame: FrameType | None) -> None:
        """End the server as uvicorn's handler does, before it sets that, and when it raises the signal once more."""
        server.should_exit = True

    before = {each: signal.signal(each, end) for each in HANDLED_SIGNALS}
    try:
        on_ready()
        server.run(sockets=[listener])
    finally:
        on_end()
        for each, handler in before.items():
            signal.signal(each, handler)
