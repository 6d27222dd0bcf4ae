"""Counters of the server, for Prometheus."""

from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .request import REREAD, ServedRequest

_KINDS = ("read", "skipping", "reused", "generated")
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters of one server. ``gauges`` are functions by name and help text, called when a client asks."""

    def __init__(self, gauges: dict[tuple[str, str], Callable[[], float]]) -> None:
        self._registry = CollectorRegistry()
        counter = partial(Counter, registry=self._registry)
        self._requests = counter("adaskip_requests", "Requests answered, by path and status.", ["path", "status"])
        read = "Tokens: read (of prompts), skipping (of these, in the bulk), reused (of prompts, not read), generated."
        self._tokens = counter("adaskip_tokens", read, ["kind"])
        reread = "Prompts of which more than the last token was read, by the reason."
        self._rereads = counter("adaskip_prompts_reread", reread, ["because"])
        self._first_token = Histogram(
            "adaskip_time_to_first_token_seconds",
            "Seconds from a request's arrival to its first token, including the queue.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        for kind in _KINDS:
            self._tokens.labels(kind)
        for reason in REREAD:
            self._rereads.labels(reason)
        for (name, meaning), value in gauges.items():
            Gauge(f"adaskip_{name}", meaning, registry=self._registry).set_function(value)

    def answered(self, path: str, status: int) -> None:
        self._requests.labels(path, str(status)).inc()

    def ran(self, request: ServedRequest) -> None:
        """Count what the model did for a request."""
        for kind in _KINDS:
            self._tokens.labels(kind).inc(getattr(request, f"n_{kind}"))
        if request.reread_because is not None:
            self._rereads.labels(request.reread_because).inc()
        if request.first:
            self._first_token.observe(request.first - request.received)

    def text(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        return generate_latest(self._registry)
