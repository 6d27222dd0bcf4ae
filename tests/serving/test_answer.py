"""adaskip_cpp.serving.answer: clients that take nothing, and errors."""

import asyncio
from typing import Any

import pytest

from adaskip_cpp.serving import answer
from adaskip_cpp.serving.request import Gone


def test_an_error_of_the_server_is_logged_without_what_it_says(caplog: pytest.LogCaptureFixture) -> None:
    for logs_text in (False, True):
        try:
            raise KeyError("the to".upper())  # the line itself is in the log, as it is none that a client wrote
        except KeyError as error:
            status, message, _ = answer.explained(error, logs_text=logs_text)
        log = caplog.text
        caplog.clear()
        assert status == 500 and "THE TO" not in message
        assert "in test_an_error" in log and "KeyError" in log and ("THE TO" in log) == logs_text


def test_a_client_that_takes_nothing_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "STALL", 0.05)

    async def stuck(message: Any) -> None:
        await asyncio.sleep(60)

    async def send() -> None:
        sent = answer.Sent(stuck)
        await sent.event(b"first")
        await asyncio.sleep(0.2)
        await sent.error(500, "nobody hears it")
        await sent.event(b"second")

    with pytest.raises(Gone):
        asyncio.run(send())
