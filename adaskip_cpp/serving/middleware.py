"""What every request passes: who may ask, how much, and when it is its turn; and how an answer leaves."""

import asyncio
import hmac
import ipaddress
import socket
import sys
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers

from ..errors import RequestError
from .answer import Stream, complete, error_body, error_event, explained
from .body import SCHEMAS, read_body
from .metrics import Metrics
from .queue import Closing, FairQueue, QueueFull
from .request import Gone, ServedRequest, begin

Message: TypeAlias = "MutableMapping[str, Any]"
Receive: TypeAlias = "Callable[[], Awaitable[Message]]"
Send: TypeAlias = "Callable[[Message], Awaitable[None]]"
App: TypeAlias = "Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]"

STALL = 30.0
"""Seconds."""

OPEN = ("/", "/health")
"""Paths that need no key: they tell nothing and run nothing."""

LOOPBACK = ("localhost", "127.0.0.1", "::1")


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        self.status, self.message, self.code = status, message, code


class Gate:
    """An ASGI application around the stock one.

    Args:
        app: llama-cpp-python's server with our routes.
        queue: where the requests that the model works for wait.
        metrics: counts them.
        api_key: what clients must send, None for nothing.
        most_body: bytes of the longest body.
    """

    def __init__(
        self,
        app: App,
        queue: FairQueue,
        metrics: Metrics,
        *,
        api_key: str | None,
        most_body: int,
    ) -> None:
        self.app, self.queue, self.metrics = app, queue, metrics
        self._key = None if api_key is None else api_key.encode()
        self._most_body = most_body

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, sent = scope["path"], _Sent(send)
        try:
            self._admit(path, scope["method"], Headers(scope=scope))
            if scope["method"] == "POST":
                content = await self._read(Headers(scope=scope), receive)
                if content is None:
                    return
                if path in SCHEMAS:
                    await self._work(scope, content, receive, sent)
                else:
                    await self.app(_with_json(scope, content), _once(content, receive), sent)
            else:
                await self.app(scope, receive, sent)
        except _Refused as refused:
            await sent.error(refused.status, refused.message, refused.code)
        except Gone:
            pass
        except RequestError as error:
            await sent.error(*explained(error))
        except Exception as error:
            await sent.error(*_told(error))
        finally:
            self.metrics.answered(path if path in SCHEMAS else "other", sent.status)

    def _admit(self, path: str, method: str, headers: Headers) -> None:
        """Refuse who may not ask."""
        if any(ord(each) < 32 for each in path):  # Starlette's routes match what ends in a line break
            raise _Refused(404, "there is no such path")
        host = _host(f"//{headers.get('host', '')}")
        if self._key is None and not _is_no_foreign_name(host):
            raise _Refused(403, f"without --api-key it is not asked as {host!r}; use its address, or localhost")
        origin = headers.get("origin")
        if origin is not None and self._key is None and _host(origin) not in (*LOOPBACK, host):
            raise _Refused(403, f"pages of {origin} may not ask a server without --api-key")
        if self._key is None or path in OPEN or method == "OPTIONS":
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), self._key):
            raise _Refused(401, "wrong or missing API key; send it as Authorization: Bearer KEY", "invalid_api_key")

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        """Read the body; None where the client left."""
        limit = f"the body has more than {self._most_body:,} bytes; send a shorter prompt, or start with a larger --ctx"
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self._most_body:
            raise _Refused(413, limit)
        content = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            content += message.get("body", b"")
            if len(content) > self._most_body:
                raise _Refused(413, limit)
            if not message.get("more_body"):
                return bytes(content)

    async def _work(self, scope: MutableMapping[str, Any], content: bytes, receive: Receive, sent: "_Sent") -> None:
        """Have the model work for a request in its turn; where the client leaves, it stops."""
        request, body = await run_in_threadpool(read_body, scope["path"], content)
        client = f"{(scope.get('client') or ('',))[0]}/{body.get('user', '')}"
        gone = asyncio.Event()
        begin(request)
        work = asyncio.ensure_future(self._in_turn(scope, request, body, client, gone, sent))
        leaving = asyncio.ensure_future(_left(receive, gone))
        try:
            await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:  # the server stops, and has waited long enough
            gone.set()
            raise
        finally:
            leaving.cancel()
            if not work.done():
                request.leave()
                if not request.has_turn:
                    work.cancel()
            # The thread that the model runs in ends first: nothing else may use the model meanwhile.
            await asyncio.wait({work})
        if not work.cancelled() and (error := work.exception()) is not None and not gone.is_set():
            raise error

    async def _in_turn(
        self,
        scope: MutableMapping[str, Any],
        request: ServedRequest,
        body: dict[str, Any],
        client: str,
        gone: asyncio.Event,
        sent: "_Sent",
    ) -> None:
        content = msgspec.json.encode(body)
        try:
            async with self.queue.turn(client):
                request.has_turn = True
                sent.shape(request, Stream(request) if request.streams else None)
                try:
                    await self.app(_with_json(scope, content), _until(content, gone), sent)
                except Exception as error:
                    request.error = request.error or _innermost(error)
                finally:
                    await run_in_threadpool(request.close)
                    self.metrics.ran(request)
                await sent.finish()
        except QueueFull:
            raise _Refused(429, f"{self.queue.most} requests wait already; try again later", "queue_full") from None
        except Closing:
            raise _Refused(503, "the server stops; ask again when it runs", "stopping") from None


class _Sent:
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
            await self.error(*_told(request.error))
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


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _is_no_foreign_name(host: str) -> bool:
    """Whether a host is an address, or a name of this machine.

    Who owns any other name may let it lead here, and his page is then of the same origin.
    """
    name = socket.gethostname().lower()
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host in ("localhost", name, f"{name}.local")
    return True


def _told(error: Exception | None) -> tuple[int, str, str | None]:
    """Explain an error, and where it is the server's print its traceback too."""
    told = explained(error)
    if told[0] == 500 and error is not None:
        traceback.print_exception(error, file=sys.stderr)
    return told


def _innermost(error: BaseException) -> Exception:
    """Return what a group of exceptions, as task groups raise them, is about."""
    while (inner := getattr(error, "exceptions", None)) is not None:
        error = inner[0]
    return error if isinstance(error, Exception) else RuntimeError(str(error))


async def _left(receive: Receive, gone: asyncio.Event) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
    gone.set()


def _with_json(scope: MutableMapping[str, Any], content: bytes) -> MutableMapping[str, Any]:
    """Return the scope of a request with this body, whatever kind its client called it."""
    others = [pair for pair in scope["headers"] if pair[0] not in (b"content-length", b"content-type")]
    ours = [(b"content-length", b"%d" % len(content)), (b"content-type", b"application/json")]
    return {**scope, "headers": others + ours}


def _once(content: bytes, receive: Receive) -> Receive:
    """Give the body that was read already, then what comes."""
    first: list[Message] = [{"type": "http.request", "body": content, "more_body": False}]

    async def again() -> Message:
        return first.pop() if first else await receive()

    return again


def _until(content: bytes, gone: asyncio.Event) -> Receive:
    """Give the body that was read already, and once the client has left say so."""

    async def receive() -> Message:
        await gone.wait()
        return {"type": "http.disconnect"}

    return _once(content, receive)
