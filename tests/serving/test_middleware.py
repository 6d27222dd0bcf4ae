"""adaskip_cpp.serving.middleware and .answer: who may ask, streams that wait, and clients that take little."""

import asyncio
import socket
from collections.abc import Callable, Collection, Coroutine
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest

from adaskip_cpp.serving import answer, middleware
from adaskip_cpp.serving.middleware import Gate, is_loopback, network_of
from adaskip_cpp.serving.queue import FairQueue
from adaskip_cpp.serving.request import Gone

STREAM = b'{"prompt": "a", "stream": true}'


def through_the_gate(
    send: Callable[[Any], Any],
    *pieces: bytes,
    answer: Callable[[Any, Any], Any] | None = None,
    queue: FairQueue | None = None,
    is_whole: bool = True,
    headers: dict[str, str] | None = None,
    **asked: Any,
) -> Coroutine[Any, Any, None]:
    """A completion, of which these pieces of a body come, as a gate answers it; what is sent goes to ``send``."""
    workers = Mock(load=AsyncMock(), choose=lambda name: Mock(answer=answer))
    options: Any = {"keys": (), "names": ("",), "most_body": 1000, **asked}
    gate = Gate(workers, {}, FairQueue(1) if queue is None else queue, Mock(), **options)
    messages = [{"type": "http.request", "body": each, "more_body": True} for each in reversed(pieces)]
    messages[0]["more_body"] = not is_whole

    async def receive() -> Any:
        return messages.pop() if messages else await asyncio.sleep(60)

    raw = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    return gate({"type": "http", "path": "/v1/completions", "method": "POST", "headers": raw}, receive, send)


def status_of(*pieces: bytes, **asked: Any) -> int:
    send = AsyncMock()
    asyncio.run(through_the_gate(send, *pieces, **asked))
    return int(send.call_args_list[0].args[0]["status"])


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

    asyncio.run(through_the_gate(send, STREAM, answer=fast))
    assert n_taken[0] < 100 and n_taken[0] < len(taken) < n_taken[0] + 50


def test_a_client_that_takes_nothing_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "STALL", 0.05)

    async def scenario() -> None:
        sent = answer.Sent(lambda message: asyncio.sleep(60))
        await sent.event(b"first")
        await asyncio.sleep(0.2)
        with pytest.raises(Gone):
            await sent.event(b"second")
        await sent.error(500, "nobody hears it")

    asyncio.run(scenario())


def test_a_stream_that_says_nothing_gets_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it waits for its turn, and while the model works. One more than may wait is refused at once."""
    monkeypatch.setattr(middleware, "PING", 0.02)
    sent: list[bytes] = []
    refuse = AsyncMock()

    async def send(message: Any) -> None:
        sent.append(message.get("body", b"begin"))

    async def slow(request: Any, sent: Any) -> None:
        await asyncio.sleep(0.1)
        await (sent.event(b"word", is_last=True) if request.is_stream else sent.json(200, b"{}"))

    async def scenario() -> int:
        queue = FairQueue(1)
        async with queue.turn("another"):
            asked = asyncio.ensure_future(through_the_gate(send, STREAM, answer=slow, queue=queue))
            await asyncio.sleep(0.1)
            n_waiting = len(sent)
            await through_the_gate(refuse, STREAM, queue=queue)
        await asked
        return n_waiting

    n_waiting = asyncio.run(scenario())
    assert sent[0] == b"begin" and sent[-1] == b"word"
    assert 2 < n_waiting < len(sent) - 2 and set(sent[1:-1]) == {b": ping\n\n"}
    refused = refuse.call_args_list[0].args[0]
    assert refused["status"] == 429 and (b"retry-after", b"5") in refused["headers"]
    sent.clear()
    asyncio.run(through_the_gate(send, b'{"prompt": "a"}', answer=slow))
    assert sent == [b"begin", b"{}"]


@pytest.mark.parametrize("logs_text", [False, True])
def test_an_error_of_the_server_is_logged_without_its_text(logs_text: bool, caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise KeyError("the to".upper())  # the line itself is in the log, as it is none that a client wrote
    except KeyError as error:
        status, message, _ = answer.explained(error, logs_text=logs_text)
    assert status == 500 and "THE TO" not in message
    assert "in test_an_error" in caplog.text and "KeyError" in caplog.text and ("THE TO" in caplog.text) == logs_text


def test_a_body_that_is_too_long_or_does_not_come_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "BODY", 0.1)
    assert status_of(b"{", is_whole=False) == 408
    assert status_of(*4 * [b" " * 300], is_whole=False) == 413


def admitted(headers: dict[str, str], keys: Collection[str] = (), names: Collection[str] = ("localhost",)) -> int:
    """The status of what is no JSON: 400 where it may be asked."""
    return status_of(b"{", headers=headers, keys=keys, names=names)


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    assert admitted({"authorization": "Bearer x"}, ("k", "l")) == 401
    assert admitted({"x-api-key": "k"}, ("k", "l")) == 400
    assert compared == [(b"x", b"k"), (b"x", b"l"), (b"k", b"k"), (b"k", b"l")], "all, whichever it is"


def test_without_a_key_it_is_asked_by_an_address_or_a_listed_name() -> None:
    """The owner of any other name may let it lead here. Names of this machine are announced by others too (mDNS)."""
    own = socket.gethostname()
    for host in ("127.0.0.1:8000", "[::1]:8000", "192.168.0.7", "localhost:1"):
        assert admitted({"host": host}) == 400
    for host in ("127.0.0.1.example", "127.x.example", "example.com", f"{own}.local", own, "[::1", ""):
        assert admitted({"host": host}) == 403
    assert admitted({"host": "Box.lan:80"}, names=("localhost", "box.lan")) == 400
    for origin, status in (("https://example.com", 403), ("http://127.0.0.1:8000", 400)):
        assert admitted({"host": "127.0.0.1:8000", "origin": origin}) == status
    assert admitted({"host": "box.lan", "origin": "http://127.x.example"}, names=("box.lan",)) == 403
    assert admitted({"host": "box.lan", "origin": "http://box.lan"}, names=("box.lan",)) == 400
    assert not is_loopback("127.x.example") and is_loopback("127.0.0.2") and is_loopback("::1")


def test_an_ipv6_client_has_all_addresses_of_its_network() -> None:
    assert network_of("2001:db8::1") == network_of("2001:db8::ffff:2") != network_of("2001:db8:0:1::1")
    assert network_of("::ffff:10.0.0.1") == network_of("10.0.0.1") != network_of("10.0.0.2")
