"""``AdaSkipLlama.logits_after``: the logits after every token, also of a model that keeps the last one's alone."""

from typing import Any

import numpy as np
import pytest
from oracles.bulks import NOTHING, TOLERANCE, chosen, plan
from oracles.expected import history_of, split
from oracles.fixtures import Open, Tiny
from oracles.reference import OnlineReference, relative_error
from oracles.stock import EXACT, Job, run_stock
from oracles.tiny_families import N_LAYER, N_VOCAB, tokens

from adaskip_cpp import SkipPlan
from adaskip_cpp.errors import NativeError, RequestError, StateError
from adaskip_cpp.model.plan import OnlineStage

N_PROMPT = 40


@pytest.fixture(params=[False, True], ids=["last logits", "all logits"])
def logits_all(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize("n_batch", [128, 16, 7])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma4"])
def test_they_are_stocks_bit_for_bit(name: str, n_batch: int, logits_all: bool, tiny: Tiny, open_tiny: Open) -> None:
    text, options = tokens(60), {"n_batch": n_batch, "logits_all": logits_all, "exact_batches": True}
    pieces, all_rows = [text[:N_PROMPT], text[N_PROMPT:]], {"n_ctx": 128, "n_batch": n_batch, "logits_all": True}
    [expected] = run_stock([Job(str(tiny(name)), pieces, {**all_rows, **EXACT})])
    llm = open_tiny(name, **options)
    llm.eval(pieces[0])
    found = llm.logits_after(pieces[1])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected[N_PROMPT:])
    assert llm.logits_after([]).shape == (0, N_VOCAB), "after no tokens there are none"
    assert llm.n_tokens == 60 and llm.input_ids[:60].tolist() == text


@pytest.mark.parametrize(
    ("size", "options"),
    [(20, {}), (1, {}), (20, {"n_batch": 7}), (20, {"n_ubatch": 3}), (20, {"swa_full": False})],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_after_a_bulk_they_are_those_of_numpy(
    name: str, size: int, options: dict[str, Any], logits_all: bool, open_tiny: Open, numpy_model: Open
) -> None:
    of = plan(chosen((0, 0), (1, 1)), decode=chosen((2, 1), seed=1), tail=3)
    llm, expected = open_tiny(name, logits_all=logits_all, under=of, **options), history_of(numpy_model(name), of)
    for each in (llm, expected):
        each.eval(tokens(N_PROMPT))
    answer = tokens(20, seed=1)
    found = np.concatenate([llm.logits_after(piece) for piece in split(answer, size)])
    for token in answer:
        expected.decode([token])
    rows = [expected.trace(N_PROMPT + index).logits[0] for index in range(20)]
    assert relative_error(found, np.stack(rows)) < TOLERANCE[name]


def test_they_count_in_the_online_stage(logits_all: bool, open_tiny: Open, numpy_model: Open) -> None:
    stage = OnlineReference(4, -1.0, "none", np.zeros((N_LAYER, 2), bool))  # every FFN is as similar as that
    of = SkipPlan(NOTHING, NOTHING, online=OnlineStage(4, -1.0, "none"))
    llm, expected = open_tiny(logits_all=logits_all, under=of), history_of(numpy_model(), of)
    llm.begin_request()
    for each in (llm, expected):
        each.eval(tokens(N_PROMPT))
    llm.logits_after([7, 8, 9])
    assert llm.online.ffn == ()
    llm.logits_after([10])
    for token in (7, 8, 9, 10):
        expected.decode([token])
        stage.observe(expected.trace())
    assert llm.online.ffn == stage.ffn == tuple(range(N_LAYER))
    np.testing.assert_allclose(llm.online.similarity, stage.similarity, atol=1e-6)


def test_generation_goes_on_right_after_and_they_stay_the_callers(logits_all: bool, open_tiny: Open) -> None:
    text = tokens(60)
    llm, fresh = open_tiny(logits_all=logits_all), open_tiny(logits_all=logits_all)
    llm.eval(text[:N_PROMPT])
    found = llm.logits_after(text[N_PROMPT:])
    kept = found.copy()
    expected = next(fresh.generate(text, temp=0.0))
    assert next(llm.generate(text, temp=0.0)) == expected == found[-1].argmax()
    llm.logits_after([7, 8])
    np.testing.assert_array_equal(found, kept)
    assert next(llm.generate([*text, 7, 8, 9], temp=0.0)) == next(fresh.generate([*text, 7, 8, 9], temp=0.0))


def test_where_all_logits_are_kept_their_rows_are_among_them(open_tiny: Open) -> None:
    llm, other = open_tiny(), open_tiny()
    for each in (llm, other):
        each.eval(tokens(N_PROMPT))
    found = llm.logits_after([7, 8, 9])
    other.eval_decode([7, 8, 9])
    np.testing.assert_array_equal(llm.scores[: llm.n_tokens], other.scores[: other.n_tokens])
    np.testing.assert_array_equal(llm.scores[N_PROMPT : llm.n_tokens], found)


def test_while_statistics_of_all_tokens_are_collected_there_are_none(logits_all: bool, open_tiny: Open) -> None:
    llm = open_tiny(logits_all=logits_all)
    llm.eval(tokens(N_PROMPT))
    with llm.collect_statistics(lambda batch: None):
        with pytest.raises(StateError, match=r"leave collect_statistics\(\) first, or .* keep_logits=True"):
            llm.logits_after([7])
        assert llm.n_tokens == N_PROMPT
    assert llm.logits_after([7]).shape == (1, N_VOCAB)


@pytest.mark.parametrize("wrong", [[7] * 300, [-1], [N_VOCAB]], ids=["too many", "below 0", "beyond the vocabulary"])
def test_what_cannot_be_evaluated_is_refused_and_the_model_goes_on(
    wrong: list[int], logits_all: bool, open_tiny: Open
) -> None:
    llm, other = (open_tiny(n_ctx=256, n_batch=512, logits_all=logits_all) for _ in range(2))
    for each in (llm, other):
        each.eval(tokens(N_PROMPT))
    with pytest.raises(RequestError if len(wrong) > 1 else NativeError):
        llm.logits_after(wrong)
    np.testing.assert_array_equal(llm.logits_after([7, 8]), other.logits_after([7, 8]))
