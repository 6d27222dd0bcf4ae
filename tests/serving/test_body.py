"""adaskip_cpp.serving.body: bodies of requests that the schema of llama_cpp.server lacks."""

import json
from typing import Any

import pytest

from adaskip_cpp.errors import RequestError
from adaskip_cpp.serving.body import read_body
from adaskip_cpp.serving.request import ServedRequest

CHAT = "/v1/chat/completions"
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
ASKED: Any = [{"role": "user", "content": "the to"}]


def read(path: str, body: Any) -> ServedRequest:
    return read_body(path, json.dumps(body).encode())


def test_a_body_may_have_what_the_schema_lacks() -> None:
    request = read("/v1/completions", {"prompt": [[1, 2]], "temperature": None, "stream_options": {}})
    body: Any = request.body
    assert request.prompt_tokens == [1, 2] and (body.prompt, body.temperature) == ("", 0.8)
    assert request.wish == "auto" and not request.includes_usage
    asked = {
        "messages": [{"role": "developer", "content": [{"type": "text", "text": "a"}]}],
        "max_completion_tokens": 3,
    }
    body = read(CHAT, asked).body
    assert body.messages == [{"role": "system", "content": "a"}] and body.max_tokens == 3
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    body = read(CHAT, {"messages": ASKED, "response_format": form}).body
    assert body.response_format == {"type": "json_object", "schema": SCHEMA}
    given = read("/v1/completions", {"prompt": "a", "cache_salt": "mine", "adaskip": {"reuse": "edits"}})
    assert (given.salt, given.reuse) == ("mine", "edits") and request.salt == "" and request.reuse is None
    with pytest.raises(RequestError, match="cache_salt is 3"):
        read("/v1/completions", {"prompt": "a", "cache_salt": 3})
    call = {"id": "a", "type": "function", "function": {"name": "go", "arguments": "{}"}}
    for content in ({"content": None}, {}):  # as the openai package sends back the message that it got
        body = read(CHAT, {"messages": [{"role": "assistant", **content, "tool_calls": [call]}]}).body
        assert body.messages == [{"role": "assistant", "content": "", "tool_calls": [call]}]


def test_probabilities_are_bounded_however_the_number_is_written() -> None:
    for value in (21, "21", 21.0):
        with pytest.raises(RequestError, match="logprobs is 21; ask for at most 20"):
            read("/v1/completions", {"prompt": "a", "logprobs": value})
        with pytest.raises(RequestError, match="top_logprobs is 21; ask for at most 20"):
            read(CHAT, {"messages": ASKED, "logprobs": True, "top_logprobs": value})
    body: Any = read("/v1/completions", {"prompt": "a", "logprobs": "20"}).body
    assert body.logprobs == 20
