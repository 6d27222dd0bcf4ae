"""Describes the machine and the settings of a loaded model, for calibration, ``tune`` and frontiers."""

import platform
from importlib import metadata
from typing import Any

from ..model.cost_model import CostSettings
from .binding import ffi, lib
from .cores import physical_cores
from .self_describing import SelfDescribingLlama


def devices() -> tuple[str, int, tuple[str, ...]]:
    """Return the name of the CPU, its cores for this process, and the names of all devices that ggml computes on."""
    cpu = lib.ggml_backend_dev_by_type(0)  # GGML_BACKEND_DEVICE_TYPE_CPU
    every = map(lib.ggml_backend_dev_get, range(lib.ggml_backend_dev_count()))
    return _description(cpu) if cpu else platform.machine(), physical_cores(), tuple(map(_description, every))


def _description(device: Any) -> str:
    return str(ffi.string(lib.ggml_backend_dev_description(device)).decode("utf-8", "replace"))


def is_here(machine: CostSettings | None) -> bool:
    """Whether times were measured on this machine, with this release of llama-cpp-python."""
    here = (*devices(), metadata.version("llama-cpp-python"))
    return machine is not None and (machine.cpu, machine.n_cores, machine.devices, machine.llama_cpp_python) == here


def cost_settings(llm: SelfDescribingLlama) -> CostSettings:
    from gguf import GGMLQuantizationType

    parameters: Any = llm.context_params
    model: Any = llm.model_params
    cpu, n_cores, every = devices()
    return CostSettings(
        cpu=cpu,
        devices=every,
        n_gpu_layers=-1 if model.n_gpu_layers >= 0x7FFFFFFF else int(model.n_gpu_layers),  # llama_cpp.Llama's -1
        n_threads=int(parameters.n_threads),
        n_threads_batch=int(parameters.n_threads_batch),
        n_batch=int(llm.n_batch),
        n_ubatch=int(parameters.n_ubatch),
        flash_attention=llm.flash_attn,
        type_k=str(GGMLQuantizationType(parameters.type_k).name),
        type_v=str(GGMLQuantizationType(parameters.type_v).name),
        swa_full=bool(parameters.swa_full),
        llama_cpp_python=metadata.version("llama-cpp-python"),
        repack=llm.repack,
        unpack=llm.unpack,
        n_cores=n_cores,
    )
