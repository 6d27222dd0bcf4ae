"""Statistics as the native layer delivers them, put together."""

from typing import Any

import numpy as np
from oracles.reference import Trace


def collect(llm: Any, tokens: list[int], size: int | None = None) -> Trace:
    """Evaluate a request in pieces of ``size`` tokens and put its ubatches together by position."""
    n_layer, n_embd, size = llm.n_layer, llm.n_embd(), size or len(tokens)
    sums, seen = np.full((3, n_layer, 2, len(tokens)), np.nan), []
    layer_dot, totals = np.full((n_layer, len(tokens)), np.nan), np.zeros((2, n_layer, 2, n_embd))

    def sink(batch: Any) -> None:
        for index, values in enumerate((batch.dot, batch.u_sq, batch.v_sq)):
            assert values.shape == (n_layer, 2, len(batch.positions)) and values.dtype == np.float32
            sums[index][:, :, batch.positions] = values
        assert batch.layer_dot.shape == (n_layer, len(batch.positions)) and batch.layer_dot.dtype == np.float32
        layer_dot[:, batch.positions] = batch.layer_dot
        assert batch.sum_u.shape == (n_layer, 2, n_embd) and batch.sum_u.dtype == np.float32
        totals[:] += batch.sum_u, batch.sum_v
        seen.extend(batch.positions.tolist())

    llm.reset()
    with llm.collect_statistics(sink):
        for start in range(0, len(tokens), size):
            llm.eval(tokens[start : start + size])
    assert seen == list(range(len(tokens))), "each token is delivered exactly once, in order"
    return Trace(np.empty((0, 0)), *sums, layer_dot, *totals)


def copied(batch: Any) -> Any:
    """The activations of a batch, to keep them after the sink returns."""
    return [[None if pair is None else tuple(np.array(x) for x in pair) for pair in row] for row in batch.activations]


def activations_of(llm: Any, prompt: list[int], **options: Any) -> list[tuple[Any, list[int]]]:
    """Activations and positions of every ubatch of a prompt."""
    seen = []
    with llm.collect_statistics(
        lambda batch: seen.append((copied(batch), batch.positions.tolist())), activations=True, **options
    ):
        llm.eval(prompt)
    return seen
