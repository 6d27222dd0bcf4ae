"""Measures a client's time to the first token of a server, for questions about documents or for a day of an agent.

    python benchmarks/serve.py MODEL.gguf [--plan auto|none|PLAN] [--tokens 4000] [--rounds 2] [--ctx 8192]
    python benchmarks/serve.py MODEL.gguf --agent 30 --tokens 10000 --ctx 16384 [--plan auto|none|PLAN] [--reuse edits]

`adaskip-cpp serve` runs against llama-cpp-python's own server, `python -m llama_cpp.server`, without and with its
cache, on one machine, in turn, with the same model, context, threads and flash attention. Each reads a short prompt
first. A round has three new documents from Python's sources. It asks three questions about one, then two about all
three in turn. At the end, our server is restarted on the same --cache-dir, and asked about all three.

With --agent the servers run one after the other, ours with its default and with `--reuse prefix`. All get the same
requests. The system prompt has --tokens tokens: the date, and descriptions of tools. The date changes every fifth turn,
a tool's text every seventh. A file of up to 1,500 tokens is in the history from the fourth turn on, and a line near its
top changes every third turn. A prompt longer than the context loses the oldest third of its history, but not the file.
The messages are so long that this begins after half of the turns. A turn with two changes counts for the change that
comes first in the table.

Times are those from sending a request to the first piece of its answer. Run it on an idle machine: SmolLM2 takes 10
minutes on 2 slow cores, 30 turns of an agent with a model of 0.5B about two hours. Start at :func:`main`.
"""

from __future__ import annotations

import argparse
import ast
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
from datetime import datetime, timedelta
from importlib.metadata import version
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from adaskip_cpp import AdaSkipLlama
from adaskip_cpp.intervals import ratio_interval
from adaskip_cpp.measuring.cores import physical_cores

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    Messages = list[dict[str, str]]

OURS, STOCK, CACHED = "adaskip-cpp serve", "llama_cpp.server", "llama_cpp.server --cache true"
PREFIX = f"{OURS} --reuse prefix"
QUESTIONS = ("What is this text about?", "Which functions does it define?", "What would you improve in it?")
CASES = (
    "the first question about a document",
    "the second and third",
    "the first about two further ones",
    "three documents in turn, once more",
    "the same after a restart",
)
ANSWER = 16  # tokens of an agent's turn
TURNS = (
    "the first",
    "the date changed",
    "a tool's text changed",
    "the history trimmed",
    "the file edited",
    "a new message alone",
)


def sources() -> dict[str, bytes]:
    """Return the modules of the standard library, by name."""
    return {path.stem: path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))}


def tools() -> Iterator[str]:
    """Yield descriptions of tools: functions of the standard library with docstrings of several lines."""
    for module, source in sources().items():
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and "\n" in (text := ast.get_docstring(node) or ""):
                yield f"\n## {module}.{node.name}({ast.unparse(node.args)})\n{text}\n"


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


def day(args: argparse.Namespace, tokenizer: AdaSkipLlama) -> list[tuple[str, Messages]]:
    """Return the turns of an agent: the change, and the messages. Answers are fixed, so all servers read the same."""
    n_file = min(1500, (args.ctx - args.tokens) // 4)
    n_turn = 2 * (args.ctx - args.tokens - n_file) // max(args.agent, 8)
    [described] = beginnings(tokenizer, ["".join(tools()).encode()], [args.tokens])
    file, *outputs = beginnings(tokenizer, sources().values(), [n_file] + [n_turn] * args.agent)
    lines = file.split("\n")
    middle = described.index("\n", described.rindex("\n## ", 0, len(described) // 2) + 1)

    def prompt(turn: int, first: int) -> Messages:
        """Return the messages of a turn, with the history from the turn ``first`` on."""
        edited = "\n".join([*lines[:3], f"LIMIT = {turn // 3}", *lines[3:]])
        now = datetime(2026, 6, 1, 9) + turn // 5 * timedelta(days=1, minutes=7)
        tool = f"\nVersion {turn // 7} of this tool.\nIt answers within {2 + turn // 7} seconds."
        system = f"You work on Python programs. These are your tools.\nIt is {now:%A, %d %B %Y, %H:%M}.\n"
        messages = [{"role": "system", "content": system + described[:middle] + tool + described[middle:]}]
        for each in range(first, turn + 1):
            shown = f"The file to work on:\n\n{edited}\n\n" if each == max(first, 4) else ""
            messages.append({"role": "user", "content": f"{shown}Step {each} printed:\n\n{outputs[each - 1]}"})
            messages.append({"role": "assistant", "content": f"I have read what step {each} printed, and go on."})
        return messages[:-1]

    def n_tokens(messages: Messages) -> int:
        return sum(10 + len(tokenizer.tokenize(each["content"].encode(), add_bos=False)) for each in messages)

    turns, first = [], 1
    for turn in range(1, args.agent + 1):
        is_trimmed = turn > first and n_tokens(prompt(turn, first)) + ANSWER > args.ctx
        first += -(-(turn - first) // 3) if is_trimmed else 0
        changes = [turn == 1, turn % 5 == 0, turn % 7 == 0, is_trimmed, turn > 4 and turn % 3 == 0, True]
        turns.append((TURNS[changes.index(True)], prompt(turn, first)))
    return turns


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def server(name: str, args: argparse.Namespace, folder: str) -> Iterator[str]:
    """Start a server, yield its address once it answers, and end it as a service manager would."""
    port, threads = free_port(), str(args.threads)
    if name.startswith(OURS):
        command = [sys.executable, "-c", "from adaskip_cpp.cli.main import main; main()", "serve", args.model]
        command += ["--plan", args.plan, "--ctx", str(args.ctx), "--threads", threads, "--port", str(port)]
        command += ["--flash-attn"] * args.flash_attn + ["--cache-dir", folder] * bool(folder) + name.split()[2:]
    else:
        command = [sys.executable, "-m", "llama_cpp.server", "--model", args.model, "--n_ctx", str(args.ctx)]
        command += ["--n_threads", threads, "--n_threads_batch", threads, "--port", str(port)]
        command += ["--flash_attn", str(args.flash_attn), "--cache", str(name == CACHED)]
        # By default it keeps the logits of all tokens, and its cache copies them: a day would take more than 20 GB.
        command += ["--logits_all", "False"] * bool(args.agent)
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


def run_day(args: argparse.Namespace, turns: list[tuple[str, Messages]]) -> None:
    """Ask one server after another for all turns of an agent, and print the table."""
    waits: defaultdict[str, list[Wait]] = defaultdict(list)
    edits = f"{OURS} --reuse {args.reuse}"
    names = (edits, PREFIX, STOCK, CACHED)
    for name in names:
        with server(name, args, "") as address:
            for number, (kind, messages) in enumerate(turns, 1):
                waits[name].append(wait := ask(address, messages, ANSWER))
                print(
                    f"{name}, turn {number}, {kind}: {wait.seconds:.2f} s, {wait.n_read} read, {wait.n_moved} moved",
                    file=sys.stderr,
                )

    print(f"| | turns | {edits} | tokens read | {PREFIX} | tokens read | {STOCK} | {CACHED} | {STOCK} / {edits} |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows = [(kind, [kind == each for each, _ in turns], statistics.median) for kind in TURNS]
    for kind, chosen, combine in [*rows, ("the whole day", [True] * len(turns), sum)]:
        if any(chosen):
            each = {name: list(compress(waits[name], chosen)) for name in names}
            seconds = {name: combine(wait.seconds for wait in each[name]) for name in names}
            cells = [f"{seconds[name]:.2f}" for name in names]
            for place, name in ((1, edits), (3, PREFIX)):
                cells.insert(place, f"{combine(wait.n_read for wait in each[name]):,.0f}")
            print(f"| {kind} | {sum(chosen)} | {' | '.join(cells)} | {seconds[STOCK] / seconds[edits]:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--plan", default="auto", help="plan of our server")
    parser.add_argument("--tokens", type=int, default=4000, help="tokens of a document or of the system prompt")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--agent", type=int, default=0, metavar="TURNS", help="turns of an agent, instead of documents")
    parser.add_argument("--reuse", default="auto", help="reuse of our server for the agent, compared with prefix")
    parser.add_argument("--ctx", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--no-flash-attn", dest="flash_attn", action="store_false")
    args = parser.parse_args()
    with closing(AdaSkipLlama(args.model, vocab_only=True, verbose=False)) as tokenizer:
        if args.agent:
            turns = day(args, tokenizer)
        else:
            texts = beginnings(tokenizer, sources().values(), [args.tokens] * 3 * args.rounds)
    settings = f"--ctx {args.ctx}, {args.threads} threads, {'' if args.flash_attn else 'no '}flash attention"
    what = "a system prompt" if args.agent else "documents"
    print(f"{Path(args.model).name}, {what} of {args.tokens} tokens, --plan {args.plan}, {settings}", end=", ")
    print(f"llama-cpp-python {version('llama-cpp-python')}. Seconds to the first token, medians.\n")
    if args.agent:
        run_day(args, turns)
    else:
        ask_documents(args, texts)


if __name__ == "__main__":
    main()
