"""``repack`` is llama.cpp's ``use_extra_bufts``: bit-identical to stock with it and without it."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from oracles.fixtures import Open
from oracles.stock import OPTIONS, Job, eval_logits, run_stock
from oracles.tiny_families import tokens
from oracles.tiny_models import write_model

QUANTIZATIONS = ("Q4_0", "Q8_0")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("quantized")

    def path(name: str) -> Path:
        target = folder / f"{name}.gguf"
        return target if target.exists() else write_model(target, quantization=GGMLQuantizationType[name])

    return path


def pieces() -> list[list[int]]:
    """A prompt of several rows, which repacked products compute in groups of four, and two tokens alone."""
    return [tokens(37), [7], [8]]


def stock(path: Path, **model_params: Any) -> np.ndarray:
    (logits,) = run_stock([Job(str(path), pieces(), OPTIONS, model_params=model_params)])
    return logits


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_logits_are_stocks_with_repacking_which_is_the_default_and_without(
    quantization: str, quantized: Callable[[str], Path], open_model: Open
) -> None:
    path = quantized(quantization)
    for options, params in (({"repack": False}, {"use_extra_bufts": False}), ({}, {}), ({"repack": True}, {})):
        expected = stock(path, **params)
        np.testing.assert_array_equal(eval_logits(open_model(path, **options), pieces()), expected)


@pytest.mark.parametrize("repack", [True, False])
def test_a_pickled_model_is_opened_as_it_was(repack: bool, quantized: Callable[[str], Path], open_model: Open) -> None:
    llm = open_model(quantized("Q4_0"), repack=repack)
    other = pickle.loads(pickle.dumps(llm))
    assert llm.model_params.use_extra_bufts == other.model_params.use_extra_bufts == repack
    np.testing.assert_array_equal(*(eval_logits(each, pieces()) for each in (llm, other)))
    other.close()
