"""Without a plan, AdaSkipLlama does what llama_cpp.Llama does: the stock library, in another process, is the oracle."""

import json
import pickle
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from oracles.fixtures import Open, Tiny
from oracles.reference import relative_error
from oracles.stock import EXACT, OPTIONS, Job, eval_logits, run_stock
from oracles.tiny_families import N_LAYER, tokens
from oracles.tiny_models import write_model

from adaskip_cpp import SkipPlan
from adaskip_cpp.engine.binding import ffi, lib
from adaskip_cpp.engine.settings import cost_settings
from adaskip_cpp.errors import RequestError

PROGRAM = Path(__file__).parents[1] / "oracles" / "behaviour.py"


def results(which: str, model: Path) -> dict[str, Any]:
    process = subprocess.run(
        [sys.executable, str(PROGRAM), which, str(model)], capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return dict(json.loads(process.stdout))


@pytest.mark.parametrize("name", ["llama", "gemma3", pytest.param("a real model", marks=pytest.mark.model)])
def test_every_method_of_a_llama_gives_what_stock_gives(name: str, tiny: Tiny, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue("smollm2_path") if name == "a real model" else tiny(name)
    ours, stock = results("ours", model), results("stock", model)
    assert ours.keys() == stock.keys() and len(stock) > 15
    assert {key for key in stock if ours[key] != stock[key]} == set()


PLAN = SkipPlan.manual(N_LAYER, attention=[1], ffn=[0, 2], scale=0.9)
PIECES = [tokens(40)[:37], *([token] for token in tokens(40)[37:])]
"""A prompt of several rows, which repacked products compute in groups of four, and tokens alone."""


def stock(path: Path, options: Any = None, **model_params: Any) -> Any:
    (logits,) = run_stock([Job(str(path), PIECES, {**OPTIONS, **(options or {})}, model_params=model_params)])
    return logits


def test_a_model_in_several_files_computes_the_same(tmp_path: Path, open_model: Open, open_tiny: Open) -> None:
    first = write_model(tmp_path / "split.gguf", split=10)
    assert len(list(tmp_path.glob("split-*.gguf"))) == 3
    split, whole = open_model(first), open_tiny()
    np.testing.assert_array_equal(eval_logits(split, PIECES), stock(first))
    assert split.sublayers == whole.sublayers
    for llm in (split, whole):
        llm.set_plan(PLAN)
    np.testing.assert_array_equal(*(eval_logits(llm, PIECES) for llm in (split, whole)))


def test_quantised_kv_is_stocks_and_under_a_plan_near_the_same_plan_over_f32(tiny: Tiny, open_tiny: Open) -> None:
    # qwen3's heads of 32 fill a block of Q8_0. 0.005 to 0.015 is measured, the rounding of K and V to 8 bits; another
    # layer's KV gives more than 0.1.
    quantised = {"type_k": 8, "type_v": 8, "flash_attn": True}
    expected = stock(tiny("qwen3"), {**EXACT, **quantised})
    llm = open_tiny("qwen3", **quantised)
    np.testing.assert_array_equal(eval_logits(llm, PIECES), expected)
    with llm.collect_statistics(lambda batch: None, keep_logits=True):
        np.testing.assert_array_equal(eval_logits(llm, PIECES), expected)
    plain, elided = open_tiny("qwen3", under=PLAN), open_tiny("qwen3", plan=PLAN, **quantised)
    actual, expected = (eval_logits(each, PIECES) for each in (elided, plain))
    assert relative_error(actual, expected) < 0.03


def test_flash_attention_in_prompts_is_stocks_with_it_from_64_tokens_on_and_without_it_below(
    tiny: Tiny, open_tiny: Open
) -> None:
    pieces = {n: [tokens(n)] for n in (63, 64)}
    with_and_without = [Job(str(tiny("llama")), pieces[n], {**OPTIONS, "flash_attn": n == 64}) for n in pieces]
    llm = open_tiny(flash_attn="prompts")
    with closing(pickle.loads(pickle.dumps(llm))) as other:
        for each in (llm, other):
            for n, expected in zip(pieces, run_stock(with_and_without), strict=True):
                each.reset()
                np.testing.assert_array_equal(eval_logits(each, pieces[n]), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flash_attn": "answers"}, "flash_attn is 'answers'; use True, False or \"prompts\""),
        ({"flash_attn": "prompts", "type_v": 8}, "use flash_attn=True"),
        ({"flash_attn": "prompts", "split_mode": 3}, "use flash_attn=True"),
    ],
)
def test_impossible_flash_attention_is_refused(options: dict[str, Any], message: str, open_tiny: Open) -> None:
    with pytest.raises(RequestError, match=message):
        open_tiny(**options)
    if options.get("type_v"):
        quantised = open_tiny("qwen3", **{**options, "flash_attn": True})
        for n in (-1, 64):
            assert lib.adaskip_set_flash_least(quantised._adaskip._ctx, n) == lib.ADASKIP_ERROR_ARGUMENT


@pytest.mark.parametrize(("family", "quantization"), [("llama", "Q4_1"), ("llama", "Q5_0"), ("gemma3", "Q8_0")])
def test_unpacked_weights_are_stocks_with_f32_weights_in_64_tokens_and_with_those_of_the_file_in_63(
    family: str, quantization: str, tmp_path: Path, open_model: Open
) -> None:
    """The oracle is a file that has the unpacked values as F32."""
    of = GGMLQuantizationType[quantization]
    stored = (None, GGMLQuantizationType.F32)
    packed, f32 = (write_model(tmp_path / f"{x}.gguf", family, quantization=of, stored_as=x) for x in stored)
    unrepacked: dict[str, Any] = {"repack": False, "logits_all": True}
    llm, other = open_model(packed, unpack=[quantization], **unrepacked), open_model(f32, **unrepacked)
    assert llm.unpackable.keys() == {quantization} and other.unpackable == {}
    with closing(pickle.loads(pickle.dumps(llm))) as pickled:
        for each in (llm, pickled):
            assert each.unpack == (quantization,)
            for n, path in ((64, f32), (63, packed)):
                each.reset()
                (expected,) = run_stock([Job(str(path), [tokens(n)], OPTIONS, model_params={"use_extra_bufts": False})])
                np.testing.assert_array_equal(eval_logits(each, [tokens(n)]), expected)
                assert each.counters.nodes - each.counters.nodes_full == (7 * each.n_layer if n == 64 else 0)
    for each in (llm, other):
        each.reset()
        each.set_plan(SkipPlan.manual(llm.n_layer, [1], [0], 0.9))
    np.testing.assert_array_equal(*(eval_logits(each, [tokens(64)]) for each in (llm, other)))


def test_types_that_do_not_exist_are_refused_and_others_change_nothing(open_tiny: Open, tiny: Tiny) -> None:
    for unpack in ("Q4_0", ["Q4_0", "q4_0"], [7]):
        with pytest.raises(RequestError, match="unpack has"):
            open_tiny(unpack=unpack)
    llm = open_tiny(unpack=["Q4_1"])
    assert llm.unpack == ("Q4_1",) and llm.unpackable == {}
    np.testing.assert_array_equal(eval_logits(llm, PIECES), stock(tiny()))
    out = ffi.new("int64_t[]", lib.ADASKIP_N_TYPES)
    for where, n in ((ffi.NULL, len(out)), (out, len(out) - 1)):
        assert lib.adaskip_unpackable(llm._adaskip._ctx, where, n) == lib.ADASKIP_ERROR_ARGUMENT


@pytest.mark.parametrize("quantization", ["Q4_0", "Q8_0"])
def test_repacking_is_stocks_and_stays_when_pickled(quantization: str, tmp_path: Path, open_model: Open) -> None:
    """``repack`` is llama.cpp's ``use_extra_bufts``."""
    path = write_model(tmp_path / "model.gguf", quantization=GGMLQuantizationType[quantization])
    for repack in (False, None, True):
        params = {"use_extra_bufts": False} if repack is False else {}
        expected, llm = stock(path, **params), open_model(path, repack=repack)
        with closing(pickle.loads(pickle.dumps(llm))) as other:
            for each in (llm, other):
                np.testing.assert_array_equal(eval_logits(each, PIECES), expected)
                assert each.model_params.use_extra_bufts == (repack is not False)


@pytest.mark.parametrize("family", ["llama", "gemma3", "falcon"])
def test_repacked_q5_0_is_stocks_with_the_same_values_as_q8_0(family: str, tmp_path: Path, open_model: Open) -> None:
    """The oracle is a file of Q8_0, which llama.cpp repacks where ggml has a layout. Elsewhere nothing changes."""
    kinds, of = (None, GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q5_0
    q5_0, q8_0 = (write_model(tmp_path / f"{x}.gguf", family, quantization=of, stored_as=x) for x in kinds)
    llm = open_model(q5_0, repack="all", unpack=["Q5_0"])
    n_weights = sum(each.n_elements for each in GGUFReader(q8_0).tensors if each.tensor_type.name == "Q8_0")
    has_layout = open_model(q8_0).unpackable == {}
    assert llm.repackable == (n_weights if has_layout else 0)
    assert llm.unpackable == ({} if has_layout else {"Q5_0": n_weights})
    expected = stock(q8_0 if has_layout else q5_0)
    with closing(pickle.loads(pickle.dumps(llm))) as other:
        for each in (llm, other):
            assert each.repack == cost_settings(each).repack == "all"
            np.testing.assert_array_equal(eval_logits(each, PIECES), expected)
    assert lib.adaskip_repack(llm._adaskip._ctx) == lib.ADASKIP_OK  # its graphs read the first copies
    # Tiny models have the same logits with both types. But 64 tokens read Q5_0 as F32 if they do not read the copies.
    llm.reset()
    long, (repacked,) = eval_logits(llm, [tokens(64)]), run_stock([Job(str(q8_0), [tokens(64)], OPTIONS)])
    unpacked = eval_logits(open_model(q5_0, repack=False, unpack=["Q5_0"]), [tokens(64)])
    assert (np.array_equal(long, repacked), np.array_equal(long, unpacked)) == (has_layout, not has_layout)
    plan = SkipPlan.manual(llm.n_layer, [1], [0], 0.9)
    planned = open_model(q8_0 if has_layout else q5_0, plan=plan), llm
    llm.reset()
    llm.set_plan(plan)
    np.testing.assert_array_equal(*(eval_logits(each, PIECES) for each in planned))
    llm.set_plan(None)
    llm.reset()
    np.testing.assert_array_equal(eval_logits(llm, PIECES), expected)


def test_wrong_repacking_is_refused_and_other_types_are_left_alone(open_tiny: Open, tiny: Tiny) -> None:
    with pytest.raises(RequestError, match="use True, False or"):
        open_tiny(repack="Q8_0")
    llm = open_tiny(repack="all")
    assert llm.repackable == 0 and lib.adaskip_repackable(llm._adaskip._ctx, ffi.NULL) == lib.ADASKIP_ERROR_ARGUMENT
    np.testing.assert_array_equal(eval_logits(llm, PIECES), stock(tiny()))


def test_flash_attention_in_prompts_alone_needs_no_v_in_each_cache(open_model: Open, tmp_path: Path) -> None:
    """Without a layer that sees all tokens, one of the two caches has no layers."""
    llm = open_model(write_model(tmp_path / "model.gguf", "gemma3", n_layer=1), flash_attn="prompts")
    llm.eval(tokens(9))
    assert llm.flash_attn == "prompts"
