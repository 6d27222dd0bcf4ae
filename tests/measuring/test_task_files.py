"""Files of LongBench and L-Eval: every task read and scored, the middle cut out, errors with file and line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from oracles.fake_llama import BOS
from oracles.questions import LLM, chat, record, text_of

from adaskip_cpp.errors import DataError
from adaskip_cpp.measuring.task_files import DATASETS, task_items
from adaskip_cpp.measuring.tasks import QuestionItem


def leval(source: str | None = "quality_raw", evaluation: str = "exam", **fields: Any) -> dict[str, Any]:
    """A line in L-Eval's form."""
    return {
        "instructions": ["Who?\n (A) Ada\n (B) Bea", "And who else?\n (A) Cleo\n (B) Dora"],
        "outputs": ["(B) Bea", "(A) Cleo"],
        "input": "A document.\n",
        "source": source,
        "evaluation": evaluation,
        **fields,
    }


class Files:
    """A folder with LongBench's files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prompts = dict.fromkeys(DATASETS, "Text: {context}\nQuestion: {input}\nAnswer:")

    def write(self, name: str, content: str) -> Path:
        path = self.folder / name
        path.write_bytes(content.encode())
        return path

    def lines(self, *records: Any, name: str = "data.jsonl") -> Path:
        return self.write(name, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))

    def read(self, *paths: Path, n_ctx: int = 512, **options: Any) -> list[QuestionItem]:
        self.write("dataset2prompt.json", json.dumps(self.prompts))
        self.write("dataset2maxlen.json", json.dumps(dict.fromkeys(DATASETS, 32)))
        return task_items(LLM, paths, n_ctx=n_ctx, wrap=chat, **options)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_a_line_becomes_a_question_with_an_id_of_its_own(files: Files) -> None:
    (item,) = files.read(files.lines(record(), name="hotpotqa.jsonl"))
    assert text_of(item) == "<user>Text: Passage.\nQuestion: Who?\nAnswer:</user>"
    assert (item.id, item.task, item.metric) == ("longbench/hotpotqa/f00", "hotpotqa", "qa_f1")
    assert (item.answers, item.max_tokens, item.all_classes) == (("Ada",), 32, ())
    items = files.read(files.lines(record(), record(), record(_id=None), record(_id=None)))
    assert len({item.id for item in items}) == 4


def test_the_first_few_of_each_dataset_may_be_taken(files: Files) -> None:
    lines = [record(name, _id=f"{name} {i}") for i in range(3) for name in ("hotpotqa", "musique")]
    items = files.read(files.lines(*lines, name="all.jsonl"), n_each=2)
    names = [item.id.removeprefix("longbench/all/") for item in items]
    assert names == ["hotpotqa 0", "musique 0", "hotpotqa 1", "musique 1"]


def test_longbench_e_is_read_with_the_settings_of_its_dataset_and_a_text_with_its_line_separators(files: Files) -> None:
    (item,) = files.read(files.lines(record("trec_e", all_classes=["Ada", "Bea"], context="one\u2028two\x85three")))
    assert (item.task, item.metric, item.first_line) == ("trec_e", "classification", True)
    assert "one\u2028two\x85three" in text_of(item)


@pytest.mark.parametrize("dataset", ["hotpotqa", "triviaqa"])
def test_a_prompt_that_fits_is_left_whole_and_the_middle_of_a_longer_one_cut_out(files: Files, dataset: str) -> None:
    files.prompts[dataset] = "{context}"
    context = "".join(f"{i:05}" for i in range(1000))
    room = 512 - 32 - len(chat("") if dataset == "hotpotqa" else [BOS])
    halves = context[: room // 2] + context[-(room // 2) :]
    for given, expected in ((context, halves), (context[:room], context[:room])):
        (item,) = files.read(files.lines(record(dataset, context=given)))
        assert text_of(item) == (f"<user>{expected}</user>" if dataset == "hotpotqa" else expected)


def test_a_cut_within_a_character_leaves_that_character_out(files: Files) -> None:
    files.prompts["hotpotqa"] = "{context}"
    for n_ctx in range(200, 206):
        (item,) = files.read(files.lines(record(context="€" * 400)), n_ctx=n_ctx)
        assert re.fullmatch("<user>€+</user>", text_of(item))
        assert n_ctx - 32 - 8 <= len(item.prompt) <= n_ctx - 32


def test_a_context_without_room_for_a_prompt_is_refused(files: Files) -> None:
    for n_ctx in (16, 32, 32 + len(chat("")) + 1):
        with pytest.raises(DataError, match=r"line 1: the context leaves \d+ tokens.*use a larger context"):
            files.read(files.lines(record()), n_ctx=n_ctx)


@pytest.mark.parametrize(
    ("dataset", "fields", "prediction", "expected"),
    [
        ("narrativeqa", {"answers": ["Ada Lovelace", "Ada"]}, "It was Ada.", 1 / 2),  # 1 of 3 and 1 of 1
        ("qasper", {"answers": ["unanswerable"]}, "Unanswerable", 1.0),
        ("multifieldqa_en", {}, "the Ada", 1.0),
        ("hotpotqa", {}, "ada", 1.0),
        ("2wikimqa", {}, "an Ada", 1.0),
        ("musique", {}, "Ada Ada", 2 / 3),
        ("gov_report", {"answers": ["one two three four"]}, "one three four five", 3 / 4),
        ("qmsum", {"answers": ["one two"]}, "two one", 1 / 2),
        ("multi_news", {"answers": ["one two"]}, "two one", 1 / 2),
        ("trec", {"answers": ["City"], "all_classes": ["City", "Food"]}, "\nCity\nType: Food", 1.0),
        ("triviaqa", {}, "Ada\nPassage: Bea", 1.0),
        ("samsum", {"answers": ["one two"]}, "two one\nDialogue: one", 1 / 2),
        ("passage_count", {"answers": ["3"]}, "3 of 5", 1 / 2),
        ("passage_retrieval_en", {"answers": ["Paragraph 12"]}, "Paragraph 12, or 13", 1 / 2),
    ],
)
def test_each_dataset_is_asked_and_scored_as_longbench_does(
    files: Files, dataset: str, fields: dict[str, Any], prediction: str, expected: float
) -> None:
    """Few-shot prompts are given without a chat template and answered in a line."""
    (item,) = files.read(files.lines(record(dataset, **fields)))
    few_shot = dataset in {"trec", "triviaqa", "samsum"}
    assert text_of(item).startswith("Text: " if few_shot else "<user>") and item.first_line == few_shot
    assert item.score(prediction) == pytest.approx(expected, abs=1e-6)


def test_every_question_about_a_document_becomes_an_item(files: Files) -> None:
    first, second = files.read(files.lines(leval()))
    assert text_of(first).startswith("<user>A document.\n\nRead")
    assert "\n\nWho?\n (A) Ada\n (B) Bea\n\nAnswer" in text_of(first)
    assert "And who else?" in text_of(second) and "Who?\n" not in text_of(second)
    assert (first.id, second.id) == ("leval/data/1/0", "leval/data/1/1")
    assert (first.task, first.metric, first.answers) == ("quality", "choice", ("(B) Bea",))


def test_the_source_tells_the_task_and_the_metric(files: Files) -> None:
    expected = {
        ("coursera_c", "exam"): ("coursera", "choice"),
        ("gov_report_summ", "rouge"): ("gov_report_summ", "rouge_l"),
        ("meeting_summ", "LLM"): ("meeting_summ", "rouge_l"),
        ("multidoc_qa", "human"): ("multidoc_qa", "qa_f1"),
    }
    items = files.read(files.lines(*(leval(*each) for each in expected)), n_each=1)
    assert [(item.task, item.metric) for item in items] == [*expected.values()]


def test_an_open_question_says_how_long_the_answer_is_and_leaves_room_for_it(files: Files) -> None:
    line = leval("meeting_summ", "rouge", instructions=["What?"], outputs=["one two three four"])
    (item,) = files.read(files.lines(line))
    assert "Use about 4 words." in text_of(item) and item.max_tokens >= 8
    assert item.score("one three four five") == pytest.approx(3 / 4)  # 3 of 4 words, in both directions


def test_the_first_few_questions_are_of_as_many_documents_as_possible(files: Files) -> None:
    items = files.read(files.lines(*[leval()] * 3), n_each=4)
    assert [item.id.removeprefix("leval/data/") for item in items] == ["1/0", "1/1", "2/0", "3/0"]


def test_longbench_and_leval_may_be_in_one_file_and_multi_news_needs_no_json_file(files: Files) -> None:
    path = files.lines(leval(), record("multi_news", context="Two articles."))
    items = task_items(LLM, [path], n_ctx=1024, wrap=chat)
    assert [item.task for item in items] == ["quality", "quality", "multi_news"]
    assert "\n\nTwo articles.\n\n" in text_of(items[-1]) and items[-1].max_tokens == 512
    with pytest.raises(DataError, match=r"no prompt for 'qmsum'.*dataset2prompt\.json beside the data file"):
        task_items(LLM, [files.lines(record("qmsum"))], n_ctx=1024, wrap=chat)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        (json.dumps(record(_id=[1])), "`$._id`"),
        (json.dumps({"input": "", "context": ""}), "missing required field `dataset`"),
        (json.dumps(record(answers=[])), "`$.answers"),
        (json.dumps(record("squad")), "there is no dataset 'squad'; use one of narrativeqa"),
        (json.dumps(record("trec")), "has no 'all_classes', which 'trec' needs"),
        (json.dumps(record("passage_retrieval_en", answers=["12"])), "answer '12' names no paragraph"),
        (json.dumps(leval(outputs=["A"])), "has 2 'instructions' and 1 'outputs'"),
        (json.dumps(leval(outputs=["A", "none"])), "the answer 'none' names no choice"),
        (json.dumps(leval(None)), "is no item of LongBench or L-Eval"),
    ],
)
def test_a_bad_line_is_told_with_its_file_and_number(files: Files, line: str, message: str) -> None:
    path = files.write("data.jsonl", f"{json.dumps(record())}\n \n{line}\n")
    with pytest.raises(DataError, match=rf"data\.jsonl', line 3.*{re.escape(message)}") as error:
        files.read(path)
    assert "\n" not in str(error.value)


def test_a_file_that_is_absent_or_named_twice_is_refused(files: Files) -> None:
    with pytest.raises(DataError, match=r"cannot read .*absent\.jsonl.*check the path"):
        files.read(files.folder / "absent.jsonl")
    with pytest.raises(DataError, match="name every file once"):
        files.read(*[files.lines(record())] * 2)


@pytest.mark.parametrize(
    ("name", "table", "message"),
    [
        ("dataset2prompt.json", "{}", "' has no prompt for 'hotpotqa', which .*line 1 needs; put"),
        ("dataset2maxlen.json", "{}", "' has no answer length for 'hotpotqa', which .*line 1 needs; put"),
        ("dataset2prompt.json", '{"lcc": 3}', r"' .* by dataset \(Expected .*\); use LongBench's own file"),
        ("dataset2maxlen.json", '{"lcc": 0}', r"' .* by dataset \(Expected .*\); use LongBench's own file"),
        ("dataset2prompt.json", "{", "' .*; use LongBench's own file"),
        *(
            ("dataset2prompt.json", json.dumps({"hotpotqa": template}), "': the template of 'hotpotqa'.*line 1")
            for template in ("{question}", "{context", "{}", "{context!r}", "{context:>5}", "{answers}")
        ),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(files: Files, name: str, table: str, message: str) -> None:
    path = files.lines(record())
    files.read(path)
    files.write(name, table)
    with pytest.raises(DataError, match=re.escape(name) + message):
        task_items(LLM, [path], n_ctx=512, wrap=chat)
