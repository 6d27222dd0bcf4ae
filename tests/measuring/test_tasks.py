"""Items cut from texts, and the texts they come from."""

import sysconfig
from pathlib import Path

import pytest
from oracles.questions import LLM

from adaskip_cpp.errors import DataError
from adaskip_cpp.measuring import corpus, tasks
from adaskip_cpp.measuring.tasks import READMES, prose, python_sources, read_texts, readmes, text_items


def test_items_are_dealt_out_over_the_texts_in_turn_and_ids_tell_them_apart() -> None:
    items = text_items(LLM, {"a": "a" * 100, "b": "b" * 25, "c": "c" * 15}, n_items=7, n_tokens=11)
    texts = [LLM.detokenize(item.tokens).decode() for item in items]
    assert texts == [letter * 10 for letter in "abcabaa"] and {item.task for item in items} == {"text"}
    two = {"a": "a" * 100, "b": "b" * 100}
    ids = [item.id for item in text_items(LLM, two, n_items=4, n_tokens=11, task="prose")]
    assert ids == ["prose/a/11/0", "prose/b/11/0", "prose/a/11/1", "prose/b/11/1"]


@pytest.mark.parametrize(
    ("texts", "n_items", "n_tokens", "message"),
    [
        ({"long": "a" * 100, "short": "b" * 9}, 2, 11, "'short' has 9 tokens, fewer than the 11.*give a longer text"),
        ({"a": "a" * 20, "b": "b" * 19}, 4, 11, "gives 3 items of 11 tokens, not the 4.*ask for fewer"),
        ({"a": "a" * 20}, 0, 11, "at least 1 item of 2 tokens"),
        ({"a": "a" * 20}, 1, 1, "at least 1 item of 2 tokens"),
    ],
)
def test_items_that_cannot_be_made_are_refused(
    texts: dict[str, str], n_items: int, n_tokens: int, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        text_items(LLM, texts, n_items=n_items, n_tokens=n_tokens)


def test_a_text_shorter_than_an_item_may_be_left_out() -> None:
    texts = {"long": "a" * 100, "short": "b" * 9}
    items = text_items(LLM, texts, n_items=2, n_tokens=11, drop_short=True)
    assert [LLM.detokenize(item.tokens)[:1] for item in items] == [b"a", b"a"]
    assert text_items(LLM, corpus.held_out(), n_items=16, n_tokens=2048), "what is held out is enough"


def test_files_are_read_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("première", encoding="utf-8")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.txt").write_text("second", encoding="utf-8")
    (tmp_path / "b.txt").write_text("third", encoding="utf-8")
    paths = [tmp_path / "a.txt", tmp_path / "more" / "a.txt", tmp_path / "b.txt"]
    assert read_texts(paths) == {str(paths[0]): "première", str(paths[1]): "second", "b.txt": "third"}


def test_a_file_that_is_no_text_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    for content, message in ((b" \n\n", "is empty"), (b"\xff\xfe", "is not UTF-8")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"text\.txt'.*{message}") as error:
            read_texts([path])
        assert "\n" not in str(error.value)


def test_required_packages_bring_descriptions_if_they_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    described = readmes()
    assert described.keys() == {*READMES} and all(len(text) > 20_000 for text in described.values())
    monkeypatch.setattr(tasks, "READMES", ("no such package",))
    assert readmes() == {}


@pytest.mark.parametrize("name", ["story", "lecture"])
def test_prose_is_long_enough_for_every_tokenizer(name: str) -> None:
    """It is judged after 2,048 tokens, with 128 more. A token of Gemma 3's large vocabulary has 4.1 characters here."""
    [(key, text)] = prose(name).items()
    assert key == name and len(text) > 4.5 * (2048 + 128) and text.isascii()


def test_python_brings_sources_and_those_that_it_lacks_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = python_sources()
    assert len(sources) >= 15
    assert all("def " in source and len(source) > 10_000 for source in sources.values())
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "argparse.py").write_text("import os\n", encoding="utf-8")
    (tmp_path / "shutil.py").write_bytes(b"\xff")
    (tmp_path / "random.py").write_bytes(b"")
    assert python_sources() == {"argparse": "import os\n"}
    (tmp_path / "argparse.py").unlink()
    with pytest.raises(DataError, match=r"no sources in .*--text FILE"):
        python_sources()
