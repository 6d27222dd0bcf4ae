"""L-Eval's files: several questions about one document, closed and open, scored by letter, Rouge-L and F1."""

import json
from pathlib import Path
from typing import Any

import pytest
from oracles.questions import LLM, chat, record, text_of

from adaskip_cpp.errors import DataError
from adaskip_cpp.measuring.metrics import letters
from adaskip_cpp.measuring.task_files import task_items
from adaskip_cpp.measuring.tasks import QuestionItem


def line(source: str = "quality_raw", evaluation: str = "exam", **fields: Any) -> dict[str, Any]:
    """A line in L-Eval's form."""
    return {
        "instructions": ["Who?\n (A) Ada\n (B) Bea", "And who else?\n (A) Cleo\n (B) Dora"],
        "outputs": ["(B) Bea", "(A) Cleo"],
        "input": "A document.\n",
        "source": source,
        "evaluation": evaluation,
        **fields,
    }


def read(folder: Path, *lines: Any, n_ctx: int = 1024, **options: Any) -> list[QuestionItem]:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return task_items(LLM, [path], n_ctx=n_ctx, wrap=chat, **options)


def test_every_question_about_a_document_becomes_an_item(tmp_path: Path) -> None:
    first, second = read(tmp_path, line())
    assert text_of(first).startswith("<user>A document.\n\nRead") and "Who?\n (A) Ada\n (B) Bea\n\n" in text_of(first)
    assert "And who else?" in text_of(second) and "Who?\n" not in text_of(second)
    assert (first.id, second.id) == ("leval/data/1/0", "leval/data/1/1")
    assert (first.task, first.metric, first.answers) == ("quality", "choice", ("(B) Bea",))


@pytest.mark.parametrize(
    ("source", "evaluation", "task", "metric"),
    [
        ("quality_raw", "exam", "quality", "choice"),
        ("coursera_c", "exam", "coursera", "choice"),
        ("gov_report_summ", "rouge", "gov_report_summ", "rouge_l"),
        ("meeting_summ", "LLM", "meeting_summ", "rouge_l"),
        ("multidoc_qa", "f1", "multidoc_qa", "qa_f1"),
        ("multidoc_qa", "human", "multidoc_qa", "qa_f1"),
    ],
)
def test_the_source_tells_the_task_and_the_metric(
    tmp_path: Path, source: str, evaluation: str, task: str, metric: str
) -> None:
    item = read(tmp_path, line(source, evaluation))[0]
    assert (item.task, item.metric) == (task, metric)


def test_an_open_question_says_how_long_the_answer_is_and_leaves_room_for_it(tmp_path: Path) -> None:
    (item,) = read(tmp_path, line("meeting_summ", "rouge", instructions=["What?"], outputs=["one two three four"]))
    assert "Use about 4 words." in text_of(item) and item.max_tokens >= 8
    assert item.score("one three four five") == pytest.approx(3 / 4)  # 3 of 4 words, in both directions


@pytest.mark.parametrize(
    ("answer", "prediction", "score"),
    [
        ("(B) Bea", "B", 1.0),
        ("(B) Bea", "The answer is (B).", 1.0),
        ("(B) Bea", " B\n\nQuestion: A", 1.0),
        ("(B) Bea", "A", 0.0),
        ("(B) Bea", "A good answer is B", 1.0),
        ("(B) Bea", "A and B", 0.0),
        ("(B) Bea", "", 0.0),
        ("AC", "A, C", 1.0),
        ("AC", "(C) and (A)", 1.0),
        ("AC", "A", 0.0),
        ("ACD", "A, C, and D", 1.0),
    ],
)
def test_a_choice_is_right_if_all_its_letters_are(tmp_path: Path, answer: str, prediction: str, score: float) -> None:
    (item,) = read(tmp_path, line(instructions=["Which?"], outputs=[answer]))
    assert item.score(prediction) == score


def test_words_without_a_letter_choose_nothing() -> None:
    assert letters("a bad idea, I think") == letters("A fox") == frozenset()


def test_the_first_few_questions_are_of_as_many_documents_as_possible(tmp_path: Path) -> None:
    items = read(tmp_path, line(), line(), line(), n_each=4)
    assert [item.id.removeprefix("leval/data/") for item in items] == ["1/0", "1/1", "2/0", "3/0"], (
        "those about a document follow each other"
    )


def test_a_long_document_loses_its_middle_and_no_question(tmp_path: Path) -> None:
    document = "".join(f"{i:05}" for i in range(1000))
    item = read(tmp_path, line(input=document), n_ctx=700)[0]
    assert text_of(item).startswith("<user>00000") and "(A) Ada\n (B) Bea" in text_of(item)
    assert 680 <= len(item.prompt) + item.max_tokens <= 700


def test_longbench_and_leval_may_be_in_one_file_and_multi_news_needs_no_json_file(tmp_path: Path) -> None:
    items = read(tmp_path, line(), record("multi_news", answers=["News."], context="Two articles."))
    assert [item.task for item in items] == ["quality", "quality", "multi_news"]
    assert "\n\nTwo articles.\n\n" in text_of(items[-1]) and items[-1].max_tokens == 512
    with pytest.raises(DataError, match=r"no prompt for 'qmsum'.*dataset2prompt\.json beside the data file"):
        read(tmp_path, record("qmsum"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"outputs": ["A"]}, "has 2 'instructions' and 1 'outputs'"),
        ({"outputs": ["A", "none"]}, "the answer 'none' names no choice"),
        ({"instructions": [], "outputs": []}, "is no item of LongBench or L-Eval"),
        ({"instructions": "Who?"}, "is no item of LongBench or L-Eval"),
        ({"source": None}, "is no item of LongBench or L-Eval"),
    ],
)
def test_a_bad_line_is_told_with_its_file_and_number(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"data\.jsonl', line 2:? {message}"):
        read(tmp_path, line(), line(**fields))
