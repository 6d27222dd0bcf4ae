"""LongBench's files: every task type read and scored, the middle cut out, and what is wrong told by file and line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from oracles.fake_llama import BOS
from oracles.questions import LLM, chat, record, text_of

from adaskip_cpp.errors import DataError
from adaskip_cpp.measuring.longbench import DATASETS
from adaskip_cpp.measuring.task_files import task_items
from adaskip_cpp.measuring.tasks import QuestionItem


class Files:
    """A folder with LongBench's files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prompts = dict.fromkeys(DATASETS, "Text: {context}\nQuestion: {input}\nAnswer:")
        self.lengths = dict.fromkeys(DATASETS, 32)

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def lines(self, *records: Any, name: str = "data.jsonl") -> Path:
        return self.write(name, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))

    def read(self, *paths: Path, n_ctx: int = 512, **options: Any) -> list[QuestionItem]:
        self.write("dataset2prompt.json", json.dumps(self.prompts))
        self.write("dataset2maxlen.json", json.dumps(self.lengths))
        return task_items(LLM, paths, n_ctx=n_ctx, wrap=chat, **options)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_line_becomes_a_question(files: Files) -> None:
    (item,) = files.read(files.lines(record(), name="hotpotqa.jsonl"))
    assert text_of(item) == "<user>Text: Passage.\nQuestion: Who?\nAnswer:</user>"
    assert (item.id, item.task, item.metric) == ("longbench/hotpotqa/f00", "hotpotqa", "qa_f1")
    assert (item.answers, item.max_tokens, item.all_classes) == (("Ada",), 32, ())


@pytest.mark.parametrize("dataset", DATASETS)
def test_few_shot_prompts_are_given_without_a_chat_template_and_answered_in_a_line(files: Files, dataset: str) -> None:
    (item,) = files.read(files.lines(record(dataset, answers=["Paragraph 1"], all_classes=["a"])))
    few_shot = dataset in {"trec", "triviaqa", "samsum"}
    assert text_of(item).startswith("Text: " if few_shot else "<user>")
    assert item.first_line == few_shot


def test_blank_lines_are_passed_over_and_counted(files: Files) -> None:
    path = files.write("data.jsonl", f"\n{json.dumps(record())}\n  \n{{}}\n")
    with pytest.raises(DataError, match=r"line 4 is no item of LongBench .*`input`"):
        files.read(path)
    assert files.read(files.write("blank.jsonl", "\n\n")) == []


def test_items_of_the_same_id_are_told_apart(files: Files) -> None:
    items = files.read(files.lines(record(), record(), record(_id=None), record(_id=None)))
    assert len({item.id for item in items}) == 4


def test_the_first_few_of_each_dataset_may_be_taken(files: Files) -> None:
    lines = [record(name, _id=f"{name} {i}") for i in range(3) for name in ("hotpotqa", "musique")]
    items = files.read(files.lines(*lines, name="all.jsonl"), n_each=2)
    names = [item.id.removeprefix("longbench/all/") for item in items]
    assert names == ["hotpotqa 0", "musique 0", "hotpotqa 1", "musique 1"]


def test_longbench_e_is_read_with_the_settings_of_its_dataset(files: Files) -> None:
    (item,) = files.read(files.lines(record("trec_e", all_classes=["Ada", "Bea"])))
    assert (item.task, item.metric, item.first_line) == ("trec_e", "classification", True)


def test_a_line_separator_within_a_text_does_not_end_the_line(files: Files) -> None:
    (item,) = files.read(files.lines(record(context="one\u2028two\x85three")))
    assert "one\u2028two\x85three" in text_of(item)


# --- the middle -------------------------------------------------------------------------------------------------------


def test_a_prompt_that_fits_is_left_whole(files: Files) -> None:
    files.prompts["hotpotqa"] = "{context}"
    context = "x" * (512 - 32 - len(chat("")))
    (item,) = files.read(files.lines(record(context=context)))
    assert text_of(item) == f"<user>{context}</user>"


@pytest.mark.parametrize("dataset", ["hotpotqa", "triviaqa"])
def test_the_middle_of_a_long_prompt_is_cut_out(files: Files, dataset: str) -> None:
    files.prompts[dataset] = "{context}"
    context = "".join(f"{i:05}" for i in range(1000))
    (item,) = files.read(files.lines(record(dataset, context=context)))
    room = 512 - 32 - len(chat("") if dataset == "hotpotqa" else [BOS])
    expected = context[: room // 2] + context[-(room // 2) :]
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


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "fields", "prediction", "expected"),
    [
        ("narrativeqa", {"answers": ["Ada Lovelace", "Ada"]}, "It was Ada.", 1 / 2),  # 1 of 3 and 1 of 1
        ("qasper", {"answers": ["unanswerable"]}, "Unanswerable", 1.0),
        ("multifieldqa_en", {}, "Bea", 0.0),
        ("hotpotqa", {}, "ada", 1.0),
        ("2wikimqa", {"answers": ["an Ada"]}, "the Ada", 1.0),
        ("musique", {}, "Ada Ada", 2 / 3),
        ("gov_report", {"answers": ["one two three four"]}, "one three four five", 3 / 4),
        ("qmsum", {"answers": ["one two"]}, "", 0.0),
        ("multi_news", {"answers": ["one two"]}, "one two", 1.0),
        ("trec", {"answers": ["City"], "all_classes": ["City", "Food"]}, "\nCity\nType: Food", 1.0),
        ("trec", {"answers": ["City"], "all_classes": ["City", "Food"]}, "City Food", 1 / 2),
        ("triviaqa", {}, "Ada\nPassage: Bea", 1.0),
        ("samsum", {"answers": ["one two"]}, "one two\nDialogue: one", 1.0),
        ("passage_count", {"answers": ["3"]}, "3 of 5", 1 / 2),
        ("passage_retrieval_en", {"answers": ["Paragraph 12"]}, "Paragraph 12", 1.0),
    ],
)
def test_each_dataset_is_scored_as_longbench_scores_it(
    files: Files, dataset: str, fields: dict[str, Any], prediction: str, expected: float
) -> None:
    (item,) = files.read(files.lines(record(dataset, **fields)))
    assert item.score(prediction) == pytest.approx(expected, abs=1e-6)


# --- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "Expected `object`"),
        ('{"a":' * 100_000, "is not JSON"),
        (json.dumps(record()).replace("7", "7" * 5000), "is no item of LongBench"),
        (json.dumps(record(_id=[1])), "`$._id`"),
        (json.dumps(record(input=None)), "`$.input`"),
        (json.dumps({"input": "", "context": ""}), "missing required field `dataset`"),
        (json.dumps(record(context=3)), "`$.context`"),
        (json.dumps(record(answers="Ada")), "`$.answers"),
        (json.dumps(record(answers=[])), "`$.answers"),
        (json.dumps(record(answers=[3])), "`$.answers"),
        (json.dumps(record(all_classes="City")), "`$.all_classes`"),
        (json.dumps(record("squad")), "there is no dataset 'squad'; use one of narrativeqa"),
        (json.dumps(record("trec")), "has no 'all_classes', which 'trec' needs"),
        (json.dumps(record("passage_retrieval_en", answers=["12"])), "answer '12' names no paragraph"),
    ],
)
def test_a_bad_line_is_told_with_its_file_and_number(files: Files, line: str, message: str) -> None:
    path = files.write("data.jsonl", f"{json.dumps(record())}\n\n{line}\n")
    with pytest.raises(DataError, match=rf"data\.jsonl', line 3.*{re.escape(message)}") as error:
        files.read(path)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_text_or_absent_or_named_twice_is_refused(files: Files) -> None:
    with pytest.raises(DataError, match=r"data\.jsonl' is not UTF-8"):
        files.read(files.write("data.jsonl", b"\xff\xfe{}"))
    with pytest.raises(DataError, match=r"cannot read .*absent\.jsonl.*check the path"):
        files.read(files.folder / "absent.jsonl")
    with pytest.raises(DataError, match="name every file once"):
        files.read(*[files.lines(record())] * 2)


@pytest.mark.parametrize("table", ["prompts", "lengths"])
def test_a_dataset_without_template_or_length_is_refused(files: Files, table: str) -> None:
    del getattr(files, table)["hotpotqa"]
    needed = r"dataset2\w+\.json' has no [a-z ]+ for 'hotpotqa', which .*line 1 needs; put"
    with pytest.raises(DataError, match=needed):
        files.read(files.lines(record()))


@pytest.mark.parametrize(
    "table, value", [*(("prompts", v) for v in (3, None)), *(("lengths", v) for v in ("32", 0, True))]
)
def test_a_table_with_wrong_values_is_refused(files: Files, table: str, value: Any) -> None:
    getattr(files, table)["lcc"] = value
    with pytest.raises(DataError, match=r"by dataset \(Expected .*\); use LongBench's own file"):
        files.read(files.lines(record()))


@pytest.mark.parametrize("content", ["{", "[]", "3", '{"lcc": ' + "7" * 5000 + "}"])
def test_a_table_that_is_no_json_object_is_refused(files: Files, content: str) -> None:
    files.write("dataset2prompt.json", content)
    with pytest.raises(DataError, match=r"dataset2prompt\.json'.*use LongBench's own file"):
        task_items(LLM, [files.lines(record())], n_ctx=512, wrap=chat)


@pytest.mark.parametrize(
    "template",
    [
        *("{question}", "{context", "{}", "{context.name}", "{context[a]}", "{context!r}", "{all_classes:>5}"),
        *("{answers}", "{context:>9999999999}"),  # 10 GB, where it is filled in
    ],
)
def test_a_template_that_cannot_be_filled_in_is_refused(files: Files, template: str) -> None:
    files.prompts["hotpotqa"] = template
    with pytest.raises(DataError, match=r"dataset2prompt\.json': the template of 'hotpotqa'.*line 1"):
        files.read(files.lines(record()))
