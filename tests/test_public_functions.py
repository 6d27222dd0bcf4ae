"""The package's functions for measurements: what they return in Python, and that importing them costs nothing else."""

import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from oracles.profiles import tiny_profile
from oracles.tiny_families import N_CTX_TRAIN

from adaskip_cpp import EvaluationOptions, Running, bench, evaluate
from adaskip_cpp.benchmark.table import NO_PLAN
from adaskip_cpp.errors import DataError, ProfileMismatchError
from adaskip_cpp.pictures import plots

RUNNING = Running(n_threads=1)


def test_bench_returns_rows_of_its_plans_and_refuses_one_of_another_model_at_once(tiny: Any) -> None:
    plans = {"made": tiny_profile(tiny()).plan(2, compensation="none")}
    options: dict[str, Any] = {"contexts": (16,), "n_rounds": 1, "n_decode": 2, "stock": False, "running": RUNNING}
    rows = {(row.contender, row.phase) for row in bench(tiny(), plans, **options).rows}
    assert rows == set(product((NO_PLAN, "made"), ("prefill", "decode")))
    with pytest.raises(ProfileMismatchError, match="another model"):
        bench(tiny(seed=1), plans, **options)


def test_evaluate_returns_what_stands_in_the_folder(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile, text = tiny_profile(tiny()), tmp_path / "text.txt"
    monkeypatch.setattr(plots, "has_matplotlib", lambda: False)
    text.write_text("A fox sleeps, and a dog looks at the fox. " * 20)
    size: dict[str, Any] = {"n_texts": 2, "n_tokens": 24, "n_continuation": 6, "n_rounds": 0}
    options = EvaluationOptions(
        strategies=("adaskip",), n_skips=(2,), modes=("prompt",), text_files=(str(text),), **size
    )
    shares: list[float] = []
    found = evaluate(tiny(), profile, tmp_path / "out", options, running=RUNNING, on_progress=shares.append)
    assert found.n_done == found.n_results and shares[-1] == 1.0
    assert (tmp_path / "out" / "results.json").read_text() == found.to_json()
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
