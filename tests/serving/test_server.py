"""``adaskip-cpp serve`` as its clients see it: a real process, the openai client, and what must be refused."""

import functools
import json
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from oracles.grammars import FORK, WAYS
from oracles.served import END, Server, frontier_of, refusal, serving

from adaskip_cpp.model.identity import plan_path
from adaskip_cpp.model.plan_file import save_plan

LONG = " ".join(f"the an{i} of to" for i in range(60))  # several hundred tokens of the tiny vocabulary
COMPLETIONS, CHAT, CTX = "/v1/completions", "/v1/chat/completions", 2048
ENDLESS = {"logit_bias": {"2": -100}, "grammar": "root ::= [a-z ]+"}  # no end-of-sequence token, whole characters


@pytest.fixture(scope="module")
def server(served_model: Path, served_plan: Path) -> Iterator[Server]:
    with serving(served_model, "--plan", str(served_plan), "--ctx", str(CTX)) as running:
        yield running


def test_the_openai_client_lists_completes_and_chats(server: Server) -> None:
    asked: Any = {"model": "tiny", "messages": [{"role": "user", "content": "the to"}], "max_tokens": 5}
    asked |= {"temperature": 0, "logit_bias": {"2": -100}}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        assert [each.id for each in client.models.list()] == ["tiny"]
        completion: Any = client.completions.create(model="tiny", prompt="the to", max_tokens=3, logprobs=2, echo=True)
        answer: Any = client.chat.completions.create(**asked)
        with client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}) as stream:
            chunks: Any = list(stream)
    logprobs = completion.choices[0].logprobs
    assert len(logprobs.tokens) == completion.usage.total_tokens - 1 == len(logprobs.token_logprobs)
    assert answer.choices[0].message.content and answer.usage.completion_tokens >= 5 and answer.model == "tiny"
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == answer.choices[0].message.content
    *_, last, end = chunks
    details = end.usage.prompt_tokens_details
    assert not end.choices and end.usage == answer.usage.model_copy(update={"prompt_tokens_details": details})
    assert details.cached_tokens == end.usage.prompt_tokens - 1 == last.timings["cache_n"]
    assert last.timings["predicted_n"] == answer.usage.completion_tokens and last.adaskip["plan"] == "auto"


def test_a_frontier_beside_the_model_is_chosen_from_by_each_prompt(served_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copy(served_model, tmp_path / "m.gguf"))
    save_plan(plan_path(model), frontier_of(3))
    talk = [1, *([7, 9, 30, 12] * CTX)]
    with serving(model, "--ctx", str(CTX), "--max-loss", "0.07") as server:

        def told(n: int, plan: Any = "auto") -> Any:
            body = {"prompt": talk[:n], "max_tokens": 4, "adaskip": {"plan": plan}}
            return server.post(COMPLETIONS, body).json()["adaskip"]

        points = server.get("/v1/models").json()["data"][0]["meta"]["adaskip"]
        assert points["max_loss"] == 0.07 and [each["loss_measured"] for each in points["points"]] == [0.03, 0.06]
        assert "Plans lose at most 0.07 nats per token" in " ".join(map(str.strip, server.lines))
        assert told(100)["plan"] == "none"
        fast = told(700)
        assert (fast["plan"], fast["max_loss"]) == ("promise 0.07", 0.07)
        assert (fast["loss_measured"], fast["speedup_predicted"]) == (0.06, 1.5)
        assert fast["skipped"]["bulk"] == {"attention": [1], "ffn": [2]} and fast["prompt_tokens_skipping"] > 500
        assert fast["skipped"]["prefill"] == fast["skipped"]["decode"] == {"attention": [], "ffn": []}
        assert told(1600)["skipped"]["bulk"] == {"attention": [], "ffn": [2]}
        whole = told(1600, "none")
        assert whole["plan"] == "none" and whole["prompt_tokens_skipping"] == 0
        assert whole["max_loss"] is whole["loss_measured"] is whole["speedup_predicted"] is None
        counted = server.get("/metrics").text
        assert 'adaskip_requests_total{path="/v1/completions",status="200"}' in counted
        assert 'adaskip_prompts_reread_total{because="plan"}' in counted
        assert "adaskip_time_to_first_token_seconds_bucket" in counted and server.metric("adaskip_kv_bytes") > 0


def with_schema(schema: Any) -> dict[str, Any]:
    asked = [{"role": "user", "content": "a"}]
    return {"messages": asked, "response_format": {"type": "json_object", "schema": schema}}


def with_tool(parameters: Any, called: str = "go") -> dict[str, Any]:
    tool = {"type": "function", "function": {"name": "go", "parameters": parameters}}
    choice = {"type": "function", "function": {"name": called}}
    return {"messages": [{"role": "user", "content": "a"}], "tools": [tool], "tool_choice": choice}


NESTED: Any = functools.reduce(
    lambda inner, _: {"type": "array", "items": inner}, range(100), dict[str, Any](type="null")
)
PLAIN = {"prompt": "the", "grammar": 'root ::= ("a" | " ")+', "top_k": 0, "top_p": 1, "min_p": 0}
TWICE = {f"a {rank}": {"properties": {name: {"$ref": f"#/$defs/a {rank + 1}"} for name in "ab"}} for rank in range(40)}
"""Definitions of which each refers to the next one twice, under names that no rule of a grammar can have."""

BAD_COMPLETIONS: list[dict[str, Any]] = [
    *({"prompt": prompt} for prompt in ([], 3, ["a", "b"], [[1, 10**9]], [[1, -1]], "the " * 5000)),
    *({"temperature": value} for value in (1e39, 1e-39, -1, "nan")),
    *({"repeat_penalty": 0}, {"frequency_penalty": "nan"}, {"seed": 2**70}, {"top_k": 2**31}, {"max_tokens": 2**31}),
    *({"n": 2}, {"top_p": 2}, {"max_tokens": "many"}, {"logprobs": 100_000}),
    *({"logprobs": "100000"}, {"logprobs": 25.0}, {"stop": ["a"] * 33}, {"stop": [1]}, {"suffix": "the"}),
    *({"grammar": None, "logit_bias": bias} for bias in ({"100000000": 1}, {"²": 1}, {"1" * 5000: 1}, {"50": -1e308})),
    *({"grammar": rules} for rules in ("root ::= ((", "root ::= <[4294967295]>", FORK, WAYS)),
    *({"min_tokens": 10}, {"min_tokens": 10, "grammar": None, "logit_bias": {"50": 1}}),
    *({"adaskip": {"plan": plan}} for plan in ("fast", {"speedup": 0}, {"speedup": 2}, "/etc/passwd")),
    *({"adaskip": {"reuse": "all"}}, {"adaskip": {}}),
]
BAD_SCHEMAS: list[Any] = [
    {"type": "string", "minLength": 10**7},
    {"type": "array", "items": {"type": "null"}, "maxItems": 10**4},
    *({"type": "string", "pattern": pattern} for pattern in ("^a{5000}$", "^]$")),
    *({"$ref": name} for name in ("https://example.com/schema", "#/$defs/none")),
    {"$ref": "#/$defs/a 0", "$defs": {**TWICE, "a 40": {"type": "null"}}},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    *({"type": "frog"}, [], NESTED, {"enum": ["a" * 100_000]}),
    {"properties": {f"n{rank}": {} for rank in range(4000)}},
]
BAD: list[tuple[str, Any, int]] = [
    *((COMPLETIONS, body, 400) for body in (b"{", b"[1]", b"\xff\xfe", b"[" * 100_000)),
    (COMPLETIONS, b'{"prompt": "the", "seed": %s}' % (b"1" * 5000), 400),
    *((COMPLETIONS, {**PLAIN, **body}, 400) for body in BAD_COMPLETIONS),
    *((CHAT, {"messages": messages}, 400) for messages in ([], "hello", [{"role": "nobody", "content": "x"}])),
    *((CHAT, {"messages": [each] * 30_000}, 400) for each in ({}, {"role": "user", "content": 5})),
    *((CHAT, {"messages": [{"role": "assistant", "tool_calls": calls}]}, 400) for calls in (5, [1] * 100_000)),
    *((CHAT, {"messages": [{"role": "user", "content": "a"}], "tools": tools}, 400) for tools in (5, [{}] * 100_000)),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400),
    *((CHAT, with_schema(schema), 400) for schema in BAD_SCHEMAS),
    *((CHAT, with_tool(*tool), 400) for tool in ([{"type": "frog"}], [{"type": "object"}, "other"])),
    (CHAT, {**with_tool(NESTED), "tool_choice": "auto"}, 400),
    ("/v1/completions%0a", {"prompt": "the"}, 404),
    ("/tokenize", b'{"prompt": 3}', 400),
    ("/detokenize", {"tokens": [10**9]}, 400),
    ("/v1/nothing", {}, 404),
    ("/v1/models", {}, 405),
]


@pytest.mark.parametrize("path, body, status", BAD, ids=[f"{path}-{str(body)[-40:]}" for path, body, _ in BAD])
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
    assert server.post(COMPLETIONS, {"prompt": "the to"}).status_code == 200


def test_the_log_holds_what_clients_wrote_only_where_it_is_asked_for(served_model: Path) -> None:
    secret = "kept to ourselves"
    bodies = [
        (COMPLETIONS, {"prompt": secret, "grammar": f'root ::= "{secret}" ('}),
        (COMPLETIONS, {"prompt": secret, "temperature": secret}),
        (COMPLETIONS, {"prompt": secret, "max_tokens": 1}),
        *((CHAT, body) for body in (with_schema({"type": secret}), with_tool({"type": secret}), with_tool({}, secret))),
    ]
    for options in ([], ["--log-prompts"]):
        with serving(served_model, "--plan", "none", *options) as server:
            for path, body in bodies:
                assert server.post(path, body).status_code in (200, 400)
            assert server.stop() == 0
            assert (secret in "".join(server.lines)) == bool(options)


def test_each_key_of_a_file_has_what_it_wrote_for_itself(served_model: Path, tmp_path: Path) -> None:
    """No answer tells one what another wrote, nor does /slots; on disk, too, it is kept under the key that it is of."""
    (tmp_path / "keys").write_text("first\n\n  second \n")
    options = "--plan", "none", "--api-key-file", str(tmp_path / "keys"), "--cache-dir", str(tmp_path / "kept")

    def bearer(key: str) -> dict[str, Any]:
        return {"headers": {"authorization": f"Bearer {key}"}}

    def n_reused(server: Server, key: str, **more: Any) -> int:
        answer = server.post("/v1/completions", {"prompt": LONG, "max_tokens": 1, **more}, **bearer(key))
        return int(answer.json()["timings"]["cache_n"])

    with serving(served_model, *options, environment={"ADASKIP_API_KEY": "third"}) as server:
        assert server.get("/health").status_code == server.get("/").status_code == 200
        for path, key in (("/v1/models", "x"), ("/metrics", "x"), ("/openapi.json", "firs"), ("/slots", "third")):
            answer = server.get(path, **bearer(key))
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert server.post("/v1/completions", {"prompt": "the"}).status_code == 401
        assert n_reused(server, "first") == 0 == n_reused(server, "second") == n_reused(server, "first", cache_salt="a")
        assert n_reused(server, "first") > 100 and n_reused(server, "second") > 100
        idle = {"id": 0, "model": "tiny", "n_ctx": 8192, "speculative": False, "is_processing": False}
        assert server.get("/slots", **bearer("first")).json() == [idle]
        body = {"prompt": "the to of", "max_tokens": 5000, "stream": True, **ENDLESS}
        with httpx.stream("POST", server.url + COMPLETIONS, json=body, timeout=60, **bearer("first")) as answer:
            for _ in answer.iter_lines():
                (slot,) = server.get("/slots", **bearer("second")).json()
                if slot["is_processing"] and slot["next_token"][0]["n_decoded"] > 0:
                    break
        owner, n_decoded, n_cached = slot["owner"], slot["next_token"][0]["n_decoded"], slot["n_prompt_tokens_cache"]
        told = {"n_prompt_tokens": 8, "n_prompt_tokens_processed": 8 - n_cached, "n_prompt_tokens_cache": n_cached}
        told["next_token"] = [{"has_next_token": True, "n_remain": 5000 - n_decoded, "n_decoded": n_decoded}]
        assert slot == {**idle, **told, "is_processing": True, "owner": owner} and len(owner) == 8, "and no text"
        assert server.stop() == 0
    kept = b"".join(path.read_bytes() for path in (tmp_path / "kept").iterdir())
    assert b"first" not in kept and b"second" not in kept
    (tmp_path / "keys").write_text("third\nsecond\n")
    with serving(served_model, *options) as server:
        assert n_reused(server, "third") == 0 and n_reused(server, "second") > 100


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_stream_tells_how_far_its_prompt_is(server: Server, path: str) -> None:
    """In the form of llama.cpp's server; the openai client reads it as a choice that says nothing."""
    asked = {"prompt": LONG} if path == COMPLETIONS else {"messages": [{"role": "user", "content": LONG}]}
    body = {**asked, "max_tokens": 2, "stream": True, "return_progress": True, "cache_salt": path}
    for is_known in (False, True):
        lines = [line for line in server.post(path, body).text.splitlines() if line.startswith("data: {")]
        events = [json.loads(line.removeprefix("data: ")) for line in lines]
        progress = [each["prompt_progress"] for each in events if "prompt_progress" in each]
        done, timings = [each["processed"] for each in progress], events[-1]["timings"]
        n_cached, n = timings["cache_n"], timings["cache_n"] + timings["prompt_n"]
        assert n_cached == is_known * (n - 1) and {(each["total"], each["cache"]) for each in progress} == {
            (n, n_cached)
        }
        assert done == sorted(set(done)) and (done[0], done[-1]) == (n_cached, n) and progress[-1]["time_ms"] > 0
        assert is_known or len(done) >= 4, "under a plan with a bulk, which cuts a prompt in three"
        assert "prompt_progress" in events[len(progress) - 1], "all of them come first"
        assert len({(each["id"], each["object"], each["model"]) for each in events}) == 1
        said = [each["choices"][0] for each in events[: len(progress)]]
        assert not any(each["delta"]["content"] if path == CHAT else each["text"] for each in said)
    assert "prompt_progress" not in server.post(path, {**body, "return_progress": False}).text


def test_a_client_that_leaves_ends_its_answer(server: Server) -> None:
    before = server.metric("adaskip_tokens_total")
    with server.stream({"prompt": "the to of", "max_tokens": CTX, **ENDLESS}) as answer:
        next(answer.iter_lines())
    assert server.post(COMPLETIONS, {"prompt": "the to"}).status_code == 200
    assert server.metric("adaskip_tokens_total") - before < CTX


def test_sigterm_lets_the_running_answer_finish_and_turns_others_away(served_model: Path) -> None:
    with serving(served_model, "--plan", "none", "--ctx", str(CTX)) as ending, ThreadPoolExecutor(1) as other:
        with ending.stream({"prompt": "the to of", "max_tokens": 900, **ENDLESS}) as answer:
            lines = answer.iter_lines()
            next(lines)
            waiting = other.submit(ending.post, COMPLETIONS, {"prompt": "the"})
            while ending.metric("adaskip_queue_waiting") == 0:
                time.sleep(0.01)
            ending.process.send_signal(END)
            text = list(lines)
        assert any('"finish_reason":"length"' in line for line in text)
        assert ending.process.wait(60) == 0
        assert waiting.result().status_code == 503 and waiting.result().headers["retry-after"]


def test_what_cannot_be_served_is_refused_at_the_start(served_model: Path, served_plan: Path, tmp_path: Path) -> None:
    (tmp_path / "no-keys").write_text(" \n")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    for options, why in (
        (["--max-loss", 0.1, "--plan", served_plan], "--max-loss chooses from the plans that `tune` found"),
        (["--host", "0.0.0.0"], "give --api-key-file, or --insecure"),
        (["--api-key-file", tmp_path / "no-keys"], "has no key; write one"),
        (["--cache-dir", tmp_path / "shared"], "Error: other users may write to"),
        ([tmp_path / "none.gguf"], "there is no model file"),
        ([served_model], "give each its own name with --alias"),
        (["--alias", "a", "--alias", "b"], "give one for each model"),
    ):
        if sys.platform != "win32" or tmp_path / "shared" not in options:  # modes are POSIX's
            assert why in refusal(served_model, *options)


def test_beyond_this_machine_it_listens_for_listed_names(served_model: Path) -> None:
    with serving(served_model, "--host", "0.0.0.0", "--insecure", "--allow-host", "Box.lan") as open_to_all:
        for host, status in (("127.0.0.1", 200), ("box.lan", 200), ("example.com", 403)):
            assert open_to_all.get("/health", headers={"host": host}).status_code == status


@pytest.mark.skipif(not shutil.which("sh"), reason="there is no shell that bounds descriptors")
def test_connections_that_ask_nothing_take_nothing_away(served_model: Path) -> None:
    """More of them than the process may have descriptors."""
    with serving(served_model, "--plan", "none", descriptors=128) as server:
        host, port = server.url.removeprefix("http://").split(":")
        idle = [socket.create_connection((host, int(port))) for _ in range(150)]
        for _ in range(3):
            assert httpx.get(f"{server.url}/health", timeout=5).status_code == 200
            assert server.post(COMPLETIONS, {"prompt": "the to"}).status_code == 200
            idle += [socket.create_connection((host, int(port))) for _ in range(50)]
        for each in idle:
            each.close()
        assert server.stop() == 0
    assert len(server.lines) < 10, server.lines
