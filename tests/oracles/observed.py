"""Statistics as the native layer delivers them, put together."""

from collections.abc import Callable
from typing import Any

import numpy as np
from oracles.reference import Trace


def collect(llm: Any, tokens: list[int], size: int | None = None) -> Trace:
    """Evaluate a request in pieces of ``size`` tokens and put its ubatches together."""
    batches: list[Any] = []
    size = size or len(tokens)
    llm.reset()
    with llm.collect_statistics(batches.append):
        for start in range(0, len(tokens), size):
            llm.eval(tokens[start : start + size])
    positions = np.concatenate([batch.positions for batch in batches])
    assert positions.tolist() == list(range(len(tokens))), "each token is delivered exactly once, in order"
    names = ("dot", "u_sq", "v_sq", "layer_dot", "sum_u", "sum_v")
    parts = [[getattr(batch, name) for batch in batches] for name in names]
    assert {array.dtype for each in parts for array in each} == {np.dtype(np.float32)}
    figures = [np.concatenate(each, axis=-1, dtype=np.float64) for each in parts[:4]]
    assert figures[0].shape == (llm.n_layer, 2, len(tokens))
    return Trace(np.empty((0, 0)), *figures, *(np.sum(each, axis=0, dtype=np.float64) for each in parts[4:]))


def copied(batch: Any) -> Any:
    """The activations of a batch, to keep them after the sink returns."""
    return [[None if pair is None else tuple(np.array(x) for x in pair) for pair in row] for row in batch.activations]


def activations_of(
    llm: Any, prompt: list[int], evaluate: Callable[[list[int]], object] | None = None, **options: Any
) -> list[tuple[Any, list[int]]]:
    """Activations and positions of every ubatch of a prompt that ``evaluate`` reads; None for ``eval``."""
    seen: list[tuple[Any, list[int]]] = []

    def sink(batch: Any) -> None:
        seen.append((copied(batch), batch.positions.tolist()))

    with llm.collect_statistics(sink, activations=True, **options):
        (evaluate or llm.eval)(prompt)
    return seen
