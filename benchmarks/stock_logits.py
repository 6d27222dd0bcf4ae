"""Logits of a prompt and of an answer to it, by any ``llama_cpp.Llama``; as a program, by stock in its own process.

gpu.py compares the two: a process runs on stock's libllama or on ours, never on both.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Logits", "read", "run_stock"]

Logits = npt.NDArray[np.float32]

_DEVICE = re.compile(r"(ggml_(cuda|vulkan|metal)\w*: .*(\d+ =|name:|family:)|  Device \d+: ).*")
"""What backends say of their devices when they find them."""


def read(llm: Any, prompt: Sequence[int], answer: Sequence[int]) -> Logits:
    """Return the logits behind the prompt and behind each token of the answer, float32 ``[1 + n, n_vocab]``."""
    import llama_cpp

    rows = []
    llm.reset()
    eval_decode = getattr(llm, "eval_decode", llm.eval)
    for evaluate, piece in ((llm.eval, prompt), *((eval_decode, [token]) for token in answer)):
        evaluate(list(piece))
        row = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
        rows.append(np.ctypeslib.as_array(row, shape=(llm.n_vocab(),)).copy())
    return np.array(rows)


def run_stock(
    model: str, options: dict[str, Any], texts: Sequence[tuple[list[int], list[int]]]
) -> tuple[list[Logits], list[str]]:
    """Return what :func:`read` does of each prompt and answer, by stock, and what its log says of the devices."""
    with tempfile.TemporaryDirectory() as folder:
        request = json.dumps([model, options, texts, folder])
        command = [sys.executable, __file__]
        environment = {key: value for key, value in os.environ.items() if key != "LLAMA_CPP_LIB_PATH"}
        done = subprocess.run(command, input=request, capture_output=True, text=True, env=environment)
        if done.returncode != 0:
            raise SystemExit(f"stock llama-cpp-python failed:\n{done.stderr[-2000:]}")
        logits = [np.load(Path(folder, f"{index}.npy")) for index in range(len(texts))]
    return logits, [line.strip() for line in done.stderr.splitlines() if _DEVICE.match(line)]


def main() -> None:
    import llama_cpp

    library = Path(llama_cpp.llama_cpp._lib._name).resolve()
    if "adaskip_cpp" in sys.modules or Path(llama_cpp.__file__).resolve().parent not in library.parents:
        raise SystemExit(f"not the stock library: {library}")
    model, options, texts, folder = json.load(sys.stdin)
    llm = llama_cpp.Llama(model, verbose=True, **options)
    for index, text in enumerate(texts):
        np.save(Path(folder, f"{index}.npy"), read(llm, *text))
    llm.close()


if __name__ == "__main__":
    main()
