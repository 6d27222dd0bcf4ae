"""Where any one allocation fails while the plan is changed, or all from it on: an error of ours, and the model goes on.

What a model computes afterwards is compared with one that has seen no failure, on one thread and bit for bit.

Left out are ggml's own small allocations with malloc, 9 in a change of plan without vectors: ggml_init's (ggml.c, where
GGML_MALLOC and GGML_ASSERT end the process), the allocator's lists (ggml-alloc.c, GGML_ASSERT or a null pointer that is
written to) and the CPU's thread pool (ggml-cpu.c, a null pointer). Nothing outside ggml can prevent that; what takes
memory that may well be missing are the buffers, and those are among the trials.
"""

import random
import sys
from pathlib import Path

import pytest
from faults.allocation_trials import CASES
from faults.preloaded import build, trials
from oracles.fixtures import Tiny


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("failing_allocations.cpp", tmp_path_factory.mktemp("failing"))


@pytest.mark.parametrize("beyond", [0, 1], ids=["one", "all from it on"])
@pytest.mark.parametrize("case", CASES)
def test_a_failed_allocation_is_an_error_and_the_model_goes_on(
    case: str, beyond: int, failing: Path, tiny: Tiny, pytestconfig: pytest.Config
) -> None:
    step = pytestconfig.option.allocations_step
    numbers = beyond, random.randint(1, step), step, sys.maxsize
    found = trials(failing, "allocation_trials.py", case, tiny(CASES[case][0]), *numbers)
    assert [trial for trial in found if trial["wrong"]] == []
    assert sum(trial["error"] is not None for trial in found) * step > 500


def test_where_a_refusal_finds_no_memory_for_its_words_it_is_an_error(failing: Path, tiny: Tiny) -> None:
    # Those are the first allocations of all; the exception that carries the words ended the process.
    found = trials(failing, "allocation_trials.py", "refused", tiny("jamba"), 1, 1, 1, 40)
    assert len(found) == 40 and [trial for trial in found if trial["error"] is None or trial["wrong"]] == []
