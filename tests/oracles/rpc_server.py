"""llama.cpp's rpc-servers on this machine: a second kind of device, to test that graphs are divided between devices.

Run as a program, this file serves the CPU at one port until its stdin ends, which is when whoever started it does.
"""

import atexit
import ctypes
import os
import socket
import subprocess
import sys
import threading
import time
from typing import Any


def start_rpc_servers(n: int) -> list[str]:
    """Start so many servers, which end with this process, and return their endpoints."""
    ports = [_free_port() for _ in range(n)]
    for port in ports:
        command = [sys.executable, __file__, str(port)]
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        atexit.register(server.kill)
    for port in ports:
        _await(port)
    return [f"127.0.0.1:{port}" for port in ports]


def register_rpc_server(endpoint: str) -> None:
    """Register a server's devices with the ggml of this process; models opened later use them first."""
    ggml = _ggml("ggml_backend_reg_by_name", "ggml_backend_reg_get_proc_address")
    reg = ggml.ggml_backend_reg_by_name(b"RPC")
    assert reg, "ggml was built without RPC"
    address = ggml.ggml_backend_reg_get_proc_address(ctypes.c_void_p(reg), b"ggml_backend_rpc_add_server")
    server = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(address)(endpoint.encode())
    ggml.ggml_backend_register(ctypes.c_void_p(server))


def _ggml(*names: str) -> Any:
    """Return libllama, which depends on ggml and so has its functions; those named return pointers."""
    import llama_cpp

    ggml = llama_cpp.llama_cpp._lib
    for name in names:
        getattr(ggml, name).restype = ctypes.c_void_p
    return ggml


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def _await(port: int) -> None:
    for _ in range(600):
        try:
            return socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"no rpc-server at port {port}")


def _serve(port: int) -> None:
    ggml = _ggml("ggml_backend_reg_by_name", "ggml_backend_reg_get_proc_address", "ggml_backend_dev_by_type")
    reg = ggml.ggml_backend_reg_by_name(b"RPC")
    address = ggml.ggml_backend_reg_get_proc_address(ctypes.c_void_p(reg), b"ggml_backend_rpc_start_server")
    devices = (ctypes.c_void_p * 1)(ggml.ggml_backend_dev_by_type(0))  # GGML_BACKEND_DEVICE_TYPE_CPU
    start = ctypes.CFUNCTYPE(
        None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, type(devices)
    )(address)  # fmt: skip
    threading.Thread(target=start, args=(f"127.0.0.1:{port}".encode(), None, 1, 1, devices), daemon=True).start()
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
