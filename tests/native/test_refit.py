"""Maps that are fitted again to the prompt: against least squares and the NumPy forward pass, both in float64.

test_sequences.py draws such plans among others. Tolerances: float32 against float64.
"""

from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import pytest
from oracles.bulks import chosen, plan
from oracles.drawn_plans import NOTHING
from oracles.expected import error
from oracles.fixtures import Open
from oracles.skip_sets import filled, only
from oracles.tiny_families import N_EMBD, tokens
from threadpoolctl import ThreadpoolController

from adaskip_cpp.errors import NativeError, PlanError
from adaskip_cpp.model import plan as plan_module
from adaskip_cpp.model.plan import Bulk
from adaskip_cpp.model.skip_set import SkipSet

SUBLAYERS = chosen((0, 0), (1, 1), (0, 1))
_MAPS = filled(only((1, 0), (1, 1)), 3, parts=("down", "up"))
_UP = np.where(only((1, 0))[:, :, None, None], 0, _MAPS.up)
LAYER = SkipSet(_MAPS.skip, _MAPS.scale, None, _MAPS.down, _UP)  # whole layer 1: the map of its FFN stands for both
WITHOUT_MAPS = SkipSet(SUBLAYERS.skip, SUBLAYERS.scale)
PROMPT = tokens(120)


@pytest.mark.parametrize("options", [{}, {"n_ubatch": 5}, {"n_batch": 7}], ids=str)
@pytest.mark.parametrize("of", [SUBLAYERS, LAYER, WITHOUT_MAPS], ids=["sublayers", "a whole layer", "no maps"])
def test_a_bulk_runs_under_maps_that_are_fitted_to_its_first_tokens(
    of: SkipSet, options: dict[str, Any], both: Open
) -> None:
    (llm, expected), (_, unfitted) = (both(plan(of, refit=n), n_ctx=256, **options) for n in (16, 0))
    for each in (llm, expected, unfitted):
        each.eval(PROMPT)
        each.eval(tokens(200)[120:])  # the text goes on, and the fit with it
    pieces = [(in_bulk, len([*cells])) for in_bulk, cells in groupby(cell.in_bulk for cell in expected.cells)]
    assert pieces == [(False, 16), (True, 96), (False, 8), (True, 72), (False, 8)]
    assert error(llm, expected) < 1e-5 < 1e-4 < error(llm, unfitted, 20)


def test_a_fit_goes_on_at_every_so_many_tokens(both: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "REFIT_EVERY", 64)
    llm, expected = both(plan(SUBLAYERS, refit=16), n_ctx=256)
    for each in (llm, expected):
        each.eval(tokens(148))  # the last 12 tokens of the bulk, from 128 on, are too few for a fit
        each.eval(tokens(240)[148:])
    assert len(expected.fit.samples) == 44 and len(expected.fit.text) == 208
    assert error(llm, expected) < 1e-5


def test_a_fit_has_one_thread_of_blas(both: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenBLAS keeps others busy after a product, and the next ubatch waits for their cores."""
    counts, inverse = [], np.linalg.inv
    of_blas = ThreadpoolController().select(user_api="blas")
    monkeypatch.setattr(np.linalg, "inv", lambda a: counts.append(of_blas.info()) or inverse(a))
    both(plan(SUBLAYERS, refit=16), n_ctx=256)[0].eval(PROMPT)
    assert counts and all(each["num_threads"] == 1 for info in counts for each in info)


def test_a_fit_runs_with_any_number_of_threads(both: Open) -> None:
    """With less than one, llama.cpp takes its default."""
    for n_threads_batch in (-1, 1, 3):
        llm, expected = both(plan(SUBLAYERS, refit=16), n_ctx=256, n_threads_batch=n_threads_batch)
        for each in (llm, expected):
            each.eval(PROMPT)
        assert error(llm, expected) < 1e-5


def interrupt(llm: Any, text: list[int], at: int) -> None:
    """Evaluate a text up to a position where a batch begins."""

    def stop(n: int) -> None:
        if n == at:
            raise KeyboardInterrupt

    llm.on_batch = stop
    with pytest.raises(KeyboardInterrupt):
        llm.eval(text)
    llm.on_batch = lambda n: None


@pytest.mark.parametrize("between", ["no plan", "another window", "an interruption"])
def test_maps_are_those_of_the_text_in_memory_whatever_came_before(between: str, both: Open) -> None:
    under = plan(SUBLAYERS, refit=16)
    llm, expected = both(under, n_ctx=256)
    for each in (llm, expected):
        each.eval(PROMPT)
        if between == "no plan":  # after which the plan's tag is that of before
            each.set_plan(None if each is llm else NOTHING)
            each.set_plan(under)
        elif between == "another window":  # the same maps, which native code must be given again
            other = replace(under, bulk=replace(under.bulk, windowed=(2,), window_size=300))
            each.set_plan(other, readable=[under])

    if between == "an interruption":
        interrupt(llm, tokens(200)[120:], 120)
    for each in (llm, expected):
        each.eval(tokens(200)[120:])
    assert error(llm, expected, 120) < 1e-5


def test_a_fit_that_is_interrupted_is_as_if_it_had_not_begun(both: Open) -> None:
    llm, expected = both(plan(SUBLAYERS, refit=16), n_ubatch=5, n_batch=5)
    interrupt(llm, PROMPT, 10)
    llm.reset()
    for each in (llm, expected):
        each.eval(PROMPT)
    assert error(llm, expected) < 1e-5


def test_a_plan_with_fits_does_not_read_the_bulk_of_one_without(open_tiny: Open) -> None:
    llm = open_tiny(under=plan(SUBLAYERS))
    llm.eval(PROMPT)
    llm.set_plan(plan(SUBLAYERS, refit=16))
    assert llm._adaskip.kv_valid("prefill", 120) == 4, "maps that stay as they are may lose more"


UP = np.zeros((N_EMBD, 2), np.float32)
REFUSED: list[tuple[int, tuple[Any, ...], str]] = [
    (0, (0, 0, UP), "no maps that may be replaced"),
    *((16, (*where, UP), "has no map of kind") for where in ((0, 2), (-1, 1), (3, 0), (2, 0), (9, 9))),
    (16, (0, 0, UP[1:]), "a map of 126 values"),
    (16, (0, 0, np.full_like(UP, np.nan)), "not finite"),
]


@pytest.mark.parametrize(("refit", "arguments", "message"), REFUSED)
def test_native_code_refuses_what_is_no_map_of_the_bulk(
    refit: int, arguments: tuple[Any, ...], message: str, open_tiny: Open
) -> None:
    llm = open_tiny(under=plan(SUBLAYERS, refit=refit))
    with pytest.raises((NativeError, PlanError), match=message):
        llm._adaskip.refit(*arguments)


@pytest.mark.parametrize("refit", [2048, -1, 1.5])
def test_a_bulk_refuses_a_fit_that_is_impossible(refit: Any) -> None:
    with pytest.raises(PlanError, match="refit is"):
        Bulk(SUBLAYERS, refit=refit)
