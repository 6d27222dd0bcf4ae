"""A device of ggml other than the CPU: the same logits, the same statistics, and no more splits than without a plan.

Skipped where there is none; `make test-backends` builds llama-cpp-python with Vulkan, which Mesa has in software too.

The CPU in this process is the truth, which the other tests hold against NumPy. What a device may differ by is measured:
as much as the whole model differs between the two, times a few, as a plan leads other values through the same kernels.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn_plans import plans
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import relative_error
from stock import EXACT, Job, run_stock

from adaskip_cpp import AdaSkipLlama, SkipPlan
from adaskip_cpp.engine.binding import lib

_KINDS_OF_DEVICE = (1, 2)  # GGML_BACKEND_DEVICE_TYPE_GPU, _IGPU
pytestmark = pytest.mark.skipif(
    not any(lib.ggml_backend_dev_by_type(kind) for kind in _KINDS_OF_DEVICE), reason="ggml has no device but the CPU"
)

Tiny = Callable[..., Path]
Tokens = Callable[..., list[int]]
Open = Callable[..., Any]

FAMILIES = ["llama", "qwen3moe", "gemma3", "falcon", "olmo2"]
PLACES = {"all layers": -1, "half of the layers": 2}
MANY_TIMES = 4
"""The whole model's difference between the two, which is its rounding, times so much is allowed with a plan."""

on_devices = pytest.mark.parametrize("n_gpu_layers", PLACES.values(), ids=PLACES.keys())


def pass_over(llm: Any, plan: SkipPlan | None, tokens: list[int], splits: list[int] | None = None) -> np.ndarray:
    """Logits of a prompt of all tokens but eight and of an answer of these; ``splits`` gets those of both graphs."""
    llm.reset()
    llm.set_plan(plan)
    llm.begin_request()
    llm.eval(tokens[:-8])
    prompt = llm.scores[: llm.n_tokens].copy()
    counted = [llm.counters.splits]
    result = np.concatenate([prompt, *(llm.logits_behind([token]) for token in tokens[-8:])])
    if splits is not None:
        splits[:] = [*counted, llm.counters.splits]
    return result


@on_devices
@pytest.mark.parametrize("name", FAMILIES)
def test_without_a_plan_it_is_the_stock_library_on_the_device(
    name: str, n_gpu_layers: int, tiny: Tiny, tokens: Tokens, open_model: Open
) -> None:
    """Bit for bit, before and after a plan: the graphs are the same."""
    pieces = [tokens(60), [5], [6]]
    options = {"n_ctx": 128, "logits_all": True, "n_gpu_layers": n_gpu_layers, **EXACT}
    (expected,) = run_stock([Job(str(tiny(name)), pieces, options)])
    llm = open_model(tiny(name), n_gpu_layers=n_gpu_layers)
    for _ in range(2):
        llm.reset()
        for piece in pieces:
            llm.eval(piece)
        np.testing.assert_array_equal(llm.scores[: llm.n_tokens], expected)
        llm.set_plan(SkipPlan.manual(llm.n_layer, ffn=[1]))
        llm.eval([7])
        llm.set_plan(None)


@on_devices
@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_plan_gives_what_it_gives_on_the_cpu(
    name: str, n_gpu_layers: int, tiny: Tiny, tokens: Tokens, open_model: Open
) -> None:
    """As they are drawn: sets of all phases, scales, vectors, maps, windows, schedules and online stages."""
    on_cpu, on_device = (open_model(tiny(name), n_gpu_layers=each) for each in (0, n_gpu_layers))
    prompt = tokens(60)
    # Devices have other kernels for few tokens than for many, and a plan cuts a prompt into both.
    cuts = [prompt[:n] for n in (9, 14, 30, 60)]
    rounding = max(relative_error(*(pass_over(llm, None, cut) for llm in (on_device, on_cpu))) for cut in cuts)
    whole: list[int] = []
    pass_over(on_device, None, prompt, whole)
    windowable = [each.layer for each in on_cpu.sublayers if each.windowable]

    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(plan=plans([-1.0, 2.0], windowable=windowable), n=st.integers(20, 60))
    def drawn(plan: SkipPlan, n: int) -> None:
        splits: list[int] = []
        found, expected = (pass_over(llm, plan, prompt[:n], splits) for llm in (on_cpu, on_device))
        assert relative_error(found, expected) < MANY_TIMES * rounding
        assert splits[0] <= whole[0] and splits[1] <= whole[1], "a plan adds no split"

    drawn()


@on_devices
def test_statistics_are_those_of_the_cpu(n_gpu_layers: int, tiny: Tiny, tokens: Tokens, open_model: Open) -> None:
    seen: list[list[Any]] = []
    for each in (0, n_gpu_layers):
        llm, batches = open_model(tiny(), n_gpu_layers=each), []
        with llm.collect_statistics(batches.append, vectors=True):
            llm.eval(tokens(60))
        seen.append([np.concatenate([getattr(one, name) for one in batches]) for name in ("dot", "u_sq", "sum_u")])
    for found, expected in zip(*reversed(seen), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)


@on_devices
def test_kv_that_is_never_written_is_not_there(n_gpu_layers: int, tiny: Tiny, tokens: Tokens, open_model: Open) -> None:
    plan = SkipPlan.manual(3, attention=[0, 2])
    on_cpu, on_device = (open_model(tiny(), n_gpu_layers=each, plan=plan) for each in (0, n_gpu_layers))
    assert on_device.elided_kv == (0, 2) and on_device.kv_bytes == on_cpu.kv_bytes
    with_kv = AdaSkipLlama(str(tiny()), n_ctx=128, verbose=False, **EXACT)
    assert 3 * on_device.kv_bytes == with_kv.kv_bytes
    with_kv.close()
    found, expected = (pass_over(llm, plan, tokens(40)) for llm in (on_device, on_cpu))
    assert relative_error(found, expected) < 1e-2
