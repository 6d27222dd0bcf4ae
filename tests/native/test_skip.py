"""Skipped sublayers in llama.cpp against the NumPy float64 pass of the same tiny model.

Tolerance: stock itself differs from that pass by 1e-6 to 2e-6 (float32 rounding, see test_reference.py); the smallest
change that a wrong skip or scale makes is above 1e-2.
"""

from typing import Any

import numpy as np
import pytest
from oracles.expected import error_under, split
from oracles.fixtures import Open, Tiny
from oracles.reference import ReferenceModel
from oracles.skip_sets import same, skip_set
from oracles.stock import EXACT, Job, eval_logits, run_stock
from oracles.tiny_families import tokens

from adaskip_cpp import SkipPlan
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
}


@pytest.mark.parametrize("cut", CUTS)
def test_logits_under_one_plan_after_another_are_the_references(
    cut: str, open_tiny: Open, reference: ReferenceModel
) -> None:
    size, options = CUTS[cut]
    llm, found = open_tiny(**options), {}
    for name, chosen in SETS.items():
        llm.set_plan(None if chosen is None else same(chosen))
        found[name] = error_under(llm, reference, chosen, split(tokens(40), size))
    assert {name: each for name, each in found.items() if each >= TOLERANCE} == {}


def test_flash_attention_gives_the_plan_of_the_reference(open_tiny: Open, reference: ReferenceModel) -> None:
    # ggml's CPU flash attention rounds to F16 inside: stock is off by 1e-3 to 3e-3 here, a wrong skip by far more.
    llm = open_tiny(flash_attn=True)
    for seed in range(3):
        chosen, prompt = random_set(seed), tokens(40, seed)
        llm.set_plan(same(chosen))
        assert error_under(llm, reference, chosen, [prompt[:30], *split(prompt[30:], 1)]) < 1e-2


def test_with_flash_attention_each_skipped_sublayer_equals_stock_on_the_zeroed_model(
    tiny: Tiny, open_tiny: Open
) -> None:
    # Bit for bit: x + 0 is x, and everything else is the same computation.
    options = {"n_ctx": 128, "logits_all": True, **EXACT, "flash_attn": True}
    cut = [tokens(40)[:30], *split(tokens(40)[30:], 1)]
    expected = run_stock([Job(str(tiny(zero=[sublayer])), cut, options) for sublayer in SUBLAYERS])
    llm = open_tiny(flash_attn=True)
    for (layer, kind), logits in zip(SUBLAYERS, expected, strict=True):
        llm.set_plan(SkipPlan.manual(N_LAYER, **{kind: [layer]}))
        np.testing.assert_array_equal(eval_logits(llm, cut), logits)
