"""Starts a contender's process (``worker.py``) and talks to it, for ``measure.py`` and ``tune``. Start at Worker."""

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from .. import errors
from ..errors import AdaSkipError, NativeError
from ..measuring.timing import RequestTime

# Sets sys.path before any import, so that the worker imports this process's packages and none of the working directory.
_START = (
    f"import sys; sys.path[:] = sys.argv.pop(1).split({os.pathsep!r}); "
    "import runpy; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
)


class Worker:
    """A contender's process, idle between requests. Leaving its ``with`` block kills it."""

    def __init__(self, name: str, side: Literal["stock", "ours"]) -> None:
        self.name = name
        # A file, because a pipe that nobody reads would fill up.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed by __exit__
        path = os.pathsep.join(map(os.path.abspath, sys.path))
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, path, str(Path(__file__).with_name("worker.py")), side],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={key: value for key, value in os.environ.items() if key != "LLAMA_CPP_LIB_PATH"},
            # Keep the terminal's Ctrl-C from the process, on POSIX and on Windows.
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()  # closes the pipes, whatever is in them
        self._log.close()

    def open(self, model: str, options: dict[str, Any]) -> dict[str, Any]:
        """Load a model; return ``library``, the path of its libllama, and for ours ``settings``, a CostSettings."""
        return self._ask("open", model, options)

    def time(self, prompt: Sequence[int], n_decode: int) -> RequestTime:
        """Time a request with :func:`adaskip_cpp.measuring.timing.time_request`."""
        return RequestTime(**self._ask("time", list(prompt), n_decode))

    def _ask(self, method: str, *arguments: Any) -> dict[str, Any]:
        requests, replies = self._process.stdin, self._process.stdout
        assert requests is not None and replies is not None
        try:
            pickle.dump(pickle.dumps((method, arguments)), requests)  # twice: its main thread unpickles the inner one
            requests.flush()
            reply: dict[str, Any] = pickle.load(replies)
        except (EOFError, OSError, pickle.UnpicklingError):
            ended = f"the process of {self.name!r} ended with code {self._process.wait()} ({self._last_words()})"
            raise NativeError(f"{ended}; if memory is short, use smaller contexts (contexts, --contexts)") from None
        if "error" in reply:
            kind = getattr(errors, reply["class"], None)
            if isinstance(kind, type) and issubclass(kind, AdaSkipError):
                raise kind(reply["error"])
            why = f"{reply['class']}: {reply['error']}; {self._last_words()}"
            raise NativeError(f"{self.name!r} failed ({why}); check the model with `adaskip-cpp inspect`")
        return reply

    def _last_words(self) -> str:
        self._log.seek(0)  # the worker shares this position: reading everything moves it to the end again
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        return f"its last line of output: {lines[-1].strip()}" if lines else "without output"
