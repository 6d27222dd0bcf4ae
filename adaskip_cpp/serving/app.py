"""The application: the paths that need no model, around those that it works on a gate and CORS."""

import time
from collections.abc import Collection
from importlib import resources
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp

from ..errors import RequestError
from .body import decoded
from .llama import ServedLlama
from .metrics import Metrics
from .middleware import Gate, Routes
from .queue import FairQueue
from .request import STOPPING, Refused

MOST_WAITING = 64  # requests that may wait

_BYTES_PER_TOKEN = 16
"""Of a body, for each token of the context: several times what text takes, as JSON and as messages."""

_LOOPBACK_PAGES = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
"""Pages that may ask without a key: those of this machine."""

_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
"""What the page may load and do: nothing but what is in it, and ask this server."""


class _Text(msgspec.Struct):
    prompt: str
    add_special_tokens: bool = False


class _Ids(msgspec.Struct):
    tokens: list[int]


def make_app(
    llm: ServedLlama, *, keys: Collection[str], names: Collection[str], log_prompts: bool = False
) -> tuple[ASGIApp, FairQueue]:
    """Return the application for a model, which answers under any name, and the queue before it.

    Clients send one of ``keys``. Without keys they may call the server by an address, as localhost or by ``names``.
    """
    queue, created = FairQueue(MOST_WAITING), int(time.time())
    metrics = Metrics(
        {
            ("queue_waiting", "Requests that wait."): lambda: len(queue),
            ("requests_running", "Requests that the model works for, 0 or 1."): lambda: float(queue.is_busy),
            ("kv_bytes", "Bytes of KV cache."): lambda: llm.gauges["kv_bytes"],
            ("prefix_cache_bytes", "Bytes of saved states in memory."): lambda: llm.gauges["prefix_cache_bytes"],
        }
    )

    def page(content: bytes) -> Response:
        text = resources.files(__package__).joinpath("page.html").read_text("utf-8")
        return HTMLResponse(text, headers={"content-security-policy": _POLICY})

    def health(content: bytes) -> dict[str, str]:
        if queue.is_closed:
            raise Refused(*STOPPING)
        return {"status": "ok"}

    def prometheus(content: bytes) -> Response:
        return Response(metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})

    def models(content: bytes) -> dict[str, Any]:
        meta = {"n_ctx": llm.context_size, "n_params": llm.n_params, "size": llm.weight_bytes, **llm.plans.listing}
        about = {"id": llm.name, "object": "model", "created": created, "owned_by": "adaskip-cpp", "meta": meta}
        return {"object": "list", "data": [about]}

    # Under the names of vLLM's server, by which lm-evaluation-harness counts the tokens that it asks about.
    def tokenizer_info(content: bytes) -> dict[str, str | None]:
        bos, eos = (llm.token_text(token) if token >= 0 else None for token in (llm.token_bos(), llm.token_eos()))
        return {"bos_token": bos, "eos_token": eos, "chat_template": llm.metadata.get("tokenizer.chat_template")}

    def tokenize(content: bytes) -> dict[str, list[int]]:
        body = decoded(content, _Text)
        text = body.prompt.encode("utf-8", "replace")
        return {"tokens": llm.tokenize(text, add_bos=body.add_special_tokens, special=True)}

    def detokenize(content: bytes) -> dict[str, str]:
        tokens = decoded(content, _Ids).tokens
        if unknown := [token for token in tokens if not 0 <= token < llm.n_vocab()]:
            raise RequestError(f"there is no token {unknown[0]}; use ids from 0 to {llm.n_vocab() - 1}")
        return {"prompt": llm.detokenize(tokens, special=True).decode("utf-8", "replace")}

    routes: Routes = {
        ("GET", "/"): page,
        ("GET", "/health"): health,
        ("GET", "/metrics"): prometheus,
        ("GET", "/v1/models"): models,
        ("GET", "/tokenizer_info"): tokenizer_info,
        ("POST", "/tokenize"): tokenize,
        ("POST", "/detokenize"): detokenize,
    }
    most_body = max(1 << 20, _BYTES_PER_TOKEN * llm.context_size)
    known = {"localhost", *map(str.lower, names)}
    gate = Gate(llm, routes, queue, metrics, keys=keys, names=known, most_body=most_body, log_prompts=log_prompts)
    pages = {"allow_origins": ["*"]} if keys else {"allow_origin_regex": _LOOPBACK_PAGES}
    return CORSMiddleware(gate, allow_methods=["*"], allow_headers=["*"], **pages), queue
