"""The benchmark's arithmetic on synthetic times with known ratios, and its processes on a tiny model."""

import os
import select
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from adaskip_cpp import SkipPlan
from adaskip_cpp.benchmark import bench
from adaskip_cpp.benchmark.bench import Bench, BenchResult, BenchSettings
from adaskip_cpp.benchmark.measure import fit_contexts
from adaskip_cpp.benchmark.process import Worker
from adaskip_cpp.benchmark.table import NO_PLAN, STOCK, BenchTimes, Row, table, verdict
from adaskip_cpp.errors import DataError, NativeError, PlanError
from adaskip_cpp.intervals import Interval
from adaskip_cpp.measuring.timing import RequestTime
from adaskip_cpp.model.plan import OnlineStage

ONE_THREAD = {"n_threads": 1, "n_threads_batch": 1}

# --- from times to a table --------------------------------------------------------------------------------------------


def measured(prompt_s: dict[str, float], n_rounds: int = 20, noise: float = 0.0, seed: int = 0) -> BenchTimes:
    """Runs at one context of 512, of which decode takes a hundredth per token; all share the noise of their round."""
    rng = np.random.default_rng(seed)
    common = np.exp(rng.normal(0, 0.3, n_rounds))
    times = {}
    for name, seconds in prompt_s.items():
        own = seconds * common * np.exp(rng.normal(0, noise, n_rounds))
        times[name, 512] = [RequestTime(s, (9.0, 9.0, s / 100, s / 100)) for s in own.tolist()]
    return BenchTimes([*prompt_s], times)


def row(rows: list[Row], contender: str, phase: str = "prefill", context: int = 512) -> Row:
    (only,) = [each for each in rows if (each.contender, each.phase, each.context) == (contender, phase, context)]
    return only


def test_where_rounds_alone_differ_the_ratios_are_exact_in_both_phases() -> None:
    rows = table(measured({STOCK: 2.0, NO_PLAN: 2.0, "plan": 1.6}))
    for phase in ("prefill", "decode"):
        for each in row(rows, "plan", phase).against.values():
            assert [each.low, each.value, each.high] == pytest.approx([1.25] * 3)
        assert row(rows, NO_PLAN, phase).against[STOCK].value == pytest.approx(1.0)
    assert set(row(rows, NO_PLAN).against) == {STOCK} and set(row(rows, STOCK).against) == {NO_PLAN}


def test_medians_and_quartiles_are_those_of_the_runs() -> None:
    times = BenchTimes([NO_PLAN], {(NO_PLAN, 64): [RequestTime(s, (1.0, 1.0, s)) for s in (5.0, 1.0, 2.0, 4.0, 3.0)]})
    found = row(table(times), NO_PLAN, context=64)
    assert (found.low_s, found.median_s, found.high_s, found.n_rounds) == (2.0, 3.0, 4.0, 5)


def test_an_interrupted_round_does_not_count_and_without_any_there_are_no_rows() -> None:
    times = measured({STOCK: 2.0, NO_PLAN: 2.0, "plan": 1.0}, n_rounds=3)
    times.times[STOCK, 512].append(RequestTime(99.0, (99.0,) * 4))
    times.times[NO_PLAN, 2048] = [RequestTime(1.0, (1.0,))]
    rows = table(times)
    assert {each.context for each in rows} == {512} and {each.n_rounds for each in rows} == {3}
    assert row(rows, STOCK).high_s < 99
    assert table(BenchTimes([STOCK, NO_PLAN])) == []
    assert table(BenchTimes([STOCK, NO_PLAN], {(STOCK, 64): [RequestTime(1.0, (1.0,))]})) == []


def test_tokens_that_the_online_stage_observes_do_not_count() -> None:
    run = RequestTime(1.0, (9.0, 9.0, 2.0, 2.0, 2.0, 1.0, 1.0))
    times = {(name, 64): [run, run] for name in (NO_PLAN, "plan")}
    rows = table(BenchTimes([NO_PLAN, "plan"], times, settle={"plan": 5}))
    assert row(rows, "plan", "decode", 64).median_s == 1.0 and row(rows, NO_PLAN, "decode", 64).median_s == 2.0


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        (Interval(1.42, 1.39, 1.45, 12), "1.42 x as fast (1.39 to 1.45)"),
        (Interval(1.01, 0.98, 1.03, 12), "no real difference (0.980 to 1.030)"),
        (Interval(1.3, 0.9, 1.8, 3), "no real difference (0.90 to 1.80)"),
        (Interval(0.994, 0.991, 0.997, 60), "0.994 x as fast (0.991 to 0.997)"),
        (Interval(1.4, float("nan"), float("nan"), 1), "1.40 x as fast, measured once"),
    ],
)
def test_the_verdict_calls_a_difference_real_only_if_its_interval_leaves_1_out(interval: Interval, words: str) -> None:
    assert verdict(interval) == words


def test_a_row_is_written_as_plain_json() -> None:
    rows = table(measured({NO_PLAN: 2.0, "plan": 1.0}, n_rounds=1))
    full, plan, *_ = (msgspec.json.decode(msgspec.json.encode(each.to_dict())) for each in rows)
    assert full["speed_against"] == {}
    assert plan["speed_against"][NO_PLAN]["low"] is None and not plan["speed_against"][NO_PLAN]["real"]


# --- contexts ---------------------------------------------------------------------------------------------------------


def test_contexts_asked_for_are_measured_as_they_are_and_by_default_those_that_the_model_has_room_for() -> None:
    assert fit_contexts([2048, 512, 512], 8192, 32) == (512, 2048)
    assert fit_contexts(None, 8192, 32) == (512, 2048)
    assert fit_contexts(None, 400, 24) == (376,)
    assert fit_contexts(None, 131072, 32) == fit_contexts(None, 0, 32) == (512, 2048, 8192)


@pytest.mark.parametrize(("contexts", "n_ctx_train"), [([9000], 8192), ([8192], 8192), ([0], 8192), (None, 16)])
def test_a_context_without_room_is_refused(contexts: list[int] | None, n_ctx_train: int) -> None:
    with pytest.raises(DataError, match=r"do not fit into the model's context of .*contexts.*decode-tokens"):
        fit_contexts(contexts, n_ctx_train, 32)


# --- the run ----------------------------------------------------------------------------------------------------------

PLAN = SkipPlan.manual(3, attention=[1], ffn=[2])
CONTEXTS = (600, 640)


@dataclass
class Ran:
    """A benchmark that was run, and what its processes were asked, in order."""

    result: BenchResult
    asked: list[tuple[Any, ...]]


@pytest.fixture(scope="module")
def ran(tiny: Any) -> Ran:
    """Two rounds of stock, no plan, a plan on the tiny model."""
    asked: list[tuple[Any, ...]] = []

    class Noted(Worker):
        def __exit__(self, *exception: object) -> None:
            asked.append(("close", self.name))
            super().__exit__(*exception)

        def open(self, model: str, options: dict[str, Any]) -> dict[str, Any]:
            asked.append(("open", self.name, options))
            return super().open(model, options)

        def time(self, prompt: Sequence[int], n_decode: int) -> RequestTime:
            asked.append(("time", self.name, len(prompt), n_decode))
            return super().time(prompt, n_decode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "Worker", Noted)
        settings = BenchSettings(str(tiny()), CONTEXTS, 2, 4, ONE_THREAD, ONE_THREAD)
        return Ran(Bench(settings, {"plan": PLAN}, [1, 5, 6]).run(), asked)


def test_rounds_are_outermost_and_every_second_one_is_reversed(ran: Ran) -> None:
    names = [call[1:3] for call in ran.asked if call[0] == "time" and call[2] in CONTEXTS]
    turn = [STOCK, NO_PLAN, "plan"]
    assert names == [(name, n) for order in (turn, turn[::-1]) for n in CONTEXTS for name in order]
    assert ran.result.ended_by is None and len(table(ran.result.times)) == 12


def test_each_round_has_new_processes_and_only_that_of_a_plan_is_opened_with_one(ran: Ran) -> None:
    opened = [(name, call[0].get("plan")) for kind, name, *call in ran.asked if kind == "open"]
    assert opened == 2 * [(STOCK, None), (NO_PLAN, None), ("plan", PLAN)]
    assert all(call[2]["n_ctx"] == max(CONTEXTS) + 4 for call in ran.asked if call[0] == "open")
    closed = [call[1] for call in ran.asked if call[0] == "close"]
    assert sorted(closed) == sorted(name for name, _ in opened)


def test_a_new_process_is_warmed_up_by_one_ubatch_at_most(ran: Ran) -> None:
    asked = [call[:1] + call[2:4] for call in ran.asked if call[1] == STOCK and call[0] == "time"]
    timed = [("time", n, 4) for n in CONTEXTS]
    assert asked == [("time", 512, 2), *timed, ("time", 512, 2), *timed]


def test_tokens_that_an_online_stage_observes_settle_if_others_follow() -> None:
    plans = {str(window): SkipPlan(PLAN.prefill, PLAN.decode, online=OnlineStage(window)) for window in (2, 4)}
    never_run = Bench(BenchSettings("m.gguf", (8, 16), 2, 4, {}, {}), {"a": PLAN, **plans}, [1])
    assert never_run.result.times.settle == {"2": 4}


class Clocked:
    """A contender that takes no time."""

    def __init__(self, name: str, side: str) -> None: ...

    def __enter__(self) -> "Clocked":
        return self

    def __exit__(self, *exception: object) -> None: ...

    def open(self, model: str, options: dict[str, Any]) -> dict[str, Any]:
        return {"settings": {}}

    def time(self, prompt: list[int], n_decode: int) -> RequestTime:
        return RequestTime(1.0, (1.0,) * n_decode)


def test_progress_is_the_share_of_the_tokens_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "Worker", Clocked)
    told: list[tuple[float, str]] = []
    settings = BenchSettings("m.gguf", (8, 16), 2, 4, {}, {})
    Bench(settings, {}, [1], stock=False, on_progress=lambda *each: told.append(each)).run()
    runs = [fraction for fraction, words in told if words.startswith("round")]
    assert runs == pytest.approx([0, 8 / 48, 24 / 48, 32 / 48])


# --- real processes, a tiny model -------------------------------------------------------------------------------------

OPTIONS = {"n_ctx": 64, **ONE_THREAD}


def test_stock_runs_on_its_own_library_and_ours_on_ours(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from adaskip_cpp.engine import library as _library

    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(_library.path().parent))
    for side, ours in (("stock", False), ("ours", True)):
        with Worker(side, side) as worker:  # type: ignore[arg-type]
            library = worker.open(str(tiny()), OPTIONS)["library"]
            assert os.path.samefile(library, _library.path()) == ours
            assert len(worker.time([1, 5, 6], 3).token_s) == 3


def test_an_error_of_ours_keeps_its_class(tiny: Any) -> None:
    with Worker("w", "ours") as worker, pytest.raises(PlanError, match="the plan is for 5 layers"):
        worker.open(str(tiny()), {**OPTIONS, "plan": SkipPlan.manual(5, attention=[1])})


class Deadly:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("import os; os.write(2, b'no memory left\\n'); os._exit(3)",)


def test_a_worker_that_dies_is_one_line_with_its_last_words() -> None:
    with Worker("adaskip 12", "ours") as worker, pytest.raises(NativeError) as caught:
        worker.open("m.gguf", {"n_ctx": Deadly()})
    assert "'adaskip 12' ended with code 3" in str(caught.value) and "no memory left" in str(caught.value)
    assert "--contexts" in str(caught.value)


def test_a_model_that_stock_cannot_load_is_told_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(40))
    with Worker(STOCK, "stock") as worker, pytest.raises(NativeError, match="'stock' failed"):
        worker.open(str(tmp_path / "m.gguf"), OPTIONS)


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="nothing tells the end of another's child")
def test_workers_end_when_their_parent_is_killed(tiny: Any) -> None:
    code = (
        "import sys\nfrom adaskip_cpp.benchmark.process import Worker\n"
        "w = Worker('w', 'ours')\nw.open(sys.argv[1], {'n_ctx': 64})\n"
        "print(w._process.pid, flush=True)\nsys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tiny())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
    ended, _, _ = select.select([worker], [], [], 30)
    os.close(worker)
    assert ended
