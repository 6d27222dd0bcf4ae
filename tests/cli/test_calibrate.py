"""``adaskip-cpp calibrate``: a profile that the other verbs take."""

from pathlib import Path
from typing import Any

import pytest
from oracles.command_line import run
from oracles.tiny_families import N_EMBD

from adaskip_cpp import Profile


def test_calibrate_writes_a_profile_that_plan_takes(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaskip_cpp.cli.calibrate._CTX_TIMED", 512)
    output, data = tmp_path / "out.json", tmp_path / "text.txt"
    data.write_text("the quick brown fox " * 40)
    args = ["calibrate", tiny(), "--data", data, "--requests", 4, "--tokens", 20, "-o", output]
    args += ["--decode-tokens", 5, "--threads", 1, "--flash-attn"]
    result = run(*args)
    assert "4 requests: 80 tokens of text.txt" in result.stdout
    assert "20 tokens were decoded" in result.stdout
    assert str(output) in result.stdout and str(output.with_suffix(".bin")) in result.stdout
    profile = Profile.load(output)
    assert (profile.n_requests, profile.n_tokens, profile.corpus) == (4, 80, "text.txt")
    assert (profile.decode.n_tokens, profile.prefill.mean_u.shape[2]) == (20, N_EMBD)
    assert profile.cost is not None
    assert profile.cost.settings.n_threads == 1 and profile.cost.settings.flash_attention

    run("plan", output, "--skip", 2, "-o", tmp_path / "plan.json")
    result = run("generate", tiny(), "-p", "hello", "--plan", tmp_path / "plan.json", "--max-tokens", 5)
    assert "skipped: 2 of 6 sublayers in the bulk of a prompt" in result.stderr
    assert "0 of 6 in decode" in result.stderr
    assert "tokens/s" in result.stderr and "tokens/s" not in result.stdout
