"""The run of an evaluation: figures against an independent NumPy pass, and a run that ends and goes on anywhere."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from oracles.expected import log_probabilities
from oracles.fixtures import Open
from oracles.frontiers import frontier, point
from oracles.reference import ReferenceModel, ReferenceRun, Windows
from oracles.tiny_families import N_LAYER, tokens

import adaskip_cpp
from adaskip_cpp import SkipPlan
from adaskip_cpp.errors import DataError
from adaskip_cpp.evaluation import evaluate
from adaskip_cpp.evaluation.contenders import FULL, Contender
from adaskip_cpp.evaluation.evaluate import Record, Work, kept, run
from adaskip_cpp.evaluation.figures import evaluation_results
from adaskip_cpp.evaluation.items import EvaluationOptions
from adaskip_cpp.evaluation.results import About
from adaskip_cpp.measuring.memo import Memo
from adaskip_cpp.measuring.tasks import QuestionItem, TextItem, greedy_text
from adaskip_cpp.measuring.timing import RequestTime
from adaskip_cpp.model.plan import Bulk

N_CONTINUATION = 9
ABOUT = About("T", "A", {}, "c", {})
WHOLE = SkipPlan.manual(N_LAYER)
IN_BULK = SkipPlan.manual(N_LAYER, attention=[0], ffn=[1, 2], scale=0.9).prefill
BULK = Bulk(IN_BULK, head=2, tail=3, windowed=(1,), window_size=5)


def contender(name: str, mode: Any, plan: SkipPlan) -> Contender:
    return Contender(name, "adaskip", "2", mode, "median", plan)


CONTENDERS = (
    FULL,
    contender("prefill", "prefill", SkipPlan.manual(N_LAYER, attention=[1], ffn=[2], scale=1.1)),
    contender("prompt", "prompt", replace(WHOLE, bulk=BULK)),
)
PROMPT = CONTENDERS[-1]
ITEMS = [TextItem(f"text/{seed}", "text", tuple(tokens(30, seed))) for seed in (1, 2)]
QUESTION = QuestionItem("question", "passkey", tuple(tokens(20, 5)), ("7",), 6, "contains")


@pytest.fixture
def llm(open_tiny: Open) -> Any:
    return open_tiny(n_ctx=256, logits_all=False)


@pytest.fixture(autouse=True)
def times(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second for the first token of the whole model, and half a second under a plan."""

    def time_request(llm: Any, prompt: Sequence[int], n_decode: int) -> RequestTime:
        return RequestTime(1.0 if llm.plan is None else 0.5, (0.1,) * n_decode)

    monkeypatch.setattr(evaluate, "time_request", time_request)


def measured(work: Work, llm: Any, memo: Memo | None = None) -> dict[Any, Record]:
    memo = memo or Memo()
    run(work, memo, llm)
    return kept(work, memo)


def decoded_logits(model: ReferenceModel, tokens: Sequence[int], split: int, plan: SkipPlan) -> np.ndarray:
    """Logits of the tokens after a prompt of ``split``, but of the last one."""
    pass_ = ReferenceRun(model)
    if plan.bulk is None:
        pass_.eval(tokens[:split], plan.prefill.skip, plan.prefill.scale)
    else:
        pass_.eval(tokens[:2])
        pass_.eval(tokens[2 : split - 3], IN_BULK.skip, IN_BULK.scale, keeps_kv=True, windows=Windows((1,), 5, 2))
        pass_.eval(tokens[split - 3 : split])
    return pass_.eval(tokens[split:-1], plan.decode.skip, plan.decode.scale).logits


def test_loss_divergence_and_agreement_are_those_of_a_numpy_pass(llm: Any, numpy_model: Open, tmp_path: Path) -> None:
    records = measured(Work(CONTENDERS, ITEMS, n_continuation=N_CONTINUATION), llm)
    for item, each in product(ITEMS, CONTENDERS):
        split, targets = len(item.tokens) - N_CONTINUATION - 1, item.tokens[-N_CONTINUATION:]
        logits = [decoded_logits(numpy_model(), item.tokens, split, plan) for plan in (WHOLE, each.plan or WHOLE)]
        log_p, log_q = map(log_probabilities, logits)
        record, divergences = records[item.id, each.name, "continuation"], (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
        assert record.values == {
            "loss": pytest.approx(-log_q[np.arange(N_CONTINUATION), targets].mean(), abs=2e-5),
            "kl": pytest.approx(divergences.mean(), abs=2e-5),
            "agreement": (log_p.argmax(axis=1) == log_q.argmax(axis=1)).mean(),
        }
        assert record.divergences == pytest.approx(divergences, rel=1e-3, abs=2e-5), "to 4 digits"
        assert (record.values["kl"] == 0.0) == (each is FULL)


def test_a_promise_runs_each_item_under_the_plan_for_its_length(
    llm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text of 20 tokens of prompt under one plan, one of 50 under another, each with that plan's own figures."""
    monkeypatch.setattr("adaskip_cpp.model.frontier.LEAST_CONTEXT", 10)
    skip = SkipPlan.manual(N_LAYER, ffn=[1]).prefill
    slow, slow_later = (replace(WHOLE, bulk=Bulk(skip, head=2, tail=tail)) for tail in (3, 6))  # up to 32, 64 tokens
    fast = replace(WHOLE, bulk=replace(BULK, windowed=()))
    points = [point(slow, 0.03, {32: 1.2}, judged_at=32), point(fast, 0.06, {32: 1.5}, judged_at=32)]
    promise = Contender("promise 0.07", "promise", "0.07", "prompt", "none", None, frontier(points), 0.07)
    short, long = (TextItem(f"text/{n}", "text", tuple(tokens(n, n))) for n in (30, 60))
    every = (FULL, promise, contender("fast", "prompt", fast), contender("slow", "prompt", slow_later))
    work = Work(every, [short, long], [QUESTION], N_CONTINUATION)
    records = measured(work, llm)
    for item, name in ((short, "fast"), (long, "slow")):
        assert records[item.id, promise.name, "continuation"] == records[item.id, name, "continuation"]
    assert records[QUESTION.id, promise.name, "answer"].text == records[QUESTION.id, "fast", "answer"].text
    kl = {records[short.id, name, "continuation"].values["kl"] for name in ("full", "fast", "slow")}
    assert len(kl) == 3
    row = evaluation_results(work, records, ABOUT).contenders[1]
    assert (row.n_skip_prefill, row.n_skip_decode) == (1, 0), "as in the longest prompt"


def test_an_answer_is_greedy_and_is_scored(llm: Any, numpy_model: Open, tmp_path: Path) -> None:
    pass_ = ReferenceRun(numpy_model())
    logits, chosen = pass_.eval(QUESTION.prompt).logits[-1], list[int]()
    while len(chosen) < QUESTION.max_tokens:
        chosen.append(int(logits.argmax()))
        logits = pass_.eval(chosen[-1:]).logits[-1]
    found = measured(Work((FULL,), questions=[QUESTION]), llm)["question", "full", "answer"]
    assert found.text == llm.detokenize(chosen).decode("utf-8", "replace")
    assert found.values["score"] == QUESTION.score(found.text)


def test_a_document_is_read_once_for_all_its_questions(llm: Any, tmp_path: Path) -> None:
    """Each contender reads it for itself, and answers as one that reads each question alone."""
    prompts = [(*tokens(30, 5), *tokens(6, seed)) for seed in (1, 2, 3)]
    asked = [QuestionItem(f"q{i}", "passkey", prompt, ("7",), 3, "contains") for i, prompt in enumerate(prompts)]
    before = llm.n_evaluated
    records = measured(Work([FULL, PROMPT], (), asked), llm)
    assert llm.n_evaluated - before <= 2 * (30 + 3 * (6 + 3) + 2 * BULK.tail)
    for each, item in product((FULL, PROMPT), asked):
        llm.reset()
        llm.set_plan(each.plan)
        assert records[item.id, each.name, "answer"].text == greedy_text(llm, item.prompt, item.max_tokens)


def test_an_answer_of_which_one_line_counts_ends_with_it(
    llm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = ("\n", "a ", "b\n", "c")
    monkeypatch.setattr("adaskip_cpp.measuring.tasks.Generation.__iter__", lambda self: (each for each in pieces))
    item = QuestionItem("line", "trec", (5,), ("a",), 60, "classification", ("a",), first_line=True)
    records = measured(Work((FULL,), questions=[item, replace(item, id="whole", first_line=False)]), llm)
    assert [records[name, "full", "answer"].text for name in ("line", "whole")] == ["\na b\n", "\na b\nc"]


def test_every_result_is_there_at_the_end_and_a_round_is_kept_by_all_or_none(
    llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, memo, seen = Work(CONTENDERS, ITEMS, [QUESTION], N_CONTINUATION, tokens(8), 3), Memo(), list[float]()
    timed = evaluate.time_request
    times = Mock(side_effect=[*[timed(llm, (), 9)] * 7, KeyboardInterrupt])  # three to warm up, a round, and a third
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(evaluate, "time_request", times)
        run(work, memo, llm)
    assert {key[0] for key in kept(work, memo)} == {"round/0"}
    run(work, memo, llm, seen.append)
    records = kept(work, memo)
    assert set(records) == set(work.results())
    assert len(records) == 3 * (3 + 2 + 1), "3 contenders in 3 rounds, on 2 texts and a question"
    speeds = {(key[1], each.values["first_token"]) for key, each in records.items() if key[::2] == ("round/1", "speed")}
    assert speeds == {("full", 1.0), ("prefill", 0.5), ("prompt", 0.5)}
    assert seen == sorted(seen) and seen[-1] == pytest.approx(1.0)


def test_the_hash_changes_with_whatever_changes_a_result() -> None:
    work = Work(CONTENDERS, ITEMS, [QUESTION], 9, (1, 2))
    changes: list[dict[str, Any]] = [
        {},
        {"contenders": (FULL, replace(CONTENDERS[1], plan=WHOLE), *CONTENDERS[2:])},
        {"texts": [replace(ITEMS[0], tokens=ITEMS[1].tokens), ITEMS[1]]},
        {"questions": [replace(QUESTION, answers=("8",))]},
        {"n_continuation": 8},
        {"speed_prompt": (1, 3)},
        {"n_rounds": 9},
    ]
    assert len({replace(work, **each).hash for each in changes}) == len(changes)
    assert replace(work).hash == work.hash


def test_a_run_that_was_killed_after_any_result_ends_with_the_same_results(llm: Any, tmp_path: Path) -> None:
    work, states = Work(CONTENDERS, ITEMS[:1], [QUESTION], 5, tokens(8), 2), list[bytes]()
    path = tmp_path / "items.json"
    expected = evaluation_results(work, measured(work, llm), ABOUT).to_json()
    run(work, Memo(path, "key"), llm, lambda _: states.append(path.read_bytes()))
    assert len(states) == 2 + 3 + 3, "two rounds, a text and a question"
    for state in states:
        path.write_bytes(state)
        assert evaluation_results(work, measured(work, llm, Memo(path, "key")), ABOUT).to_json() == expected


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"builtin": ("page",)}, "there is no text 'page'; use one of: pages, sources"),
        ({"synthetic": ("passkey",), "lengths": ()}, "lengths or depths are empty"),
        ({"n_continuation": 0, "n_texts": 0}, "n_continuation is less than 1"),
    ],
)
def test_impossible_options_are_our_errors(tiny: Any, tmp_path: Path, options: Any, why: str) -> None:
    with pytest.raises(DataError, match=why):
        adaskip_cpp.evaluate(tiny(), None, tmp_path / "out", EvaluationOptions(**options))
