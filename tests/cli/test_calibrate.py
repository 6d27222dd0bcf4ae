"""``adaskip-cpp calibrate``: a profile with its settings."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from oracles.command_line import fails, run
from oracles.fixtures import Open, Tiny
from oracles.tiny_families import N_EMBD

from adaskip_cpp import Profile
from adaskip_cpp.engine.settings import cost_settings, is_here
from adaskip_cpp.errors import FileError


def test_calibrate_writes_a_profile_that_plan_takes(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaskip_cpp.cli.calibrate._CTX_TIMED", 512)
    output, data = tmp_path / "out.json", tmp_path / "text.txt"
    data.write_text("the quick brown fox " * 40)
    args = ["calibrate", tiny(), "--data", data, "--requests", 4, "--tokens", 20, "-o", output]
    result = run(*args, "--decode-tokens", 5, "--threads", 1, "--flash-attn", "on")
    assert "4 requests: 80 tokens of text.txt" in result.stdout and "20 tokens were decoded" in result.stdout
    assert str(output) in result.stdout and str(output.with_suffix(".bin")) in result.stdout
    profile = Profile.load(output)
    assert (profile.n_requests, profile.n_tokens, profile.corpus) == (4, 80, "text.txt")
    assert (profile.decode.n_tokens, profile.prefill.mean_u.shape[2]) == (20, N_EMBD)
    assert profile.cost is not None and profile.cost.settings.flash_attention and profile.cost.settings.n_threads == 1
    assert "sublayers skipped in the bulk of a prompt" in " ".join(run("plan", output, "--skip", 2).stdout.split())


def test_text_may_come_from_stdin_and_sublayers_need_not_be_timed(tiny: Any, tmp_path: Path) -> None:
    args = ["calibrate", tiny(), "--data", "-", "--tokens", 8, "--requests", 1, "--no-cost", "-o", tmp_path / "p.json"]
    assert "No sublayer was timed" in run(*args, stdin="hello world, hello").stdout
    assert Profile.load(tmp_path / "p.json").cost is None


def test_the_settings_of_a_profile_are_those_that_the_model_was_opened_with(tiny: Tiny, open_model: Open) -> None:
    found = cost_settings(open_model(tiny(), n_threads=1, n_threads_batch=2, n_batch=64, n_ubatch=32, swa_full=True))
    assert (found.n_threads, found.n_threads_batch, found.n_batch, found.n_ubatch) == (1, 2, 64, 32)
    assert (found.type_k, found.type_v, found.swa_full, found.repack) == ("F32", "F32", True, True)
    assert is_here(found) and not is_here(replace(found, n_cores=found.n_cores + 1)), "threads are for as many cores"
    assert not cost_settings(open_model(tiny(), repack=False)).repack
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
        assert found.cpu in (names or {"CPU"}), "as the kernel names it"


def test_no_output_replaces_a_model_an_input_or_the_vectors_of_something_else(
    tiny: Any, profile_path: Path, tmp_path: Path
) -> None:
    model, text, other = tmp_path / "m.gguf", tmp_path / "text.txt", tmp_path / "other.bin"
    shutil.copy(tiny(), model)
    text.write_text("the quick brown fox " * 40)
    other.write_bytes(b"weights of another program")
    link = tmp_path / "link.json"
    link.symlink_to(model)
    before = {path: path.read_bytes() for path in (model, text, other, profile_path)}
    for args, words in (
        (("calibrate", model, "-o", model), "is an input, which would be replaced"),
        (("calibrate", tiny(), "--data", text, "-o", text), "is an input, which would be replaced"),
        (("calibrate", tiny(), "-o", model), "is a model, which would be replaced"),
        (("calibrate", tiny(), "-o", link), "is a model, which would be replaced"),
        (("calibrate", tiny(), "-o", tmp_path / "other.json"), "other.bin' would be replaced"),
        (("calibrate", tiny(), "-o", ""), "cannot write ''"),
        (("tune", model, "-o", model), "is an input, which would be replaced"),
        (("plan", profile_path, "--skip", 2, "-o", profile_path), "is an input, which would be replaced"),
        (("plan", profile_path, "--skip", 2, "-o", profile_path.with_suffix(".bin")), "is an input"),
    ):
        assert words in fails(*args)
    with pytest.raises(FileError, match="is a model, which would be replaced"):
        Profile.load(profile_path).save(model)
    assert before == {path: path.read_bytes() for path in before}
