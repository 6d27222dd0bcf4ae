"""``adaskip-cpp evaluate``: a folder of results, a second run that goes on, one line for what cannot be measured."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from oracles import command_line
from oracles.command_line import line
from oracles.questions import record
from oracles.served import frontier_of
from oracles.tiny_families import N_CTX_TRAIN

from adaskip_cpp import SkipPlan
from adaskip_cpp.evaluation import evaluate
from adaskip_cpp.model.identity import ModelInfo, fingerprint, plan_path
from adaskip_cpp.model.plan_file import save_plan
from adaskip_cpp.pictures import plots

Run = Callable[..., Result]
TEXT = "The quick brown fox jumps over the lazy dog, and the dog lies there and sleeps. " * 20
ONE = ("--skip", 2, "--mode", "prefill", "--strategy", "adaskip")
"""One plan against the whole model."""

FILES = {"results.json", "report.html"}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def run(tiny: Any, profile_path: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``run("--skip", 2, ...)``: the command on the tiny model and a short text, into the folder ``out``.

    As if matplotlib were not there, unless ``pictures``: drawing takes longer than all else.
    """
    found = plots.has_matplotlib()

    def invoke(
        *args: object,
        model: Path | None = None,
        profile: Path | None = profile_path,
        pictures: bool = False,
        code: int = 0,
    ) -> Result:
        monkeypatch.setattr(plots, "has_matplotlib", lambda: found and pictures)
        fixed = ["evaluate", model or tiny(), "-o", tmp_path / "out", "--text", text]
        fixed += [] if profile is None else ["--profile", profile]
        small = ["--threads", 1, "--texts", 2, "--tokens", 24, "--continuation", 6]
        small += ["--rounds", 2, "--speed-context", 16]
        return command_line.run(*fixed, *small, *args, code=code)

    return invoke


@pytest.fixture
def results(tmp_path: Path) -> Callable[[], Any]:
    return lambda: json.loads((tmp_path / "out" / "results.json").read_text())


# --- results ----------------------------------------------------------------------------------------------------------


def test_the_folder_has_results_report_and_picture(run: Run, tmp_path: Path, results: Any) -> None:
    options = ("--skip", "2", "--mode", "prefill", "--mode", "e2e", "--compensation", "median,paper")
    result = run(*options, pictures=True)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= FILES
    assert {"quality.png", "quality.svg"} <= names
    assert not [name for name in names if name.endswith(".tmp")]
    assert "Mode prefill" in result.stdout and "report.html" in result.stdout
    found = results()
    assert found["n_done"] == found["n_results"]
    modes, baselines = ("prefill", "e2e"), ("early_exit", "skip_decode", "unified_skipping")
    of_adaskip = [f"adaskip-2-{mode}-{name}" for name in ("median", "paper") for mode in modes]
    others = [f"{name}-2-{mode}" for name in baselines for mode in modes]
    assert [each["name"] for each in found["contenders"]] == ["full", *of_adaskip, *others]


def test_questions_of_files_and_of_the_text_are_asked_and_scored(run: Run, results: Any, tmp_path: Path) -> None:
    question = record("qasper", context="A fox.", answers=["fox"])
    (tmp_path / "qasper.jsonl").write_text(json.dumps(question) + "\n")
    (tmp_path / "dataset2prompt.json").write_text(json.dumps({"qasper": "{context} {input}"}))
    (tmp_path / "dataset2maxlen.json").write_text(json.dumps({"qasper": 4}))
    run(
        "--skip", 2, "--mode", "e2e", "--strategy", "adaskip", "--texts", 0, "--rounds", 0,
        "--tasks", tmp_path / "qasper.jsonl", "--synthetic", "passkey", "--lengths", "140,180", "--depths", "0.2,0.8",
        "--per", 1,
    )  # fmt: skip
    questions = results()["contenders"][1]["questions"]
    assert {task: scores["score"]["n"] for task, scores in questions.items()} == {"passkey": 4, "qasper": 1}


def test_a_package_that_a_metric_lacks_is_missed_before_anything_is_measured(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "news.jsonl").write_text(json.dumps(record("multi_news", context="A fox.", answers=["fox"])) + "\n")
    (tmp_path / "dataset2maxlen.json").write_text('{"multi_news": 4}')
    monkeypatch.setitem(sys.modules, "rouge", None)
    assert "adaskip-cpp[evaluate]" in run(*ONE, "--tasks", tmp_path / "news.jsonl", code=1).stderr
    assert not (tmp_path / "out").exists()


def test_a_busy_machine_is_noted_where_speeds_are_measured(
    run: Run, results: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adaskip_cpp.evaluation.measure.load_average", lambda: 2.5)
    assert "The load average was 2.5" in run(*ONE).stderr
    assert any("disturbed the speeds" in note for note in results()["about"]["notes"])
    assert "load average" not in run(*ONE, "--rounds", 0).stderr
    monkeypatch.setattr("adaskip_cpp.evaluation.measure.load_average", lambda: None)  # as on Windows
    assert "The load average was 2.5" in run(*ONE).stderr, "the speeds of then are still those shown"
    assert "load average" not in run("--skip", 1, *ONE[2:]).stderr


def test_the_report_says_how_to_repeat_it_and_where_matplotlib_is_missing_how_to_have_pictures(
    run: Run, tmp_path: Path, text: Path
) -> None:
    run(*ONE)
    (items,) = (tmp_path / "out").glob("items-*.jsonl")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*FILES, items.name, ".lock"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "pip install" in page
    assert f"adaskip-cpp evaluate {tmp_path.parent}" not in page.split("<pre>")[0]
    assert f"--text {text}" in page.split("<pre>")[1]
    assert "--strategy adaskip" in page.split("<pre>")[1]


# --- going on ---------------------------------------------------------------------------------------------------------


def test_a_second_run_measures_nothing_again_and_one_with_another_setting_begins_anew(
    run: Run, tmp_path: Path, results: Any
) -> None:
    run(*ONE)
    (items,) = (tmp_path / "out").glob("items-*.jsonl")
    lines, found = items.read_bytes(), results()
    result = run(*ONE)
    assert f"{found['n_results']} of {found['n_results']} results are there already" in result.stderr
    assert items.read_bytes() == lines
    assert results() == found
    changed = run(*ONE, "--tokens", 30).stderr
    assert "The settings have changed. Earlier results are kept in" in changed
    assert items.name in changed.replace("\n", "")


def test_ctrl_c_writes_what_is_there_and_the_same_command_goes_on(
    run: Run, results: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, whole = [], evaluate.Judge

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*args)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "Judge", interrupted)
        result = run(*ONE, code=130)
    assert "the same command continues:\n  adaskip-cpp evaluate" in result.stderr
    found = results()
    assert 0 < found["n_done"] < found["n_results"]
    run(*ONE)
    assert results()["n_done"] == found["n_results"]


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
    assert len([*(tmp_path / "out").glob("items-*.jsonl")]) == 2
    Path(plan_path(model)).write_text("{")
    assert "the tuned plan is left out" in run(*arguments, model=model).stderr
    assert "there is no plan file" in line(run(*arguments, "--plan", tmp_path / "none.json", model=model, code=1))


def test_promises_are_measured_with_and_without_a_profile(
    run: Run, model: Path, tmp_path: Path, results: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adaskip_cpp.model.frontier.LEAST_CONTEXT", 10)
    save_plan(plan_path(model), frontier_of(3))
    result = run(model=model, profile=None)
    found = results()
    assert [each["name"] for each in found["contenders"]] == ["full", "promise 0.05", "promise 0.1"]
    assert found["n_done"] == found["n_results"] and "promise, 0.05" in result.stdout
    assert [each["n_skip_prefill"] for each in found["contenders"]] == [0, 1, 2]
    assert "for each prompt, the fastest of 2 plans" in found["about"]["configuration"]["Promises"]
    report = (tmp_path / "out" / "report.html").read_text()
    assert "promise, 0.05</td>" in report and "profile" not in found["about"]["command"]
    again = run(model=model, profile=None)
    assert f"{found['n_results']} of {found['n_results']} results are there already" in again.stderr
    for mode in ("prompt", "prefill"):
        run("--max-loss", "0.04", "--skip", 2, "--strategy", "early_exit", "--mode", mode, model=model)
        assert {each["name"] for each in results()["contenders"]} == {"full", f"early_exit-2-{mode}", "promise 0.04"}
    Path(plan_path(model)).unlink()
    assert "run `adaskip-cpp tune`" in line(run(model=model, profile=None, code=1))
    assert "promises need the plan file of `tune`" in line(run("--max-loss", "0.04", model=model, code=1))
    assert "these options need plans made from a profile" in line(run("--skip", 2, model=model, profile=None, code=1))


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_profile_of_another_model_is_refused(run: Run, tiny: Any, tmp_path: Path) -> None:
    assert "the profile was made for another model" in line(run(model=tiny(seed=1), code=1))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tokens", "200", "--texts", "90"], "not the 90 asked for"),
        (["--text", "none.txt"], "cannot read 'none.txt'"),
        (["--tokens", str(N_CTX_TRAIN + 1)], f"need a context of {N_CTX_TRAIN + 1} tokens"),
        (["--speed-context", str(N_CTX_TRAIN)], "the measurement of speed"),
        (["--ctx", str(N_CTX_TRAIN + 1)], f"made for contexts of {N_CTX_TRAIN} tokens"),
        (["--tokens", "7"], "no prompt before a continuation"),
        (["--skip", "99"], "there is nothing to compare with the whole model"),
        (["--synthetic", "passkey", "--lengths", "10"], "ask for longer ones"),
        (["--texts", "0", "--rounds", "0"], "there is nothing to measure"),
    ],
)
def test_what_cannot_be_measured_is_one_line_before_anything_is(
    run: Run, tmp_path: Path, arguments: list[str], words: str
) -> None:
    assert words in line(run(*arguments, code=1))
    assert not (tmp_path / "out").exists()
