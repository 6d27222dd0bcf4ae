"""Skipped sublayers in llama.cpp against the NumPy float64 pass of the same tiny model.

Tolerance: stock differs from that pass by 1e-6 to 2e-6, and with flash attention, which rounds to F16 on the CPU, by
1e-3 to 3e-3. The smallest change that a wrong skip or scale makes is above 1e-2.
"""

from typing import Any

import numpy as np
import pytest
from oracles.expected import error_under, split
from oracles.fixtures import Open
from oracles.reference import ReferenceModel
from oracles.skip_sets import same, skip_set
from oracles.tiny_families import tokens

from adaskip_cpp.model.skip_set import SkipSet

TOLERANCE = 5e-6
N_LAYER = 3
SUBLAYERS = [(layer, kind) for layer in range(N_LAYER) for kind in ("attention", "ffn")]


def random_set(seed: int) -> SkipSet:
    """Each sublayer with probability 0.4, with compensations from 0.5 to 2."""
    rng = np.random.default_rng(seed)
    skip = rng.random((N_LAYER, 2)) < 0.4
    skip[rng.integers(N_LAYER), rng.integers(2)] = True
    return SkipSet(skip, np.where(skip, rng.uniform(0.5, 2, skip.shape), 1.0))


EVERY = tuple(range(N_LAYER))
SETS: dict[str, SkipSet | None] = {
    "nothing": None,
    **{f"{kind} {layer}": skip_set(**{kind: (layer,)}) for layer, kind in SUBLAYERS},
    # Not the last FFN: the RMS norm after it takes any factor out of the logits again.
    **{f"{kind} {layer} scaled": skip_set(**{kind: (layer,)}, scale=1.7) for layer, kind in SUBLAYERS[:-1]},
    "nothing again": None,
    **{f"random {seed}": random_set(seed) for seed in range(6)},
    "vectors and maps": skip_set((0, 2), (1, 2), 1.1, seed=0),
    # With all attention gone, the graph's position, mask and KV inputs have no reader left.
    "every attention": skip_set(EVERY, scale=0.9),
    "every FFN": skip_set((), EVERY, 0.9),
    "everything": skip_set(EVERY, EVERY, 0.9),
}
CUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one piece": (40, {}),
    "pieces of 30": (30, {}),
    "pieces of 7": (7, {}),
    "token by token": (1, {}),
    **{f"ubatches of {n}": (40, {"n_ubatch": n}) for n in (1, 7, 16)},
    # The first of them have no output token: there is no row that the last layer could work on.
    "ubatches of which the last is read": (40, {"logits_all": False, "n_ubatch": 8}),
    "flash attention": (7, {"flash_attn": True}),
    # few tokens multiply by V as it is, more by a transposed copy
    **{f"flash attention in prompts, pieces of {n}": (n, {"flash_attn": "prompts"}) for n in (1, 8, 9)},
}


@pytest.mark.parametrize("cut", CUTS)
def test_logits_under_plans_in_turn_are_the_references(cut: str, open_tiny: Open, reference: ReferenceModel) -> None:
    size, options = CUTS[cut]
    llm, found = open_tiny(**options), {}
    for name, chosen in SETS.items():
        llm.set_plan(None if chosen is None else same(chosen))
        found[name] = error_under(llm, reference, chosen, split(tokens(40), size))
    tolerance = 1e-2 if cut == "flash attention" else TOLERANCE
    assert {name: each for name, each in found.items() if each >= tolerance} == {}
