"""Run the stock llama-cpp-python, with its own libllama, in a process that never imports adaskip_cpp.

Run as a program, this file is the other process, of which there is one for all tests: it reads pickled lists of jobs,
and answers each with the list of their results, or a traceback.
"""

import atexit
import contextlib
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
from oracles import programs
from oracles.rpc_server import register_rpc_server, start_rpc_servers

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
    pickle.dump(jobs, process.stdin)
    process.stdin.flush()
    try:
        answer: list[npt.NDArray[Any]] | str = pickle.load(process.stdout)
    except EOFError:
        _process.cache_clear()
        answer = f"it exited with {process.wait()}"
    if isinstance(answer, str):
        raise RuntimeError(f"stock llama-cpp-python failed:\n{answer}")
    return answer


def environment() -> dict[str, str]:
    """Of a process whose ``llama_cpp`` loads the libllama that it came with."""
    return {key: value for key, value in programs.environment().items() if key != "LLAMA_CPP_LIB_PATH"}


@cache
def _process() -> "subprocess.Popen[bytes]":
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, __file__], env=environment(), stdin=pipe, stdout=pipe)
    atexit.register(process.kill)
    return process


def eval_logits(llm: Any, pieces: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
    """Evaluate pieces with a fresh context of any ``llama_cpp.Llama`` and return logits as ``run_stock`` does."""
    last = []
    llm.reset()
    for piece in pieces:
        llm.eval(list(piece))
        last.append(last_logits(llm))
    return np.array(llm.scores[: llm.n_tokens]) if llm._logits_all else np.array(last)


def last_logits(llm: Any) -> Any:
    """Those of the token that was read last, [n_vocab]."""
    import llama_cpp

    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), (llm.n_vocab(),)).copy()


def _run(job: Job) -> npt.NDArray[Any]:
    import llama_cpp

    params = llama_cpp.llama_model_default_params()
    for name, value in job.model_params.items():
        setattr(params, name, value)
    with mock.patch.object(llama_cpp.llama_cpp, "llama_model_default_params", lambda: params):
        llm = llama_cpp.Llama(job.model, verbose=False, **job.options)
    with contextlib.closing(llm):
        return eval_logits(llm, job.pieces) if job.texts is None else np.array(llm.embed(job.texts))


def main() -> None:
    """Run the jobs of every list from stdin, and answer it."""
    import llama_cpp

    library = Path(llama_cpp.llama_cpp._lib._name).resolve()
    if "adaskip_cpp" in sys.modules or Path(llama_cpp.__file__).resolve().parent not in library.parents:
        raise SystemExit(f"not the stock library: {library}")
    for endpoint in start_rpc_servers(int(os.environ.get(RPC_SERVERS, 0))):
        register_rpc_server(endpoint)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else is printed is no answer
    while True:
        jobs = pickle.load(sys.stdin.buffer)
        try:
            answer: Any = [_run(job) for job in jobs]
        except Exception:
            answer = traceback.format_exc()
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
