"""The process of a model: it answers one request at a time, in the bytes that the client gets.

:mod:`.workers` starts it, and is whom it speaks with: by the messages below, pickled, on its stdin and stdout.
"""

import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import IO, Any

import msgspec

from ..errors import AdaSkipError, RequestError
from .answer import encoded, explained, progress_event
from .llama import ServedLlama
from .request import Gone, ServedRequest

HEAD_BYTES = 8  # before each message that the process sends: its length, of little endian
_SELDOM = 0.25  # seconds between two messages that tell how far a request is


@dataclass(frozen=True)
class Opening:
    """The first message to the process: what opens the model, and whether what clients write may be in the log."""

    open: Callable[[], ServedLlama]
    logs_text: bool


@dataclass(frozen=True)
class Ask:
    """Answer a request: by steps and parts, and one :class:`Done`."""

    request: ServedRequest


@dataclass(frozen=True)
class Call:
    """Answer one of the small questions, :class:`Done`, while a request may be answered."""

    id: str
    name: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Leave:
    """Nobody waits for a request any more."""

    id: str


@dataclass(frozen=True)
class Close:
    """Write what was read to the cache, and end."""


@dataclass(frozen=True)
class Opened:
    """The model can be asked. What is told of it to clients, and the values of gauges."""

    meta: dict[str, Any]
    tokenizer: dict[str, str | None]
    gauges: dict[str, float]


@dataclass(frozen=True)
class Failed:
    """The model cannot be opened."""

    why: str


@dataclass(frozen=True)
class Part:
    """An event of an answer that is a stream."""

    id: str
    content: bytes


@dataclass(frozen=True)
class Step:
    """A request goes on. What became of it so far, :attr:`.ServedRequest.counts`."""

    id: str
    counts: dict[str, Any]


@dataclass
class Done:
    """The end of an answer: its JSON, or its last event, or a status, message and code; neither if nobody waits."""

    id: str
    content: bytes | None = None
    error: tuple[int, str, str | None] | None = None
    counts: dict[str, Any] = field(default_factory=dict)
    gauges: dict[str, float] = field(default_factory=dict)


class Service:
    """A model that is asked by messages. What it says goes to ``tell``, from several threads."""

    def __init__(self, tell: Callable[[Any], object], *, logs_text: bool) -> None:
        self._tell, self._logs_text = tell, logs_text
        self._llm: Any = None
        self._asked: SimpleQueue[ServedRequest | None] = SimpleQueue()
        self._requests: dict[str, ServedRequest] = {}
        self._beside = ThreadPoolExecutor(1, "calls")
        self._told, self._n_told = 0.0, -1  # when the last step was told, and up to where of the prompt

    def hear(self, message: Any) -> None:
        """Take a message, which takes no time."""
        match message:
            case Ask(request):
                self._requests[request.id] = request
                self._asked.put(request)
            case Leave(id):
                if (left := self._requests.get(id)) is not None:  # else it is done
                    left.is_left = True
            case Call():
                self._beside.submit(self._call, message)
            case Close():
                self._asked.put(None)

    def run(self, open_: Callable[[], ServedLlama]) -> None:
        """Open the model, and answer until it is to close."""
        try:
            llm = self._llm = open_()
        except Exception as error:
            if not isinstance(error, AdaSkipError):
                traceback.print_exc()
            self._tell(Failed(" ".join(str(error).split()) or type(error).__name__))
            return
        bos, eos = (llm.token_text(token) if token >= 0 else None for token in (llm.token_bos(), llm.token_eos()))
        about = {"bos_token": bos, "eos_token": eos, "chat_template": llm.metadata.get("tokenizer.chat_template")}
        meta = {"n_ctx": llm.context_size, "n_params": llm.n_params, "size": llm.weight_bytes, **llm.plans.listing}
        self._tell(Opened(meta, about, llm.gauges))
        while (request := self._asked.get()) is not None:
            self._answer(request)
        llm.close()

    def _answer(self, request: ServedRequest) -> None:
        self._told, self._n_told = 0.0, -1
        request.on_step = lambda: self._step(request)
        request.on_step()
        done = Done(request.id)
        try:
            answer = self._llm.answer(request)
            done.content = encoded(answer, request, lambda content: self._tell(Part(request.id, content)))
        except Gone:
            pass
        except Exception as error:
            done.error = explained(error, logs_text=self._logs_text)
        self._llm.end()
        self._requests.pop(request.id)
        done.counts, done.gauges = request.counts, self._llm.gauges
        self._tell(done)

    def _step(self, request: ServedRequest) -> None:
        """Tell that a request goes on: now and then, and each piece of its prompt where it asks for that."""
        is_news = request.n_cached is not None and request.n_done != self._n_told and not request.first
        if is_news and request.is_stream and request.returns_progress:
            self._n_told = request.n_done
            self._tell(Part(request.id, progress_event(request)))
        if time.monotonic() - self._told > _SELDOM:
            self._told = time.monotonic()
            self._tell(Step(request.id, request.counts))

    def _call(self, call: Call) -> None:
        done = Done(call.id)
        try:
            done.content = msgspec.json.encode(getattr(self, call.name)(*call.arguments))
        except Exception as error:
            done.error = explained(error, logs_text=self._logs_text)
        self._tell(done)

    def tokenize(self, text: str, has_bos: bool) -> dict[str, Any]:
        content = text.encode("utf-8", "replace")
        return {"tokens": self._llm.tokenize(content, add_bos=has_bos, special=True)}

    def count_tokens(self, request: ServedRequest) -> dict[str, Any]:
        return {"input_tokens": self._llm.count_prompt(request)}

    def detokenize(self, tokens: list[int]) -> dict[str, Any]:
        n = self._llm.n_vocab()
        if unknown := [token for token in tokens if not 0 <= token < n]:
            raise RequestError(f"there is no token {unknown[0]}; use ids from 0 to {n - 1}")
        return {"prompt": self._llm.detokenize(tokens, special=True).decode("utf-8", "replace")}


def main() -> None:
    """Be the process, until a message says so, or the pipe ends with who asked."""
    for each in (signal.SIGINT, signal.SIGTERM):  # a service manager signals all processes; messages say when to end
        signal.signal(each, signal.SIG_IGN)
    asked, said = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what else is printed is no message
    saying = threading.Lock()

    def tell(message: Any) -> None:
        content = pickle.dumps(message)
        with saying:
            said.write(len(content).to_bytes(HEAD_BYTES, "little") + content)
            said.flush()

    opening: Opening = pickle.load(asked)
    service = Service(tell, logs_text=opening.logs_text)
    threading.Thread(target=_listen, args=(asked, service), daemon=True).start()
    service.run(opening.open)
    sys.stderr.flush()
    os._exit(0)  # whatever a thread is at


def _listen(asked: IO[bytes], service: Service) -> None:
    """Take messages; with the pipe ends the process, whatever it does."""
    try:
        while True:
            service.hear(pickle.load(asked))
    except EOFError:
        pass
    finally:
        os._exit(1)
