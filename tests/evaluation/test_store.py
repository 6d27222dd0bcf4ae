"""Results on disk: appended one by one, taken up again, never mixed with those of other settings."""

import json
from pathlib import Path
from typing import Any

import pytest

from adaskip_cpp.errors import DataError
from adaskip_cpp.evaluation.store import Record, open_store
from adaskip_cpp.files import content_hash

SETTINGS = {"model": "abc", "n": 3, "items": ["a", "b"]}
OTHER = {**SETTINGS, "n": 4}


def path_of(folder: Path, settings: dict[str, Any] = SETTINGS) -> Path:
    return folder / f"items-{content_hash(settings)[:12]}.jsonl"


def fill(folder: Path, settings: dict[str, Any] = SETTINGS, n: int = 3) -> Path:
    """Append what the store lacks of ``n`` results."""
    with open_store(folder, settings) as store:
        for i in range(len(store.records), n):
            store.append(Record(f"item {i}", "full", "prompt", {"loss": i / 3}))
    return path_of(folder, settings)


def test_a_result_is_a_line_on_disk_before_the_store_is_closed_and_null_if_it_is_no_number(tmp_path: Path) -> None:
    with open_store(tmp_path, SETTINGS) as store:
        store.append(Record("a", "full", "prompt", {"loss": float("nan"), "kl": 0.5}))
        first, line = map(json.loads, path_of(tmp_path).read_text().splitlines())
    assert first == {"settings": SETTINGS, "facts": {}}
    values = {"loss": None, "kl": 0.5}
    assert line == {"item": "a", "contender": "full", "measure": "prompt", "values": values}
    with open_store(tmp_path, SETTINGS) as store:
        assert store.records["a", "full", "prompt"].values == values


def test_what_a_crash_left_of_a_line_is_dropped_and_written_over(tmp_path: Path) -> None:
    path = fill(tmp_path)
    whole = path.read_bytes()
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        fill(tmp_path)
        assert path.read_bytes() == whole


def test_a_malformed_line_is_told_by_its_number(tmp_path: Path) -> None:
    path = fill(tmp_path)
    lines = path.read_text().splitlines()
    for number in (1, 2):
        broken = [line[:-5] if i == number else line for i, line in enumerate(lines, 1)]
        path.write_text("\n".join([*broken, ""]))
        with pytest.raises(DataError, match=rf"line {number} of .*items-.*\.jsonl"), open_store(tmp_path, SETTINGS):
            pass


def test_other_settings_begin_anew_and_each_finds_its_own_results(tmp_path: Path) -> None:
    old = fill(tmp_path).read_bytes()
    with open_store(tmp_path, OTHER, {"started": "today"}) as store:
        assert store.records == {} and store.others == [path_of(tmp_path)]
    fill(tmp_path, OTHER, n=1)
    assert path_of(tmp_path).read_bytes() == old
    with open_store(tmp_path, OTHER, {"started": "tomorrow"}) as store:
        assert len(store.records) == 1 and store.facts == {"started": "today"}, "facts are no settings"
    with open_store(tmp_path, dict(reversed(SETTINGS.items()))) as store:
        assert store.others == [path_of(tmp_path, OTHER)]
        assert [key[0] for key in store.records] == ["item 0", "item 1", "item 2"]
        assert store.records["item 2", "full", "prompt"].values == {"loss": 2 / 3}


def test_two_runs_do_not_write_into_one_folder(tmp_path: Path) -> None:
    with (
        open_store(tmp_path, SETTINGS),
        pytest.raises(DataError, match="another evaluation is writing"),
        open_store(tmp_path, SETTINGS),
    ):
        pass
