"""What stands in for a skipped sublayer, v := s u + b + up (down u), against a NumPy pass, and what it costs.

test_sequences.py draws scales, vectors and maps of every phase. Tolerances are those of test_skip.py for the NumPy
float64 pass. A vector or a map that is wrong, missing, transposed or misplaced changes the logits by more than 0.1.
"""

import platform
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType
from oracles.expected import error_under
from oracles.fixtures import Open, Tiny
from oracles.observed import activations_of
from oracles.reference import ReferenceModel, relative_error, write_dequantised
from oracles.skip_sets import PARTS, filled, only, same, skip_set
from oracles.tiny_families import FAMILIES, N_EMBD, N_LAYER, SKIPPABLE, tokens

from adaskip_cpp.model.plan import Bulk, SkipPlan
from adaskip_cpp.model.skip_set import SkipSet

TOLERANCE = 5e-6
SUBLAYERS = [(layer, kind) for layer in range(N_LAYER) for kind in (0, 1)]
KINDS = {"vector": PARTS[:1], "map": PARTS[1:], "vector and map": PARTS}


@pytest.mark.parametrize("rank", [1, 2, 31, N_EMBD, 2 * N_EMBD])
def test_any_rank_will_do(rank: int, open_tiny: Open, reference: ReferenceModel) -> None:
    chosen = filled(only((0, 1), (2, 0)), rank=rank)
    llm = open_tiny(under=same(chosen))
    assert error_under(llm, reference, chosen, [tokens(40)]) < TOLERANCE


@pytest.mark.parametrize(
    "skipped", [[(0, 0)], [(1, 1)], [(1, 0), (1, 1)], [(2, 0), (2, 1)], SUBLAYERS], ids=lambda s: str(len(s))
)
def test_in_parallel_blocks_vectors_and_maps_stand_in_the_chain(
    skipped: list[tuple[int, int]], open_tiny: Open, numpy_model: Open
) -> None:
    llm = open_tiny("gptneox-parallel")
    for parts in KINDS.values():
        chosen = filled(only(*skipped), scale=np.linspace(0.7, 1.4, 6).reshape(3, 2), parts=parts)
        llm.set_plan(same(chosen))
        assert error_under(llm, numpy_model("gptneox-parallel"), chosen, [tokens(40)]) < 5e-4  # see test_reference.py


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
@pytest.mark.parametrize("is_bulk", [False, True])
def test_where_weights_are_smaller_than_f32_an_x86_processor_computes_maps_in_bf16_but_in_a_bulk(
    n_tokens: int, is_bulk: bool, type_: GGMLQuantizationType, tiny: Tiny, open_model: Open, tmp_path: Path
) -> None:
    # Both factors of each product are rounded; the sums are ours up to their order, which may round `down u` elsewhere.
    chosen, none = filled(only((1, 0), (1, 1)), 3, parts=PARTS[1:]), SkipSet.none(N_LAYER)
    llm = open_model(write_dequantised(tiny(), tmp_path / "small.gguf", type_))
    llm.set_plan(SkipPlan(none, none, bulk=Bulk(chosen, head=0, tail=1)) if is_bulk else same(chosen))
    is_rounded = not is_bulk and platform.machine().lower() in ("x86_64", "amd64")
    rounded = bf16 if is_rounded else lambda x: x.astype(np.float64)
    evaluate = llm.eval_bulk if is_bulk else llm.eval
    for activations, _ in activations_of(llm, tokens(n_tokens), evaluate=evaluate):
        stream = exact = activations[0][1][1].astype(np.float64)
        for kind in (0, 1):
            down, up = chosen.down[1, kind].T, chosen.up[1, kind].T
            stream = stream + rounded(rounded(stream) @ rounded(down)) @ rounded(up)
            exact = exact + exact @ down @ up
        assert relative_error(activations[2][0][0], stream) < (1e-3 if is_rounded else 1e-5)
        assert relative_error(stream, exact) < 1e-2


@pytest.mark.parametrize("sublayer", SUBLAYERS, ids=str)
def test_a_scale_and_a_vector_are_a_node_each_and_a_map_is_three(sublayer: tuple[int, int], open_tiny: Open) -> None:
    llm = open_tiny()

    def nodes(chosen: SkipSet) -> int:
        llm.reset()
        llm.set_plan(same(chosen))
        llm.eval(tokens(5))
        return int(llm.counters.nodes)

    skip = only(sublayer)
    bare = nodes(SkipSet(skip, np.ones((N_LAYER, 2))))
    assert bare < llm.counters.nodes_full
    for scale, n in ((1.0, 0), (1.3, 1)):
        for parts, n_of_parts in (((), 0), (KINDS["vector"], 1), (KINDS["map"], 3), (PARTS, 4)):
            assert nodes(filled(skip, scale=scale, parts=parts)) == bare + n + n_of_parts
    mapped = filled(skip, parts=KINDS["map"])
    up = mapped.up.copy()
    up[sublayer] = 0
    assert nodes(SkipSet(skip, mapped.scale, None, mapped.down, up)) == bare


def test_the_plan_owns_its_vectors_and_maps(open_tiny: Open, reference: ReferenceModel) -> None:
    """Arrays have any dtype and order in memory, and the caller may change them afterwards."""
    chosen, llm = skip_set((1,), (0, 2), 1.1, seed=2), open_tiny()
    for dtype, order in ((np.float32, "C"), (np.float64, "F")):
        names = ("skip", "scale", *PARTS)
        arrays = {name: np.array(getattr(chosen, name), dtype, order=order) for name in names}
        given = SimpleNamespace(**arrays, n_embd=chosen.n_embd)
        for name in PARTS:
            getattr(given, name)[~chosen.skip] = np.nan
        # Under tag 0, that of no plan, as AdaSkipLlama knows nothing of it.
        llm._adaskip.set_plan(SimpleNamespace(bulk=None, prefill=given, decode_sets=((0, given),), online=None), 0)
        for name in PARTS:
            getattr(given, name)[:] = np.nan
        assert error_under(llm, reference, chosen, [tokens(40)]) < TOLERANCE
