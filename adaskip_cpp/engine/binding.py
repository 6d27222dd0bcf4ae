"""Opens our libllama with cffi, for ``native.py`` and ``grammar.py``; native/adaskip.h documents its functions."""

import re
import sys
from typing import Any

from cffi import FFI

from ..errors import LibraryError
from . import library as _library


def check_build(lib: Any) -> None:
    """Refuse a libllama of another adaskip.h, and a ggml whose structures differ from those that libllama expects."""
    if lib.adaskip_abi_version() != lib.ADASKIP_ABI_VERSION:
        raise LibraryError(
            f"{_library.path()} and {_library.header()} are of different builds; run '{_library.REINSTALL}'."
        )
    if lib.ggml_tensor_overhead() != lib.adaskip_ggml_tensor_overhead():
        raise LibraryError(
            f"the ggml in this process has tensors of {lib.ggml_tensor_overhead()} bytes, {_library.path()} was built "
            f"for {lib.adaskip_ggml_tensor_overhead()}; run 'pip install --force-reinstall --no-deps "
            f"llama-cpp-python=={_library.release()} adaskip-cpp', and see that LD_LIBRARY_PATH names no other ggml."
        )


def last_error() -> str:
    """Return why this thread's last native call failed, in one line of at most 200 characters."""
    return " ".join(ffi.string(lib.adaskip_last_error()).decode("utf-8", "replace").split())[:200]


class Libraries:
    """The functions of several libraries; each comes from the first library that has it."""

    def __init__(self, *libraries: Any) -> None:
        self._libraries = libraries

    def __getattr__(self, name: str) -> Any:
        owner = next((each for each in self._libraries if hasattr(each, name)), self._libraries[0])
        return getattr(owner, name)


ffi = FFI()
_header = _library.header().read_text(encoding="utf-8")
_header = re.sub(r"(?ms)^#ifdef __cplusplus$.*?^#endif$", "", _header)  # the lines for C++
ffi.cdef(re.sub(r"(?m)^#(?!define ADASKIP_ABI_VERSION).*$", "", _header))  # and for the preprocessor
ffi.cdef("""
    size_t ggml_tensor_overhead(void);
    size_t ggml_backend_dev_count(void);
    void * ggml_backend_dev_get(size_t index);
    void * ggml_backend_dev_by_type(int type);
    const char * ggml_backend_dev_description(void * device);
""")
# llama_cpp has opened this file already, so the loader returns the same library.
lib: Any = ffi.dlopen(str(_library.path()))
if sys.platform == "win32":  # on other systems a library also shows the functions of its dependencies
    lib = Libraries(lib, ffi.dlopen("ggml.dll"), ffi.dlopen("ggml-base.dll"))
check_build(lib)
