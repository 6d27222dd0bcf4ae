"""Counters of the server, for Prometheus."""

from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from .request import REREAD, ServedRequest

_KINDS = ("read", "skipping", "reused", "generated")
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters of one server. ``gauges`` are functions by name and help text, called when a client asks."""

    def __init__(self, gauges: dict[tuple[str, str], Callable[[], float]]) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        self.requests = counter("adaskip_requests", "Requests answered, by path and status.", ["path", "status"])
        read = "Tokens: read (of prompts), skipping (of these, in the bulk), reused (of prompts, not read), generated."
        self._tokens = counter("adaskip_tokens", read, ["kind"])
        reread = "Prompts of which more than the last token was read, by the reason."
        self._rereads = counter("adaskip_prompts_reread", reread, ["because"])
        first = "Seconds from a request's arrival to its first token, including the queue."
        self._first = Histogram("adaskip_time_to_first_token_seconds", first, buckets=_SECONDS, registry=self.registry)
        for kind in _KINDS:
            self._tokens.labels(kind)
        for reason in REREAD:
            self._rereads.labels(reason)
        for (name, meaning), value in gauges.items():
            Gauge(f"adaskip_{name}", meaning, registry=self.registry).set_function(value)

    def ran(self, request: ServedRequest) -> None:
        """Count what the model did for a request."""
        for kind in _KINDS:
            self._tokens.labels(kind).inc(getattr(request, f"n_{kind}"))
        if request.reread_because is not None:
            self._rereads.labels(request.reread_because).inc()
        if request.first:
            self._first.observe(request.first - request.received)
