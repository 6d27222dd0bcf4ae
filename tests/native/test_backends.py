"""Devices of ggml other than the CPU: the same logits and statistics, no more splits or copies than without a plan.

Skipped where there is no such device. `make test-rpc` runs them on two rpc-servers (`--rpc-servers=2`), `make
test-vulkan` on Vulkan, which Mesa also has in software.

The CPU in this process is the truth. The other tests compare it with NumPy. The tolerance is measured: it is a few
times the difference of the whole model between CPU and device. A plan sends other values through the same kernels.
"""

import ctypes
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_cpp._logger import llama_log_callback
from oracles.drawn_plans import plans
from oracles.fixtures import Open, Tiny
from oracles.reference import ReferenceModel, relative_error
from oracles.stock import OPTIONS, Job, run_stock
from oracles.tiny_families import tokens

from adaskip_cpp import AdaSkipLlama, SkipPlan
from adaskip_cpp.engine.binding import lib
from adaskip_cpp.measuring import corpus
from adaskip_cpp.model.plan import Bulk
from native import test_several_sequences

_Q8_0 = 8  # GGML_TYPE_Q8_0
_KINDS_OF_DEVICE = (1, 2)  # GGML_BACKEND_DEVICE_TYPE_GPU, _IGPU
pytestmark = pytest.mark.skipif(
    not any(lib.ggml_backend_dev_by_type(kind) for kind in _KINDS_OF_DEVICE), reason="ggml has no device but the CPU"
)


# What is made of the errors of all tokens. Where rounding lets some choose other experts, more than half do not.
FAMILIES = {"llama": np.max, "qwen3moe": np.median, "gemma3": np.max, "falcon": np.max, "olmo2": np.max}
PLACES = {"all layers": -1, "half of the layers": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "flash attention": {"flash_attn": True},
    "K and V of Q8_0": {"flash_attn": True, "type_k": _Q8_0, "type_v": _Q8_0},
    "nothing offloaded": {"op_offload": False},
    "ubatches of a token": {"n_ubatch": 1},
    "ubatches above the batch": {"n_batch": 16, "n_ubatch": 64},
    "weights not mapped": {"use_mmap": False},
}
# On half of the layers each setting meets both devices and the border between them. Qwen3's heads of 32 values are
# blocks of Q8_0.
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    **{f"{name}, {place}": (name, n, {}) for name in FAMILIES for place, n in PLACES.items()},
    **{name: ("qwen3", PLACES["half of the layers"], options) for name, options in SETTINGS.items()},
}
MANY_TIMES, LEAST_ROUNDING = 4, 1e-6
"""The whole model's difference between the two, which is its rounding, times so much is allowed with a plan; where a
device rounds as the CPU does, a server's CPU say, at least that of float32."""

on_devices = pytest.mark.parametrize("n_gpu_layers", PLACES.values(), ids=PLACES.keys())


def on_both(
    open_model: Open, path: Path, n_gpu_layers: int, options: dict[str, Any] | None = None
) -> tuple[AdaSkipLlama, AdaSkipLlama]:
    """The model on the CPU alone, and on the device; ubatches of 32 tokens and more would be offloaded all the same."""
    on_cpu = {**(options or {}), "n_gpu_layers": 0, "op_offload": False}
    return open_model(path, **on_cpu), open_model(path, n_gpu_layers=n_gpu_layers, **(options or {}))


def pass_over(llm: Any, plan: SkipPlan | None, tokens: list[int], splits: list[int] | None = None) -> np.ndarray:
    """Logits of a prompt of all tokens but eight and of an answer of these; ``splits`` gets those of both graphs."""
    llm.reset()
    llm.set_plan(plan)
    llm.begin_request()
    llm.eval(tokens[:-8])
    prompt = llm.scores[: llm.n_tokens].copy()
    counted = [llm.counters.splits]
    result = np.concatenate([prompt, *(llm.logits_after([token]) for token in tokens[-8:])])
    if splits is not None:
        splits[:] = [*counted, llm.counters.splits]
    return result


def copies(llm: Any, plan: SkipPlan | None, tokens: list[int]) -> tuple[int, int]:
    """How many tensors, and KiB, the scheduler copies between devices for one graph, at most."""
    said: list[str] = []
    keep = llama_cpp.llama_log_callback(lambda level, text, data: said.append(text.decode("utf-8", "replace")))
    llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
    try:
        pass_over(llm, plan, tokens)
    finally:
        llama_cpp.llama_log_set(llama_log_callback, ctypes.c_void_p(0))
    graphs = [re.findall(r"\( *(\d+)K\)\] ", graph) for graph in "".join(said).split("## SPLIT #0")[1:]]
    return max(map(len, graphs)), max(sum(map(int, graph)) for graph in graphs)


@pytest.mark.parametrize("case", CASES)
def test_without_a_plan_it_is_the_stock_library_on_the_device(case: str, tiny: Tiny, open_model: Open) -> None:
    """Logits before and after a plan are the stock library's with the same options, bit for bit."""
    name, n_gpu_layers, options = CASES[case]
    path, options, pieces = tiny(name), {**options, "n_gpu_layers": n_gpu_layers}, [tokens(60), [5], [6]]
    (expected,) = run_stock([Job(str(path), pieces, {**OPTIONS, **options})])
    llm = open_model(path, **options)
    for _ in range(2):
        llm.reset()
        for piece in pieces:
            llm.eval(piece)
        np.testing.assert_array_equal(llm.scores[: llm.n_tokens], expected)
        llm.set_plan(SkipPlan.manual(llm.n_layer, ffn=[1]))
        llm.eval([7])
        llm.set_plan(None)


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_plan_gives_what_it_gives_on_the_cpu(case: str, tiny: Tiny, open_model: Open) -> None:
    """As it is drawn: sets of all phases, scales, vectors, maps, windows, schedules, online stages."""
    name, n_gpu_layers, options = CASES[case]
    of_tokens, max_examples = FAMILIES.get(name, np.max), 6 if options else 12
    on_cpu, on_device = on_both(open_model, tiny(name), n_gpu_layers, options)
    prompt = tokens(60)
    # Devices have other kernels for few tokens than for many, and a plan cuts a prompt into both.
    cuts = [prompt[:n] for n in (9, 14, 30, 60)]

    def apart(plan: SkipPlan | None, tokens: list[int], splits: list[int]) -> float:
        expected, found = (pass_over(llm, plan, tokens, splits) for llm in (on_cpu, on_device))
        return float(of_tokens([relative_error([a], [b]) for a, b in zip(found, expected, strict=True)]))

    rounding = max(apart(None, cut, []) for cut in cuts)
    assert rounding < 0.2, "else nothing would be held"
    windowable = [each.layer for each in on_cpu.sublayers if each.windowable]

    @settings(max_examples=max_examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(plan=plans([-1.0, 2.0], windowable=windowable), n=st.integers(20, 60))
    def drawn(plan: SkipPlan, n: int) -> None:
        whole: list[int] = []
        splits: list[int] = []
        pass_over(on_device, None, prompt[:n], whole)
        assert apart(plan, prompt[:n], splits) <= MANY_TIMES * max(rounding, LEAST_ROUNDING)
        assert splits[0] <= whole[0] and splits[1] <= whole[1], "a plan adds no split"

    drawn()


@on_devices
@pytest.mark.parametrize("unified", [True, False], ids=["one stream", "a stream each"])
def test_several_sequences_on_a_device(
    unified: bool,
    n_gpu_layers: int,
    tiny: Tiny,
    open_model: Open,
    explore: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Copied, shifted and cut, against NumPy; that a device rounds otherwise is allowed for, as above."""
    on_cpu, on_device = on_both(open_model, tiny(), n_gpu_layers)
    # Batches here have few tokens, for which devices have kernels of their own.
    cuts = [tokens(n + 8) for n in range(1, 12)]
    rounding = max(relative_error(*(pass_over(llm, None, cut) for llm in (on_device, on_cpu))) for cut in cuts)
    tolerance = test_several_sequences.TOLERANCE + MANY_TIMES * rounding
    monkeypatch.setattr(test_several_sequences, "TOLERANCE", tolerance)
    options = {"n_gpu_layers": n_gpu_layers}
    explore(partial(test_several_sequences.Calls, tiny(), ReferenceModel(tiny()), unified, options, ()))


@on_devices
def test_a_plan_adds_no_copies_between_devices(
    n_gpu_layers: int, open_tiny: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ggml's scheduler says that it copies; a window has cells and a mask of its own, copied to each device."""
    monkeypatch.setenv("GGML_SCHED_DEBUG", "1")
    llm, prompt = open_tiny(n_gpu_layers=n_gpu_layers), tokens(60)
    whole = copies(llm, None, prompt)
    assert whole[0] > 0

    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(plan=plans([-1.0, 2.0], windowable=range(llm.n_layer)))
    def drawn(plan: SkipPlan) -> None:
        n, kib = copies(llm, plan, prompt)
        if plan.narrowed:
            assert n <= whole[0] + 2 * (lib.ggml_backend_dev_count() - 1)
        else:
            assert n <= whole[0] and kib <= whole[1]

    drawn()


@on_devices
def test_statistics_are_those_of_the_cpu(n_gpu_layers: int, tiny: Tiny, open_model: Open) -> None:
    seen: list[list[Any]] = []
    llms = on_both(open_model, tiny(), n_gpu_layers)
    for llm in llms:
        batches: list[Any] = []
        with llm.collect_statistics(batches.append):
            llm.eval(tokens(60))
        seen.append([np.concatenate([getattr(one, name) for one in batches]) for name in ("dot", "u_sq", "sum_u")])
    rounding = relative_error(*(pass_over(llm, None, tokens(60)) for llm in reversed(llms)))
    for expected, found in zip(*seen, strict=True):
        assert relative_error(found.reshape(1, -1), expected.reshape(1, -1)) <= MANY_TIMES * rounding + LEAST_ROUNDING


@on_devices
def test_kv_that_is_never_written_is_not_there(n_gpu_layers: int, tiny: Tiny, open_model: Open) -> None:
    """As on the CPU; and without it a device computes what it does with it, bit for bit."""
    plan = SkipPlan.manual(3, attention=[0, 2])
    on_cpu, on_device = on_both(open_model, tiny(), n_gpu_layers, {"plan": plan})
    assert on_device.elided_kv == (0, 2) and on_device.kv_bytes == on_cpu.kv_bytes
    with_kv = open_model(tiny(), n_gpu_layers=n_gpu_layers)
    assert 3 * on_device.kv_bytes == with_kv.kv_bytes
    np.testing.assert_array_equal(*(pass_over(llm, plan, tokens(40)) for llm in (on_device, with_kv)))


@pytest.mark.model
@pytest.mark.parametrize("n_gpu_layers", [-1, 15], ids=PLACES.keys())
def test_a_real_model_is_the_stock_library_s_and_the_cpu_s(
    n_gpu_layers: int, smollm2_path: Path, open_model: Open
) -> None:
    """SmolLM2, Q4_1, KV of F16: each device dequantises and rounds in its own way, the plan's maps too."""
    options = {"n_ctx": 256, "type_k": None, "type_v": None, "n_threads": 2, "n_threads_batch": 2}
    on_cpu, on_device = on_both(open_model, smollm2_path, n_gpu_layers, options)
    prompt = corpus.tokens_of(on_cpu, corpus.text()[:2000], bos=True)[:56]
    job = Job(str(smollm2_path), [prompt], {"n_gpu_layers": n_gpu_layers, **OPTIONS, **options})
    (expected,) = run_stock([job])
    on_device.eval(prompt)
    np.testing.assert_array_equal(on_device.scores[: len(prompt)], expected)
    rounding = relative_error(*(pass_over(llm, None, prompt) for llm in (on_device, on_cpu)))
    upper, none = range(20, 30), SkipPlan.manual(30)
    for plan in (
        replace(none, bulk=Bulk(SkipPlan.manual(30, attention=upper, ffn=upper).prefill, tail=8)),
        SkipPlan.manual(30, attention=[7, 12], ffn=[9], scale=0.9),
    ):
        found, expected = (pass_over(llm, plan, prompt) for llm in (on_device, on_cpu))
        assert relative_error(found, expected) <= MANY_TIMES * max(rounding, LEAST_ROUNDING)
