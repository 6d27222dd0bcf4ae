"""Translates two more APIs into chat completions and back: Anthropic's Messages, and OpenAI's Responses.

``asked`` turns the body of a request into one for chat, which :func:`.read_body` then checks. Other fields stay, such
as ``adaskip``. ``answer`` and ``events`` turn the model's chat answer into the API's form. Start at :data:`DIALECTS`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import msgspec

from ..errors import RequestError
from .grammar import check_depth
from .request import ServedRequest

Json: TypeAlias = dict[str, Any]


@dataclass
class Piece:
    """A piece of an answer: a text; or a tool call, whose ``text`` is its arguments as JSON."""

    id: str = ""
    name: str = ""
    text: str = ""


class Messages:
    """Anthropic's Messages API."""

    def asked(self, body: Json) -> Json:
        if body.get("max_tokens") is None:
            raise RequestError("max_tokens is missing; send the largest number of tokens for the answer")
        system, metadata = body.get("system"), body.get("metadata")
        match system:  # Claude Code's first text changes with each request, so no cached prompt would match
            case [{"text": str() as text}, *others] if text.startswith("x-anthropic-billing-header:"):
                system = others
        messages = [{"role": "system", "content": system}] if system else []
        for message in _list(body, "messages", 1):
            messages += self._turns(message)
        user = metadata.get("user_id") if isinstance(metadata, dict) else None
        more = {"messages": messages, "stop": body.get("stop_sequences"), "user": user}
        return {**body, **_form(body, body.get("output_config")), **more}

    def _turns(self, message: Any) -> list[Any]:
        """Return a message as messages of chat. There, each result of a tool is a message of its own."""
        if not (isinstance(message, dict) and isinstance(message.get("content"), list)):
            return [message]
        results: list[Json] = []
        rest: Json = {"role": message.get("role"), "content": []}
        for block in message["content"]:
            match block:
                case {"type": "tool_use", "id": id, "name": name, "input": given}:
                    check_depth("input", given)
                    _add_call(rest, id, name, msgspec.json.encode(given).decode())
                case {"type": "tool_result", "tool_use_id": id}:
                    results.append({"role": "tool", "tool_call_id": id, "content": block.get("content")})
                case _:
                    rest["content"].append(block)
        return [*results, rest] if rest["content"] or "tool_calls" in rest or not results else results

    def answer(self, pieces: list[Piece], request: ServedRequest) -> Json:
        calls = any(each.id for each in pieces)
        reason = "max_tokens" if request.finish == "length" else "tool_use" if calls else "end_turn"
        about = {"id": f"msg_{request.id}", "type": "message", "role": "assistant", "model": request.model}
        end = {"stop_reason": reason, "stop_sequence": None}  # llama-cpp-python does not report the sequence
        usage = {"input_tokens": request.n_prompt - request.n_reused, "cache_read_input_tokens": request.n_reused}
        usage |= {"cache_creation_input_tokens": 0, "output_tokens": request.n_generated}
        return {**about, "content": list(map(self._block, pieces)), **end, "usage": usage}

    def _block(self, piece: Piece) -> Json:
        if not piece.id:
            return {"type": "text", "text": piece.text}
        try:
            given = msgspec.json.decode(piece.text or "{}")
        except (msgspec.DecodeError, RecursionError):  # the answer ended inside the arguments
            given = {}
        return {"type": "tool_use", "id": piece.id, "name": piece.name, "input": given}

    def events(self, chunks: Iterable[Json], request: ServedRequest) -> Iterator[Json]:
        pieces: list[Piece] = []
        for step, piece, said in _steps(chunks, pieces):
            at = {"index": len(pieces) - 1}
            match step:
                case "first":
                    yield {"type": "message_start", "message": {**self.answer([], request), "stop_reason": None}}
                case "begin":
                    yield {"type": "content_block_start", **at, "content_block": self._block(piece)}
                case "more":
                    kind, name = ("input_json_delta", "partial_json") if piece.id else ("text_delta", "text")
                    yield {"type": "content_block_delta", **at, "delta": {"type": kind, name: said}}
                case "end":
                    yield {"type": "content_block_stop", **at}
        whole = self.answer(pieces, request)
        delta = {name: whole[name] for name in ("stop_reason", "stop_sequence")}
        yield {"type": "message_delta", "delta": delta, "usage": whole["usage"]}
        yield {"type": "message_stop", **request.figures}

    def error(self, status: int, error: Json, n_events: int | None) -> Json:
        """Return an error of OpenAI's form in this API's; ``n_events`` of a stream were sent, None without a stream."""
        kinds = {413: "request_too_large", 503: "overloaded_error"}
        kind = kinds.get(status, "api_error" if status >= 500 else error["type"])
        return {"type": "error", "error": {"type": kind, "message": error["message"]}}


class Responses:
    """OpenAI's Responses API, without its storage."""

    def asked(self, body: Json) -> Json:
        for name in ("previous_response_id", "conversation", "prompt", "background"):
            if body.get(name):
                raise RequestError(f"{name} needs storage, and this server stores nothing; send everything as input")
        given, system = body.get("input"), body.get("instructions")
        messages: list[Json] = [{"role": "system", "content": system}] if system else []
        alone = [{"role": "user", "content": given}] if given and isinstance(given, str) else []
        for item in alone or _list(body, "input", 1):
            match item:
                case {"type": "function_call", "call_id": id, "name": name, "arguments": arguments}:
                    if not (messages and messages[-1]["role"] == "assistant"):
                        messages.append({"role": "assistant"})
                    _add_call(messages[-1], id, name, arguments)
                case {"type": "function_call_output", "call_id": id, "output": output}:
                    messages.append({"role": "tool", "tool_call_id": id, "content": output})
                case {"role": role, "content": content}:
                    messages.append({"role": role, "content": content})
                case _:
                    raise RequestError("input has an entry that is not a message, a call or its output; remove it")
        more = {"messages": messages, "max_tokens": body.get("max_output_tokens")}
        return {**body, **_form(body, body.get("text")), **more}

    def answer(self, pieces: list[Piece], request: ServedRequest) -> Json:
        body, is_cut = cast(Any, request.body), request.finish == "length"
        choice = body.tool_choice or "auto"
        about = {"id": f"resp_{request.id}", "object": "response", "created_at": request.created, "error": None}
        usage = {"input_tokens": request.n_prompt, "output_tokens": request.n_generated}
        usage["total_tokens"] = request.n_prompt + request.n_generated
        cached = {"cached_tokens": request.n_reused, "cache_write_tokens": 0}
        return {
            **about,
            "status": "incomplete" if is_cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "model": request.model,
            "output": [self._item(n, piece, request) for n, piece in enumerate(pieces)],
            "parallel_tool_calls": True,
            "tools": [{"type": "function", "strict": False, **each["function"]} for each in body.tools or []],
            "tool_choice": choice if isinstance(choice, str) else {"type": "function", **choice["function"]},
            "usage": {**usage, "input_tokens_details": cached, "output_tokens_details": {"reasoning_tokens": 0}},
        }

    def _item(self, n: int, piece: Piece, request: ServedRequest) -> Json:
        about = {"id": f"item_{request.id}_{n}", "status": "incomplete" if request.finish == "length" else "completed"}
        if piece.id:
            return {**about, "type": "function_call", "call_id": piece.id, "name": piece.name, "arguments": piece.text}
        content = [self._part(piece)] if piece.text else []
        return {**about, "type": "message", "role": "assistant", "content": content}

    def _part(self, piece: Piece) -> Json:
        return {"type": "output_text", "text": piece.text, "annotations": [], "logprobs": []}

    def events(self, chunks: Iterable[Json], request: ServedRequest) -> Iterator[Json]:
        return ({**event, "sequence_number": n} for n, event in enumerate(self._events(chunks, request)))

    def _events(self, chunks: Iterable[Json], request: ServedRequest) -> Iterator[Json]:
        pieces: list[Piece] = []
        for step, piece, said in _steps(chunks, pieces):
            n = len(pieces) - 1
            item = self._item(n, piece, request)
            name, text = ("function_call_arguments", "arguments") if piece.id else ("output_text", "text")
            at = {"output_index": n, "item_id": item["id"]} | ({} if piece.id else {"content_index": 0, "logprobs": []})
            match step:
                case "first":
                    begun = {**self.answer([], request), "status": "in_progress", "usage": None}
                    yield {"type": "response.created", "response": begun}
                case "begin":
                    yield {"type": "response.output_item.added", **at, "item": {**item, "status": "in_progress"}}
                    if not piece.id:
                        yield {"type": "response.content_part.added", **at, "part": self._part(piece)}
                case "more":
                    yield {"type": f"response.{name}.delta", **at, "delta": said}
                case "end":
                    yield {"type": f"response.{name}.done", **at, text: piece.text}
                    if not piece.id:
                        yield {"type": "response.content_part.done", **at, "part": self._part(piece)}
                    yield {"type": "response.output_item.done", **at, "item": item}
        whole = {**self.answer(pieces, request), **request.figures}
        yield {"type": f"response.{whole['status']}", "response": whole}

    def error(self, status: int, error: Json, n_events: int | None) -> Json:
        return {"error": error} if n_events is None else {**error, "type": "error", "sequence_number": n_events}


DIALECTS: dict[str, Messages | Responses] = {"/v1/messages": Messages(), "/v1/responses": Responses()}


def pieces_of(message: Json) -> Iterator[Piece]:
    """Yield the pieces of a chat message, or of its part in a stream."""
    if message.get("content"):
        yield Piece(text=message["content"])
    for call in message.get("tool_calls") or ():
        yield Piece(call["id"], call["function"]["name"], call["function"]["arguments"])


def _steps(chunks: Iterable[Json], pieces: list[Piece]) -> Iterator[tuple[str, Piece, str]]:
    """Collect the pieces of a stream in ``pieces``. Yield each step with its piece and its new text."""
    for index, chunk in enumerate(chunks):
        if index == 0:
            yield "first", Piece(), ""
        for choice in chunk["choices"]:
            for new in pieces_of(choice["delta"]):
                if not pieces or pieces[-1].id != new.id:
                    if pieces:
                        yield "end", pieces[-1], ""
                    pieces.append(Piece(new.id, new.name))
                    yield "begin", pieces[-1], ""
                pieces[-1].text += new.text
                yield "more", pieces[-1], new.text
    if pieces:
        yield "end", pieces[-1], ""


def _form(body: Json, config: Any) -> Json:
    """Return chat's fields for the form of an answer: tools, the choice among them, and the schema in ``config``."""
    tools: list[Json] = []
    for tool in _list(body, "tools"):
        match tool:
            case {"name": name, "input_schema": schema} | {"type": "function", "name": name, "parameters": schema}:
                about = {"description": tool["description"]} if tool.get("description") else {}
                function = {"name": name, **about, "parameters": schema or {"type": "object"}}
                tools.append({"type": "function", "function": function})
            case _:
                raise RequestError("tools has an entry that is not a function with a schema; remove it")
    match choice := body.get("tool_choice"):
        case {"type": "function" | "tool", "name": name}:
            choice = {"type": "function", "function": {"name": name}}
        case {"type": kind}:
            choice = "required" if kind == "any" else kind
    match form := config.get("format") if isinstance(config, dict) else None:
        case {"type": "json_schema", "schema": schema}:
            form = {"type": "json_object", "schema": schema}
    return {"tools": tools or None, "tool_choice": choice, "response_format": form, "return_progress": None}


def _add_call(message: Json, id: Any, name: Any, arguments: Any) -> None:
    call = {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
    message.setdefault("tool_calls", []).append(call)


def _list(body: Json, name: str, least: int = 0) -> list[Any]:
    found = body.get(name) or []
    if not isinstance(found, list) or len(found) < least:
        raise RequestError(f"{name} is {'not a list' if found else 'empty'}; send a list of at least {least}")
    return found
