"""``adaskip-cpp generate``: on a tiny model what it prints, with a profile and with a frontier."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles.command_line import fails, run
from oracles.costs import cost_model
from oracles.frontiers import quality

from adaskip_cpp import AdaSkipLlama, Profile, SkipPlan
from adaskip_cpp.engine.generation import Generation, Timing
from adaskip_cpp.measuring import running
from adaskip_cpp.model.edits import FEW, Edits
from adaskip_cpp.model.frontier import EditPoint
from adaskip_cpp.model.identity import plan_path
from adaskip_cpp.model.plan_file import load_plan, save_plan
from adaskip_cpp.model.quality import Passkeys


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of each model that is opened."""
    found, init = [], AdaSkipLlama.__init__

    def spy(self: AdaSkipLlama, *args: Any, **options: Any) -> None:
        found.append(options)
        init(self, *args, **options)

    monkeypatch.setattr(AdaSkipLlama, "__init__", spy)
    return found


def test_text_may_come_from_stdin(tiny: Any, tmp_path: Path) -> None:
    result = run("generate", tiny(), "-f", "-", "--max-tokens", 3, stdin="hello")
    assert "prompt:" in result.stderr
    args = ["calibrate", tiny(), "--data", "-", "--tokens", 8, "--requests", 1, "--no-cost", "-o", tmp_path / "p.json"]
    run(*args, stdin="hello world, hello")


def test_the_same_seed_gives_the_same_text(tiny: Any) -> None:
    texts = [run("generate", tiny(), "-p", "hello", "--max-tokens", 20, "--seed", seed).stdout for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_generate_allocates_no_kv_for_attentions_that_never_run(tiny: Any, tmp_path: Path) -> None:
    def told(**chosen: Any) -> str:
        save_plan(tmp_path / "plan.json", SkipPlan.manual(3, **chosen))
        args = ["generate", tiny(), "-p", "hello", "--max-tokens", 2, "--ctx", 256]
        return run(*args, "--plan", tmp_path / "plan.json").stderr

    # f16 K and V of 2 heads of 16 for 256 positions: 32,768 bytes a layer.
    assert "KV:      33 kB, none for 2 of 3 layers" in told(attention=[0, 2])
    assert "KV:      98 kB\n" in told(attention=[0, 2], phase="decode")
    assert "KV:      98 kB\n" in told(ffn=[0])
    assert "KV:      98 kB\n" in told(attention=[0, 2], phase="bulk"), "the bulk keeps its K and V"


def test_generate_tells_what_each_phase_skipped(tiny: Any, profile_path: Path) -> None:
    args = ["generate", tiny(), "-p", "hello", "--max-tokens", 8, "--profile", profile_path, "--raw"]
    decode_only = run(*args, "--mode", "decode", "--skip", 1).stderr
    assert "skipped: 0 of 6 sublayers in prefill" in decode_only
    assert "1 of 6 in decode (0 attention, 1 FFN)" in decode_only
    assert "of 20 tokens observed" in run(*args, "--skip", 1, "--mode", "e2e").stderr


# Decoding a token, an attention takes 2 ms, an FFN 1 ms, the rest 1 ms, so that 3 layers take 10 ms.
COST = cost_model(0.1, [0.2] * 3, [0.1] * 3)


def test_a_speedup_for_a_prompt_loads_the_weights_once(tiny: Any, profile_path: Path, opened: list[Any]) -> None:
    replace(Profile.load(profile_path), cost=COST).save(profile_path)
    args = ("-p", "hello", "--profile", profile_path, "--speedup", 1.25, "--max-tokens", 2, "--mode", "e2e")
    result = run("generate", tiny(), *args)
    assert [options.get("vocab_only", False) for options in opened] == [True, False]
    again = run("generate", tiny(), *args[:-2])
    assert "in the bulk of a prompt" in again.stderr, "a short prompt is no error"
    # By hand: attention 2 saves 2 of 10 ms.
    assert "skipped: 1 of 6 sublayers in prefill" in result.stderr and "none for 1 of 3 layers" in result.stderr


def test_generate_tells_what_the_first_token_would_have_taken_without_skipping(
    tiny: Any, profile_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timing = Timing(n_prompt=66, n_evaluated=66, n_generated=2, first_token_s=3.0, decode_s=0.1, is_cut=False)
    monkeypatch.setattr(Generation, "timing", property(lambda self: timing, lambda self, value: None), raising=False)
    cost = cost_model(0, [1] * 3, [1] * 3, size=64, kept=[0.5] * 3)
    lost = np.ones((3, 2))
    lost[:2, 1] = 0.0  # FFN 0 and 1, and attention 2, whose output no K or V in the bulk depends on
    replace(Profile.load(profile_path), cost=cost, divergence=lost, copying=lost).save(profile_path)
    args = ["generate", tiny(), "-p", "hello", "--profile", profile_path, "--skip", 3, "--head", 1, "--tail", 1]
    told = run(*args, "--max-tokens", 2).stderr
    # By hand, of 64 tokens without outputs: two layers and the last one's K and V take 4.5 s, without two FFNs 2.5. The
    # plan cuts 1 + 64 + 1 tokens, the whole model 64 + 2, of which the two lie between 0.06 s for one and 5.01 for 64.
    whole, bulk = 4.5 + 0.06 + (5.01 - 0.06) / 63, 0.04 + 2.5 + 0.06
    assert f"first token after 3.00 s; predicted without the plan: {3.0 * whole / bulk:.2f} s\n" in told
    told = run("generate", tiny(), "-p", "hello", "--max-tokens", 2).stderr
    assert "first token after 3.00 s\n" in told


LONG = "the of to in " * 20


@pytest.mark.parametrize(
    ("prompt", "options", "n_skip"),
    [(LONG, (), 2), (LONG, ("--max-loss", 0.02), 1), (LONG, ("--max-loss", 0), 0), ("the", (), 0)],
)
def test_generate_skips_what_keeps_the_promise(
    prompt: str, options: tuple[object, ...], n_skip: int, tuned_model: Path
) -> None:
    result = run("generate", tuned_model, "-p", prompt, "--max-tokens", 2, *options)
    assert f"Plans lose at most {options[-1] if options else 0.05:g} nats per token" in result.stderr
    assert ("skipped:" in result.stderr) is (n_skip > 0)
    assert not n_skip or f"skipped: {n_skip} of 6 sublayers in the bulk of a prompt" in result.stderr


def test_edits_take_no_part_of_the_promise_of_one_prompt(tuned_model: Path) -> None:
    found = load_plan(plan_path(tuned_model)).frontier
    assert found is not None
    edits = EditPoint(2048, *[quality(0.02)] * 3, Passkeys(2, 2, 2), (), Edits(most_moves=FEW))
    save_plan(plan_path(tuned_model), replace(found, edits=(edits,)))
    result = run("generate", tuned_model, "-p", LONG, "--max-tokens", 2)
    assert "skipped: 2 of 6 sublayers in the bulk of a prompt" in result.stderr


def test_generate_takes_a_frontier_from_elsewhere(tuned_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    save_plan(other, load_plan(plan_path(tuned_model)).frontier)
    os.remove(plan_path(tuned_model))
    result = run("generate", tuned_model, "-p", LONG, "--max-tokens", 2, "--plan", other, "--max-loss", 0.02)
    assert "skipped: 1 of 6" in result.stderr


def test_a_promise_that_cannot_choose_is_a_usage_error(tuned_model: Path, tmp_path: Path) -> None:
    """Beside what else to skip, without what tune found, or because it is no loss."""
    save_plan(tmp_path / "one.json", SkipPlan.manual(3, ffn=[1]))
    promise = ("generate", tuned_model, "-p", "the", "--max-loss")
    for args, message in (
        ((0.1, "--full"), "--max-loss chooses a plan that `tune` found"),
        ((0.1, "--skip", 1), "--max-loss chooses a plan that `tune` found"),
        ((0.1, "--plan", tmp_path / "one.json"), "has one plan, so leave it out"),
        ((-0.1,), "--max-loss"),
        (("much",), "--max-loss"),
    ):
        assert message in fails(*promise, *args, code=2)
    os.remove(plan_path(tuned_model))
    assert f"run `adaskip-cpp tune {tuned_model}`" in fails(*promise, 0.1, code=2)


def test_settings_that_were_found_here_are_used_and_options_win(
    tuned_model: Path, opened: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for here, options, flash_attn in ((True, (), True), (True, ("--no-flash-attn",), False), (False, (), None)):
        monkeypatch.setattr(running, "is_here", lambda machine, here=here: here)
        run("generate", tuned_model, "-p", "the", "--max-tokens", 1, *options)
        assert opened[-1].get("flash_attn") is flash_attn
