"""Run the stock llama-cpp-python, with its own libllama, in a process that never imports adaskip_cpp.

The functions at the top are the only ones meant for tests. Run as a program, this file is the other process, of which
there is one for all tests: it reads a list of jobs per line and leaves their results as files.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from oracles import programs
from oracles.rpc_server import register_rpc_server, start_rpc_servers

__all__ = ["EXACT", "OPTIONS", "RPC_SERVERS", "Job", "eval_logits", "run_stock"]

RPC_SERVERS = "ADASKIP_TESTS_RPC_SERVERS"
"""Environment variable: the number of rpc-servers whose devices models run on, of this process and of the other."""

# GGML_TYPE_F32 for K and V (the default F16 rounds them), no flash attention, and one thread: a tiny model is done
# before a second one wakes up.
EXACT: dict[str, Any] = {"type_k": 0, "type_v": 0, "flash_attn": False, "n_threads": 1, "n_threads_batch": 1}
OPTIONS: dict[str, Any] = {"n_ctx": 128, "logits_all": True, **EXACT}
"""What ``open_model`` of conftest.py opens models with."""


@dataclass(frozen=True)
class Job:
    """One model and the pieces of tokens to evaluate, one after another, in one context; or texts to embed at once."""

    model: str
    pieces: list[list[int]]
    options: dict[str, Any] = field(default_factory=dict)
    texts: list[str] | None = None
    model_params: dict[str, Any] = field(default_factory=dict)  # fields that ``Llama`` has no argument for


def run_stock(jobs: Sequence[Job]) -> list[npt.NDArray[Any]]:
    """Run all jobs in the other process, whose traceback is raised if one fails.

    Returns per job the logits, float32 [n_tokens, n_vocab] with ``logits_all``, else [n_pieces, n_vocab]; or the
    embeddings of its texts, [n_texts, n_embd].
    """
    process = _process()
    assert process.stdin is not None and process.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        process.stdin.write(json.dumps({"jobs": [asdict(job) for job in jobs], "folder": folder}) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            _process.cache_clear()
            raise RuntimeError(f"stock llama-cpp-python exited with {process.wait()}")
        if error := json.loads(answer)["error"]:
            raise RuntimeError(f"stock llama-cpp-python failed:\n{error}")
        return [np.load(Path(folder, f"{index}.npy")) for index in range(len(jobs))]


def environment() -> dict[str, str]:
    """Of a process whose ``llama_cpp`` loads the libllama that it came with."""
    return {key: value for key, value in programs.environment().items() if key != "LLAMA_CPP_LIB_PATH"}


@cache
def _process() -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, __file__], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(process.kill)
    return process


def eval_logits(llm: Any, pieces: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
    """Evaluate pieces with a fresh context of any ``llama_cpp.Llama`` and return logits as ``run_stock`` does."""
    import llama_cpp

    last = []
    llm.reset()
    for piece in pieces:
        llm.eval(list(piece))
        row = llama_cpp.llama_get_logits_ith(llm._ctx.ctx, -1)
        last.append(np.ctypeslib.as_array(row, shape=(llm.n_vocab(),)).copy())
    return np.array(llm.scores[: llm.n_tokens]) if llm._logits_all else np.array(last)


def main() -> None:
    """Run the jobs of every line of stdin, and answer each with a line."""
    import llama_cpp

    library = Path(llama_cpp.llama_cpp._lib._name).resolve()
    if "adaskip_cpp" in sys.modules or Path(llama_cpp.__file__).resolve().parent not in library.parents:
        raise SystemExit(f"not the stock library: {library}")
    for endpoint in start_rpc_servers(int(os.environ.get(RPC_SERVERS, 0))):
        register_rpc_server(endpoint)
    default_params = llama_cpp.llama_model_default_params
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer
    for line in sys.stdin:
        request, error = json.loads(line), None
        try:
            for index, job in enumerate(request["jobs"]):
                params = default_params()
                for name, value in job["model_params"].items():
                    setattr(params, name, value)
                llama_cpp.llama_cpp.llama_model_default_params = lambda params=params: params
                llm = llama_cpp.Llama(job["model"], verbose=False, **job["options"])
                values = eval_logits(llm, job["pieces"]) if job["texts"] is None else np.array(llm.embed(job["texts"]))
                np.save(Path(request["folder"], f"{index}.npy"), values)
                llm.close()
        except Exception:
            error = traceback.format_exc()
        answers.write(json.dumps({"error": error}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
