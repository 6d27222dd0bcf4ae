"""adaskip_cpp.measuring.corpus: text of several kinds, cut into requests."""

import sys
import sysconfig
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from oracles.fake_llama import BOS
from oracles.questions import LLM

from adaskip_cpp.errors import RequestError
from adaskip_cpp.measuring import corpus
from adaskip_cpp.measuring.tasks import prose, python_sources, readmes, text_items


def test_no_paragraph_is_on_two_pages_and_calibration_leaves_out_the_pages_that_it_is_judged_on() -> None:
    paragraphs = [paragraph for page in corpus.pages().values() for paragraph in page.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs)) > 1000
    held_out = corpus.held_out()
    assert len(held_out) > 5
    assert not any(page in corpus.text() for page in held_out.values())
    assert corpus.text(exclude=()) == corpus.SEPARATOR.join(corpus.pages().values())


def test_a_text_is_cut_into_equal_requests_spread_over_it_and_a_short_one_into_fewer_or_shorter_ones() -> None:
    text = "".join(chr(33 + i) for i in range(90))
    requests = corpus.cut(LLM, text, 3, 11)
    assert [request[0] for request in requests] == [BOS] * 3
    assert [LLM.detokenize(request).decode() for request in requests] == [text[:10], text[30:40], text[60:70]]
    assert [len(request) for request in corpus.cut(LLM, "x" * 25, 9, 11)] == [11, 11]
    assert [len(request) for request in corpus.cut(LLM, "x" * 5, 9, 11)] == [6]
    with pytest.raises(RequestError, match="empty"):
        corpus.cut(LLM, "", 9, 11)


class Words:
    """A tokenizer whose tokens are the numbers that a text has as words; it counts the characters that it reads."""

    n_read = 0

    def tokenize(self, text: bytes, add_bos: bool, special: bool) -> list[int]:
        self.n_read += len(text)
        return [1] * add_bos + [int(word) for word in text.split()]


@pytest.mark.parametrize(("width", "n_read"), [(9, 3 * 64 * 11), (99, 3 * 64 * 11 + 300_000)])
def test_of_a_long_text_no_more_is_tokenized_than_is_needed(width: int, n_read: int) -> None:
    """llama.cpp takes minutes for two million characters. All is read where tokens have more than 64 characters."""
    words, text = Words(), "".join(f"{n:{width}} " for n in range(300_000 // (width + 1)))
    requests = corpus.cut(words, text, 3, 11)  # type: ignore[arg-type]
    third = 100_000 // (width + 1)
    assert requests == [[1, *range(start, start + 10)] for start in (0, third, 2 * third)]
    assert words.n_read == n_read
    words.n_read = 0
    items = text_items(words, {"a": text}, n_items=3, n_tokens=11)  # type: ignore[arg-type]
    assert [[*item.tokens] for item in items] == requests and words.n_read <= 2 * n_read


def test_requests_are_of_each_kind_in_turn_and_have_no_text_that_what_is_learned_is_judged_on() -> None:
    requests = corpus.requests(LLM, 30, 200)
    assert requests == corpus.requests(LLM, 30, 200), "the same every time"
    assert [len(each) for each in requests] == [200] * 30 and {each[0] for each in requests} == {BOS}
    built_in = [LLM.detokenize(each).decode("utf-8", "ignore") for each in requests]
    library, numpy = Path(sysconfig.get_path("stdlib")), Path(np.__file__).parent
    headers = [path for path in Path(np.get_include(), "numpy").glob("*.h") if path.name[0] != "_"]
    assert all(each in corpus.text() for each in built_in[::6])
    for files, first in ((library.glob("*.py"), 1), (headers, 4)):
        joined = corpus.SEPARATOR.join(path.read_text("utf-8") for path in sorted(files))
        assert sum(each in joined for each in built_in[first::6]) >= 4, "all but a request that has two files"
    # Docstrings are indented in their modules. At least one of the parts of a request is a docstring, or a part of one.
    for folder, packages, first in ((library, corpus._PACKAGES, 2), (numpy, corpus._NUMPY, 3)):
        paths = [path for name in packages.split() for path in (folder / name).rglob("*.py")]
        words = {" ".join(path.read_text("utf-8", "ignore").split()) for path in paths}
        for each in built_in[first::6]:
            longest = max(each.split(corpus.SEPARATOR), key=len)
            assert any(" ".join(longest.split()[1:-1]) in text for text in words), longest
    described = corpus.descriptions(corpus._DESCRIBED)
    assert {*described} == {*corpus._DESCRIBED}
    assert all(each in corpus.SEPARATOR.join(described.values()) for each in built_in[5::6])
    written = partial(prose, "story"), partial(prose, "lecture")
    judged = [text for kind in (corpus.held_out, python_sources, readmes, *written) for text in kind().values()]
    for request in built_in:
        assert not any(request[50:150] in text for text in judged)


@pytest.mark.parametrize("n", [1, 6, 7])
def test_so_many_requests_are_cut_as_are_asked_for(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    for name, letter in (("text", "p"), ("_sources", "s"), ("_docstrings", "d")):
        monkeypatch.setattr(corpus, name, lambda *_, letter=letter: letter * 100)
    monkeypatch.setattr(corpus, "descriptions", lambda packages: {"a": "r" * 100})
    requests = [LLM.detokenize(request).decode() for request in corpus.requests(LLM, n, 11)]
    assert requests == [letter * 10 for letter in "psddsrp"][:n]


def test_a_python_without_sources_gives_pages_one_without_pages_sources_and_without_both_says_what_to_pass(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(corpus.np, "__file__", str(tmp_path / "none" / "a.py"))
    monkeypatch.setattr(corpus.np, "get_include", lambda: str(tmp_path / "none"))
    monkeypatch.setattr(corpus, "descriptions", lambda packages: {})
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "nothing"))
    assert corpus.requests(LLM, 9, 40) == corpus.cut(LLM, corpus.text(), 9, 40)
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(RequestError, match=r"no text to calibrate on; pass your own requests \(--data FILE\)"):
        corpus.requests(LLM, 9, 40)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "argparse.py").write_text("left = 'out'")
    (tmp_path / "bad.py").write_bytes(b"\xff")
    (tmp_path / "long.py").write_text("x = 1  # " + "long" * 20_000)
    (tmp_path / "short.py").write_text("short = True")
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "wrong.py").write_text("def def")
    words = " ".join(["word"] * 50)
    (tmp_path / "json" / "a.py").write_text(f'class A:\n    def f(self):\n        """{words}"""\n        "code"')
    assert [LLM.detokenize(each).decode() for each in corpus.requests(LLM, 4, 300)] == ["short = True", words]


def test_requests_of_nothing_are_refused() -> None:
    for n_requests, n_tokens in ((0, 40), (3, 1)):
        with pytest.raises(RequestError, match="use at least 1 request of 2 tokens"):
            corpus.requests(LLM, n_requests, n_tokens)
