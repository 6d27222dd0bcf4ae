"""What every request passes: who may ask, how much, and when it is its turn."""

import asyncio
import hmac
import ipaddress
import socket
import sys
from collections.abc import Callable
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .answer import Sent, explained, send_answer
from .body import SCHEMAS, read_body
from .llama import ServedLlama
from .metrics import Metrics
from .queue import FairQueue
from .request import Gone, Refused, ServedRequest

Routes: TypeAlias = "dict[tuple[str, str], Callable[[bytes], Any]]"
"""By method and path: from a body to a Response, or to what is answered as JSON."""

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_OPEN = ("/", "/health")  # paths that need no key: they tell nothing and run nothing


class Gate:
    """An ASGI application: ``llm`` answers the paths of :data:`SCHEMAS`, ``routes`` the others.

    Clients must send ``api_key``, unless it is None, and a body has ``most_body`` bytes at most. What they write is
    printed to stderr where ``log_prompts`` is set, and nowhere else.
    """

    def __init__(
        self,
        llm: ServedLlama,
        routes: Routes,
        queue: FairQueue,
        metrics: Metrics,
        *,
        api_key: str | None,
        most_body: int,
        log_prompts: bool = False,
    ) -> None:
        self.llm, self.routes, self.queue, self.metrics = llm, routes, queue, metrics
        self._key = None if api_key is None else api_key.encode()
        self._most_body, self._log_prompts = most_body, log_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked, method, path, sent = Request(scope, receive), scope["method"], scope["path"], Sent(send)
        try:
            self._admit(path, method, asked.headers)
            content = await self._read(asked)
            if self._log_prompts:
                print(method, path, content.decode("utf-8", "replace"), file=sys.stderr)
            if method == "POST" and path in SCHEMAS:
                await self._work(asked, content, sent)
            elif (method, path) in self.routes:
                route = self.routes[method, path]
                answer = await run_in_threadpool(route, content) if method == "POST" else route(content)
                if isinstance(answer, Response):
                    await answer(scope, receive, sent)
                else:
                    await sent.json(200, msgspec.json.encode(answer))
            elif path in SCHEMAS or any(path == known for _, known in self.routes):
                raise Refused(405, f"{path} is not asked by {method}; see docs/server.md")
            else:
                raise Refused(404, "there is no such path; see docs/server.md")
        except (Gone, ClientDisconnect):
            pass
        except Exception as error:
            await sent.error(*explained(error, logs_text=self._log_prompts))
        finally:
            self.metrics.answered(path if path in SCHEMAS else "other", sent.status)

    def _admit(self, path: str, method: str, headers: Headers) -> None:
        """Refuse who may not ask."""
        host = _host_of(f"//{headers.get('host', '')}")
        if self._key is None and not _is_no_foreign_name(host):
            raise Refused(403, f"without --api-key it is not asked as {host!r}; use its address, or localhost")
        origin = headers.get("origin")
        if origin is not None and self._key is None and _host_of(origin) not in (*_LOOPBACK, host):
            raise Refused(403, f"pages of {origin} may not ask a server without --api-key")
        if self._key is None or path in _OPEN or method == "OPTIONS":
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), self._key):
            raise Refused(401, "wrong or missing API key; send it as Authorization: Bearer KEY", "invalid_api_key")

    async def _read(self, asked: Request) -> bytes:
        """Read the body."""
        limit = f"the body has more than {self._most_body:,} bytes; send a shorter prompt, or start with a larger --ctx"
        length = asked.headers.get("content-length", "")
        if length.isdigit() and int(length) > self._most_body:
            raise Refused(413, limit)
        content = bytearray()
        async for chunk in asked.stream():
            content += chunk
            if len(content) > self._most_body:
                raise Refused(413, limit)
        return bytes(content)

    async def _work(self, asked: Request, content: bytes, sent: Sent) -> None:
        """Have the model work for a request in its turn; where the client leaves, it stops."""
        request = await run_in_threadpool(read_body, asked.scope["path"], content)
        client = f"{asked.client.host if asked.client else ''}/{getattr(request.body, 'user', None) or ''}"
        work = asyncio.ensure_future(self._in_turn(request, client, sent))
        leaving = asyncio.ensure_future(_left(asked.receive))
        try:
            await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:  # also where the server stops, and has waited long enough
            leaving.cancel()
            if not work.done():
                request.is_left = True
                if not request.has_turn:
                    work.cancel()
            # The thread that the model runs in ends first: nothing else may use the model meanwhile.
            await asyncio.wait({work})
        if not work.cancelled() and (error := work.exception()) is not None and not request.is_left:
            raise error

    async def _in_turn(self, request: ServedRequest, client: str, sent: Sent) -> None:
        async with self.queue.turn(client):
            request.has_turn = True
            try:
                await send_answer(await run_in_threadpool(self.llm.answer, request), request, sent)
            finally:
                await run_in_threadpool(self.llm.end)
                self.metrics.ran(request)


async def _left(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def is_loopback(host: str) -> bool:
    """Whether nothing but this machine reaches it."""
    return host in _LOOPBACK or host.startswith("127.")


def _host_of(url: str) -> str:
    """Return the host of a URL, "" where it has none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _is_no_foreign_name(host: str) -> bool:
    """Whether a host is an address or a name of this machine: any other's owner may let it lead here."""
    name = socket.gethostname().lower()
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host in ("localhost", name, f"{name}.local")
    return True
