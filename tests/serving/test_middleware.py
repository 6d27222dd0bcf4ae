"""adaskip_cpp.serving.middleware: who may ask, and streams that wait."""

import asyncio
import socket
from collections.abc import Callable, Collection, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from adaskip_cpp.serving import answer, middleware
from adaskip_cpp.serving.middleware import Gate, is_loopback, network_of
from adaskip_cpp.serving.queue import FairQueue


def through_the_gate(
    send: Any, body: bytes, answer: Callable[[Any, Any], Any], queue: FairQueue | None = None
) -> Coroutine[Any, Any, None]:
    """A completion as a gate answers it, of a worker that answers so; what is sent goes to ``send``."""
    nothing: Any = SimpleNamespace(answered=lambda *_: None, ran=lambda *_: None)

    async def load(worker: Any) -> None:
        pass

    workers: Any = SimpleNamespace(choose=lambda name: SimpleNamespace(answer=answer), load=load)
    queue = FairQueue(1) if queue is None else queue
    gate = Gate(workers, {}, queue, nothing, keys=(), names=("",), most_body=1000)
    messages = [{"type": "http.request", "body": body}]

    async def receive() -> Any:
        return messages.pop() if messages else await asyncio.sleep(60)

    return gate({"type": "http", "path": "/v1/completions", "method": "POST", "headers": []}, receive, send)


STREAM = b'{"prompt": "a", "stream": true}'


def test_a_slow_reader_does_not_hold_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes an event in a tenth of a second, and has half a second for what it has not taken at the end."""
    monkeypatch.setattr(answer, "LEFT", 0.5)
    taken: list[Any] = []
    n_taken: list[int] = []  # when the turn ended

    async def send(message: Any) -> None:
        await asyncio.sleep(0.1)
        taken.append(message)

    async def fast(request: Any, sent: Any) -> None:
        for _ in range(200):
            await sent.event(b"word")
        await sent.event(b"end", is_last=True)
        n_taken.append(len(taken))

    asyncio.run(through_the_gate(send, STREAM, fast))
    assert n_taken[0] < 100 and n_taken[0] < len(taken) < n_taken[0] + 50


def test_a_stream_that_says_nothing_gets_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it waits for its turn, and while the model works."""
    monkeypatch.setattr(middleware, "PING", 0.02)
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        sent.append(message.get("body", b"begin"))

    async def slow(request: Any, sent: Any) -> None:
        await asyncio.sleep(0.1)
        await sent.event(b"word", is_last=True)

    async def whole(request: Any, sent: Any) -> None:
        await asyncio.sleep(0.1)
        await sent.json(200, b"{}")

    async def scenario() -> int:
        queue = FairQueue(1)
        async with queue.turn("another"):
            asked = asyncio.ensure_future(through_the_gate(send, STREAM, slow, queue))
            await asyncio.sleep(0.1)
            n_waiting = len(sent)
        await asked
        return n_waiting

    n_waiting = asyncio.run(scenario())
    assert sent[0] == b"begin" and sent[-1] == b"word"
    assert 2 < n_waiting < len(sent) - 2 and set(sent[1:-1]) == {b": ping\n\n"}
    sent.clear()
    asyncio.run(through_the_gate(send, b'{"prompt": "a"}', whole))
    assert sent == [b"begin", b"{}"]


def admitted(headers: dict[str, str], keys: Collection[str] = (), names: Collection[str] = ("localhost",)) -> int:
    """The status that a gate answers to a GET for something that is not there: 404 where it may ask."""
    nothing: Any = SimpleNamespace(answered=lambda *_: None)
    gate = Gate(nothing, {}, FairQueue(1), nothing, keys=keys, names=names, most_body=1)
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request"}

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    asyncio.run(gate({"type": "http", "path": "/v1/none", "method": "GET", "headers": raw}, receive, send))
    return int(sent[0]["status"])


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    assert admitted({"authorization": "Bearer x"}, ("k", "l")) == 401
    assert admitted({"authorization": "Bearer k"}, ("k", "l")) == 404
    assert compared == [(b"x", b"k"), (b"x", b"l"), (b"k", b"k"), (b"k", b"l")], "all, whichever it is"


def test_without_a_key_it_is_asked_by_an_address_or_a_listed_name() -> None:
    """The owner of any other name may let it lead here. Names of this machine are announced by others too (mDNS)."""
    own = socket.gethostname()
    for host in ("127.0.0.1:8000", "[::1]:8000", "192.168.0.7", "localhost:1"):
        assert admitted({"host": host}) == 404
    for host in ("127.0.0.1.example", "127.x.example", "example.com", f"{own}.local", own, "[::1", ""):
        assert admitted({"host": host}) == 403
    assert admitted({"host": "Box.lan:80"}, names=("localhost", "box.lan")) == 404
    for origin, status in (("https://example.com", 403), ("http://127.0.0.1:8000", 404)):
        assert admitted({"host": "127.0.0.1:8000", "origin": origin}) == status
    assert admitted({"host": "box.lan", "origin": "http://127.x.example"}, names=("box.lan",)) == 403
    assert admitted({"host": "box.lan", "origin": "http://box.lan"}, names=("box.lan",)) == 404
    assert not is_loopback("127.x.example") and is_loopback("127.0.0.2") and is_loopback("::1")


def test_an_ipv6_client_has_all_addresses_of_its_network() -> None:
    assert network_of("2001:db8::1") == network_of("2001:db8::ffff:2") != network_of("2001:db8:0:1::1")
    assert network_of("::ffff:10.0.0.1") == network_of("10.0.0.1") != network_of("10.0.0.2")
