"""``adaskip-cpp tune``: from a tiny model to the file that the other verbs use."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from click.testing import Result
from oracles import command_line
from oracles.command_line import line
from oracles.small_tuning import JUDGED_AT, TEXTS, make_small, write_idle_model

from adaskip_cpp import AdaSkipLlama
from adaskip_cpp.intervals import Interval
from adaskip_cpp.model.frontier import SpeedUp
from adaskip_cpp.model.identity import plan_path
from adaskip_cpp.model.plan_file import load_plan
from adaskip_cpp.tuning import tune as tuning
from adaskip_cpp.tuning.exact import fastest_settings

Tune = Callable[..., Result]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model, two texts to judge by and one to calibrate on."""
    write_idle_model(tmp_path / "m.gguf")
    first, second, *others = TEXTS.values()
    (tmp_path / "0.txt").write_text(first + " " + others[0])
    (tmp_path / "1.txt").write_text(second + " " + others[1])
    (tmp_path / "data.txt").write_text(" ".join(TEXTS.values())[::-1])
    return tmp_path


@pytest.fixture
def tune(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Tune:
    """``tune(...)``: the verb, small, on that model. Processes of their own are not started: the speed is invented."""
    make_small(monkeypatch)

    def measure_speed(path: str, settings: Any, plan: Any, prompt: list[int], **_: Any) -> Any:
        return (SpeedUp("both", len(prompt), Interval(2.5, 2.4, 2.6, 2), (5.0, 2.0)),)

    monkeypatch.setattr(tuning, "measure_speed", measure_speed)

    def run(*args: object, code: int = 0) -> Result:
        words = ["tune", folder / "m.gguf", "--data", folder / "data.txt", "--context", 100, "--answer", 4]
        words += ["--text", folder / "0.txt", "--text", folder / "1.txt", "--threads", 1, "--flash-attn", "off"]
        return command_line.run(*words, *args, code=code)

    return run


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_it_writes_what_the_model_opens_with_and_prints_what_it_found_within_80_columns(
    tune: Tune, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "load_average", lambda: 2.5)
    before = files(folder)
    result = tune()
    assert files(folder).keys() - before.keys() == {"m.adaskip-plan.json", "m.adaskip-plan.bin"}
    path = plan_path(folder / "m.gguf")
    found = load_plan(path, model=folder / "m.gguf").frontier
    assert found is not None and len(found.points) == 2 and found.n_read > 1000
    assert all((each.settings.n_threads, each.settings.flash_attn) == (1, False) for each in found.tried)
    early = " ".join(result.stderr.split())
    assert "run nothing else. After Ctrl-C, the same command continues." in early
    assert "Warning: the load average is 2.50." in early and "The other stages take about" in early
    told = " ".join(result.stdout.split())
    for words in (
        f"the first token after {JUDGED_AT} tokens comes 2.50 (2.40 to 2.60) times as fast",
        "judged on 0.txt (part 2 of 2), 1.txt (part 2 of 2); plans found on 0.txt (part 1 of 2)",
        'AdaSkipLlama(plan="auto") use it',
        f"Written to {path}",
    ):
        assert words in told
    assert max(len(each) for each in result.stdout.splitlines() if path not in each and "auto" not in each) <= 80


@pytest.mark.parametrize("where", ["calibrate", "measure_speed"])
def test_ctrl_c_leaves_all_files_as_they_were_and_the_next_run_goes_on_and_cleans_up(
    where: str, tune: Tune, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = folder / "other.json"
    output.write_text("what was there")
    before, tried = files(folder), Mock(wraps=fastest_settings)
    monkeypatch.setattr(tuning, "fastest_settings", tried)
    with monkeypatch.context() as patch:
        patch.setattr(tuning, where, Mock(side_effect=KeyboardInterrupt))
        assert tune("-o", output, code=130).stderr.splitlines()[-1] == "Error: interrupted"
    after = files(folder)
    assert after.items() >= before.items()
    assert all(name.startswith("other-unfinished") for name in after.keys() - before.keys())
    assert f"Use it with --plan {output}." in tune("-o", output).stdout
    assert tried.call_count == 1 and load_plan(output).frontier is not None
    assert files(folder).keys() - before.keys() == {"other.bin"}


@pytest.mark.parametrize("change", [("--context", 120), ("--flash-attn", "on"), ()], ids=str)
def test_with_other_options_or_on_another_machine_it_begins_anew(
    change: tuple[object, ...], tune: Tune, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = Mock(wraps=fastest_settings)
    monkeypatch.setattr(tuning, "fastest_settings", tried)
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "measure", Mock(side_effect=KeyboardInterrupt))
        tune(code=130)
    if not change:
        monkeypatch.setattr("adaskip_cpp.cli.tune.devices", lambda: ("another CPU", ()))
    tune(*change)
    assert tried.call_count == 2


def test_what_cannot_be_read_or_written_is_told_before_the_work(
    tune: Tune, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AdaSkipLlama, "_evaluate", Mock(side_effect=AssertionError("evaluated")))
    assert "is given to --data and --text" in line(tune("--data", folder / "0.txt", code=1))
    assert "nope.txt" in line(tune("--text", "nope.txt", code=1))
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "cannot write" in line(tune(code=1))


@pytest.mark.model
@pytest.mark.slow
def test_a_real_model_is_tuned_with_the_built_in_text(
    smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A tenth of the layers and of the tokens.
    small = {"_N_REQUESTS": 3, "_JUDGED_AT": 512, "_SEARCHED_AT": (256, 320), "_COST_CONTEXTS": (512,), "_COST_S": 1.0}
    small |= {"_N_TEXTS": 2, "_N_SEARCHED": 1, "_N_ROUNDS": 1, "MOST_TOKENS": 10_000, "_ANSWER": (64, 72)}
    for name, value in small.items():
        monkeypatch.setattr(tuning, name, value)
    for module in ("calibration.calibrate", "tuning.planned"):
        monkeypatch.setattr(f"adaskip_cpp.{module}.late_layers", lambda n_layer: range(27, n_layer))
    monkeypatch.setattr("adaskip_cpp.tuning.exact.MOST_TOKENS", 2000)
    command_line.run("tune", smollm2_path, "--context", 512, "-o", tmp_path / "p.json")
    frontier = load_plan(tmp_path / "p.json", model=smollm2_path).frontier
    assert frontier is not None
    assert frontier.n_read < 30_000  # of which timing the sublayers takes half, in its three rounds at least
    chosen = frontier.choose(1024, 1.0)
    assert chosen is not None and chosen.skipped("bulk").n_skip > 2 and chosen.decode.n_skip == 0
    searched, judged = ({*str(frontier.about[name]).split(", ")} for name in ("searched_on", "judged_on"))
    assert not searched & judged and str(frontier.about["calibrated_on"]).startswith("pages of pydoc_data")
