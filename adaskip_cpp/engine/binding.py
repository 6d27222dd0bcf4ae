"""Opens our libllama with cffi, for ``native.py`` and ``grammar.py``; native/adaskip.h documents its functions."""

import re
import sys
from typing import Any

from cffi import FFI

from ..errors import LibraryError
from . import library as _library


def _declarations(header: str) -> str:
    """Return the C declarations of adaskip.h, without the lines for C++ and the preprocessor."""
    header = re.sub(r"^#ifdef __cplusplus$.*?^#endif$", "", header, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^#(?!define ADASKIP_ABI_VERSION).*$", "", header, flags=re.MULTILINE)


def check_build(lib: Any) -> None:
    """Refuse a libllama of another adaskip.h, and a ggml whose structures differ from those that libllama expects."""
    if lib.adaskip_abi_version() != lib.ADASKIP_ABI_VERSION:
        raise LibraryError(
            f"{_library.path()} and {_library.header()} are of different builds; "
            "run 'pip install --force-reinstall --no-deps adaskip-cpp'."
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
        for library in self._libraries:
            if hasattr(library, name):
                return getattr(library, name)
        raise AttributeError(name)


ffi = FFI()
ffi.cdef(_declarations(_library.header().read_text(encoding="utf-8")))
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
