"""Attacks `adaskip-cpp serve` and llama-cpp-python's own server with the same hostile requests. Start at :data:`ROWS`.

    pip install "adaskip-cpp[serve]"    # has what `python -m llama_cpp.server` needs, too
    python benchmarks/hostile.py MODEL.gguf [--rows 1 6 8] [--threads 1] > table.md

Each row starts a server, makes its attack, asks for one more completion, and ends the server by SIGTERM. An answer may
take 60 seconds, an end 40. Prints Markdown, and its commands on standard error. SmolLM2 takes half an hour. It needs
Linux: descriptors are limited, and the second client asks from 127.0.0.2.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

OURS, STOCK = "adaskip-cpp serve", "python -m llama_cpp.server"
LIMIT, END, START = 60.0, 40.0, 120.0  # seconds for an answer, for an end, and for a start
KEYS = ("key-of-the-victim", "key-of-the-other")
MARK = "what-a-client-wrote"
NORMAL = 0, -signal.SIGTERM  # normal exit codes after SIGTERM: uvicorn ends itself with that signal


class Server:
    """A server, ours or stock: its process, its log, and methods that send requests."""

    def __init__(self, kind: str, row: Row, model: Path, threads: int, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = int(listener.getsockname()[1])
        self.kind, self.folder, self.log = kind, folder, folder / "log"
        if kind == OURS:
            command = [sys.executable, "-c", "from adaskip_cpp.cli.main import main; main()", "serve", str(model)]
            command += ["--ctx", "2048", "--threads", str(threads), "--port", str(self.port), *row.ours]
        else:
            command = [sys.executable, "-m", "llama_cpp.server", "--model", str(model), "--n_ctx", "2048"]
            command += ["--n_threads", str(threads), "--n_threads_batch", str(threads), "--port", str(self.port)]
            command += row.stock
        row.prepare(folder)
        print(f"row {row.number}: {shlex.join(command)}", file=sys.stderr, flush=True)

        def limit() -> None:
            if row.descriptors:
                resource.setrlimit(resource.RLIMIT_NOFILE, (row.descriptors, row.descriptors))

        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, preexec_fn=limit)
        self.is_ready, end = False, time.monotonic() + START
        while not self.is_ready and self.process.poll() is None and time.monotonic() < end:
            time.sleep(0.2)
            self.is_ready = self.ask("/v1/models", limit=2).status == 200

    def ask(self, path: str, body: Any = None, *, limit: float = LIMIT, key: str = KEYS[0], **more: Any) -> Told:
        """Send a POST, or a GET without a body; ``host`` is a header, ``source`` the client's address."""
        begun = time.monotonic()
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        headers |= {"Host": more["host"]} if "host" in more else {}
        source = (more["source"], 0) if "source" in more else None
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=limit, source_address=source)
        failure = b"no connection"
        try:
            connection.connect()
            failure = b"cut off"
            content = None if body is None else json.dumps(body).encode()
            connection.request("GET" if content is None else "POST", path, content, headers)
            answer = connection.getresponse()
            return Told(answer.status, time.monotonic() - begun, answer.read())
        except TimeoutError:
            return Told(None, time.monotonic() - begun, b"no answer")
        except (OSError, http.client.HTTPException):
            return Told(None, time.monotonic() - begun, failure)
        finally:
            connection.close()

    def complete(self, prompt: str = "a", n: int = 6, **more: Any) -> Told:
        options = {name: more.pop(name) for name in ("key", "source", "limit") if name in more}
        return self.ask("/v1/completions", {"prompt": prompt, "max_tokens": n, **more}, **options)

    def stream(self, **body: Any) -> socket.socket:
        """Ask for a stream, and read nothing of it."""
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", self.port))
        content = json.dumps({"stream": True, **body}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nAuthorization: Bearer {KEYS[0]}\r\n"
        client.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode())
        client.sendall(content)
        return client

    def after(self) -> str:
        """Ask once more, end the server, and return what happened, in words."""
        words = []
        if not _ends(self.process, 1):
            if (told := self.complete(n=1)).status != 200:
                words.append(f"then {told}")
            elif told.seconds > 10:
                words.append(f"the next after {told.seconds:.0f} s")
        is_up = self.process.poll() is None
        if is_up:
            self.process.send_signal(signal.SIGTERM)
            if not _ends(self.process, END):
                self.process.kill()
                return ", ".join([*words, f"**SIGTERM without effect for {END:.0f} s**"])
        code = self.process.wait()
        if not (is_up and code in NORMAL):
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            words.append(f"**{name}{' at its end' if is_up else ''}**")
        return ", ".join(words) or "goes on"


def _ends(process: subprocess.Popen[bytes], seconds: float) -> bool:
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return process.returncode is not None


@dataclass(frozen=True)
class Told:
    """A client's answer. Without a status, ``content`` says why there is none."""

    status: int | None
    seconds: float
    content: bytes

    def __str__(self) -> str:
        what = self.content.decode() if self.status is None else str(self.status)
        return f"{what} {'after' if self.status is None else 'in'} {self.seconds:.1f} s"


@dataclass(frozen=True)
class Row:
    """One attack: number, description, function, and the options of each server.

    ``prepare`` puts files into the server's working directory before the start.
    """

    number: int
    what: str
    do: Callable[[Server], object]
    ours: tuple[str, ...] = ()
    stock: tuple[str, ...] = ()
    prepare: Callable[[Path], object] = lambda folder: None
    descriptors: int = 0
    changes_model: bool = False


# -- the attacks -------------------------------------------------------------------------------------------------------


def grammar(rules: str, **more: Any) -> Callable[[Server], object]:
    return lambda server: server.complete(grammar=rules, **more)


def schema(value: Any) -> Callable[[Server], object]:
    form = {"type": "json_object", "schema": value}
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 6, "response_format": form}
    return lambda server: server.ask("/v1/chat/completions", body)


def idle_connections(server: Server) -> str:
    clients, size = [], server.log.stat().st_size
    for _ in range(150):
        with suppress(OSError):
            clients.append(socket.create_connection(("127.0.0.1", server.port), 1))
    time.sleep(1)
    told = server.ask("/v1/models", limit=10)
    time.sleep(11)
    for client in clients:
        client.close()
    return f"{told}, {(server.log.stat().st_size - size) / 1e6:.1f} MB of log in 12 s"


def guess(server: Server) -> str:
    """Time a right and a wrong guess of the text that another client wrote after a known text."""
    known, secret, other = ("".join(f"{word} {i} " for i in range(150)) for word in ("known", "secret", "other"))
    key = KEYS[1] if server.kind == OURS else KEYS[0]  # stock has one key for all
    seconds = []
    for text in (secret, other):
        server.complete(known + secret, 1)
        seconds.append(server.complete(known + text, 1, key=key).seconds)
    tells = "**the time reveals it**" if seconds[1] > 1.5 * seconds[0] else "not revealed"
    return f"{tells}: {seconds[0]:.1f} s for the right guess, {seconds[1]:.1f} s for a wrong one"


def many_users(server: Server) -> str:
    order: list[str] = []

    def one(user: str, source: str) -> None:
        told = server.complete("a", 2, user=user, source=source)
        order.append(f"{source} {told}")

    waiting = [threading.Thread(target=one, args=(str(i), "127.0.0.1")) for i in range(60)]
    waiting.append(threading.Thread(target=one, args=("", "127.0.0.2")))
    for each in waiting:
        each.start()
        time.sleep(0.01)
    for each in waiting:
        each.join()
    place = next(i for i, each in enumerate(order) if each.startswith("127.0.0.2"))
    return f"answered as number {place + 1} of 61, {order[place].split(maxsplit=1)[1]}"


def reader_of_nothing(server: Server) -> str:
    """Ask for 300 tokens. Stock repeats the client's model name in each one, so a long name fills its pipe early."""
    with server.stream(prompt="a", max_tokens=300, model="m" * 4000):
        time.sleep(3)
        return f"another client: {server.complete(n=1)}"


def metrics(server: Server) -> str:
    with server.stream(prompt="a", max_tokens=300):
        time.sleep(1)
        return str(server.ask("/metrics", limit=10))


def names(server: Server) -> str:
    hosts = f"{socket.gethostname()}.local", "127.x.example"
    return ", ".join(f"{server.ask('/v1/models', host=host).status}" for host in hosts)


def logged(server: Server) -> str:
    told = grammar(f'root ::= "{MARK}')(server)
    return f"{told}, {'**in the log**' if MARK.encode() in server.log.read_bytes() else 'not in the log'}"


def listed(server: Server) -> str:
    command = Path(f"/proc/{server.process.pid}/cmdline").read_bytes()
    return "**the key is there**" if KEYS[0].encode() in command else "the key is not there"


def is_left(server: Server) -> str:
    if server.kind == STOCK:
        return "it has none"
    return "left alone" if [*(server.folder / "cache").glob(".*.tmp")] else "**removed**"


def _folder(path: Path) -> Path:
    """Make the cache folders of both: ours by its option, stock's in its working directory, as it has no option."""
    (path / "cache").mkdir(mode=0o700)
    stock = path / ".cache" / "llama_cache"
    stock.mkdir(parents=True)
    return stock


def open_to_all(path: Path) -> None:
    for each in (_folder(path), path / "cache"):
        each.chmod(0o777)


def with_pipes(path: Path) -> None:
    os.mkfifo(_folder(path) / "cache.db")
    os.mkfifo(path / "cache" / "0.adaskip-prefix")


def with_unfinished(path: Path) -> None:
    _folder(path)
    (path / "cache" / ".0.adaskip-prefix.ab12cd.tmp").write_text("being written")


def with_keys(path: Path) -> None:
    (path / "keys").write_text("\n".join(KEYS))


CHAIN = "root ::= a0\n" + "".join(f"a{i} ::= a{i + 1}\n" for i in range(90_000)) + 'a90000 ::= "a"'
WAYS = "root ::= " + " | ".join(f'[a-z ] root "{letter}"' for letter in "abcdefghijklmnopqrst")
NAMES = [f"name{i}" for i in range(4000)]
MANY = {"type": "object", "properties": {name: {"type": "integer"} for name in NAMES}, "required": NAMES}
PLAIN = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
LETTERS = '("a" | " ")+'
CACHE = {"ours": ("--cache-dir", "cache"), "stock": ("--cache", "true", "--cache_type", "disk")}
KEY_OPTIONS = {"ours": ("--api-key-file", "keys"), "stock": ("--api_key", KEYS[0]), "prepare": with_keys}

ROWS = [
    Row(1, "grammar `<[4294967295]>`", grammar("root ::= <[4294967295]>")),
    Row(1, "grammar of no letter", grammar(r"root ::= [^\x00-\U0010FFFF]")),
    Row(2, "grammar of 90,000 rules in a chain", grammar(CHAIN)),
    Row(3, "30,000 letters `a`, pre-tokenizer tekken", lambda it: it.complete("a" * 30_000), changes_model=True),
    Row(3, "200,001 letters `a`", lambda it: it.complete("a" * 200_001)),
    Row(5, "grammar of 20,000 `[`", grammar("root ::= " + "[" * 20_000)),
    Row(6, "grammar of 20 ways that begin alike", grammar(WAYS, n=40)),
    Row(7, "temperature 1e39, with a grammar", grammar(f"root ::= {LETTERS}", temperature=1e39, **PLAIN)),
    Row(7, "`repeat_penalty` 0, with a grammar", grammar(f"root ::= {LETTERS}", repeat_penalty=0, **PLAIN)),
    Row(8, "150 idle connections, 128 descriptors", idle_connections, descriptors=128),
    Row(9, "guesses of what another client wrote", guess, **KEY_OPTIONS),
    Row(10, "60 values of `user`, then an honest client", many_users),
    Row(11, "a cache folder that all may write", lambda it: "**starts**", **CACHE, prepare=open_to_all),
    Row(12, "a bad grammar: is it in the log?", logged),
    Row(13, "schema of 4,000 required names", schema(MANY)),
    Row(14, "schema with a remote `$ref`", schema({"$ref": "https://example.com/schema"})),
    Row(15, "a reader that takes nothing", reader_of_nothing),
    Row(16, "a file that another server writes, at start", is_left, **CACHE, prepare=with_unfinished),
    Row(17, "a pipe in the cache folder", lambda it: "starts", **CACHE, prepare=with_pipes),
    Row(18, "`/metrics` while the model works", metrics),
    Row(19, "asked as HOST.local, 127.x.example", names),
    Row(20, "the key in the list of processes", listed, **KEY_OPTIONS),
]


def with_tekken(model: Path, folder: Path) -> Path:
    """Return the model with "tekken" as its pre-tokenizer, if the name there has as many letters."""
    content, path = model.read_bytes(), folder / "tekken.gguf"
    value = re.compile(rb"(tokenizer\.ggml\.pre\x08\0\0\0\x06\0{7}).{6}", re.DOTALL)
    path.write_bytes(value.sub(rb"\1tekken", content, count=1))
    return path


def outcome(kind: str, row: Row, args: argparse.Namespace) -> str:
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        model = with_tekken(args.model, folder) if row.changes_model else args.model
        server = Server(kind, row, model, args.threads, folder)
        stack.callback(server.process.wait)
        stack.callback(server.process.kill)
        if not server.is_ready:
            if server.process.poll() is None:
                return f"**no start in {START:.0f} s**"
            last = (server.log.read_text(errors="replace").strip().splitlines() or [""])[-1]
            return f"no start, code {server.process.returncode}: {last[:120]}"
        return f"{row.do(server)}; {server.after()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[row.number for row in ROWS])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.model = args.model.resolve()
    print(f"{args.model.name}, {args.threads} threads, llama-cpp-python {version('llama-cpp-python')}.\n")
    print(f"| # | what | `{STOCK}` | `{OURS}` |\n|---|---|---|---|", flush=True)
    for row in ROWS:
        if row.number in args.rows:
            cells = [outcome(kind, row, args) for kind in (STOCK, OURS)]
            print(f"| {row.number} | {row.what} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
