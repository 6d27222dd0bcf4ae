"""Where the times of a profile come from: told wherever a speed-up is predicted from them, and measured again."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from oracles.command_line import fails, run
from oracles.costs import SETTINGS, cost_model
from oracles.fixtures import Open, Tiny
from oracles.profiles import tiny_profile

from adaskip_cpp import Profile
from adaskip_cpp.engine.settings import cost_settings


@pytest.fixture
def elsewhere(tiny: Tiny, tmp_path: Path) -> Path:
    """A profile of the tiny llama with times of SETTINGS, which no machine of ours has."""
    path = tmp_path / "p.json"
    tiny_profile(tiny(), cost=cost_model(0.1, [0.2] * 3, [0.1] * 3)).save(path)
    return path


def test_what_differs_is_told_and_nothing_else() -> None:
    assert SETTINGS.note(SETTINGS) == ""
    note = SETTINGS.note(replace(SETTINGS, n_threads=8, devices=("CPU", "a GPU"), flash_attention=False))
    assert "(devices CPU, here CPU, a GPU; n_threads 2, here 8; flash_attention True, here False)" in note
    assert "calibrate MODEL --cost-only" in note and "\n" not in note


def test_the_settings_are_those_that_the_model_was_opened_with(tiny: Tiny, open_model: Open) -> None:
    llm = open_model(tiny(), n_threads=1, n_threads_batch=2, n_batch=64, n_ubatch=32, swa_full=True)
    found = cost_settings(llm)
    assert (found.n_threads, found.n_threads_batch, found.n_batch, found.n_ubatch) == (1, 2, 64, 32)
    assert (found.type_k, found.type_v, found.swa_full, found.repack) == ("F32", "F32", True, True)
    assert not cost_settings(open_model(tiny(), repack=False)).repack


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells the processor's name on Linux only")
def test_the_processor_is_named_as_the_kernel_names_it(tiny: Tiny, open_model: Open) -> None:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    assert cost_settings(open_model(tiny())).cpu in (names or {"CPU"})


def test_what_predicts_a_speed_tells_where_its_times_were_measured(tiny: Tiny, elsewhere: Path) -> None:
    text = " ".join(run("plan", elsewhere, "--speedup", 1.25).stdout.split())
    assert "times of a CPU, 2 and 4 threads, batches of 512, ubatches of 512, KV in F16 and Q8_0, flash" in text
    args = ["generate", tiny(), "-p", "hello", "--max-tokens", 2, "--profile", elsewhere]
    told = run(*args, "--speedup", 1.25)
    assert "measured elsewhere (cpu a CPU, here" in told.stderr and "measured elsewhere" not in told.stdout
    assert "measured elsewhere" not in run(*args, "--skip", 2).stderr, "nothing is predicted"


def test_times_are_measured_again_and_all_else_is_kept(
    tiny: Tiny, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Profile.load(elsewhere)
    monkeypatch.setattr("adaskip_cpp.cli.calibrate._CTX_TIMED", 512)
    run("calibrate", tiny(), "--cost-only", "--threads", 1, "--flash-attn", "-o", elsewhere)
    after = Profile.load(elsewhere)
    assert after.cost is not None and after.cost != before.cost
    assert after.cost.settings.n_threads == 1 and after.cost.settings.flash_attention
    assert replace(after, cost=before.cost) == before
    args = ["generate", tiny(), "-p", "hello", "--max-tokens", 2, "--profile", elsewhere, "--speedup", 1.01,
            "--threads", 1, "--ctx", 512]  # fmt: skip
    told = run(*args, "--flash-attn")
    assert "measured elsewhere" not in told.stderr
    assert "measured elsewhere (flash" in run(*args).stderr


def test_times_are_measured_for_a_profile_of_the_same_model_only(tiny: Tiny, elsewhere: Path) -> None:
    content = elsewhere.read_bytes()
    assert "another model" in fails("calibrate", tiny(seed=1), "--cost-only", "-o", elsewhere)
    nowhere = elsewhere.with_name("nope.json")
    assert "there is no profile" in fails("calibrate", tiny(), "--cost-only", "-o", nowhere)
    assert "measures times alone" in fails("calibrate", tiny(), "--cost-only", "--no-cost", "-o", elsewhere, code=2)
    assert elsewhere.read_bytes() == content
