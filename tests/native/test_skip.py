"""Skipped sublayers in llama.cpp against the NumPy float64 pass of the same tiny model.

Tolerance: stock itself differs from that pass by 1e-6 to 2e-6 (float32 rounding, see test_reference.py); the smallest
change that a wrong skip or scale makes is above 1e-2.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from oracles.reference import ReferenceModel, ReferenceRun, relative_error
from oracles.stock import EXACT, Job, eval_logits, run_stock

from adaskip_cpp import SkipPlan
from adaskip_cpp.model.skip_set import SkipSet

TOLERANCE = 5e-6
N_LAYER = 3
SUBLAYERS = [(layer, kind) for layer in range(N_LAYER) for kind in ("attention", "ffn")]
SIZES = {"one piece": 40, "pieces of 7": 7, "token by token": 1}
Tiny = Callable[..., Path]
Tokens = Callable[..., list[int]]
Open = Callable[..., Any]

pieces = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())


@pytest.fixture(scope="module")
def reference(tiny: Tiny) -> ReferenceModel:
    """The tiny llama in float64."""
    return ReferenceModel(tiny())


def split(tokens: list[int], size: int) -> list[list[int]]:
    """Cut a prompt into pieces of ``size`` tokens."""
    return [tokens[start : start + size] for start in range(0, len(tokens), size)]


def random_set(seed: int, without: npt.NDArray[np.bool_] | None = None) -> SkipSet:
    """Each sublayer with probability 0.4, with compensations from 0.5 to 2; always those in ``without`` too."""
    rng = np.random.default_rng(seed)
    skip = rng.random((N_LAYER, 2)) < 0.4
    skip[rng.integers(N_LAYER), rng.integers(2)] = True
    if without is not None:
        skip |= without
    return SkipSet(skip, np.where(skip, rng.uniform(0.5, 2, skip.shape), 1.0))


def greedy(llm: Any, prompt: list[int], n: int) -> list[int]:
    """The prompt and n generated tokens; the last of them is not evaluated."""
    return prompt + list(itertools.islice(llm.generate(prompt, temp=0.0), n))


@pieces
def test_without_a_plan_the_logits_are_the_reference(
    size: int, tiny: Tiny, tokens: Tokens, open_model: Open, reference: ReferenceModel
) -> None:
    actual = eval_logits(open_model(tiny()), split(tokens(40), size))
    assert relative_error(actual, ReferenceRun(reference).eval(tokens(40)).logits) < TOLERANCE


@pieces
@pytest.mark.parametrize(("layer", "kind"), SUBLAYERS)
def test_a_skipped_sublayer_leaves_the_residual_stream_alone(
    layer: int, kind: str, size: int, tiny: Tiny, tokens: Tokens, open_model: Open, reference: ReferenceModel
) -> None:
    llm, plan = open_model(tiny()), SkipPlan.manual(N_LAYER, **{kind: [layer]})
    llm.set_plan(plan)
    actual = eval_logits(llm, split(tokens(40), size))
    expected = ReferenceRun(reference).eval(tokens(40), plan.prefill.skip).logits
    assert relative_error(actual, expected) < TOLERANCE


# Not the last FFN: the RMS norm behind it takes any factor out of the logits again.
@pytest.mark.parametrize(("layer", "kind"), SUBLAYERS[:-1])
def test_a_skipped_sublayer_multiplies_the_residual_stream_by_its_compensation(
    layer: int, kind: str, tiny: Tiny, tokens: Tokens, open_model: Open, reference: ReferenceModel
) -> None:
    llm, plan = open_model(tiny()), SkipPlan.manual(N_LAYER, scale=1.7, **{kind: [layer]})
    llm.set_plan(plan)
    actual = eval_logits(llm, [tokens(40)])
    expected = ReferenceRun(reference).eval(tokens(40), plan.prefill.skip, plan.prefill.scale).logits
    assert relative_error(actual, expected) < TOLERANCE


@pieces
@pytest.mark.parametrize("seed", range(6))
def test_random_plans_with_compensation_equal_the_reference(
    seed: int, size: int, tiny: Tiny, tokens: Tokens, open_model: Open, reference: ReferenceModel
) -> None:
    llm, chosen, prompt = open_model(tiny()), random_set(seed), tokens(40, seed)
    llm.set_plan(SkipPlan(chosen, chosen))
    expected = ReferenceRun(reference).eval(prompt, chosen.skip, chosen.scale).logits
    assert relative_error(eval_logits(llm, split(prompt, size)), expected) < TOLERANCE


@pytest.mark.parametrize("n_ubatch", [1, 7, 16])
def test_the_physical_batch_does_not_matter_to_a_plan(
    n_ubatch: int, tiny: Tiny, tokens: Tokens, open_model: Open, reference: ReferenceModel
) -> None:
    llm, chosen = open_model(tiny(), n_ubatch=n_ubatch), random_set(3)
    llm.set_plan(SkipPlan(chosen, chosen))
    expected = ReferenceRun(reference).eval(tokens(40), chosen.skip, chosen.scale).logits
    assert relative_error(eval_logits(llm, [tokens(40)]), expected) < TOLERANCE


@pytest.mark.parametrize(
    "layers",
    [{"attention": range(N_LAYER)}, {"ffn": range(N_LAYER)}, {"attention": range(N_LAYER), "ffn": range(N_LAYER)}],
    ids=["every attention", "every FFN", "everything"],
)
def test_a_plan_may_skip_all_sublayers_of_a_kind(
    layers: dict[str, range], tiny: Tiny, tokens: Tokens, open_model: Open, reference: ReferenceModel
) -> None:
    # With all attention gone, the graph's position, mask and KV inputs have no reader left.
    llm, plan = open_model(tiny()), SkipPlan.manual(N_LAYER, scale=0.9, **layers)
    llm.set_plan(plan)
    actual = eval_logits(llm, [tokens(40)[:30], *split(tokens(40)[30:], 1)])
    expected = ReferenceRun(reference).eval(tokens(40), plan.prefill.skip, plan.prefill.scale).logits
    assert relative_error(actual, expected) < TOLERANCE


@pytest.mark.parametrize("seed", range(4))
def test_generation_skips_the_decode_set_behind_a_prompt_under_the_prefill_set(
    seed: int, tiny: Tiny, tokens: Tokens, open_model: Open, reference: ReferenceModel
) -> None:
    # The logits of the prompt's positions belong to the prefill set, those of generated tokens to the decode set.
    llm, prefill, prompt = open_model(tiny()), random_set(seed), tokens(20, seed)
    decode = random_set(seed + 100, without=prefill.skip)
    llm.set_plan(SkipPlan(prefill, decode))
    sequence = greedy(llm, prompt, 12)
    actual, run = np.array(llm.scores[: llm.n_tokens]), ReferenceRun(reference)
    expected = [run.eval(prompt, prefill.skip, prefill.scale).logits]
    expected += [run.eval([token], decode.skip, decode.scale).logits for token in sequence[20 : llm.n_tokens]]
    assert llm.n_tokens == 31
    assert relative_error(actual, np.concatenate(expected)) < TOLERANCE


def test_a_prompt_of_one_token_is_prefill(
    tiny: Tiny, tokens: Tokens, open_model: Open, reference: ReferenceModel
) -> None:
    llm, plan = open_model(tiny()), SkipPlan.manual(N_LAYER, ffn=[1], phase="decode")
    llm.set_plan(plan)
    sequence = greedy(llm, [1], 3)
    run = ReferenceRun(reference)
    expected = [run.eval([1]).logits] + [run.eval([token], plan.decode.skip).logits for token in sequence[1:3]]
    assert relative_error(llm.scores[:3], np.concatenate(expected)) < TOLERANCE


def test_the_plan_can_be_switched_and_cleared(
    tiny: Tiny, tokens: Tokens, open_model: Open, reference: ReferenceModel
) -> None:
    llm = open_model(tiny())
    for chosen in (random_set(1), None, random_set(2), random_set(1), None):
        llm.set_plan(None if chosen is None else SkipPlan(chosen, chosen))
        skip, scale = (None, None) if chosen is None else (chosen.skip, chosen.scale)
        expected = ReferenceRun(reference).eval(tokens(40), skip, scale).logits
        assert relative_error(eval_logits(llm, split(tokens(40), 30)), expected) < TOLERANCE


def test_a_prompt_after_decode_only_skipping_reads_no_kv_holes(
    tiny: Tiny, tokens: Tokens, open_model: Open, reference: ReferenceModel
) -> None:
    # A chat's next turn repeats the generated tokens, whose K and V are missing in the skipped layers.
    llm = open_model(tiny())
    llm.set_plan(SkipPlan.manual(N_LAYER, attention=[0, 2], phase="decode"))
    turn = greedy(llm, tokens(20), 8) + tokens(10, seed=5)[1:]
    next(llm.generate(turn, temp=0.0))
    expected = ReferenceRun(reference).eval(turn).logits
    assert relative_error(llm.scores[len(turn) - 1 : len(turn)], expected[-1:]) < TOLERANCE


@pytest.mark.parametrize("seed", range(3))
def test_flash_attention_gives_the_plan_of_the_reference(
    seed: int, tiny: Tiny, tokens: Tokens, open_model: Open, reference: ReferenceModel
) -> None:
    # ggml's CPU flash attention rounds to F16 inside: stock is off by 1e-3 to 3e-3 here, a wrong skip by far more.
    llm, chosen, prompt = open_model(tiny(), flash_attn=True), random_set(seed), tokens(40, seed)
    llm.set_plan(SkipPlan(chosen, chosen))
    expected = ReferenceRun(reference).eval(prompt, chosen.skip, chosen.scale).logits
    assert relative_error(eval_logits(llm, [prompt[:30], *split(prompt[30:], 1)]), expected) < 1e-2


def test_with_flash_attention_each_skipped_sublayer_equals_stock_on_the_zeroed_model(
    tiny: Tiny, tokens: Tokens, open_model: Open
) -> None:
    # Bit for bit: x + 0 is x, and everything else is the same computation.
    options = {"n_ctx": 128, "logits_all": True, **EXACT, "flash_attn": True}
    cut = [tokens(40)[:30], *split(tokens(40)[30:], 1)]
    expected = run_stock([Job(str(tiny(zero=[sublayer])), cut, options) for sublayer in SUBLAYERS])
    llm = open_model(tiny(), flash_attn=True)
    for (layer, kind), logits in zip(SUBLAYERS, expected, strict=True):
        llm.set_plan(SkipPlan.manual(N_LAYER, **{kind: [layer]}))
        np.testing.assert_array_equal(eval_logits(llm, cut), logits)
