"""Where any one allocation fails while the plan is changed, or all from it on: an error of ours, and the model goes on.

What a model computes afterwards is compared with one that has seen no failure, on one thread and bit for bit.

Left out are ggml's own small allocations with malloc, 9 in a change of plan without vectors: ggml_init's (ggml.c, where
GGML_MALLOC and GGML_ASSERT end the process), the allocator's lists (ggml-alloc.c, GGML_ASSERT or a null pointer that is
written to) and the CPU's thread pool (ggml-cpu.c, a null pointer). Nothing outside ggml can prevent that; what takes
memory that may well be missing are the buffers, and those are among the trials.
"""

import random
from collections import Counter

import pytest
from faults.allocation_trials import BUFFERS, CASES, LLAMA, trials
from faults.preloaded import build, environment
from oracles.fixtures import Tiny

FAMILY = {"gemma3": "gemma3", "jamba": "jamba", "gemma4": "gemma4", "refused": "jamba"}
"""The family of a case that is not of the llama."""


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return environment(build("failing_allocations.cpp", tmp_path_factory.mktemp("failing")))


@pytest.mark.parametrize("beyond", [False, True], ids=["one", "all from it on"])
@pytest.mark.parametrize("case", CASES)
def test_a_failed_allocation_is_an_error_and_the_model_goes_on(
    case: str, beyond: bool, failing: dict[str, str], tiny: Tiny, pytestconfig: pytest.Config
) -> None:
    step = pytestconfig.option.allocations_step
    model = tiny(FAMILY.get(case, "llama"))
    found = trials(failing, model, case, LLAMA | BUFFERS, beyond, first=random.randint(1, step), step=step)
    assert [each for each in found if each.end == "died" or each.wrong] == []
    assert Counter(each.end for each in found)["raised"] * step > 500


def test_where_a_refusal_finds_no_memory_for_its_words_it_is_an_error(failing: dict[str, str], tiny: Tiny) -> None:
    # Those are the first allocations of all; the exception that carries the words ended the process.
    found = trials(failing, tiny("jamba"), "refused", LLAMA, True, last=40)
    assert len(found) == 40 and [each for each in found if each.end != "raised" or each.wrong] == []
