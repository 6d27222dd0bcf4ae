"""One request in the server: its wishes, its progress, and the figures for its answer."""

import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from pydantic import BaseModel

from ..model.edits import Reuse
from ..model.plan import PHASES, Phase, SkipPlan
from .plans import Choice

Reread: TypeAlias = Literal["new", "text", "plan", "evicted", "memory", "logprobs", "cache_prompt"]
REREAD: tuple[Reread, ...] = get_args(Reread)  # why tokens of a prompt were read; docs/server.md has the meanings

STOPPING = 503, "the server is stopping; ask again when it is back", "stopping"
_COUNTS = ("n_prompt", "n_generated", "n_cached", "n_done", "n_moved", "known", "n_evaluated", "begun", "first", "last")

WORTH_KEEPING = 32
"""Tokens; for fewer, no state is saved or loaded. After 4,000 tokens of SmolLM2, on 2 threads of an AMD EPYC, reading
32 takes 440 ms. Copying the state of 92 MB takes 53 ms."""


class Gone(Exception):
    """The client has left, or the server is stopping."""


class Refused(Exception):
    """A request gets an error as its answer: a status, a message and a code."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(status, message, code)


@dataclass
class ServedRequest:
    """One request and its progress. Times are of ``time.perf_counter``, in seconds."""

    body: BaseModel | None = None  # in a schema of llama-cpp-python's server; None if there was no HTTP request
    path: str = ""  # of the URL
    wish: Any = "auto"  # the plan that it asks for, `adaskip.plan`
    prompt_tokens: list[int] | None = None  # the prompt if it was given as token ids, which the schema does not allow
    reuses: bool = True  # whether it may use known tokens, and its tokens may be saved: `cache_prompt`
    reuse: Reuse | None = None  # `adaskip.reuse`, or None for the server's; once it runs, the way that is used
    owner: str = ""  # a hash of the client's key if the server has several keys
    salt: str = ""  # `cache_salt`: requests use tokens only of requests with equal owner and salt
    includes_usage: bool = False  # whether a stream ends with the usage, `stream_options.include_usage`
    returns_progress: bool = False  # whether a stream reports the progress of the prompt, `return_progress`
    on_step: Callable[[], object] | None = None  # called by `check`
    model: str = ""  # its name in answers
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    choice: Choice = field(default_factory=Choice)  # the plan that it runs under
    finish: str = ""  # how the text ended, "stop" or "length"; llama-cpp-python's chat replaces both by "tool_calls"
    n_layer: int = 0
    n_prompt: int = 0  # tokens of the prompt
    n_generated: int = 0  # tokens of the answer
    n_cached: int | None = None  # tokens of the prompt in memory at the beginning
    n_done: int = 0  # tokens of the prompt in memory now
    n_moved: int = 0  # tokens of the prompt whose KV cells were moved
    known: dict[Reread, int] = field(default_factory=dict)  # first tokens that were known but not used, by the reason
    n_evaluated: Counter[Phase] = field(default_factory=Counter)  # the other tokens of the prompt were in the cache
    received: float = field(default_factory=time.perf_counter)
    begun: float = 0.0  # when the model began
    first: float = 0.0  # when the first token came
    last: float = 0.0  # when the last token came
    is_left: bool = False  # whether the client has left: it stops at the next batch of its prompt, or token

    def check(self) -> None:
        """Report that the work goes on; called between batches and tokens. Raises :class:`Gone` if the client left."""
        if self.on_step is not None:
            self.on_step()
        if self.is_left:
            raise Gone

    def reads(self, n_done: int) -> None:
        self.n_cached, self.n_done = (n_done if self.n_cached is None else self.n_cached), n_done
        self.check()

    def token(self, *, is_end: bool) -> None:
        """Count a token of the answer. The token that ends it is timed but not counted."""
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.n_generated += not is_end

    @property
    def is_stream(self) -> bool:
        return bool(getattr(self.body, "stream", False))

    @property
    def counts(self) -> dict[str, Any]:
        """Attributes that the server's first process copies from the model's process."""
        return {name: getattr(self, name) for name in _COUNTS}

    @property
    def n_read(self) -> int:
        """Tokens of the prompt that were evaluated; ``n_skipping`` of them are in its bulk."""
        return self.n_evaluated["prefill"] + self.n_evaluated["bulk"]

    @property
    def n_reused(self) -> int:
        """Tokens of the prompt that were not evaluated; 0 until it was read."""
        return max(self.n_prompt - self.n_read, 0) if self.first else 0

    @property
    def reread_because(self) -> Reread | None:
        """Why more than the prompt's last token was read, or None. It reveals nothing of other clients' prompts."""
        if not self.first or self.n_reused >= self.n_prompt - 1:
            return None
        reason, most = max(self.known.items(), key=lambda each: each[1], default=("new", 0))
        if most >= self.n_reused + WORTH_KEEPING:
            return reason
        return "text" if self.n_reused > 1 else "new"  # prompts may all begin with the same token

    @property
    def n_skipping(self) -> int:
        return self.n_evaluated["bulk"]

    @property
    def figures(self) -> dict[str, Any]:
        """``adaskip``, and ``timings`` named as in llama.cpp's server (``slot_timings`` in ``server-context.cpp``)."""
        first = self.first or self.begun
        prompt, predicted = (1e3 * max(each, 1e-9) for each in (first - self.begun, (self.last or first) - first))
        n_read, n_decoded = self.n_read, max(self.n_generated - 1, 0)
        timings = {
            "cache_n": self.n_reused,
            "prompt_n": n_read,
            "prompt_ms": prompt,
            "prompt_per_token_ms": prompt / max(n_read, 1),
            "prompt_per_second": 1e3 * n_read / prompt,
            "predicted_n": self.n_generated,
            "predicted_ms": predicted,
            "predicted_per_token_ms": predicted / max(n_decoded, 1),
            "predicted_per_second": 1e3 * n_decoded / predicted,
        }
        return {"timings": timings, "adaskip": self.summary}

    @property
    def slot(self) -> dict[str, Any]:
        """Progress as in ``/slots`` of llama.cpp's server (``server_slot::to_json``), without any text."""
        n_cached, most = self.n_cached or 0, getattr(self.body, "max_tokens", None)
        n_left = -1 if most is None else max(most - self.n_generated, 0)
        prompt = {"n_prompt_tokens": self.n_prompt, "n_prompt_tokens_processed": self.n_done - n_cached}
        next_token = {"has_next_token": n_left != 0, "n_remain": n_left, "n_decoded": self.n_generated}
        return {**prompt, "n_prompt_tokens_cache": n_cached, "next_token": [next_token]}

    @property
    def usage(self) -> dict[str, Any]:
        """Numbers of tokens under OpenAI's names."""
        total = self.n_prompt + self.n_generated
        usage = {"prompt_tokens": self.n_prompt, "completion_tokens": self.n_generated, "total_tokens": total}
        return {**usage, "prompt_tokens_details": {"cached_tokens": self.n_reused}}

    @property
    def summary(self) -> dict[str, Any]:
        """``adaskip`` in the answer: the plan, what it skipped, and the tokens of the prompt that were read."""
        choice = self.choice
        plan, point = choice.plan or SkipPlan.manual(self.n_layer), choice.point
        sets = {phase: plan.skipped(phase) for phase in PHASES}
        return {
            "plan": choice.name,
            "max_loss": choice.max_loss,
            "loss_measured": None if point is None else point.harm(point.judged_at),
            "speedup_predicted": choice.speedup,
            "n_layer": self.n_layer,
            "skipped": {phase: {"attention": each.attention, "ffn": each.ffn} for phase, each in sets.items()},
            "windowed": plan.narrowed,
            "window_size": plan.bulk.window_size if plan.bulk and plan.narrowed else None,
            "prompt_tokens_read": self.n_read,
            "prompt_tokens_reused": self.n_reused,
            "prompt_tokens_moved": self.n_moved,
            "reuse": self.reuse,
            "reread_because": self.reread_because,
            "prompt_tokens_skipping": self.n_skipping,
            "queued_ms": 1e3 * max((self.begun or time.perf_counter()) - self.received, 0.0),
            "time_to_first_token_ms": 1e3 * max(self.first - self.received, 0.0) if self.first else None,
        }
