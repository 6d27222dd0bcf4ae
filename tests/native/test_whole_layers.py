"""One map for a layer that is skipped whole, from calibration to the logits, against a NumPy pass.

Tolerances are those of test_bulk.py: float32 against float64, and tables of GELU in F16.
"""

from collections.abc import Callable
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

N_LAYER, RANK, HEAD, TAIL, N_PROMPT = 3, 6, 4, 8, 50
AROUND: dict[str, dict[str, int]] = {"prompt": {"tail": TAIL}, "prefill": {}}
CHOSEN: dict[str, Any] = {"attention": (0, 1), "ffn": (1, 2)}
"""Of layer 0, which has no maps, the attention alone, layer 1 whole, of layer 2 the FFN alone."""


@pytest.fixture
def learned(open_tiny: Open) -> Callable[[str], tuple[Any, Profile]]:
    def learn(name: str) -> tuple[Any, Profile]:
        llm = open_tiny(name)
        requests = [tokens(60, seed) for seed in range(3)]
        return llm, adaskip_cpp.calibrate(llm, requests, rank=RANK, n_decode=2, cost=False)

    return learn


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


@pytest.mark.parametrize("mode", ["prefill", "decode", "e2e", "prompt"])
def test_a_plan_has_one_map_of_it_and_what_is_skipped_alone_its_own(
    mode: Any, learned: Callable[[str], tuple[Any, Profile]]
) -> None:
    _, profile = learned("llama")
    plan = profile.plan(strategy="manual", mode=mode, **CHOSEN)
    found = {"prompt": plan.skipped("bulk"), "decode": plan.decode}.get(mode, plan.prefill)
    assert plan.compensation == "linear"
    for name, expected in standing_in(profile).items():
        np.testing.assert_array_equal(getattr(found, name), expected)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gptneox-parallel"])
def test_a_prompt_under_it_is_that_of_numpy(
    name: str, numpy_model: Open, learned: Callable[[str], tuple[Any, Profile]]
) -> None:
    """In parallel blocks it maps what both read."""
    llm, profile = learned(name)
    prompt, arrays = tokens(N_PROMPT, 9), standing_in(profile)
    bulk = {**arrays, "keeps_kv": True}
    pieces: dict[str, list[tuple[list[int], dict[str, Any]]]] = {
        "prefill": [(prompt, arrays)],
        "prompt": [(prompt[:HEAD], {}), (prompt[HEAD:-TAIL], bulk), (prompt[-TAIL:], {})],
    }
    for mode, parts in pieces.items():
        llm.set_plan(profile.plan(strategy="manual", mode=mode, **AROUND[mode], **CHOSEN))
        llm.reset()
        llm.eval(prompt)
        run = ReferenceRun(numpy_model(name))
        expected = np.concatenate([run.eval(piece, **under).logits for piece, under in parts])
        assert relative_error(llm.scores[:N_PROMPT], expected) < TOLERANCE[name], mode


def test_in_parallel_blocks_it_is_fitted_on_the_layers_output(
    numpy_model: Open, learned: Callable[[str], tuple[Any, Profile]]
) -> None:
    """Of a layer that is skipped whole it leaves less error than keeping the stream, or its FFN's map, does."""
    _, profile = learned("gptneox-parallel")
    maps = profile.maps
    assert maps is not None
    seen = ReferenceRun(numpy_model("gptneox-parallel")).eval(tokens(60, 1))
    assert seen.u is not None and seen.v is not None
    for layer in range(1, N_LAYER):
        u, v = seen.u[layer, 0, 1:], seen.v[layer, 1, 1:]
        mapped = {kind: u + u @ maps.down[layer, kind].T @ maps.up[layer, kind].T for kind in (WHOLE, 1)}
        left = {kind: np.linalg.norm(each - v) for kind, each in mapped.items()}
        assert left[WHOLE] < 0.95 * min(np.linalg.norm(u - v), left[1])
