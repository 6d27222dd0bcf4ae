"""llama.cpp's rpc-servers on this machine, from ggml's library, as llama-cpp-python installs no such program.

``start_rpc_servers`` is for tests, here and in the process of the stock library. Run as a program, this file serves the
CPU at one port until its stdin ends, which is when whoever started it does.
"""

import atexit
import ctypes
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress

__all__ = ["bytes_travelled", "start_rpc_servers"]

_TCPI_BYTES_RECEIVED, _TCPI_BYTES_SENT = 128, 200  # offsets in Linux's struct tcp_info, 8 bytes each


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


def bytes_travelled(endpoint: str) -> tuple[int, int]:
    """Return what this process has sent to a server, and received from it, by the connections that it has now.

    The kernel counts, in the payload of TCP: what ggml wrote and read, to the byte.
    """
    sent = received = 0
    host, _, port = endpoint.partition(":")
    for number in filter(_is_socket, os.listdir("/proc/self/fd")):
        with socket.socket(fileno=os.dup(int(number))) as each, suppress(OSError):  # some have no peer
            if each.getpeername()[:2] == (host, int(port)):
                info = each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                sent += struct.unpack_from("q", info, _TCPI_BYTES_SENT)[0]
                received += struct.unpack_from("q", info, _TCPI_BYTES_RECEIVED)[0]
    return sent, received


def _is_socket(number: str) -> bool:
    with suppress(FileNotFoundError):  # the one of the folder itself
        return os.readlink(f"/proc/self/fd/{number}").startswith("socket:")
    return False


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _await(port: int, patience_s: float = 60) -> None:
    end = time.monotonic() + patience_s
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def _serve(port: int) -> None:
    import llama_cpp

    ggml = llama_cpp.llama_cpp._lib  # depends on ggml, and so has its functions
    for name in ("ggml_backend_reg_by_name", "ggml_backend_reg_get_proc_address", "ggml_backend_dev_by_type"):
        getattr(ggml, name).restype = ctypes.c_void_p
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
