"""Without a plan, real models give the very bits of stock llama-cpp-python, run in another process."""

from typing import Any

import numpy as np
import pytest
from oracles.fixtures import Open
from oracles.stock import Job, eval_logits, run_stock

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
