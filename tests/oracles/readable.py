"""Sets, and several sequences in a bare context, for tests of which cached positions a plan may read."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from oracles.skip_sets import skip_set

from adaskip_cpp import SkipPlan
from adaskip_cpp.engine.native import NativeContext

TOLERANCE = 5e-6
FFN, ATTENTION, NOTHING = skip_set(ffn=(1, 2)), skip_set((1,), (2,)), skip_set()
MAPS = skip_set(ffn=(1,), seed=1)


def logits(llm: Any) -> np.ndarray:
    return llm.scores[llm.n_tokens - 1].copy()


def evaluated(llm: Any, call: Callable[[], Any]) -> list[int]:
    """The positions that a call evaluates."""
    seen: list[int] = []
    with llm.collect_statistics(lambda batch: seen.extend(batch.positions.tolist()), keep_logits=True):
        call()
    return seen


def decode(ctx: Any, rows: Sequence[tuple[int, int, int, bool]], embeddings: np.ndarray | None = None) -> int:
    """Call llama_decode, and return its code, for rows of a sequence, a position, a token, and whether it is an output.

    ``embeddings``, float [n_rows, n_embd], take the place of the tokens.
    """
    batch = llama_cpp.llama_batch_init(len(rows), 0 if embeddings is None else embeddings.shape[1], 1)
    batch.n_tokens = len(rows)
    for i, (sequence, position, token, is_output) in enumerate(rows):
        batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = position, 1, sequence, is_output
        if embeddings is None:
            batch.token[i] = token
    if embeddings is not None:
        np.ctypeslib.as_array(batch.embd, embeddings.shape)[:] = embeddings
    code = llama_cpp.llama_decode(ctx, batch)
    llama_cpp.llama_batch_free(batch)
    return int(code)


class Bare:
    """Several sequences in one context, decoded with llama.cpp's own functions."""

    def __init__(self, path: Path, n_seq: int = 2, unified: bool = True) -> None:
        params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_seq_max, options.kv_unified = 256, n_seq, unified
        options.type_k = options.type_v = 0
        options.flash_attn_type = 0
        options.n_threads = options.n_threads_batch = 1
        self.ctx = llama_cpp.llama_init_from_model(self.model, options)
        self.native = NativeContext(int(self.ctx))
        self.memory = llama_cpp.llama_get_memory(self.ctx)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.n_plans = 0

    def close(self) -> None:
        llama_cpp.llama_free(self.ctx)
        llama_cpp.llama_model_free(self.model)

    def set_plan(self, plan: SkipPlan | None) -> None:
        self.n_plans += 1
        self.native.set_plan(plan, self.n_plans)

    def decode(self, **pieces: tuple[int, list[int]]) -> dict[str, np.ndarray]:
        """Evaluate pieces of sequences ("s0", "s1", ...) in one batch, each from a position on; return their logits.

        Raises:
            RuntimeError: llama_decode fails.
        """
        rows = [
            (int(name[1:]), start + i, token, True)
            for name, (start, piece) in pieces.items()
            for i, token in enumerate(piece)
        ]
        code = decode(self.ctx, rows)
        if code != 0:
            self.native.raise_failure(RuntimeError(f"llama_decode returned {code}"))
        pointers = (llama_cpp.llama_get_logits_ith(self.ctx, i) for i in range(len(rows)))
        values = np.stack([np.ctypeslib.as_array(each, (self.n_vocab,)) for each in pointers])
        sequences = np.array([row[0] for row in rows])
        return {name: values[sequences == int(name[1:])] for name in pieces}
