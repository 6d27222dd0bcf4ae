"""``adaskip-cpp evaluate``: a folder of results, a second run that goes on, one line for what cannot be measured."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from oracles.command_line import line
from oracles.served import frontier_of
from oracles.tiny_families import N_CTX_TRAIN, N_EMBD

from adaskip_cpp import Profile, SkipPlan
from adaskip_cpp.cli.evaluate import evaluate as command
from adaskip_cpp.cli.terminal import Verbs
from adaskip_cpp.evaluation import evaluate
from adaskip_cpp.model.identity import ModelInfo, fingerprint, plan_path
from adaskip_cpp.model.plan_file import save_plan
from adaskip_cpp.model.statistics import PhaseStatistics
from adaskip_cpp.pictures import plots
from adaskip_cpp.planning.compensation import DEFAULT_COMPENSATION

Run = Callable[..., Result]
TEXT = "The quick brown fox jumps over the lazy dog, and the dog lies there and sleeps. " * 20
FILES = {"results.json", "report.html"}


@pytest.fixture
def profile_path(tiny: Any, tmp_path: Path) -> Path:
    path = tmp_path / "p.json"
    ones, n_layer = np.ones((3, 2)), 3
    similarity = np.linspace(0.5, 0.99, 2 * n_layer).reshape(n_layer, 2)
    zeros = np.zeros((n_layer, 2, N_EMBD), np.float32)
    statistics = PhaseStatistics(similarity, ones, ones, np.ones(n_layer), zeros, zeros, 10)
    known = ModelInfo(fingerprint(tiny()), "llama", n_layer)
    Profile(statistics, statistics, 1, 10, known, divergence=1 - similarity, copying=1 - similarity).save(path)
    return path


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
        *args: object, model: Path | None = None, profile: Path | None = profile_path, pictures: bool = False
    ) -> Result:
        monkeypatch.setattr(plots, "has_matplotlib", lambda: found and pictures)
        fixed = ["evaluate", model or tiny(), "-o", tmp_path / "out", "--text", text]
        fixed += [] if profile is None else ["--profile", profile]
        small = ["--threads", 1, "--texts", 2, "--tokens", 24, "--continuation", 6]
        small += ["--rounds", 2, "--speed-context", 16]
        verbs = Verbs(commands={"evaluate": command})
        return CliRunner().invoke(verbs, [str(arg) for arg in (*fixed, *small, *args)], prog_name="adaskip-cpp")

    return invoke


@pytest.fixture
def results(tmp_path: Path) -> Callable[[], Any]:
    return lambda: json.loads((tmp_path / "out" / "results.json").read_text())


# --- results ----------------------------------------------------------------------------------------------------------


def test_the_folder_has_results_report_and_picture(run: Run, tmp_path: Path, results: Any) -> None:
    result = run("--skip", "2", "--mode", "prefill", "--mode", "e2e", pictures=True)
    assert result.exit_code == 0, result.output
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= FILES
    assert {"quality.png", "quality.svg"} <= names
    assert not [name for name in names if name.endswith(".tmp")]
    assert "Mode prefill" in result.stdout and "report.html" in result.stdout
    found = results()
    assert found["n_done"] == found["n_results"]
    assert [each["name"] for each in found["contenders"]] == [
        "full",
        f"adaskip-2-prefill-{DEFAULT_COMPENSATION}",
        f"adaskip-2-e2e-{DEFAULT_COMPENSATION}",
        "early_exit-2-prefill",
        "early_exit-2-e2e",
        "skip_decode-2-prefill",
        "skip_decode-2-e2e",
        "unified_skipping-2-prefill",
        "unified_skipping-2-e2e",
    ]


def test_compensations_are_of_adaskip_alone(run: Run, results: Any) -> None:
    run("--skip", "2", "--mode", "prefill", "--compensation", "affine,paper")
    names = [each["name"] for each in results()["contenders"]]
    assert names[1:3] == ["adaskip-2-prefill-affine", "adaskip-2-prefill-paper"]
    assert sum(name.startswith("early_exit") for name in names) == 1


def test_questions_of_files_and_of_the_text_are_asked_and_scored(run: Run, results: Any, tmp_path: Path) -> None:
    lines = [
        {
            "input": "Who?",
            "context": "A fox.",
            "answers": ["fox"],
            "length": 2,
            "all_classes": None,
            "dataset": "qasper",
        }
    ]
    (tmp_path / "qasper.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    (tmp_path / "dataset2prompt.json").write_text(json.dumps({"qasper": "{context} {input}"}))
    (tmp_path / "dataset2maxlen.json").write_text(json.dumps({"qasper": 4}))
    result = run(
        "--skip", 2, "--mode", "e2e", "--strategy", "adaskip", "--texts", 0, "--rounds", 0,
        "--tasks", tmp_path / "qasper.jsonl", "--synthetic", "passkey", "--lengths", "140,180", "--depths", "0.2,0.8",
        "--per", 1,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    questions = results()["contenders"][1]["questions"]
    assert {task: scores["score"]["n"] for task, scores in questions.items()} == {"passkey": 4, "qasper": 1}


def test_the_report_says_how_to_repeat_it(run: Run, tmp_path: Path, text: Path) -> None:
    run("--skip", 2, "--mode", "prefill", "--strategy", "adaskip")
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"adaskip-cpp evaluate {tmp_path.parent}" not in page.split("<pre>")[0]
    assert f"--text {text}" in page.split("<pre>")[1]
    assert "--strategy adaskip" in page.split("<pre>")[1]


def test_a_busy_machine_is_noted_where_speeds_are_measured(
    run: Run, results: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = ("--skip", 2, "--mode", "prefill", "--strategy", "adaskip")
    monkeypatch.setattr("adaskip_cpp.evaluation.measure.load_average", lambda: 2.5)
    assert "The load average was 2.5" in run(*once).stderr
    assert any("disturbed the speeds" in note for note in results()["about"]["notes"])
    assert "load average" not in run(*once, "--rounds", 0).stderr
    monkeypatch.setattr("adaskip_cpp.evaluation.measure.load_average", lambda: None)  # as on Windows
    assert "The load average was 2.5" in run(*once).stderr, "the speeds of then are still those shown"
    assert "load average" not in run("--skip", 1, *once[2:]).stderr


def test_budgets_that_a_strategy_cannot_reach_are_left_out_with_a_note(run: Run, results: Any, tmp_path: Path) -> None:
    result = run("--skip", "2,5", "--mode", "prefill", "--rounds", 0)
    assert result.exit_code == 0, result.output
    notes = results()["about"]["notes"]
    assert any(note.startswith("skip_decode-5-prefill is left out: cannot skip 5") for note in notes)
    assert all(note[:30] in result.stderr for note in notes)
    assert "skip_decode-5-prefill is left out" in (tmp_path / "out" / "report.html").read_text()


def test_pictures_are_left_out_where_matplotlib_is_missing(run: Run, tmp_path: Path) -> None:
    assert run("--skip", 2, "--mode", "prefill", "--strategy", "adaskip").exit_code == 0
    (items,) = (tmp_path / "out").glob("items-*.jsonl")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*FILES, items.name, ".lock"}
    assert "pip install" in (tmp_path / "out" / "report.html").read_text()


# --- going on ---------------------------------------------------------------------------------------------------------


def test_a_second_run_measures_nothing_again(run: Run, tmp_path: Path, results: Any) -> None:
    arguments = ("--skip", 2, "--mode", "prefill", "--strategy", "adaskip")
    run(*arguments)
    (items,) = (tmp_path / "out").glob("items-*.jsonl")
    lines, found = items.read_bytes(), results()
    result = run(*arguments)
    assert f"{found['n_results']} of {found['n_results']} results are there already" in result.stderr
    assert items.read_bytes() == lines
    assert results() == found


def test_ctrl_c_writes_what_is_there_and_the_same_command_goes_on(
    run: Run, results: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--skip", 2, "--mode", "e2e", "--strategy", "adaskip")
    calls, whole = [], evaluate.greedy_text

    def interrupted(*args: Any, **options: Any) -> str:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "greedy_text", interrupted)
        result = run(*arguments)
    assert result.exit_code == 130
    assert "the same command continues:\n  adaskip-cpp evaluate" in result.stderr
    found = results()
    assert 0 < found["n_done"] < found["n_results"]
    result = run(*arguments)
    assert result.exit_code == 0
    assert results()["n_done"] == found["n_results"]


def test_a_changed_setting_begins_anew_and_says_where_the_old_results_are(run: Run, tmp_path: Path) -> None:
    arguments = ("--skip", 2, "--mode", "prefill", "--strategy", "adaskip")
    run(*arguments)
    (kept,) = (tmp_path / "out").glob("items-*.jsonl")
    result = run(*arguments, "--tokens", 30)
    assert "The settings have changed. Earlier results are kept in" in result.stderr
    assert kept.name in result.stderr.replace("\n", "")


def test_a_plan_file_is_compared_too_that_beside_the_model_unless_another_is_named(
    run: Run, tiny: Any, tmp_path: Path, results: Any
) -> None:
    model = Path(shutil.copy(tiny(), tmp_path / "m.gguf"))
    info = ModelInfo(fingerprint(model), "llama", 3)
    for path, layer in ((plan_path(model), 1), (tmp_path / "other.json", 2)):
        save_plan(path, replace(SkipPlan.manual(3, ffn=[layer]), mode="prefill", model=info, compensation="none"))
    arguments = ("--skip", 2, "--strategy", "early_exit", "--mode", "prefill", "--texts", 0, "--rounds", 1)
    for more in ((), ("--plan", tmp_path / "other.json")):
        assert run(*arguments, *more, model=model).exit_code == 0
        assert [each["name"] for each in results()["contenders"]] == ["full", "early_exit-2-prefill", "tuned"]
    assert len([*(tmp_path / "out").glob("items-*.jsonl")]) == 2
    Path(plan_path(model)).write_text("{")
    assert "the tuned plan is left out" in run(*arguments, model=model).stderr
    assert "there is no plan file" in line(run(*arguments, "--plan", tmp_path / "none.json", model=model))


def test_promises_are_measured_with_and_without_a_profile(
    run: Run, tiny: Any, tmp_path: Path, results: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the frontier beside the model, or another one that is named."""
    monkeypatch.setattr("adaskip_cpp.model.frontier.LEAST_CONTEXT", 10)
    model = Path(shutil.copy(tiny(), tmp_path / "m.gguf"))
    save_plan(plan_path(model), frontier_of(3))
    result = run(model=model, profile=None)
    assert result.exit_code == 0, result.output
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
    shutil.move(plan_path(model), tmp_path / "elsewhere.json")
    assert "run `adaskip-cpp tune`" in line(run(model=model, profile=None))
    assert "promises need the plan file of `tune`" in line(run("--max-loss", "0.04", model=model))
    assert "these options need plans made from a profile" in line(run("--skip", 2, model=model, profile=None))


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_profile_of_another_model_is_refused(run: Run, tiny: Any, tmp_path: Path) -> None:
    assert "the profile was made for another model" in line(run(model=tiny(seed=1)))
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
    assert words in line(run(*arguments))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--skip", "6;12"], "'6;12' is not a list such as 6,12,15"),
        (["--compensation", "best"], "'best' is not a list of: none, paper, median, affine"),
        (["--synthetic", "chess"], "'chess' is not a list of: passkey"),
    ],
)
def test_malformed_options_are_one_line(run: Run, arguments: list[str], words: str) -> None:
    assert words in line(run(*arguments), 2)
