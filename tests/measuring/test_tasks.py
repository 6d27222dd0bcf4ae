"""Items cut from texts, and the texts they come from."""

import sysconfig
from pathlib import Path

import pytest
from oracles.questions import LLM

from adaskip_cpp.errors import DataError
from adaskip_cpp.measuring import corpus, tasks
from adaskip_cpp.measuring.tasks import READMES, licences, python_sources, read_texts, readmes, text_items

# --- items of text ----------------------------------------------------------------------------------------------------


def test_items_are_dealt_out_over_the_texts_in_turn_and_ids_tell_them_apart() -> None:
    items = text_items(LLM, {"a": "a" * 100, "b": "b" * 25, "c": "c" * 15}, n_items=7, n_tokens=11)
    texts = [LLM.detokenize(item.tokens).decode() for item in items]
    assert texts == [letter * 10 for letter in "abcabaa"] and {item.task for item in items} == {"text"}
    two = {"a": "a" * 100, "b": "b" * 100}
    ids = [item.id for item in text_items(LLM, two, n_items=4, n_tokens=11, task="prose")]
    assert ids == ["prose/a/11/0", "prose/b/11/0", "prose/a/11/1", "prose/b/11/1"]


def test_a_text_shorter_than_an_item_is_refused_or_left_out() -> None:
    texts = {"long": "a" * 100, "short": "b" * 9}
    with pytest.raises(DataError, match=r"'short' has 9 tokens, fewer than the 11.*give a longer text"):
        text_items(LLM, texts, n_items=2, n_tokens=11)
    items = text_items(LLM, texts, n_items=2, n_tokens=11, drop_short=True)
    assert [LLM.detokenize(item.tokens)[:1] for item in items] == [b"a", b"a"]


def test_fewer_items_than_asked_for_are_refused() -> None:
    with pytest.raises(DataError, match=r"gives 3 items of 11 tokens, not the 4.*ask for fewer"):
        text_items(LLM, {"a": "a" * 20, "b": "b" * 19}, n_items=4, n_tokens=11)
    with pytest.raises(DataError, match="gives 0 items"):
        text_items(LLM, {}, n_items=1, n_tokens=11)


@pytest.mark.parametrize(("n_items", "n_tokens"), [(0, 11), (1, 1), (-1, 11)])
def test_counts_out_of_range_are_refused(n_items: int, n_tokens: int) -> None:
    with pytest.raises(DataError, match="at least 1 item of 2 tokens"):
        text_items(LLM, {"a": "a" * 20}, n_items=n_items, n_tokens=n_tokens)


def test_the_held_out_pages_are_enough_for_a_measurement() -> None:
    items = text_items(LLM, corpus.held_out(), n_items=16, n_tokens=2048)
    calibration = corpus.text().encode()
    assert len({item.id for item in items}) == 16
    assert not any(LLM.detokenize(item.tokens) in calibration for item in items)


# --- texts ------------------------------------------------------------------------------------------------------------


def test_files_are_read_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("première", encoding="utf-8")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.txt").write_text("second", encoding="utf-8")
    (tmp_path / "b.txt").write_text("third", encoding="utf-8")
    paths = [tmp_path / "a.txt", tmp_path / "more" / "a.txt", tmp_path / "b.txt"]
    assert read_texts(paths) == {str(paths[0]): "première", str(paths[1]): "second", "b.txt": "third"}


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b" \n\n", "is empty"), (b"\xff\xfe", "is not UTF-8"), (None, "cannot read")],
)
def test_a_file_that_is_no_text_is_refused_in_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_texts([path])
    assert "text.txt" in str(error.value) and "\n" not in str(error.value)


def test_required_packages_bring_prose(monkeypatch: pytest.MonkeyPatch) -> None:
    found = readmes()
    assert found.keys() == {*READMES} and all(len(text) > 20_000 for text in found.values())
    monkeypatch.setattr(tasks, "READMES", ("no such package",))
    assert readmes() == {}


def test_licences_are_those_of_numpy_and_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = licences()
    assert "Redistributions in binary form" in found["numpy"] and "PYTHON SOFTWARE FOUNDATION" in found["Python"]
    assert all(len(text) > 10_000 for text in found.values())
    monkeypatch.setattr(tasks.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(tasks.metadata, "files", lambda package: None)
    assert licences() == {}


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
