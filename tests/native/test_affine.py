"""Compensation with a vector, v := s * u + b, against NumPy passes, on every architecture, and what it costs.

Tolerances: those of test_skip.py for the NumPy float64 pass; vectors are about as large as the residual stream, so a
wrong, missing or misplaced one changes the logits by more than 0.1.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from oracles.bare_plan import bare_plan
from oracles.reference import ReferenceModel, ReferenceRun, relative_error
from oracles.reference_parallel import eval_parallel
from oracles.stock import eval_logits
from oracles.tiny_families import FAMILIES, N_EMBD, N_LAYER, SKIPPABLE

from adaskip_cpp import SkipPlan
from adaskip_cpp.errors import CompensationError, NativeError
from adaskip_cpp.model.plan import OnlineStage
from adaskip_cpp.model.skip_set import SkipSet

TOLERANCE = 5e-6
SUBLAYERS = [(layer, kind) for layer in range(N_LAYER) for kind in (0, 1)]
Tiny = Callable[..., Path]
Tokens = Callable[..., list[int]]
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def reference(tiny: Tiny) -> ReferenceModel:
    return ReferenceModel(tiny())


def vectors(seed: int = 0, n_layer: int = N_LAYER) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 0.5, (n_layer, 2, N_EMBD)).astype(np.float32)


def only(*sublayers: tuple[int, int], n_layer: int = N_LAYER) -> npt.NDArray[np.bool_]:
    skip = np.zeros((n_layer, 2), np.bool_)
    for layer, kind in sublayers:
        skip[layer, kind] = True
    return skip


def random_set(seed: int, without: npt.NDArray[np.bool_] | None = None) -> SkipSet:
    """Each sublayer with probability 0.4, scales from 0.5 to 2 or 1, and vectors; always those in ``without`` too."""
    rng = np.random.default_rng(seed)
    skip = rng.random((N_LAYER, 2)) < 0.4
    skip[rng.integers(N_LAYER), rng.integers(2)] = True
    if without is not None:
        skip |= without
    scale = np.where(rng.random(skip.shape) < 0.3, 1.0, rng.uniform(0.5, 2, skip.shape))
    return SkipSet(skip, scale, vectors(seed))


def same(chosen: SkipSet) -> SkipPlan:
    return SkipPlan(chosen, chosen)


# -- the result ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1.3])
@pytest.mark.parametrize(("layer", "kind"), SUBLAYERS)
def test_each_sublayer_can_be_replaced_by_a_scale_and_a_vector(
    layer: int, kind: int, scale: float, tiny: Tiny, tokens: Tokens, open_model: Open, reference: ReferenceModel
) -> None:
    chosen = SkipSet(only((layer, kind)), np.full((N_LAYER, 2), scale), vectors())
    llm = open_model(tiny())
    llm.set_plan(same(chosen))
    expected = ReferenceRun(reference).eval(tokens(40), chosen.skip, chosen.scale, chosen.bias).logits
    pieces = [tokens(40)[:30], *([token] for token in tokens(40)[30:])]
    assert relative_error(eval_logits(llm, pieces), expected) < TOLERANCE
    plain = ReferenceRun(reference).eval(tokens(40), chosen.skip, chosen.scale).logits
    assert relative_error(plain, expected) > 0.1, "the vector matters"


@pytest.mark.parametrize("seed", range(8))
def test_prefill_and_decode_have_vectors_of_their_own(
    seed: int, tiny: Tiny, tokens: Tokens, open_model: Open, reference: ReferenceModel
) -> None:
    prefill = random_set(seed)
    decode = random_set(seed + 100, without=prefill.skip)
    llm, run = open_model(tiny()), ReferenceRun(reference)
    llm.set_plan(SkipPlan(prefill, decode))
    generated = list(itertools.islice(llm.generate(tokens(20), temp=0.0), 10))
    rows = [run.eval(tokens(20), prefill.skip, prefill.scale, prefill.bias).logits]
    rows += [run.eval([token], decode.skip, decode.scale, decode.bias).logits for token in generated[:-1]]
    assert relative_error(llm.scores[: llm.n_tokens], np.concatenate(rows)) < TOLERANCE


def test_a_schedule_and_the_online_stage_keep_the_vectors_of_the_decode_set(
    tiny: Tiny, tokens: Tokens, open_model: Open, reference: ReferenceModel
) -> None:
    first = SkipSet(only((1, 1)), np.full((N_LAYER, 2), 0.9), vectors(1))
    second = SkipSet(only((1, 1), (2, 0)), np.full((N_LAYER, 2), 1.1), vectors(2))
    scheduled = SkipPlan(first, first, schedule=((0, first), (3, second)))
    online = SkipPlan(first, first, online=OnlineStage(window=3, threshold=-1.0, scale="none"))
    grown = SkipSet(only((0, 1), (1, 1), (2, 1)), [[1, 1], [1, 0.9], [1, 1]], first.bias * only((1, 1))[..., None])
    for plan, later in ((scheduled, second), (online, grown)):
        llm, run = open_model(tiny()), ReferenceRun(reference)
        llm.set_plan(plan)
        generated = list(itertools.islice(llm.generate(tokens(20), temp=0.0), 9))
        rows = [run.eval(tokens(20), first.skip, first.scale, first.bias).logits]
        for i, token in enumerate(generated[:-1]):
            chosen = first if i < 3 else later
            rows.append(run.eval([token], chosen.skip, chosen.scale, chosen.bias).logits)
        assert relative_error(llm.scores[: llm.n_tokens], np.concatenate(rows)) < TOLERANCE


@pytest.mark.parametrize(
    "skipped", [[(0, 0)], [(1, 1)], [(1, 0), (1, 1)], [(2, 0), (2, 1)], SUBLAYERS], ids=lambda s: str(len(s))
)
def test_in_parallel_blocks_the_vectors_stand_in_the_chain(
    skipped: list[tuple[int, int]], tiny: Tiny, tokens: Tokens, open_model: Open
) -> None:
    # Stock's F16 table of GELU alone puts the logits 5e-4 off, see test_reference.py.
    path, scale = tiny("gptneox-parallel"), np.linspace(0.7, 1.4, 6).reshape(3, 2)
    chosen = SkipSet(only(*skipped), scale, vectors())
    llm = open_model(path)
    llm.set_plan(same(chosen))
    expected = eval_parallel(path, tokens(40), chosen.skip, chosen.scale, chosen.bias).logits
    assert relative_error(eval_logits(llm, [tokens(40)]), expected) < 2e-3


@pytest.mark.parametrize("name", SKIPPABLE)
def test_on_every_architecture_a_skipped_layer_maps_the_sum_of_its_inputs_as_by_hand(
    name: str, tiny: Tiny, tokens: Tokens, open_model: Open
) -> None:
    # Layer 1 is skipped whole: what layer 2 reads is s1 (s0 x + b0) + b1 of what layer 0 wrote, and so are the sums.
    n_layer = FAMILIES[name].n_layer
    scale, bias = np.ones((n_layer, 2)), vectors(3, n_layer)
    scale[1] = 0.8, 1.5
    llm, seen = open_model(tiny(name)), []
    llm.set_plan(same(SkipSet(only((1, 0), (1, 1), n_layer=n_layer), scale, bias)))
    with llm.collect_statistics(seen.append):
        llm.eval(tokens(30))
    (batch,) = seen
    assert np.isnan(batch.sum_u[1]).all() and np.isnan(batch.sum_v[1]).all()
    attention = 0.8 * batch.sum_v[0, 1].astype(np.float64) + 30 * bias[1, 0]
    np.testing.assert_allclose(batch.sum_u[2, 0], 1.5 * attention + 30 * bias[1, 1], rtol=1e-4, atol=1e-3)


# -- what it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "kind"), SUBLAYERS)
def test_a_scale_is_one_node_and_a_vector_is_one_node(
    layer: int, kind: int, tiny: Tiny, tokens: Tokens, open_model: Open
) -> None:
    llm = open_model(tiny())
    nodes = {}
    for scale in (1.0, 1.3):
        for bias in (None, vectors()):
            llm.reset()
            llm.set_plan(same(SkipSet(only((layer, kind)), np.full((N_LAYER, 2), scale), bias)))
            llm.eval(tokens(5))
            nodes[scale, bias is not None] = llm.counters.nodes
    assert nodes[1.0, False] < llm.counters.nodes_full
    assert nodes[1.0, True] == nodes[1.3, False] == nodes[1.0, False] + 1
    assert nodes[1.3, True] == nodes[1.0, False] + 2


def test_vectors_let_the_graph_be_reused_on_every_token_and_nothing_is_copied(
    tiny: Tiny, tokens: Tokens, open_model: Open
) -> None:
    llm = open_model(tiny())
    llm.set_plan(same(random_set(1)))
    steps = llm.generate(tokens(20), temp=0.0)
    next(steps)
    next(steps)
    before = llm.counters
    for _ in range(20):
        next(steps)
    assert llm.counters.graphs_built == before.graphs_built
    assert llm.counters.graphs_reused == before.graphs_reused + 20
    assert llm.counters.statistics_bytes == 0


def test_the_plan_owns_its_vectors(tiny: Tiny, tokens: Tokens, open_model: Open, reference: ReferenceModel) -> None:
    # What the caller does to its array afterwards does not matter.
    chosen = random_set(2)
    native = SimpleNamespace(skip=chosen.skip, scale=chosen.scale, bias=np.array(chosen.bias), down=None, up=None)
    llm = open_model(tiny())
    llm._adaskip.set_plan(bare_plan(native), 0)
    native.bias[:] = np.nan
    expected = ReferenceRun(reference).eval(tokens(40), chosen.skip, chosen.scale, chosen.bias).logits
    assert relative_error(eval_logits(llm, [tokens(40)]), expected) < TOLERANCE


def test_vectors_outlive_two_hundred_changes_of_plan(
    tiny: Tiny, tokens: Tokens, open_model: Open, reference: ReferenceModel
) -> None:
    # Each plan frees the vectors of the one before.
    llm = open_model(tiny())
    for i in range(200):
        rng = np.random.default_rng(i)
        skip = only((int(rng.integers(3)), 1), (int(rng.integers(3)), 1))
        chosen = SkipSet(skip, rng.uniform(0.8, 1.2, (N_LAYER, 2)), vectors(i) if i % 3 else None)
        llm.set_plan(None if i % 7 == 0 else same(chosen))
        arguments = () if i % 7 == 0 else (chosen.skip, chosen.scale, chosen.bias)
        expected = ReferenceRun(reference).eval(tokens(5), *arguments).logits
        assert relative_error(eval_logits(llm, [tokens(5)]), expected) < TOLERANCE


def test_a_model_closed_with_vectors_in_force_closes(tiny: Tiny, tokens: Tokens, open_model: Open) -> None:
    for _ in range(5):
        llm = open_model(tiny())
        llm.set_plan(same(random_set(3)))
        llm.eval(tokens(5))
        llm.close()


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_vector_that_is_not_finite_is_refused_and_the_plan_in_force_stays(
    value: float, tiny: Tiny, tokens: Tokens, open_model: Open, reference: ReferenceModel
) -> None:
    chosen, llm = random_set(4), open_model(tiny())
    llm.set_plan(same(chosen))
    bad = np.array(chosen.bias)
    layer, kind = np.argwhere(chosen.skip)[0]
    bad[layer, kind, 5] = value
    wrong = SimpleNamespace(skip=chosen.skip, scale=chosen.scale, bias=bad, down=None, up=None)
    for plan in (bare_plan(wrong, (0, chosen)), bare_plan(chosen, (0, wrong))):
        with pytest.raises(CompensationError, match="not finite"):
            llm._adaskip.set_plan(plan, 2)
    expected = ReferenceRun(reference).eval(tokens(40), chosen.skip, chosen.scale, chosen.bias).logits
    assert relative_error(eval_logits(llm, [tokens(40)]), expected) < TOLERANCE


def test_values_of_sublayers_that_run_are_not_read(tiny: Tiny, tokens: Tokens, open_model: Open) -> None:
    bias = vectors()
    bias[0] = np.nan
    llm = open_model(tiny())
    chosen = SimpleNamespace(skip=only((1, 1)), scale=np.ones((N_LAYER, 2)), bias=bias, down=None, up=None)
    llm._adaskip.set_plan(bare_plan(chosen), 0)
    llm.eval(tokens(5))
    assert np.isfinite(llm.scores[:5]).all()


@pytest.mark.parametrize("n_embd", [N_EMBD - 1, N_EMBD + 1, 1, 0])
def test_vectors_of_another_length_are_refused(n_embd: int, tiny: Tiny, tokens: Tokens, open_model: Open) -> None:
    llm = open_model(tiny())
    with pytest.raises(NativeError, match="vectors have"):
        bias = np.zeros((N_LAYER, 2, n_embd), np.float32)
        chosen = SimpleNamespace(skip=only((1, 1)), scale=np.ones((N_LAYER, 2)), bias=bias, down=None, up=None)
        llm._adaskip.set_plan(bare_plan(chosen), 0)
    llm.eval(tokens(5))


def test_a_plan_with_vectors_of_another_length_is_refused_as_a_plan(tiny: Tiny, open_model: Open) -> None:
    # It can be made without a model, so this is the user's mistake and no bug to report.
    llm = open_model(tiny())
    bias = np.zeros((N_LAYER, 2, 32), np.float32)
    with pytest.raises(ValueError, match="32 values"):
        llm.set_plan(same(SkipSet(only((1, 1)), np.ones((N_LAYER, 2)), bias)))
    assert llm.plan is None
