"""adaskip_cpp.model.identity: which model a file is."""

import io
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from oracles.fixtures import Open
from oracles.tiny_families import tokens
from oracles.tiny_models import write_lora, write_model

from adaskip_cpp import SkipPlan
from adaskip_cpp.errors import ModelFileError, ProfileMismatchError, StateError
from adaskip_cpp.model import identity
from adaskip_cpp.model.identity import check_gguf, fingerprint

MIB = 1 << 20


def sparse(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def poke(path: Path, offset: int, content: bytes = b"x") -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


@pytest.mark.parametrize(
    ("size", "offsets"), [(6, (0, 300, 3 * MIB, 6 * MIB - 1)), (64, (0, MIB - 1, 63 * MIB, 64 * MIB - 1))]
)
def test_every_byte_of_a_small_file_counts_and_the_first_and_last_mib_of_a_large_one(
    tmp_path: Path, size: int, offsets: tuple[int, ...]
) -> None:
    seen = {fingerprint(sparse(tmp_path / "m.gguf", each)) for each in (size * MIB, size * MIB + 1)}
    for offset in offsets:
        path = sparse(tmp_path / "m.gguf", size * MIB)
        poke(path, offset)
        seen.add(fingerprint(path))
    assert len(seen) == len(offsets) + 2, "and the size"


def test_a_change_of_a_hundredth_of_a_large_file_is_seen_wherever_it_is(tmp_path: Path) -> None:
    path = sparse(tmp_path / "m.gguf", 64 * MIB)
    before = fingerprint(path)
    for start in range(0, 64 * MIB, 8 * MIB):
        poke(path, start, b"x" * MIB)  # 1/64 of the file
        assert fingerprint(path) != before
        poke(path, start, bytes(MIB))
    assert fingerprint(path) == before


def test_of_a_huge_file_six_mib_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sparse(tmp_path / "m.gguf", 40 << 30)
    n_read = []

    class Counted(io.FileIO):
        def read(self, size: int | None = -1) -> Any:
            n_read.append(size)
            return super().read(size)

    monkeypatch.setattr(identity, "open", lambda name, mode: Counted(name), raising=False)
    fingerprint(path)
    assert sum(n_read) == 6 * MIB


def test_check_gguf_tells_what_a_file_is_not(tmp_path: Path) -> None:
    text, empty = tmp_path / "text.gguf", tmp_path / "empty.gguf"
    text.write_text("hello")
    empty.touch()
    for path, words in (
        (text, "not a GGUF"),
        (empty, "not a GGUF"),
        (tmp_path, "folder"),
        (tmp_path / "x", "no model"),
    ):
        with pytest.raises(ModelFileError, match=words):
            check_gguf(path)


@pytest.fixture
def split(tmp_path: Path) -> list[Path]:
    first = write_model(tmp_path / "m.gguf", split=10)
    files = sorted(tmp_path.glob("m-*.gguf"))
    assert files[0] == first and len(files) > 2
    return files


def test_every_file_of_a_model_in_several_counts(split: list[Path]) -> None:
    seen = {fingerprint(split[0])}
    for file in split:
        poke(file, file.stat().st_size - 1)
        seen.add(fingerprint(split[0]))
    assert len(seen) == 1 + len(split)


def test_a_file_of_a_model_in_several_that_is_missing_or_none_is_named(split: list[Path]) -> None:
    split[1].write_bytes(b"no model at all")
    with pytest.raises(ModelFileError, match=r"m-00002-of-.*is not a GGUF file"):
        check_gguf(split[0])
    split[1].unlink()
    for function in (check_gguf, fingerprint):
        with pytest.raises(ModelFileError, match=r"m-00002-of-.*check the path"):
            function(split[0])


@pytest.mark.parametrize("name", ["m-00001-of-00000.gguf", "m-00004-of-00003.gguf", "m-00000-of-00003.gguf"])
def test_a_number_that_is_none_of_a_model_in_several_is_a_part_of_the_name(name: str, tmp_path: Path) -> None:
    path, other = tmp_path / name, tmp_path / "other.gguf"
    with pytest.raises(ModelFileError, match=f"{name}.*check the path"):
        check_gguf(path)
    for each in (path, other):
        each.write_bytes(b"GGUF" + bytes(99))
    check_gguf(path)
    assert fingerprint(path) == fingerprint(str(other)) and len(fingerprint(path)) == 64


def test_a_plan_fits_only_the_adapter_scale_and_overrides_that_it_was_made_with(
    tmp_path: Path, open_tiny: Open
) -> None:
    lora, other = (str(write_lora(tmp_path / f"{seed}.gguf", seed=seed)) for seed in (0, 1))
    epsilon = "llama.attention.layer_norm_rms_epsilon"
    ways: list[dict[str, Any]] = [
        {},
        *({"lora_path": path, "lora_scale": scale} for path, scale in ((lora, 1.0), (lora, 0.5), (other, 1.0))),
        *({"kv_overrides": each} for each in ({epsilon: 1e-3}, {epsilon: 1e-2, "general.name": "x"})),
    ]
    models = [open_tiny(**way) for way in ways]
    said = {}
    for (i, made_for), (j, llm) in itertools.product(enumerate(models), repeat=2):
        plan = replace(SkipPlan.manual(3, ffn=[1]), model=made_for.model_info)
        if i == j:
            llm.set_plan(plan)
        else:
            with pytest.raises(ProfileMismatchError, match=r"is .*, here it is .*; calibrate") as caught:
                llm.set_plan(plan)
            said[i, j] = str(caught.value)
    assert f"its LoRA adapter is none, here it is {fingerprint(lora)[:12]} at scale 0.5;" in said[0, 2]
    assert f"its kv_overrides is {epsilon}=0.001, here it is general.name='x', {epsilon}=0.01;" in said[4, 5]


def test_a_saved_state_fits_only_the_adapter_that_it_was_computed_with(tmp_path: Path, open_tiny: Open) -> None:
    plain, adapted = open_tiny(), open_tiny(lora_path=str(write_lora(tmp_path / "lora.gguf")))
    adapted.eval(tokens(8))
    with pytest.raises(StateError, match="LoRA adapter"):
        plain.load_state(adapted.save_state())
