"""The Messages and Responses APIs: how each becomes chat, and what their own clients see."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import anthropic
import openai
import pytest
from oracles.served import serving

from adaskip_cpp.errors import RequestError
from adaskip_cpp.serving.answer import Sent, encoded
from adaskip_cpp.serving.body import read_body
from adaskip_cpp.serving.request import ServedRequest

MESSAGES, RESPONSES, CHAT = "/v1/messages", "/v1/responses", "/v1/chat/completions"
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
ASKED: Any = [{"role": "user", "content": "the to"}]
NO_END = {"logit_bias": {"2": -100}}  # extensions go with every API: no token ends the answer


def read(path: str, body: Any) -> ServedRequest:
    return read_body(path, json.dumps(body).encode())


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


COMMON: Any = {"model": "any", "temperature": 0.5, "top_p": 0.9}
CALLS = [
    {"id": "1", "type": "function", "function": {"name": "go", "arguments": '{"a":true}'}},
    {"id": "2", "type": "function", "function": {"name": "go", "arguments": "{}"}},
]
TALK: Any = {
    "messages": [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "the to"},
        {"role": "assistant", "content": "well", "tool_calls": CALLS},
        {"role": "tool", "tool_call_id": "1", "content": "on"},
        {"role": "tool", "tool_call_id": "2", "content": "off"},
        {"role": "user", "content": "and"},
    ],
    "max_tokens": 9,
    "tools": [{"type": "function", "function": {"name": "go", "description": "Go.", "parameters": SCHEMA}}],
    "tool_choice": {"type": "function", "function": {"name": "go"}},
    "user": "me",
    **COMMON,
}
"""A conversation of chat; the same one in both other APIs is below."""

SAME: dict[str, Any] = {
    MESSAGES: {
        **COMMON,
        "system": [text("x-anthropic-billing-header: cch=123;"), {**text("be "), "cache_control": {}}, text("short")],
        "messages": [
            ASKED[0],
            {
                "role": "assistant",
                "content": [
                    text("well"),
                    {"type": "tool_use", "id": "1", "name": "go", "input": {"a": True}},
                    {"type": "tool_use", "id": "2", "name": "go", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "1", "content": "on"},
                    {"type": "tool_result", "tool_use_id": "2", "content": [text("off")], "is_error": False},
                    text("and"),
                ],
            },
        ],
        "max_tokens": 9,
        "tools": [{"name": "go", "description": "Go.", "input_schema": SCHEMA}],
        "tool_choice": {"type": "tool", "name": "go"},
        "metadata": {"user_id": "me"},
        "thinking": {"type": "disabled"},
    },
    RESPONSES: {
        **COMMON,
        "instructions": "be short",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "the to"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "well"}]},
            {"type": "function_call", "call_id": "1", "name": "go", "arguments": '{"a":true}'},
            {"type": "function_call", "call_id": "2", "name": "go", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "on"},
            {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "off"}]},
            {"role": "user", "content": "and"},
        ],
        "max_output_tokens": 9,
        "tools": [{"type": "function", "name": "go", "description": "Go.", "parameters": SCHEMA, "strict": True}],
        "tool_choice": {"type": "function", "name": "go"},
        "user": "me",
        "store": False,
        "metadata": {"a": "b"},
    },
}


@pytest.mark.parametrize("path", SAME)
def test_a_conversation_is_the_same_in_chat(path: str) -> None:
    assert read(path, SAME[path]).body == read(CHAT, TALK).body


def test_choices_of_tools_and_forms_of_answers_have_other_names() -> None:
    def choice(path: str, given: Any) -> Any:
        return getattr(read(path, {**SAME[path], "tool_choice": given}).body, "tool_choice")  # noqa: B009

    kinds = {"auto": "auto", "any": "required", "none": "none"}
    assert {kind: choice(MESSAGES, {"type": kind}) for kind in kinds} == kinds
    assert [choice(RESPONSES, kind) for kind in ("auto", "required", "none")] == ["auto", "required", "none"]
    form = {"format": {"type": "json_schema", "schema": SCHEMA, "name": "a"}}
    for path, name in ((MESSAGES, "output_config"), (RESPONSES, "text")):
        body: Any = read(path, {**SAME[path], name: form}).body
        assert body.response_format == {"type": "json_object", "schema": SCHEMA}
    nothing: Any = read(RESPONSES, {"input": "the", "text": {"format": {"type": "text"}}, "top_p": None}).body
    assert nothing.messages == [{"role": "user", "content": "the"}] and nothing.tools is None
    stops: Any = read(MESSAGES, {**SAME[MESSAGES], "stop_sequences": ["x"], "top_k": 7}).body
    assert (stops.stop, stops.top_k) == (["x"], 7)


DEEP: Any = json.loads("[" * 100 + "]" * 100)


def user(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (MESSAGES, {"max_tokens": None}, "max_tokens is missing"),
    (MESSAGES, {"messages": []}, "messages is empty"),
    (MESSAGES, user({"type": "image", "source": {}}), "send parts of text only"),
    (MESSAGES, user({"type": "tool_result", "tool_use_id": 3}), "messages.1"),
    (MESSAGES, user({"type": "tool_use", "id": "", "name": "", "input": DEEP}), "input has more than 64 levels"),
    (MESSAGES, {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "an entry that is not a function"),
    (MESSAGES, {"tools": [{"name": "go", "input_schema": DEEP}]}, "tools has more than 64 levels"),
    (MESSAGES, {"tool_choice": {"type": "tool", "name": "other"}}, "not among the tools"),
    (MESSAGES, {"output_config": {"format": {"type": "poem"}}}, "response_format"),
    (RESPONSES, {"input": ""}, "input is empty"),
    (RESPONSES, {"input": [{"type": "item_reference", "id": "a"}]}, "input has an entry that is not a message"),
    (RESPONSES, {"previous_response_id": "a"}, "this server stores nothing"),
    (RESPONSES, {"tool_choice": {"type": "allowed_tools", "tools": []}}, "tool_choice"),
    (RESPONSES, {"text": {"format": {"type": "json_schema", "schema": {"type": "frog"}}}}, "cannot become a grammar"),
]


@pytest.mark.parametrize("path, change, why", REFUSED, ids=[why for _, _, why in REFUSED])
def test_what_cannot_be_translated_is_refused(path: str, change: Any, why: str) -> None:
    with pytest.raises(RequestError, match=why):
        read(path, {**SAME[path], **change})


def chunk(finish: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def called(id: str, arguments: str, name: str | None = None) -> dict[str, Any]:
    return {"tool_calls": [{"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}]}


def told(path: str, chunks: Any, **about: Any) -> list[dict[str, Any]]:
    """The events of an answer in these chunks of chat, whose names are their types."""
    request, content = read(path, SAME[path]), bytearray()
    vars(request).update(
        {"n_layer": 3, "begun": 1.0, "n_prompt": 9, "n_generated": 4, "finish": "stop", "first": 2.0, **about}
    )
    request.n_evaluated["prefill"] = 3
    assert encoded(iter(chunks), request, content.extend) == b""
    events = [each.split("\n") for each in content.decode().removesuffix("\n\n").split("\n\n")]
    found = [json.loads(data.removeprefix("data: ")) for _, data in events]
    assert [name.removeprefix("event: ") for name, _ in events] == [each["type"] for each in found]
    return found


CALLED = [called("1", "", "go"), called("1", '{"a": '), called("1", "true}"), called("2", "{}", "stay")]
DELTAS = [{"role": "assistant"}, {"content": "we"}, {"content": "ll"}, *CALLED]
BOTH = [*(chunk(**delta) for delta in DELTAS), chunk("tool_calls")]
"""A text and two calls, as functionary's chat format streams them."""


def test_text_and_calls_become_blocks() -> None:
    events = told(MESSAGES, BOTH)
    assert [(each["type"].removeprefix("content_block_"), each.get("index")) for each in events] == [
        ("message_start", None),
        *[("start", 0), ("delta", 0), ("delta", 0), ("stop", 0)],
        *[("start", 1), ("delta", 1), ("delta", 1), ("delta", 1), ("stop", 1)],
        *[("start", 2), ("delta", 2), ("stop", 2)],
        ("message_delta", None),
        ("message_stop", None),
    ]
    usage = {"input_tokens": 3, "cache_read_input_tokens": 6, "cache_creation_input_tokens": 0, "output_tokens": 4}
    assert events[0]["message"]["stop_reason"] is None and events[0]["message"]["usage"] == usage
    assert events[1]["content_block"] == text("") and events[2]["delta"] == {"type": "text_delta", "text": "we"}
    assert events[5]["content_block"] == {"type": "tool_use", "id": "1", "name": "go", "input": {}}
    assert "".join(each["delta"]["partial_json"] for each in events[6:9]) == '{"a": true}'
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None} and events[-2]["usage"] == usage
    assert events[-1]["timings"]["cache_n"] == 6 and events[-1]["adaskip"]["plan"] == "none"


def test_text_and_calls_become_items() -> None:
    events = told(RESPONSES, BOTH)
    assert [each["sequence_number"] for each in events] == list(range(len(events)))
    text, call = "response.output_text.", "response.function_call_arguments."
    assert [each["type"] for each in events] == [
        "response.created",
        *["response.output_item.added", "response.content_part.added", f"{text}delta", f"{text}delta", f"{text}done"],
        *["response.content_part.done", "response.output_item.done"],
        *["response.output_item.added", *[f"{call}delta"] * 3, f"{call}done", "response.output_item.done"],
        *["response.output_item.added", f"{call}delta", f"{call}done", "response.output_item.done"],
        "response.completed",
    ]
    assert [each["output_index"] for each in events[1:-1]] == [0] * 7 + [1] * 6 + [2] * 4
    begun, done = events[0]["response"], events[-1]["response"]
    assert (begun["status"], begun["usage"], done["status"]) == ("in_progress", None, "completed")
    ended = [each["item"] for each in events if each["type"] == "response.output_item.done"]
    assert done["output"] == ended and [each["status"] for each in ended] == ["completed"] * 3
    assert ended[0]["content"][0]["text"] == "well"
    assert [(each["call_id"], each["name"], each["arguments"]) for each in ended[1:]] == [
        ("1", "go", '{"a": true}'),
        ("2", "stay", "{}"),
    ]
    assert (done["usage"]["input_tokens"], done["usage"]["input_tokens_details"]["cached_tokens"]) == (9, 6)
    assert done["tools"][0]["name"] == "go" and done["tool_choice"] == {"type": "function", "name": "go"}
    assert done["adaskip"]["plan"] == "none" and done["timings"]["predicted_n"] == 4


def test_a_call_that_is_cut_says_so_and_an_answer_without_text_has_no_blocks() -> None:
    cut = called("1", '{"a": tr', "go")
    chunks = [chunk(**cut), chunk("tool_calls")]  # chat says of each call that it is one, and no more
    assert told(MESSAGES, chunks, finish="length")[-2]["delta"]["stop_reason"] == "max_tokens"
    whole = told(RESPONSES, chunks, finish="length")[-1]["response"]
    assert whole["status"] == "incomplete" == whole["output"][0]["status"]
    assert whole["incomplete_details"] == {"reason": "max_output_tokens"}
    request = read(MESSAGES, SAME[MESSAGES])
    request.n_layer = 3
    answer = {"choices": [{"message": {"content": None, **cut}, "finish_reason": "tool_calls"}]}
    assert json.loads(encoded(answer, request, print))["content"][0]["input"] == {}
    chunks = [chunk(role="assistant"), chunk("stop")]
    start, delta, stop = told(MESSAGES, chunks)
    assert (start["type"], delta["delta"]["stop_reason"], stop["type"]) == ("message_start", "end_turn", "message_stop")
    assert told(RESPONSES, chunks)[-1]["response"]["output"] == []


def test_an_error_has_the_form_of_the_api() -> None:
    def errors(path: str, status: int, *events: bytes) -> Any:
        send = AsyncMock()

        async def fail() -> None:
            sending = Sent(send, path)
            for each in events:
                await sending.event(each)
            await sending.error(status, "no", "code")
            await sending.finish()

        asyncio.run(fail())
        name, _, data = send.call_args.args[0]["body"].decode().rpartition("data: ")
        return name.strip(), json.loads(data)

    kinds = {400: "invalid_request_error", 401: "authentication_error", 413: "request_too_large", 500: "api_error"}
    for status, kind in kinds.items():
        expected = {"type": "error", "error": {"type": kind, "message": "no"}}
        assert errors(MESSAGES, status) == ("", expected) == errors(f"{MESSAGES}/count_tokens", status)
    expected = {"type": "error", "error": {"type": "overloaded_error", "message": "no"}}
    assert errors(MESSAGES, 503, b": ping\n\n") == ("event: error", expected)
    assert errors(RESPONSES, 400)[1]["error"]["code"] == "code"
    name, error = errors(RESPONSES, 500, b": ping\n\n", b"event: a\ndata: {}\n\n")
    assert name == "event: error"
    assert error == {"type": "error", "message": "no", "param": None, "code": "code", "sequence_number": 1}


Clients = tuple[anthropic.Anthropic, openai.OpenAI]


@pytest.fixture(scope="module")
def clients(served_model: Path, served_plan: Path) -> Iterator[Clients]:
    options = "--plan", str(served_plan), "--ctx", "2048"
    with (
        serving(served_model, *options, environment={"ADASKIP_API_KEY": "secret"}) as server,
        anthropic.Anthropic(base_url=server.url, api_key="secret", max_retries=0) as claude,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as gpt,
    ):
        yield claude, gpt


def test_both_clients_have_the_answer_of_chat(clients: Clients) -> None:
    claude, gpt = clients
    extensions = {**NO_END, "temperature": 0, "adaskip": {"plan": "none"}}
    messages: Any = [{"role": "system", "content": "be short"}, *ASKED]
    options: Any = {"model": "tiny", "extra_body": extensions}
    chatted: Any = gpt.chat.completions.create(messages=messages, max_tokens=8, **options)
    expected, usage = chatted.choices[0].message.content, chatted.usage
    asked: Any = {"messages": ASKED, "max_tokens": 8, "system": "be short", **options}
    said: Any = claude.messages.create(**asked)
    counted = claude.messages.count_tokens(model="tiny", messages=ASKED, system="be short")
    with claude.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == expected
        streamed: Any = stream.get_final_message()
    for each in (said, streamed):
        assert each.content[0].text == expected and (each.model, each.stop_reason) == ("tiny", "max_tokens")
        assert each.usage.output_tokens == usage.completion_tokens
        assert each.usage.input_tokens + each.usage.cache_read_input_tokens == usage.prompt_tokens
    assert streamed.usage.cache_read_input_tokens == usage.prompt_tokens - 1 == counted.input_tokens - 1
    assert said.adaskip["plan"] == "none" and said.timings["predicted_n"] == usage.completion_tokens

    asked = {"input": ASKED, "instructions": "be short", "max_output_tokens": 8, **options}
    answer: Any = gpt.responses.create(**asked)
    events: list[Any] = list(gpt.responses.create(**asked, stream=True))
    deltas = [each.delta for each in events if each.type == "response.output_text.delta"]
    assert answer.output_text == expected == "".join(deltas) == events[-1].response.output_text
    assert answer.status == "incomplete" and events[-1].type == "response.incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens" and answer.adaskip["plan"] == "none"
    assert (answer.usage.input_tokens, answer.usage.total_tokens) == (usage.prompt_tokens, usage.total_tokens)
    assert events[-1].response.adaskip["prompt_tokens_reused"] == usage.prompt_tokens - 1
    for each in (answer, *events):
        type(each).model_validate(each.to_dict())  # the package itself checks nothing


def test_both_clients_call_tools(clients: Clients) -> None:
    claude, gpt = clients
    tools: Any = [{"name": "go", "input_schema": SCHEMA}]
    asked: Any = {"model": "tiny", "max_tokens": 60, "tools": tools, "tool_choice": {"type": "tool", "name": "go"}}
    said: Any = claude.messages.create(**asked, messages=ASKED)
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": said.content[0].id, "content": "on"}]}
    again: Any = [*ASKED, {"role": "assistant", "content": said.content}, result]
    with claude.messages.stream(**asked, messages=again) as stream:
        streamed: Any = stream.get_final_message()
    for each in (said, streamed):
        (call,) = each.content
        assert (each.stop_reason, call.name) == ("tool_use", "go") and call.input in ({"a": True}, {"a": False})
        anthropic.types.Message.model_validate(each.to_dict())

    tools = [{"type": "function", "name": "go", "parameters": SCHEMA, "strict": True}]
    asked = {"model": "tiny", "tools": tools, "tool_choice": {"type": "function", "name": "go"}}
    answer: Any = gpt.responses.create(**asked, input=ASKED, max_output_tokens=60)
    (call,) = answer.output
    again = [*ASKED, call, {"type": "function_call_output", "call_id": call.call_id, "output": "on"}]
    with gpt.responses.stream(**asked, input=again, max_output_tokens=60) as events:
        whole: Any = events.get_final_response()
    for each in (answer, whole):
        assert (each.status, each.output[0].name) == ("completed", "go")
        assert json.loads(each.output[0].arguments)["a"] in (True, False)
    type(answer).model_validate(answer.to_dict())


def test_both_clients_raise_their_own_errors(clients: Clients) -> None:
    claude, gpt = clients
    asked: Any = {"model": "tiny", "max_tokens": 1, "messages": ASKED}
    with pytest.raises(anthropic.AuthenticationError, match="API key"):
        claude.with_options(api_key="secre").messages.create(**asked)
    with anthropic.Anthropic(base_url=claude.base_url, auth_token="secret", max_retries=0) as token:
        assert token.messages.create(**asked).usage.output_tokens == 1, "as Claude Code's ANTHROPIC_AUTH_TOKEN"
    for stream in (False, True):
        with pytest.raises(anthropic.BadRequestError, match="temperature is 200") as bad:
            claude.messages.create(**asked, extra_body={"temperature": 200}, stream=stream)
        assert bad.value.type == "invalid_request_error"
        with pytest.raises(openai.BadRequestError, match="this server stores nothing"):
            gpt.responses.create(model="tiny", input="the", previous_response_id="a", stream=stream)
    with pytest.raises(anthropic.BadRequestError, match="messages is empty"):
        claude.messages.count_tokens(model="tiny", messages=[])
    with pytest.raises(openai.BadRequestError, match="context window") as over:
        gpt.responses.create(model="tiny", input="the " * 3000)
    assert over.value.code == "context_length_exceeded"


def test_tokens_are_counted_while_another_request_is_answered(clients: Clients) -> None:
    claude, _ = clients
    asked: Any = {"model": "tiny", "messages": ASKED}
    endless: Any = {**asked, "max_tokens": 2000, "extra_body": {**NO_END, "grammar": "root ::= [a-z ]+"}}
    expected = claude.messages.count_tokens(**asked).input_tokens
    with claude.messages.create(**endless, stream=True) as stream:
        begun: Any = next(iter(stream))
        assert begun.message.usage.input_tokens + begun.message.usage.cache_read_input_tokens == expected
        assert claude.messages.count_tokens(**asked).input_tokens == expected


def test_clients_that_join_the_parts_of_a_stream_get_each_name_once() -> None:
    """As the openai package does: every text but ``type`` is added to what came before."""
    request, content = read(CHAT, {"messages": ASKED}), bytearray()
    vars(request).update({"n_layer": 3, "begun": 1.0, "first": 2.0, "finish": "length"})
    encoded(iter(BOTH), request, content.extend)
    told = [json.loads(each.removeprefix("data: ")) for each in content.decode().split("\n\n") if each]
    calls = [call for each in told for call in each["choices"][0]["delta"].get("tool_calls") or ()]
    assert [call.get("id") for call in calls] == ["1", None, None, "2"]
    assert [call["function"].get("name") for call in calls] == ["go", None, None, "stay"]
    assert "".join(call["function"]["arguments"] for call in calls[:3]) == '{"a": true}'
    assert told[-1]["choices"][0]["finish_reason"] == "length", "the arguments were cut"
