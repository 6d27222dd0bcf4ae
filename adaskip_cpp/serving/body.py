"""Checks the body of a request by the schemas of llama-cpp-python's server, and more. Start at :func:`read_body`."""

from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec
from llama_cpp.server.types import CreateChatCompletionRequest, CreateCompletionRequest
from pydantic import BaseModel, ValidationError

from ..errors import RequestError
from ..model.edits import REUSES
from .dialects import DIALECTS
from .grammar import check_depth, check_schema
from .plans import WISHES, check_wish
from .request import ServedRequest

_Kind = TypeVar("_Kind")

SCHEMAS: dict[str, type[BaseModel]] = {
    **dict.fromkeys(("/v1/chat/completions", *DIALECTS), CreateChatCompletionRequest),
    **dict.fromkeys(("/v1/completions", "/v1/engines/copilot-codex/completions"), CreateCompletionRequest),
}
"""The paths that the model answers, and their schemas. A body of :data:`.DIALECTS` first becomes a chat."""

MOST_LOGPROBS, MOST_BIAS = 20, 100  # OpenAI's own limits
# Most entries. Pydantic makes several errors of each wrong one.
_MOST = {"messages": 4096, "tools": 4096, "functions": 4096, "stop": 32}
_ROLES = ("system", "user", "assistant", "tool", "function")

_TEXTS = ("text", "input_text", "output_text")  # types of parts; the last two are of /v1/responses
_NOT_WITH_MIN_TOKENS = ("grammar", "response_format", "tools", "functions", "logit_bias")

# Bounds of numbers for which the schema has no bounds, or too wide ones; then those of all other numbers.
_RANGES = {"temperature": (0, 100), "repeat_penalty": (0.01, 100), "seed": (-(2**63), 2**64 - 1)}
_RANGE = (-2, 2**31 - 1)
_COLDEST = 1e-20  # least temperature above 0; dividing by a smaller one may give NaN


def decoded(content: bytes, kind: type[_Kind]) -> _Kind:
    """Decode JSON as a type; raise RequestError if it does not fit."""
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the body is not valid JSON for this path ({error}); send a JSON object") from error


def read_body(path: str, content: bytes) -> ServedRequest:
    """Read the body of a request to the model; RequestError if this server cannot answer it. Null counts as left out.

    Fields beside those of the schema: ``adaskip``, ``stream_options``, ``cache_prompt`` and ``return_progress`` (of
    llama.cpp's server), ``cache_salt`` (of vLLM's), ``max_completion_tokens``, token ids as prompt, parts of text.
    """
    body = decoded(content, dict[str, Any])
    if path in DIALECTS:
        body = DIALECTS[path].asked(body)
    body = {name: value for name, value in body.items() if value is not None}
    wish, reuse = _wishes(body.pop("adaskip", None))
    request = ServedRequest(path=path, wish=wish, reuse=reuse, salt=body.pop("cache_salt", ""))
    if not isinstance(request.salt, str):
        raise RequestError(f"cache_salt is {request.salt!r}; send a text, or leave it out")
    request.reuses = body.pop("cache_prompt", True) is not False
    request.returns_progress = body.pop("return_progress", False) is True
    options = body.pop("stream_options", None)
    request.includes_usage = isinstance(options, dict) and options.get("include_usage") is True
    if "max_completion_tokens" in body:
        body.setdefault("max_tokens", body.pop("max_completion_tokens"))
    _check_bounds(body)
    body.setdefault("repeat_penalty", 1.0)  # OpenAI's API has no such penalty; the stock server's default is 1.1
    if "messages" in body:
        body["messages"] = _simplify(body["messages"])
    for function in _functions(body):
        function["parameters"] = function.get("parameters") or {"type": "object", "properties": {}}
        if function.get("description", "") is None:
            del function["description"]
    if isinstance(stops := body.get("stop"), str | list):  # llama-cpp-python would end at an empty one at once
        body["stop"] = [each for each in ([stops] if isinstance(stops, str) else stops) if each != ""]
    if body.get("logprobs") is True:
        body.setdefault("top_logprobs", 0)
    match body.get("response_format"):
        case {"type": "json_schema", "json_schema": {"schema": dict() as schema}}:  # OpenAI's newer form
            body["response_format"] = {"type": "json_object", "schema": schema}
    if SCHEMAS[path] is CreateCompletionRequest and isinstance(body.get("prompt"), list):
        request.prompt_tokens, body["prompt"] = _prompt(body["prompt"])
    try:
        request.body = SCHEMAS[path].model_validate(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        first = next((each for each in found if each["loc"][-1] != "role"), found[0])  # roles are right by now
        where = ".".join(str(each) for each in first["loc"] if not str(each).startswith("ChatCompletion")) or "body"
        raise RequestError(f"{where}: {first['msg']}; correct this part of the request") from error
    _check_numbers(request.body)
    if isinstance(request.body, CreateChatCompletionRequest):
        _check_schemas(request.body)
    return request


def _check_bounds(body: dict[str, Any]) -> None:
    """Refuse values that llama-cpp-python ignores, or that would end or block it."""
    for name in ("n", "best_of"):
        if body.get(name, 1) != 1:
            raise RequestError(f"{name} is {body[name]!r}, but this server gives one choice; leave it out or send 1")
    for name, most in _MOST.items():
        if isinstance(found := body.get(name), list) and len(found) > most:
            raise RequestError(f"{name} has {len(found):,} entries; send at most {most:,}")
    bias = body.get("logit_bias")
    for value in bias.values() if isinstance(bias, dict) else ():
        if not (isinstance(value, int | float) and abs(value) <= MOST_BIAS):
            raise RequestError(f"logit_bias has {value!r}; use numbers from -{MOST_BIAS} to {MOST_BIAS}")
    # min_tokens forbids the only token that a finished grammar allows, which ends llama.cpp. Stock then drops a bias.
    if body.get("min_tokens") and (others := [name for name in _NOT_WITH_MIN_TOKENS if body.get(name)]):
        raise RequestError(f"min_tokens and {others[0]} exclude each other; leave one of them out")
    for name in ("response_format", "tools", "functions"):
        check_depth(name, body.get(name))


def _check_numbers(body: BaseModel) -> None:
    """Refuse numbers that would lead to NaN: a forbidden token could then be sampled, which ends llama.cpp.

    Pydantic has made numbers of words such as "20" by now.
    """
    for name, value in body:
        if name in ("logprobs", "top_logprobs") and isinstance(value, int) and value > MOST_LOGPROBS:
            raise RequestError(f"{name} is {value}; ask for at most {MOST_LOGPROBS}")
        low, high = _RANGES.get(name, _RANGE)
        if isinstance(value, int | float) and not low <= value <= high:
            raise RequestError(f"{name} is {value!r}; use a number from {low:g} to {high:g}")
        if name == "temperature" and 0 < value < _COLDEST:
            raise RequestError(f"{name} is {value!r}; use 0, or a number of at least {_COLDEST:g}")


def _check_schemas(body: CreateChatCompletionRequest) -> None:
    match body.response_format:
        case {"type": "json_object", "schema": schema} if schema is not None:
            check_schema("response_format", schema)
    match body.function_call, body.tool_choice:
        case ({"name": name}, _) | (_, {"function": {"name": name}}):
            functions = body.functions or [tool["function"] for tool in body.tools or []]
            chosen = next((each for each in functions if each["name"] == name), None)
            if chosen is None:
                raise RequestError("the chosen tool is not among the tools; add it to them")
            check_schema("the chosen tool", chosen["parameters"])


def _wishes(asked: Any) -> tuple[Any, Any]:
    """Return the plan that a request asks for, and its ``reuse``, or None for the server's."""
    if asked is None:
        return "auto", None
    if not isinstance(asked, dict) or not asked or asked.keys() - {"plan", "reuse"}:
        raise RequestError(f'adaskip is {asked!r}; send {{"plan": P, "reuse": R}}, or one of both. P is one of: '
                           f'{WISHES}, and R is "auto", "prefix" or "edits"')  # fmt: skip
    plan, reuse = asked.get("plan", "auto"), asked.get("reuse")
    check_wish(plan)
    if reuse not in (None, *REUSES):
        raise RequestError(f"adaskip.reuse is {reuse!r}; use one of: {', '.join(REUSES)}")
    return plan, reuse


def _simplify(messages: Any) -> list[dict[str, Any]]:
    """Return messages with the text parts of each content joined, without nulls, "developer" renamed to "system"."""
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages is empty; send at least one")
    found, n_calls = [], 0
    for n, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        role = "system" if role == "developer" else role
        if role not in _ROLES:
            raise RequestError(f"messages.{n} has the role {role!r}; use one of: {', '.join(_ROLES)}")
        content = message.get("content") or ""  # a message that calls a tool has no content
        if isinstance(content, list):
            typed = (part for part in content if isinstance(part, dict) and part.get("type") in _TEXTS)
            texts: list[str] = [part["text"] for part in typed if isinstance(part.get("text"), str)]
            if len(texts) < len(content):
                raise RequestError("content has a part that is not text; send parts of text only")
            content = "".join(texts)
        if not isinstance(content, str):
            raise RequestError(f"messages.{n}.content is neither text nor a list of parts; send one of them")
        about = {name: value for name, value in message.items() if value is not None}
        found.append({**about, "role": role, "content": content})
        calls = about.get("tool_calls", ())
        n_calls += len(calls) if isinstance(calls, list) else 0
        if n_calls > _MOST["tools"]:
            raise RequestError(f"the messages have too many tool_calls; send at most {_MOST['tools']:,}")
    return found


def _functions(body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the functions of a body that are objects, as the schema demands of all."""
    for name in ("tools", "functions"):
        for each in body[name] if isinstance(body.get(name), list) else ():
            function = each.get("function") if name == "tools" and isinstance(each, dict) else each
            if isinstance(function, dict):
                yield function


def _prompt(prompt: list[Any]) -> tuple[list[int] | None, str]:
    """Return the one prompt in a list: its token ids or None, and its text or ""."""
    match prompt:
        case [str(text)]:
            return None, text
        case [list(tokens)] | tokens if tokens and all(type(token) is int for token in tokens):
            return tokens, ""
    raise RequestError("prompt is not one text or one list of token ids; send one prompt per request")
