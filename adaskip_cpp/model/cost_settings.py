"""The machine and the settings that a cost model was measured with."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..engine.llama import AdaSkipLlama

__all__ = ["CostSettings"]


@dataclass(frozen=True)
class CostSettings:
    """The machine and the settings that times were measured with; with others they are worth nothing.

    Attributes:
        cpu: name of the processor.
        devices: names of ggml's devices, as ``("CPU",)``.
        n_gpu_layers: layers offloaded to them.
        n_threads, n_threads_batch: CPU threads in decode and in prefill.
        n_batch, n_ubatch: tokens in a batch, and in what is computed at once.
        flash_attention: whether attention is computed as one operation.
        type_k, type_v: ggml types of the KV cache, as ``"F16"``.
        swa_full: whether sliding-window layers have KV for the whole context.
        llama_cpp_python: its version.
    """

    cpu: str
    devices: tuple[str, ...]
    n_gpu_layers: int
    n_threads: int
    n_threads_batch: int
    n_batch: int
    n_ubatch: int
    flash_attention: bool
    type_k: str
    type_v: str
    swa_full: bool
    llama_cpp_python: str

    @classmethod
    def of(cls, llm: AdaSkipLlama) -> CostSettings:
        """Return those of a loaded model."""
        parameters: Any = llm.context_params
        n_gpu_layers = int(llm.model_params.n_gpu_layers)
        return cls(
            cpu=_cpu(),
            devices=_devices(),
            n_gpu_layers=-1 if n_gpu_layers >= 0x7FFFFFFF else n_gpu_layers,  # llama_cpp.Llama's stand-in for -1
            n_threads=int(parameters.n_threads),
            n_threads_batch=int(parameters.n_threads_batch),
            n_batch=int(llm.n_batch),
            n_ubatch=int(parameters.n_ubatch),
            flash_attention=int(parameters.flash_attn_type) == 1,
            type_k=_type_name(int(parameters.type_k)),
            type_v=_type_name(int(parameters.type_v)),
            swa_full=bool(parameters.swa_full),
            llama_cpp_python=metadata.version("llama-cpp-python"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "devices": list(self.devices)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CostSettings:
        """Read what :meth:`to_dict` wrote.

        Raises:
            KeyError: a field is missing.
            ValueError: a field is of another type.
        """
        kinds: dict[str, type] = {"str": str, "int": int, "bool": bool}
        values: dict[str, Any] = {}
        for each in fields(cls):
            value = data[each.name]
            if each.name == "devices":
                if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
                    raise ValueError("'devices' is not a list of names")
                value = tuple(value)
            elif type(value) is not kinds[str(each.type)]:
                raise ValueError(f"{each.name!r} is {value!r}, not of type {each.type}")
            values[each.name] = value
        return cls(**values)


def _type_name(number: int) -> str:
    from gguf import GGMLQuantizationType

    return str(GGMLQuantizationType(number).name)


def _cpu() -> str:
    try:
        if sys.platform == "linux":
            with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
                for line in file:
                    if line.startswith("model name"):
                        return line.partition(":")[2].strip()
        elif sys.platform == "darwin":
            command = ("/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string")
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return platform.processor() or platform.machine()


def _devices() -> tuple[str, ...]:
    """Names of ggml's devices."""
    from llama_cpp._ggml import libggml

    try:
        count, get, name = (getattr(libggml, f"ggml_backend_dev_{each}") for each in ("count", "get", "description"))
    except AttributeError:
        return ()
    count.restype, get.restype, name.restype = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_char_p
    get.argtypes, name.argtypes = (ctypes.c_size_t,), (ctypes.c_void_p,)
    return tuple((name(get(i)) or b"").decode("utf-8", "replace") for i in range(count()))
