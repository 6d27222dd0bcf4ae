"""Compares the speed with Hugging Face transformers: the same F32 weights, the same sublayers skipped.

    pip install -e ".[dev,peer]"
    python benchmarks/peer.py [--lengths 512 2048] [--rounds 15]

SmolLM2 is dequantised to F32 once, and both engines compute with these weights. A short calibration chooses 12
sublayers, without an online stage. In transformers, a layer with a skipped sublayer gets a forward pass that computes
only the other one, and no unused norms. First the logits of both engines are compared, whole and with the plan, in
prefill and in decode. If they differ, nothing is timed.

Then each engine's settings compete. For each prompt length, those with the shortest request (the prompt and the tokens
after it) are timed. Every contender has its own process. They run in turn, in reversed order every second round, after
a warm-up. A ratio compares times of the same round, with a 95% interval. Our Q4_1 file, which users run, is timed too.
Prints Markdown, and progress on standard error. Run it on an idle machine; it takes about half an hour on 2 cores, a
third of it for torch.compile. Start at :func:`main`. (The file is long, because it is one protocol.)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from peer_worker import save_plan

from adaskip_cpp import AdaSkipLlama, SkipPlan, calibrate
from adaskip_cpp.demo import packaged_model
from adaskip_cpp.engine.settings import cost_settings
from adaskip_cpp.intervals import Interval, ratio_interval
from adaskip_cpp.measuring import corpus
from adaskip_cpp.measuring.cores import physical_cores
from adaskip_cpp.measuring.timing import RequestTime, in_turn
from adaskip_cpp.progress import silent

OURS, THEIRS = "adaskip-cpp", "transformers"
N_CHECK, N_CHECK_DECODE = 64, 8
F32, F16 = 0, 1  # ggml's types
TOLERANCE = {F32: 1e-3, F16: 2e-2}  # allowed relative error between the engines, by our KV's type: F16 has 11 bits

Settings = dict[str, Any]
Logits = npt.NDArray[np.float32]

THEIR_SETTINGS: dict[str, Settings] = {
    "SDPA, dynamic cache": {"attention": "sdpa", "cache": "dynamic"},
    "eager attention, dynamic cache": {"attention": "eager", "cache": "dynamic"},
    "SDPA, static cache": {"attention": "sdpa", "cache": "static"},
    "SDPA, static cache, torch.compile": {"attention": "sdpa", "cache": "static", "compile": True},
}
OUR_SETTINGS: dict[str, Settings] = {
    f"flash attention {'on' if flash else 'off'}, KV {name}": {"flash_attn": flash, "type_k": kind, "type_v": kind}
    for flash in (False, True)
    for name, kind in (("F32", F32), ("F16", F16))
}


@dataclass(frozen=True)
class Contender:
    """A model in an engine, with settings of that engine, whole or with a plan."""

    engine: str
    model: Path
    setting: str
    options: Settings
    plan: Path | None = None

    def title(self) -> str:
        """Name a row of the table."""
        file = "F32" if ".F32." in self.model.name else "Q4_1"
        return f"{self.engine}, {file}, {'whole' if self.plan is None else 'skipping'}"


@dataclass
class Worker:
    """A contender's process. Leaving its ``with`` block ends it."""

    contender: Contender
    n_ctx: int
    times: list[RequestTime] = field(default_factory=list)  # of the requests that count
    versions: str = ""  # of its libraries, after the start

    def __enter__(self) -> Worker:
        command = [sys.executable, str(Path(__file__).with_name("peer_worker.py"))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        each = self.contender
        try:
            self.versions = self.ask(
                engine=each.engine,
                model=str(each.model),
                plan=None if each.plan is None else str(each.plan),
                n_ctx=self.n_ctx,
                n_threads=physical_cores(),
                options=each.options,
            )["versions"]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Return the answer to a request. Raises RuntimeError with the engine's message if it failed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def logits(self, prompt: list[int], answer: list[int]) -> tuple[list[int], Logits]:
        """Return the tokens of decode, and logits [n, n_vocab]; see ``peer_worker.Contender``."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "logits.npy")
            tokens = self.ask(do="logits", prompt=prompt, answer=answer, file=str(file))["answer"]
            return tokens, np.load(file)

    def time(self, prompt: list[int], n_decode: int) -> RequestTime:
        """Time one request."""
        answer = self.ask(do="time", prompt=prompt, n_decode=n_decode)
        return RequestTime(answer["first_token_s"], tuple(answer["token_s"]))


def say(line: str) -> None:
    """Show progress."""
    print(line, file=sys.stderr, flush=True)


def f32_model() -> Path:
    """Return SmolLM2 dequantised to F32, written once as the tests do."""
    root = Path(__file__).resolve().parent.parent
    sys.path.insert(0, str(root / "tests"))
    from models import smollm2_f32

    cache = root / "build" / "models"
    cache.mkdir(parents=True, exist_ok=True)
    return Path(smollm2_f32(cache))


def short_calibration(model: Path, n_skip: int, n_requests: int, longest: int) -> tuple[SkipPlan, list[int], str]:
    """Return a plan, a prompt of held-out text and the processor's name."""
    n_threads = physical_cores()
    llm = AdaSkipLlama(str(model), n_ctx=600, n_threads=n_threads, n_threads_batch=n_threads, verbose=False)
    requests = corpus.cut(llm, corpus.text(), n_requests, 512)
    plan = calibrate(llm, requests, cost=False, n_judged=0, on_stage=silent).plan(n_skip, mode="prefill")
    prompt = corpus.cut(llm, corpus.SEPARATOR.join(corpus.held_out().values()), 1, longest)[0]
    cpu = cost_settings(llm).cpu
    llm.close()
    return plan, prompt, cpu


def mixed_plan(n_layer: int) -> SkipPlan:
    """Return a plan for the check alone: attentions and FFNs, scales, and more skipped in decode than in prefill."""
    prefill = SkipPlan.manual(n_layer, [0, 4], [4, 7], 1.1).prefill
    decode = SkipPlan.manual(n_layer, [0, 1, 4, 9], [7, 8], 0.9).decode
    return SkipPlan(prefill, decode)


def compare(ours: Logits, theirs: Logits) -> tuple[float, float, float, bool]:
    """Compare logits ``[n, n_vocab]``.

    Returns the largest difference, the largest relative error of a row, the share of rows with the same best token, and
    whether every other row is a tie within that difference.
    """
    difference = float(np.max(np.abs(ours - theirs)))
    error = float(np.max(np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)))
    best, rows = ours.argmax(axis=1), np.arange(len(ours))
    is_tie = theirs.max(axis=1) - theirs[rows, best] <= 2 * difference
    return difference, error, float(np.mean(best == theirs.argmax(axis=1))), bool(is_tie.all())


def check(title: str, ours: Logits, theirs: Logits, tolerance: float | None) -> None:
    """Print a row of the table of agreement; end the program if the engines compute different models."""
    difference, error, share, is_tie = compare(ours, theirs)
    print(f"| {title} | {len(ours)} | {difference:.2g} | {error:.2g} | {share:.0%} |", flush=True)
    if tolerance is not None and not (error < tolerance and is_tie):
        raise SystemExit(
            f"{title}: the engines disagree (relative error {error:.2g}, allowed {tolerance:.2g}), so there is nothing "
            "to compare; look at read_gguf and skip_sublayers in peer_worker.py."
        )


def check_logits(model: Path, plans: dict[str, Path | None], prompt: list[int]) -> None:
    """Check every token of a short prompt, and some of decode, at the most similar settings. A plan may be None."""
    n_ctx = len(prompt) + N_CHECK_DECODE + 1
    plain = {"logits_all": True}
    for title, each in plans.items():
        say(f"Comparing logits, {title}")
        our = Contender(OURS, model, "", {**OUR_SETTINGS["flash attention off, KV F32"], **plain}, each)
        their = Contender(THEIRS, model, "", {**THEIR_SETTINGS["SDPA, dynamic cache"], **plain}, each)
        with Worker(our, n_ctx) as a, Worker(their, n_ctx) as b:
            answer, ours = a.logits(prompt, [0] * N_CHECK_DECODE)
            _, theirs = b.logits(prompt, answer)
        for phase, part in (("prefill", slice(len(prompt))), ("decode", slice(len(prompt), None))):
            check(f"{title}, {phase}", ours[part], theirs[part], TOLERANCE[F32])


def best_setting(contenders: Sequence[Contender], prompt: list[int], n_decode: int, n_trial: int) -> Contender:
    """Return the contender with the shortest request, and print a row for each."""
    n_ctx = len(prompt) + n_decode + 1
    with ExitStack() as stack:
        workers = []
        failed: dict[str, str] = {}
        for each in contenders:
            say(f"Trying {each.engine}: {each.setting}")
            try:
                worker = stack.enter_context(Worker(each, n_ctx))
                worker.time(prompt, n_decode)
                workers.append(worker)
            except RuntimeError as error:
                failed[each.setting] = str(error)
        if not workers:
            raise SystemExit(f"{contenders[0].engine} fails with all of its settings: {failed}; check its installation")
        for n_round in range(n_trial):
            for index in in_turn(len(workers), n_round):
                workers[index].times.append(workers[index].time(prompt, n_decode))
        total = {w.contender.setting: first_token(w) + n_decode * per_token(w) for w in workers}
        best = min(workers, key=lambda w: total[w.contender.setting])
        for worker in workers:
            mark = "**chosen**" if worker is best else ""
            name = f"{worker.contender.title().rpartition(',')[0]}: {worker.contender.setting}"
            print(f"| {name} | {first_token(worker):.3f} | {per_token(worker) * 1e3:.1f} | {mark} |")
        for setting, reason in failed.items():
            print(f"| {contenders[0].engine}: {setting} | | | fails: {reason} |")
        return best.contender


def first_token(worker: Worker) -> float:
    """Return the median seconds to the first token."""
    return statistics.median(t.first_token_s for t in worker.times)


def per_token(worker: Worker) -> float:
    """Return the median seconds per later token."""
    return statistics.median(t.per_token_s() for t in worker.times)


def ratios(slow: Worker, fast: Worker) -> tuple[str, str]:
    """Return how many times as fast ``fast`` is, to the first token and per token."""

    def cell(x: Interval) -> str:
        return f"{x.value:.2f} ({x.low:.2f} to {x.high:.2f})"

    n = min(len(slow.times), len(fast.times))
    first = [[t.first_token_s for t in worker.times[:n]] for worker in (slow, fast)]
    rest = [[t.per_token_s() for t in worker.times[:n]] for worker in (slow, fast)]
    return cell(ratio_interval(*first)), cell(ratio_interval(*rest))


def measure(chosen: Sequence[Contender], plan: Path, prompt: list[int], n_decode: int, n_rounds: int) -> None:
    """Time the chosen contenders, whole and with the plan, and print the tables of one prompt length.

    ``chosen`` are whole: transformers first, our F32 file second.
    """
    n_ctx = len(prompt) + n_decode + 1
    with ExitStack() as stack:
        workers = []
        for each in (c for whole in chosen for c in (whole, replace(whole, plan=plan))):
            say(f"Starting {each.title()}")
            workers.append(stack.enter_context(Worker(each, n_ctx)))
            workers[-1].time(prompt, n_decode)  # warms up; compiles

        print(f"\n{workers[0].versions}; {workers[2].versions}.")
        print("\nAgreement with transformers at these settings, the last token of the prompt and some of decode:\n")
        print(
            "| logits | tokens | largest difference | largest relative error | same best token |\n|---|---|---|---|---|"
        )
        reference = {}
        for i, skipping in enumerate(("whole", "skipping")):
            answer, ours = workers[2 + i].logits(prompt, [0] * N_CHECK_DECODE)
            _, reference[skipping] = workers[i].logits(prompt, answer)
            tolerance = TOLERANCE[workers[2 + i].contender.options["type_k"]]
            check(workers[2 + i].contender.title(), ours, reference[skipping], tolerance)
        for i, worker in enumerate(workers[4:]):
            # It decodes other tokens, so only the logits of the prompt's last token can be compared.
            _, ours = worker.logits(prompt, [])
            check(worker.contender.title(), ours, reference["skipping" if i % 2 else "whole"][:1], None)

        try:
            for n_round in range(n_rounds):
                say(f"{len(prompt)} tokens, round {n_round + 1} of {n_rounds}")
                times = {i: workers[i].time(prompt, n_decode) for i in in_turn(len(workers), n_round)}
                for i, time in times.items():  # whole rounds only: they are pairs
                    workers[i].times.append(time)
        except KeyboardInterrupt:
            say("stopped; these are the rounds so far")
        if not workers[0].times:
            raise SystemExit("no round was finished; run it again")

        print(f"\nTimes, medians of {len(workers[0].times)} rounds.")
        print("A ratio compares with transformers that skip as much, or with the whole model in the same engine and")
        print("file. Above 1 is faster. 95% intervals are in brackets.\n")
        print("| | first token, s | per token, ms | against transformers: first token | per token ", end="")
        print("| against whole: first token | per token |\n|---|---|---|---|---|---|---|")
        for i, worker in enumerate(workers):
            cells = [worker.contender.title(), f"{first_token(worker):.3f}", f"{per_token(worker) * 1e3:.2f}"]
            cells += ("1", "1") if i < 2 else ratios(workers[i % 2], worker)
            cells += ratios(workers[i - 1], worker) if i % 2 else ("1", "1")
            print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048], help="tokens of the prompts")
    parser.add_argument("--decode", type=int, default=32, help="tokens after each prompt")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--trials", type=int, default=3, help="rounds in which the settings compete")
    parser.add_argument("--skip", type=int, default=12, help="sublayers to skip")
    parser.add_argument("--requests", type=int, default=8, help="calibration requests of 512 tokens")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out torch.compile, which takes a minute or two"
    )
    args = parser.parse_args()

    model, quantised = f32_model(), Path(packaged_model())
    say("Calibrating")
    plan, prompt, cpu = short_calibration(model, args.skip, args.requests, max(*args.lengths, N_CHECK))
    with tempfile.TemporaryDirectory() as folder:
        plan_file = Path(folder, "plan.npz")
        save_plan(plan, plan_file)
        print(f"{cpu}, {physical_cores()} threads, load {os.getloadavg()[0]:.1f}.")
        print(f"{model.name} in both engines, greedy decoding, logits of the last token only.")
        print("transformers in inference mode, in a bare loop instead of generate(); ours in batches of 512 tokens.")
        skipped = plan.prefill
        print(
            f"Skipped, {skipped.n_skip} of {2 * plan.n_layer} sublayers: attention of layers {list(skipped.attention)},"
        )
        print(f"FFN of layers {list(skipped.ffn)}; compensation {plan.compensation}, no online stage.\n")
        print(
            "| logits | tokens | largest difference | largest relative error | same best token |\n|---|---|---|---|---|"
        )
        # The plan may skip attentions only. So a plan of both kinds is checked too, with layer 0 and unequal phases.
        mixed_file = Path(folder, "mixed.npz")
        save_plan(mixed_plan(plan.n_layer), mixed_file)
        check_logits(model, {"whole": None, "skipping": plan_file, "mixed plan": mixed_file}, prompt[:N_CHECK])

        their = {k: v for k, v in THEIR_SETTINGS.items() if not (args.no_compile and v.get("compile"))}
        f16 = {k: v for k, v in OUR_SETTINGS.items() if v["type_k"] == F16}
        groups = ((THEIRS, model, their), (OURS, model, OUR_SETTINGS), (OURS, quantised, f16))
        for length in args.lengths:
            print(f"\n## Prompt of {length} tokens, then {args.decode}\n")
            print(f"Settings, the whole model, medians of {args.trials} rounds:\n")
            print("| | first token, s | per token, ms | |\n|---|---|---|---|", flush=True)
            chosen = [
                best_setting(
                    [Contender(engine, path, *each) for each in group.items()],
                    prompt[:length],
                    args.decode,
                    args.trials,
                )
                for engine, path, group in groups
            ]
            measure(chosen, plan_file, prompt[:length], args.decode, args.rounds)


if __name__ == "__main__":
    main()
