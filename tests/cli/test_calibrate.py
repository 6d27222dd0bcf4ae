"""``adaskip-cpp calibrate``: a profile that the other verbs take."""

from pathlib import Path
from typing import Any

from oracles.command_line import run
from oracles.tiny_families import N_EMBD

from adaskip_cpp import Profile


def test_calibrate_writes_a_profile_that_generate_takes(tiny: Any, tmp_path: Path) -> None:
    output, data = tmp_path / "out.json", tmp_path / "text.txt"
    data.write_text("the quick brown fox " * 40)
    args = ["calibrate", tiny(), "--data", data, "--requests", 4, "--tokens", 20, "-o", output]
    args += ["--decode-tokens", 5, "--no-cost"]
    result = run(*args)
    assert "4 requests: 80 tokens of text.txt" in result.stdout
    assert "20 tokens were decoded" in result.stdout
    assert str(output) in result.stdout and str(output.with_suffix(".bin")) in result.stdout
    profile = Profile.load(output)
    assert (profile.n_requests, profile.n_tokens, profile.corpus) == (4, 80, "text.txt")
    assert (profile.decode.n_tokens, profile.prefill.mean_u.shape[2], profile.cost) == (20, N_EMBD, None)

    result = run("generate", tiny(), "-p", "hello", "--profile", output, "--skip", 2, "--max-tokens", 5)
    assert "skipped: 2 of 6 sublayers in the bulk of a prompt" in result.stderr
    assert "0 of 6 in decode" in result.stderr
    assert "tokens/s" in result.stderr and "tokens/s" not in result.stdout
