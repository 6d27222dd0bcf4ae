"""Without a plan, real models give the very bits of stock llama-cpp-python, run in another process."""

from pathlib import Path
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
SETTINGS: dict[str, dict[str, Any]] = {
    "F16 KV": {},
    "flash attention": {"flash_attn": True},
    "small ubatch": {"n_ubatch": 40},
    "last logits": {"logits_all": False},
}


@pytest.fixture(scope="module", params=["smollm2_path", "gemma3_path"], ids=["SmolLM2", "Gemma 3"])
def model(request: pytest.FixtureRequest) -> Path:
    """Each of the two real models."""
    return Path(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def stock(model: Path) -> dict[str, Any]:
    """The stock library's logits with each of the settings."""
    jobs = [Job(str(model), pieces(), {**OPTIONS, **each}) for each in SETTINGS.values()]
    return dict(zip(SETTINGS, run_stock(jobs), strict=True))


def pieces() -> list[list[int]]:
    """A prompt of random token ids in one piece, then tokens one by one. Equality of bits needs no real text."""
    ids = np.random.default_rng(0).integers(100, 49000, size=N_PROMPT + N_DECODE).tolist()
    return [ids[:N_PROMPT], *([token] for token in ids[N_PROMPT:])]


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_logits_are_bit_identical_to_stock_in_prefill_and_decode_also_while_statistics_are_collected(
    setting: str, model: Path, stock: dict[str, Any], open_model: Open
) -> None:
    llm = open_model(model, **{**OPTIONS, **SETTINGS[setting]})
    np.testing.assert_array_equal(eval_logits(llm, pieces()), stock[setting])
    if setting == "F16 KV":
        seen: list[int] = []
        with llm.collect_statistics(lambda batch: seen.extend(batch.positions.tolist()), keep_logits=True):
            np.testing.assert_array_equal(eval_logits(llm, pieces()), stock[setting])
        assert len(seen) == N_PROMPT + N_DECODE
