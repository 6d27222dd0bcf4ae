"""The queue of requests: one runs at a time, and clients take turns. Start at :meth:`FairQueue.turn`."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeAlias

from .request import STOPPING, Refused

_Turn: TypeAlias = "asyncio.Future[None]"


class FairQueue:
    """Lets one request run at a time. Parties take turns, and so do the users of a party.

    A party is an API key or an address. Its users are names in its own requests. At most ``most`` requests wait. If the
    queue is full, a request of a party with fewer ones replaces one of the party with the most: the newest request of
    that party's user with the most. The replaced one is refused. All of it runs in one event loop.
    """

    def __init__(self, most: int) -> None:
        self.most, self.is_busy, self.is_closed = most, False, False
        self._waiting: dict[str, dict[str, deque[_Turn]]] = {}  # by party and user, in the order of their turns

    def __len__(self) -> int:
        return sum(map(_count, self._waiting.values()))

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
        self._waiting.setdefault(party, {}).setdefault(user, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._next()  # this request had just got its turn
            else:
                self._remove(party, user, turn)
            raise

    def _make_room(self, party: str) -> None:
        """Refuse the newest request of the party with the most, or the new request if that party is its own."""
        full = Refused(429, f"{self.most} requests are waiting already; try again later", "queue_full")
        greedy = max(reversed(self._waiting), key=lambda each: _count(self._waiting[each]), default=party)
        users = self._waiting.get(greedy, {})
        if _count(users) <= _count(self._waiting.get(party, {})) + 1:
            raise full
        user = max(reversed(users), key=lambda each: len(users[each]))
        turn = users[user][-1]
        self._remove(greedy, user, turn)
        if not turn.done():
            turn.set_exception(full)

    def _remove(self, party: str, user: str, turn: _Turn) -> None:
        users = self._waiting.get(party, {})
        if turn in users.get(user, ()):
            users[user].remove(turn)
            if not users[user]:
                del users[user]
            if not users:
                del self._waiting[party]

    def _next(self) -> None:
        """Give the turn to the next user of the next party, and move both to the end."""
        while self._waiting:
            party = next(iter(self._waiting))
            users = self._waiting[party] = self._waiting.pop(party)
            user = next(iter(users))
            turns = users[user] = users.pop(user)
            turn = turns[0]
            self._remove(party, user, turn)
            if not turn.done():
                turn.set_result(None)
                return
        self.is_busy = False

    def close(self) -> None:
        """Refuse all waiting requests, and all later ones."""
        self.is_closed = True
        for users in self._waiting.values():
            for turn in (each for waiting in users.values() for each in waiting):
                if not turn.done():
                    turn.set_exception(Refused(*STOPPING))
        self._waiting.clear()


def _count(users: dict[str, deque[_Turn]]) -> int:
    return sum(map(len, users.values()))
