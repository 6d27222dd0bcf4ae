"""The application: what :mod:`middleware` has the model answer, and the paths beside."""

import time
from importlib import metadata, resources
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request

from .answer import error_body
from .llama import ServedLlama
from .metrics import Metrics
from .middleware import App, Gate
from .queue import FairQueue

MOST_WAITING = 64
"""Requests that may wait."""

_BYTES_PER_TOKEN = 16
"""Of a body, for each token of the context: several times what text takes, as JSON and as messages."""

_LOOPBACK_PAGES = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
"""Pages that may ask without a key: those of this machine."""

_POLICY = "; ".join(
    [
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:",
        "form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    ]
)
"""What the page may load and do: nothing but what is in it, and ask this server."""


class _Text(BaseModel):
    prompt: str
    add_special_tokens: bool = False


class _Ids(BaseModel):
    tokens: list[int]


def make_app(llm: ServedLlama, *, api_key: str | None = None) -> tuple[App, FairQueue]:
    """Return the application for a model, and the queue before it.

    Args:
        llm: answers under its own name, and under any other.
        api_key: see :class:`adaskip_cpp.serving.middleware.Gate`.
    """
    queue, created = FairQueue(MOST_WAITING), int(time.time())
    metrics = Metrics(
        {
            ("queue_waiting", "Requests that wait."): lambda: len(queue),
            ("requests_running", "Requests that the model works for, 0 or 1."): lambda: float(queue.is_busy),
            ("kv_bytes", "Bytes of KV cache."): lambda: llm.kv_bytes,
            ("prefix_cache_bytes", "Bytes of saved states in memory."): lambda: llm.cached_bytes,
        }
    )
    # The documentation that FastAPI makes loads scripts from other hosts.
    app = FastAPI(title="adaskip-cpp", version=metadata.version("adaskip-cpp"), docs_url=None, redoc_url=None)

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        text = resources.files(__package__).joinpath("page.html").read_text("utf-8")
        return HTMLResponse(text, headers={"content-security-policy": _POLICY})

    @app.get("/health")
    async def health() -> Response:
        status = 503 if queue.is_closed else 200
        return Response(b'{"status":"ok"}' if status == 200 else error_body(503, "the server stops"), status, _JSON)

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        meta = {"n_ctx": llm.context_size, "n_params": llm.n_params, "size": llm.weight_bytes, **llm.plans.listing}
        about = {"id": llm.name, "object": "model", "created": created, "owned_by": "adaskip-cpp", "meta": meta}
        return {"object": "list", "data": [about]}

    # Under the names of vLLM's server, by which lm-evaluation-harness counts the tokens that it asks about.
    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, str | None]:
        bos, eos = (llm.token_text(token) if token >= 0 else None for token in (llm.token_bos(), llm.token_eos()))
        return {"bos_token": bos, "eos_token": eos, "chat_template": llm.metadata.get("tokenizer.chat_template")}

    @app.post("/tokenize")
    def tokenize(body: _Text) -> dict[str, list[int]]:
        return {
            "tokens": llm.tokenize(
                body.prompt.encode("utf-8", "replace"), add_bos=body.add_special_tokens, special=True
            )
        }

    @app.post("/detokenize")
    def detokenize(body: _Ids) -> dict[str, str]:
        if unknown := [token for token in body.tokens if not 0 <= token < llm.n_vocab()]:
            raise HTTPException(400, f"there is no token {unknown[0]}; use ids from 0 to {llm.n_vocab() - 1}")
        return {"prompt": llm.detokenize(body.tokens, special=True).decode("utf-8", "replace")}

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return Response(error_body(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}"), 400, _JSON)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return Response(error_body(error.status_code, str(error.detail)), error.status_code, _JSON)

    most_body = max(1 << 20, _BYTES_PER_TOKEN * llm.context_size)
    gate = Gate(app, llm, queue, metrics, api_key=api_key, most_body=most_body)
    pages = {"allow_origin_regex": _LOOPBACK_PAGES} if api_key is None else {"allow_origins": ["*"]}
    return CORSMiddleware(gate, allow_methods=["*"], allow_headers=["*"], **pages), queue


_JSON = {"content-type": "application/json"}
