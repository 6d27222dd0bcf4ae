"""adaskip_cpp.model.identity: which model a file is."""

import time
from pathlib import Path

import pytest

from adaskip_cpp.errors import ModelFileError
from adaskip_cpp.model.identity import ModelInfo, check_gguf, fingerprint

MIB = 1 << 20


def sparse(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def poke(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"x")


def test_equal_files_have_equal_fingerprints(tmp_path: Path) -> None:
    a, b = tmp_path / "a.gguf", tmp_path / "b.gguf"
    for path in (a, b):
        path.write_bytes(b"GGUF" + bytes(range(256)))
    assert fingerprint(a) == fingerprint(str(b))
    assert len(fingerprint(a)) == 64


@pytest.mark.parametrize("offset", [0, 300, 3 * MIB, 6 * MIB - 1])
def test_every_byte_of_a_small_file_counts(tmp_path: Path, offset: int) -> None:
    path = sparse(tmp_path / "m.gguf", 6 * MIB)
    before = fingerprint(path)
    poke(path, offset)
    assert fingerprint(path) != before


@pytest.mark.parametrize("offset", [0, MIB - 1, 63 * MIB, 64 * MIB - 1])
def test_the_first_and_last_mib_of_a_large_file_count(tmp_path: Path, offset: int) -> None:
    path = sparse(tmp_path / "m.gguf", 64 * MIB)
    before = fingerprint(path)
    poke(path, offset)
    assert fingerprint(path) != before


def test_the_size_counts(tmp_path: Path) -> None:
    path = sparse(tmp_path / "m.gguf", 64 * MIB)
    before = fingerprint(path)
    assert fingerprint(sparse(path, 64 * MIB + 1)) != before


def test_a_change_of_a_hundredth_of_a_large_file_is_seen_wherever_it_is(tmp_path: Path) -> None:
    path = sparse(tmp_path / "m.gguf", 64 * MIB)
    before = fingerprint(path)
    block = MIB  # 1/64 of the file
    for start in range(0, 64 * MIB, 8 * MIB):
        with path.open("r+b") as file:
            file.seek(start)
            file.write(b"x" * block)
        assert fingerprint(path) != before
        with path.open("r+b") as file:
            file.seek(start)
            file.write(bytes(block))
    assert fingerprint(path) == before


def test_a_huge_file_takes_milliseconds(tmp_path: Path) -> None:
    path = sparse(tmp_path / "m.gguf", 40 << 30)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        fingerprint(path)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"nope\.gguf.*check the path"):
        fingerprint(tmp_path / "nope.gguf")


def test_check_gguf_tells_what_a_file_is_not(tmp_path: Path) -> None:
    text = tmp_path / "text.gguf"
    text.write_text("hello")
    empty = tmp_path / "empty.gguf"
    empty.touch()
    for path, words in (
        (text, "not a GGUF"),
        (empty, "not a GGUF"),
        (tmp_path, "folder"),
        (tmp_path / "x", "no model"),
    ):
        with pytest.raises(ModelFileError, match=words):
            check_gguf(path)
    text.write_bytes(b"GGUF\x03\x00\x00\x00")
    check_gguf(text)


def test_model_info_survives_json() -> None:
    info = ModelInfo("ab" * 32, "llama", 30)
    assert ModelInfo.from_dict(info.to_dict()) == info
    with pytest.raises(ValueError, match="n_layer"):
        ModelInfo.from_dict({**info.to_dict(), "n_layer": "30"})
