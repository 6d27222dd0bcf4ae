"""What is told of each sublayer: which ones have the same shape, and which attentions look back through a window."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from oracles.fixtures import Open, Tiny
from oracles.tiny_families import FAMILIES, N_EMBD, N_HEAD, Family
from oracles.tiny_models import write_model

SLIDING = {
    "gemma2": [8, 0, 8, 0],
    "gemma3": [8, 0, 8],
    "gemma3n": [0 if layer % 5 == 4 else 8 for layer in range(24)],
    "gemma4": [8, 0, 8, 0],
    "gemma4-per-layer": [8, 0, 8, 0],
}


@pytest.mark.parametrize("name", FAMILIES)
def test_windows_and_shapes_are_those_of_the_architecture_and_the_file(name: str, tiny: Tiny, open_tiny: Open) -> None:
    tensors: dict[int, set[Any]] = {}
    for tensor in GGUFReader(tiny(name)).tensors:
        if tensor.name.startswith("blk."):
            _, layer, stem = tensor.name.split(".", 2)
            tensors.setdefault(int(layer), set()).add((stem, tuple(tensor.shape), int(tensor.tensor_type)))
    every = open_tiny(name).sublayers
    assert [row.window for row in every[::2]] == SLIDING.get(name, [0] * (len(every) // 2))
    assert not any(row.window for row in every[1::2])
    assert all((row.shape >= 0) == row.in_bulk for row in every), "what is not found has no shape"
    if name.startswith("gemma4"):
        # Layers 2 and 3 read the KV of 0 and 1, and compute no K and V, although the file has weights for them.
        assert len({row.shape for row in every[::2]}) == 4
    rows = [row for row in every if row.skippable]
    for row in rows:
        for other in rows:
            alike = (row.kind, row.window) == (other.kind, other.window) and tensors[row.layer] == tensors[other.layer]
            if alike or row.kind != other.kind or row.window != other.window:
                assert (row.shape == other.shape) == alike, (row, other)


class Deci(Family):
    """Layers with 2, 1 and 2 KV heads, and FFNs of 96, 96 and 64."""

    def _layer(self, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        n_kv, n_ff = self.metadata["attention.head_count_kv"][layer], self.metadata["feed_forward_length"][layer]
        yield from self._norm("attn_norm", N_EMBD)
        yield from self._norm("ffn_norm", N_EMBD)
        for name, size in (("attn_q", N_EMBD), ("attn_k", 16 * n_kv), ("attn_v", 16 * n_kv), ("attn_output", N_EMBD)):
            yield f"{name}.weight", (size, N_EMBD)
        for name, shape in (("gate", (n_ff, N_EMBD)), ("up", (n_ff, N_EMBD)), ("down", (N_EMBD, n_ff))):
            yield f"ffn_{name}.weight", shape


def test_layers_of_other_sizes_have_other_shapes(tmp_path: Path, open_model: Open) -> None:
    sizes = {
        "attention.head_count": [N_HEAD] * 3,
        "attention.head_count_kv": [2, 1, 2],
        "feed_forward_length": [96, 96, 64],
    }
    rows = open_model(write_model(tmp_path / "deci.gguf", Deci("deci", metadata=sizes), n_layer=3)).sublayers
    assert all(row.skippable for row in rows)
    a, b, c = (row.shape for row in rows[::2])
    assert a == c != b
    a, b, c = (row.shape for row in rows[1::2])
    assert a == b != c
    assert not {row.shape for row in rows[::2]} & {row.shape for row in rows[1::2]}
