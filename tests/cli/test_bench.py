"""``adaskip-cpp bench``: its options, what it measures and prints on a tiny model, that nothing measured is lost."""

import io
import json
import signal
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from oracles.command_line import run
from oracles.costs import SETTINGS
from oracles.frontiers import frontier, point
from rich.console import Console

from adaskip_cpp import SkipPlan
from adaskip_cpp.benchmark import measure
from adaskip_cpp.benchmark.measure import BenchResult, BenchSettings
from adaskip_cpp.benchmark.process import Worker
from adaskip_cpp.benchmark.table import NO_PLAN, STOCK, BenchTimes
from adaskip_cpp.cli.bench import print_report
from adaskip_cpp.measuring import running
from adaskip_cpp.measuring.timing import RequestTime
from adaskip_cpp.model.identity import plan_path
from adaskip_cpp.model.plan_file import save_plan
from adaskip_cpp.model.settings import Settings

ONCE = ("--contexts", 16, "--repeats", 1, "--decode-tokens", 2, "--threads", 1)
QUICK = (*ONCE, "--no-stock", "--json")


def ffns(contender: dict[str, Any]) -> list[list[int] | None]:
    """The FFNs that the plan for each context skips in its bulk; None for the whole model."""
    return [plan and plan["bulk"]["skip"]["skip"]["ffn"] for plan in contender["plans"].values()]


def test_the_plan_beside_the_model_is_measured_unless_files_are_named(model: Path, tmp_path: Path) -> None:
    """Plans are named as their files, or by their paths if two files have one name."""
    beside, first, second = Path(plan_path(model)), tmp_path / "a.json", tmp_path / "other" / "a.json"
    second.parent.mkdir()
    for layer, path in enumerate((beside, first, second)):
        save_plan(path, SkipPlan.manual(3, ffn=[layer], phase="bulk"))

    def plans(*named: Path) -> dict[str, Any]:
        result = run("bench", model, *QUICK, *(word for path in named for word in ("--plan", path)))
        return {each["name"]: ffns(each)[0] for each in json.loads(result.stdout)["contenders"][1:]}

    assert plans() == {"tuned": [0]} and plans(first) == {"a.json": [1]}
    assert plans(first, second) == {str(first): [1], str(second): [2]}
    save_plan(beside, SkipPlan.manual(3))
    assert plans() == {}, "it skips nothing"
    beside.write_text("{")
    assert plans() == {} and "The whole model runs: " in run("bench", model, *QUICK).stderr


def test_a_frontier_chooses_a_plan_for_each_context(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the default promise of 0.05. Longer prompts lose more."""
    monkeypatch.setattr("adaskip_cpp.model.frontier.LEAST_CONTEXT", 10)
    careful, fast = (SkipPlan.manual(3, ffn=ffn, phase="bulk") for ffn in ([2], [1, 2]))
    points = [point(careful, 0.03, {32: 1.2}, judged_at=32), point(fast, 0.045, {32: 1.5}, judged_at=32)]
    save_plan(plan_path(model), frontier(points))
    result = run("bench", model, *QUICK, "--contexts", "16,32,64,128")
    (tuned,) = (each for each in json.loads(result.stdout)["contenders"] if each["name"] == "tuned")
    assert [*tuned["plans"]] == ["16", "32", "64", "128"] and ffns(tuned) == [[1, 2], [1, 2], [2], None]
    printed = run("bench", model, *ONCE, "--no-stock", "--contexts", "16,32,128").stdout
    assert "tuned for 16 and 32 tokens: " in printed and "tuned for 128 tokens: the whole model" in printed


@pytest.mark.parametrize(("here", "load"), [(True, 2.5), (False, None)])
def test_ours_has_the_settings_that_tune_found_on_this_machine_and_stock_its_own(
    here: bool, load: float | None, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = Settings(flash_attn=True, n_batch=16, n_ubatch=8)
    found = {**tuned.to_kwargs(), "unpack": []} if here else {}  # JSON has no tuples
    save_plan(plan_path(model), frontier([], settings=tuned))
    monkeypatch.setattr(running, "is_here", lambda machine: here)
    monkeypatch.setattr(measure, "load_average", lambda: load)
    data = json.loads(run("bench", model, *ONCE, "--json").stdout)
    machine, settings = data["machine"], data["settings"]
    assert (machine["flash_attention"], machine["n_ubatch"]) == ((True, 8) if here else (False, 18))
    threads = {"n_threads": 1, "n_threads_batch": 1}  # they were given
    assert settings["stock_options"] == {**threads, "n_gpu_layers": -1}
    assert settings["options"] == {**settings["stock_options"], **found, **threads}
    assert data["complete"] and f"llama-cpp-python {version('llama-cpp-python')}" in data["configuration"]["Versions"]
    assert [each["contender"] for each in data["times"]] == [STOCK, NO_PLAN]
    assert all(len(each["first_token_s"]) == 1 and len(each["token_s"][0]) == 2 for each in data["times"])
    result = run("bench", model, *ONCE)
    for words in ("prompt of 16 tokens, 1 round\n", "measured once", "against stock", "KV in F16 and F16"):
        assert words in result.stdout
    assert ("stock: its own defaults but for your options" in result.stdout) == here and "nan" not in result.stdout
    assert ("Warning: the load average is 2.50" in result.stderr) == (load == 2.5)
    assert ("load average before" in result.stdout) == (load is not None)


@pytest.mark.parametrize(
    ("dies", "code", "reason"), [(False, 130, "interrupted"), (True, 1, "the process of 'no plan' ended with code -9")]
)
def test_what_ends_it_in_the_second_round_is_told_and_the_first_one_is_printed(
    dies: bool, code: int, reason: str, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Worker] = []

    def start(*args: Any) -> Worker:
        started.append(Worker(*args))
        return started[-1]

    def in_turn(n: int, n_round: int) -> list[int]:
        if n_round == 1 and dies:
            started[-1]._process.kill()
        elif n_round == 1:
            signal.raise_signal(signal.SIGINT)
        return list(range(n))

    monkeypatch.setattr(measure, "Worker", start)
    monkeypatch.setattr(measure, "in_turn", in_turn)
    result = run("bench", tiny(), *QUICK, "--repeats", 3, code=code)
    data = json.loads(result.stdout)
    assert not data["complete"] and {row["n_rounds"] for row in data["rows"]} == {1}
    assert reason in result.stderr.splitlines()[-1] and (reason in str(data["error"])) == dies


def test_ratios_stand_below_what_they_compare_with_and_machine_and_plans_are_described() -> None:
    """Stock takes 3 s, no plan 2 s, a plan 1.6 s; a hundredth of it per token."""
    seconds_of = {STOCK: 3.0, NO_PLAN: 2.0, "tuned": 1.6}
    runs = {(name, 16): [RequestTime(s, (s / 100,) * 32)] * 12 for name, s in seconds_of.items()}
    settings = BenchSettings("m.gguf", (16,), 12, 32, {}, {})
    result = BenchResult(settings, {"tuned": SkipPlan.manual(3, [2], [2])}, BenchTimes([*seconds_of], runs))
    result.machine = replace(SETTINGS, devices=("CPU", "a GPU"), n_gpu_layers=-1, n_threads=1, n_threads_batch=1)
    out = io.StringIO()
    print_report(Console(file=out, highlight=False), result)
    printed = " ".join(out.getvalue().split())
    assert "Time to first token, prompt of 16 tokens, 12 rounds median against stock against no plan" in printed
    assert "tuned 1.60 s 1.88 x as fast 1.25 x as fast" in printed and "tuned 16 ms 1.88 x as fast" in printed
    for words in (
        "a CPU, 1 thread,",
        "all layers offloaded to: a GPU",
        "flash attention on",
        "2 of 6 sublayers skipped",
    ):
        assert words in printed


def test_flash_attention_in_prompts_alone_is_not_what_stock_would_make_of_it(model: Path) -> None:
    data = json.loads(run("bench", model, *ONCE, "--flash-attn", "prompts", "--json").stdout)
    settings = data["settings"]
    assert settings["options"]["flash_attn"] == "prompts" and "flash_attn" not in settings["stock_options"]


def test_one_decoded_token_after_the_only_prompt_can_be_timed(model: Path) -> None:
    result = run("bench", model, "--contexts", 16, "--repeats", 1, "--decode-tokens", 1, "--threads", 1)
    assert "prompt of 16 tokens, 1 round" in result.stdout
