"""The gate that every request passes: checks its key, host, origin and size, and waits for its turn."""

import asyncio
import hmac
import inspect
import ipaddress
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..files import content_hash
from .answer import PING, Sent, explained
from .body import SCHEMAS, read_body
from .metrics import Metrics
from .process import Worker
from .queue import FairQueue
from .request import STOPPING, Gone, Refused, ServedRequest
from .workers import Workers

BODY = 60.0  # seconds in which a body must arrive

_OPEN = ("/", "/health")  # paths that need no key: they reveal nothing and run no model


@dataclass(frozen=True, eq=False)
class Gate:
    """An ASGI application: ``workers`` answer the paths of :data:`SCHEMAS`, ``routes`` others, by method and path."""

    workers: Workers
    routes: dict[tuple[str, str], Callable[[bytes], Any]]  # take a body; return a Response, JSON as bytes, or data
    queue: FairQueue
    metrics: Metrics
    keys: Collection[str]  # clients must send one; without keys, the host in a request must be an address or in `names`
    names: Collection[str]  # lower-case host names of this server
    most_body: int  # bytes
    log_prompts: bool = False  # whether to log bodies, which nothing else does

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked, path, sent = Request(scope, receive), scope["path"], Sent(send, scope["path"])
        try:
            await self._answer(asked, sent)
            await sent.finish()
        finally:
            self.metrics.requests.labels(path if path in SCHEMAS else "other", str(sent.status)).inc()

    async def _answer(self, asked: Request, sent: Sent) -> None:
        method, path = asked.method, asked.scope["path"]
        try:
            owner = self._admit(path, method, asked.headers)
            content = await self._read(asked)
            if self.log_prompts:
                logging.getLogger(__name__).warning("%s %s %s", method, path, content.decode("utf-8", "replace"))
            if method == "POST" and path in SCHEMAS:
                await self._work(asked, content, owner, sent)
            elif (method, path) in self.routes:
                answer = self.routes[method, path](content)
                if inspect.isawaitable(answer):
                    answer = await answer
                if isinstance(answer, Response):
                    await answer(asked.scope, asked.receive, sent)
                else:
                    await sent.json(200, answer if isinstance(answer, bytes) else msgspec.json.encode(answer))
            elif methods := ["POST"] if path in SCHEMAS else [how for how, known in self.routes if known == path]:
                raise Refused(405, f"{path} does not take {method}; use {' or '.join(methods)}")
            else:
                raise Refused(404, "there is no such path; models are at /v1/models, chats at /v1/chat/completions")
        except (Gone, ClientDisconnect):
            pass
        except asyncio.CancelledError:  # the server stops, and the time for running answers is over
            await sent.error(*STOPPING)
        except Exception as error:
            await sent.error(*explained(error, logs_text=self.log_prompts))

    def _admit(self, path: str, method: str, headers: Headers) -> str:
        """Refuse clients that may not ask. With several keys, return a hash of the client's; else ""."""
        host, origin = _host_of(f"//{headers.get('host', '')}"), headers.get("origin")
        if not self.keys:
            # A stranger could let any other name lead to this machine, so that pages of that name may ask it.
            if not (host in self.names or _address(host)):
                words = "is not a known name; use the server's address, or start it with --allow-host"
                raise Refused(403, f"{host!r} {words}")
            if origin is not None and not (is_loopback(_host_of(origin)) or _host_of(origin) == host):
                raise Refused(403, f"pages of {origin} may not ask a server without API keys; start it with some")
        if not self.keys or path in _OPEN or method == "OPTIONS":
            return ""
        bearer = headers.get("authorization") or f"bearer {headers.get('x-api-key', '')}"  # the latter is Anthropic's
        scheme, _, given = bearer.partition(" ")
        sent = given.strip().encode("latin-1")
        is_known = [hmac.compare_digest(sent, key.encode()) for key in self.keys]  # all, so the time reveals nothing
        if scheme.lower() != "bearer" or not any(is_known):
            raise Refused(401, "wrong or missing API key; send it as Authorization: Bearer KEY", "invalid_api_key")
        return content_hash(given.strip()) if len(self.keys) > 1 else ""

    async def _read(self, asked: Request) -> bytes:
        limit = f"the body has over {self.most_body:,} bytes; shorten it, or start the server with a larger --ctx"
        content, length = bytearray(), asked.headers.get("content-length", "")
        if length.isdigit() and int(length) > self.most_body:
            raise Refused(413, limit)

        async def read() -> None:
            async for chunk in asked.stream():
                content.extend(chunk)
                if len(content) > self.most_body:
                    raise Refused(413, limit)

        try:
            await asyncio.wait_for(read(), BODY)
        except asyncio.TimeoutError:
            raise Refused(408, f"the body did not arrive within {BODY:g} seconds; send it all at once") from None
        return bytes(content)

    async def _work(self, asked: Request, content: bytes, owner: str, sent: Sent) -> None:
        """Let the model answer a request in its turn. If the client leaves, the work stops."""
        request = await run_in_threadpool(read_body, asked.scope["path"], content)
        request.owner = owner
        worker = self.workers.choose(getattr(request.body, "model", None))
        party = owner or (network_of(asked.client.host) if asked.client else "")
        work = asyncio.ensure_future(self._in_turn(worker, request, party, sent))
        leaving = asyncio.ensure_future(_left(asked.receive))
        try:
            while not (await asyncio.wait({work, leaving}, timeout=PING, return_when=asyncio.FIRST_COMPLETED))[0]:
                if request.is_stream:
                    await sent.ping()
        finally:  # also if this is cancelled
            leaving.cancel()
            work.cancel()
            await asyncio.wait({work})
        if not work.cancelled() and (error := work.exception()) is not None:
            raise error

    async def _in_turn(self, worker: Worker, request: ServedRequest, party: str, sent: Sent) -> None:
        async with self.queue.turn(party, getattr(request.body, "user", None) or ""):
            try:
                await self.workers.load(worker)
                await worker.answer(request, sent)
            finally:
                self.metrics.ran(request)


async def _left(receive: Receive) -> None:
    """Wait until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    return host == "localhost" or ((address := _address(host)) is not None and address.is_loopback)


def network_of(host: str) -> str:
    """Return what identifies a client: its IPv4 address, or the 64 bits of its network in an IPv6 address."""
    address = _address(host)
    if not isinstance(address, ipaddress.IPv6Address):
        return host
    return str(address.ipv4_mapped or ipaddress.IPv6Address(int(address) >> 64 << 64))


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _host_of(url: str) -> str:
    """Return the host of a URL, or ""."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
