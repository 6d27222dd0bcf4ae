"""Maps that are fitted again to the prompt: against least squares and the NumPy forward pass, both in float64.

Tolerances: float32 against float64. The fit's own error is that of sums of 16 products, solved with a ridge.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from oracles.bulks import NOTHING, chosen, phases, plan
from oracles.expected import error, history_of
from oracles.fixtures import Open
from oracles.reference import ReferenceModel
from oracles.sequence_oracle import Cell, History
from oracles.skip_sets import filled, only
from oracles.stock import eval_logits
from oracles.tiny_families import tokens

from adaskip_cpp import SkipPlan
from adaskip_cpp.engine.refit import N_PRIOR
from adaskip_cpp.errors import NativeError, PlanError
from adaskip_cpp.model import plan as plan_module
from adaskip_cpp.model.plan import Bulk
from adaskip_cpp.model.skip_set import SkipSet

SUBLAYERS = chosen((0, 0), (1, 1), (0, 1))
_MAPS = filled(only((1, 0), (1, 1)), 3, parts=("down", "up"))
_UP = np.where(only((1, 0))[:, :, None, None], 0, _MAPS.up)
LAYER = SkipSet(_MAPS.skip, _MAPS.scale, None, _MAPS.down, _UP)  # whole layer 1: the map of its FFN stands for both
PROMPT = tokens(120)


def fitted(
    model: ReferenceModel, of: SkipSet, *samples: range, after: Sequence[tuple[int, SkipSet | None]] = ()
) -> SkipSet:
    """The set with maps fitted to the tokens of ``samples``: least squares with rows that hold ``up`` where it was.

    ``after`` has what is in memory up to the last sample, the whole model if it is left out.
    """
    up, at = of.up.copy(), [*itertools.chain(*samples)]
    history = holds(model, plan(of), after or [(at[-1] + 1, None)])
    traces = [history.trace(index) for index in at]
    for layer, kind in np.argwhere(of.skip):
        if not of.up[layer, kind].any():
            continue
        u, v = (
            np.stack([each[(*where, 0)] for each in which])
            for which, where in (
                ([trace.u for trace in traces], (layer, 0 if of is LAYER else kind)),
                ([trace.v for trace in traces], (layer, kind)),
            )
        )
        z = u @ of.down[layer, kind].astype(np.float64).T
        wanted = v - of.scale[layer, kind] * u
        wanted = wanted if of.bias is None else wanted - of.bias[layer, kind]
        weight = np.sqrt(N_PRIOR * (z * z).mean()) * np.eye(z.shape[1])
        rows, values = np.concatenate([z, weight]), np.concatenate([wanted, weight @ up[layer, kind].T])
        up[layer, kind] = np.linalg.lstsq(rows, values, rcond=None)[0].T
    return SkipSet(of.skip, of.scale, of.bias, of.down, up.astype(np.float32))


def holds(model: ReferenceModel, under: SkipPlan, pieces: Sequence[tuple[int, SkipSet | None]]) -> History:
    """What is in memory: so many tokens under a set each, None for the whole model."""
    history, text = history_of(model, under), iter(tokens(300))
    for n, skip_set in pieces:
        for token in (next(text) for _ in range(n)):
            cell = Cell(token, NOTHING)
            history.cells.append(cell if skip_set is None else replace(cell, skip_set=skip_set, in_bulk=True))
    return history


@pytest.mark.parametrize("options", [{}, {"n_ubatch": 5}, {"n_batch": 7}], ids=str)
@pytest.mark.parametrize("of", [SUBLAYERS, LAYER], ids=["sublayers", "a whole layer"])
def test_a_bulk_runs_under_maps_that_are_fitted_to_its_first_tokens(
    of: SkipSet, options: dict[str, Any], open_tiny: Open, reference: ReferenceModel
) -> None:
    under = plan(of, refit=16)
    llm = open_tiny(under=under, n_ctx=256, **options)
    new = fitted(reference, of, range(4, 20))
    llm.eval(PROMPT)
    assert error(llm, holds(reference, under, [(20, None), (92, new), (8, None)])) < 1e-5
    assert error(llm, holds(reference, under, [(20, None), (92, of), (8, None)])) > 1e-4  # the test sees the fit
    llm.eval(tokens(200)[120:])  # the text goes on, and the fit with it
    pieces = [(20, None), (92, new), (8, None), (72, new), (8, None)]
    assert error(llm, holds(reference, under, pieces)) < 1e-5


def test_a_fit_goes_on_at_every_so_many_tokens(
    open_tiny: Open, reference: ReferenceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "REFIT_EVERY", 64)
    under, text = plan(SUBLAYERS, refit=16), tokens(148)
    first = fitted(reference, SUBLAYERS, range(4, 20))
    pieces = [(20, None), (44, first), (16, None)]
    both = fitted(reference, SUBLAYERS, range(4, 20), range(64, 80), after=pieces)
    pieces += [(48, both), (20, None)]
    llm = open_tiny(under=under, n_ctx=256)
    llm.eval(text)  # the last 12 tokens of the bulk, from 128 on, are too few for a fit
    assert error(llm, holds(reference, under, pieces)) < 1e-5
    llm.eval(tokens(240)[148:])
    pieces += [(44, both), (16, None)]
    third = fitted(reference, SUBLAYERS, range(4, 20), range(64, 80), range(192, 208), after=pieces)
    assert error(llm, holds(reference, under, [*pieces, (24, third), (8, None)])) < 1e-5


def test_a_bulk_with_too_few_tokens_runs_whole(open_tiny: Open) -> None:
    llm, whole = open_tiny(under=plan(SUBLAYERS, refit=16)), open_tiny()
    assert (eval_logits(llm, [PROMPT[:28]]) == eval_logits(whole, [PROMPT[:4], PROMPT[4:20], PROMPT[20:28]])).all()
    assert (eval_logits(llm, [PROMPT[:20]]) == eval_logits(whole, [PROMPT[:4], PROMPT[4:12], PROMPT[12:20]])).all()


@pytest.mark.parametrize("between", ["another plan", "another window", "a state", "an interruption", "another text"])
def test_maps_are_those_of_the_text_in_memory_whatever_came_before(
    between: str, open_tiny: Open, reference: ReferenceModel
) -> None:
    under, text = plan(SUBLAYERS, refit=16), tokens(200)
    new = fitted(reference, SUBLAYERS, range(4, 20))
    llm = open_tiny(under=under, n_ctx=256)
    llm.eval(PROMPT)
    if between == "another plan":
        llm.set_plan(plan(chosen((0, 1))))
        llm.set_plan(under)
    elif between == "another window":  # the same maps, which native code must be given again
        under = replace(under, bulk=replace(under.bulk, windowed=(2,), window_size=300))
        llm.set_plan(under, readable=[plan(SUBLAYERS, refit=16)])
    elif between == "a state":
        state = llm.save_state()
        llm.reset()
        llm.eval(tokens(150, 1))
        llm.load_state(state)  # the fit was forgotten, and the text goes on with one of its own
        llm.eval(text[120:])
        pieces = [(20, None), (92, new), (24, None)]
        later = fitted(reference, SUBLAYERS, range(120, 136), after=pieces)
        assert error(llm, holds(reference, under, [*pieces, (56, later), (8, None)]), 120) < 1e-5
        return
    elif between == "an interruption":

        def stop(n: int) -> None:
            raise KeyboardInterrupt

        llm.on_batch = stop
        with pytest.raises(KeyboardInterrupt):
            llm.eval(text[120:])
        llm.on_batch = lambda n: None
    else:
        llm.reset()
        llm.eval(tokens(150, 1))
        llm.reset()
        llm.eval(PROMPT)
    llm.eval(text[llm.n_tokens :])
    pieces = [(20, None), (92, new), (8, None), (72, new), (8, None)]
    assert error(llm, holds(reference, under, pieces), 120 if between == "another plan" else 0) < 1e-5


def test_a_fit_that_is_interrupted_is_as_if_it_had_not_begun(open_tiny: Open) -> None:
    under = plan(SUBLAYERS, refit=16)
    llm, fresh = open_tiny(under=under, n_ubatch=5, n_batch=5), open_tiny(under=under, n_ubatch=5, n_batch=5)

    def stop(n: int) -> None:
        if n == 9:
            raise KeyboardInterrupt

    llm.on_batch = stop
    with pytest.raises(KeyboardInterrupt):
        llm.eval(PROMPT)
    llm.on_batch = lambda n: None
    llm.reset()
    assert (eval_logits(llm, [PROMPT]) == eval_logits(fresh, [PROMPT])).all()


def test_while_statistics_are_collected_the_bulk_runs_whole(open_tiny: Open) -> None:
    llm, whole = open_tiny(under=plan(SUBLAYERS, refit=16)), open_tiny()
    assert phases(llm, lambda: llm.eval(PROMPT)) == {"prefill": [*range(120)]}
    assert (llm.scores[119] == eval_logits(whole, [PROMPT[:4], PROMPT[4:112], PROMPT[112:]])[-1]).all()


def test_only_plans_with_the_same_fits_read_each_others_bulk(open_tiny: Open) -> None:
    """Positions under maps that stay as they are may lose more."""
    llm, with_fit, without = open_tiny(), plan(SUBLAYERS, refit=16), plan(SUBLAYERS)
    ids = [llm._adaskip.bulk_set_id(each) for each in (with_fit, without)]
    assert ids[0] != ids[1] and 0 not in ids
    llm.set_plan(without)
    llm.eval(PROMPT)
    llm.set_plan(with_fit)
    assert llm._adaskip.kv_valid("prefill", 120) == 4


def refusals() -> Iterator[tuple[str, tuple[Any, ...], str]]:
    up = np.zeros((64, 2), np.float32)
    yield "no fit", (0, 0, up), "no maps that may be replaced"
    for where in ((0, 2), (-1, 1), (3, 0), (2, 0), (9, 9)):
        yield "fit", (*where, up), "has no map of kind"
    yield "fit", (0, 0, up[:63]), "a map of 126 values"
    yield "fit", (0, 0, np.full_like(up, np.nan)), "not finite"


@pytest.mark.parametrize(("which", "arguments", "message"), [*refusals()])
def test_native_code_refuses_what_is_no_map_of_the_bulk(
    which: str, arguments: tuple[Any, ...], message: str, open_tiny: Open
) -> None:
    llm = open_tiny(under=plan(SUBLAYERS, refit=16 if which == "fit" else 0))
    with pytest.raises((NativeError, PlanError), match=message):
        llm._adaskip.refit(*arguments)


@pytest.mark.parametrize("refit", [2048, -1, 1.5])
def test_a_bulk_refuses_a_fit_that_is_impossible(refit: Any) -> None:
    with pytest.raises(PlanError, match="refit is"):
        Bulk(SUBLAYERS, refit=refit)


def test_without_maps_the_first_tokens_run_whole_all_the_same(open_tiny: Open, reference: ReferenceModel) -> None:
    of = SkipSet(SUBLAYERS.skip, SUBLAYERS.scale)
    llm = open_tiny(under=plan(of, refit=16))
    llm.eval(PROMPT)
    assert error(llm, holds(reference, plan(of), [(20, None), (92, of), (8, None)])) < 1e-5
