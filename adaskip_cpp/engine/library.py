"""Puts our libllama under llama-cpp-python when it is imported: start with ``_load``.

``llama_cpp`` opens the libllama in the folder ``LLAMA_CPP_LIB_PATH`` when it is first imported. Its whole API, with
server and multimodal models, then runs on our libllama, but on its own ggml and backends.
"""

import ctypes
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
from pathlib import Path

from ..errors import LibraryError

REINSTALL = "pip install --force-reinstall --no-deps adaskip-cpp"
_VARIABLE = "LLAMA_CPP_LIB_PATH"
_NAME = {"darwin": "lib{}.dylib", "win32": "{}.dll"}.get(sys.platform, "lib{}.so")
_SEARCH_BESIDE = 8  # LOAD_WITH_ALTERED_SEARCH_PATH: Windows finds dependencies in the library's folder, then in PATH


def path() -> Path:
    """Return the absolute path of our libllama; raise a LibraryError if this installation has none."""
    return _find("lib/" + _NAME.format("llama"))


def header() -> Path:
    """Return the absolute path of adaskip.h, the C ABI of our part of libllama."""
    return _find("include/adaskip.h")


def release() -> str:
    """Return the version of llama-cpp-python that our libllama was built from."""
    record = _find("lib/build.json")
    try:
        return str(json.loads(record.read_text(encoding="utf-8"))["llama_cpp_python"])
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise LibraryError(f"{record} is damaged ({error}); run '{REINSTALL}'.") from error


def _find(relative: str) -> Path:
    # An editable installation has two folders: the sources, and the built files in site-packages.
    folders = [Path(folder).resolve() for folder in sys.modules["adaskip_cpp"].__path__]
    for folder in folders:
        if (folder / relative).is_file():
            return folder / relative
    if (folders[0].parent / "CMakeLists.txt").is_file():
        raise LibraryError(
            f"Python found the source code in {folders[0]} instead of an installed adaskip_cpp; start Python in "
            "another folder, or run 'pip install -e .' in this one."
        )
    raise LibraryError(f"adaskip_cpp in {folders[0]} has no {relative}; run '{REINSTALL}'.")


def _check_version(built_from: str) -> None:
    wanted = f"run 'pip install llama-cpp-python=={built_from}'"
    try:
        installed = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        raise LibraryError(f"llama-cpp-python is not installed; {wanted}.") from None
    if installed.partition("+")[0] != built_from:  # the part after + names the backend, such as cu124
        raise LibraryError(
            f"llama-cpp-python {installed} is installed, but adaskip_cpp's libllama was built from {built_from}; "
            f"{wanted}, or build adaskip-cpp again for what is installed: 'pip install --force-reinstall --no-deps "
            "--no-cache-dir --no-binary adaskip-cpp adaskip-cpp'."
        )


def _loaded() -> str | None:
    """Return the path of the libllama of ``llama_cpp`` in this process; None before its import."""
    module = sys.modules.get("llama_cpp.llama_cpp")
    return None if module is None else str(getattr(getattr(module, "_lib", None), "_name", "an unknown libllama"))


def _preload_ggml() -> None:
    # Our RUNPATH finds ggml only if llama_cpp is in the same site-packages, and Windows has no RUNPATH. A library that
    # is loaded already is always found: by its SONAME, on Windows by its file name.
    spec = importlib.util.find_spec("llama_cpp")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        library = Path(folder, "lib", _NAME.format("ggml"))
        if library.is_file():
            ctypes.CDLL(str(library), winmode=_SEARCH_BESIDE)


def _way_out(error: Exception) -> str:
    # A Linux without a compiler may lack a library that ggml needs, and no wheel contains it.
    missing = re.search(r"([^\s:]+): cannot open shared object file", str(error))
    if missing and not missing[1].startswith(("libggml", "libllama", "libmtmd")):
        return f"install the package of your system that has {missing[1]} (Debian: libgomp1 for libgomp.so.1)."
    return f"reinstall both: 'pip install --force-reinstall llama-cpp-python=={release()} adaskip-cpp'."


def _load() -> None:
    library = path()
    _check_version(release())
    loaded = _loaded()
    if loaded is None:
        previous = os.environ.get(_VARIABLE)
        os.environ[_VARIABLE] = str(library.parent)
        try:
            _preload_ggml()
            importlib.import_module("llama_cpp")
        except (OSError, RuntimeError) as error:
            raise LibraryError(f"llama_cpp cannot be imported on {library}: {error}; {_way_out(error)}") from error
        finally:
            del os.environ[_VARIABLE]  # programs that this process starts must not inherit it
            if previous is not None:
                os.environ[_VARIABLE] = previous
        loaded = _loaded()
    if loaded is None or not (os.path.exists(loaded) and library.samefile(loaded)):
        raise LibraryError(
            f"llama_cpp was imported before adaskip_cpp and runs on {loaded}; start a new Python process and "
            "import adaskip_cpp first, before llama_cpp and every package that imports it."
        )


_load()
