"""One map for a layer that is skipped whole, from calibration to the logits, against NumPy as in test_bulk.py."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from oracles.bulks import TOLERANCE
from oracles.fixtures import Open
from oracles.reference import ReferenceRun, relative_error
from oracles.tiny_families import tokens

import adaskip_cpp
from adaskip_cpp import Profile
from adaskip_cpp.model.statistics import WHOLE, map_scale

HEAD, TAIL, N_PROMPT = 4, 8, 50
CHOSEN: dict[str, Any] = {"attention": (0, 1), "ffn": (1, 2)}
"""Of layer 0, which has no maps, the attention alone, layer 1 whole, of layer 2 the FFN alone."""


def standing_in(profile: Profile) -> dict[str, Any]:
    """What must stand in for :data:`CHOSEN`, as the arrays of ``ReferenceRun.eval``."""
    maps, mean_u, mean_v = profile.maps, profile.prefill.mean_u, profile.prefill.mean_v
    assert maps is not None and mean_u is not None and mean_v is not None
    assert maps.fitted.tolist() == [[False] * 3, [True] * 3, [True] * 3]
    skip = np.array([[True, False], [True, True], [False, True]])
    scale = np.where(skip, map_scale(profile.prefill.median_ratio), 1)
    scale[0, 0], scale[1] = profile.prefill.median_ratio[0, 0], 1
    bias = np.zeros_like(mean_u)
    bias[0, 0] = mean_v[0, 0] - scale[0, 0] * mean_u[0, 0].astype(np.float64)
    arrays: dict[str, Any] = {"skip": skip, "scale": scale, "bias": bias}
    for name, each in (("down", maps.down), ("up", maps.up)):
        nothing = np.zeros_like(each[1, 0])
        arrays[name] = np.stack([[nothing, nothing], [nothing, each[1, WHOLE]], [nothing, each[2, 1]]])
    return arrays


@pytest.mark.parametrize("name", ["llama", "gemma3", "gptneox-parallel"])
def test_a_prompt_is_that_of_numpy(name: str, numpy_model: Open, open_tiny: Open) -> None:
    """In parallel blocks it maps what both read."""
    llm, requests = open_tiny(name), [tokens(60, seed) for seed in range(3)]
    profile = adaskip_cpp.calibrate(llm, requests, rank=6, n_decode=2, cost=False)
    prompt, arrays = tokens(N_PROMPT, 9), standing_in(profile)
    bulk = {**arrays, "keeps_kv": True}
    modes: dict[Any, tuple[dict[str, int], list[tuple[list[int], dict[str, Any]]]]] = {
        "prefill": ({}, [(prompt, arrays)]),
        "prompt": ({"tail": TAIL}, [(prompt[:HEAD], {}), (prompt[HEAD:-TAIL], bulk), (prompt[-TAIL:], {})]),
    }
    for mode, (around, parts) in modes.items():
        plan = profile.plan(strategy="manual", mode=mode, **around, **CHOSEN)
        llm.set_plan(plan if plan.bulk is None else replace(plan, bulk=replace(plan.bulk, refit=0)))
        llm.reset()
        llm.eval(prompt)
        run = ReferenceRun(numpy_model(name))
        expected = np.concatenate([run.eval(piece, **under).logits for piece, under in parts])
        assert relative_error(llm.scores[:N_PROMPT], expected) < TOLERANCE[name], mode
