"""Measures a client's time to the first token of a server, for questions about documents. Start at :func:`main`.

    python benchmarks/serve.py MODEL.gguf [--plan auto|none|PLAN] [--tokens 4000] [--rounds 2] [--ctx 8192]

`adaskip-cpp serve` runs against llama-cpp-python's own server, `python -m llama_cpp.server`, without and with its
cache, on one machine, in turn, with the same model, context, threads and flash attention. Each reads a short prompt
first. A round has three new documents from Python's sources. It asks three questions about one, then two about all
three in turn. At the end, our server is restarted on the same --cache-dir, and asked about all three.

Times are those from sending a request to the first piece of its answer. Run it on an idle machine: SmolLM2 takes 10
minutes on 2 slow cores. benchmarks/agent.py measures a day of an agent with the same servers.
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
from typing import TYPE_CHECKING, NamedTuple

from adaskip_cpp import AdaSkipLlama
from adaskip_cpp.engine.cores import physical_cores
from adaskip_cpp.intervals import ratio_interval

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    Messages = list[dict[str, str]]

OURS, STOCK, CACHED = "adaskip-cpp serve", "llama_cpp.server", "llama_cpp.server --cache true"
QUESTIONS = ("What is this text about?", "Which functions does it define?", "What would you improve in it?")
CASES = (
    "the first question about a document",
    "the second and third",
    "the first about two further ones",
    "three documents in turn, once more",
    "the same after a restart",
)


def sources() -> dict[str, bytes]:
    """Return the modules of the standard library, by name."""
    return {path.stem: path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))}


def beginnings(tokenizer: AdaSkipLlama, texts: Iterable[bytes], sizes: list[int]) -> list[str]:
    """Return, for each size in tokens, the beginning of the next text that is long enough."""
    found: list[str] = []
    for text in texts:
        tokens, size = tokenizer.tokenize(text, add_bos=False), sizes[len(found)]
        if len(tokens) >= size:
            found.append(tokenizer.detokenize(tokens[:size]).decode("utf-8", "ignore"))
        if len(found) == len(sizes):
            return found
    raise SystemExit(f"{len(sizes)} texts of {max(sizes)} tokens are needed, there are {len(found)}; ask for less")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def server(name: str, args: argparse.Namespace, folder: str, stock: Sequence[str] = ()) -> Iterator[str]:
    """Start a server, yield its address once it answers, and end it as a service manager would.

    llama-cpp-python's server also gets the options ``stock``.
    """
    port, threads = free_port(), str(args.threads)
    if name.startswith(OURS):
        command = [sys.executable, "-c", "from adaskip_cpp.cli.main import main; main()", "serve", args.model]
        command += ["--plan", args.plan, "--ctx", str(args.ctx), "--threads", threads, "--port", str(port)]
        command += ["--flash-attn", "on" if args.flash_attn else "off"]
        command += ["--cache-dir", folder] * bool(folder) + name.split()[2:]
    else:
        command = [sys.executable, "-m", "llama_cpp.server", "--model", args.model, "--n_ctx", str(args.ctx)]
        command += ["--n_threads", threads, "--n_threads_batch", threads, "--port", str(port)]
        command += ["--flash_attn", str(args.flash_attn), "--cache", str(name == CACHED)]
        command += stock
    print(" ".join(command), file=sys.stderr)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            time.sleep(0.1)
            try:
                ask(address, "Hello.")
                break
            except OSError:
                if process.poll() is not None:
                    raise SystemExit(f"{' '.join(command)} ended; run it to see why") from None
        try:
            yield address
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


class Wait(NamedTuple):
    """Seconds from a request to the first piece of its answer, and tokens of its prompt, 0 if not reported."""

    seconds: float
    n_read: int
    n_moved: int


def ask(address: str, prompt: Messages | str, n_most: int = 8) -> Wait:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    body = {"messages": messages, "max_tokens": n_most, "temperature": 0, "stream": True}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), headers)
    start, first, told = time.perf_counter(), 0.0, {}
    with urllib.request.urlopen(request, timeout=3600) as answer:
        for line in answer:
            now = time.perf_counter() - start
            if line.startswith(b"data: {"):
                event = json.loads(line.removeprefix(b"data: "))
                if "choices" not in event:
                    raise SystemExit(f"{address} answers: {event}")
                if event["choices"][0]["delta"].get("content"):
                    first = first or now
                told = event.get("adaskip", {})
    return Wait(first or now, *(told.get(f"prompt_tokens_{each}", 0) for each in ("read", "moved")))


def ask_documents(args: argparse.Namespace, texts: list[str]) -> None:
    """Ask all servers, in turn, about the documents, and print the table."""
    times: defaultdict[tuple[str, str], list[float]] = defaultdict(list)

    def measure(name: str, case: str, document: str, question: str) -> None:
        times[name, case].append(ask(addresses[name], f"{document}\n\n{question}").seconds)
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
                        measure(name, case, document, question)
        with server(OURS, args, folder) as address:
            addresses = {OURS: address}
            for text in texts[-3:]:
                measure(OURS, CASES[4], text, QUESTIONS[2])

    print(f"| | {OURS} | {STOCK} | {CACHED} | {STOCK} / ours |\n|---|---|---|---|---|")
    for case in CASES:
        each = [times[name, case] for name in (OURS, STOCK, CACHED)]
        cells = [f"{statistics.median(seconds):.2f}" if seconds else "" for seconds in each]
        ratio = ratio_interval(each[1], each[0]) if each[1] else None
        cells.append("" if ratio is None else f"{ratio.value:.1f} ({ratio.low:.1f} to {ratio.high:.1f})")
        print(f"| {case} | {' | '.join(cells)} |")


def options(doc: str | None, *, tokens: int, ctx: int) -> argparse.ArgumentParser:
    """Return a parser with the options of all servers."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--plan", default="auto", help="plan of our server")
    parser.add_argument("--tokens", type=int, default=tokens, help="tokens of a document or of the system prompt")
    parser.add_argument("--ctx", type=int, default=ctx)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--no-flash-attn", dest="flash_attn", action="store_false")
    return parser


def describe(args: argparse.Namespace, what: str, unit: str) -> None:
    """Print what is measured, and how."""
    settings = f"--ctx {args.ctx}, {args.threads} threads, {'' if args.flash_attn else 'no '}flash attention"
    print(f"{Path(args.model).name}, {what} of {args.tokens} tokens, --plan {args.plan}, {settings}", end=", ")
    print(f"llama-cpp-python {version('llama-cpp-python')}. {unit}, medians.\n")


def main() -> None:
    parser = options(__doc__, tokens=4000, ctx=8192)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    with closing(AdaSkipLlama(args.model, vocab_only=True, verbose=False)) as tokenizer:
        texts = beginnings(tokenizer, sources().values(), [args.tokens] * 3 * args.rounds)
    describe(args, "documents", "Seconds to the first token")
    ask_documents(args, texts)


if __name__ == "__main__":
    main()
