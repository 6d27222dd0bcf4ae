"""``adaskip-cpp serve`` as its clients see it: a real process, the openai client, and what must be refused."""

import asyncio
import functools
import json
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from oracles.grammars import FORK, WAYS
from oracles.served import END, Server, frontier_of, refusal, serving

from adaskip_cpp import AdaSkipLlama
from adaskip_cpp.engine.settings import cost_settings
from adaskip_cpp.model.identity import plan_path
from adaskip_cpp.model.plan import DEFAULT_HEAD, DEFAULT_TAIL
from adaskip_cpp.model.plan_file import save_plan
from adaskip_cpp.model.settings import Settings

LONG = " ".join(f"the an{i} of to" for i in range(60))
"""Several hundred tokens of the tiny vocabulary."""

CTX = 2048

ENDLESS = {"logit_bias": {"2": -100}, "grammar": "root ::= [a-z ]+", "stream": True}
"""An answer that no end-of-sequence token ends, of whole characters."""


@pytest.fixture(scope="module")
def server(served_model: Path, served_plan: Path) -> Iterator[Server]:
    with serving(served_model, "--plan", str(served_plan), "--ctx", str(CTX)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as opened:
        yield opened


def ask(server: Server, prompt: str = LONG, **more: Any) -> dict[str, Any]:
    answer = server.post("/v1/completions", {"prompt": prompt, "max_tokens": 4, "temperature": 0, **more})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


# --- the openai client ----------------------------------------------------------------------------------------------


def test_the_openai_client_chats(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "messages": [{"role": "user", "content": "the to"}], "max_tokens": 5}
    asked |= {"temperature": 0, "logit_bias": {"2": -100}}
    answer: Any = client.chat.completions.create(**asked)
    assert answer.choices[0].message.content and answer.usage.completion_tokens >= 5 and answer.model == "tiny"
    parts: Any = [{"role": "developer", "content": [{"type": "text", "text": "the to"}]}]
    client.chat.completions.create(model="tiny", messages=parts, max_completion_tokens=1)
    with client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}) as stream:
        chunks: Any = list(stream)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == answer.choices[0].message.content
    *_, last, end = chunks
    details = end.usage.prompt_tokens_details
    assert not end.choices and end.usage == answer.usage.model_copy(update={"prompt_tokens_details": details})
    assert last.timings["predicted_n"] == answer.usage.completion_tokens and last.adaskip["plan"] == "auto"


def test_the_openai_client_completes_and_lists(client: openai.OpenAI) -> None:
    assert [each.id for each in client.models.list()] == ["tiny"]
    answer = client.completions.create(
        model="tiny", prompt="the to", max_tokens=3, temperature=0, logprobs=2, echo=True
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs and logprobs.tokens and logprobs.token_logprobs and answer.choices[0].text.startswith("the to")
    assert answer.usage and len(logprobs.tokens) == answer.usage.total_tokens - 1 == len(logprobs.token_logprobs)


def test_tools_and_json_are_those_of_the_server_below(client: openai.OpenAI) -> None:
    asked: Any = with_tool({"type": "object", "properties": {}})
    answer: Any = client.chat.completions.create(model="tiny", **asked, max_tokens=30)
    assert answer.choices[0].message.tool_calls[0].function.name == "go"
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    older: Any = with_schema(schema)
    newer = {**older, "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}
    for asked in (older, newer):
        answer = client.chat.completions.create(model="tiny", **asked, max_tokens=60)
        assert json.loads(answer.choices[0].message.content)["a"] in (True, False)


# --- plans and prefixes ---------------------------------------------------------------------------------------------


def test_an_answer_tells_what_was_skipped_read_and_reused(server: Server) -> None:
    whole = ask(server, f"a {LONG}", adaskip={"plan": "none"})
    assert whole["adaskip"]["plan"] == "none" and whole["adaskip"]["prompt_tokens_skipping"] == 0
    n = whole["usage"]["prompt_tokens"]
    assert whole["timings"]["prompt_n"] + whole["timings"]["cache_n"] == n
    skipping = ask(server, f"of {LONG}")
    told = skipping["adaskip"]
    assert told["plan"] == "auto" and told["skipped"]["bulk"] == {"attention": [1], "ffn": [2]}
    assert told["skipped"]["prefill"] == told["skipped"]["decode"] == {"attention": [], "ffn": []}
    n = skipping["usage"]["prompt_tokens"]
    assert told["prompt_tokens_skipping"] == n - DEFAULT_HEAD - DEFAULT_TAIL
    again = ask(server, f"of {LONG}")
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == n - 1 == again["timings"]["cache_n"]
    assert again["choices"][0]["text"] == skipping["choices"][0]["text"]


def test_an_edited_prompt_is_read_where_it_was_edited(server: Server) -> None:
    """Where the request asks for it; and from what was kept of it, when another prompt was read meanwhile."""
    for number, wish in enumerate(["none", "auto"]):
        before, after = f"in{number} the {LONG}", f"in{number} on he {LONG}"
        told = []
        for reuse in ("prefix", "edits"):
            ask(server, before, cache_salt=reuse, adaskip={"plan": wish})
            ask(server, f"to {LONG}", cache_salt="another")
            told.append(ask(server, after, cache_salt=reuse, adaskip={"plan": wish, "reuse": reuse})["adaskip"])
        whole, edited = told
        assert whole["reuse"] == "prefix" and whole["prompt_tokens_moved"] == 0
        assert edited["reuse"] == "edits" and edited["prompt_tokens_read"] < 100 < whole["prompt_tokens_read"]
        assert edited["prompt_tokens_moved"] > whole["prompt_tokens_read"] - 100


def test_a_frontier_beside_the_model_is_chosen_from_by_each_prompt(served_model: Path, tmp_path: Path) -> None:
    """And a chat that grows over a change of plan reads nothing again, nor after a restart."""
    model = Path(shutil.copy(served_model, tmp_path / "m.gguf"))
    with closing(AdaSkipLlama(str(model), n_ctx=256, n_threads=1, verbose=False)) as llm:
        frontier = frontier_of(3, settings=Settings(n_batch=256, n_ubatch=128), machine=cost_settings(llm))
    save_plan(plan_path(model), frontier)
    options = ("--ctx", str(CTX), "--max-loss", "0.07", "--cache-dir", str(tmp_path / "kept"))
    talk = {n: [1, *([7, 9, 30, 12] * CTX)[: n - 1]] for n in (100, 700, 1100)}

    def told(server: Server, n: int, plan: Any = "auto") -> Any:
        return ask(server, talk[n], adaskip={"plan": plan})["adaskip"]  # type: ignore[arg-type]

    with serving(model, *options) as first:
        points = first.get("/v1/models").json()["data"][0]["meta"]["adaskip"]
        assert points["max_loss"] == 0.07 and [each["loss_measured"] for each in points["points"]] == [0.03, 0.06]
        assert "Plans lose at most 0.07 nats per token" in " ".join(map(str.strip, first.lines))
        assert told(first, 100)["plan"] == "none"
        fast = told(first, 700)
        assert (fast["plan"], fast["max_loss"]) == ("promise 0.07", 0.07)
        assert (fast["loss_measured"], fast["speedup_predicted"]) == (0.06, 1.5)
        assert fast["skipped"]["bulk"] == {"attention": [1], "ffn": [2]} and fast["prompt_tokens_skipping"] > 500
        assert first.stop() == 0
    with serving(model, *options) as second:
        careful = told(second, 1100)
        assert careful["skipped"]["bulk"] == {"attention": [], "ffn": [2]} and careful["loss_measured"] == 0.03
        assert careful["prompt_tokens_reused"] >= 699
        tight = told(second, 1100, {"max_loss": 0.04})
        assert tight["prompt_tokens_reused"] == 100, "those that the whole model read"
        assert told(second, 1100, {"speedup": 1.6})["loss_measured"] == 0.06
        refused = {"prompt": talk[1100], "adaskip": {"plan": {"speedup": 3}}}
        assert "ask for at most 1.6" in second.post("/v1/completions", refused).json()["error"]["message"]
        whole = told(second, 1100, "none")
        assert whole["plan"] == "none" and whole["prompt_tokens_skipping"] == 0
        assert whole["max_loss"] is whole["loss_measured"] is whole["speedup_predicted"] is None


# --- what is refused ------------------------------------------------------------------------------------------------


def with_schema(schema: Any) -> dict[str, Any]:
    asked = [{"role": "user", "content": "a"}]
    return {"messages": asked, "response_format": {"type": "json_object", "schema": schema}}


def with_tool(parameters: Any, called: str = "go") -> dict[str, Any]:
    tool = {"type": "function", "function": {"name": "go", "parameters": parameters}}
    choice = {"type": "function", "function": {"name": called}}
    return {"messages": [{"role": "user", "content": "a"}], "tools": [tool], "tool_choice": choice}


def nested(n: int) -> dict[str, Any]:
    return functools.reduce(lambda inner, _: {"type": "array", "items": inner}, range(n), {"type": "null"})


PLAIN = {"prompt": "the", "grammar": 'root ::= ("a" | " ")+', "top_k": 0, "top_p": 1, "min_p": 0}
TWICE = {f"a {rank}": {"properties": {name: {"$ref": f"#/$defs/a {rank + 1}"} for name in "ab"}} for rank in range(40)}
"""Definitions of which each refers to the next one twice, under names that no rule of a grammar can have."""

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BAD: list[tuple[str, Any, int]] = [
    *((COMPLETIONS, body, 400) for body in (b"{", b"[1]", b"\xff\xfe", b"[" * 100_000)),
    (COMPLETIONS, b'{"prompt": "the", "seed": %s}' % (b"1" * 5000), 400),
    *((COMPLETIONS, {"prompt": prompt}, 400) for prompt in ([], 3, ["a", "b"], [[1, 10**9]], [[1, -1]], "the " * 5000)),
    *((COMPLETIONS, {**PLAIN, "temperature": value}, 400) for value in (1e39, 1e-39, -1, "nan")),
    *((COMPLETIONS, {**PLAIN, "repeat_penalty": value}, 400) for value in (0, "inf")),
    *((COMPLETIONS, {**PLAIN, name: 2**31}, 400) for name in ("top_k", "max_tokens")),
    *((COMPLETIONS, {**PLAIN, **more}, 400) for more in ({"frequency_penalty": "nan"}, {"seed": 2**70})),
    *(
        (COMPLETIONS, {"prompt": "the", **more}, 400)
        for more in (
            *({"n": 2}, {"top_p": 2}, {"max_tokens": "many"}, {"logprobs": 100_000}),
            *({"logit_bias": bias} for bias in ({"100000000": 1}, {"²": 1}, {"1" * 5000: 1}, {"50": -1e308})),
            *(
                {"grammar": f"root ::= {rules}"}
                for rules in ("((", "[a-z]? " * 100_000, "<[4294967295]>", "[" * 20_000)
            ),
            *({"grammar": rules} for rules in (r"root ::= [^\x00-\UFFFFFFFF]", FORK, WAYS)),
            *({"min_tokens": 10, **more} for more in ({"grammar": 'root ::= "a"'}, {"logit_bias": {"50": 1}})),
            *({"adaskip": {"plan": plan}} for plan in ("fast", {"speedup": 0}, {"speedup": 2}, "/etc/passwd")),
            *({"adaskip": {"reuse": "all"}}, {"adaskip": {}}),
        )
    ),
    *((CHAT, {"messages": messages}, 400) for messages in ([], "hello", [{"role": "nobody", "content": "x"}])),
    *(
        (CHAT, {"messages": [{"role": "user", "content": content}]}, 400)
        for content in ([{"type": "image_url"}], "the " * 5000)
    ),
    *(
        (CHAT, with_schema(schema), 400)
        for schema in (
            {"type": "string", "minLength": 10**7},
            {"type": "array", "items": {"type": "null"}, "maxItems": 10**4},
            *({"type": "string", "pattern": pattern} for pattern in ("^a{5000}$", "^]$")),
            *({"$ref": name} for name in ("https://example.com/schema", "#/$defs/none")),
            {"$ref": "#/$defs/a 0", "$defs": {**TWICE, "a 40": {"type": "null"}}},
            {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
            *({"type": "frog"}, [], nested(100), {"enum": ["a" * 100_000]}),
            {"properties": {f"n{rank}": {} for rank in range(4000)}},
        )
    ),
    *((CHAT, with_tool(*tool), 400) for tool in ([{"type": "frog"}], [{"type": "object"}, "other"])),
    (CHAT, {**with_tool(nested(100)), "tool_choice": "auto"}, 400),
    ("/v1/completions%0a", {"prompt": "the"}, 404),
    ("/tokenize", b'{"prompt": 3}', 400),
    ("/detokenize", {"tokens": [10**9]}, 400),
    ("/v1/nothing", {}, 404),
    ("/v1/models", {}, 405),
]


@pytest.mark.parametrize("path, body, status", BAD, ids=[f"{path}-{str(body)[:40]}" for path, body, _ in BAD])
def test_a_bad_request_gets_an_error_as_openai_words_it(server: Server, path: str, body: Any, status: int) -> None:
    for stream in (False, True) if isinstance(body, dict) and "completions" in path else (False,):
        answer = server.post(path, {**body, "stream": True} if stream else body)
        if stream and answer.status_code == 200:  # comments had been sent while the grammar took its time
            error = json.loads(answer.text.removesuffix("\n\n").rpartition("data: ")[2])["error"]
        else:
            assert answer.status_code == status
            error = answer.json()["error"]
        assert error["message"] and error["type"] and str(server.model.parent) not in error["message"]
    assert not any("Traceback" in line for line in server.lines), "a client's mistake is none of the server's"
    assert ask(server, "the to")["choices"]


def test_the_log_holds_what_clients_wrote_only_where_it_is_asked_for(served_model: Path) -> None:
    secret = "kept to ourselves"
    bodies = [
        ("/v1/completions", {"prompt": secret, "grammar": f'root ::= "{secret}" ('}),
        ("/v1/completions", {"prompt": secret, "temperature": secret}),
        ("/v1/completions", {"prompt": secret, "max_tokens": 1}),
        ("/v1/chat/completions", with_schema({"type": secret})),
        ("/v1/chat/completions", with_tool({"type": secret})),
        ("/v1/chat/completions", with_tool({}, secret)),
    ]
    for options in ([], ["--log-prompts"]):
        with serving(served_model, "--plan", "none", *options) as server:
            for path, body in bodies:
                assert server.post(path, body).status_code in (200, 400)
            assert server.stop() == 0
            assert (secret in "".join(server.lines)) == bool(options)


def test_a_body_that_is_too_long_is_not_read(server: Server) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 65536

    refused = httpx.post(f"{server.url}/v1/completions", content=endless(), timeout=60)
    assert refused.status_code == 413


def bearer(key: str) -> dict[str, Any]:
    return {"headers": {"authorization": f"Bearer {key}"}}


def test_without_the_key_nothing_is_told(served_model: Path) -> None:
    with serving(served_model, "--plan", "none", environment={"ADASKIP_API_KEY": "secret"}) as locked:
        assert locked.get("/health").status_code == 200 and locked.get("/").status_code == 200
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            answer = locked.get(path)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert locked.post("/v1/completions", {"prompt": "the"}).status_code == 401
        assert locked.get("/v1/models", **bearer("secre")).status_code == 401
        assert locked.get("/v1/models", **bearer("secret")).status_code == 200


def test_each_key_of_a_file_has_what_it_wrote_for_itself(served_model: Path, tmp_path: Path) -> None:
    """No answer tells one what another wrote; on disk, too, it is kept under the key that it is of."""
    (tmp_path / "keys").write_text("first\n\n  second \n")
    options = "--plan", "none", "--api-key-file", str(tmp_path / "keys"), "--cache-dir", str(tmp_path / "kept")

    def n_reused(server: Server, key: str, **more: Any) -> int:
        answer = server.post("/v1/completions", {"prompt": LONG, "max_tokens": 1, **more}, **bearer(key))
        return int(answer.json()["timings"]["cache_n"])

    with serving(served_model, *options, environment={"ADASKIP_API_KEY": "third"}) as server:
        assert server.get("/v1/models", **bearer("third")).status_code == 401, "a file takes its place"
        assert n_reused(server, "first") == 0 == n_reused(server, "second") == n_reused(server, "first", cache_salt="a")
        assert n_reused(server, "first") > 100 and n_reused(server, "second") > 100
        assert server.stop() == 0
    kept = b"".join(path.read_bytes() for path in (tmp_path / "kept").iterdir())
    assert b"first" not in kept and b"second" not in kept
    (tmp_path / "keys").write_text("third\nsecond\n")
    with serving(served_model, *options) as server:
        assert n_reused(server, "third") == 0 and n_reused(server, "second") > 100


@pytest.mark.parametrize("chats", [False, True])
def test_a_stream_tells_how_far_its_prompt_is(server: Server, chats: bool) -> None:
    """In the form of llama.cpp's server; the openai client reads it as a choice that says nothing."""
    asked: Any = {"messages": [{"role": "user", "content": f"er {LONG}"}]} if chats else {"prompt": f"er {LONG}"}
    path = "/v1/chat/completions" if chats else "/v1/completions"
    body = {**asked, "max_tokens": 2, "stream": True, "return_progress": True, "cache_salt": str(chats)}
    lines = [line for line in server.post(path, body).text.splitlines() if line.startswith("data: {")]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    progress = [each["prompt_progress"] for each in events if "prompt_progress" in each]
    n = events[-1]["timings"]["prompt_n"]
    assert [each["processed"] for each in progress][:: len(progress) - 1] == [0, n]
    assert {(each["total"], each["cache"]) for each in progress} == {(n, 0)} and progress[-1]["time_ms"] > 0
    assert "prompt_progress" in events[len(progress) - 1], "all of them come first"
    assert len({(each["id"], each["object"], each["model"]) for each in events}) == 1
    said = [each["choices"][0] for each in events[: len(progress)]]
    assert not any(each["delta"]["content"] if chats else each["text"] for each in said)
    assert "prompt_progress" not in server.post(path, {**body, "return_progress": False}).text


# --- many, and those who leave --------------------------------------------------------------------------------------


def test_a_client_that_leaves_ends_its_answer(server: Server) -> None:
    before = server.metric("adaskip_tokens_total")
    body = {"prompt": "the to of", "max_tokens": CTX, **ENDLESS}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        next(answer.iter_lines())
    assert ask(server, "the to")["choices"]
    assert server.metric("adaskip_tokens_total") - before < CTX


def test_when_too_many_wait_the_next_is_told_so(server: Server) -> None:
    """64 may wait. Each of 80 asks for as long an answer as there is, so that none ends before the last has asked."""

    async def first_refused() -> httpx.Response:
        body, limits = {"prompt": "the to of", "max_tokens": CTX, **ENDLESS, "stream": False}, httpx.Limits()
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:
            asked = [asyncio.ensure_future(client.post("/v1/completions", json=body)) for _ in range(80)]
            for each in asyncio.as_completed(asked):
                if (answer := await each).status_code != 200:
                    break
            for other in asked:
                other.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        return answer

    refused = asyncio.run(first_refused())
    assert refused.status_code == 429 and "waiting already" in refused.text
    assert ask(server, "the to")["choices"], "those that left are not answered first"
    assert server.metric("adaskip_queue_waiting") == 0


def test_sigterm_lets_the_running_answer_finish_and_turns_others_away(served_model: Path) -> None:
    with serving(served_model, "--plan", "none", "--ctx", str(CTX)) as ending:
        body = {"prompt": "the to of", "max_tokens": 900, **ENDLESS}
        waiting: list[httpx.Response] = []
        other = threading.Thread(target=lambda: waiting.append(ending.post("/v1/completions", {"prompt": "the"})))
        with httpx.stream("POST", f"{ending.url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            other.start()
            while ending.metric("adaskip_queue_waiting") == 0:
                time.sleep(0.01)
            ending.process.send_signal(END)
            text = list(lines)
        assert any('"finish_reason":"length"' in line for line in text)
        assert ending.process.wait(60) == 0
        other.join()
        assert waiting[0].status_code == 503 and waiting[0].headers["retry-after"]


def test_prometheus_reads_what_was_counted(server: Server) -> None:
    ask(server)
    text = server.get("/metrics").text
    assert 'adaskip_requests_total{path="/v1/completions",status="200"}' in text
    assert 'adaskip_prompts_reread_total{because="new"}' in text
    for name in ("tokens_total", "time_to_first_token_seconds_bucket", "kv_bytes", "queue_waiting"):
        assert f"adaskip_{name}" in text
    assert server.metric("adaskip_kv_bytes") > 0


def test_a_promise_without_a_frontier_is_refused(served_model: Path, served_plan: Path) -> None:
    for plan in ((), ("--plan", served_plan)):
        told = refusal(served_model, "--max-loss", "0.1", *plan)
        assert "--max-loss chooses from the plans that `tune` found" in told


def test_beyond_this_machine_it_asks_for_a_key(served_model: Path, tmp_path: Path) -> None:
    assert "give --api-key-file, or --insecure" in refusal(served_model, "--host", "0.0.0.0")
    with serving(served_model, "--host", "0.0.0.0", "--insecure", "--allow-host", "Box.lan") as open_to_all:
        assert open_to_all.get("/health").status_code == 200
        assert open_to_all.get("/health", headers={"host": "box.lan"}).status_code == 200
        assert open_to_all.get("/health", headers={"host": "example.com"}).status_code == 403
    (tmp_path / "keys").write_text(" \n")
    assert "has no key; write one" in refusal(served_model, "--api-key-file", tmp_path / "keys")


@pytest.mark.skipif(sys.platform == "win32", reason="modes are POSIX's")
def test_a_cache_folder_that_others_may_write_is_refused_before_anything_starts(
    served_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    assert refusal(served_model, "--cache-dir", tmp_path / "shared").startswith("Error: other users may write to")


@pytest.mark.skipif(not shutil.which("sh"), reason="there is no shell that bounds descriptors")
def test_connections_that_ask_nothing_take_nothing_away(served_model: Path) -> None:
    """More of them than the process may have descriptors."""
    with serving(served_model, "--plan", "none", descriptors=128) as server:
        host, port = server.url.removeprefix("http://").split(":")
        idle = [socket.create_connection((host, int(port))) for _ in range(150)]
        for _ in range(3):
            assert httpx.get(f"{server.url}/health", timeout=5).status_code == 200
            ask(server, "the to")
            idle += [socket.create_connection((host, int(port))) for _ in range(50)]
        for each in idle:
            each.close()
        assert server.stop() == 0
    assert len(server.lines) < 10, server.lines
