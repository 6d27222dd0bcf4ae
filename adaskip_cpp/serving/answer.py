"""What the stock server's answers lack: usage, timings, what was skipped; and errors as OpenAI words them."""

from typing import Any

import jinja2
import msgspec

from ..errors import AdaSkipError, NativeError, StateError
from .request import ServedRequest

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_TYPES |= {413: "invalid_request_error", 429: "rate_limit_error", 503: "service_unavailable_error"}


def error_body(status: int, message: str, code: str | None = None) -> bytes:
    """Return an error's JSON as OpenAI's clients read it."""
    kind = _TYPES.get(status, "internal_server_error")
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": None, "code": code}})


def explained(error: BaseException | None) -> tuple[int, str, str | None]:
    """Return status, message and code for what the model or the server below raised."""
    message = " ".join(str(error).split())
    if "exceed context window" in message:  # llama_cpp.Llama's words
        return 400, f"{message}; shorten the prompt, or start the server with a larger --ctx", "context_length_exceeded"
    if isinstance(error, jinja2.TemplateError):
        return 400, f"the model's chat template refuses these messages: {message}; change their roles or order", None
    if isinstance(error, MemoryError):
        return 503, "out of memory; try a shorter prompt, or a smaller --ctx", None
    is_ours = isinstance(error, AdaSkipError) and not isinstance(error, NativeError | StateError)
    if is_ours:
        return 400, message, None
    return 500, f"the server failed ({type(error).__name__}); see its log", None


def complete(content: bytes, request: ServedRequest) -> bytes:
    """Add to an answer's JSON what the stock one lacks."""
    answer = msgspec.json.decode(content)
    if "usage" in answer and request.begun:
        answer |= {"usage": request.usage, "timings": request.timings, "adaskip": request.summary}
    return msgspec.json.encode(answer)


class Stream:
    """Adds to a stream of server-sent events what the stock one lacks, event by event."""

    def __init__(self, request: ServedRequest) -> None:
        self._request = request
        self._head: dict[str, Any] = {}

    def event(self, content: bytes) -> bytes:
        """Return an event with what belongs to it."""
        if not content.startswith(b"data: "):
            return content  # a comment that keeps the connection alive
        data = content[len(b"data: ") :].strip()
        if data == b"[DONE]":
            if self._request.includes_usage and self._head:
                last = {**self._head, "choices": [], "usage": self._request.usage}
                return _event(last) + content
            return content
        chunk = msgspec.json.decode(data)
        self._head = self._head or {name: chunk[name] for name in ("id", "object", "created", "model") if name in chunk}
        if any(choice.get("finish_reason") for choice in chunk.get("choices", ())):
            return _event({**chunk, "timings": self._request.timings, "adaskip": self._request.summary})
        return content


def _event(data: Any) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def error_event(status: int, message: str, code: str | None) -> bytes:
    """Return the event that ends a stream with an error."""
    return b"data: " + error_body(status, message, code) + b"\n\n"
