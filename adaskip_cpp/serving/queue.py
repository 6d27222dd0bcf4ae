"""Requests wait here, as the model answers one at a time: clients in turn, the requests of each in their order."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from .request import STOPPING, Refused


class FairQueue:
    """Lets one request run at a time; of those that wait, ``most`` at most, one of each client in turn.

    All of it runs in one event loop.
    """

    def __init__(self, most: int) -> None:
        self.most, self.is_busy, self.is_closed = most, False, False
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # clients in the order in which they are served

    def __len__(self) -> int:
        """Requests that wait."""
        return sum(map(len, self._waiting.values()))

    @asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[None]:
        """Wait for one's turn, and have it; Refused where too many wait, or :meth:`close` was called meanwhile."""
        if self.is_closed:
            raise Refused(*STOPPING)
        if self.is_busy:
            await self._wait(client)
        self.is_busy = True
        try:
            yield
        finally:
            self._next()

    async def _wait(self, client: str) -> None:
        if len(self) >= self.most:
            raise Refused(429, f"{self.most} requests wait already; try again later", "queue_full")
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._next()  # it was ours already
            elif turn in self._waiting.get(client, ()):
                self._waiting[client].remove(turn)
                if not self._waiting[client]:
                    del self._waiting[client]
            raise

    def _next(self) -> None:
        """Give the turn to the next client's oldest request; that client stands last then."""
        for client in list(self._waiting):
            waiting = self._waiting.pop(client)
            turn = waiting.popleft()
            if waiting:
                self._waiting[client] = waiting
            if not turn.done():
                turn.set_result(None)
                return
        self.is_busy = False

    def close(self) -> None:
        """Refuse those that wait, and all to come."""
        self.is_closed = True
        for waiting in self._waiting.values():
            for turn in waiting:
                if not turn.done():
                    turn.set_exception(Refused(*STOPPING))
        self._waiting.clear()
