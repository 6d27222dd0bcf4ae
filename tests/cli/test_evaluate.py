"""``adaskip-cpp evaluate``: a folder of results, a second run that goes on, one line for what cannot be measured."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from click.testing import Result
from oracles import command_line
from oracles.command_line import line
from oracles.questions import record
from oracles.served import frontier_of
from oracles.tiny_families import N_CTX_TRAIN

from adaskip_cpp import SkipPlan
from adaskip_cpp.evaluation import evaluate
from adaskip_cpp.measuring import running
from adaskip_cpp.model.identity import ModelInfo, fingerprint, plan_path
from adaskip_cpp.model.plan_file import save_plan
from adaskip_cpp.model.settings import Settings
from adaskip_cpp.pictures import plots

Run = Callable[..., Result]
ONE = ("--skip", 2, "--mode", "prefill", "--strategy", "adaskip")  # one plan against the whole model


@pytest.fixture
def run(tiny: Any, profile_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``run("--skip", 2, ...)``: the command on a tiny model and a short text, into ``out``. Nothing is drawn."""
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and the dog lies there and sleeps. " * 20)
    monkeypatch.setattr(plots, "has_matplotlib", lambda: False)

    def invoke(*args: object, model: Path | None = None, has_profile: bool = True, code: int = 0) -> Result:
        fixed = ["evaluate", model or tiny(), "-o", tmp_path / "out", "--text", text]
        fixed += ["--profile", profile_path] if has_profile else []
        small = ["--threads", 1, "--texts", 2, "--tokens", 24, "--continuation", 6]
        return command_line.run(*fixed, *small, "--rounds", 2, "--speed-context", 16, *args, code=code)

    return invoke


@pytest.fixture
def results(tmp_path: Path) -> Callable[[], Any]:
    return lambda: json.loads((tmp_path / "out" / "results.json").read_text())


def test_the_folder_has_results_report_and_picture(
    run: Run, tmp_path: Path, results: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(plots, "has_matplotlib", lambda: True)
    result = run("--skip", 2, "--mode", "prefill", "--mode", "e2e", "--compensation", "median,paper")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"results.json", "report.html", "quality.png", "quality.svg"}
    assert "Mode prefill" in result.stdout and "report.html" in result.stdout
    assert results()["n_done"] == results()["n_results"]
    modes, baselines = ("prefill", "e2e"), ("early_exit", "skip_decode", "unified_skipping")
    of_adaskip = [f"adaskip-2-{mode}-{name}" for name in ("median", "paper") for mode in modes]
    others = [f"{name}-2-{mode}" for name in baselines for mode in modes]
    assert [each["name"] for each in results()["contenders"]] == ["full", *of_adaskip, *others]


def test_questions_of_files_and_of_the_text_are_asked_and_scored(run: Run, results: Any, tmp_path: Path) -> None:
    (tmp_path / "qasper.jsonl").write_text(json.dumps(record("qasper", context="A fox.", answers=["fox"])) + "\n")
    (tmp_path / "dataset2prompt.json").write_text(json.dumps({"qasper": "{context} {input}"}))
    (tmp_path / "dataset2maxlen.json").write_text(json.dumps({"qasper": 4}))
    made = ("--synthetic", "passkey", "--lengths", "140,180", "--depths", "0.2,0.8", "--per", 1)
    run(*ONE, "--texts", 0, "--rounds", 0, "--tasks", tmp_path / "qasper.jsonl", *made)
    questions = results()["contenders"][1]["questions"]
    assert {task: scores["score"]["n"] for task, scores in questions.items()} == {"passkey": 4, "qasper": 1}


def test_a_busy_machine_is_noted_where_speeds_are_measured(
    run: Run, results: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adaskip_cpp.evaluation.measure.load_average", lambda: 2.5)
    assert "The load average was 2.5" in run(*ONE).stderr
    assert any("disturbed the speeds" in note for note in results()["about"]["notes"])
    assert "load average" not in run(*ONE, "--rounds", 0).stderr
    monkeypatch.setattr("adaskip_cpp.evaluation.measure.load_average", lambda: None)  # as on Windows
    assert "The load average was 2.5" in run(*ONE).stderr, "the speeds of then are still those shown"


def test_a_folder_that_is_a_file_is_our_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    assert f"cannot write '{tmp_path / 'out'}'" in " ".join(run(*ONE, code=1).stderr.split())


def test_ctrl_c_writes_what_is_there_the_same_command_goes_on_and_in_the_end_measures_nothing_again(
    run: Run, tmp_path: Path, results: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "Judge", Mock(side_effect=KeyboardInterrupt))  # after the rounds of speed
        result = run(*ONE, code=130)
    assert "the same command continues:\n  adaskip-cpp evaluate" in result.stderr
    n_done, n_results = results()["n_done"], results()["n_results"]
    assert 0 < n_done < n_results
    assert f"{n_done} of {n_results} results are there already" in run(*ONE).stderr
    (items,) = (tmp_path / "out").glob("items-*.json")
    lines, found = items.read_bytes(), results()
    assert found["n_done"] == n_results
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "report.html", items.name}
    before, command = (tmp_path / "out" / "report.html").read_text().split("<pre>")
    assert "pip install" in before and f"--text {tmp_path / 'text.txt'}" in command and "--strategy adaskip" in command
    run(*ONE)
    assert items.read_bytes() == lines and results() == found
    changed = run(*ONE, "--tokens", 30).stderr
    assert "The settings have changed. Earlier results are kept in" in changed
    assert items.name in changed.replace("\n", "")


def test_a_plan_file_is_compared_too_that_beside_the_model_unless_another_is_named(
    run: Run, model: Path, tmp_path: Path, results: Any
) -> None:
    info = ModelInfo(fingerprint(model), "llama", 3)
    for path, layer in ((plan_path(model), 1), (tmp_path / "other.json", 2)):
        save_plan(path, replace(SkipPlan.manual(3, ffn=[layer]), mode="prefill", model=info, compensation="none"))
    arguments = ("--skip", 2, "--strategy", "early_exit", "--mode", "prefill", "--texts", 0, "--rounds", 1)
    for more in ((), ("--plan", tmp_path / "other.json")):
        run(*arguments, *more, model=model)
        assert [each["name"] for each in results()["contenders"]] == ["full", "early_exit-2-prefill", "tuned"]
    assert len([*(tmp_path / "out").glob("items-*.json")]) == 2
    Path(plan_path(model)).write_text("{")
    assert "the tuned plan is left out" in run(*arguments, model=model).stderr


def test_a_named_plan_file_brings_its_settings(
    run: Run, model: Path, tmp_path: Path, results: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "is_here", lambda machine: True)
    monkeypatch.setattr("adaskip_cpp.model.frontier.LEAST_CONTEXT", 10)
    for path, n_ubatch in ((plan_path(model), 16), (tmp_path / "other.json", 8)):
        save_plan(path, replace(frontier_of(3), settings=Settings(n_batch=16, n_ubatch=n_ubatch)))
    for more, n_ubatch in (((), 16), (("--plan", tmp_path / "other.json"), 8)):
        run("--texts", 0, "--rounds", 1, *more, model=model, has_profile=False)
        assert f"ubatches of {n_ubatch}, " in results()["about"]["configuration"]["Machine"]


def test_promises_are_measured_with_and_without_a_profile(
    run: Run, model: Path, tmp_path: Path, results: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adaskip_cpp.model.frontier.LEAST_CONTEXT", 10)
    save_plan(plan_path(model), frontier_of(3))
    result = run(model=model, has_profile=False)
    found = results()
    assert [each["name"] for each in found["contenders"]] == ["full", "promise 0.05", "promise 0.1"]
    assert [each["n_skip_prefill"] for each in found["contenders"]] == [0, 1, 2]
    assert found["n_done"] == found["n_results"] and "promise, 0.05" in result.stdout
    assert "for each prompt, the fastest of 2 plans" in found["about"]["configuration"]["Promises"]
    again = run(model=model, has_profile=False).stderr
    assert f"{found['n_results']} of {found['n_results']} results are there already" in again
    for mode in ("prompt", "prefill"):
        run("--max-loss", "0.04", "--skip", 2, "--strategy", "early_exit", "--mode", mode, model=model)
        assert {each["name"] for each in results()["contenders"]} == {"full", f"early_exit-2-{mode}", "promise 0.04"}
    Path(plan_path(model)).unlink()
    assert "promises need the plan file of `tune`" in line(run("--max-loss", "0.04", model=model, code=1))


def test_what_cannot_be_measured_is_one_line_before_anything_is(
    run: Run, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "news.jsonl").write_text(json.dumps(record("multi_news", context="A fox.", answers=["fox"])) + "\n")
    (tmp_path / "dataset2maxlen.json").write_text('{"multi_news": 4}')
    monkeypatch.setitem(sys.modules, "rouge", None)
    for arguments, words in (
        (["--tasks", tmp_path / "news.jsonl"], "adaskip-cpp[evaluate]"),
        (["--tokens", N_CTX_TRAIN + 1], f"need a context of {N_CTX_TRAIN + 1} tokens"),
        (["--speed-context", N_CTX_TRAIN], "the measurement of speed"),
        (["--skip", 99], "there is nothing to compare with the whole model"),
        (["--texts", 0, "--rounds", 0], "there is nothing to measure"),
    ):
        assert words in line(run(*ONE, *arguments, code=1))
    assert "the profile was made for another model" in line(run(model=tiny(seed=1), code=1))
    assert not (tmp_path / "out").exists()
