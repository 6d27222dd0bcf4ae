"""adaskip_cpp.model.identity: which model a file is."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from oracles.fixtures import Open
from oracles.tiny_families import tokens
from oracles.tiny_models import write_lora, write_model

from adaskip_cpp import AdaSkipLlama, SkipPlan
from adaskip_cpp.errors import ModelFileError, ProfileMismatchError, StateError
from adaskip_cpp.model import identity
from adaskip_cpp.model.identity import check_gguf, fingerprint

MIB = 1 << 20


def sparse(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def poke(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"x")


@pytest.mark.parametrize(
    ("size", "offsets"), [(6, (0, 300, 3 * MIB, 6 * MIB - 1)), (64, (0, MIB - 1, 63 * MIB, 64 * MIB - 1))]
)
def test_every_byte_of_a_small_file_counts_and_the_first_and_last_mib_of_a_large_one(
    tmp_path: Path, size: int, offsets: tuple[int, ...]
) -> None:
    seen = set()
    for offset in (None, *offsets):
        path = sparse(tmp_path / "m.gguf", size * MIB)
        if offset is not None:
            poke(path, offset)
        seen.add(fingerprint(path))
    seen.add(fingerprint(sparse(path, size * MIB + 1)))
    assert len(seen) == len(offsets) + 2, "and the size"


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
    text.write_bytes(b"GGUF\x03\x00\x00\x00")
    check_gguf(text)


# --- models in several files, adapters, overrides ---------------------------------------------------------------------


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
    for function in (check_gguf, fingerprint):
        with pytest.raises(ModelFileError, match=f"{name}.*check the path"):
            function(path)
    for each in (path, other):
        each.write_bytes(b"GGUF" + bytes(99))
    check_gguf(path)
    assert fingerprint(path) == fingerprint(str(other)) and len(fingerprint(path)) == 64


def plan_of(llm: AdaSkipLlama) -> SkipPlan:
    return replace(SkipPlan.manual(3, ffn=[1]), model=llm.model_info)


def test_a_plan_does_not_fit_another_last_file(split: list[Path], open_model: Open) -> None:
    plan = plan_of(open_model(split[0]))
    open_model(split[0]).set_plan(plan)
    poke(split[-1], split[-1].stat().st_size - 1)
    with pytest.raises(ProfileMismatchError, match="another model"):
        open_model(split[0]).set_plan(plan)


def test_a_plan_fits_only_the_adapter_and_scale_that_it_was_made_with(tmp_path: Path, open_tiny: Open) -> None:
    lora, other = (str(write_lora(tmp_path / f"{seed}.gguf", seed=seed)) for seed in (0, 1))
    ways: list[dict[str, Any]] = [{}, {"lora_path": lora}, {"lora_path": lora, "lora_scale": 0.5}, {"lora_path": other}]
    models = [open_tiny(**way) for way in ways]
    for i, made_for in enumerate(models):
        for j, llm in enumerate(models):
            if i == j:
                llm.set_plan(plan_of(made_for))
            else:
                with pytest.raises(ProfileMismatchError, match=r"LoRA adapter is .*, here it is .*; calibrate"):
                    llm.set_plan(plan_of(made_for))
    with pytest.raises(ProfileMismatchError, match=rf"here it is {fingerprint(lora)[:12]} at scale 0\.5;"):
        models[2].set_plan(plan_of(models[0]))


def test_a_plan_fits_only_the_overrides_that_it_was_made_with(open_tiny: Open) -> None:
    epsilon = "llama.attention.layer_norm_rms_epsilon"
    plain, a, b = (
        open_tiny(kv_overrides=each) for each in (None, {epsilon: 1e-3}, {epsilon: 1e-2, "general.name": "x"})
    )
    with pytest.raises(ProfileMismatchError, match=rf"kv_overrides is none, here it is {epsilon}=0\.001;"):
        a.set_plan(plan_of(plain))
    with pytest.raises(ProfileMismatchError, match=r"epsilon=0\.001, here it is general\.name='x', llama\.attention"):
        b.set_plan(plan_of(a))
    with pytest.raises(ProfileMismatchError, match="kv_overrides"):
        plain.set_plan(plan_of(a))
    a.set_plan(plan_of(a))


def test_a_saved_state_fits_only_the_adapter_that_it_was_computed_with(tmp_path: Path, open_tiny: Open) -> None:
    plain, adapted = open_tiny(), open_tiny(lora_path=str(write_lora(tmp_path / "lora.gguf")))
    adapted.eval(tokens(8))
    with pytest.raises(StateError, match="LoRA adapter"):
        plain.load_state(adapted.save_state())
