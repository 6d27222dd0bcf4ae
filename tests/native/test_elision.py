"""A model opened with a plan has no KV for the attentions that never run, and computes the same to the last bit.

The oracle of the logits is the same plan set on a model with all its KV. Bytes are worked out from the tiny families'
sizes and llama.cpp's rules for the number of cells.
"""

import itertools
import pickle
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from oracles.fixtures import Open, Tiny
from oracles.skip_sets import same, skip_set
from oracles.stock import EXACT, eval_logits
from oracles.tiny_families import FAMILIES, N_LAYER, tokens
from oracles.tiny_models import write_model

from adaskip_cpp import AdaSkipLlama, SkipPlan
from adaskip_cpp.engine.native import elide_kv
from adaskip_cpp.errors import NotSkippableError, PlanError, ProfileMismatchError, StateError
from adaskip_cpp.model.identity import ModelInfo
from adaskip_cpp.model.plan import Bulk, OnlineStage
from adaskip_cpp.model.skip_set import SkipSet

F16, Q8_0 = 1, 8
BYTES_OF_32 = {F16: 64, Q8_0: 34}  # Q8_0: a scale in F16 and 32 bytes
SLIDING = {"gemma2": {0, 2}, "gemma3": {0, 2}}  # layers with a sliding window, see tiny_families.py
# Each way to make K and V: elision sees no more of a family.
ARCHITECTURES = ["llama", "gemma2", "gemma3", "qwen3moe", "falcon", "phi3", "gptneox-parallel"]


def plan_without(n_layer: int, attention: Collection[int], ffn: Collection[int] = (), scale: float = 0.9) -> SkipPlan:
    return SkipPlan.manual(n_layer, attention=attention, ffn=ffn, scale=scale)


def kv_bytes(name: str, elided: Collection[int] = (), *, n_cells: int = 256, bytes_of_32: int = 2 * 128) -> int:
    """K and V of all layers but the elided ones, in caches of a multiple of 256 cells."""
    family = FAMILIES[name]
    layers = set(range(family.n_layer)) - set(elided)
    return len(layers) * n_cells * family.n_kv * family.head_dim * bytes_of_32 // 32


def kept(name: str, attention: Collection[int]) -> set[int]:
    """The layers whose KV llama.cpp needs, as a cache has at least one."""
    sliding = SLIDING.get(name, set())
    caches = [sliding, set(range(FAMILIES[name].n_layer)) - sliding]
    return {min(cache) for cache in caches if cache and cache <= set(attention)}


def evaluate(llm: Any, prompt: list[int]) -> np.ndarray:
    """Logits of a prompt in two pieces and of six generated tokens, from an empty cache."""
    llm.reset()
    llm.eval(prompt[:15])
    list(itertools.islice(llm.generate(prompt, temp=0.0), 7))
    return np.array(llm.scores[: llm.n_tokens])


@pytest.fixture
def pair(tiny: Tiny, open_model: Open) -> Open:
    """``pair(plan, model="llama", **options)``: opened with a plan, and with all KV and then given this plan."""

    def open_(plan: SkipPlan, model: str | Path = "llama", **options: Any) -> tuple[Any, Any]:
        path = tiny(model) if isinstance(model, str) else model
        elided, full = open_model(path, plan=plan, **options), open_model(path, **options)
        full.set_plan(plan)
        return elided, full

    return open_


def assert_alike(elided: Any, full: Any, prompt: list[int]) -> None:
    np.testing.assert_array_equal(evaluate(elided, prompt), evaluate(full, prompt))


@pytest.mark.parametrize("flash_attn", [False, True], ids=["no flash", "flash"])
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("attention", [(0,), (1,), (2,), (0, 2), (0, 1, 2)], ids=str)
def test_logits_and_what_can_be_skipped_are_those_of_the_same_plan_with_all_the_kv(
    attention: tuple[int, ...], name: str, flash_attn: bool, pair: Open
) -> None:
    plan = same(skip_set(attention, (1,), 0.9, seed=0, n_layer=FAMILIES[name].n_layer))
    elided, full = pair(plan, name, flash_attn=flash_attn, n_ctx=700)
    assert_alike(elided, full, tokens(30))
    assert elided.counters.nodes == full.counters.nodes
    assert elided.sublayers == full.sublayers
    assert elided.kv_bytes == kv_bytes(name, set(attention) - kept(name, attention), n_cells=768)
    assert full.kv_bytes == kv_bytes(name, n_cells=768)
    assert elided._adaskip.elided_kv() == attention, "what is kept for llama.cpp's sake still cannot be run"
    with pytest.raises(PlanError, match="open the model without plan="):
        elided.set_plan(None)


def test_under_a_plan_with_a_bulk_every_attention_keeps_its_k_and_v(pair: Open) -> None:
    chosen = skip_set((1,))
    elided, full = pair(replace(same(chosen), bulk=Bulk(chosen)))
    assert_alike(elided, full, tokens(30))
    assert elided.elided_kv == () and elided.kv_bytes == full.kv_bytes


def test_a_sliding_window_smaller_than_the_text_still_gives_the_same_logits(pair: Open) -> None:
    # 300 tokens through a window of 8 and caches of 256 and 512 cells: cells are reused.
    options: dict[str, Any] = {"n_ctx": 512, "n_batch": 32, "n_ubatch": 32, "swa_full": False}
    for name, sliding in SLIDING.items():
        n_layer = FAMILIES[name].n_layer
        for attention in ([0], [1], [1, 2]):
            elided, full = pair(plan_without(n_layer, attention), name, **options)
            assert_alike(elided, full, tokens(300))
            n_cells = [256 if layer in sliding else 512 for layer in range(n_layer)]
            without = [n for layer, n in enumerate(n_cells) if layer not in set(attention) - kept(name, attention)]
            assert (elided.kv_bytes, full.kv_bytes) == tuple(sum(each) * 2 * 32 * 4 for each in (without, n_cells))


@pytest.mark.parametrize(("type_k", "type_v"), [(F16, F16), (Q8_0, Q8_0), (Q8_0, F16)])
def test_every_type_of_k_and_v_is_counted_in_its_size(type_k: int, type_v: int, pair: Open) -> None:
    # Q8_0 needs flash attention and heads of a multiple of 32, which qwen3's tiny model has.
    elided, full = pair(plan_without(N_LAYER, [1]), "qwen3", flash_attn=True, type_k=type_k, type_v=type_v)
    size = BYTES_OF_32[type_k] + BYTES_OF_32[type_v]
    assert full.kv_bytes == kv_bytes("qwen3", bytes_of_32=size)
    assert elided.kv_bytes == kv_bytes("qwen3", [1], bytes_of_32=size)
    assert_alike(elided, full, tokens(30))


N_SHARING = 8  # layers 6 and 7 read the KV of layers 4 and 5; the even ones slide


@pytest.fixture(scope="session")
def sharing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = FAMILIES["gemma4-per-layer"]
    pattern = {"attention.sliding_window_pattern": [layer % 2 == 0 for layer in range(N_SHARING)]}
    family = replace(family, n_layer=N_SHARING, metadata={**family.metadata, **pattern})
    return write_model(tmp_path_factory.mktemp("sharing") / "model.gguf", family)


@pytest.mark.parametrize("attention", [(7,), (6, 7), (3,), (1, 3), (0, 1, 2, 3, 6, 7)], ids=str)
def test_a_skipped_reader_of_shared_kv_elides_nothing_and_the_others_their_own(
    attention: tuple[int, ...], sharing: Path, pair: Open
) -> None:
    plan = plan_without(N_SHARING, attention, ffn=[2])
    elided, full = pair(plan, sharing)
    assert_alike(elided, full, tokens(30))
    unread = pair(plan, sharing, n_batch=8, logits_all=False)  # batches of which nobody reads the logits
    np.testing.assert_array_equal(*(eval_logits(llm, [tokens(30), [5], [6]]) for llm in unread))
    writers = tuple(layer for layer in attention if layer < 6)
    assert elided._adaskip.elided_kv() == writers
    # six layers of 256 cells, K and V of two heads of 16 in F32
    assert full.kv_bytes == 6 * 256 * 2 * 32 * 4
    assert elided.kv_bytes == (6 - len(writers)) * 256 * 2 * 32 * 4
    if not writers:  # a reader may run again
        for each in (elided, full):
            each.set_plan(None)
        assert_alike(elided, full, tokens(30))


ELIDED = plan_without(N_LAYER, [1])


@pytest.mark.parametrize(
    "plan",
    [
        None,
        plan_without(N_LAYER, [0, 2], ffn=[1]),
        SkipPlan.manual(N_LAYER, attention=[1], phase="decode"),
        SkipPlan(SkipSet.none(N_LAYER), SkipSet.none(N_LAYER), online=OnlineStage(window=3, threshold=0.5)),
        replace(ELIDED, bulk=Bulk(ELIDED.prefill)),
    ],
    ids=["none", "other layers", "decode only", "online", "a bulk, which keeps K and V"],
)
def test_a_plan_that_runs_an_elided_attention_is_refused_with_the_way_out(plan: SkipPlan | None, pair: Open) -> None:
    llm, full = pair(ELIDED)
    with pytest.raises(PlanError, match=r"layer 1: .*open the model without plan="):
        llm.set_plan(plan)
    assert llm.plan == ELIDED
    assert_alike(llm, full, tokens(30))


def test_the_bare_context_refuses_to_run_an_elided_attention(open_tiny: Open) -> None:
    # Whoever makes such a context gets an error of llama_decode, not another layer's KV.
    with elide_kv(np.array([False, True, False])):  # without a plan that skips it
        llm = open_tiny()
    with pytest.raises(PlanError, match=r"layer 1: .*open the model without plan=") as refused:
        llm.eval(tokens(5))
    assert isinstance(refused.value.__cause__, RuntimeError)


SHARED = [("sharing", attention) for attention in ((5,), (1, 3, 5), (4, 6), (5, 7))]
"""Of which others read the KV; nor where all readers are skipped: what can be skipped does not depend on the plan."""


@pytest.mark.parametrize(
    ("name", "plan", "error", "message"),
    [
        ("llama", plan_without(4, [1]), PlanError, "for 4 layers"),
        ("llama", plan_without(2, [1]), PlanError, "for 2 layers"),
        ("llama", same(replace(ELIDED.prefill, bias=np.zeros((3, 2, 32)))), PlanError, "32 values"),
        ("llama", replace(ELIDED, model=ModelInfo("0" * 64, "llama", 3)), ProfileMismatchError, "another model"),
        ("jamba", plan_without(3, [0]), NotSkippableError, "layer 0"),  # layer 0 has no attention
        ("gemma4", plan_without(4, [1]), NotSkippableError, "its KV is shared"),
        *((name, plan_without(N_SHARING, each), NotSkippableError, "its KV is shared") for name, each in SHARED),
    ],
)
def test_a_model_is_not_opened_with_a_plan_that_does_not_fit(
    name: str, plan: SkipPlan, error: type[Exception], message: str, tiny: Tiny, sharing: Path, open_tiny: Open
) -> None:
    path = sharing if name == "sharing" else tiny(name)
    with pytest.raises(error, match=message):
        AdaSkipLlama(str(path), plan=plan, verbose=False, n_ctx=128, **EXACT)
    whole = open_tiny()
    assert whole.kv_bytes == kv_bytes("llama")
    whole.eval([1, 5, 6])


@pytest.mark.parametrize("source", [(), (0,), (1,)], ids=str)
@pytest.mark.parametrize("target", [(), (0,), (1,)], ids=str)
def test_a_state_is_loaded_where_the_same_layers_have_kv_and_refused_elsewhere(
    source: tuple[int, ...], target: tuple[int, ...], open_tiny: Open
) -> None:
    # (0,) and (1,) are the hard case: as many layers of one shape, so llama.cpp itself takes the one for the other.
    saver, loader, untouched = (
        open_tiny(**({"plan": plan_without(N_LAYER, layers)} if layers else {})) for layers in (source, target, target)
    )
    saver.eval(tokens(9))
    state = pickle.loads(pickle.dumps(saver.save_state()))
    loader.eval(tokens(12, seed=3))
    if source == target:
        loader.load_state(state)
        untouched.eval(tokens(9))
    else:
        with pytest.raises(StateError, match="KV for other layers"):
            loader.load_state(state)
        untouched.eval(tokens(12, seed=3))
    for each in (loader, untouched):
        each.eval([7])
    assert loader.n_tokens == untouched.n_tokens
    np.testing.assert_array_equal(loader.scores[loader.n_tokens - 1], untouched.scores[untouched.n_tokens - 1])


def test_a_state_of_the_stock_class_is_refused_by_a_model_without_all_its_kv(tiny: Tiny, open_tiny: Open) -> None:
    stock = llama_cpp.Llama(str(tiny()), n_ctx=128, logits_all=True, verbose=False, **EXACT)
    stock.eval(tokens(9))
    state = stock.save_state()
    stock.close()
    with pytest.raises(StateError, match="KV for other layers"):
        open_tiny(plan=ELIDED).load_state(state)
    open_tiny().load_state(state)


def test_a_pickled_model_keeps_its_kv_layout_and_its_plan(open_tiny: Open) -> None:
    more = plan_without(N_LAYER, [0, 1])
    for opened, elided in ((ELIDED, (1,)), (None, ())):
        llm = open_tiny(plan=opened, under=more)
        copy = pickle.loads(pickle.dumps(llm))
        assert copy.plan == more and copy._adaskip.elided_kv() == elided
        assert copy.kv_bytes == llm.kv_bytes
        copy.close()
