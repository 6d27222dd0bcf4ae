"""adaskip_cpp.tuning.memo: what a run keeps for the next one, and when that is not believed."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from oracles.profiles import EXAMPLE

from adaskip_cpp.model.settings import Settings, Tried
from adaskip_cpp.tuning.exact import FoundSettings
from adaskip_cpp.tuning.memo import Memo

MODEL = EXAMPLE.model


@dataclass
class Made:
    """Makes a value, and counts how often it was asked to."""

    value: Any
    times: int = 0

    def __call__(self) -> Any:
        self.times += 1
        return self.value


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "unfinished.json")


def test_a_value_is_made_once_and_found_by_the_next_run(path: str) -> None:
    made = Made([0.25, 1e-12])
    assert Memo(path, "key").get("lost", list[float], made) == [0.25, 1e-12]
    assert Memo(path, "key").get("lost", list[float], made) == [0.25, 1e-12] and made.times == 1


def test_the_settings_that_were_found_are_kept_as_they_are(path: str) -> None:
    failed = Tried(Settings(flash_attn=True), *[float("inf")] * 4, False)
    found = FoundSettings(
        Settings(n_threads=2), (failed, Tried(Settings(n_threads=2), 1e-3, 2e-3, 0.1, 9.5, True)), 900
    )
    Memo(path, "key").get("settings", FoundSettings, Made(found))
    assert Memo(path, "key").get("settings", FoundSettings, Made(None)) == found


OTHER = b'{"key": "other", "lost": 1.0}'


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'"key"', b"\xff\xfe", b'{"lost": 1.0}', b'{"key": ["key"]}', OTHER]
)
def test_a_file_that_is_broken_or_of_another_model_or_option_is_ignored_and_written_over(
    content: bytes, path: str
) -> None:
    Path(path).write_bytes(content)
    assert Memo(path, "key").get("lost", float, Made(2.0)) == 2.0
    assert Memo(path, "key").get("lost", float, Made(3.0)) == 2.0
    assert Memo(path, "other").get("lost", float, Made(4.0)) == 4.0


@pytest.mark.parametrize("value", [None, "much", [1.0, "much"], {"a": 1.0}])
def test_a_value_of_another_type_is_made_again(value: Any, path: str) -> None:
    Path(path).write_text(json.dumps({"key": "key", "lost": value}))
    assert Memo(path, "key").get("lost", list[float], Made([2.0])) == [2.0]


def test_an_interrupted_value_is_not_kept(path: str) -> None:
    def interrupted() -> float:
        raise KeyboardInterrupt

    memo = Memo(path, "key")
    memo.get("first", float, Made(1.0))
    with pytest.raises(KeyboardInterrupt):
        memo.get("second", float, interrupted)
    again = Memo(path, "key")
    assert (again.get("first", float, Made(3.0)), again.get("second", float, Made(2.0))) == (1.0, 2.0)


def test_a_profile_is_kept_beside_the_file_and_one_of_another_key_or_model_or_a_broken_one_is_none(path: str) -> None:
    assert Memo(path, "key").profile(MODEL) is None
    Memo(path, "key").keep_profile(EXAMPLE)
    assert Memo(path, "key").profile(MODEL) == EXAMPLE
    assert Memo(path, "other").profile(MODEL) is None
    assert Memo(path, "key").profile(replace(MODEL, fingerprint="cd" * 32)) is None
    next(each for each in Path(path).parent.iterdir() if "profile" in each.name).write_text("{")
    assert Memo(path, "key").profile(MODEL) is None


def test_remove_leaves_no_file_and_is_no_error_where_there_is_none(path: str) -> None:
    memo = Memo(path, "key")
    memo.remove()
    memo.get("lost", float, Made(1.0))
    memo.keep_profile(EXAMPLE)
    assert len([*Path(path).parent.iterdir()]) >= 2
    memo.remove()
    assert [*Path(path).parent.iterdir()] == []


def test_without_a_path_values_are_kept_for_this_run_alone(tmp_path: Path) -> None:
    memo = Memo()
    assert (memo.get("lost", float, Made(1.0)), memo.get("lost", float, Made(2.0))) == (1.0, 1.0)
    memo.keep_profile(EXAMPLE)
    assert memo.profile(MODEL) is None and Memo().get("lost", float, Made(2.0)) == 2.0
    memo.remove()
    assert [*tmp_path.iterdir()] == []
