"""One contender of a benchmark: a process that holds a model and times requests. ``process.py`` starts it by its path.

It imports adaskip_cpp only for ours, so that stock llama-cpp-python runs on its own libllama. Requests come pickled on
stdin, replies go to stdout. The process ends when stdin does, with its parent, even during a request.
"""

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


def _open(ours: bool, model: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Load a model, ours or stock. Return it, and the reply to :class:`adaskip_cpp.benchmark.process.Worker`."""
    if ours:
        from adaskip_cpp.engine.llama import AdaSkipLlama
        from adaskip_cpp.engine.settings import cost_settings
    import llama_cpp
    from llama_cpp import _logger

    library = Path(llama_cpp.llama_cpp._lib._name).resolve()
    stock = "adaskip_cpp" not in sys.modules and Path(llama_cpp.__file__).resolve().parent in library.parents
    if not ours and not stock:
        raise RuntimeError(f"{library} is not the libllama of llama-cpp-python; reinstall llama-cpp-python")
    # verbose: why a model cannot be loaded is in llama.cpp's log alone.
    llm: Any = (AdaSkipLlama if ours else llama_cpp.Llama)(model, verbose=True, **options)
    llm.verbose = False
    _logger.set_verbose(False)
    return llm, {"library": str(library), "settings": cost_settings(llm) if ours else None}


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
    llm: Any = None
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(asked, requests), daemon=True).start()
    while True:
        request = requests.get()
        try:
            method, arguments = pickle.loads(request)
            if method == "open":
                llm, reply = _open(side == "ours", *arguments)
            else:
                reply = dataclasses.asdict(_TIMING["time_request"](llm, *arguments))
        except Exception as error:
            reply = {"error": str(error), "class": type(error).__name__}
        pickle.dump(reply, replies)
        replies.flush()


if __name__ == "__main__":
    main(sys.argv[1])
