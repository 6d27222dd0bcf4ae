"""Keeps a model to one thread at a time, because llama.cpp's context and our record of it are made for one."""

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from ..errors import StateError

_Method = TypeVar("_Method", bound=Callable[..., Any])


class OneThread:
    """A context for one thread at a time. Another thread does not wait, but gets a StateError."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            use = "use one lock for all threads, a model for each thread, or `adaskip-cpp serve`"
            raise StateError(f"another thread uses this model now; {use}.")

    def __exit__(self, *exception: object) -> None:
        self._lock.release()


def alone(method: _Method) -> _Method:
    """Return a method that raises a StateError while another thread uses the model. It then changes nothing."""

    @wraps(method)
    def checked(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        with self._one_thread:
            return method(self, *args, **kwargs)

    return cast(_Method, checked)
