"""``adaskip-cpp generate``: on a tiny model, what it prints and which plan it uses."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from oracles.command_line import fails, line, run
from oracles.frontiers import quality

from adaskip_cpp import AdaSkipLlama, Profile, SkipPlan
from adaskip_cpp.measuring import running
from adaskip_cpp.model.edits import FEW, Edits
from adaskip_cpp.model.frontier import EditPoint
from adaskip_cpp.model.identity import ModelInfo, fingerprint, plan_path
from adaskip_cpp.model.plan_file import load_plan, save_plan
from adaskip_cpp.model.quality import Passkeys

Generate = Callable[..., Result]


@pytest.fixture
def plan(model: Path) -> SkipPlan:
    """A plan for that model."""
    return replace(SkipPlan.manual(3, attention=[2], ffn=[0, 1]), model=ModelInfo(fingerprint(model), "llama", 3))


@pytest.fixture
def generate(model: Path) -> Generate:
    """``generate(...)``: the verb on that model, with a short answer."""
    words = ["generate", model, "-p", "the end", "--raw", "--ctx", 256, "--max-tokens", 4, "--temp", 0]
    return lambda *args, code=0: run(*words, *args, code=code)


def said(result: Result) -> str:
    return " ".join(result.stderr.split())


def test_the_same_seed_gives_the_same_text_also_from_stdin_and_figures_go_to_stderr(tiny: Any) -> None:
    words = ("generate", tiny(), "--max-tokens", 20)
    first, again, other = (run(*words, "-p", "hello", "--seed", seed) for seed in (1, 1, 2))
    piped = run(*words, "-f", "-", "--seed", 1, stdin="hello")
    assert first.stdout == again.stdout == piped.stdout != other.stdout
    assert "prompt:" in first.stderr and "tokens/s" in first.stderr and "tokens/s" not in first.stdout


def test_it_uses_the_plan_beside_the_model_and_says_so(
    generate: Generate, plan: SkipPlan, model: Path, tmp_path: Path
) -> None:
    whole = generate()
    # f16 K and V of 2 heads of 16 for 256 positions: 32,768 bytes a layer.
    assert "skipped" not in whole.stderr and "KV:      98 kB\n" in whole.stderr
    save_plan(plan_path(model), plan)
    save_plan(tmp_path / "other.json", plan)
    tuned = generate()
    assert "3 of 6 sublayers skipped (m.adaskip-plan.json). --full runs" in said(tuned)
    assert "KV:      66 kB, none for 1 of 3 layers\n" in tuned.stderr
    named = generate("--plan", tmp_path / "other.json")
    assert named.stdout == tuned.stdout and "--full runs" not in said(named)
    full = generate("--full")
    assert full.stdout == whole.stdout and "skipped" not in full.stderr
    save_plan(plan_path(model), replace(plan, model=ModelInfo("ab" * 32, "llama", 3)))
    other = generate()
    assert other.stdout == whole.stdout and "The whole model runs" in other.stderr and "another model" in said(other)
    assert "another model" in line(generate("--plan", plan_path(model), code=1))


def test_it_takes_what_plan_writes_and_tells_what_each_phase_skipped(
    generate: Generate, profile_path: Path, tmp_path: Path
) -> None:
    for mode, words in (
        ("prompt", "skipped: 2 of 6 sublayers in the bulk of a prompt (1 attention, 1 FFN) 0 of 6 in decode"),
        ("prefill", "skipped: 2 of 6 sublayers in prefill (1 attention, 1 FFN) 2 of 6 in decode (1 attention, 1 FFN)"),
        ("decode", "skipped: 0 of 6 sublayers in prefill (0 attention, 0 FFN) 2 of 6 in decode (1 attention, 1 FFN)"),
    ):
        written = run("plan", profile_path, "--skip", 2, "--mode", mode, "-o", tmp_path / "two.json")
        assert "two.json" in written.stdout
        assert load_plan(tmp_path / "two.json").plan == Profile.load(profile_path).plan(2, mode=mode)
        result = generate("--plan", tmp_path / "two.json")
        assert words in said(result) and ("of 20 tokens observed" in result.stderr) == (mode == "decode")


def test_it_skips_what_keeps_the_promise_of_which_edits_take_no_part(tuned_model: Path, tmp_path: Path) -> None:
    beside, other = plan_path(tuned_model), tmp_path / "other.json"
    found = load_plan(beside).frontier
    assert found is not None
    lost = quality(0.02)
    edits = EditPoint(2048, lost, lost, lost, Passkeys(2, 2, 2), (), Edits(most_moves=FEW))
    save_plan(beside, replace(found, edits=(edits,)))
    words = ("generate", tuned_model, "-p", "the of to in " * 20, "--max-tokens", 2)
    for options, promise, n_skip in (((), 0.05, 2), (("--max-loss", 0.02), 0.02, 1), (("--max-loss", 0), 0, 0)):
        result = run(*words, *options)
        assert f"Plans lose at most {promise} nats per token" in result.stderr
        os.rename(beside, other)
        for each in (result, run(*words, *options, "--plan", other)):
            skips = f"{n_skip} of 6 sublayers in the bulk of a prompt"
            assert f"skipped: {skips if n_skip else 'nothing, no plan keeps the promise of 0'}" in each.stderr
        os.rename(other, beside)


def test_a_promise_that_cannot_choose_is_a_usage_error(tuned_model: Path, tmp_path: Path) -> None:
    """Beside --full, with one plan, because it is no loss, or without what tune found."""
    one = tmp_path / "one.json"
    save_plan(one, SkipPlan.manual(3, ffn=[1]))
    for args, message in (
        (("--max-loss", 0.1, "--full"), "leave out --plan and --max-loss, or --full"),
        (("--plan", one, "--full"), "leave out --plan and --max-loss, or --full"),
        (("--plan", one, "--max-loss", 0.1), "has one plan, so leave it out"),
        (("--max-loss", -0.1), "--max-loss"),
    ):
        assert message in fails("generate", tuned_model, "-p", "the", *args, code=2)
    os.remove(plan_path(tuned_model))
    missing = fails("generate", tuned_model, "-p", "the", "--max-loss", 0.1, code=2)
    assert f"run `adaskip-cpp tune {tuned_model}`" in missing


def test_settings_that_were_found_here_are_used_and_options_win(
    tuned_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, init = list[dict[str, Any]](), AdaSkipLlama.__init__

    def spy(self: AdaSkipLlama, *args: Any, **options: Any) -> None:
        opened.append(options)
        init(self, *args, **options)

    monkeypatch.setattr(AdaSkipLlama, "__init__", spy)
    for here, options, flash_attn in (
        (True, (), True),
        (True, ("--flash-attn", "prompts"), "prompts"),
        (False, (), None),
    ):
        monkeypatch.setattr(running, "is_here", lambda machine, here=here: here)
        run("generate", tuned_model, "-p", "the", "--max-tokens", 1, *options)
        assert opened[-1].get("flash_attn") == flash_attn
