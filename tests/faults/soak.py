"""Drawn sequences of calls for as long as one likes, on models that stay open, while the process's memory is watched.

    PYTHONPATH=tests python tests/faults/soak.py [--operations 100000] [--seed N]

These are the calls of test_sequences.py and test_several_sequences.py, with the same checks against NumPy after each.
There every sequence opens a model; here each kind of model is opened once, and takes ten sequences in turn with the
other kinds. A check that fails is told, with what draws it again, and the run goes on; the exit code is 1 then. Ctrl-C
and kill end it early, with the same table.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
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

SECONDS = 30  # between two lines of progress


@dataclass(frozen=True)
class Memory:
    """What the process holds after so many operations: resident bytes, those of malloc, and objects of Python."""

    n_operations: int
    resident: int
    malloc: int
    objects: int

    @classmethod
    def now(cls) -> Memory:
        return cls(called.total(), resident_bytes(), malloc_bytes(), sys.getallocatedblocks())


@dataclass
class Soak:
    """One run: models that are open, by kind, and what was counted of each."""

    seed: int
    machines: dict[str, Callable[[], Any]]
    n_sequences: Counter[str] = field(default_factory=Counter)
    n_operations: Counter[str] = field(default_factory=Counter)
    n_failures: Counter[str] = field(default_factory=Counter)
    memory: list[Memory] = field(default_factory=list)

    def run(self, n: int) -> None:
        """Run at least so many operations."""
        start = told = time.monotonic()
        self.memory.append(Memory.now())
        seed = self.seed
        while called.total() < n:
            kind = list(self.machines)[seed % len(self.machines)]
            self._run_one(kind, seed)
            seed += 1
            if 0.1 * n * len(self.memory) <= called.total() < n:
                self.memory.append(Memory.now())
            if time.monotonic() - told > SECONDS:
                told, memory = time.monotonic(), Memory.now()
                print(
                    f"{memory.n_operations:9,} operations, {memory.n_operations / (told - start):4.0f}/s, "
                    f"{memory.resident / 1e6:.1f} MB resident, failures: {self.n_failures.total()}; {kind}",
                    flush=True,
                )

    def _run_one(self, kind: str, seed: int) -> None:
        def machine() -> Any:
            self.n_sequences[kind] += 1
            return self.machines[kind]()

        before = called.total()
        try:
            run_drawn_sequences(hypothesis.seed(seed)(machine), shrinks=False)
        except Exception:
            self.n_failures[kind] += 1
            traceback.print_exc()
            print(f"{kind} failed. Again, with models just opened: make soak SEED={seed} OPERATIONS=1")
            print(f"or, if that passes, with all that went before: make soak SEED={self.seed}", flush=True)
        finally:
            self.n_operations[kind] += called.total() - before

    def table(self, seconds: float) -> str:
        """What was done, and what the process held meanwhile."""
        lines = ["| models | sequences | operations | failures |", "|---|---|---|---|"]
        for kind in [*self.machines]:
            lines.append(
                f"| {kind} | {self.n_sequences[kind]:,} | {self.n_operations[kind]:,} | {self.n_failures[kind]} |"
            )
        totals = [each.total() for each in (self.n_sequences, self.n_operations, self.n_failures)]
        lines.append(f"| all | {totals[0]:,} | {totals[1]:,} | {totals[2]} |")
        lines += ["", "| operation | times |", "|---|---|"]
        lines += [f"| {name.replace('_', ' ')} | {times:,} |" for name, times in called.most_common()]
        lines += ["", "| after operations | MB resident | MB of malloc | objects of Python |", "|---|---|---|---|"]
        for each in self.memory:
            cells = f"{each.resident / 1e6:.2f} | {each.malloc / 1e6:.2f} | {each.objects:,}"
            lines.append(f"| {each.n_operations:,} | {cells} |")
        first, last = self.memory[min(1, len(self.memory) - 1)], self.memory[-1]
        resident, malloc = last.resident / first.resident - 1, last.malloc / first.malloc - 1
        lines += ["", f"seed {self.seed}, {seconds:,.0f} s; since {first.n_operations:,} operations"]
        lines[-1] += f" resident memory {resident:+.2%}, malloc {malloc:+.2%}"
        return "\n".join(lines)


def open_machines(folder: Path) -> dict[str, Callable[[], Any]]:
    """Open a model of every kind; returns what begins a sequence of calls on it.

    Each reads a prompt as long as its context first, without outputs and, where it may be later, observed. Compute
    buffers would else grow, and become resident, whenever a prompt is longer than all that were observed before it; and
    llama.cpp makes a graph of half a megabyte for the first ubatch without outputs.
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


def main() -> int:
    """Run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    args = parser.parse_args()
    print(f"make soak SEED={args.seed} OPERATIONS={args.operations}", flush=True)
    for each in (signal.SIGINT, signal.SIGTERM):  # in the background Ctrl-C is ignored otherwise
        signal.signal(each, signal.default_int_handler)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(args.seed, open_machines(Path(folder)))
        try:
            soak.run(args.operations)
        except KeyboardInterrupt:
            print("ended early")
        soak.memory.append(Memory.now())
        print(soak.table(time.monotonic() - start))
    return 1 if soak.n_failures else 0


if __name__ == "__main__":
    sys.exit(main())
