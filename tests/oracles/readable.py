"""Sets, and several sequences in a bare context, for tests of which cached positions a plan may read."""

from collections.abc import Callable, Sequence
from typing import Any

import llama_cpp
import numpy as np
from oracles.skip_sets import skip_set

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
