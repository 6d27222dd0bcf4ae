"""Why llama.cpp failed, which it tells in its log alone."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import llama_cpp
from llama_cpp._logger import llama_log_callback

_ERROR = 4  # ggml_log_level; llama-cpp-python counts otherwise, and without verbose shows warnings, but no error


@contextmanager
def errors_logged() -> Iterator[list[str]]:
    """Yield a list that the errors logged meanwhile are put into, the cause first."""
    lines: list[str] = []

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def keep(level: int, text: bytes, user_data: Any) -> None:
        if level == _ERROR:
            lines.append(text.decode("utf-8", "replace").strip())
        llama_log_callback(level, text, user_data)

    llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(llama_log_callback, ctypes.c_void_p(0))
