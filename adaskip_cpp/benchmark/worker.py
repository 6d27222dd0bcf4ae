"""One contender of a benchmark: a process that holds a model and times requests. ``process.py`` starts it by its path.

It imports adaskip_cpp only for ours, so that stock llama-cpp-python runs on its own libllama. Requests come pickled on
stdin, replies go to stdout. The process ends when stdin does, with its parent, even during a request.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import queue
import runpy
import signal
import sys
import threading
from pathlib import Path
from typing import IO, Any

_TIMING = runpy.run_path(str(Path(__file__).parents[1] / "measuring" / "timing.py"), run_name="timing")


class _Contender:
    """A model, stock or ours. :class:`adaskip_cpp.benchmark.process.Worker` requests calls of its methods."""

    def __init__(self, side: str) -> None:
        self._ours = side == "ours"
        self._llm: Any = None

    def open(self, model: str, options: dict[str, Any]) -> dict[str, Any]:
        if self._ours:
            from adaskip_cpp.engine.llama import AdaSkipLlama
            from adaskip_cpp.engine.settings import cost_settings
        import llama_cpp
        from llama_cpp import _logger

        library = Path(llama_cpp.llama_cpp._lib._name).resolve()
        stock = "adaskip_cpp" not in sys.modules and Path(llama_cpp.__file__).resolve().parent in library.parents
        if not self._ours and not stock:
            raise RuntimeError(f"{library} is not the libllama of llama-cpp-python; reinstall llama-cpp-python")
        # verbose: why a model cannot be loaded is in llama.cpp's log alone.
        self._llm = (AdaSkipLlama if self._ours else llama_cpp.Llama)(model, verbose=True, **options)
        self._llm.verbose = False
        _logger.set_verbose(False)
        settings = {"settings": cost_settings(self._llm)} if self._ours else {}
        return {"library": str(library), **settings}

    def time(self, prompt: list[int], n_decode: int) -> dict[str, Any]:
        return dataclasses.asdict(_TIMING["time_request"](self._llm, prompt, n_decode))


def _read(parent: IO[bytes], requests: queue.SimpleQueue[bytes]) -> None:
    try:
        while True:
            requests.put(pickle.load(parent))  # bytes: the main thread unpickles them, and can report errors
    except (EOFError, OSError):
        os._exit(0)


def main(side: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    asked, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # Other output must not mix with replies. And libraries that look at stdin while they load would wait, on Windows,
    # for the thread that reads from it.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    contender = _Contender(side)
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(asked, requests), daemon=True).start()
    while True:
        request = requests.get()
        try:
            method, arguments = pickle.loads(request)
            reply = getattr(contender, method)(*arguments)
        except Exception as error:
            reply = {"error": str(error), "class": type(error).__name__}
        pickle.dump(reply, replies)
        replies.flush()


if __name__ == "__main__":
    main(sys.argv[1])
