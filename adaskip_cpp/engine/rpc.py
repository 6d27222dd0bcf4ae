"""Devices of other machines, which ggml reaches through llama.cpp's rpc-server.

Besides the standard library it needs llama_cpp alone: processes of the stock library run this file by its path.
"""

import ctypes
import subprocess
import sys
from functools import cache
from typing import Any

__all__ = ["add_rpc_server", "register_rpc_server", "supports_rpc"]

_PATIENCE_S = 20
"""For a server to answer another process, which loads llama_cpp first."""


@cache
def _ggml() -> Any:
    """The functions of the ggml in this process, through the libllama that depends on it."""
    import llama_cpp

    ggml = llama_cpp.llama_cpp._lib
    for name, types in {
        "ggml_backend_reg_by_name": [ctypes.c_char_p],
        "ggml_backend_reg_get_proc_address": [ctypes.c_void_p, ctypes.c_char_p],
        "ggml_backend_register": [ctypes.c_void_p],
    }.items():
        function = getattr(ggml, name)
        function.argtypes, function.restype = types, ctypes.c_void_p
    return ggml


def supports_rpc() -> bool:
    """Whether ggml was built with ``GGML_RPC=ON``."""
    return bool(_ggml().ggml_backend_reg_by_name(b"RPC"))


def register_rpc_server(endpoint: str) -> bool:
    """Make the devices of an rpc-server known to ggml, as ``--rpc`` of llama.cpp's programs does; False if it has none.

    ggml ends the process where nobody listens at ``endpoint``, or something else than an rpc-server of its release.
    """
    ggml = _ggml()
    reg = ggml.ggml_backend_reg_by_name(b"RPC")
    address = ggml.ggml_backend_reg_get_proc_address(reg, b"ggml_backend_rpc_add_server")
    server = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(address)(endpoint.encode())
    if not server:
        return False
    ggml.ggml_backend_register(server)
    return True


def add_rpc_server(endpoint: str) -> None:
    """Let models that this process opens from now on run on the devices of an rpc-server too.

    Layers go to its devices first, as many as ``n_gpu_layers`` says, in the order in which servers were added; the
    context splits them by free memory, or by ``tensor_split``. A server cannot be taken back, and serves one process at
    a time. ggml ends the process where a server does while a model is on it.

    Args:
        endpoint: ``"host:port"`` of llama.cpp's rpc-server, of the release that llama-cpp-python was built from.

    Raises:
        RPCServerError: ggml was built without RPC, or does not get along with what is at the endpoint.
    """
    from ..errors import RPCServerError  # not where a process of the stock library runs this file

    if not supports_rpc():
        raise RPCServerError(
            "the installed llama-cpp-python was built without RPC; install it again with "
            'CMAKE_ARGS="-DGGML_RPC=ON" pip install --force-reinstall --no-deps --no-cache-dir --no-binary '
            "llama-cpp-python, of the same version"
        )
    # ggml aborts where it cannot use a server, so another process tries first.
    command = [sys.executable, __file__, endpoint]
    try:
        tried = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired:
        reason: str | None = f"no answer in {_PATIENCE_S} seconds; a server serves one process at a time"
    except ValueError:  # a null byte
        reason = "that is no host:port"
    else:
        # The line in which ggml says why; what follows it is where it was.
        told = [line.strip().rpartition(": ")[2] for line in tried.stderr.splitlines() if "ggml-rpc.cpp" in line]
        reason = None if tried.returncode == 0 else " ".join(told[:1]) or "it has no devices"
    if reason is not None or not register_rpc_server(endpoint):
        raise RPCServerError(
            f"the RPC server {endpoint!r} cannot be used: {reason}; start llama.cpp's rpc-server of the release that "
            "llama-cpp-python was built from, and give its host:port"
        )


if __name__ == "__main__":
    sys.exit(not register_rpc_server(sys.argv[1]))
