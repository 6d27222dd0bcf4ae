"""Without a plan, AdaSkipLlama does what llama_cpp.Llama does: the stock library, in another process, is the oracle."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[1] / "oracles" / "behaviour.py"


def results(which: str, model: Path) -> dict[str, Any]:
    process = subprocess.run(
        [sys.executable, str(PROGRAM), which, str(model)], capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return dict(json.loads(process.stdout))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_every_method_of_a_llama_gives_what_stock_gives(name: str, tiny: Callable[..., Path]) -> None:
    ours, stock = results("ours", tiny(name)), results("stock", tiny(name))
    assert ours.keys() == stock.keys() and len(stock) > 15
    assert {key for key in stock if ours[key] != stock[key]} == set()


@pytest.mark.model
def test_every_method_of_a_real_model_gives_what_stock_gives(smollm2_path: Path) -> None:
    ours, stock = results("ours", smollm2_path), results("stock", smollm2_path)
    assert {key for key in stock if ours[key] != stock[key]} == set()
    assert stock["grammar"]["text"] in ("yes", "no")
