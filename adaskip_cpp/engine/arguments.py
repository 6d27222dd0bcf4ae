"""Checks the arguments that open a model, before llama.cpp or ``llama_cpp.Llama`` would end the process over them."""

from collections.abc import Mapping, Sequence
from typing import Any

import llama_cpp

from ..errors import RequestError
from ..model.identity import check_gguf
from ..model.settings import MOST_THREADS, FlashAttention, Repack

_V_TYPES = {None, 0, 1, 30}  # ggml_type of V that can be transposed: the default, F32, F16, BF16
# ggml_type of K and V that llama.cpp has for its cache: F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, BF16
_KV_TYPES = {None, 0, 1, 2, 3, 6, 7, 8, 20, 30}
_BOUNDS = (  # smallest and largest values
    ("n_batch", 1, 2**31 - 1),
    ("n_ubatch", 1, 2**31 - 1),
    ("n_threads", -1, MOST_THREADS),  # 0: the default of llama_cpp.Llama; -1: that of llama.cpp
    ("n_threads_batch", -1, MOST_THREADS),
)


def check_arguments(flash_attn: FlashAttention, repack: Repack, kwargs: Mapping[str, Any]) -> None:
    """Check two arguments of our own, and ``kwargs``, those of ``llama_cpp.Llama``.

    Raises a RequestError, or a ModelFileError for a LoRA adapter that is no GGUF file.
    """
    for name, value, word in (("flash_attn", flash_attn, "prompts"), ("repack", repack, "all")):
        if isinstance(value, str) and value != word:
            raise RequestError(f'{name} is {value!r}; use True, False or "{word}".')
    if flash_attn == "prompts":
        is_split = kwargs.get("split_mode") == llama_cpp.LLAMA_SPLIT_MODE_TENSOR
        if is_split or kwargs.get("type_v") not in _V_TYPES:
            needs = "a quantized V (type_v), or tensors split between GPUs, need flash attention everywhere"
            raise RequestError(f"{needs}; use flash_attn=True.")
    for name in ("type_k", "type_v"):
        if kwargs.get(name) not in _KV_TYPES:
            raise RequestError(f"{name} is {kwargs[name]!r}; use a type of K and V: {_KV_TYPES - {None}}.")
    if kwargs.get("lora_path") is not None:
        check_gguf(kwargs["lora_path"])
    for name, least, most in _BOUNDS:
        if (n := kwargs.get(name)) is not None and not least <= n <= most:
            raise RequestError(f"{name} is {n}; use a number from {least} to {most:,}.")


def type_bits(types: Sequence[str]) -> int:
    """Return a bit for each of these types of ggml. A name that is none raises a RequestError."""
    if not types:
        return 0
    from gguf import GGMLQuantizationType

    for each in types:
        if each not in GGMLQuantizationType.__members__:
            raise RequestError(f'unpack has {each!r}; use a list of types of quantized weights, such as ["Q4_1"].')
    return sum(1 << int(GGMLQuantizationType[each]) for each in set(types))
