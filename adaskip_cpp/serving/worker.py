"""The process of a model: answers one request at a time, as the bytes for the client. Start at :func:`main`.

:mod:`.process` starts it. Both exchange the messages below, pickled, on stdin and stdout. The process gets an
:class:`Opening` first. Then it gets requests to answer, :class:`Call` and :class:`Leave`, and None to end.
"""

import logging
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import msgspec

from ..errors import AdaSkipError, NativeError, RequestError
from .answer import encoded, explained, progress_event
from .llama import ServedLlama
from .request import Gone, ServedRequest

HEAD_BYTES = 8  # before each message of the process: its length, little endian
_SELDOM = 0.25  # seconds between two messages about the progress of a request


class Opening(msgspec.Struct, frozen=True):
    """The first message to the process. ``open`` opens the model; ``logs_text`` allows clients' text in the log."""

    open: Callable[[], ServedLlama]
    logs_text: bool


class Call(msgspec.Struct, frozen=True):
    """Call a method of :class:`Service`, also while a request runs. Its result comes as :class:`Done`."""

    id: str
    name: str
    arguments: tuple[Any, ...]


class Leave(msgspec.Struct, frozen=True):
    """The client of a request has left."""

    id: str


class Opened(msgspec.Struct, frozen=True):
    """The model is ready. Has facts for clients, and the values of gauges."""

    meta: dict[str, Any]
    tokenizer: dict[str, str | None]
    gauges: dict[str, float]


class Step(msgspec.Struct):
    """A request goes on: ``content`` is the next event of its stream, or ``counts`` :attr:`.ServedRequest.counts`."""

    id: str
    content: bytes | None = None
    counts: dict[str, Any] = {}


class Done(Step):
    """The end of an answer: ``content`` is its JSON or last event; or an error; or neither, if the client left."""

    error: tuple[int, str, str | None] | None = None  # status, message, code
    gauges: dict[str, float] = {}


class Service:
    """A model that gets messages by :meth:`hear`, and sends messages by ``tell``, from several threads."""

    def __init__(self, tell: Callable[[Any], object], *, logs_text: bool) -> None:
        self._tell, self._logs_text = tell, logs_text
        self._llm: Any = None
        self._asked: SimpleQueue[ServedRequest | None] = SimpleQueue()
        self._requests: dict[str, ServedRequest] = {}
        self._beside = ThreadPoolExecutor(1, "calls")

    def hear(self, message: Any) -> None:
        """Take a message, without waiting for its work."""
        match message:
            case ServedRequest():
                self._requests[message.id] = message
                self._asked.put(message)
            case Leave():
                if (left := self._requests.get(message.id)) is not None:  # None: it is done
                    left.is_left = True
            case Call():
                self._beside.submit(self._call, message)
            case None:
                self._asked.put(None)

    def run(self, open_: Callable[[], ServedLlama]) -> None:
        """Open the model, and answer requests until the end. Then write saved states to the cache."""
        try:
            llm = self._llm = open_()
        except Exception as error:
            if not isinstance(error, AdaSkipError):
                logging.getLogger(__name__).error("%s", traceback.format_exc().rstrip())
            self._tell(NativeError(" ".join(str(error).split()) or type(error).__name__))
            return
        bos, eos = (llm.token_text(token) if token >= 0 else None for token in (llm.token_bos(), llm.token_eos()))
        about = {"bos_token": bos, "eos_token": eos, "chat_template": llm.metadata.get("tokenizer.chat_template")}
        meta = {"n_ctx": llm.context_size, "n_params": llm.n_params, "size": llm.weight_bytes, **llm.plans.listing}
        self._tell(Opened(meta, about, llm.gauges))
        while (request := self._asked.get()) is not None:
            self._answer(request)
        llm.close()

    def _answer(self, request: ServedRequest) -> None:
        self._told, self._n_told = 0.0, -1  # the time of the last step, and the tokens of the last progress event
        request.on_step = lambda: self._step(request)
        request.on_step()
        done = Done(request.id)
        try:
            answer = self._llm.answer(request)
            done.content = encoded(answer, request, lambda event: self._tell(Step(request.id, event)))
        except Gone:
            pass
        except Exception as error:
            done.error = explained(error, logs_text=self._logs_text)
        self._llm.end()
        self._requests.pop(request.id)
        done.counts, done.gauges = request.counts, self._llm.gauges
        self._tell(done)

    def _step(self, request: ServedRequest) -> None:
        """Report that a request goes on: every :data:`_SELDOM` seconds, and each batch of its prompt if it asks."""
        is_news = request.n_cached is not None and request.n_done != self._n_told and not request.first
        if is_news and request.is_stream and request.returns_progress:
            self._n_told = request.n_done
            self._tell(Step(request.id, progress_event(request)))
        if time.monotonic() - self._told > _SELDOM:
            self._told = time.monotonic()
            self._tell(Step(request.id, counts=request.counts))

    def _call(self, call: Call) -> None:
        done = Done(call.id)
        try:
            done.content = msgspec.json.encode(getattr(self, call.name)(*call.arguments))
        except Exception as error:
            done.error = explained(error, logs_text=self._logs_text)
        self._tell(done)

    def tokenize(self, text: str, has_bos: bool) -> dict[str, Any]:
        return {"tokens": self._llm.tokenize(text.encode("utf-8", "replace"), add_bos=has_bos, special=True)}

    def count_tokens(self, request: ServedRequest) -> dict[str, Any]:
        return {"input_tokens": self._llm.count_prompt(request)}

    def detokenize(self, tokens: list[int]) -> dict[str, Any]:
        n = self._llm.n_vocab()
        if unknown := [token for token in tokens if not 0 <= token < n]:
            raise RequestError(f"there is no token {unknown[0]}; use ids from 0 to {n - 1}")
        return {"prompt": self._llm.detokenize(tokens, special=True).decode("utf-8", "replace")}


def main() -> None:
    """Run the process until it is told to end, or the server's first process ends and with it the pipe."""
    for each in (signal.SIGINT, signal.SIGTERM):  # service managers signal all processes; this one waits to be told
        signal.signal(each, signal.SIG_IGN)
    asked, said = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # other output goes to stderr, as stdout carries messages
    saying = threading.Lock()

    def tell(message: Any) -> None:
        content = pickle.dumps(message)
        with saying:
            said.write(len(content).to_bytes(HEAD_BYTES, "little") + content)
            said.flush()

    def listen() -> None:
        """Take messages. When the pipe ends, end the process at once."""
        try:
            while True:
                service.hear(pickle.load(asked))
        finally:
            os._exit(1)

    opening: Opening = pickle.load(asked)
    service = Service(tell, logs_text=opening.logs_text)
    threading.Thread(target=listen, daemon=True).start()
    service.run(opening.open)
    sys.stderr.flush()
    os._exit(0)  # does not wait for threads
