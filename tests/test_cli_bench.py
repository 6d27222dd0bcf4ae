"""``adaskip-cpp bench``: its options, what it prints, and that nothing measured is lost."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from tiny_families import N_EMBD

from adaskip_cpp import Profile
from adaskip_cpp.bench.bench import Bench, BenchResult
from adaskip_cpp.bench.process import Usage
from adaskip_cpp.bench.table import NO_PLAN, STOCK
from adaskip_cpp.cli import bench as cli_bench
from adaskip_cpp.cli.bench import bench
from adaskip_cpp.cli.bench_report import seconds
from adaskip_cpp.cli.terminal import Verbs
from adaskip_cpp.errors import NativeError, PackageMissingError
from adaskip_cpp.intervals import Interval
from adaskip_cpp.measuring.timing import RequestTime
from adaskip_cpp.model.identity import ModelInfo, fingerprint
from adaskip_cpp.model.statistics import PhaseStatistics
from adaskip_cpp.model.tuned import Promise, TunedPlan
from adaskip_cpp.pictures import plots

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    """``run(...)``: the result of ``adaskip-cpp bench ...``, in this process."""
    main = Verbs(name="adaskip-cpp", commands={"bench": bench})

    def invoke(*args: object) -> Result:
        return CliRunner().invoke(main, ["bench", *map(str, args)], prog_name="adaskip-cpp")

    return invoke


@pytest.fixture
def profile_path(tiny: Any, tmp_path: Path) -> Path:
    """A profile of the tiny model, which ranks its last layer first."""
    ones, zeros = np.ones((3, 2)), np.zeros((3, 2, N_EMBD), np.float32)
    similarity = np.linspace(0.5, 0.99, 6).reshape(3, 2)
    statistics = PhaseStatistics(similarity, ones, 2 * ones, np.ones(3), zeros, zeros, 10)
    Profile(statistics, statistics, 1, 10, ModelInfo(fingerprint(tiny()), "llama", 3)).save(tmp_path / "p.json")
    return tmp_path / "p.json"


@pytest.fixture
def measures(monkeypatch: pytest.MonkeyPatch) -> list[Bench]:
    """Runs that take no time: stock and no plan 2 s, plans 1 s, of an ideal of 2 / 1.5; the benchmarks asked for."""
    asked: list[Bench] = []

    def measure(self: Bench) -> BenchResult:
        asked.append(self)
        result = self.result
        for context in result.settings.contexts:
            for name in {*result.times.contenders, *self._complements}:
                first = {STOCK: 2.0, NO_PLAN: 2.0, "nothing that can be skipped": 0.1}.get(name, 1.6)
                first = 0.6 if name.startswith("only what") else first
                runs = [RequestTime(first, (first / 100,) * result.settings.n_decode)] * result.settings.n_rounds
                result.times.times[name, context] = runs
        result.usage = {name: Usage(10**8, 10**6, 100, 90, None, 7) for name in result.times.contenders}
        result.machine = {
            "cpu": "a processor",
            "devices": ["a processor", "a GPU"],
            "n_gpu_layers": -1,
            "n_batch": 512,
            "n_ubatch": 512,
            "flash_attention": False,
            "type_k": "F16",
            "type_v": "F16",
        }
        result.complete = True
        return result

    monkeypatch.setattr(Bench, "run", measure)
    return asked


def line(result: Result, code: int = 1) -> str:
    """The one line of a user's error."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    (only,) = result.stderr.splitlines()
    assert only.startswith("Error: ")
    return only


# --- options ----------------------------------------------------------------------------------------------------------


def test_it_has_help_with_an_example(run: Run) -> None:
    result = run("--help")
    assert result.exit_code == 0 and "Example:\n    adaskip-cpp bench" in result.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "MODEL"),
        (["m", "--contexts", "512,x"], "not a list such as 512,2048"),
        (["m", "--contexts", "0"], "not a list"),
        (["m", "--skip", "six"], "not a list such as 6,12"),
        (["m", "--speedup", "0.5"], "not a list"),
        (["m", "--speedup", "inf"], "not a list"),
        (["m", "--strategy", "adaskip,best"], "not a list"),
        (["m", "--strategy", "manual"], "not a list"),
        (["m", "--attention", "7-3"], "not a list of layers"),
        (["m", "--ffn", "1,two"], "not a list of layers"),
        (["m", "--both", "1,2"], "not two lists of layers"),
        (["m", "--both", "1/2/3"], "not two lists of layers"),
        (["m", "--both", "1/"], "not two lists of layers"),
        (["m", "--repeats", "0"], "--repeats"),
        (["m", "--compensation", "magic"], "affine"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_with_2(run: Run, args: list[str], message: str) -> None:
    assert message in line(run(*args), 2)


def test_a_missing_model_or_profile_is_one_line(run: Run, tiny: Any, tmp_path: Path) -> None:
    assert "no model file" in line(run(tmp_path / "nope.gguf"))
    assert "nope.json" in line(run(tiny(), "--profile", tmp_path / "nope.json"))


def test_a_context_beyond_the_model_is_one_line(run: Run, tiny: Any, measures: list[Bench]) -> None:
    assert "beyond the model's" in line(run(tiny(), "--contexts", 10**6))
    assert measures == []


def test_a_profile_of_another_model_is_one_line(run: Run, tiny: Any, profile_path: Path, measures: list[Bench]) -> None:
    assert "another model" in line(run(tiny(seed=1), "--profile", profile_path, "--skip", 2, "--contexts", 16))


def test_layers_that_do_not_exist_are_one_line(run: Run, tiny: Any, profile_path: Path, measures: list[Bench]) -> None:
    assert "layer 9" in line(run(tiny(), "--profile", profile_path, "--ffn", 9, "--contexts", 16))


def test_a_missing_matplotlib_is_told_before_anything_is_measured(
    run: Run, tiny: Any, measures: list[Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(**options: Any) -> Any:
        raise PackageMissingError('pictures need matplotlib; pip install "adaskip-cpp[plot]"')

    monkeypatch.setattr(plots, "figure", missing)
    assert "pip install" in line(run(tiny(), "--plot", "x", "--contexts", 16))
    assert measures == []


# --- plans ------------------------------------------------------------------------------------------------------------


def test_without_plans_stock_and_ours_are_compared(run: Run, tiny: Any, measures: list[Bench]) -> None:
    assert run(tiny(), "--contexts", "8,16").exit_code == 0
    (asked,) = measures
    assert list(asked.result.times.contenders) == [STOCK, NO_PLAN] and asked.result.settings.contexts == (8, 16)


def test_every_budget_is_a_plan_of_every_strategy(
    run: Run, tiny: Any, profile_path: Path, measures: list[Bench]
) -> None:
    args = ("--profile", profile_path, "--skip", "1,2", "--strategy", "adaskip,early_exit", "--contexts", 16)
    assert run(tiny(), *args).exit_code == 0
    plans = measures[0].result.plans
    assert {name: plan.prefill.n_skip for name, plan in plans.items()} == {
        "adaskip 1": 1,
        "adaskip 2": 2,
        "early_exit 1": 0,
        "early_exit 2": 2,
    }
    assert all(plan.mode == "prefill" and plan.online is None for plan in plans.values())
    assert plans["adaskip 1"].prefill.bias is not None


def test_lists_of_layers_are_plans_of_their_own(run: Run, tiny: Any, profile_path: Path, measures: list[Bench]) -> None:
    args = (
        "--profile",
        profile_path,
        "--attention",
        "0-1",
        "--ffn",
        "0,2",
        "--ffn",
        "1-2",
        "--both",
        "2/0-1",
        "--contexts",
        16,
    )
    assert run(tiny(), *args).exit_code == 0
    plans = measures[0].result.plans
    assert {name: (plan.prefill.attention, plan.prefill.ffn) for name, plan in plans.items()} == {
        "2 attention": ((0, 1), ()),
        "2 FFN": ((), (0, 2)),
        "2 FFN (2)": ((), (1, 2)),
        "1 attention, 2 FFN": ((2,), (0, 1)),
    }


def test_a_profile_alone_asks_for_the_default_number(run: Run, tiny: Any, profile_path: Path) -> None:
    # Of this model's 6 sublayers 12 cannot be skipped.
    assert "cannot skip 12" in line(run(tiny(), "--profile", profile_path, "--contexts", 16))


@pytest.fixture
def tuned_path(profile_path: Path) -> Path:
    """The same profile with a tuned plan, which skips the FFN of layer 1."""
    loss, agreement = Interval(0.01, 0.0, 0.02, 9), Interval(0.97, 0.96, 0.98, 9)
    tuned = TunedPlan((), (1,), Promise("max_loss", 0.05), loss, agreement, n_texts=9, n_tokens=900)
    replace(Profile.load(profile_path), tuned=tuned).save(profile_path)
    return profile_path


def test_a_tuned_profile_alone_asks_for_its_plan(run: Run, tiny: Any, tuned_path: Path, measures: list[Bench]) -> None:
    assert run(tiny(), "--profile", tuned_path, "--contexts", 16).exit_code == 0
    assert {name: plan.prefill.ffn for name, plan in measures[0].result.plans.items()} == {"tuned": (1,)}


def test_the_profile_beside_the_model_is_used_where_plans_need_one(
    run: Run, tiny: Any, tuned_path: Path, measures: list[Bench], tmp_path: Path
) -> None:
    model = tmp_path / "m.gguf"
    model.write_bytes(tiny().read_bytes())
    Profile.load(tuned_path).save(tmp_path / "m.adaskip.json")
    result = run(model, "--contexts", 16, "--tuned", "--skip", 1)
    assert result.exit_code == 0 and "The profile is" in result.stderr and "calibrating" not in result.stderr
    assert list(measures[0].result.plans) == ["tuned", "adaskip 1"]
    assert run(model, "--contexts", 16).exit_code == 0
    assert measures[1].result.plans == {}


def test_a_tuned_plan_that_is_not_there_is_one_line(run: Run, tiny: Any, profile_path: Path) -> None:
    assert "adaskip-cpp tune" in line(run(tiny(), "--tuned", "--contexts", 16))
    assert "adaskip-cpp tune" in line(run(tiny(), "--tuned", "--profile", profile_path, "--contexts", 16))


def test_layers_without_compensation_need_no_profile(run: Run, tiny: Any, measures: list[Bench]) -> None:
    result = run(tiny(), "--ffn", "1", "--compensation", "none", "--contexts", 16)
    assert result.exit_code == 0 and "calibrating" not in result.stderr
    assert measures[0].result.plans["1 FFN"].compensation == "none"


def test_without_a_profile_it_says_that_it_calibrates(
    run: Run, tiny: Any, measures: list[Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_bench, "_N_TOKENS", 24)
    monkeypatch.setattr(cli_bench, "_N_DECODE", 2)
    result = run(tiny(), "--skip", "2", "--contexts", 16)
    assert result.exit_code == 0 and "No --profile: calibrating on 6 requests of 24 tokens" in result.stderr
    assert measures[0].result.plans["adaskip 2"].prefill.n_skip == 2


def test_what_is_run_is_what_the_options_say(run: Run, tiny: Any, measures: list[Bench]) -> None:
    args = ("--repeats", 3, "--decode-tokens", 5, "--threads", 2, "--gpu-layers", 7, "--flash-attn", "--no-stock")
    assert run(tiny(), "--contexts", 16, *args).exit_code == 0
    settings = measures[0].result.settings
    assert (settings.n_rounds, settings.n_decode, settings.n_threads, settings.n_gpu_layers) == (3, 5, 2, 7)
    assert settings.flash_attention and list(measures[0].result.times.contenders) == [NO_PLAN]


# --- results ----------------------------------------------------------------------------------------------------------


def test_it_prints_ratios_the_ideal_memory_and_the_configuration(
    run: Run, tiny: Any, profile_path: Path, measures: list[Bench]
) -> None:
    result = run(tiny(), "--profile", profile_path, "--skip", 2, "--contexts", 16)
    assert result.exit_code == 0
    for words in (
        "Time to first token, prompt of 16 tokens, 12 rounds",
        "Time per token, prompt of 16 tokens",
        "1.25 x as fast",
        "no real difference",
        "1.33 x",  # ideal: 2 / (2 - (0.6 - 0.1))
        "93.8%",  # 1.25 of 1.333
        "100 MB",
        "not told",
        "all layers offloaded to: a GPU",
        "llama-cpp-python 0.3.36",
        "F16/F16",
        "flash attention off",
        "2 of 6 sublayers skipped in prefill",
        "load average",
    ):
        assert words in result.stdout, words


def test_without_the_ideal_nothing_is_said_of_it(
    run: Run, tiny: Any, profile_path: Path, measures: list[Bench]
) -> None:
    result = run(tiny(), "--profile", profile_path, "--skip", 2, "--contexts", 16, "--no-ideal")
    assert result.exit_code == 0 and "ideal" not in result.stdout


def test_json_has_the_rows_and_every_single_time(
    run: Run, tiny: Any, profile_path: Path, measures: list[Bench]
) -> None:
    args = ("--skip", 2, "--contexts", 16, "--repeats", 2, "--decode-tokens", 3, "--json")
    result = run(tiny(), "--profile", profile_path, *args)
    data = json.loads(result.stdout)
    assert data["complete"] and data["configuration"]["llama_cpp_python"] == "0.3.36"
    assert [contender["name"] for contender in data["contenders"]] == [STOCK, NO_PLAN, "adaskip 2"]
    assert data["contenders"][2]["plan"]["prefill"]["ffn"][0]["layer"] == 2
    times = {each["run"]: each for each in data["times"]}
    assert times["adaskip 2"]["first_token_s"] == [1.6, 1.6] and len(times[STOCK]["token_s"][1]) == 3
    row = next(row for row in data["rows"] if row["contender"] == "adaskip 2" and row["phase"] == "decode")
    assert row["speed_against"][NO_PLAN]["real"] and row["of_ideal"]["value"] == pytest.approx(1.5 / 1.6)


def test_after_ctrl_c_it_prints_what_there_is_and_exits_with_130(
    run: Run, tiny: Any, measures: list[Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Bench.run

    def interrupted(self: Bench) -> BenchResult:
        result = whole(self)
        result.complete = False
        return result

    monkeypatch.setattr(Bench, "run", interrupted)
    result = run(tiny(), "--contexts", 16)
    assert result.exit_code == 130 and "prompt of 16 tokens" in result.stdout
    assert "Error: interrupted" in result.stderr


def test_after_a_contender_died_it_prints_what_there_is_and_the_reason(
    run: Run, tiny: Any, measures: list[Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Bench.run

    def died(self: Bench) -> BenchResult:
        result = whole(self)
        result.complete, result.error = False, NativeError("the process of 'stock' ended; use less")
        return result

    monkeypatch.setattr(Bench, "run", died)
    result = run(tiny(), "--contexts", 16)
    assert result.exit_code == 1 and "prompt of 16 tokens" in result.stdout
    assert "the process of 'stock' ended" in result.stderr.splitlines()[-1]


def test_a_busy_machine_is_warned_of(
    run: Run, tiny: Any, measures: list[Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (2.5, 0, 0))
    assert "Warning: the load average is 2.5" in run(tiny(), "--contexts", 16).stderr
    monkeypatch.setattr("os.getloadavg", lambda: (0.05, 0, 0))
    assert "Warning" not in run(tiny(), "--contexts", 16).stderr


@pytest.mark.parametrize(("target", "stem"), [("pictures/", "pictures/bench"), ("pictures/mine.png", "pictures/mine")])
def test_it_draws_times_and_ratios(
    run: Run, tiny: Any, profile_path: Path, measures: list[Bench], tmp_path: Path, target: str, stem: str
) -> None:
    pytest.importorskip("matplotlib")
    args = ("--profile", profile_path, "--skip", "1,2", "--contexts", "8,16", "--plot", f"{tmp_path}/{target}")
    assert run(tiny(), *args).exit_code == 0
    for name in (f"{stem}-times", f"{stem}-ratios"):
        assert (tmp_path / f"{name}.png").read_bytes()[1:4] == b"PNG"
        assert b"<svg" in (tmp_path / f"{name}.svg").read_bytes()


def test_one_round_and_one_decoded_token_are_shown_and_drawn_without_intervals(
    run: Run, tiny: Any, profile_path: Path, measures: list[Bench], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    args = ("--skip", 2, "--contexts", 16, "--repeats", 1, "--decode-tokens", 1, "--plot", tmp_path)
    result = run(tiny(), "--profile", profile_path, *args)
    assert result.exit_code == 0, result.output
    assert "measured once" in result.stdout and "nan" not in result.stdout
    assert (tmp_path / "bench-ratios.png").exists()


@pytest.mark.parametrize(
    ("value", "words"), [(0.012345, "12.3 ms"), (0.9, "900 ms"), (1.234, "1.23 s"), (123.4, "123 s")]
)
def test_times_are_told_to_three_digits(value: float, words: str) -> None:
    assert seconds(value) == words


# --- the whole of it --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_measures_a_tiny_model_end_to_end(run: Run, tiny: Any, profile_path: Path) -> None:
    args = ("--skip", "2", "--contexts", "8,16", "--repeats", 3, "--decode-tokens", 4, "--threads", 1, "--json")
    result = run(tiny(), "--profile", profile_path, *args)
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert len(data["rows"]) == 3 * 2 * 2 and all(row["n_rounds"] == 3 for row in data["rows"])
    stock, full, skipped = data["contenders"]
    assert full["kv_bytes"] * 2 == skipped["kv_bytes"] * 3 and stock["nodes"] == full["nodes"] > skipped["nodes"]
    assert full["graphs_reused"] == stock["graphs_reused"] > 0
    assert min(each for contender in data["contenders"] for each in [contender["peak_bytes"]]) > 10**7
    assert data["machine"]["n_threads"] == 1 and data["machine"]["type_k"] == "F16"


@pytest.mark.slow
def test_a_real_ctrl_c_prints_what_was_measured(tiny: Any) -> None:
    code = (
        # A shell that runs the tests in the background has them ignore the signal.
        "import signal, sys, adaskip_cpp\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from adaskip_cpp.cli.terminal import Verbs\nfrom adaskip_cpp.cli.bench import bench\n"
        "Verbs(name='adaskip-cpp', commands={'bench': bench}).main(sys.argv[1:])"
    )
    args = ["bench", str(tiny()), "--contexts", "8", "--repeats", "1000000", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    while "Measuring for about" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(3)  # some rounds
    process.send_signal(signal.SIGINT)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Time to first token, prompt of 8 tokens" in out, err
    assert err.splitlines()[-1] == "Error: interrupted"
