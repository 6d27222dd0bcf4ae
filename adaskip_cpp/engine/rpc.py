"""Lets models run on devices of other machines, through llama.cpp's rpc-server: start with ``add_rpc_server``.

It imports llama_cpp and the standard library alone, because processes of the stock library run this file by its path.
"""

import ctypes
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

_PATIENCE_S = 20  # for a server's answer to the trial process, which loads llama_cpp first
_added: set[str] = set()


@cache
def _ggml() -> Any:
    """Return functions of the ggml in this process, found through libllama, which depends on it."""
    import llama_cpp

    libraries = [llama_cpp.llama_cpp._lib]
    if sys.platform == "win32":  # a DLL shows its own functions alone
        libraries = [ctypes.CDLL(name) for name in ("ggml.dll", "ggml-base.dll")]
    ggml = SimpleNamespace()
    for name, types in {
        "ggml_backend_reg_by_name": [ctypes.c_char_p],
        "ggml_backend_reg_get_proc_address": [ctypes.c_void_p, ctypes.c_char_p],
        "ggml_backend_register": [ctypes.c_void_p],
    }.items():
        function = next(getattr(each, name) for each in libraries if hasattr(each, name))
        function.argtypes, function.restype = types, ctypes.c_void_p
        setattr(ggml, name, function)
    return ggml


def supports_rpc() -> bool:
    """Whether ggml was built with ``GGML_RPC=ON``."""
    return bool(_ggml().ggml_backend_reg_by_name(b"RPC"))


def register_rpc_server(endpoint: str) -> bool:
    """Register an rpc-server's devices with ggml; False if it has none. Without an answer ggml ends the process."""
    ggml = _ggml()
    reg = ggml.ggml_backend_reg_by_name(b"RPC")
    address = ggml.ggml_backend_reg_get_proc_address(reg, b"ggml_backend_rpc_add_server")
    server = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(address)(endpoint.encode())
    if not server:
        return False
    ggml.ggml_backend_register(server)
    return True


def add_rpc_server(endpoint: str) -> None:
    """Add the devices of an rpc-server to those that this process uses for models opened later.

    ``n_gpu_layers`` layers go to these devices first, in the order of the servers. They are split by free memory, or by
    ``tensor_split``. A server cannot be removed again, and serves one process at a time. If a server ends while a model
    is on it, ggml ends the process.

    Args:
        endpoint: ``"host:port"`` of llama.cpp's rpc-server. It must be of the same release as llama-cpp-python.

    Raises:
        RPCServerError: ggml was built without RPC, or cannot use the server.

    Examples:
        >>> add_rpc_server("192.168.0.7:50052")
        >>> llm = AdaSkipLlama("model.gguf", n_gpu_layers=-1, plan="auto")
    """
    from ..errors import RPCServerError  # here, because processes that run this file by its path have no package

    if endpoint in _added:
        return
    if not supports_rpc():
        raise RPCServerError(
            "the installed llama-cpp-python was built without RPC; install it again: "
            'CMAKE_ARGS="-DGGML_RPC=ON" pip install --force-reinstall --no-deps --no-cache-dir '
            f"--no-binary llama-cpp-python llama-cpp-python=={version('llama-cpp-python')}"
        )
    reason = _why_not(endpoint)
    if reason or not register_rpc_server(endpoint):
        raise RPCServerError(
            f"the RPC server {endpoint!r} cannot be used: {reason or 'it has no devices'}; start llama.cpp's "
            "rpc-server of the release that llama-cpp-python was built from, and give its host:port"
        )
    _added.add(endpoint)


def _why_not(endpoint: str) -> str:
    """Let another process try a server; return why ggml aborted there, "" if it did not."""
    command = [sys.executable, __file__, endpoint]
    try:
        tried = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired:
        return f"no answer in {_PATIENCE_S} seconds; a server serves one process at a time"
    except ValueError:  # a null byte
        return "that is no host:port"
    if tried.returncode == 0:
        return ""
    lines = tried.stderr.strip().splitlines() or ["it gave no reason"]
    # ggml's line with the reason begins with a place in its source, and a backtrace follows.
    return next((line for line in lines if "ggml-rpc.cpp" in line), lines[-1]).strip().rpartition(": ")[2]


if __name__ == "__main__":
    if not register_rpc_server(sys.argv[1]):
        sys.exit("it has no devices")
