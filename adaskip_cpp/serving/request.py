"""One request on its way through the server: what it asks, and what became of it."""

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
"""Why a prompt was read, or read from some token on, though it may have been read before."""

REREAD: tuple[Reread, ...] = get_args(Reread)

_COUNTS = ("n_prompt", "n_generated", "n_cached", "n_done", "n_moved", "known", "n_evaluated", "begun", "first", "last")

WORTH_KEEPING = 32
"""Tokens: for fewer, no state is saved or loaded; they are read again.

Behind 4,000 tokens of SmolLM2, 2 threads of an AMD EPYC, reading as many takes 440 ms, and copying the state, 92 MB,
53 ms."""


class Gone(Exception):
    """The client has left, or the server stops: nobody reads the answer on."""


STOPPING = 503, "the server stops; ask again when it runs", "stopping"


class Refused(Exception):
    """A request that is answered with an error: its status, message and code."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(status, message, code)


@dataclass
class ServedRequest:
    """What one request asks, and how far it has come. Times are of ``time.perf_counter``, in seconds.

    Attributes:
        body: what it asks, in a schema of llama-cpp-python's server; None for who calls the model itself.
        path: where it was asked.
        wish: which plan, the request's own ``adaskip.plan``.
        prompt_tokens: the prompt where it was given as token ids, which that schema does not know; else None.
        reuses: whether what was read before may be used, and what is read now be kept.
        reuse: what of a prompt in memory it uses, first as it asks, ``adaskip.reuse``, or None for
            the server's way; then as it is.
        owner: the key that it was sent with, hashed, where the server has several; else "".
        salt: the request's own ``cache_salt``. Only requests of equal owner and salt use what one of them read.
        includes_usage: whether a stream ends with the usage, ``stream_options.include_usage``.
        returns_progress: whether a stream tells how far the prompt is, ``return_progress``.
        on_step: called by :meth:`check`.
        model: the name of the model in answers.
        id, created: of the events of a stream; ``created`` is of ``time.time``.
        choice: what it runs under.
        finish: how the model's last text ended, "stop" or "length", where chat says "tool_calls" of both.
        n_prompt, n_generated: tokens of the prompt and of the answer.
        n_cached, n_done: tokens of the prompt in memory: before any was read, and now.
        n_moved: tokens of the prompt that were moved to their place in it.
        known: tokens at the beginning of the prompt that were read before and could not be used, by why not.
        n_evaluated: tokens evaluated by phase. Those of a prompt that are in none were in the cache.
        received, begun, first, last: when it came, when the model began, when the first token was there, and the last.
        is_left: whether nobody waits for it any more: it stops at the next batch of its prompt, or token of its answer.
    """

    body: BaseModel | None = None
    path: str = ""
    wish: Any = "auto"
    prompt_tokens: list[int] | None = None
    reuses: bool = True
    reuse: Reuse | None = None
    owner: str = ""
    salt: str = ""
    includes_usage: bool = False
    returns_progress: bool = False
    on_step: Callable[[], object] | None = None
    model: str = ""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    choice: Choice = field(default_factory=Choice)
    finish: str = ""
    n_layer: int = 0
    n_prompt: int = 0
    n_generated: int = 0
    n_cached: int | None = None
    n_done: int = 0
    n_moved: int = 0
    known: dict[Reread, int] = field(default_factory=dict)
    n_evaluated: Counter[Phase] = field(default_factory=Counter)
    received: float = field(default_factory=time.perf_counter)
    begun: float = 0.0
    first: float = 0.0
    last: float = 0.0
    is_left: bool = False

    def check(self) -> None:
        """Tell that the work goes on, which the model does as often as it can; :class:`Gone` where nobody waits."""
        if self.on_step is not None:
            self.on_step()
        if self.is_left:
            raise Gone

    def reads(self, n_done: int) -> None:
        """Count the tokens of the prompt that are in memory."""
        self.n_cached, self.n_done = (n_done if self.n_cached is None else self.n_cached), n_done
        self.check()

    def token(self, *, is_end: bool) -> None:
        """Count a token of the answer; the one that ends it takes time, and counts as none."""
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.n_generated += not is_end

    @property
    def is_stream(self) -> bool:
        """Whether the answer comes in events."""
        return bool(getattr(self.body, "stream", False))

    @property
    def counts(self) -> dict[str, Any]:
        """What became of it: attributes to be set where it was asked, too, which is another process."""
        return {name: getattr(self, name) for name in _COUNTS}

    @property
    def n_read(self) -> int:
        """Tokens of the prompt that were evaluated, ``n_skipping`` of them in its bulk, under a set that skips."""
        return self.n_evaluated["prefill"] + self.n_evaluated["bulk"]

    @property
    def n_reused(self) -> int:
        return max(self.n_prompt - self.n_read, 0)

    @property
    def reread_because(self) -> Reread | None:
        """Why more of the prompt was read than its last token; None where that was all, or it is not read yet.

        Nothing is told of what others wrote: who may not use it does not learn that it is there.
        """
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
    def timings(self) -> dict[str, float]:
        """How long it took, under the names of llama.cpp's server (``slot_timings`` in ``server-context.cpp``)."""
        first = self.first or self.begun
        prompt, predicted = (1e3 * max(each, 1e-9) for each in (first - self.begun, (self.last or first) - first))
        n_read, n_decoded = self.n_read, max(self.n_generated - 1, 0)
        return {
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

    @property
    def progress(self) -> dict[str, float]:
        """How far the prompt is, as llama.cpp's server tells it (``result_prompt_progress``)."""
        time_ms = 1e3 * (time.perf_counter() - self.begun)
        return {"total": self.n_prompt, "cache": self.n_cached or 0, "processed": self.n_done, "time_ms": time_ms}

    @property
    def slot(self) -> dict[str, Any]:
        """How far it is, as llama.cpp's server tells it at ``/slots`` (``server_slot::to_json``), without any text."""
        n_cached, most = self.n_cached or 0, getattr(self.body, "max_tokens", None)
        n_left = -1 if most is None else max(most - self.n_generated, 0)
        return {
            "n_prompt_tokens": self.n_prompt,
            "n_prompt_tokens_processed": self.n_done - n_cached,
            "n_prompt_tokens_cache": n_cached,
            "next_token": [{"has_next_token": n_left != 0, "n_remain": n_left, "n_decoded": self.n_generated}],
        }

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens under OpenAI's names."""
        return {
            "prompt_tokens": self.n_prompt,
            "completion_tokens": self.n_generated,
            "total_tokens": self.n_prompt + self.n_generated,
            "prompt_tokens_details": {"cached_tokens": self.n_reused},
        }

    @property
    def summary(self) -> dict[str, Any]:
        """What was skipped, and what of the prompt was read: ``adaskip`` in the answer."""
        choice = self.choice
        plan, point = choice.plan or SkipPlan.manual(self.n_layer), choice.point
        sets = {phase: plan.skipped(phase) for phase in PHASES}
        return {
            "plan": choice.name,
            "max_loss": choice.max_loss,
            "loss_measured": None if point is None else point.harm(point.judged_at),
            "speedup_predicted": choice.speedup,
            "n_layer": self.n_layer,
            "skipped": {
                phase: {"attention": list(each.attention), "ffn": list(each.ffn)} for phase, each in sets.items()
            },
            "windowed": list(plan.narrowed),
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

    @property
    def figures(self) -> dict[str, Any]:
        """What an answer has beside those of other servers."""
        return {"timings": self.timings, "adaskip": self.summary}
