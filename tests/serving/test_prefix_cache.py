"""adaskip_cpp.serving.prefix_cache: what was read before, in memory and in files."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaskip_cpp.engine.runs import n_common
from adaskip_cpp.errors import DataError
from adaskip_cpp.serving.prefix_cache import PrefixCache


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def saved(folder: Path, state: bytes = b"state") -> Path:
    """The file of a state of the tokens 1 and 2 that a process has left in a folder."""
    cache = PrefixCache(10_000, folder)
    cache.put("a", ids(1, 2), bytearray(state))
    cache.close()
    (path,) = folder.glob("*.adaskip-prefix")
    return path


def test_the_longest_common_beginning_of_the_right_key_is_found() -> None:
    """A longer state takes the place of its beginning."""
    cache = PrefixCache(100)
    cache.put("b", ids(1, 2), bytearray(b"shorter"))
    cache.put("a", ids(1, 2), bytearray(b"shorter"))
    cache.put("a", ids(1, 2, 3), bytearray(b"abc"))
    cache.put("a", ids(1, 9, 9, 9), bytearray(b"a999"))
    assert [each.state for each in cache.entries] == list(map(bytearray, (b"shorter", b"abc", b"a999")))
    cache.put("b", ids(1, 2, 3, 4, 5), bytearray(b"other"))
    found, n = cache.find({"a"}, ids(1, 2, 3, 4, 5))
    assert found is not None and (found.state, n) == (b"abc", 3)
    assert cache.find({"a", "b"}, ids(1, 2, 3, 4, 7))[1] == 4
    assert cache.find({"c"}, ids(1, 2)) == (None, 0) and cache.find({"a"}, ids(7)) == (None, 0)
    strict = PrefixCache(100)
    strict.can_rewind = False
    strict.put("a", ids(1, 2, 3), bytearray(b"abc"))
    assert strict.find({"a"}, ids(1, 2, 4)) == (None, 0) and strict.find({"a"}, ids(1, 2, 3, 4))[1] == 3


def test_the_least_recently_used_go_first() -> None:
    cache = PrefixCache(25)
    for token in (1, 2):
        cache.put("a", ids(token), bytearray(bytes([token]) * 10))
    assert cache.take(cache.find({"a"}, ids(1))[0]) == b"\1" * 10  # type: ignore[arg-type]
    cache.put("a", ids(3), bytearray(b"\3" * 10))
    assert [each.tokens[0] for each in cache.entries] == [1, 3] and cache.n_bytes == 20
    cache.put("a", ids(4), bytearray(b"\4" * 26))
    assert [each.tokens[0] for each in cache.entries] == [1, 3], "what does not fit is not kept, and takes no room"


def test_files_outlast_the_process_within_their_bounds(tmp_path: Path) -> None:
    """An entry without a file and without room in memory is forgotten."""
    folder = tmp_path / "new" / "folder"
    first = PrefixCache(4000, folder)
    for token in range(20):
        first.put("a", ids(token, token), bytearray(bytes([token]) * 1500))
        assert first._writing is not None
        first._writing.result(10)
    assert len(first.entries) == 2 and first.n_bytes == 3000
    first.close()
    (path,) = folder.glob("*.adaskip-prefix")  # it counts for 1 kB beside its tokens and its state
    assert path.stat().st_size < 1500 + 2 * 4 + 1024
    assert os.name != "posix" or all(each.stat().st_mode & 0o077 == 0 for each in (folder, *folder.iterdir()))
    second = PrefixCache(4000, folder)
    entry, n = second.find({"a"}, ids(19, 19, 7))
    assert entry is not None and n == 2 and entry.state is None and second.take(entry) == b"\x13" * 1500
    assert second.find({"a"}, ids(0, 0))[1] == 0


def test_where_nothing_can_be_written_it_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = PrefixCache(10_000, tmp_path / "kept")
    shutil.rmtree(tmp_path / "kept")
    for token in range(3):
        cache.put("a", ids(token), bytearray(10))
    cache.close()
    assert caplog.text.count("kept only in memory") == 1
    assert cache.take(cache.find({"a"}, ids(1))[0]) == bytearray(10)  # type: ignore[arg-type]


def make_link(path: Path, content: bytes) -> None:
    path.rename(path.parent.parent / "other")
    path.symlink_to(path.parent.parent / "other")


DAMAGES: dict[str, Callable[[Path, bytes], object]] = {
    "cut": lambda path, content: path.write_bytes(content[:-1]),
    "flip": lambda path, content: path.write_bytes(content[:-1] + b"!"),
    "header": lambda path, content: path.write_bytes(content.replace(b'"n_tokens":2', b'"n_tokens":1')),
    "of another folder": lambda path, content: shutil.copy(saved(path.parent.parent / "theirs", b"theirs"), path),
    "of no bytes on disk": lambda path, content: os.truncate(path, 10**12),
    "link": make_link,
    "gone": lambda path, content: None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_torn_or_foreign_file_is_ignored_and_removed(tmp_path: Path, damage: str) -> None:
    path = saved(tmp_path / "kept")
    content = path.read_bytes()
    DAMAGES[damage](path, content)
    (tmp_path / "kept" / "notes.txt").write_text("mine")
    cache = PrefixCache(10_000, tmp_path / "kept")
    entry, _ = cache.find({"a"}, ids(1, 2))
    if entry is not None:
        if damage == "gone":
            path.unlink()
        assert cache.take(entry) is None
    assert cache.find({"a"}, ids(1, 2)) == (None, 0)
    cache.close()
    assert sorted(each.name for each in (tmp_path / "kept").iterdir()) == ["hmac.key", "notes.txt"]
    assert damage != "link" or (tmp_path / "other").read_bytes() == content


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="there are no owners of folders")
def test_a_folder_that_others_own_or_may_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in (0o770, 0o702):
        tmp_path.chmod(mode)
        with pytest.raises(DataError, match="other users may write to"):
            PrefixCache(1, tmp_path)
    tmp_path.chmod(0o755)
    PrefixCache(1, tmp_path).close()
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(DataError, match="belongs to another user; choose another --cache-dir"):
        PrefixCache(1, tmp_path)


def test_what_a_link_leads_to_is_not_overwritten(tmp_path: Path) -> None:
    path = saved(tmp_path / "kept")
    path.unlink()
    (tmp_path / "victim").write_text("mine")
    cache = PrefixCache(10_000, tmp_path / "kept")
    path.symlink_to(tmp_path / "victim")
    cache.put("a", ids(1, 2), bytearray(b"state"))
    cache.close()
    assert (tmp_path / "victim").read_text() == "mine" and path.is_file() and not path.is_symlink()


def test_what_another_process_is_writing_is_left_alone_for_an_hour(tmp_path: Path) -> None:
    young, old = (tmp_path / f".{name}.adaskip-prefix.0a.tmp" for name in ("young", "old"))
    for each in (young, old):
        each.write_text("half")
    os.utime(old, times=(time.time() - 4000,) * 2)
    PrefixCache(10_000, tmp_path).close()
    assert young.exists() and not old.exists()


@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)))
def test_common_tokens_are_counted(a: list[int], b: list[int]) -> None:
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert n_common(ids(*a), ids(*b)) == expected
