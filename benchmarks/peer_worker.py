"""One contender of peer.py in its own process: a model in one engine, whole or with a plan. Start at :func:`main`.

With its own process, no engine's thread pool or allocator disturbs another's. The first line of JSON on standard input
describes the contender; every later line is a request. Each gets one line on standard output. (The file is long,
because both engines must be side by side, so that a reader sees that they do the same.)
"""

from __future__ import annotations

import gc
import inspect
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["PHASES", "load_plan", "save_plan"]

PHASES = ("prefill", "decode")
ATTENTION, FFN = 0, 1

Logits = npt.NDArray[np.float32]


class Contender(Protocol):
    """The methods of both engines."""

    def versions(self) -> str:
        """Say which libraries compute, and how."""
        ...

    def logits(self, prompt: list[int], answer: list[int]) -> tuple[list[int], Logits]:
        """Evaluate a prompt in prefill, then one by one as many tokens as ``answer`` has in decode.

        Returns the tokens of decode, which may be the engine's own greedy ones, and the logits ``[n, n_vocab]``: of the
        prompt's last token, or of all with the option ``logits_all``, and of each token of decode.
        """
        ...

    def time(self, prompt: list[int], n_decode: int) -> tuple[float, list[float]]:
        """Return the seconds to the first token, and for each of the ``n_decode`` tokens after it."""
        ...


def save_plan(plan: Any, path: Path) -> None:
    """Write the two skip sets of a :class:`adaskip_cpp.SkipPlan` as npz: ``<phase>_<skip, scale or bias>``."""
    arrays = {}
    for phase in PHASES:
        chosen = getattr(plan, phase)
        for name in ("skip", "scale", "bias"):
            value = getattr(chosen, name)
            if value is not None:
                arrays[f"{phase}_{name}"] = value
    np.savez(path, **arrays)


def load_plan(path: str | None) -> dict[str, dict[str, npt.NDArray[Any]]]:
    """Read what :func:`save_plan` wrote, by phase and name; {} for no plan."""
    if path is None:
        return {}
    with np.load(path) as arrays:
        return {
            phase: {name.partition("_")[2]: arrays[name] for name in arrays.files if name.startswith(phase)}
            for phase in PHASES
        }


class Ours:
    """The model in this package."""

    def __init__(self, model: str, plan: str | None, n_ctx: int, n_threads: int, options: dict[str, Any]) -> None:
        from adaskip_cpp import AdaSkipLlama, SkipPlan
        from adaskip_cpp.model.skip_set import SkipSet

        self.every = bool(options.get("logits_all"))
        sets = {phase: SkipSet(**arrays) for phase, arrays in load_plan(plan).items()}
        self.llm = AdaSkipLlama(
            model,
            plan=SkipPlan(sets["prefill"], sets["decode"]) if sets else None,
            n_ctx=n_ctx,
            n_threads=n_threads,
            n_threads_batch=n_threads,
            verbose=False,
            **options,
        )

    def versions(self) -> str:
        """Say which libraries compute."""
        from importlib.metadata import version

        return f"adaskip-cpp {version('adaskip-cpp')} on llama-cpp-python {version('llama-cpp-python')}"

    def logits(self, prompt: list[int], answer: list[int]) -> tuple[list[int], Logits]:
        """Decode greedily after the prompt, as many tokens as ``answer`` has."""
        import llama_cpp

        self.llm.reset()
        steps = self.llm.generate(prompt, temp=0.0)
        tokens, rows = [], []
        for _ in range(len(answer) + 1):
            tokens.append(next(steps))
            row = llama_cpp.llama_get_logits_ith(self.llm.ctx, -1)
            rows.append(np.ctypeslib.as_array(row, shape=(self.llm.n_vocab(),)).copy())
        steps.close()
        if self.every:
            rows = [*np.array(self.llm.scores[: len(prompt) - 1]), *rows]
        return tokens[:-1], np.array(rows)

    def time(self, prompt: list[int], n_decode: int) -> tuple[float, list[float]]:
        """Time one request."""
        from adaskip_cpp.measuring.timing import time_request

        result = time_request(self.llm, prompt, n_decode)
        return result.first_token_s, list(result.token_s)


class Transformers:
    """The same GGUF file in Hugging Face transformers, without the plan's sublayers."""

    def __init__(self, model: str, plan: str | None, n_ctx: int, n_threads: int, options: dict[str, Any]) -> None:
        import torch

        torch.set_num_threads(n_threads)
        self.torch = torch
        self.n_ctx = n_ctx
        self.model = read_gguf(model, attention=options["attention"])
        self.n_keep = 0 if options.get("logits_all") else 1
        self.static = options["cache"] == "static"
        self.state = {"phase": "prefill"}
        sets = load_plan(plan)
        if sets:
            skip_sublayers(self.model, sets, self.state)
        # The name changed within release 5.
        parameters = inspect.signature(type(self.model).forward).parameters
        self.cache_name = "cache" if "cache" in parameters else "past_key_values"
        self.run: dict[str, Callable[..., Any]] = dict.fromkeys(PHASES, self.model)
        # Inductor must not freeze weights: it would also make a constant of a static cache's length.
        for phase in PHASES if options.get("compile") else ():
            self.run[phase] = torch.compile(self.model, dynamic=False)

    def versions(self) -> str:
        """Say which libraries compute, and on which instructions."""
        import transformers

        cpu = self.torch.backends.cpu.get_cpu_capability()
        return f"transformers {transformers.__version__} on torch {self.torch.__version__} ({cpu})"

    def _evaluate(self, tokens: Any, n_past: int, cache: Any, n_keep: int = 1) -> Any:
        """Return the logits of the last ``n_keep`` tokens (0: of all), [n, n_vocab]."""
        phase = self.state["phase"] = "prefill" if n_past == 0 else "decode"
        positions = self.torch.arange(n_past, n_past + tokens.shape[1])[None]
        arguments = {self.cache_name: cache, "position_ids": positions, "logits_to_keep": n_keep, "use_cache": True}
        return self.run[phase](input_ids=tokens, **arguments).logits[0]

    def _cache(self) -> Any:
        from transformers import DynamicCache, StaticCache

        if self.static:
            return StaticCache(config=self.model.config, max_cache_len=self.n_ctx)
        return DynamicCache()

    def logits(self, prompt: list[int], answer: list[int]) -> tuple[list[int], Logits]:
        """Evaluate the answer that is given."""
        with self.torch.inference_mode():
            cache = self._cache()
            rows = [self._evaluate(self.torch.tensor([prompt]), 0, cache, self.n_keep)]
            for i, token in enumerate(answer):
                rows.append(self._evaluate(self.torch.tensor([[token]]), len(prompt) + i, cache, 1))
            return answer, self.torch.cat(rows).numpy()

    def time(self, prompt: list[int], n_decode: int) -> tuple[float, list[float]]:
        """Time one request in a bare loop with logits of the last token only; ``generate()`` does more."""
        gc.collect()
        gc.disable()  # as for the other engine
        try:
            with self.torch.inference_mode():
                times = []
                start = time.perf_counter()
                cache, tokens, n_past = self._cache(), self.torch.tensor([prompt]), 0
                for _ in range(n_decode + 1):
                    logits = self._evaluate(tokens, n_past, cache)
                    n_past += tokens.shape[1]
                    tokens = logits.argmax(dim=-1)[None]
                    int(tokens)  # a caller wants the token
                    now = time.perf_counter()
                    times.append(now - start)
                    start = now
        finally:
            gc.enable()
        return times[0], times[1:]


def read_gguf(path: str, attention: str) -> Any:
    """Return a ``LlamaForCausalLM`` with the weights of a GGUF file of the llama architecture, as F32.

    Transformers' own reader of GGUF needs another package, so this function reads the file. It translates names. It
    moves the rows of Q and K from llama.cpp's order (the two of a rotation adjacent) to transformers' (half a head
    apart).
    """
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = GGUFReader(path)
    value = {name.removeprefix("llama."): field.contents() for name, field in reader.fields.items()}
    n_head, n_head_kv = value["attention.head_count"], value["attention.head_count_kv"]
    weights = {t.name: np.array(dequantize(t.data, t.tensor_type), np.float32) for t in reader.tensors}
    tied = "output.weight" not in weights
    config = LlamaConfig(
        vocab_size=len(weights["token_embd.weight"]),
        hidden_size=value["embedding_length"],
        intermediate_size=value["feed_forward_length"],
        num_hidden_layers=value["block_count"],
        num_attention_heads=n_head,
        num_key_value_heads=n_head_kv,
        max_position_embeddings=value["context_length"],
        rms_norm_eps=value["attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": value["rope.freq_base"]},
        tie_word_embeddings=tied,
        attn_implementation=attention,
    )
    names = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    outer = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    state = {}
    for name, weight in weights.items():
        parts = name.split(".")
        if parts[0] == "blk":
            heads = {"attn_q": n_head, "attn_k": n_head_kv}.get(parts[2])
            if heads is not None:
                weight = weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
            target = f"model.layers.{parts[1]}.{names[parts[2]]}.{parts[3]}"
        else:
            target = f"{outer[parts[0]]}.{parts[1]}"
        state[target] = torch.from_numpy(np.ascontiguousarray(weight))
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    # The buffer of frequencies is no weight, so a model made on the meta device lacks its values.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def skip_sublayers(model: Any, sets: dict[str, dict[str, npt.NDArray[Any]]], state: dict[str, str]) -> None:
    """Give every layer with a skipped sublayer a forward pass that computes only the other sublayer.

    A skipped sublayer costs one pass over the residual stream, ``s * u + b``: no norm, no sum. Skipped attentions have
    no entry in the cache, so its entries get new numbers. Attentions that run in decode come first: transformers takes
    the number of cached tokens from entry 0, which must always be written.
    """
    import torch

    decode, prefill = (sets[phase]["skip"][:, ATTENTION] for phase in ("decode", "prefill"))
    order = np.lexsort((np.arange(len(decode)), prefill, decode))
    for entry, index in enumerate(order):
        model.model.layers[index].self_attn.layer_idx = entry

    def substitute(phase: str, index: int, kind: int) -> Callable[[Any], Any] | None:
        arrays = sets[phase]
        if not arrays["skip"][index, kind]:
            return None
        scale = float(arrays["scale"][index, kind])
        if "bias" in arrays:
            bias = torch.from_numpy(arrays["bias"][index, kind].copy())
            return lambda u: torch.add(bias, u, alpha=scale)
        return (lambda u: u) if scale == 1.0 else (lambda u: u * scale)

    def replace_forward(layer: Any, index: int) -> None:
        instead = {phase: [substitute(phase, index, kind) for kind in (ATTENTION, FFN)] for phase in PHASES}

        def forward(hidden_states: Any, **arguments: Any) -> Any:
            attention, ffn = instead[state["phase"]]
            u = hidden_states
            if attention is None:
                u = u + layer.self_attn(hidden_states=layer.input_layernorm(u), **arguments)[0]
            else:
                u = attention(u)
            return u + layer.mlp(layer.post_attention_layernorm(u)) if ffn is None else ffn(u)

        layer.forward = forward

    for index, layer in enumerate(model.model.layers):
        if any(sets[phase]["skip"][index].any() for phase in PHASES):
            replace_forward(layer, index)


ENGINES: dict[str, Callable[..., Contender]] = {"adaskip-cpp": Ours, "transformers": Transformers}


def main() -> None:
    """Answer requests until standard input ends."""
    # Libraries may print; only answers go to the standard output that peer.py reads.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: Any) -> None:
        channel.write(json.dumps(value) + "\n")
        channel.flush()

    contender: Contender | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if contender is None:
                contender = ENGINES[request.pop("engine")](**request)
                answer({"versions": contender.versions()})
            elif request["do"] == "time":
                first, rest = contender.time(request["prompt"], request["n_decode"])
                answer({"first_token_s": first, "token_s": rest})
            else:
                tokens, rows = contender.logits(request["prompt"], request["answer"])
                np.save(request["file"], rows)
                answer({"answer": tokens})
        except Exception as error:  # an engine's failure is an answer too: another setting may work
            answer({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"})


if __name__ == "__main__":
    main()
