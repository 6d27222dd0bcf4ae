"""The demo: on a tiny model what it prints, on the real one what it measures."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from oracles.command_line import run
from oracles.costs import cost_model
from oracles.tiny_models import add_chat_template

from adaskip_cpp import Profile, Running, SkipPlan, demo
from adaskip_cpp.measuring.running import open_quietly


@pytest.fixture
def short(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model, and a demo that is over in seconds on it, by whose word sublayers take alike."""
    monkeypatch.setenv("COLUMNS", "120")
    shorter = {"N_LENGTH": 600, "N_ANSWER": 8, "_N_READ": 96, "_N_JUDGED": 24, "_N_REQUESTS": 4, "_N_DECODE": 2}
    for name, value in {**shorter, "_MAX_ROUNDS": 1, "_KEY_LENGTH": 300, "SPEEDUP": 1.2}.items():
        monkeypatch.setattr(demo, name, value)
    costs = cost_model(0.1, [1] * 3, [1] * 3, size=64, kept=[0.1] * 3)
    monkeypatch.setattr(demo, "measure_cost", lambda llm, **options: costs)
    return add_chat_template(tiny(), tmp_path / "chat.gguf")


def measured(model: Path | str) -> tuple[demo.DemoResult, Profile, list[SkipPlan], list[float]]:
    """The demo's result, its profile, and for both modes plan and predicted speed-up."""
    seen: list[Any] = []
    result = demo.run(partial(open_quietly, model, running=Running(1)), on_plans=lambda *given: seen.extend(given))
    profile, (_, *others) = seen
    plans = [each.plan for each in others]
    return result, profile, plans, [profile.cost.speedup(each, result.n_prompt, "prefill") for each in plans]


def test_it_shows_what_was_learned_and_the_prompt_mode_beside_the_papers(short: Path) -> None:
    shown = run("demo", "--model", short).stdout
    assert "in 4 requests how much each of the 6 sublayers changes its input" in shown
    assert re.search(r"\d of 6 sublayers skipped in the bulk of a prompt", shown)
    assert re.search(r"For the same predicted speed, the paper's mode e2e skips \d\s+sublayers for all tokens", shown)
    assert re.search(r"whole model +prompt mode +the paper's mode", shown)
    assert shown.count(" x as fast") == 2
    assert re.search(r"loss on 96 tokens +\d+\.\d{3} nats +\d+\.\d{3} nats +\d+\.\d{3} nats", shown)
    assert len(re.findall(r"[012] of 2(?= )", shown.split("pass keys found")[1].splitlines()[0] + " ")) == 3
    assert all(f"answer, {name}" in " ".join(shown.split()) for name in ("whole model", "prompt mode"))


def test_both_modes_are_predicted_to_be_as_fast_as_is_asked_for(short: Path) -> None:
    _, _, plans, predicted = measured(short)
    assert demo.SPEEDUP <= predicted[0] <= predicted[1] < 2
    assert [(each.mode, each.compensation) for each in plans] == [("prompt", "linear"), ("e2e", "linear")]


def test_a_model_without_a_chat_template_is_refused_at_once(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "calibrate", lambda *args, **options: pytest.fail("it has begun to calibrate"))
    assert "no chat template" in run("demo", "--model", tiny(), code=1).stderr


def test_without_its_model_it_tells_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert 'pip install "adaskip-cpp[demo]"' in run("demo", code=1).stderr


@pytest.mark.model
@pytest.mark.slow
def test_it_finds_its_model_and_measures_all_sides(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert demo.packaged_model() == str(smollm2_path)
    shorter = {"N_LENGTH": 700, "N_ANSWER": 4, "_N_READ": 256, "_N_JUDGED": 96, "_N_REQUESTS": 5, "_N_DECODE": 4}
    shorter |= {"_LOSS_TEXTS": ("debugger", "argparse"), "_KEY_DEPTHS": (0.5,), "_KEY_LENGTH": 400}
    for name, value in {**shorter, "_MAX_ROUNDS": 1, "_COST_S": 1.0, "SPEEDUP": 1.2}.items():
        monkeypatch.setattr(demo, name, value)
    result, profile, _, predicted = measured(smollm2_path)
    assert 690 <= result.n_prompt <= 700 and profile.n_tokens == 5 * 512
    assert all(row.speed["first_token"].seconds.mean > row.speed["per_token"].seconds.mean > 0 for row in result.rows)
    assert 1.2 <= predicted[0] <= predicted[1]
    whole, prompt, papers = (row.text["all"]["loss"].mean for row in result.rows)
    assert whole > 1 and papers < 6
    assert abs(prompt - whole) < 0.1 < papers - whole
    assert [row.questions["passkey"].score.mean for row in result.rows[:2]] == [1.0, 1.0]
