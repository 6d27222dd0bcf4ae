"""The package's functions for measurements: what they return in Python, and that importing them costs nothing else."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from oracles.profiles import tiny_profile
from oracles.tiny_families import N_CTX_TRAIN

from adaskip_cpp import EvaluationOptions, Running, SkipPlan, bench, evaluate
from adaskip_cpp.benchmark.table import NO_PLAN
from adaskip_cpp.errors import DataError, ProfileMismatchError
from adaskip_cpp.pictures import plots

RUNNING = Running(n_threads=1)


def test_bench_takes_plans_and_returns_rows(tiny: Any) -> None:
    plans = {"mine": SkipPlan.manual(3, ffn=[1]), "made": tiny_profile(tiny()).plan(2, compensation="none")}
    options: dict[str, Any] = {"n_rounds": 1, "n_decode": 2, "stock": False, "running": RUNNING}
    found = bench(tiny(), plans, contexts=(16,), **options)
    assert {(row.contender, row.phase) for row in found.rows} == {
        (name, phase) for name in (NO_PLAN, "mine", "made") for phase in ("prefill", "decode")
    }
    assert found.plans == plans
    assert "3 layers" in found.configuration["Model"] and found.ended_by is None
    with pytest.raises(ProfileMismatchError, match="another model"):
        bench(tiny(seed=1), plans, contexts=(16,), **options)


def test_evaluate_returns_what_stands_in_the_folder(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = tiny_profile(tiny())
    monkeypatch.setattr(plots, "has_matplotlib", lambda: False)
    (tmp_path / "text.txt").write_text("A fox sleeps, and a dog looks at the fox. " * 20)
    options = EvaluationOptions(
        strategies=("adaskip",),
        n_skips=(2,),
        modes=("prompt",),
        text_files=(str(tmp_path / "text.txt"),),
        n_texts=2,
        n_tokens=24,
        n_continuation=6,
        n_rounds=0,
    )
    shares: list[float] = []
    found = evaluate(tiny(), profile, tmp_path / "out", options, running=RUNNING, on_progress=shares.append)
    assert found.n_done == found.n_results and shares[-1] == 1.0
    assert (tmp_path / "out" / "results.json").read_text() == found.to_json()
    tail, mean = (found.contenders[1].figure(name) for name in ("kl_99", "kl"))
    assert tail is not None and mean is not None and tail.n == 12 and tail.mean >= mean.mean
    assert "EvaluationOptions(strategies=('adaskip',)" in found.about.command
    with pytest.raises(DataError, match=rf"made for contexts of {N_CTX_TRAIN} tokens.*\(ctx, --ctx\)"):
        evaluate(tiny(), profile, tmp_path / "out", EvaluationOptions(ctx=N_CTX_TRAIN + 1), running=RUNNING)
    with pytest.raises(DataError, match=r"\(n_tokens, --tokens\).*\(n_continuation, --continuation\)"):
        evaluate(tiny(), profile, tmp_path / "out", EvaluationOptions(n_tokens=7), running=RUNNING)


def test_importing_the_package_imports_no_optional_one() -> None:
    optional = {"matplotlib", "rouge", "fastapi", "adaskip_cpp.pictures"}
    code = f"import sys, adaskip_cpp; print(sorted({optional} & sys.modules.keys()))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
