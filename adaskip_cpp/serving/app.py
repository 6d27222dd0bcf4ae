"""The ASGI application: the paths that need no generation, the gate for all paths, and CORS."""

import hmac
import secrets
import time
from collections.abc import Callable, Collection
from importlib import resources
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp

from .body import decoded, read_body
from .metrics import Metrics
from .middleware import Gate
from .process import Worker
from .queue import FairQueue
from .request import STOPPING, Refused
from .workers import Workers

MOST_WAITING = 64  # requests that may wait

_BYTES_PER_TOKEN = 16  # bytes in a body, per token of the context; text with its JSON needs a fraction of that

_LOOPBACK_PAGES = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"  # this machine's pages may ask without a key
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
"""The page may run what is in it and ask this server, and nothing else."""


class _Text(msgspec.Struct):
    prompt: str
    add_special_tokens: bool = False
    model: str | None = None


class _Ids(msgspec.Struct):
    tokens: list[int]
    model: str | None = None


def make_app(
    workers: Workers, *, keys: Collection[str], names: Collection[str], log_prompts: bool = False
) -> tuple[ASGIApp, FairQueue]:
    """Return the application, and the queue of its requests. For ``keys`` and ``names`` see :class:`.Gate`."""
    queue, created, secret, all_ = FairQueue(MOST_WAITING), int(time.time()), secrets.token_bytes(), workers.all

    def total(name: str) -> Callable[[], float]:
        return lambda: sum(each.gauges.get(name, 0) for each in all_)

    gauges: dict[tuple[str, str], Callable[[], float]] = {
        ("queue_waiting", "Requests that wait in the queue."): lambda: len(queue),
        ("requests_running", "Requests that a model is working on, 0 or 1."): lambda: float(queue.is_busy),
        ("kv_bytes", "Bytes of KV cache."): total("kv_bytes"),
        ("prefix_cache_bytes", "Bytes of saved states in memory."): total("prefix_cache_bytes"),
        ("worker_deaths", "Processes of models that ended unexpectedly."): lambda: sum(each.n_deaths for each in all_),
    }
    metrics = Metrics(gauges)

    def page(content: bytes) -> Response:
        text = resources.files(__package__).joinpath("page.html").read_text("utf-8")
        return HTMLResponse(text, headers={"content-security-policy": _POLICY})

    def health(content: bytes) -> Response:
        if queue.is_closed:
            raise Refused(*STOPPING)
        states = {each.state for each in all_}
        state = next((each for each in ("restarting", "loading") if each in states), "ok")
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    def prometheus(content: bytes) -> Response:
        return Response(generate_latest(metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    def models(content: bytes) -> dict[str, Any]:
        return {"object": "list", "data": list(map(model, all_))}

    def model(worker: Worker) -> dict[str, Any]:
        about = {"id": worker.name, "object": "model", "created": created, "owned_by": "adaskip-cpp"}
        meta = {"n_ctx": workers.n_ctx} if worker.about is None else worker.about.meta
        return {**about, "meta": meta, "status": {"value": worker.state}}

    def slots(content: bytes) -> list[dict[str, Any]]:
        return [slot(id, each) for id, each in enumerate(all_) if each.state != "unloaded"]

    def slot(id: int, worker: Worker) -> dict[str, Any]:
        request, about = worker.request, {"id": id, "model": worker.name, "n_ctx": workers.n_ctx, "speculative": False}
        if request is None:
            return {**about, "is_processing": False}
        owner = hmac.digest(secret, request.owner.encode(), "sha256").hex()[:8] if request.owner else ""
        return {**about, "is_processing": True, "owner": owner, **request.slot}

    async def loaded(name: str | None) -> Worker:
        worker = workers.choose(name)
        if worker.state != "ready":
            async with queue.turn(""):
                await workers.load(worker)
        return worker

    async def tokenizer_info(content: bytes) -> dict[str, str | None]:
        about = all_[0].about or (await loaded(None)).about
        assert about is not None
        return about.tokenizer

    async def tokenize(content: bytes) -> bytes:
        body = decoded(content, _Text)
        return await (await loaded(body.model)).call("tokenize", body.prompt, body.add_special_tokens)

    async def detokenize(content: bytes) -> bytes:
        body = decoded(content, _Ids)
        return await (await loaded(body.model)).call("detokenize", body.tokens)

    async def count_tokens(content: bytes) -> bytes:
        whole = msgspec.json.encode({"max_tokens": 1, **decoded(content, dict[str, Any])})
        request = await run_in_threadpool(read_body, "/v1/messages", whole)
        return await (await loaded(getattr(request.body, "model", None))).call("count_tokens", request)

    routes: dict[tuple[str, str], Callable[[bytes], Any]] = {
        ("GET", "/"): page,
        ("GET", "/health"): health,
        ("GET", "/metrics"): prometheus,
        ("GET", "/v1/models"): models,
        ("GET", "/slots"): slots,
        # Names of vLLM's server; lm-evaluation-harness counts tokens by these paths.
        ("GET", "/tokenizer_info"): tokenizer_info,
        ("POST", "/tokenize"): tokenize,
        ("POST", "/detokenize"): detokenize,
        ("POST", "/v1/messages/count_tokens"): count_tokens,
    }
    most_body = max(1 << 20, _BYTES_PER_TOKEN * workers.n_ctx)
    known = {"localhost", *map(str.lower, names)}
    gate = Gate(workers, routes, queue, metrics, keys=keys, names=known, most_body=most_body, log_prompts=log_prompts)
    pages = {"allow_origins": ["*"]} if keys else {"allow_origin_regex": _LOOPBACK_PAGES}
    return CORSMiddleware(gate, allow_methods=["*"], allow_headers=["*"], **pages), queue
