"""How an answer leaves: completed on its way, or with another in its place as long as nothing was sent."""

import asyncio
import sys
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from starlette.concurrency import run_in_threadpool

from .answer import Stream, complete, error_body, error_event, explained
from .request import Gone, ServedRequest

Message: TypeAlias = "MutableMapping[str, Any]"
Send: TypeAlias = "Callable[[Message], Awaitable[None]]"

STALL = 30.0
"""Seconds."""


class Sent:
    """Passes on what the application sends; until its beginning is sent, another answer may take its place.

    A client that takes nothing for :data:`STALL` seconds has left: others wait for its turn.
    """

    def __init__(self, send: Send) -> None:
        self.status, self._send = 499, send  # 499: the client left before anything was sent
        self._request: ServedRequest | None = None
        self._stream: Stream | None = None
        self._start: Message | None = None
        self._body, self._is_begun, self._is_over = bytearray(), False, False

    def shape(self, request: ServedRequest, stream: Stream | None) -> None:
        """Complete the answer of a request as it passes, or its stream."""
        self._request, self._stream = request, stream

    async def __call__(self, message: Message) -> None:
        if self._request is None:
            if message["type"] == "http.response.start":
                self.status, self._is_begun = message["status"], True
            else:
                self._is_over = not message.get("more_body")
            await self._pass(message)
        elif message["type"] == "http.response.start":
            self._start = message
        elif self._stream is None or (self._start is not None and self._start["status"] >= 400):
            self._body += message.get("body", b"")
        elif content := message.get("body", b""):
            await self._begin()
            await self._pass({**message, "body": self._stream.event(content), "more_body": True})

    async def finish(self) -> None:
        """Send what is left of a request's answer, or its error."""
        request, start = self._request, self._start
        assert request is not None
        if isinstance(request.error, Gone):
            return
        if request.error is not None or start is None:
            await self.error(*status_of(request.error))
        elif self._is_begun:
            await self._pass({"type": "http.response.body", "body": b"", "more_body": False})
        else:
            is_good = start["status"] < 400
            content = await run_in_threadpool(complete, bytes(self._body), request) if is_good else bytes(self._body)
            headers = [pair for pair in start["headers"] if pair[0].lower() != b"content-length"]
            self._start = {**start, "headers": [*headers, (b"content-length", b"%d" % len(content))]}
            await self._begin()
            await self._pass({"type": "http.response.body", "body": content})

    async def _pass(self, message: Message) -> None:
        try:
            await asyncio.wait_for(self._send(message), STALL)
        except asyncio.TimeoutError:
            self._is_over = True
            raise Gone from None

    async def _begin(self) -> None:
        if not self._is_begun and self._start is not None:
            self._is_begun, self.status = True, self._start["status"]
            await self._pass(self._start)

    async def error(self, status: int, message: str, code: str | None = None) -> None:
        """Answer with an error; where a stream has begun, end it with one."""
        if self._is_over:
            return
        self._is_over = True
        if self._is_begun:
            await self._pass({"type": "http.response.body", "body": error_event(status, message, code)})
            return
        content = error_body(status, message, code)
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
        headers += [(b"retry-after", b"5")] * (status in (429, 503))
        headers += [(b"www-authenticate", b"Bearer")] * (status == 401)
        self._start = {"type": "http.response.start", "status": status, "headers": headers}
        await self._begin()
        await self._pass({"type": "http.response.body", "body": content})


def status_of(error: Exception | None) -> tuple[int, str, str | None]:
    """Explain an error, and where it is the server's print its traceback too."""
    result = explained(error)
    if result[0] == 500 and error is not None:
        traceback.print_exception(error, file=sys.stderr)
    return result
