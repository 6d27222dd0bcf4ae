"""The settings that the times of a profile are measured with: those that the model was opened with."""

import sys
from pathlib import Path

import pytest
from oracles.fixtures import Open, Tiny

from adaskip_cpp.engine.settings import cost_settings


def test_the_settings_are_those_that_the_model_was_opened_with(tiny: Tiny, open_model: Open) -> None:
    llm = open_model(tiny(), n_threads=1, n_threads_batch=2, n_batch=64, n_ubatch=32, swa_full=True)
    found = cost_settings(llm)
    assert (found.n_threads, found.n_threads_batch, found.n_batch, found.n_ubatch) == (1, 2, 64, 32)
    assert (found.type_k, found.type_v, found.swa_full, found.repack) == ("F32", "F32", True, True)
    assert not cost_settings(open_model(tiny(), repack=False)).repack


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells the processor's name on Linux only")
def test_the_processor_is_named_as_the_kernel_names_it(tiny: Tiny, open_model: Open) -> None:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    assert cost_settings(open_model(tiny())).cpu in (names or {"CPU"})
