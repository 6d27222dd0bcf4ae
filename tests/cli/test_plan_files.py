"""Plan files on the command line: the one beside a model, one that is named, and one that ``plan`` writes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result
from oracles.command_line import line, run

from adaskip_cpp import Profile, SkipPlan
from adaskip_cpp.model.identity import ModelInfo, fingerprint, plan_path
from adaskip_cpp.model.plan_file import load_plan, save_plan

Generate = Callable[..., Result]


@pytest.fixture
def plan(model: Path) -> SkipPlan:
    """A plan for that model."""
    return replace(SkipPlan.manual(3, attention=[2], ffn=[0, 1]), model=ModelInfo(fingerprint(model), "llama", 3))


@pytest.fixture
def generate(model: Path) -> Generate:
    """``generate(...)``: the verb on that model, with a short answer."""
    words = ["generate", model, "-p", "the end", "--raw", "--ctx", 64, "--max-tokens", 4, "--temp", 0]
    return lambda *args, code=0: run(*words, *args, code=code)


def said(result: Result) -> str:
    return " ".join(result.stderr.split())


def test_generate_uses_the_plan_beside_the_model_and_says_so(
    generate: Generate, plan: SkipPlan, model: Path, tmp_path: Path
) -> None:
    whole = generate()
    assert "skipped" not in whole.stderr
    save_plan(plan_path(model), plan)
    save_plan(tmp_path / "other.json", plan)
    tuned = generate()
    assert "3 of 6 sublayers skipped (m.adaskip-plan.json). --full runs" in said(tuned)
    named = generate("--plan", tmp_path / "other.json")
    assert named.stdout == tuned.stdout and "--full runs" not in said(named)
    full = generate("--full")
    assert full.stdout == whole.stdout and "skipped" not in full.stderr
    generate("--full", "--plan", plan_path(model), code=2)


def test_a_plan_of_another_model_is_told_and_not_used_and_refused_where_it_is_named(
    generate: Generate, plan: SkipPlan, model: Path
) -> None:
    whole = generate()
    save_plan(plan_path(model), replace(plan, model=ModelInfo("ab" * 32, "llama", 3)))
    result = generate()
    assert result.stdout == whole.stdout
    assert "The whole model runs" in result.stderr and "another model" in said(result)
    assert "another model" in line(generate("--plan", plan_path(model), code=1))


def test_plan_writes_a_plan_that_generate_takes(generate: Generate, profile_path: Path, tmp_path: Path) -> None:
    for mode, where in (("prompt", "the bulk of a prompt"), ("prefill", "prefill")):
        written = run("plan", profile_path, "--skip", 2, "--mode", mode, "-o", tmp_path / "two.json")
        assert "two.json" in written.stdout
        assert load_plan(tmp_path / "two.json").plan == Profile.load(profile_path).plan(2, mode=mode)
        assert f"skipped: 2 of 6 sublayers in {where}" in said(generate("--plan", tmp_path / "two.json"))
