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


def test_nulls_in_messages_and_what_a_tool_may_lack_are_left_out() -> None:
    """As clients send back the messages that they got, and as OpenAI allows functions."""
    said = {"role": "assistant", "content": "hi", "tool_calls": None, "function_call": None, "audio": None}
    tool = {"type": "function", "function": {"name": "now", "description": None}}
    body: Any = read(CHAT, {"messages": [*ASKED, said], "tools": [tool]}).body
    assert body.messages[1] == {"role": "assistant", "content": "hi"}
    none = {"type": "object", "properties": {}}
    assert body.tools == [{"type": "function", "function": {"name": "now", "parameters": none}}]


def test_an_empty_text_ends_no_answer() -> None:
    for stop, left in (("", []), (["", "a"], ["a"]), ("a", ["a"]), ([], [])):
        body: Any = read("/v1/completions", {"prompt": "a", "stop": stop}).body
        assert body.stop == left


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (3, r"messages.1 has the role None; use one of: system, user, assistant, tool, function"),
        ({"role": "nobody", "content": ""}, "messages.1 has the role 'nobody'"),
        ({"role": "user", "content": {"a": 1}}, "messages.1.content is neither text nor a list"),
        ({"role": "assistant", "tool_calls": [{"id": 3}]}, r"messages.1.tool_calls.0.id: .*string"),
        ({"role": "tool", "content": "a"}, "messages.1.tool_call_id: Field required"),
    ],
)
def test_an_error_names_the_part_of_the_message(message: Any, why: str) -> None:
    with pytest.raises(RequestError, match=why):
        read(CHAT, {"messages": [*ASKED, message]})


def test_many_wrong_entries_cost_no_more_than_one() -> None:
    """Pydantic makes some eight errors of each wrong message: the body has to be refused before."""
    for name, entry in (("messages", {}), ("tools", {}), ("functions", {}), ("stop", 1)):
        with pytest.raises(RequestError, match=f"{name} has 100,000 entries; send at most"):
            read(CHAT, {"messages": ASKED, name: [entry] * 100_000})
    many = [{"role": "assistant", "tool_calls": [1] * 3000}] * 2
    with pytest.raises(RequestError, match="too many tool_calls"):
        read(CHAT, {"messages": many})
