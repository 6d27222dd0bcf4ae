"""The benchmark's arithmetic on synthetic times with known ratios, and its processes on a tiny model."""

import os
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from adaskip_cpp import SkipPlan
from adaskip_cpp.benchmark import measure
from adaskip_cpp.benchmark.measure import Bench, BenchSettings, fit_contexts
from adaskip_cpp.benchmark.process import Worker
from adaskip_cpp.benchmark.table import NO_PLAN, STOCK, BenchTimes, Row, table, verdict
from adaskip_cpp.engine import library as _library
from adaskip_cpp.errors import DataError, NativeError, PlanError
from adaskip_cpp.intervals import Interval
from adaskip_cpp.measuring.timing import RequestTime
from adaskip_cpp.model.plan import OnlineStage

ONE_THREAD = {"n_threads": 1, "n_threads_batch": 1}


def measured(prompt_s: dict[str, float], n_rounds: int) -> BenchTimes:
    """Runs at one context of 512, of which decode takes a hundredth per token; all share the noise of their round."""
    common = np.exp(np.random.default_rng(0).normal(0, 0.3, n_rounds)).tolist()
    times = {
        (name, 512): [RequestTime(s * each, (9.0, 9.0, s * each / 100, s * each / 100)) for each in common]
        for name, s in prompt_s.items()
    }
    return BenchTimes([*prompt_s], times)


def row(rows: list[Row], contender: str, phase: str = "prefill") -> Row:
    (only,) = [each for each in rows if (each.contender, each.phase) == (contender, phase)]
    return only


def test_where_rounds_alone_differ_the_ratios_are_exact_in_both_phases() -> None:
    rows = table(measured({STOCK: 2.0, NO_PLAN: 2.0, "plan": 1.6}, n_rounds=20))
    for phase in ("prefill", "decode"):
        for each in row(rows, "plan", phase).against.values():
            assert [each.low, each.value, each.high] == pytest.approx([1.25] * 3)
        assert row(rows, NO_PLAN, phase).against[STOCK].value == pytest.approx(1.0)
    assert set(row(rows, NO_PLAN).against) == {STOCK} and set(row(rows, STOCK).against) == {NO_PLAN}


def test_medians_and_quartiles_are_those_of_the_runs() -> None:
    times = BenchTimes([NO_PLAN], {(NO_PLAN, 512): [RequestTime(s, (1.0, 1.0, s)) for s in (5.0, 1.0, 2.0, 4.0, 3.0)]})
    found = row(table(times), NO_PLAN)
    assert (found.low_s, found.median_s, found.high_s, found.n_rounds) == (2.0, 3.0, 4.0, 5)


def test_an_interrupted_round_does_not_count_and_without_any_there_are_no_rows() -> None:
    times = measured({STOCK: 2.0, NO_PLAN: 2.0, "plan": 1.0}, n_rounds=3)
    times.times[STOCK, 512].append(RequestTime(99.0, (99.0,) * 4))
    times.times[NO_PLAN, 2048] = [RequestTime(1.0, (1.0,))]
    rows = table(times)
    assert {each.context for each in rows} == {512} and {each.n_rounds for each in rows} == {3}
    assert row(rows, STOCK).high_s < 99
    assert table(BenchTimes([STOCK, NO_PLAN], {(STOCK, 64): [RequestTime(1.0, (1.0,))]})) == []


def test_tokens_that_the_online_stage_observes_do_not_count_if_others_follow() -> None:
    plan = SkipPlan.manual(3, ffn=[2])
    plans = {str(window): SkipPlan(plan.prefill, plan.decode, online=OnlineStage(window)) for window in (3, 7)}
    times = Bench(BenchSettings("m.gguf", (512,), 2, 7, {}, {}), plans, [1], stock=False).result.times
    run = RequestTime(1.0, (9.0, 9.0, 2.0, 2.0, 2.0, 1.0, 1.0))
    times.times.update({(name, 512): [run, run] for name in (NO_PLAN, *plans)})
    found = {name: row(table(times), name, "decode").median_s for name in (NO_PLAN, *plans)}
    assert found == {NO_PLAN: 2.0, "3": 1.0, "7": 2.0}


def test_the_verdict_calls_a_difference_real_only_if_its_interval_leaves_1_out() -> None:
    assert verdict(Interval(1.42, 1.39, 1.45, 12)) == "1.42 x as fast (1.39 to 1.45)"
    assert verdict(Interval(1.01, 0.98, 1.03, 12)) == "no real difference (0.980 to 1.030)"
    assert verdict(Interval(1.4, float("nan"), float("nan"), 1)) == "1.40 x as fast, measured once"


def test_a_row_is_written_as_plain_json() -> None:
    rows = table(measured({NO_PLAN: 2.0, "plan": 1.0}, n_rounds=1))
    full, plan, *_ = (msgspec.json.decode(msgspec.json.encode(each.to_dict())) for each in rows)
    assert full["speed_against"] == {}
    assert plan["speed_against"][NO_PLAN]["low"] is None and not plan["speed_against"][NO_PLAN]["real"]


def test_contexts_asked_for_are_measured_as_they_are_and_by_default_those_that_the_model_has_room_for() -> None:
    assert fit_contexts([2048, 512, 512], 8192, 32) == (512, 2048)
    assert fit_contexts(None, 8192, 32) == (512, 2048)
    assert fit_contexts(None, 400, 24) == (376,)
    assert fit_contexts(None, 131072, 32) == fit_contexts(None, 0, 32) == (512, 2048, 8192)


@pytest.mark.parametrize(("contexts", "n_ctx_train"), [([8161], 8192), ([0], 8192), (None, 16)])
def test_a_context_without_room_is_refused(contexts: list[int] | None, n_ctx_train: int) -> None:
    with pytest.raises(DataError, match=r"do not fit into the model's context of .*contexts.*decode-tokens"):
        fit_contexts(contexts, n_ctx_train, 32)


PLAN = SkipPlan.manual(3, attention=[1], ffn=[2])
CONTEXTS = (600, 640)


def test_rounds_have_new_processes_that_take_turns_and_every_second_one_is_reversed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    shares: list[float] = []

    class Noted:
        """A contender that takes no time."""

        def __init__(self, name: str, side: str) -> None:
            self.name = name

        def __enter__(self) -> "Noted":
            return self

        def __exit__(self, *exception: object) -> None:
            asked.append(("close", self.name))

        def open(self, model: str, options: dict[str, Any]) -> dict[str, Any]:
            asked.append(("open", self.name, options))
            return {"settings": None}

        def time(self, prompt: Sequence[int], n_decode: int) -> RequestTime:
            asked.append(("time", self.name, len(prompt), n_decode))
            return RequestTime(1.0, (1.0,) * n_decode)

    monkeypatch.setattr(measure, "Worker", Noted)
    settings = BenchSettings("m.gguf", CONTEXTS, 2, 4, {"n_ubatch": 8}, {"n_ubatch": 9})
    run = Bench(settings, {"plan": PLAN}, [1, 5, 6], on_progress=lambda share, words="": shares.append(share))
    result = run.run()
    assert result.ended_by is None and len(table(result.times)) == 12

    turn = [STOCK, NO_PLAN, "plan"]
    options: dict[str, Any] = {STOCK: {"n_ubatch": 9}, NO_PLAN: {"n_ubatch": 8}, "plan": {"n_ubatch": 8, "plan": PLAN}}
    rounds = [
        [
            *(("open", name, {**options[name], "n_ctx": max(CONTEXTS) + 4}) for name in turn),
            *(("time", name, 512, 2) for name in turn),  # warms up
            *(("time", name, n, 4) for n in CONTEXTS for name in order),
            *(("close", name) for name in reversed(turn)),
        ]
        for order in (turn, turn[::-1])
    ]
    assert asked == rounds[0] + rounds[1]
    n_read = np.cumsum([0, *(n for _ in range(2) for n in CONTEXTS for _ in turn)])
    assert shares[-12:] == pytest.approx(n_read[:-1] / n_read[-1]), "of the tokens"


OPTIONS = {"n_ctx": 64, **ONE_THREAD}


def test_stock_runs_on_its_own_library_and_ours_on_ours(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
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
