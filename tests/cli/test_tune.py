"""``adaskip-cpp tune``: from a tiny model to the file that the other verbs use."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from oracles import command_line
from oracles.command_line import line
from oracles.small_tuning import JUDGED_AT, TEXTS, make_small, write_idle_model

from adaskip_cpp import AdaSkipLlama, Frontier
from adaskip_cpp.intervals import Interval
from adaskip_cpp.model.frontier import SpeedUp
from adaskip_cpp.model.identity import plan_path
from adaskip_cpp.model.plan_file import load_plan
from adaskip_cpp.tuning import tune as tuning

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
        words += ["--text", folder / "0.txt", "--text", folder / "1.txt", "--threads", 1, "--no-flash-attn"]
        return command_line.run(*words, *args, code=code)

    return run


def found(folder: Path) -> Frontier:
    frontier = load_plan(plan_path(folder / "m.gguf"), model=folder / "m.gguf").frontier
    assert frontier is not None
    return frontier


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -- what it writes and prints ---------------------------------------------------------------------------------------


def test_it_writes_what_the_model_opens_with_and_prints_what_it_found_within_80_columns(
    tune: Tune, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And before it works, how to stop it and how long it takes. Settings that are given are not varied."""
    monkeypatch.setattr(tuning, "load_average", lambda: 2.5)
    before = files(folder)
    result = tune()
    assert files(folder).keys() - before.keys() == {"m.adaskip-plan.json", "m.adaskip-plan.bin"}
    assert len(found(folder).points) == 2 and found(folder).n_read > 1000
    llm = AdaSkipLlama(str(folder / "m.gguf"), plan="auto", n_ctx=256, verbose=False)
    llm.eval([1, *range(3, 150)])
    assert llm.plan is not None and llm.plan.skipped("bulk").n_skip >= 1
    llm.close()
    assert all((each.settings.n_threads, each.settings.flash_attn) == (1, False) for each in found(folder).tried)
    early = " ".join(result.stderr.split())
    assert "run nothing else. After Ctrl-C, the same command continues." in early
    assert "Warning: the load average is 2.50." in early and "The other stages take about" in early
    told = " ".join(result.stdout.split())
    for words in (
        f"the first token after {JUDGED_AT} tokens comes 2.50 (2.40 to 2.60) times as fast",
        "judged on 0.txt (part 2 of 2), 1.txt (part 2 of 2); plans found on 0.txt (part 1 of 2), 1.txt (part 1 of 2)",
        'AdaSkipLlama(plan="auto") use it',
    ):
        assert words in told
    path = plan_path(folder / "m.gguf")
    assert f"Written to {path}" in told
    assert max(len(each) for each in result.stdout.splitlines() if path not in each and "auto" not in each) <= 80


def test_the_output_can_be_elsewhere(tune: Tune, folder: Path, tmp_path: Path) -> None:
    result = tune("-o", tmp_path / "other.json")
    assert not os.path.exists(plan_path(folder / "m.gguf"))
    assert f"Use it with --plan {tmp_path / 'other.json'}." in result.stdout
    assert load_plan(tmp_path / "other.json").frontier is not None


# -- a run that is stopped -------------------------------------------------------------------------------------------


def interrupted_in(monkeypatch: pytest.MonkeyPatch, name: str, *, when: int = 1) -> list[int]:
    """Let the n-th call of a function of tuning press Ctrl-C; returns the calls so far."""
    calls, real = [0], getattr(tuning, name)

    def call(*args: Any, **more: Any) -> Any:
        calls[0] += 1
        if calls[0] == when:
            raise KeyboardInterrupt
        return real(*args, **more)

    monkeypatch.setattr(tuning, name, call)
    return calls


@pytest.mark.parametrize("where", ["fastest_settings", "calibrate", "measure", "measure_speed"])
def test_ctrl_c_leaves_all_files_as_they_were_and_the_next_run_goes_on_and_cleans_up(
    where: str, tune: Tune, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated, tried = (interrupted_in(monkeypatch, name, when=0) for name in ("calibrate", "fastest_settings"))
    Path(plan_path(folder / "m.gguf")).write_text("what was there")
    before = files(folder)
    interrupted_in(monkeypatch, where)
    assert tune(code=130).stderr.splitlines()[-1] == "Error: interrupted"
    after = files(folder)
    assert {name: after[name] for name in before} == before
    assert all(name.startswith("m.adaskip-plan-unfinished") for name in after.keys() - before.keys())
    tune()
    assert tried == [1] and calibrated == [1]
    assert len(found(folder).points) == 2
    assert not any("unfinished" in name for name in files(folder))


@pytest.mark.parametrize("change", [("--context", 120), ("--flash-attn",)], ids=str)
def test_with_other_options_it_begins_anew(
    change: tuple[object, ...], tune: Tune, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = interrupted_in(monkeypatch, "fastest_settings", when=0)
    interrupted_in(monkeypatch, "measure")
    tune(code=130)
    tune(*change)
    assert tried == [2]


# -- mistakes --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_read_or_written_is_told_before_the_work(
    tune: Tune, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And that what teaches may not judge."""

    def refuse(*_: Any, **more: Any) -> None:
        raise AssertionError("evaluated")

    monkeypatch.setattr(AdaSkipLlama, "_evaluate", refuse)
    for args, message in (
        (("--data", folder / "0.txt"), "is given to --data and --text"),
        (("--text", "nope.txt"), "nope.txt"),
        (("-o", "/nowhere/p.json"), "no folder '/nowhere'"),
    ):
        assert message in line(tune(*args, code=1))
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "cannot write" in line(tune(code=1))


# -- a real model ----------------------------------------------------------------------------------------------------


@pytest.mark.model
@pytest.mark.slow
def test_a_real_model_is_tuned_with_the_built_in_text(
    smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A tenth of the layers and of the tokens.
    small = {"_N_REQUESTS": 3, "_JUDGED_AT": 512, "_SEARCHED_AT": (128, 256), "_COST_CONTEXTS": (512,), "_COST_S": 1.0}
    small |= {"_N_TEXTS": 2, "_N_SEARCHED": 1, "_N_ROUNDS": 1, "MOST_TOKENS": 10_000, "_ANSWER": (64, 72)}
    for name, value in small.items():
        monkeypatch.setattr(tuning, name, value)
    for module in ("calibration.calibrate", "tuning.planned"):
        monkeypatch.setattr(f"adaskip_cpp.{module}.late_layers", lambda n_layer: range(27, n_layer))
    monkeypatch.setattr("adaskip_cpp.tuning.exact.MOST_TOKENS", 2000)
    command_line.run("tune", smollm2_path, "--context", 512, "-o", tmp_path / "p.json")
    frontier = load_plan(tmp_path / "p.json", model=smollm2_path).frontier
    assert frontier is not None and frontier.points
    assert frontier.n_read < 30_000  # of which timing the sublayers takes half, in its three rounds at least
    chosen = frontier.choose(1024, 1.0)
    assert chosen is not None and chosen.skipped("bulk").n_skip > 2 and chosen.decode.n_skip == 0
    assert frontier.speeds[0].of == "settings"
    searched, judged = ({*str(frontier.about[name]).split(", ")} for name in ("searched_on", "judged_on"))
    assert not searched & judged and str(frontier.about["calibrated_on"]).startswith("pages of pydoc_data")
