"""Measures the time to the first token without the computations that nobody reads, in a model with shared KV.

    python benchmarks/unread.py [--context 2048] [--rounds 7] [--width 768] [--layers 35] [--sharing 20] [--type q8_0]

The model is random and shaped like Gemma 4 E2B: it has per-layer embeddings, and one full attention in five. Of its 35
layers the last 20 read the KV of others, and have an FFN of twice the width (with --narrow of the same width, as in
E4B). Its width is half of E2B's, and its vocabulary tiny, so that layers take most of the time, as in a large model. It
is written to a temporary folder; with F32 weights it takes 1.7 GB there, and as much memory.

Four contenders without a plan take turns: stock llama-cpp-python, the same with batches cut like ours, ours, and ours
with `exact_batches=True`. Each measurement has its own process, which reads a few tokens first. Run it on an idle
machine; it takes about 10 minutes on 2 cores. Start at :func:`main`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quants

N_VOCAB, N_HEAD, PER_LAYER, WINDOW, N_WARM = 512, 4, 256, 512, 16
STOCK, STOCK_CUT = "stock llama-cpp-python", "the same, the last token by itself"
SIDES: dict[str, dict[str, bool] | None] = {  # None: stock
    STOCK: None,
    STOCK_CUT: None,
    "ours": {},
    "ours, exact_batches=True": {"exact_batches": True},
}


def is_sliding(layer: int) -> bool:
    """Return whether a layer of Gemma 4 E2B has a sliding window; every fifth has none."""
    return layer % 5 != 4


def shapes(args: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """Return NumPy shapes of the tensors that ``llama_model_gemma4::load_arch_tensors`` wants, without rope_freqs."""
    width, n_layer = args.width, args.layers
    result: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (N_VOCAB, width),
        "output_norm.weight": (width,),
        "per_layer_token_embd.weight": (N_VOCAB, PER_LAYER * n_layer),
        "per_layer_model_proj.weight": (PER_LAYER * n_layer, width),
        "per_layer_proj_norm.weight": (PER_LAYER,),
    }
    for layer in range(n_layer):
        head, n_ff = head_size(width, layer), feed_forward(args)[layer]
        tensors: dict[str, tuple[int, ...]] = {
            "attn_norm": (width,),
            "attn_q": (N_HEAD * head, width),
            "attn_q_norm": (head,),
            "attn_output": (width, N_HEAD * head),
            "post_attention_norm": (width,),
            "ffn_norm": (width,),
            "ffn_gate": (n_ff, width),
            "ffn_up": (n_ff, width),
            "ffn_down": (width, n_ff),
            "post_ffw_norm": (width,),
            "inp_gate": (PER_LAYER, width),
            "proj": (width, PER_LAYER),
            "post_norm": (width,),
        }
        if layer < n_layer - args.sharing:
            tensors |= {"attn_k": (head, width), "attn_v": (head, width), "attn_k_norm": (head,)}
        result |= {f"blk.{layer}.{name}.weight": shape for name, shape in tensors.items()}
    return result


def head_size(width: int, layer: int) -> int:
    """Return the size of a layer's attention heads: twice as large in layers without a window."""
    return width // 6 * (1 if is_sliding(layer) else 2)


def feed_forward(args: argparse.Namespace) -> list[int]:
    """Return the width of each layer's FFN."""
    wide = 1 if args.narrow else 2
    return [4 * args.width * (1 if layer < args.layers - args.sharing else wide) for layer in range(args.layers)]


def write_model(path: Path, args: argparse.Namespace) -> None:
    """Write the model: random weights, a vocabulary of bytes."""
    writer = GGUFWriter(path, "gemma4")
    writer.add_name("random, shaped like Gemma 4 E2B")
    full, sliding = head_size(args.width, 4), head_size(args.width, 0)
    metadata: dict[str, Any] = {
        "context_length": 131072,
        "embedding_length": args.width,
        "block_count": args.layers,
        "feed_forward_length": feed_forward(args),
        "attention.head_count": N_HEAD,
        "attention.head_count_kv": 1,
        "attention.key_length": full,
        "attention.value_length": full,
        "attention.key_length_swa": sliding,
        "attention.value_length_swa": sliding,
        "attention.sliding_window": WINDOW,
        "attention.sliding_window_pattern": [is_sliding(layer) for layer in range(args.layers)],
        "attention.shared_kv_layers": args.sharing,
        "embedding_length_per_layer_input": PER_LAYER,
        "rope.dimension_count": full,
        "rope.dimension_count_swa": sliding,
        "attention.layer_norm_rms_epsilon": 1e-6,
    }
    for key, value in metadata.items():
        match value:
            case int():
                writer.add_uint32(f"gemma4.{key}", value)
            case float():
                writer.add_float32(f"gemma4.{key}", value)
            case list():
                writer.add_array(f"gemma4.{key}", value)
    special = ["<unk>", "<s>", "</s>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [f"w{index}" for index in range(N_VOCAB - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * N_VOCAB)
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    writer.add_token_types(kinds + [TokenType.NORMAL] * (N_VOCAB - len(kinds)))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    rng = np.random.default_rng(0)
    kind = GGMLQuantizationType[args.type.upper()]
    writer.add_tensor("rope_freqs.weight", np.ones(full // 2, np.float32))
    for name, shape in shapes(args).items():
        noise = rng.standard_normal(shape, np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, 1 + np.float32(0.1) * noise)
        else:
            writer.add_tensor(name, quants.quantize(noise / np.float32(np.sqrt(shape[-1])), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def measure(side: str, model: str, context: int, n_threads: int, logits: str) -> None:
    """Time one prompt, in a process for this alone; print JSON, and write the logits to an npy file."""
    options = SIDES[side]
    if options is not None:
        from adaskip_cpp import AdaSkipLlama
    import llama_cpp

    library = Path(llama_cpp.llama_cpp._lib._name).resolve()
    if options is None and Path(llama_cpp.__file__).resolve().parent not in library.parents:
        raise SystemExit(f"{library} is not the libllama of llama-cpp-python; reinstall llama-cpp-python")
    common = {"n_ctx": context + 8, "n_batch": 512, "n_ubatch": 512, "verbose": False}
    common |= {"n_threads": n_threads, "n_threads_batch": n_threads}
    llm: Any = llama_cpp.Llama(model, **common) if options is None else AdaSkipLlama(model, **common, **options)
    prompt = [1, *np.random.default_rng(1).integers(3, N_VOCAB, size=context - 1).tolist()]
    llm.eval(prompt[-N_WARM:])
    llm.reset()
    start = time.perf_counter()
    if side == STOCK_CUT:
        llm.eval(prompt[:-1])
    next(llm.generate(prompt, temp=0.0))
    seconds = time.perf_counter() - start
    row = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(N_VOCAB,))
    np.save(logits, row)
    print(json.dumps({"seconds": seconds, "library": str(library)}))


def run(side: str, model: Path, context: int, n_threads: int) -> tuple[float, npt.NDArray[np.float32]]:
    """Return the seconds to the first token, and the logits that it was drawn from."""
    logits = model.with_name("logits.npy")
    command = [sys.executable, __file__, "--measure", side, str(model), str(context), str(n_threads), str(logits)]
    environment = {key: value for key, value in os.environ.items() if key != "LLAMA_CPP_LIB_PATH"}
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return float(json.loads(output.splitlines()[-1])["seconds"]), np.load(logits)


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--measure"]:
        side, model, context, threads, logits = sys.argv[2:]
        measure(side, model, int(context), int(threads), logits)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=2048, help="tokens of the prompt")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--width", type=int, default=768, help="a multiple of 384")
    parser.add_argument("--layers", type=int, default=35)
    parser.add_argument("--sharing", type=int, default=20, help="layers that read the KV of others")
    parser.add_argument("--narrow", action="store_true", help="FFNs of one width in all layers")
    parser.add_argument("--type", choices=("f32", "q8_0"), default="f32")
    args = parser.parse_args()
    own = args.layers - args.sharing
    if args.width % 384 or args.sharing < 0 or own < 5 or own % 5:
        # In llama.cpp, all other layers read the KV of the last two that have some; the last must be a full attention.
        parser.error("the width must be a multiple of 384, and 5, 10, 15 .. layers must have KV of their own")

    from adaskip_cpp.engine.cores import physical_cores
    from adaskip_cpp.intervals import ratio_interval
    from adaskip_cpp.measuring.timing import in_turn

    n_threads = physical_cores()
    times: defaultdict[str, list[float]] = defaultdict(list)
    logits: dict[str, npt.NDArray[np.float32]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model.gguf")
        write_model(model, args)
        size = model.stat().st_size
        for n_round in range(args.rounds):
            for index in in_turn(len(SIDES), n_round):
                side = list(SIDES)[index]
                seconds, logits[side] = run(side, model, args.context, n_threads)
                times[side].append(seconds)
    spread = float(np.abs(logits[STOCK]).max())
    print(f"{args.layers} layers, {args.sharing} sharing KV, width {args.width}, {args.type}, {size / 1e6:,.0f} MB")
    print(f"{n_threads} threads, llama-cpp-python {version('llama-cpp-python')}, {args.rounds} rounds in turn")
    print(f"Differences are the largest of a logit; logits go up to {spread:.2f}.\n")
    print(f"| | first token of {args.context}, s | faster than stock | differs from stock | from stock cut alike |")
    print("|---|---|---|---|---|")
    for side in SIDES:
        ratio = ratio_interval(times[STOCK], times[side])
        gain = "" if side == STOCK else f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
        differences = (float(np.abs(logits[side] - logits[each]).max()) for each in (STOCK, STOCK_CUT))
        told = " | ".join(f"{difference:.1e}" for difference in differences)
        print(f"| {side} | {statistics.median(times[side]):.3f} | {gain} | {told} |")


if __name__ == "__main__":
    main()
