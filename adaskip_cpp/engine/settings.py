"""Describes the machine and the settings of a loaded model, for calibration and ``tune``."""

from importlib import metadata
from typing import Any

from ..model.cost_model import CostSettings
from .llama import AdaSkipLlama
from .native import devices


def cost_settings(llm: AdaSkipLlama) -> CostSettings:
    from gguf import GGMLQuantizationType

    parameters: Any = llm.context_params
    n_gpu_layers = int(llm.model_params.n_gpu_layers)
    cpu, every = devices()
    return CostSettings(
        cpu=cpu,
        devices=every,
        n_gpu_layers=-1 if n_gpu_layers >= 0x7FFFFFFF else n_gpu_layers,  # llama_cpp.Llama turns -1 into that
        n_threads=int(parameters.n_threads),
        n_threads_batch=int(parameters.n_threads_batch),
        n_batch=int(llm.n_batch),
        n_ubatch=int(parameters.n_ubatch),
        flash_attention=int(parameters.flash_attn_type) == 1,
        type_k=str(GGMLQuantizationType(parameters.type_k).name),
        type_v=str(GGMLQuantizationType(parameters.type_v).name),
        swa_full=bool(parameters.swa_full),
        llama_cpp_python=metadata.version("llama-cpp-python"),
        repack=bool(llm.model_params.use_extra_bufts),
    )
