"""adaskip_cpp.serving.body: what requests may have."""

import json
from typing import Any

import pytest

from adaskip_cpp.errors import RequestError
from adaskip_cpp.serving.body import read_body


def test_a_body_may_have_what_the_schema_lacks() -> None:
    request = read_body("/v1/completions", b'{"prompt": [[1, 2]], "temperature": null, "stream_options": {}}')
    body: Any = request.body
    assert request.prompt_tokens == [1, 2] and (body.prompt, body.temperature) == ("", 0.8)
    assert request.wish == "auto" and not request.includes_usage
    chat = (
        b'{"messages": [{"role": "developer", "content": [{"type": "text", "text": "a"}]}], "max_completion_tokens": 3}'
    )
    body = read_body("/v1/chat/completions", chat).body
    assert body.messages == [{"role": "system", "content": "a"}] and body.max_tokens == 3
    assert read_body("/v1/completions", b'{"prompt": "a", "cache_salt": "mine"}').salt == "mine" and request.salt == ""
    with pytest.raises(RequestError, match="cache_salt is 3"):
        read_body("/v1/completions", b'{"prompt": "a", "cache_salt": 3}')


def test_what_calls_a_tool_needs_no_content() -> None:
    """As the openai package sends back the message that it got."""
    call = {"id": "a", "type": "function", "function": {"name": "go", "arguments": "{}"}}
    for content in ({"content": None}, {}):
        asked = {"messages": [{"role": "assistant", **content, "tool_calls": [call]}]}
        body: Any = read_body("/v1/chat/completions", json.dumps(asked).encode()).body
        assert body.messages == [{"role": "assistant", "content": "", "tool_calls": [call]}]
