"""The queue of requests: one runs at a time, and clients take turns. Start at :meth:`FairQueue.turn`."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

from .request import STOPPING, Refused


class _Waiting(NamedTuple):
    party: str
    user: str
    turn: "asyncio.Future[None]"


class FairQueue:
    """Lets one request run at a time. Parties take turns, and so do the users of a party. A party is an API key or an
    address. Its users are names in its own requests. At most ``most`` requests wait. If the queue is full, a request of
    a party with fewer ones replaces one of the party with the most: the newest request of that party's user with the
    most. The replaced one is refused. All of it runs in one event loop.
    """

    def __init__(self, most: int) -> None:
        self.most, self.is_busy, self.is_closed = most, False, False
        self._waiting: list[_Waiting] = []  # the first is next; a party's or user's turn is that of its first request

    def __len__(self) -> int:
        return len(self._waiting)

    @asynccontextmanager
    async def turn(self, party: str, user: str = "") -> AsyncIterator[None]:
        """Wait for a turn, and hold it. Raises Refused if too many wait, or after :meth:`close`."""
        if self.is_closed:
            raise Refused(*STOPPING)
        if self.is_busy:
            await self._wait(party, user)
        self.is_busy = True
        try:
            yield
        finally:
            self._next()

    async def _wait(self, party: str, user: str) -> None:
        if len(self) >= self.most:
            self._make_room(party)
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(party, user, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._next()  # this request had just got its turn
            self._waiting = [each for each in self._waiting if each.turn is not turn]
            raise

    def _make_room(self, party: str) -> None:
        """Refuse the newest request of the party with the most, or the new request if that party is its own."""
        full = Refused(429, f"{self.most} requests are waiting already; try again later", "queue_full")
        counts = Counter(each.party for each in self._waiting)
        greedy = max(reversed(counts), key=counts.__getitem__, default=party)
        if counts[greedy] <= counts[party] + 1:
            raise full
        users = Counter(each.user for each in self._waiting if each.party == greedy)
        user = max(reversed(users), key=users.__getitem__)
        newest = [each for each in self._waiting if (each.party, each.user) == (greedy, user)][-1]
        self._waiting.remove(newest)
        if not newest.turn.done():
            newest.turn.set_exception(full)

    def _next(self) -> None:
        """Give the turn to the first request. Move the others of its party to the end, and those of its user last."""
        while self._waiting:
            party, user, turn = self._waiting.pop(0)
            self._waiting.sort(key=lambda each: (each.party == party, each[:2] == (party, user)))
            if not turn.done():
                turn.set_result(None)
                return
        self.is_busy = False

    def close(self) -> None:
        """Refuse all waiting requests, and all later ones."""
        self.is_closed = True
        for each in self._waiting:
            if not each.turn.done():
                each.turn.set_exception(Refused(*STOPPING))
        self._waiting.clear()
