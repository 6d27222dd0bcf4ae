"""Without a plan, real models give the very bits of stock llama-cpp-python, run in another process."""

from typing import Any

import numpy as np
import pytest
from oracles.fixtures import Open
from oracles.stock import Job, eval_logits, run_stock

from adaskip_cpp import SkipPlan

pytestmark = pytest.mark.model

N_PROMPT, N_DECODE = 56, 4
# The default F16 KV, and the same threads on both sides.
OPTIONS: dict[str, Any] = {
    "n_ctx": 128,
    "logits_all": True,
    "type_k": None,
    "type_v": None,
    "n_threads": 1,
    "n_threads_batch": 2,
}
SETTINGS: list[dict[str, Any]] = [{}, {"flash_attn": True}, {"n_ubatch": 40}, {"logits_all": False}]


@pytest.mark.parametrize("path", ["smollm2_path", "gemma3_path"])
def test_the_logits_are_bit_identical_to_stock_in_prefill_and_decode_also_while_statistics_are_collected(
    path: str, request: pytest.FixtureRequest, open_model: Open
) -> None:
    model = request.getfixturevalue(path)
    ids = np.random.default_rng(0).integers(100, 49000, size=N_PROMPT + N_DECODE).tolist()  # equal bits need no text
    pieces = [ids[:N_PROMPT], *([token] for token in ids[N_PROMPT:])]
    stock = run_stock([Job(str(model), pieces, {**OPTIONS, **each}) for each in SETTINGS])
    for setting, expected in zip(SETTINGS, stock, strict=True):
        llm = open_model(model, **{**OPTIONS, **setting})
        seen: list[int] = []
        np.testing.assert_array_equal(eval_logits(llm, pieces), expected)
        with llm.collect_statistics(lambda batch, seen=seen: seen.extend(batch.positions), keep_logits=True):
            np.testing.assert_array_equal(eval_logits(llm, pieces), expected)
        assert len(seen) == N_PROMPT + N_DECODE


@pytest.mark.parametrize(("path", "n_added"), [("smollm2_path", 2 * 30 + 1), ("gemma3_path", 2 * 18 + 2)])
def test_flash_attention_of_64_tokens_has_masked_heads_and_the_bits_of_stock(
    path: str, n_added: int, request: pytest.FixtureRequest, open_model: Open
) -> None:
    """Two threads would compute 16 and 8 tiles for 9 and 4 heads. Q, the attention and its result are nodes of each
    layer, and a mask of each cache. One of the three replaces llama.cpp's node. With 256 tokens, it saves few tiles."""
    model, options = request.getfixturevalue(path), {**OPTIONS, "n_ctx": 512, "flash_attn": True}
    ids = np.random.default_rng(0).integers(100, 49000, size=320).tolist()
    pieces = [ids[:64], ids[64:]]
    (expected,) = run_stock([Job(str(model), pieces, options)])
    llm = open_model(model, **options)
    llm.set_plan(SkipPlan.manual(llm.n_layer, ffn=[llm.n_layer - 1]))
    llm.eval(ids[:1])  # from now on, graphs are rewritten
    llm.set_plan(None)
    llm.reset()
    counted = []
    for piece in pieces:
        llm.eval(piece)
        counted.append(llm.counters.nodes - llm.counters.nodes_full)
    np.testing.assert_array_equal(llm.scores[:320], expected)
    assert counted == [n_added, 0]
