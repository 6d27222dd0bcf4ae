"""Sends answers over ASGI: as JSON, as a stream of events, or as an error. Start at :class:`Sent`."""

import asyncio
import logging
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator

import jinja2
import msgspec
from llama_cpp.server.types import CreateChatCompletionRequest
from starlette.types import Message, Send

from ..errors import AdaSkipError, NativeError, StateError
from .dialects import DIALECTS, Json, pieces_of
from .request import Gone, Refused, ServedRequest

STALL = 30.0  # seconds after which a client that reads nothing counts as gone
LEFT = 60.0  # seconds that a client has to read the rest of a complete answer
PING = 1.0  # seconds between two comments in a silent stream; without them, proxies would end the connection

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_TYPES |= {429: "rate_limit_error", 503: "service_unavailable_error"}
_LATER = {b"retry-after": b"5"}
_HEADERS = {401: {b"www-authenticate": b"Bearer"}, 429: _LATER, 503: _LATER}
_LOGGER = logging.getLogger(__name__)


def explained(error: Exception, *, logs_text: bool) -> tuple[int, str, str | None]:
    """Return status, message and code for an exception. For a mistake of the server, log the traceback."""
    message = " ".join(str(error).split())
    if isinstance(error, Refused):
        status, message, code = error.args
        return status, message, code
    if "exceed context window" in message:  # llama_cpp.Llama's words, and AdaSkipLlama's
        return 400, message, "context_length_exceeded"
    if isinstance(error, MemoryError):
        return 503, "out of memory; send a shorter prompt, or start the server with a smaller --ctx", None
    files = {frame.filename for frame in traceback.extract_tb(error.__traceback__)}
    if isinstance(error, jinja2.TemplateError) or "<template>" in files:  # templates raise llama_cpp's ValueError
        return 400, f"the model's chat template refuses these messages: {message}; change their roles or order", None
    if isinstance(error, AdaSkipError) and not isinstance(error, NativeError | StateError):
        return 400, message, None
    if logs_text:
        _LOGGER.error("%s", "".join(traceback.format_exception(error)).rstrip())
    else:  # the text of an exception may contain what a client wrote
        frames = "".join(traceback.format_tb(error.__traceback__))
        _LOGGER.error("%s%s; --log-prompts shows the message", frames, type(error).__name__)
    return 500, f"the server failed ({type(error).__name__}); see its log", None


class Sent:
    """ASGI send wrapper: queues messages, so callers do not wait for the client. Raises Gone if the client has left."""

    def __init__(self, send: Send, path: str = "") -> None:
        self._dialect, self._n_events = DIALECTS.get(path.removesuffix("/count_tokens")), 0
        self.status, self._send = 499, send  # 499: the client left before anything was sent
        self._is_begun = self._is_over = self._is_gone = False
        self._waiting: deque[Message] = deque()  # without a bound: an answer has no more tokens than the context
        self._sending: asyncio.Task[None] | None = None

    async def __call__(self, message: Message) -> None:
        if self._is_gone or self._is_over:
            raise Gone
        if message["type"] == "http.response.start":
            self.status, self._is_begun = message["status"], True
        else:
            self._is_over = not message.get("more_body")
        self._waiting.append(message)
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send_waiting())

    async def _send_waiting(self) -> None:
        try:
            while self._waiting:
                await asyncio.wait_for(self._send(self._waiting.popleft()), STALL)
        except asyncio.TimeoutError:
            self._is_gone = True

    async def finish(self) -> None:
        """Wait until the client has read everything, or is gone."""
        if self._sending is not None and not (await asyncio.wait({self._sending}, timeout=LEFT))[0]:
            self._is_gone = True
            self._waiting.clear()
            self._sending.cancel()

    async def json(self, status: int, content: bytes, headers: dict[bytes, bytes] | None = None) -> None:
        about = {b"content-type": b"application/json", b"content-length": b"%d" % len(content), **(headers or {})}
        await self({"type": "http.response.start", "status": status, "headers": [*about.items()]})
        await self({"type": "http.response.body", "body": content})

    async def event(self, content: bytes, *, is_last: bool = False) -> None:
        """Send a piece of a stream. The first piece sends status 200 before."""
        if not self._is_begun:
            about = {b"content-type": b"text/event-stream", b"cache-control": b"no-store", b"x-accel-buffering": b"no"}
            await self({"type": "http.response.start", "status": 200, "headers": [*about.items()]})
        self._n_events += content.startswith(b"event: ")
        await self({"type": "http.response.body", "body": content, "more_body": not is_last})

    async def ping(self) -> None:
        """Send a comment in a stream, which clients ignore."""
        if not self._is_over:
            await self.event(b": ping\n\n")

    async def error(self, status: int, message: str, code: str | None = None) -> None:
        """Send an error in the form of the client's API. If a stream has begun, end it with the error."""
        if self._is_over or self._is_gone:
            return
        kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "internal_server_error")
        error = {"message": message, "type": kind, "param": None, "code": code}
        dialect, n_events = self._dialect, self._n_events if self._is_begun else None
        told: Json = dialect.error(status, error, n_events) if dialect else {"error": error}
        if self._is_begun:
            await self.event(_event(told), is_last=True)
        else:
            await self.json(status, msgspec.json.encode(told), _HEADERS.get(status))


def encoded(answer: Json | Iterator[Json], request: ServedRequest, tell: Callable[[bytes], object]) -> bytes:
    """Return the model's answer as JSON, with our figures. Of a stream, pass all events to ``tell`` but the last."""
    dialect = DIALECTS.get(request.path)
    if isinstance(answer, dict):
        _correct(answer, request, set())
        if dialect is not None:
            answer = dialect.answer([*pieces_of(answer["choices"][0]["message"])], request)
        else:
            answer["usage"] = request.usage
        return msgspec.json.encode({**answer, **request.figures})
    if dialect is not None:
        for event in dialect.events(answer, request):
            tell(_event(event))
        return b""
    head, named = _head(request), set[str]()
    for chunk in answer:
        _correct(chunk, request, named)
        is_end = any(choice.get("finish_reason") for choice in chunk["choices"])
        tell(_event({**chunk, **head, **(request.figures if is_end else {})}))
    if request.includes_usage:
        tell(_event({**head, "choices": [], "usage": request.usage}))
    return b"data: [DONE]\n\n"


def _correct(answer: Json, request: ServedRequest, named: set[str]) -> None:
    """Correct what llama-cpp-python says of a tool: clients join the parts of a stream, so ids and names come once."""
    for choice in answer["choices"]:
        if choice["finish_reason"] == "tool_calls" and request.finish == "length":
            choice["finish_reason"] = "length"
        delta = choice.get("delta") or {}
        for call in delta.get("tool_calls") or ():
            if call["id"] not in named:
                named.add(call["id"])
                continue
            old = delta.get("function_call") or {}
            for part, name in ((call, "id"), (call, "type"), (call["function"], "name"), (old, "name")):
                part.pop(name, None)


def progress_event(request: ServedRequest) -> bytes:
    """Return the progress of the prompt beside an empty choice, as llama.cpp's server (``result_prompt_progress``)."""
    time_ms = 1e3 * (time.perf_counter() - request.begun)
    done = {"total": request.n_prompt, "cache": request.n_cached or 0, "processed": request.n_done, "time_ms": time_ms}
    empty: Json = {"text": "", "logprobs": None}
    if isinstance(request.body, CreateChatCompletionRequest):
        empty = {"delta": {"role": "assistant", "content": None}}
    choice = {"index": 0, "finish_reason": None, **empty}
    return _event({**_head(request), "choices": [choice], "prompt_progress": done})


def _head(request: ServedRequest) -> Json:
    """Return the fields of all events of a stream, as in llama-cpp-python's server."""
    is_chat = isinstance(request.body, CreateChatCompletionRequest)
    id, kind = ("chatcmpl", "chat.completion.chunk") if is_chat else ("cmpl", "text_completion")
    return {"id": f"{id}-{request.id}", "object": kind, "created": request.created, "model": request.model}


def _event(content: Json) -> bytes:
    """Return a server-sent event. It has a name if its content has a type."""
    name = f"event: {content['type']}\n".encode() if "type" in content else b""
    return name + b"data: " + msgspec.json.encode(content) + b"\n\n"
