"""adaskip_cpp.measuring.memo: values that a stopped run keeps for the next one."""

import math
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from oracles.profiles import EXAMPLE

from adaskip_cpp.measuring.memo import Memo
from adaskip_cpp.model.settings import Settings, Tried
from adaskip_cpp.tuning.exact import FoundSettings


def get(memo: Memo, value: float, name: str = "lost") -> float:
    """The value that the memo has, else this one."""
    return memo.get(name, float, lambda: value)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "unfinished.json")


def test_what_was_found_is_kept_as_it_is_and_not_made_again(path: str) -> None:
    tried = Tried(Settings(flash_attn=True), *[math.inf] * 4, False), Tried(Settings(), 1e-3, 2e-12, 0.1, 9.5, True)
    made = [FoundSettings(Settings(n_threads=2), tried, 900)]
    found = [Memo(path, "key").get("settings", FoundSettings, made.pop) for _ in range(2)]
    assert found == [FoundSettings(Settings(n_threads=2), tried, 900)] * 2


BROKEN = [b"", b"{", b"[]", b'"key"', b"\xff\xfe", b'{"lost": 1.0}']


OF_ANOTHER_RUN = [b'{"key": ["key"]}', b'{"key": "other", "lost": 1}']


OF_ANOTHER_TYPE = [b'{"key": "key", "lost": ' + value + b"}" for value in (b"true", b'"much"', b"[1.0]", b'{"a": 1.0}')]


@pytest.mark.parametrize("content", BROKEN + OF_ANOTHER_RUN + OF_ANOTHER_TYPE)
def test_what_is_broken_or_of_another_run_or_type_is_written_over(content: bytes, path: str) -> None:
    Path(path).write_bytes(content)
    assert (get(Memo(path, "key"), 2.0), get(Memo(path, "key"), 3.0), get(Memo(path, "other"), 4.0)) == (2, 2, 4)


def test_an_interrupted_value_is_not_kept(path: str) -> None:
    memo = Memo(path, "key")
    get(memo, 1.0)
    with pytest.raises(KeyboardInterrupt):
        memo.get("second", float, Mock(side_effect=KeyboardInterrupt))
    again = Memo(path, "key")
    assert (get(again, 3.0), get(again, 2.0, "second")) == (1.0, 2.0)


def test_a_profile_is_kept_and_one_of_another_key_or_model_or_a_broken_one_is_none(path: str) -> None:
    assert Memo(path, "key").profile(EXAMPLE.model) is None
    Memo(path, "key").keep_profile(EXAMPLE)
    assert Memo(path, "key").profile(EXAMPLE.model) == EXAMPLE
    assert Memo(path, "other").profile(EXAMPLE.model) is None
    assert Memo(path, "key").profile(replace(EXAMPLE.model, fingerprint="cd" * 32)) is None
    next(each for each in Path(path).parent.iterdir() if "profile" in each.name).write_text("{")
    assert Memo(path, "key").profile(EXAMPLE.model) is None


def test_remove_leaves_no_file_and_without_a_path_values_are_kept_for_this_run_alone(path: str) -> None:
    for memo, profile in ((Memo(path, "key"), EXAMPLE), (Memo(), None)):
        memo.remove()  # there is none
        memo.keep_profile(EXAMPLE)
        assert (get(memo, 1.0), get(memo, 2.0)) == (1.0, 1.0)
        assert memo.profile(EXAMPLE.model) == profile
        memo.remove()
        assert [*Path(path).parent.iterdir()] == []
    assert get(Memo(), 2.0) == 2.0
