"""adaskip_cpp.model.profile: the data, and the files."""

import hashlib
import itertools
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.changed_json import LOST, change
from oracles.costs import cost_model
from oracles.profiles import EXAMPLE, MAPPED, MAPPED_EXAMPLE, maps, profile, statistics

from adaskip_cpp import Profile
from adaskip_cpp.errors import ProfileError
from adaskip_cpp.model.statistics import LinearMaps


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The file of a profile with maps, and beside it that of its vectors."""
    MAPPED_EXAMPLE.save(tmp_path / "p.json")
    return tmp_path / "p.json"


def test_the_arrays_are_read_only_and_tell_what_is_skippable() -> None:
    with pytest.raises(ValueError, match="read-only"):
        EXAMPLE.similarity[0, 0] = 1
    np.testing.assert_array_equal(EXAMPLE.skippable, [[True, True], [True, False], [True, True]])
    without = replace(EXAMPLE, bulk_only=(2,)).skippable
    np.testing.assert_array_equal(without, [[True, True], [True, False], [False, True]])


SHORT = statistics(np.ones((3, 2)), mean_u=np.ones((3, 2, 4)), mean_v=np.ones((3, 2, 4)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decode": statistics(np.ones((4, 2)))}, "4 layers, the model has 3"),
        ({"decode": SHORT}, "vectors have 5 values in prefill, 4 in decode"),
        *(({"maps": maps(**shape)}, "linear maps") for shape in ({"n_layer": 4}, {"n_layer": 2}, {"n_embd": 4})),
        ({"cost": cost_model(0.1, [1, 2], [3, 4])}, "the cost model is of 2 layers, the model has 3"),
        *(
            ({name: at}, f"'{name}'")
            for name in ("windowable", "sliding", "bulk_only")
            for at in ((3,), (-1,), (1, 0), (1, 1))
        ),
    ],
)
def test_what_cannot_be_of_one_model_is_refused(changes: Any, message: str) -> None:
    with pytest.raises(ProfileError, match=f"{message}.*calibrate again"):
        replace(EXAMPLE, **changes)


LIMITED = cost_model(1 / 3, [1, 2, 3], [4, 5, 6], limit=[math.inf, 1024, math.inf])
EVERYTHING = replace(MAPPED_EXAMPLE, cost=LIMITED, windowable=(0, 2), sliding=(1,), bulk_only=(1,))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cost": LIMITED},
        {"windowable": (0, 2)},
        {"sliding": (1,)},
        {"bulk_only": (1,)},
        {"n_requests": 9},
        {"maps": maps(rank=1)},
    ],
)
def test_a_profile_survives_its_files(tmp_path: Path, changes: Any) -> None:
    before = replace(EXAMPLE, **changes)
    before.save(tmp_path / "p.json")
    loaded = Profile.load(str(tmp_path / "p.json"))
    assert loaded == before and (loaded != EXAMPLE) == bool(changes)
    np.testing.assert_array_equal(loaded.decode.mean_v, EXAMPLE.decode.mean_v)


def test_linear_maps_lie_after_the_vectors_without_those_that_are_unknown(path: Path) -> None:
    found = Profile.load(path).maps
    assert found is not None and found == MAPPED_EXAMPLE.maps
    expected = [array[divmod(at, 3)].ravel() for array in (found.down, found.up) for at in MAPPED]
    numbers = np.fromfile(path.with_suffix(".bin"), np.uint8)[2 * 4 * 3 * 2 * 5 :]  # vectors are alike in both phases
    np.testing.assert_array_equal(dequantize(numbers, GGMLQuantizationType.BF16), np.concatenate(expected))


def test_linear_maps_are_rounded_to_the_nearest_bf16() -> None:
    rng = np.random.default_rng(0)
    values = (rng.normal(size=(3, 3, 4, 5)) * 10.0 ** rng.integers(-30, 30, (3, 3, 4, 5))).astype(np.float32)
    values.flat[:4] = np.float32([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 0])  # ties go to the even one
    expected = dequantize(quantize(values, GGMLQuantizationType.BF16), GGMLQuantizationType.BF16)
    found = LinearMaps(values, values.transpose(0, 1, 3, 2))
    np.testing.assert_array_equal(found.down, expected)
    np.testing.assert_array_equal(found.up, expected.transpose(0, 1, 3, 2))


@pytest.mark.parametrize(
    ("name", "sidecar"), [("p.json", "p.bin"), ("m.adaskip.json", "m.adaskip.bin"), ("p", "p.bin")]
)
def test_the_vectors_lie_beside_the_profile(tmp_path: Path, name: str, sidecar: str) -> None:
    EXAMPLE.save(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == sorted([name, sidecar])
    parts = [getattr(EXAMPLE, phase) for phase in ("prefill", "decode")]
    expected = [vectors for part in parts for vectors in (part.mean_u, part.mean_v)]
    np.testing.assert_array_equal(np.fromfile(tmp_path / sidecar, "<f4").reshape(2, 3, 2, 5), expected[:2])
    np.testing.assert_array_equal(expected[2:], expected[:2], "the file has what is alike once")


def test_the_file_is_strict_json_with_null_for_what_was_not_observed(tmp_path: Path) -> None:
    EVERYTHING.save(tmp_path / "p.json")
    data = json.loads((tmp_path / "p.json").read_text(), parse_constant=pytest.fail)
    assert (data["format"], data["version"]) == ("adaskip-profile", 12)
    assert data["prefill"]["similarity"] == [[0.5, 0.9], [0.99, None], [0.7, 0.99]]
    assert data["prefill"]["layer_similarity"] == [pytest.approx(0.7), None, pytest.approx(0.845)]
    assert data["cost"]["limit"] == [None, 1024.0, None]
    assert (data["windowable"], data["sliding"], data["bulk_only"]) == ([0, 2], [1], [1])
    vectors = data.pop("vectors")
    assert vectors.pop("file") == "p.bin" and len(vectors.pop("sha256")) == 64 and not vectors
    assert data == json.loads(json.dumps(EVERYTHING.to_dict()))


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize(("fail", "at"), [("os.fsync", 1), ("os.replace", 1), ("os.replace", 2)])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_save_keeps_the_old_files_and_leaves_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: str, at: int, error: BaseException, old: bool
) -> None:
    path, before = tmp_path / "p.json", profile([[0.1, 0.2], [0.3, 0.4]])
    if old:
        before.save(path)
    calls, real = itertools.count(1), getattr(os, fail.removeprefix("os."))

    def broken(*args: Any) -> None:
        if next(calls) == at:
            raise error
        real(*args)

    monkeypatch.setattr(fail, broken)
    with pytest.raises(type(error)):
        EXAMPLE.save(path)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == (["p.bin", "p.json"] if old else [])
    assert not old or Profile.load(path) == before


def symlink(link: Path, target: Path) -> None:
    try:
        link.symlink_to(target)
    except OSError:
        pytest.skip("no symbolic links here")


def test_a_save_follows_a_link_and_replaces_no_folder(tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    symlink(link, tmp_path / "real.json")
    EXAMPLE.save(link)
    assert link.is_symlink() and Profile.load(tmp_path / "real.json") == Profile.load(link) == EXAMPLE
    assert sorted(os.listdir(tmp_path)) == ["link.json", "real.bin", "real.json"]
    with pytest.raises(OSError, match="not a regular file"):
        EXAMPLE.save(tmp_path)


def test_a_file_truncated_anywhere_is_refused(path: Path) -> None:
    content = path.read_bytes()
    for size in range(0, len(content) - 2, 7):
        path.write_bytes(content[:size])
        with pytest.raises(ProfileError, match=r"p\.json.*truncated"):
            Profile.load(path)


def test_missing_files_and_what_is_not_a_profile_of_this_version_are_told_what_to_do(path: Path) -> None:
    with pytest.raises(ProfileError, match=r"no profile .*nope\.json.*calibrate"):
        Profile.load(path.with_name("nope.json"))
    for version in (11, 13, "12", None):
        change(path, "version", version)
        with pytest.raises(ProfileError, match=r"format version .* reads 12"):
            Profile.load(path)
    for content in (b"\xff\xfe\x00", b"[" * 100_000, b"[]", b'{"a": 1}'):
        path.write_bytes(content)
        refused(path)


def test_vectors_that_are_not_those_of_the_profile_are_refused(path: Path) -> None:
    vectors = path.with_suffix(".bin")
    content = vectors.read_bytes()
    EXAMPLE.save(path.with_name("q.json"))
    for other in (content[:-1], b"", bytes([content[0] ^ 1]) + content[1:], path.with_name("q.bin").read_bytes()):
        vectors.write_bytes(other)
        assert "p.bin', is truncated or of another one" in refused(path)
    vectors.unlink()
    assert "p.bin', is missing; put it back" in refused(path)
    vectors.write_bytes(content)
    assert Profile.load(path.rename(path.with_name("renamed.json"))) == MAPPED_EXAMPLE


def rewrite(path: Path, content: bytes) -> None:
    """Write the vectors' file of a profile anew, and its hash, as whoever makes such a file knows to."""
    path.with_suffix(".bin").write_bytes(content)
    change(path, "vectors.sha256", hashlib.sha256(content).hexdigest())


def refused(path: Path) -> str:
    with pytest.raises(ProfileError, match=r"p\.json' cannot be used: .*; calibrate again$") as caught:
        Profile.load(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("at", "value"),
    [
        *((name, LOST) for name in ("model", "prefill", "vectors", "prefill.mean_u.bf16", "prefill.median_ratio")),
        ("prefill.mean_u.shape", [3, 2]),
        ("prefill.mean_u.start", -2),
        ("prefill.mean_u.start", 1 << 20),
        ("cost", 5),
        ("decode.layer_similarity", [[0.5, 0.5]] * 3),
        ("model.n_layer", 4),
        ("n_tokens", -3),
        ("prefill.norm_ratio.0", [0.5, 0.5, 0.5]),
        ("prefill.norm_ratio.0.0", None),
        ("prefill.norm_ratio.0.0", 10**400),
        *(("vectors.file", name) for name in ("../p.bin", "/etc/passwd", "..", "", "a\0b", "a" * 999, None)),
        *(("maps.up.rows", rows) for rows in ([], [0] * 7, [9, *MAPPED[1:]], [-1, *MAPPED[1:]], MAPPED[::-1], None)),
        *((f"maps.down.shape.{axis}", n) for axis in range(4) for n in (10**6, 2**24, 10**30, 0, -1, True)),
        ("maps.down.shape", [1 << 24] * 4),
    ],
)
def test_a_malformed_file_is_refused(path: Path, at: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaskip_cpp.model.stored.MOST_MEMORY", 1 << 20)  # of 4 GiB, up to which memory is taken
    change(path, at, value)
    said = refused(path)
    assert at != "vectors.file" or "is not the name of a file beside it" in said or "`$.file`" in said


@pytest.mark.parametrize("more", [-1, 1, -(10**6)])
def test_vectors_of_another_length_are_refused(path: Path, more: int) -> None:
    content = path.with_suffix(".bin").read_bytes()
    rewrite(path, content[:more] if more < 0 else content + bytes(more))
    assert "the file of its vectors" in refused(path)


@pytest.mark.parametrize("at", [0, 4 * 3 * 2 * 5, -2], ids=["a mean", "a map's down", "a map's up"])
@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_vectors_with_impossible_values_are_refused(path: Path, at: int, value: float) -> None:
    halves = np.fromfile(path.with_suffix(".bin"), "<u2")
    halves[[at, at + 1]] = np.float32([value]).view("<u2")[1]  # of a float32 the upper half is the sign and exponent
    rewrite(path, halves.tobytes())
    assert "values that calibration cannot give" in refused(path)


def test_arrays_that_share_numbers_are_not_read_without_end(path: Path) -> None:
    down = json.loads(path.read_text())["maps"]["down"]
    shared = {**down, "shape": [1 << 14, 3, 1 << 14, 1], "rows": []}
    change(path, "maps", {"down": shared, "up": shared})
    assert "larger model than any" in refused(path)


@pytest.mark.skipif(not os.path.isabs(os.devnull), reason="devices are no files here")
def test_a_device_is_refused(path: Path) -> None:
    path.with_suffix(".bin").unlink()
    symlink(path.with_suffix(".bin"), Path(os.devnull))
    assert "not a regular file" in refused(path)


def test_a_json_file_longer_than_any_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaskip_cpp.model.stored.MOST_JSON", 1000)
    assert "has more than 1,000 bytes" in refused(path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, bytes]:
    """A profile with all that one can have, and the bytes of its two files."""
    path = tmp_path_factory.mktemp("fuzzed") / "p.json"
    EVERYTHING.save(path)
    return path, path.read_bytes(), path.with_suffix(".bin").read_bytes()


CHANGES = st.lists(st.tuples(st.integers(0, 1 << 16), st.binary(min_size=1, max_size=4)), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(of_vectors=st.booleans(), changes=CHANGES, cut=st.none() | st.integers(0, 1 << 16), known=st.booleans())
def test_damaged_files_end_in_our_errors_or_not_at_all(
    saved: tuple[Path, bytes, bytes], of_vectors: bool, changes: list[Any], cut: int | None, known: bool
) -> None:
    path, text, binary = saved
    content = bytearray(binary if of_vectors else text)
    for at, part in changes:
        at %= len(content)
        content[at : at + len(part)] = part
    content = content[:cut]
    if of_vectors and known:  # whoever makes such a file knows how to hash it
        digests = (hashlib.sha256(each).hexdigest().encode() for each in (binary, content))
        text = text.replace(*digests)
    path.write_bytes(text if of_vectors else content)
    path.with_suffix(".bin").write_bytes(content if of_vectors else binary)
    try:
        Profile.load(path)
    except ProfileError as error:
        assert "calibrate" in str(error)  # again, or if it begins like a GGUF file, instead of naming the model
