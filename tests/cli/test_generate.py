"""``adaskip-cpp generate``: on a tiny model what it prints, with a plan and with a frontier."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from oracles.command_line import fails, run
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
    assert "No sublayer was timed" in run(*args, stdin="hello world, hello").stdout
    assert Profile.load(tmp_path / "p.json").cost is None


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


def test_generate_tells_what_each_phase_skipped(tiny: Any, profile_path: Path, tmp_path: Path) -> None:
    def told(mode: Any) -> str:
        save_plan(tmp_path / "plan.json", Profile.load(profile_path).plan(1, mode=mode))
        args = ["generate", tiny(), "-p", "hello", "--max-tokens", 8, "--raw"]
        return run(*args, "--plan", tmp_path / "plan.json").stderr

    decode_only = told("decode")
    assert "skipped: 0 of 6 sublayers in prefill" in decode_only
    assert "1 of 6 in decode (0 attention, 1 FFN)" in decode_only
    assert "of 20 tokens observed" in told("e2e")


LONG = "the of to in " * 20


def test_generate_tells_what_the_first_token_would_have_taken_without_skipping(
    tuned_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timing = Timing(n_prompt=66, n_evaluated=66, n_generated=2, first_token_s=3.0, decode_s=0.1, is_cut=False)
    monkeypatch.setattr(Generation, "timing", property(lambda self: timing, lambda self, value: None), raising=False)
    args = ("generate", tuned_model, "-p", LONG, "--max-tokens", 2)
    # The frontier predicts 2 * 1.2 times the speed for the shortest prompts.
    assert "first token after 3.00 s; predicted without the plan: 7.20 s\n" in run(*args).stderr
    assert "first token after 3.00 s\n" in run(*args, "--full").stderr


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
        ((0.1, "--full"), "leave out --plan and --max-loss, or --full"),
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
