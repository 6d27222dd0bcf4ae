"""Drawn sequences of calls for as long as one likes, on models that stay open, while the process's memory is watched.

    PYTHONPATH=tests python tests/faults/soak.py [--operations 100000] [--seed N]

These are the calls of test_sequences.py and test_several_sequences.py, with the same checks against NumPy after each,
but each kind of model is opened once, and takes ten sequences in turn with the other kinds. A failure is told, with
what draws it again, and the run goes on.
"""

import argparse
import random
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis
from oracles.drawn_sequences import called, run_drawn_sequences
from oracles.process_memory import malloc_bytes, resident_bytes
from oracles.reference import ReferenceModel
from oracles.tiny_families import N_LAYER
from oracles.tiny_models import write_model

from adaskip_cpp import SkipPlan
from native import test_sequences, test_several_sequences


def open_machines(folder: Path) -> dict[str, Callable[[], Any]]:
    """Open a model of every kind; returns what begins a sequence of calls on it.

    Each reads a prompt as long as its context first, without outputs and observed, or buffers would grow later.
    """
    paths = {name: write_model(folder / f"{name}.gguf", name) for name in ("llama", "gemma3")}
    models = {name: ReferenceModel(path) for name, path in paths.items()}
    machines: dict[str, Callable[[], Any]] = {}
    for name, kind in test_sequences.KINDS.items():
        llm: Any = test_sequences.WatchedLlama.open(paths[kind.family], kind)
        llm.begin()
        llm.eval_bulk([3] * (llm.n_ctx() - 1))
        llm.reset()
        with llm.collect_statistics(lambda batch: None, keep_logits=True):
            llm.eval([3] * (llm.n_ctx() - 1))
        machines[name] = partial(test_sequences.Calls, paths[kind.family], models[kind.family], kind, llm)
    for name, several in test_several_sequences.KINDS.items():
        unified, options, elided = several
        plan = SkipPlan.manual(N_LAYER, elided) if elided else None
        llm = test_several_sequences.open_with_sequences(paths["llama"], unified, plan=plan, **options)
        llm.eval([3] * (llm.n_ctx() // test_several_sequences.N_SEQ - 1))
        machine = partial(test_several_sequences.Calls, paths["llama"], models["llama"], *several, llm)
        machines[f"several sequences, {name}"] = machine
    return machines


def soak(machines: dict[str, Callable[[], Any]], first_seed: int, n: int) -> int:
    """Run at least ``n`` operations; return the number of failures."""
    n_failures, seed, shown = 0, first_seed, 0
    while called.total() < n:
        if called.total() >= shown:
            show_memory()
            shown += n // 10
        kind = list(machines)[seed % len(machines)]
        try:
            run_drawn_sequences(hypothesis.seed(seed)(partial(machines[kind])), shrinks=False)
        except Exception:
            n_failures += 1
            traceback.print_exc()
            print(f"{kind} failed. Again, with models just opened: make soak SEED={seed} OPERATIONS=1")
            print(f"or, if that passes, with all that went before: make soak SEED={first_seed}", flush=True)
        seed += 1
    return n_failures


def show_memory() -> None:
    resident, malloc, objects = resident_bytes() / 1e6, malloc_bytes() / 1e6, sys.getallocatedblocks()
    held = f"{resident:.2f} MB resident, {malloc:.2f} MB of malloc, {objects:,} objects of Python"
    print(f"{called.total():9,} operations: {held}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    args = parser.parse_args()
    print(f"make soak SEED={args.seed} OPERATIONS={args.operations}", flush=True)
    with tempfile.TemporaryDirectory() as path:
        n_failed = soak(open_machines(Path(path)), args.seed, args.operations)
        show_memory()
    print(f"{n_failed} failures in {dict(called.most_common())}")
    sys.exit(n_failed > 0)
