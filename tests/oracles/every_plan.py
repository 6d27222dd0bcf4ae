"""One plan of every kind, for a model of any size: what uploads vectors or maps, changes in decode, or has a bulk."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from adaskip_cpp import SkipPlan
from adaskip_cpp.model.plan import Bulk, OnlineStage
from adaskip_cpp.model.skip_set import SkipSet


def every_plan(n_layer: int, n_embd: int) -> dict[str, SkipPlan | None]:
    """The plans by name, which skip in the last third of the layers, or the last two; in prompts of 4 tokens and more.

    Their online stage adds every FFN after its second token, so that float32 decides nothing.
    """
    rng = np.random.default_rng(0)
    third, thirds = range(n_layer - n_layer // 3, n_layer), range(n_layer - 2 * n_layer // 3, n_layer)

    def skipping(layers: Sequence[int], *, vectors: bool = False, rank: int = 0) -> SkipSet:
        skip = np.isin(np.arange(n_layer), layers)[:, None].repeat(2, axis=1)
        shapes: dict[str, tuple[int, ...]] = {"bias": (n_embd,)} if vectors else {}
        shapes |= {"down": (rank, n_embd), "up": (n_embd, rank)} if rank else {}
        values = {name: rng.normal(0, 0.1, (n_layer, 2, *size)).astype(np.float32) for name, size in shapes.items()}
        return SkipSet(skip, np.full(skip.shape, 0.9), **values)

    none, scaled, more = SkipSet.none(n_layer), skipping(third), skipping(thirds)
    with_maps = skipping(third, vectors=True, rank=2)
    bulk = Bulk(skipping(third, vectors=True, rank=4), head=1, tail=1)
    return {
        "the whole model": None,
        "scales": SkipPlan(scaled, scaled),
        "vectors": SkipPlan(*(skipping(third, vectors=True),) * 2),
        "maps": SkipPlan(with_maps, with_maps),
        "maps of a higher rank": SkipPlan(*(skipping(thirds, rank=8),) * 2),
        "another set in decode": SkipPlan(scaled, skipping(thirds, rank=2)),
        "decode alone": SkipPlan(none, skipping(thirds, vectors=True)),
        "a schedule": SkipPlan(scaled, scaled, schedule=((0, scaled), (1, more))),
        "an online stage": SkipPlan(none, with_maps, online=OnlineStage(window=2, threshold=-1.0, scale="median")),
        "a bulk": SkipPlan(none, none, bulk=bulk),
        "windows in the bulk": SkipPlan(none, none, bulk=replace(bulk, windowed=(0,), window_size=2)),
    }
