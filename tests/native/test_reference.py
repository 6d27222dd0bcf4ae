"""The oracles themselves: the tiny models load in stock llama.cpp, and the NumPy pass equals stock.

Stock llama-cpp-python runs in its own process with F32 K and V and without flash attention.
"""

from pathlib import Path

import numpy as np
import pytest
from oracles.expected import split
from oracles.fixtures import Open, Tiny
from oracles.reference import (
    KvHoleError,
    ReferenceModel,
    ReferenceRun,
    Trace,
    mean_similarity,
    median_ratio,
    norm_ratio,
    relative_error,
)
from oracles.skip_sets import skip_set
from oracles.stock import OPTIONS, Job, run_stock
from oracles.tiny_families import FAMILIES, tokens

SUBLAYERS = [(layer, kind) for layer in range(3) for kind in ("attention", "ffn")]


@pytest.mark.parametrize("name", FAMILIES)
def test_stock_llama_cpp_loads_every_family_and_every_sublayer_matters(name: str, tiny: Tiny) -> None:
    # Silencing a sublayer moves the logits by 0.2 to 1.4 of their norm; below 0.1 a wrong skip could hide.
    family, prompt = FAMILIES[name], tokens(40)
    kinds = ("attention",) if family.ffn == "none" else ("attention", "ffn")
    models = [tiny(name)] + [tiny(name, zero=[(layer, kind)]) for layer in range(family.n_layer) for kind in kinds]
    full, *silenced = run_stock([Job(str(model), [prompt], OPTIONS) for model in models])
    assert np.isfinite(full).all()
    assert all(np.linalg.norm(logits - full) > 0.1 * np.linalg.norm(full) for logits in silenced)


TOLERANCES = {"llama": 5e-6, "llama-tied": 5e-6, "llama-bias": 5e-6, "gemma3": 5e-4, "gptneox-parallel": 5e-4}


@pytest.mark.parametrize("name", TOLERANCES)
@pytest.mark.parametrize("size", [40, 7, 1], ids=["one piece", "pieces of 7", "token by token"])
def test_the_reference_equals_stock(name: str, size: int, tiny: Tiny) -> None:
    # Measured: 9e-7 to 2e-6, float32 rounding of stock; a wrong RoPE pairing or GQA grouping gives more than 0.1.
    # Gemma has a window of 8 of 40 tokens. GELU's table turns rounding of float32 into steps of F16: 9e-5 is measured.
    # In GPT-NeoX the other order of attention and FFN, or one input for both, gives more than 0.1.
    expected = ReferenceRun(ReferenceModel(tiny(name))).eval(tokens(40)).logits
    (actual,) = run_stock([Job(str(tiny(name)), split(tokens(40), size), OPTIONS)])
    assert relative_error(actual, expected) < TOLERANCES[name]


def test_the_reference_equals_stock_far_into_a_sequence(tiny: Tiny) -> None:
    # Measured: 4e-6; with angles that do not round as ggml's do, 2e-5 at the end.
    expected = ReferenceRun(ReferenceModel(tiny())).eval(tokens(501)).logits
    (actual,) = run_stock([Job(str(tiny()), [tokens(501)], {**OPTIONS, "n_ctx": 512})])
    assert relative_error(actual, expected) < 8e-6


def test_the_reference_gives_the_same_in_pieces(numpy_model: Open) -> None:
    # Both sides are float64: 1e-14 is measured.
    model, prompt = numpy_model(), tokens(40)
    whole, run = ReferenceRun(model).eval(prompt), ReferenceRun(model)
    pieces = Trace.concatenate([run.eval(piece) for piece in split(prompt, 7)])
    for name in ("dot", "u_sq", "v_sq"):
        np.testing.assert_allclose(getattr(pieces, name), getattr(whole, name), rtol=1e-12)
    assert relative_error(pieces.logits, whole.logits) < 1e-12


def test_a_sublayer_skipped_in_the_reference_equals_stock_on_the_zeroed_model(tiny: Tiny) -> None:
    # x + 0 is x: the same tolerance as without skipping.
    model, jobs = ReferenceModel(tiny()), [Job(str(tiny(zero=[each])), [tokens(40)], OPTIONS) for each in SUBLAYERS]
    for (layer, kind), actual in zip(SUBLAYERS, run_stock(jobs), strict=True):
        expected = ReferenceRun(model).eval(tokens(40), skip_set(**{kind: (layer,)}).skip).logits
        assert relative_error(actual, expected) < 5e-6, (layer, kind)


def test_the_reference_refuses_to_read_a_kv_hole(numpy_model: Open) -> None:
    run = ReferenceRun(numpy_model())
    run.eval(tokens(5), skip=[[True, False], [False, False], [False, False]])
    with pytest.raises(KvHoleError):
        run.eval([7])


def test_the_figures_of_a_request_are_those_of_the_paper() -> None:
    # Two tokens, worked out by hand: u = (3, 4), v = (6, 8): cosine 1, ratio 2; u = (1, 0), v = (0, 1): 0 and 1.
    figures = Trace(np.zeros((2, 1)), *(np.array(row, float).reshape(1, 1, 2) for row in ([50, 0], [25, 1], [100, 1])))
    assert mean_similarity(figures).item() == 0.5
    assert norm_ratio(figures).item() == pytest.approx(np.sqrt(101 / 26))
    assert median_ratio(figures).item() == 1.5


@pytest.mark.model
def test_the_reference_in_float32_equals_stock_on_smollm2(smollm2_f32_path: Path) -> None:
    # Measured: 3e-6 to 6e-6, both sides in float32.
    prompt = [1, *np.random.default_rng(0).integers(100, 49000, size=127).tolist()]
    expected = ReferenceRun(ReferenceModel(smollm2_f32_path, np.float32)).eval(prompt).logits
    options = {**OPTIONS, "n_threads_batch": 2}
    (actual,) = run_stock([Job(str(smollm2_f32_path), [prompt[:124], *split(prompt[124:], 1)], options)])
    assert relative_error(actual, expected) < 2e-5
