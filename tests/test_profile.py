"""adaskip_cpp.profile: planning, and the file format."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaskip_cpp import Profile
from adaskip_cpp.errors import (
    BudgetError,
    CompensationError,
    PlanError,
    ProfileError,
    ProfileFormatError,
    ProfileMissingError,
    ProfileVersionError,
)
from adaskip_cpp.model import ModelInfo

NAN = float("nan")


def profile(similarity: Any, **changes: Any) -> Profile:
    similarity = np.array(similarity, float)
    observed = ~np.isnan(similarity)
    fields = {
        "norm_ratio": np.where(observed, 1.5, NAN),
        "median_ratio": np.where(observed, 0.75, NAN),
        "n_requests": 2,
        "n_tokens": 100,
        "model": ModelInfo("ab" * 32, "llama", len(similarity)),
        "corpus": "some text [with brackets], two pages",
        "package_version": "0.1.0",
        "created": "2026-01-02T03:04:05+00:00",
        **changes,
    }
    return Profile(similarity, **fields)


@pytest.fixture
def example() -> Profile:
    return profile([[0.5, 0.9], [0.99, NAN], [0.7, 0.99]])


# --- planning ---------------------------------------------------------------------------------------------------------


def test_the_most_similar_sublayers_of_both_kinds_are_skipped_first(example: Profile) -> None:
    plan = example.plan(3)
    assert (plan.attention, plan.ffn) == ((1,), (0, 2))
    assert plan.prefill == plan.decode
    assert (plan.model, plan.strategy, plan.compensation) == (example.model, "adaskip", "paper")


def test_ties_go_to_attention_and_then_to_the_lower_layer() -> None:
    tied = profile(np.full((3, 2), 0.9))
    chosen = [(tied.plan(n).attention, tied.plan(n).ffn) for n in range(7)]
    attention = [(), (0,), (0, 1), (0, 1, 2)]
    assert chosen == [(a, ()) for a in attention] + [((0, 1, 2), f) for f in attention[1:]]


@given(st.lists(st.tuples(*[st.one_of(st.just(NAN), st.sampled_from([0.1, 0.5, 0.9]))] * 2), min_size=1), st.data())
def test_the_choice_is_a_stable_sort(similarity: list[tuple[float, float]], data: st.DataObject) -> None:
    ranked = sorted(
        (-value, kind, layer)
        for layer, row in enumerate(similarity)
        for kind, value in enumerate(row)
        if value == value
    )
    n = data.draw(st.integers(0, len(ranked)))
    plan = profile(similarity).plan(n)
    expected = {(layer, kind) for _, kind, layer in ranked[:n]}
    assert {(layer, 0) for layer in plan.attention} | {(layer, 1) for layer in plan.ffn} == expected


def test_twelve_sublayers_with_the_papers_compensation_by_default() -> None:
    plan = profile(np.full((8, 2), 0.9)).plan()
    assert (plan.n_skip, plan.compensation) == (12, "paper")


@pytest.mark.parametrize(("name", "scale"), [("paper", 1.5), ("none", 1.0), ("median", 0.75)])
def test_compensation(example: Profile, name: str, scale: float) -> None:
    plan = example.plan(2, compensation=name)
    assert (plan.prefill.scale[plan.prefill.skip] == scale).all()
    assert plan.compensation == name


@pytest.mark.parametrize("n_skip", [-1, 6, 2.5, "two"])
def test_an_impossible_budget_is_refused_and_the_maximum_told(example: Profile, n_skip: Any) -> None:
    with pytest.raises(BudgetError, match="0 to 5"):
        example.plan(n_skip)
    assert example.plan(5).n_skip == 5
    assert example.plan(np.int64(0)).n_skip == 0


def test_unknown_names_are_refused_and_the_known_told(example: Profile) -> None:
    with pytest.raises(CompensationError, match=r"'best'.*paper, none, median"):
        example.plan(1, compensation="best")
    with pytest.raises(PlanError, match=r"'best'.*adaskip"):
        example.plan(1, strategy="best")


# --- the object -------------------------------------------------------------------------------------------------------


def test_the_arrays_are_read_only_and_tell_what_is_skippable(example: Profile) -> None:
    with pytest.raises(ValueError, match="read-only"):
        example.similarity[0, 0] = 1
    np.testing.assert_array_equal(example.skippable, [[True, True], [True, False], [True, True]])


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_ratio": np.ones((2, 2))},
        {"median_ratio": np.full((3, 2), np.inf)},
        {"norm_ratio": np.ones((3, 2))},  # a ratio where there is no similarity
        {"norm_ratio": np.full((3, 2), NAN)},
    ],
)
def test_impossible_arrays_are_refused(example: Profile, changes: dict[str, Any]) -> None:
    with pytest.raises(ProfileFormatError, match="calibrate again"):
        profile(example.similarity, **changes)


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_profile_survives_its_file(example: Profile, tmp_path: Path) -> None:
    example.save(tmp_path / "p.json")
    loaded = Profile.load(str(tmp_path / "p.json"))
    assert loaded == example
    np.testing.assert_array_equal(loaded.similarity, example.similarity)
    assert loaded.plan(3) == example.plan(3)
    assert os.listdir(tmp_path) == ["p.json"]


def test_the_file_is_strict_json_with_null_for_what_was_not_observed(example: Profile, tmp_path: Path) -> None:
    example.save(tmp_path / "p.json")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    data = json.loads((tmp_path / "p.json").read_text(), parse_constant=refuse)
    assert (data["format"], data["version"]) == ("adaskip-profile", 1)
    assert data["prefill"]["similarity"] == [[0.5, 0.9], [0.99, None], [0.7, 0.99]]
    assert data["calibration"]["corpus"] == "some text [with brackets], two pages"
    assert data == example.to_dict()


@pytest.mark.parametrize("fail", ["os.replace", "os.fsync", "json.dumps"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_save_keeps_the_old_file_and_leaves_no_other(
    example: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: str, error: BaseException
) -> None:
    path = tmp_path / "p.json"
    path.write_text("old")

    def broken(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(fail, broken)
    with pytest.raises(type(error)):
        example.save(path)
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["p.json"]


def test_a_save_follows_a_link_and_replaces_no_device(example: Profile, tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "real.json")
    example.save(link)
    assert link.is_symlink() and Profile.load(tmp_path / "real.json") == example
    with pytest.raises(OSError, match="not a regular file"):
        example.save(tmp_path)


def test_a_missing_file_is_both_errors_that_one_would_catch(tmp_path: Path) -> None:
    with pytest.raises(ProfileMissingError, match=r"no profile .*nope\.json.*calibrate") as caught:
        Profile.load(tmp_path / "nope.json")
    assert isinstance(caught.value, FileNotFoundError) and isinstance(caught.value, ProfileError)


def test_a_file_truncated_anywhere_is_refused(example: Profile, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    example.save(path)
    content = path.read_bytes()
    for size in range(0, len(content) - 2, 7):
        path.write_bytes(content[:size])
        with pytest.raises(ProfileFormatError, match=r"p\.json.*truncated"):
            Profile.load(path)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00", b"[" * 100_000, b"GGUF\x00\x01", b"null", b"[]", b'{"a": 1}', b"3"]
)
def test_what_is_not_a_profile_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(content)
    with pytest.raises(ProfileFormatError, match=r"p\.json.*adaskip-cpp calibrate"):
        Profile.load(path)


@pytest.mark.parametrize("version", [0, 2, "1", None, [1]])
def test_another_format_version_is_refused(example: Profile, tmp_path: Path, version: Any) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({**example.to_dict(), "version": version}))
    with pytest.raises(ProfileVersionError, match=r"format version .* reads 1"):
        Profile.load(path)


def drop(*keys: str) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        del data[keys[-1]]

    return change


def put(value: Any, *keys: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        drop("model"),
        drop("calibration"),
        drop("prefill"),
        drop("prefill", "median_ratio"),
        drop("model", "n_layer"),
        drop("calibration", "n_tokens"),
        put(None, "model"),
        put([], "calibration"),
        put(5, "prefill"),
        put("x", "prefill", "similarity"),
        put(4, "model", "n_layer"),
        put(0, "model", "n_layer"),
        put(True, "calibration", "n_requests"),
        put(-3, "calibration", "n_tokens"),
        put("0.5", "prefill", "similarity", 0, 0),
        put(True, "prefill", "similarity", 0, 0),
        put([0.5], "prefill", "similarity", 0),
        put([0.5, 0.5, 0.5], "prefill", "norm_ratio", 0),
        put(None, "prefill", "norm_ratio", 0, 0),
        put(10**400, "prefill", "norm_ratio", 0, 0),
    ],
)
def test_a_profile_with_a_field_missing_or_malformed_is_refused(
    example: Profile, tmp_path: Path, change: Callable[[Any], None]
) -> None:
    data = example.to_dict()
    change(data)
    path = tmp_path / "p.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ProfileFormatError, match=r"p\.json.*calibrate again"):
        Profile.load(path)
