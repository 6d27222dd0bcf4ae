"""``adaskip-cpp bench``: its options, what it measures and prints on a tiny model, that nothing measured is lost."""

import io
import json
import signal
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from oracles.command_line import run
from oracles.costs import SETTINGS
from oracles.frontiers import frontier, point
from rich.console import Console

from adaskip_cpp import SkipPlan
from adaskip_cpp.benchmark import bench as bench_run
from adaskip_cpp.benchmark import measure
from adaskip_cpp.benchmark.bench import BenchResult, BenchSettings
from adaskip_cpp.benchmark.process import Worker
from adaskip_cpp.benchmark.table import NO_PLAN, STOCK, BenchTimes
from adaskip_cpp.cli.bench_report import print_report
from adaskip_cpp.measuring import running
from adaskip_cpp.measuring.timing import RequestTime
from adaskip_cpp.model.identity import plan_path
from adaskip_cpp.model.plan_file import save_plan
from adaskip_cpp.model.settings import Settings

ONCE = ("--contexts", 16, "--repeats", 1, "--decode-tokens", 2, "--threads", 1)
QUICK = (*ONCE, "--no-stock", "--json")


def plans(result: Result) -> dict[str, dict[str, Any]]:
    """The plans that were measured after the shortest context, by name, from the JSON output."""
    found = {each["name"]: next(iter(each["plans"].values())) for each in json.loads(result.stdout)["contenders"]}
    return {name: plan for name, plan in found.items() if plan is not None}


def skipped(plan: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Layers whose attention, and layers whose FFN a plan skips in a prompt, or its bulk."""
    of_prompt = plan["bulk"]["skip"] if plan["bulk"] else plan["prefill"]
    return of_prompt["skip"]["attention"], of_prompt["skip"]["ffn"]


# --- plans ------------------------------------------------------------------------------------------------------------


def test_every_file_is_a_plan_by_its_path_if_two_have_one_name(tiny: Any, profile_path: Path, tmp_path: Path) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.json", tmp_path / "other" / "b.json"]
    files[2].parent.mkdir()
    for path, options in zip(files, ((2,), (1,), (1, "--mode", "prefill")), strict=True):
        run("plan", profile_path, "-o", path, "--skip", *options)
    found = plans(run("bench", tiny(), *(word for path in files for word in ("--plan", path)), *QUICK))
    assert [*found] == [*map(str, files)]
    assert [skipped(plan) for plan in found.values()] == [([2], [2]), ([2], []), ([], [2])]
    first, second, of_paper = found.values()
    for plan in (first, second):
        assert (plan["mode"], plan["online"]) == ("prompt", None)
        assert not any(plan[phase]["skip"][kind] for phase in ("prefill", "decode") for kind in ("attention", "ffn"))
    assert second["bulk"]["skip"]["scale"][2][0] == 2.0  # the median ratio
    assert of_paper["bulk"] is None


def test_a_frontier_chooses_a_plan_for_each_context(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the default promise of 0.05. Longer prompts lose more."""
    monkeypatch.setattr("adaskip_cpp.model.frontier.LEAST_CONTEXT", 10)
    careful, fast = (SkipPlan.manual(3, ffn=ffn, phase="bulk") for ffn in ([2], [1, 2]))
    points = [point(careful, 0.035, {32: 1.2}, judged_at=32), point(fast, 0.045, {32: 1.5}, judged_at=32)]
    save_plan(plan_path(model), frontier(points))
    result = run("bench", model, *QUICK, "--contexts", "16,32,64,128")
    (tuned,) = (each for each in json.loads(result.stdout)["contenders"] if each["name"] == "tuned")
    found = {n: plan and skipped(plan)[1] for n, plan in tuned["plans"].items()}
    assert found == {"16": [1, 2], "32": [1, 2], "64": [2], "128": None}
    printed = run("bench", model, *ONCE, "--no-stock", "--contexts", "16,32,128").stdout
    assert "tuned for 16 and 32 tokens: " in printed and "tuned for 128 tokens: the whole model" in printed


def test_the_plan_beside_the_model_is_measured_unless_another_is_named(model: Path, tmp_path: Path) -> None:
    for path, layer in ((plan_path(model), 1), (tmp_path / "a.json", 2)):
        save_plan(path, SkipPlan.manual(3, ffn=[layer]))
    for options, name, layer in (((), "tuned", 1), (("--plan", tmp_path / "a.json"), "a.json", 2)):
        found = plans(run("bench", model, *options, *QUICK))
        assert [*found] == [name] and skipped(found[name]) == ([], [layer])
    save_plan(plan_path(model), SkipPlan.manual(3))
    assert plans(run("bench", model, *QUICK)) == {}, "it skips nothing"
    Path(plan_path(model)).write_text("{")
    result = run("bench", model, *QUICK)
    assert plans(result) == {} and "The whole model runs: " in result.stderr


# --- results ----------------------------------------------------------------------------------------------------------


def test_it_measures_a_tiny_model_against_stock(model: Path) -> None:
    save_plan(plan_path(model), SkipPlan.manual(3, ffn=[1]))
    size = ("--contexts", "8,16", "--repeats", 2, "--decode-tokens", 4, "--threads", 1, "--flash-attn")
    result = run("bench", model, *size, "--json")
    data = json.loads(result.stdout)
    assert data["complete"] and data["machine"]["llama_cpp_python"] == version("llama-cpp-python")
    assert f"llama-cpp-python {version('llama-cpp-python')}" in data["configuration"]["Versions"]
    assert data["machine"]["n_threads"] == 1 and data["machine"]["flash_attention"]
    assert [contender["name"] for contender in data["contenders"]] == [STOCK, NO_PLAN, "tuned"]
    rows = [(row["contender"], row["context"], row["phase"], row["n_rounds"]) for row in data["rows"]]
    assert sorted(rows) == sorted(
        (name, n, phase, 2) for name in (STOCK, NO_PLAN, "tuned") for n in (8, 16) for phase in ("prefill", "decode")
    )
    assert {each["contender"] for each in data["times"]} == {STOCK, NO_PLAN, "tuned"}
    assert all(len(each["first_token_s"]) == 2 and len(each["token_s"][1]) == 4 for each in data["times"])
    assert set(data["rows"][-1]["speed_against"][NO_PLAN]) == {"value", "low", "high", "n", "real", "verdict"}


@pytest.mark.parametrize("here", [True, False])
def test_ours_has_the_settings_that_tune_found_on_this_machine_and_stock_its_own(
    here: bool, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = Settings(flash_attn=True, n_batch=16, n_ubatch=8)
    save_plan(plan_path(model), frontier([], settings=tuned))
    monkeypatch.setattr(running, "is_here", lambda machine: here)
    result = run("bench", model, *ONCE, "--json")
    machine, settings = (json.loads(result.stdout)[part] for part in ("machine", "settings"))
    assert (machine["flash_attention"], machine["n_ubatch"]) == ((True, 8) if here else (False, 18))
    threads = {"n_threads": 1, "n_threads_batch": 1}  # they were given
    assert settings["stock_options"] == {**threads, "n_gpu_layers": -1}
    assert settings["options"] == {**settings["stock_options"], **(tuned.to_kwargs() if here else {}), **threads}
    assert ("stock: with its own defaults" in run("bench", model, *ONCE).stdout) == here


@pytest.mark.parametrize("load", [2.5, 0.05, None])
def test_without_plans_stock_and_ours_are_compared_and_a_busy_machine_is_warned_of_where_its_load_is_told(
    load: float | None, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "load_average", lambda: load)
    result = run("bench", tiny(), *ONCE)
    assert ("Warning: the load average is 2.50" in result.stderr) == (load == 2.5)
    assert ("load average before" in result.stdout) == (load is not None)
    heading = "Time to first token, prompt of 16 tokens, 1 round"
    for words in (heading, "measured once", "stock", "no plan", "KV in F16 and F16"):
        assert words in result.stdout
    assert "nan" not in result.stdout


Second = Callable[[Callable[[], object]], None]


@pytest.fixture
def second_round(monkeypatch: pytest.MonkeyPatch) -> Second:
    """``second_round(f)``: call ``f`` when the second round begins."""

    def at(call: Callable[[], object]) -> None:
        def in_turn(n: int, n_round: int) -> list[int]:
            if n_round == 1:
                call()
            return list(range(n))

        monkeypatch.setattr(bench_run, "in_turn", in_turn)

    return at


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_after_ctrl_c_or_sigterm_it_prints_what_there_is_and_exits_with_130(
    tiny: Any, second_round: Second, number: signal.Signals
) -> None:
    second_round(lambda: signal.raise_signal(number))
    result = run("bench", tiny(), *ONCE, "--no-stock", "--repeats", 3, code=130)
    assert "prompt of 16 tokens, 1 round" in result.stdout
    assert result.stderr.splitlines()[-1] == "Error: interrupted"


def test_after_a_contender_died_it_prints_what_there_is_and_the_reason(
    tiny: Any, second_round: Second, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Worker] = []

    class Known(Worker):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            started.append(self)

    monkeypatch.setattr(bench_run, "Worker", Known)
    second_round(lambda: started[-1]._process.kill())
    result = run("bench", tiny(), *QUICK, "--repeats", 3, code=1)
    data = json.loads(result.stdout)
    assert not data["complete"] and {row["n_rounds"] for row in data["rows"]} == {1}
    assert "the process of 'no plan' ended with code -9" in data["error"]
    assert data["error"] in result.stderr.splitlines()[-1]


# --- what is printed of times that are known --------------------------------------------------------------------------


def test_it_prints_ratios_and_the_configuration() -> None:
    """Stock and no plan take 2 s, a plan 1.6 s; a hundredth of it per token."""
    seconds_of = {STOCK: 2.0, NO_PLAN: 2.0, "tuned": 1.6}
    runs = {(name, 16): [RequestTime(s, (s / 100,) * 32)] * 12 for name, s in seconds_of.items()}
    times = BenchTimes([*seconds_of], runs)
    settings = BenchSettings("m.gguf", (16,), 12, 32, {}, {})
    result = BenchResult(settings, {"tuned": SkipPlan.manual(3, [2], [2])}, times)
    result.machine = replace(SETTINGS, devices=("CPU", "a GPU"), n_gpu_layers=-1, n_threads=1, n_threads_batch=1)
    result.configuration, result.load_average = {"Versions": "adaskip-cpp 0.1.0, llama-cpp-python 0.3.36"}, 0.1
    out = io.StringIO()
    print_report(Console(file=out, highlight=False), result)
    printed = out.getvalue()
    for words in (
        "Time to first token, prompt of 16 tokens, 12 rounds",
        "Time per token, prompt of 16 tokens",
        "1.25 x as fast",
        "no real difference",
        "all layers offloaded to: a GPU",
        "llama-cpp-python 0.3.36",
        "a CPU, 1 thread,",
        "KV in F16 and Q8_0",
        "flash attention on",
        "2 of 6 sublayers skipped",
        "load average",
    ):
        assert words in printed, words
