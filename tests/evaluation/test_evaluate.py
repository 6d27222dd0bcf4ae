"""The run of an evaluation: figures against an independent NumPy pass, and a run that ends and goes on anywhere."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from oracles.fixtures import Open
from oracles.frontiers import frontier, point
from oracles.reference import ReferenceModel, ReferenceRun, Windows
from oracles.tiny_families import N_LAYER, tokens

from adaskip_cpp import SkipPlan
from adaskip_cpp.evaluation import evaluate
from adaskip_cpp.evaluation.contenders import FULL, Contender
from adaskip_cpp.evaluation.evaluate import Work, run
from adaskip_cpp.evaluation.figures import evaluation_results
from adaskip_cpp.evaluation.results import About
from adaskip_cpp.evaluation.store import Record, open_store
from adaskip_cpp.measuring.tasks import QuestionItem, TextItem, greedy_text
from adaskip_cpp.measuring.timing import RequestTime
from adaskip_cpp.model.plan import Bulk

N_CONTINUATION = 9
ABOUT = About("T", "A", {}, "c", {})
FIGURES = ("loss", "kl", "agreement")

BOTH = SkipPlan.manual(N_LAYER, attention=[1], ffn=[2], scale=1.1)
DECODE = SkipPlan.manual(N_LAYER, attention=[0], ffn=[1], scale=0.9, phase="decode")
WHOLE = SkipPlan.manual(N_LAYER)
IN_BULK = SkipPlan.manual(N_LAYER, attention=[0], ffn=[1, 2], scale=0.9).prefill
PROMPT = replace(WHOLE, bulk=Bulk(IN_BULK, head=2, tail=3, windowed=(1,), window_size=5))


def contender(name: str, mode: Any, plan: SkipPlan) -> Contender:
    return Contender(name, "adaskip", "2", mode, "median", plan)


CONTENDERS = (
    FULL,
    contender("prefill", "prefill", BOTH),
    contender("decode", "decode", DECODE),
    contender("prompt", "prompt", PROMPT),
)


ITEMS = [TextItem(f"text/{seed}", "text", tuple(tokens(30, seed))) for seed in (1, 2)]
QUESTION = QuestionItem("question", "passkey", tuple(tokens(20, 5)), ("7",), 6, "contains")


@pytest.fixture(scope="module")
def reference(numpy_model: Open) -> ReferenceModel:
    return numpy_model()  # type: ignore[no-any-return]


@pytest.fixture
def llm(open_tiny: Open) -> Any:
    return open_tiny(n_ctx=256, logits_all=False)


@pytest.fixture(autouse=True)
def times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times that depend on the plan alone."""

    def time_request(llm: Any, prompt: Sequence[int], n_decode: int) -> RequestTime:
        n_skip = 0 if llm.plan is None else llm.plan.decode.n_skip
        return RequestTime(1.0 / (1 + n_skip), tuple(0.1 / (1 + n_skip) for _ in range(n_decode)))

    monkeypatch.setattr(evaluate, "time_request", time_request)


def measured(work: Work, llm: Any, folder: Path) -> dict[Any, Record]:
    with open_store(folder, {}) as store:
        run(work, store, llm)
        return dict(store.records)


# --- an independent computation of the same ---------------------------------------------------------------------------


def decoded_logits(model: ReferenceModel, tokens: Sequence[int], split: int, plan: SkipPlan) -> np.ndarray:
    """Logits of the tokens after a prompt of ``split``, but of the last one."""
    pass_ = ReferenceRun(model)
    if plan.bulk is None:
        pass_.eval(tokens[:split], plan.prefill.skip, plan.prefill.scale)
    else:
        skip, windows = plan.bulk.skip, Windows((1,), 5, 2)
        pass_.eval(tokens[:2])
        pass_.eval(tokens[2 : split - 3], skip.skip, skip.scale, keeps_kv=True, windows=windows)
        pass_.eval(tokens[split - 3 : split])
    return pass_.eval(tokens[split:-1], plan.decode.skip, plan.decode.scale).logits


def figures(full: np.ndarray, other: np.ndarray, targets: Sequence[int]) -> dict[str, float]:
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (full, other))
    return {
        "loss": float(-np.log(q[np.arange(len(targets)), targets]).mean()),
        "kl": float((p * np.log(p / q)).sum(axis=1).mean()),
        "agreement": float((p.argmax(axis=1) == q.argmax(axis=1)).mean()),
    }


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("each", CONTENDERS[1:], ids=lambda each: each.name)
def test_loss_divergence_and_agreement_are_those_of_a_numpy_pass(
    each: Contender, llm: Any, reference: ReferenceModel, tmp_path: Path
) -> None:
    assert each.plan is not None
    records = measured(Work((FULL, each), ITEMS, n_continuation=N_CONTINUATION), llm, tmp_path)
    for item in ITEMS:
        split, targets = len(item.tokens) - N_CONTINUATION - 1, item.tokens[-N_CONTINUATION:]
        full, other = (decoded_logits(reference, item.tokens, split, plan) for plan in (WHOLE, each.plan))
        for name, expected in (("full", figures(full, full, targets)), (each.name, figures(full, other, targets))):
            record = records[item.id, name, "continuation"]
            assert {label: record.values[label] for label in FIGURES} == pytest.approx(expected, abs=2e-5)
            assert len(record.divergences) == N_CONTINUATION
            assert np.mean(record.divergences) == pytest.approx(expected["kl"], rel=1e-3, abs=2e-5), "to 4 digits"
            assert name == "full" or expected["kl"] > 1e-3
        of_full = records[item.id, "full", "continuation"].values
        assert (of_full["kl"], of_full["agreement"]) == (0.0, 1.0)


def test_a_promise_runs_each_item_under_the_plan_for_its_length(
    llm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text of 20 tokens of prompt under one plan, one of 50 under another, each with that plan's own figures."""
    monkeypatch.setattr("adaskip_cpp.model.frontier.LEAST_CONTEXT", 10)
    assert PROMPT.bulk is not None
    careful = replace(PROMPT, bulk=replace(PROMPT.bulk, skip=SkipPlan.manual(N_LAYER, ffn=[1]).prefill, windowed=()))
    found = frontier([point(careful, 0.03, {32: 1.2}, judged_at=32), point(PROMPT, 0.06, {32: 1.5}, judged_at=32)])
    promise = Contender("promise 0.07", "promise", "0.07", "prompt", "none", None, found, 0.07)
    fast, slow = promise.plan_for(20), promise.plan_for(50)
    assert fast is not None and fast.bulk is not None and fast.bulk.skip == PROMPT.bulk.skip and slow is careful
    short, long = (TextItem(f"text/{n}", "text", tuple(tokens(n, n))) for n in (30, 60))
    records = measured(Work((FULL, promise), [short, long], [QUESTION], N_CONTINUATION), llm, tmp_path / "promise")
    for items, questions, plan in (([short], [QUESTION], fast), ([long], [], slow)):
        each = contender("plan", "prompt", plan)
        expected = measured(Work((FULL, each), items, questions, N_CONTINUATION), llm, tmp_path / items[0].id)
        for (item, name, measure), record in expected.items():
            if name == "plan":
                assert msgspec.structs.replace(records[item, promise.name, measure], contender=name) == record
                assert measure == "answer" or record.values["kl"] != 0
    row = evaluation_results(Work((FULL, promise), [short, long], n_continuation=N_CONTINUATION), records, ABOUT)
    assert (row.contenders[1].n_skip_prefill, row.contenders[1].n_skip_decode) == (1, 0), "as in the longest prompt"


def test_an_answer_is_greedy_and_is_scored(llm: Any, reference: ReferenceModel, tmp_path: Path) -> None:
    pass_ = ReferenceRun(reference)
    logits, chosen = pass_.eval(QUESTION.prompt).logits[-1], []
    while len(chosen) < QUESTION.max_tokens:
        chosen.append(int(logits.argmax()))
        logits = pass_.eval(chosen[-1:]).logits[-1]
    records = measured(Work((FULL, CONTENDERS[1]), questions=[QUESTION]), llm, tmp_path / "a")
    text = records["question", "full", "answer"].text
    assert text == llm.detokenize(chosen).decode("utf-8", "replace")
    assert records["question", "full", "answer"].values["score"] == QUESTION.score(text)


def test_a_document_is_read_once_for_all_its_questions(
    llm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each contender reads it for itself, and answers as one that reads each question alone."""
    document = tokens(30, 5)
    asked = [
        QuestionItem(f"q{seed}", "passkey", (*document, *tokens(6, seed)), ("7",), 3, "contains") for seed in (1, 2, 3)
    ]
    work, n_read = Work([FULL, contender("prompt", "prompt", PROMPT)], (), asked), 0
    evaluated = type(llm)._evaluate

    def counted(self: Any, phase: Any, read: list[int], **more: Any) -> None:
        nonlocal n_read
        n_read += len(read)
        evaluated(self, phase, read, **more)

    monkeypatch.setattr(type(llm), "_evaluate", counted)
    records = measured(work, llm, tmp_path)
    assert n_read <= 2 * (30 + 3 * (6 + 3) + 2 * PROMPT.bulk.tail)  # type: ignore[union-attr]
    for each, item in product(work.contenders, asked):
        llm.reset()
        llm.set_plan(each.plan)
        assert records[item.id, each.name, "answer"].text == greedy_text(llm, item.prompt, item.max_tokens)


def test_an_answer_of_which_one_line_counts_ends_with_it(llm: Any, tmp_path: Path) -> None:
    item = QuestionItem("q", "trec", tuple(tokens(12, 3)), ("a",), 60, "classification", ("a",), first_line=True)
    text = measured(Work((FULL,), questions=[item]), llm, tmp_path / "a")["q", "full", "answer"].text
    whole = measured(Work((FULL,), questions=[replace(item, first_line=False)]), llm, tmp_path / "b")
    assert whole["q", "full", "answer"].text.startswith(text)
    assert "\n" not in text.lstrip("\n")[:-1]


# --- what is run ------------------------------------------------------------------------------------------------------


def test_every_expected_result_is_there_at_the_end_and_progress_goes_up_to_one(llm: Any, tmp_path: Path) -> None:
    work, seen = Work(CONTENDERS, ITEMS, [QUESTION], N_CONTINUATION, tokens(8), 3), []
    with open_store(tmp_path, {}) as store:
        run(work, store, llm, seen.append)
        assert set(store.records) == set(work.results())
        assert len(store.records) == 4 * (3 + 2 + 1), "4 contenders in 3 rounds, on 2 texts and a question"
    assert seen == sorted(seen) and seen[-1] == pytest.approx(1.0)


def test_the_hash_changes_with_whatever_changes_a_result() -> None:
    def hash_of(**changes: Any) -> Any:
        arguments = {"contenders": CONTENDERS, "texts": ITEMS, "questions": [QUESTION], "n_continuation": 9}
        return Work(**{**arguments, "speed_prompt": (1, 2), **changes}).hash

    other = replace(CONTENDERS[1], plan=SkipPlan.manual(N_LAYER, attention=[1], ffn=[2], scale=1.2))
    changed = [
        hash_of(contenders=(FULL, other, *CONTENDERS[2:])),
        hash_of(texts=[replace(ITEMS[0], tokens=ITEMS[1].tokens), ITEMS[1]]),
        hash_of(questions=[replace(QUESTION, answers=("8",))]),
        hash_of(n_continuation=8),
        hash_of(speed_prompt=(1, 3)),
        hash_of(n_rounds=9),
    ]
    assert hash_of() == hash_of()
    assert all(each != hash_of() for each in changed)


# --- going on ---------------------------------------------------------------------------------------------------------


def test_a_run_that_was_killed_at_any_line_ends_with_the_same_results(llm: Any, tmp_path: Path) -> None:
    work = Work(CONTENDERS, ITEMS[:1], [QUESTION], 5, tokens(8), 2)
    measured(work, llm, tmp_path / "whole")
    with open_store(tmp_path / "whole", {}) as store:
        lines = store.path.read_bytes().splitlines(keepends=True)
        expected = evaluation_results(work, store.records, ABOUT).to_json()
    for n_done in range(len(lines) + 1):
        folder = tmp_path / str(n_done)
        folder.mkdir()
        torn = lines[n_done][:-7] if n_done < len(lines) else b""
        (folder / store.path.name).write_bytes(b"".join(lines[:n_done]) + torn)
        with open_store(folder, {}) as store:
            run(work, store, llm)
            assert evaluation_results(work, store.records, ABOUT).to_json() == expected, n_done


def test_a_round_that_was_cut_off_is_run_again_by_all(llm: Any, tmp_path: Path) -> None:
    work = Work(CONTENDERS, speed_prompt=tokens(8), n_rounds=2)
    with open_store(tmp_path, {}) as store:
        store.append(Record("round/1", "full", "speed", {"first_token": 9.0, "per_token": 9.0, "request": 9.0}))
        run(work, store, llm)
        assert set(store.records) == set(work.results())
        assert all(record.values["first_token"] != 9.0 for record in store.records.values())
