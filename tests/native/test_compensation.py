"""What stands in for a skipped sublayer, v := s u + b + up (down u), against NumPy passes, and what it costs.

Tolerances: those of test_skip.py for the NumPy float64 pass. Vectors are about as large as the residual stream, and
maps add about half of it, so a wrong, missing, transposed or misplaced one changes the logits by more than 0.1.
"""

import platform
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType
from oracles.bare_plan import bare_plan
from oracles.expected import error, error_under, generated, history_of, split
from oracles.fixtures import Open, Tiny
from oracles.observed import activations_of
from oracles.reference import ReferenceModel, ReferenceRun, relative_error, write_dequantised
from oracles.reference_parallel import eval_parallel
from oracles.skip_sets import arguments, only, same
from oracles.stock import eval_logits
from oracles.tiny_families import FAMILIES, N_EMBD, N_LAYER, SKIPPABLE, tokens

from adaskip_cpp import SkipPlan
from adaskip_cpp.errors import CompensationError, NativeError, PlanError
from adaskip_cpp.model.plan import OnlineStage
from adaskip_cpp.model.skip_set import SkipSet

TOLERANCE = 5e-6
SUBLAYERS = [(layer, kind) for layer in range(N_LAYER) for kind in (0, 1)]
PARTS = ("bias", "down", "up")
KINDS = {"vector": PARTS[:1], "map": PARTS[1:], "vector and map": PARTS}


def filled(
    skip: npt.NDArray[np.bool_], seed: int = 0, scale: Any = 1.0, rank: int = 5, parts: tuple[str, ...] = PARTS
) -> SkipSet:
    """A set with vectors and maps of random values, or one of both."""
    rng, n_layer = np.random.default_rng(seed), len(skip)
    values = {
        "bias": rng.normal(0, 0.5, (n_layer, 2, N_EMBD)).astype(np.float32),
        "down": (rng.normal(size=(n_layer, 2, rank, N_EMBD)) / np.sqrt(N_EMBD)).astype(np.float32),
        "up": (0.5 * rng.normal(size=(n_layer, 2, N_EMBD, rank)) / np.sqrt(rank)).astype(np.float32),
    }
    return SkipSet(skip, np.broadcast_to(scale, skip.shape), **{name: values[name] for name in parts})


def random_set(seed: int, without: npt.NDArray[np.bool_] | None = None, parts: tuple[str, ...] = PARTS) -> SkipSet:
    """Each sublayer with probability 0.4, maps of rank 1 to 8, scales of 1 or not; always those in ``without`` too."""
    rng = np.random.default_rng(seed)
    skip = rng.random((N_LAYER, 2)) < 0.4
    skip[rng.integers(N_LAYER), rng.integers(2)] = True
    if without is not None:
        skip |= without
    scale = np.where(rng.random(skip.shape) < 0.5, 1.0, rng.uniform(0.5, 1.5, skip.shape))
    return filled(skip, seed, scale, int(rng.integers(1, 9)), parts)


def native(chosen: SkipSet, **changes: Any) -> SimpleNamespace:
    """A set as the C ABI takes it, in which nothing was checked."""
    given = dict(zip(("skip", "scale", *PARTS), arguments(chosen), strict=True))
    return SimpleNamespace(**{**given, **changes})


def copies(chosen: SkipSet) -> SimpleNamespace:
    return native(chosen, **{name: np.array(getattr(chosen, name)) for name in PARTS})


# -- the result ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sublayer", SUBLAYERS, ids=str)
def test_each_sublayer_can_be_replaced(
    sublayer: tuple[int, int], kind: str, open_tiny: Open, reference: ReferenceModel
) -> None:
    llm = open_tiny()
    for scale in (1.0, 1.3):
        chosen = filled(only(sublayer), scale=scale, parts=KINDS[kind])
        llm.set_plan(same(chosen))
        pieces = [tokens(40)[:30], *split(tokens(40)[30:], 1)]
        assert error_under(llm, reference, chosen, pieces) < TOLERANCE
        bare = SkipSet(chosen.skip, chosen.scale)
        assert error_under(llm, reference, bare, pieces) > 0.1, "what stands in matters"


@pytest.mark.parametrize("rank", [1, 2, 31, N_EMBD, 2 * N_EMBD])
def test_any_rank_will_do(rank: int, open_tiny: Open, reference: ReferenceModel) -> None:
    chosen = filled(only((0, 1), (2, 0)), rank=rank)
    llm = open_tiny(under=same(chosen))
    assert error_under(llm, reference, chosen, [tokens(40)]) < TOLERANCE


@pytest.mark.parametrize("options", [{"n_batch": 7}, {"n_ubatch": 8}, {"logits_all": False, "n_ubatch": 8}], ids=str)
def test_a_prompt_in_pieces_gives_the_same_logits(
    options: dict[str, Any], open_tiny: Open, reference: ReferenceModel
) -> None:
    # The first ubatches of the last case have no output token: the last layer's map then has no row to work on.
    chosen = filled(only((0, 0), (1, 1), (2, 0), (2, 1)), scale=1.1)
    llm = open_tiny(**options, under=same(chosen))
    assert error_under(llm, reference, chosen, [tokens(40)]) < TOLERANCE


@pytest.mark.parametrize("kind", [*KINDS, "scale alone"])
def test_prefill_and_decode_have_sets_of_their_own(kind: str, open_tiny: Open, reference: ReferenceModel) -> None:
    # The logits of the prompt's positions belong to the prefill set, those of generated tokens to the decode set.
    llm, parts = open_tiny(), KINDS.get(kind, ())
    for seed in range(4):
        prefill = random_set(seed, parts=parts)
        decode = random_set(seed + 100, without=prefill.skip, parts=PARTS if seed % 2 and parts else parts)
        run = ReferenceRun(reference)
        llm.set_plan(SkipPlan(prefill, decode))
        llm.reset()
        answer = generated(llm, history_of(reference, SkipPlan(prefill, decode)), tokens(20), 10)
        rows = [run.eval(tokens(20), *arguments(prefill)).logits]
        rows += [run.eval([token], *arguments(decode)).logits for token in answer[:-1]]
        assert relative_error(llm.scores[: llm.n_tokens], np.concatenate(rows)) < TOLERANCE


BARE = SkipSet(only((1, 1)), np.full((N_LAYER, 2), 0.9))
VECTOR = filled(only((1, 1)), 1, 0.9, parts=("bias",))
GROWING = {
    "vectors": (VECTOR, VECTOR, filled(only((1, 1), (2, 0)), 2, 1.1, parts=("bias",))),
    "maps after none": (BARE, filled(only((1, 1), (2, 0)), 1), filled(only((0, 1), (2, 0)), 2, rank=2)),
}


@pytest.mark.parametrize("sets", GROWING.values(), ids=GROWING)
def test_sets_follow_each_other_in_a_schedule(
    sets: tuple[SkipSet, ...], open_tiny: Open, reference: ReferenceModel
) -> None:
    first, second, third = sets
    llm, run = open_tiny(), ReferenceRun(reference)
    plan = SkipPlan(first, first, schedule=((0, first), (3, second), (6, third)))
    llm.set_plan(plan)
    answer = generated(llm, history_of(reference, plan), tokens(20), 10)
    rows = [run.eval(tokens(20), *arguments(first)).logits]
    rows += [run.eval([token], *arguments(sets[i // 3])).logits for i, token in enumerate(answer[:-1])]
    assert relative_error(llm.scores[: llm.n_tokens], np.concatenate(rows)) < TOLERANCE


@pytest.mark.parametrize("scale", ["none", "paper", "median"])
@pytest.mark.parametrize("fixed", [[(1, 1)], [(0, 0), (2, 1)], []], ids=str)
def test_an_ffn_that_the_online_stage_adds_has_a_scale_alone(
    fixed: list[tuple[int, int]], scale: Any, open_tiny: Open, reference: ReferenceModel
) -> None:
    chosen, llm = filled(only(*fixed), 1, 0.9), open_tiny()
    plan = same(chosen, online=OnlineStage(window=3, threshold=-1.0, scale=scale))
    llm.set_plan(plan)
    history = history_of(reference, plan)
    answer = generated(llm, history, tokens(20), 9)
    assert llm.online.ffn == history.stage.ffn and len(llm.online.ffn) == 3 - sum(kind for _, kind in fixed)
    assert error(llm, history) < TOLERANCE
    again = generated(llm, history, tokens(20), 9)
    assert again == answer, "the next request begins without what the last one added"


@pytest.mark.parametrize(
    "skipped", [[(0, 0)], [(1, 1)], [(1, 0), (1, 1)], [(2, 0), (2, 1)], SUBLAYERS], ids=lambda s: str(len(s))
)
def test_in_parallel_blocks_vectors_and_maps_stand_in_the_chain(
    skipped: list[tuple[int, int]], tiny: Tiny, open_tiny: Open
) -> None:
    # Stock's F16 table of GELU alone puts the logits 5e-4 off, see test_reference.py.
    llm = open_tiny("gptneox-parallel")
    for parts in KINDS.values():
        chosen = filled(only(*skipped), scale=np.linspace(0.7, 1.4, 6).reshape(3, 2), parts=parts)
        llm.set_plan(same(chosen))
        expected = eval_parallel(tiny("gptneox-parallel"), tokens(40), *arguments(chosen)).logits
        assert relative_error(eval_logits(llm, [tokens(40)]), expected) < 2e-3


@pytest.mark.parametrize("name", SKIPPABLE)
def test_on_every_architecture_a_skipped_layer_maps_each_input_as_by_hand(name: str, open_tiny: Open) -> None:
    # Layer 1 is skipped whole: what layer 2 reads is worked out from what layer 0 wrote, token by token.
    n_layer = FAMILIES[name].n_layer
    scale = np.ones((n_layer, 2))
    scale[1] = 0.8, 1.5
    chosen, llm = filled(only((1, 0), (1, 1), n_layer=n_layer), 3, scale), open_tiny(name, n_ubatch=16)
    llm.set_plan(same(chosen))
    for activations, _ in activations_of(llm, tokens(30)):
        assert activations[1] == [None, None]
        stream = activations[0][1][1].astype(np.float64)
        for kind in (0, 1):
            mapped = stream @ chosen.down[1, kind].T @ chosen.up[1, kind].T
            stream = scale[1, kind] * stream + chosen.bias[1, kind] + mapped
        np.testing.assert_allclose(activations[2][0][0], stream, rtol=1e-4, atol=1e-4)


def bf16(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)


@pytest.mark.parametrize("type_", [GGMLQuantizationType.F16, GGMLQuantizationType.Q8_0], ids=lambda t: t.name)
@pytest.mark.parametrize("n_tokens", [1, 30])
def test_where_weights_are_smaller_than_f32_an_x86_processor_computes_maps_in_bf16(
    n_tokens: int, type_: GGMLQuantizationType, tiny: Tiny, open_model: Open, tmp_path: Path
) -> None:
    # Both factors of each product are rounded; the sums are ours up to their order, which may round `down u` elsewhere.
    chosen = filled(only((1, 0), (1, 1)), 3, parts=PARTS[1:])
    llm = open_model(write_dequantised(tiny(), tmp_path / "small.gguf", type_))
    llm.set_plan(same(chosen))
    rounded = bf16 if platform.machine().lower() in ("x86_64", "amd64") else lambda x: x.astype(np.float64)
    for activations, _ in activations_of(llm, tokens(n_tokens)):
        stream = exact = activations[0][1][1].astype(np.float64)
        for kind in (0, 1):
            down, up = chosen.down[1, kind].T, chosen.up[1, kind].T
            stream = stream + rounded(rounded(stream) @ rounded(down)) @ rounded(up)
            exact = exact + exact @ down @ up
        assert relative_error(activations[2][0][0], stream) < 1e-3
        assert relative_error(stream, exact) < 1e-2


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3moe", "falcon"])
def test_a_model_opened_with_the_plan_has_no_kv_and_the_same_logits(name: str, open_tiny: Open) -> None:
    plan = same(filled(only((0, 0), (1, 1), (2, 0), n_layer=FAMILIES[name].n_layer), 5))
    elided, full = open_tiny(name, plan=plan), open_tiny(name)
    full.set_plan(plan)
    pieces = [tokens(30)[:20], tokens(30)[20:29], tokens(30)[29:]]
    np.testing.assert_array_equal(eval_logits(elided, pieces), eval_logits(full, pieces))
    assert elided._adaskip.elided_kv() == (0, 2) and elided.kv_bytes < full.kv_bytes


# -- what it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sublayer", SUBLAYERS, ids=str)
def test_a_scale_and_a_vector_are_a_node_each_and_a_map_is_three(sublayer: tuple[int, int], open_tiny: Open) -> None:
    llm, nodes = open_tiny(), {}
    for scale in (1.0, 1.3):
        for parts in ((), *KINDS.values()):
            llm.reset()
            llm.set_plan(same(filled(only(sublayer), scale=scale, parts=parts)))
            llm.eval(tokens(5))
            nodes[scale, len(parts)] = llm.counters.nodes
    assert nodes[1.0, 0] < llm.counters.nodes_full
    expected = {(scale, n): (scale > 1) + (0, 1, 3, 4)[n] for scale, n in nodes}
    assert {key: n - nodes[1.0, 0] for key, n in nodes.items()} == expected


def test_a_plan_with_maps_adds_no_split(open_tiny: Open) -> None:
    # A split is a part of the graph that runs on one device; maps are on that of their layer, whichever it is. For 32
    # tokens and more llama.cpp computes on the GPU with weights of the CPU too, at several splits per layer.
    llm, splits = open_tiny(n_gpu_layers=2), []
    for plan in (None, same(random_set(1))):
        llm.reset()
        llm.set_plan(plan)
        for n in (40, 1):
            llm.eval(tokens(n))
            splits.append(llm.counters.splits)
    whole, planned = splits[:2], splits[2:]
    assert 0 < planned[0] <= whole[0] and planned[1] == whole[1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_is_reused_on_every_token_and_nothing_is_copied(kind: str, open_tiny: Open) -> None:
    llm = open_tiny(under=same(random_set(1, parts=KINDS[kind])))
    steps = llm.generate(tokens(20), temp=0.0)
    next(steps), next(steps)
    before = llm.counters
    for _ in range(20):
        next(steps)
    assert llm.counters.graphs_built == before.graphs_built
    assert llm.counters.graphs_reused == before.graphs_reused + 20
    assert llm.counters.statistics_bytes == 0


def test_an_equal_plan_set_again_keeps_the_graph_and_another_map_does_not(
    open_tiny: Open, reference: ReferenceModel
) -> None:
    # In ggml's view both are alike: only the contents of a map differ.
    first, second = filled(only((1, 1))), filled(only((1, 1)), 7)
    other = replace(first, up=second.up)
    llm = open_tiny()
    for chosen in (first, first, other, second, first):
        llm.set_plan(same(chosen))
        assert error_under(llm, reference, chosen, [tokens(6)]) < TOLERANCE


def test_the_plan_owns_its_vectors_and_maps(open_tiny: Open, reference: ReferenceModel) -> None:
    """Of any dtype and order in memory, and whatever becomes of the caller's arrays."""
    chosen, llm = random_set(2), open_tiny()
    other = native(chosen, **{name: np.asfortranarray(getattr(chosen, name), np.float64) for name in ("scale", *PARTS)})
    other.skip = np.asfortranarray(chosen.skip, np.int64)
    for given in (copies(chosen), other):
        llm._adaskip.set_plan(bare_plan(given), 0)
        for name in PARTS:
            getattr(given, name)[:] = np.nan
        assert error_under(llm, reference, chosen, [tokens(40)]) < TOLERANCE


def test_they_outlive_two_hundred_changes_of_plan(open_tiny: Open, reference: ReferenceModel) -> None:
    # Each plan frees the vectors and maps of the one before.
    llm = open_tiny()
    for i in range(200):
        rng = np.random.default_rng(i)
        skip, parts = only(*((int(rng.integers(3)), 1) for _ in range(2))), ((), *KINDS.values())[i % 4]
        chosen = None if i % 7 == 0 else filled(skip, i, rng.uniform(0.8, 1.2), int(rng.integers(1, 9)), parts)
        llm.set_plan(None if chosen is None else same(chosen))
        assert error_under(llm, reference, chosen, [tokens(5)]) < TOLERANCE


def test_a_model_closed_with_vectors_and_maps_in_force_closes(open_tiny: Open) -> None:
    for _ in range(5):
        llm = open_tiny(under=same(random_set(3)))
        llm.eval(tokens(5))
        llm.close()


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused_and_the_plan_in_force_stays(
    value: float, name: str, open_tiny: Open, reference: ReferenceModel
) -> None:
    chosen, llm = random_set(4), open_tiny()
    llm.set_plan(same(chosen))
    wrong = copies(chosen)
    getattr(wrong, name)[tuple(np.argwhere(chosen.skip)[-1])].flat[-1] = value
    for plan in (bare_plan(wrong, (0, chosen)), bare_plan(chosen, (0, wrong))):
        with pytest.raises(CompensationError, match="not finite"):
            llm._adaskip.set_plan(plan, 2)
    assert error_under(llm, reference, chosen, [tokens(40)]) < TOLERANCE


def test_values_of_sublayers_that_run_are_not_read(open_tiny: Open, reference: ReferenceModel) -> None:
    chosen = filled(only((1, 1)))
    given = copies(chosen)
    for name in PARTS:
        getattr(given, name)[~chosen.skip] = np.nan
    llm = open_tiny()
    llm._adaskip.set_plan(bare_plan(given), 0)
    assert error_under(llm, reference, chosen, [tokens(40)]) < TOLERANCE


def maps(rank: int, n_embd: int) -> dict[str, Any]:
    return {"down": np.zeros((N_LAYER, 2, rank, n_embd)), "up": np.zeros((N_LAYER, 2, n_embd, rank))}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no down": ({"down": None}, "one half"),
    "no up": ({"up": None}, "one half"),
    "no rank": (maps(0, N_EMBD), "without a rank"),
    "shorter maps": ({**maps(3, 32), "bias": None}, "have 32 values"),
    "longer maps": (maps(3, 65), "have 65 values"),
    **{
        f"vectors of {n}": ({"bias": np.zeros((N_LAYER, 2, n), np.float32), "down": None, "up": None}, "vectors have")
        for n in (N_EMBD - 1, N_EMBD + 1, 1, 0)
    },
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_shape_is_refused_and_the_plan_in_force_stays(
    wrong: str, open_tiny: Open, reference: ReferenceModel
) -> None:
    chosen, llm = random_set(6), open_tiny()
    llm.set_plan(same(chosen))
    changes, message = WRONG[wrong]
    right, bad = native(chosen), native(chosen, **changes)
    for plan in (bare_plan(bad, (0, right)), bare_plan(right, (0, right), (4, bad))):
        with pytest.raises(NativeError, match=message):
            llm._adaskip.set_plan(plan, 2)
    assert error_under(llm, reference, chosen, [tokens(40)]) < TOLERANCE


@pytest.mark.parametrize("parts", [{"bias": np.zeros((N_LAYER, 2, 32), np.float32)}, maps(4, 32)], ids=list)
def test_a_plan_with_values_of_another_length_is_refused_as_a_plan(parts: dict[str, Any], open_tiny: Open) -> None:
    # It can be made without a model, so this is the user's mistake and no bug to report.
    llm = open_tiny()
    ones = {name: np.ones_like(value) for name, value in parts.items()}
    with pytest.raises(PlanError, match="32 values"):
        llm.set_plan(same(SkipSet(only((1, 1)), np.ones((N_LAYER, 2)), **ones)))
    assert llm.plan is None
