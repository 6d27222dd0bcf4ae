"""Time to the first token behind the API: a long document asked several questions, and several documents in turn.

    python benchmarks/serve.py MODEL.gguf [--plan auto|PLAN] [--tokens 4000] [--rounds 2] [--ctx 8192]

`adaskip-cpp serve` against llama-cpp-python's own server, `python -m llama_cpp.server`, without and with its cache, on
one machine, in turn, with the same model, context, threads and flash attention; each reads a short prompt first. A
round has three documents of its own, from Python's sources. One is asked three questions; then all three are asked in
turn, twice. At last ours is ended, started again on the same --cache-dir, and asked about all three.

Times are a client's, from sending the request to the first piece of the answer. Run it on an idle machine: SmolLM2
takes 10 minutes on 2 slow cores.
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections import defaultdict
from contextlib import ExitStack, closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from adaskip_cpp import AdaSkipLlama
from adaskip_cpp.intervals import ratio_interval
from adaskip_cpp.measuring.cores import physical_cores

if TYPE_CHECKING:
    from collections.abc import Iterator

OURS, STOCK, CACHED = "adaskip-cpp serve", "llama_cpp.server", "llama_cpp.server --cache true"
QUESTIONS = ("What is this text about?", "Which functions does it define?", "What would you improve in it?")
CASES = (
    "the first question about a document",
    "the second and third",
    "the first about two further ones",
    "three documents in turn, once more",
    "the same after a restart",
)


def documents(model: str, n_tokens: int, n: int) -> list[str]:
    """Texts of so many tokens, of sources of the standard library that are long enough."""
    found: list[str] = []
    with closing(AdaSkipLlama(model, vocab_only=True, verbose=False)) as tokenizer:
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            tokens = tokenizer.tokenize(path.read_bytes(), add_bos=False)
            if len(tokens) >= n_tokens:
                found.append(tokenizer.detokenize(tokens[:n_tokens]).decode("utf-8", "ignore"))
            if len(found) == n:
                return found
    raise SystemExit(f"there are only {len(found)} sources of {n_tokens} tokens; ask for fewer --rounds or --tokens")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def server(name: str, args: argparse.Namespace, folder: str) -> Iterator[str]:
    """Start a server, yield its address once it answers, and end it as a service manager would."""
    port, threads = free_port(), str(args.threads)
    if name == OURS:
        command = [sys.executable, "-c", "from adaskip_cpp.cli.main import main; main()", "serve", args.model]
        command += ["--plan", args.plan, "--ctx", str(args.ctx), "--threads", threads, "--cache-dir", folder]
        command += ["--flash-attn"] * args.flash_attn + ["--port", str(port)]
    else:
        command = [sys.executable, "-m", "llama_cpp.server", "--model", args.model, "--n_ctx", str(args.ctx)]
        command += ["--n_threads", threads, "--n_threads_batch", threads, "--port", str(port)]
        command += ["--flash_attn", str(args.flash_attn), "--cache", str(name == CACHED)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            time.sleep(0.1)
            try:
                first_token(address, "", "Hello.")
                break
            except OSError:
                if process.poll() is not None:
                    raise SystemExit(f"{' '.join(command)} ended; run it to see why") from None
        try:
            yield address
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def first_token(address: str, document: str, question: str) -> float:
    """Seconds until the first piece of the answer."""
    content = f"{document}\n\n{question}" if document else question
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0, "stream": True}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), headers)
    start, first = time.perf_counter(), None
    with urllib.request.urlopen(request, timeout=600) as answer:
        for line in answer:
            if b'"content"' in line and first is None:
                first = time.perf_counter()
    if first is None:
        raise SystemExit("an answer was empty; use another model")
    return first - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--plan", default="auto", help="for ours")
    parser.add_argument("--tokens", type=int, default=4000, help="of a document")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ctx", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--no-flash-attn", dest="flash_attn", action="store_false")
    args = parser.parse_args()
    texts = documents(args.model, args.tokens, 3 * args.rounds)
    times: defaultdict[tuple[str, str], list[float]] = defaultdict(list)

    def ask(name: str, case: str, document: str, question: str) -> None:
        times[name, case].append(first_token(addresses[name], document, question))
        print(f"{name}, {case}: {times[name, case][-1]:.2f} s", file=sys.stderr)

    with tempfile.TemporaryDirectory() as folder:
        with ExitStack() as running:
            addresses = {name: running.enter_context(server(name, args, folder)) for name in (OURS, STOCK, CACHED)}
            for index in range(args.rounds):
                names = [OURS, STOCK, CACHED][:: 1 if index % 2 == 0 else -1]
                trio = texts[3 * index : 3 * index + 3]
                steps = [(CASES[0], trio[0], QUESTIONS[0])]
                steps += [(CASES[1], trio[0], question) for question in QUESTIONS[1:]]
                steps += [(CASES[2], text, QUESTIONS[0]) for text in trio[1:]]
                steps += [(CASES[3], text, QUESTIONS[1]) for text in trio]
                for case, document, question in steps:
                    for name in names:
                        ask(name, case, document, question)
        with server(OURS, args, folder) as address:
            addresses = {OURS: address}
            for text in texts[-3:]:
                ask(OURS, CASES[4], text, QUESTIONS[2])

    settings = f"--ctx {args.ctx}, {args.threads} threads, {'' if args.flash_attn else 'no '}flash attention"
    print(f"{Path(args.model).name}, documents of {args.tokens} tokens, {settings}, llama-cpp-python", end=" ")
    print(f"{version('llama-cpp-python')}. Seconds to the first token, medians.\n")
    print(f"| | {OURS} | {STOCK} | {CACHED} | {STOCK} / ours |\n|---|---|---|---|---|")
    for case in CASES:
        each = [times[name, case] for name in (OURS, STOCK, CACHED)]
        cells = [f"{statistics.median(seconds):.2f}" if seconds else "" for seconds in each]
        ratio = ratio_interval(each[1], each[0]) if each[1] else None
        cells.append("" if ratio is None else f"{ratio.value:.1f} ({ratio.low:.1f} to {ratio.high:.1f})")
        print(f"| {case} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
