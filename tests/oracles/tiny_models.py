"""Writes tiny random F32 GGUF models, one per architecture family, that stock llama.cpp loads.

Each tensor's values depend only on (seed, tensor name), so a model written with one output projection set to zero
differs from the plain one in that projection alone: it is the oracle for a skipped sublayer.
"""

import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, TokenType
from gguf.quants import dequantize, quantize
from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata
from oracles.gguf_files import write
from oracles.tiny_families import ENCODERS, FAMILIES, N_CTX_TRAIN, N_EMBD, N_FF, N_HEAD, N_VOCAB, Family

_MESSAGES = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
TEMPLATE = f"{{{{ bos_token }}}}{_MESSAGES}assistant: "
WORDS = ("▁the", "▁a", "▁of", "▁to", "th", "he", "▁t", "▁", "in", "er", "an", "re", "on")
MERGES = [*map(str.split, ("a a", "aa aa", "= =", "1 1", "11 1", "A A")), (" ", " "), (" ", "a"), ("\n", "\n")]
# The projections that end a sublayer, with their biases. Behind them stands at most an RMS norm, and rms_norm(0) = 0.
_OUTPUT = {
    "attention": ("attn_output", "attn_o", "ssm_out", "shortconv.out_proj"),
    "ffn": ("ffn_down", "ffn_down_exps"),
}


def write_model(
    path: str | Path,
    name: str | Family = "llama",
    *,
    seed: int = 0,
    n_layer: int | None = None,
    zero: Collection[tuple[int, str]] = (),
    split: int = 0,
    quantization: GGMLQuantizationType = GGMLQuantizationType.F32,
    stored_as: GGMLQuantizationType | None = None,
    pre: str = "",
) -> Path:
    """Write a tiny random model; returns its path, or that of the first of several files.

    ``name`` is a key of FAMILIES or ENCODERS, or a family; ``seed`` fixes a tensor together with its name; sublayers of
    ``zero`` add nothing to the residual stream; ``split`` is how many tensors a file has, for several; ``quantization``
    is of all matrices; those of layers are stored as F32 or Q8_0 then if ``stored_as`` says so, with the same values.
    With ``pre``, what splits texts into words, the vocabulary is of byte pairs, else SentencePiece.
    """
    family = {**FAMILIES, **ENCODERS}[name] if isinstance(name, str) else name
    layers = n_layer or family.n_layer
    ends = tuple(f"{family.block}.{layer}.{stem}." for layer, kind in zero for stem in _OUTPUT[kind])
    writer = GGUFWriter(path, family.architecture, split_max_tensors=split)
    _write_metadata(writer, family, layers)
    _write_byte_pairs(writer, pre) if pre else _write_tokenizer(writer)
    silenced = 0
    for tensor, shape in family.tensors(layers):
        values = _values(tensor, shape, seed)
        if tensor.startswith(ends):
            values, silenced = np.zeros_like(values), silenced + tensor.endswith(".weight")
        kind = quantization if len(shape) == 2 else GGMLQuantizationType.F32
        data = quantize(values, kind)
        if stored_as is not None and len(shape) == 2 and tensor.startswith("blk."):
            data = dequantize(data, kind) if stored_as == GGMLQuantizationType.F32 else _q8_0_of_q5_0(data)
            kind = stored_as
        writer.add_tensor(tensor, data, raw_dtype=kind)
    assert silenced == len(zero), f"{name} has not all of {zero}"
    write(writer)
    return min(Path(path).parent.glob(f"{Path(path).stem}-00001-of-*.gguf")) if split else Path(path)


def write_lora(path: str | Path, *, seed: int = 0, rank: int = 2, alpha: float = 2.0) -> Path:
    """Write a LoRA adapter for every projection of every layer of a llama that :func:`write_model` writes."""
    rng = np.random.default_rng(seed)
    writer = GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for tensor, shape in FAMILIES["llama"].tensors(FAMILIES["llama"].n_layer):
        if tensor.startswith("blk.") and len(shape) == 2:
            n_out, n_in = shape
            writer.add_tensor(f"{tensor}.lora_a", rng.normal(0, 0.2, (rank, n_in)).astype(np.float32))
            writer.add_tensor(f"{tensor}.lora_b", rng.normal(0, 0.2, (n_out, rank)).astype(np.float32))
    write(writer)
    return Path(path)


def add_chat_template(source: Path, target: Path) -> Path:
    """Write a copy of a model that has a chat template, ``TEMPLATE``."""
    return with_metadata(source, target, **{"tokenizer.chat_template": TEMPLATE})


def with_metadata(source: Path, target: Path, **values: str | int) -> Path:
    """Write a copy of a model with other metadata, texts and ids of tokens."""
    types = {str: GGUFValueType.STRING, int: GGUFValueType.UINT32}
    details = {name: MetadataDetails(types[type(value)], value) for name, value in values.items()}
    replaced = [name for name in details if GGUFReader(source).fields.get(name)]
    copy_with_new_metadata(GGUFReader(source), GGUFWriter(target, "llama"), details, replaced)
    return target


def _values(name: str, shape: tuple[int, ...], seed: int) -> npt.NDArray[np.float32]:
    """Random values of a size that makes every sublayer change the residual stream by about its own size."""
    noise = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape)
    stem = name.removesuffix(".weight").rsplit(".", 1)[-1]
    gain = {"attn_q": 1.5, "attn_k": 1.5, "attn_qkv": 1.5, "ffn_down": 2, "ffn_down_exps": 2}.get(stem, 1.2)
    values = gain * noise / np.sqrt(shape[-1])
    if "norm" in stem:
        values = 1 + 0.2 * noise
    others = {"bias": 0.3 * noise, "token_embd": 0.5 * noise, "rope_freqs": 1 + np.abs(noise)}
    others["ssm_a"] = -np.exp(0.5 * noise)  # the state decays
    return np.asarray(others.get(stem, values), np.float32)


def _q8_0_of_q5_0(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return the blocks of Q8_0 that hold the values of these blocks of Q5_0. Both have a factor and 32 integers."""
    blocks = data.reshape(-1, 22)
    factors = np.ascontiguousarray(blocks[:, :2])
    values = dequantize(blocks, GGMLQuantizationType.Q5_0).reshape(-1, 32)
    integers = np.rint(values / factors.view(np.float16).astype(np.float32)).astype(np.int8)
    return np.hstack([factors, integers.view(np.uint8)]).reshape(len(data), -1)


def _write_metadata(writer: GGUFWriter, family: Family, n_layer: int) -> None:
    n_head, n_ff = (N_HEAD, N_FF) if family.ffn != "none" else (0, 0)
    n_kv = [0 if layer in family.mixer else family.n_kv for layer in range(n_layer)]
    metadata: dict[str, Any] = {
        "context_length": N_CTX_TRAIN,
        "embedding_length": N_EMBD,
        "block_count": n_layer,
        "feed_forward_length": n_ff,
        "attention.head_count": n_head,
        "attention.head_count_kv": (n_kv if family.mixer else family.n_kv) if n_head else 0,
        "attention.key_length": family.head_dim,
        "attention.value_length": family.head_dim,
        "rope.dimension_count": family.head_dim,
        "rope.freq_base": 10000.0,
        "attention.layer_norm_rms_epsilon" if family.norm == "rms" else "attention.layer_norm_epsilon": 1e-5,
        **family.metadata,
    }
    writer.add_name("tiny")
    kinds = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}
    for key, value in metadata.items():
        full = key if key.startswith("tokenizer.") else f"{family.architecture}.{key}"
        writer.add_key_value(full, value, kinds.get(type(value), GGUFValueType.ARRAY))


def _write_tokenizer(writer: GGUFWriter) -> None:
    """A SentencePiece vocabulary of three special tokens, all bytes, and a few pieces."""
    special = {"<unk>": TokenType.UNKNOWN, "<s>": TokenType.CONTROL, "</s>": TokenType.CONTROL}
    types = {f"<0x{byte:02X}>": TokenType.BYTE for byte in range(256)}
    types = special | types | dict.fromkeys(WORDS, TokenType.NORMAL)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*types])
    writer.add_token_scores([-float(WORDS.index(token)) if token in WORDS else 0.0 for token in types])
    writer.add_token_types([*types.values()])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def _write_byte_pairs(writer: GGUFWriter, pre: str) -> None:
    """A vocabulary of GPT-2's kind: all bytes, ``MERGES``, and an end of text."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    letter = {byte: chr(byte) for byte in plain} | {byte: chr(256 + rank) for rank, byte in enumerate(others)}
    merges = [["".join(letter[byte] for byte in part.encode()) for part in pair] for pair in MERGES]
    normal = [letter[byte] for byte in range(256)] + ["".join(pair) for pair in merges]
    control = [f"<|{rank}|>" for rank in range(N_VOCAB - len(normal))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(normal + control)
    writer.add_token_types([TokenType.NORMAL] * len(normal) + [TokenType.CONTROL] * len(control))
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(N_VOCAB - 1)
    writer.add_bos_token_id(N_VOCAB - 1)
