"""What is fuzzed: for every kind of input that may come from elsewhere, a function that takes one such input.

The package promises that its own errors alone come out. Whatever else a function raises is a finding, and so is the end
of its process. As a program, ``fuzz_targets.py TARGET FILE...`` takes these files without the fuzzer.
"""

import asyncio
import functools
import hashlib
import hmac
import itertools
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

from faults.abi_calls import Calls, fresh_logits
from faults.preloaded import in_a_fork
from oracles.gguf_files import changed_model
from oracles.questions import LLM, chat
from oracles.served import BULK_PLAN, InProcess
from oracles.tiny_families import ENCODERS, FAMILIES
from oracles.tiny_models import add_chat_template, write_model

from adaskip_cpp import AdaSkipLlama, Profile
from adaskip_cpp.errors import AdaSkipError
from adaskip_cpp.measuring.task_files import task_items
from adaskip_cpp.model.plan_file import load_plan, save_plan
from adaskip_cpp.planning.modes import MODES
from adaskip_cpp.serving.app import make_app
from adaskip_cpp.serving.llama import ServedLlama
from adaskip_cpp.serving.plans import Plans
from adaskip_cpp.serving.prefix_cache import MAGIC, PrefixCache
from adaskip_cpp.serving.request import ServedRequest
from adaskip_cpp.serving.worker import Opening
from adaskip_cpp.serving.workers import Workers

TARGETS: dict[str, Callable[[bytes], None]] = {}

_KEPT = ExitStack()  # what lives as long as the process
SETTINGS: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "verbose": False}


def target(function: Callable[[bytes], None]) -> Callable[[bytes], None]:
    TARGETS[function.__name__] = function
    return function


@functools.cache
def folder() -> Path:
    return Path(_KEPT.enter_context(tempfile.TemporaryDirectory()))


@functools.cache
def source(family: str) -> Path:
    return write_model(folder() / f"{family}.gguf", family)


@functools.cache
def model(family: str = "llama") -> Any:
    return AdaSkipLlama(str(source(family)), **SETTINGS)


def pair(data: bytes) -> Path:
    """Write JSON, and the numbers after its first zero byte to the file beside it, whose hash stands for "SHA256"."""
    text, _, numbers = data.partition(b"\0")
    path = folder() / "x.json"
    path.write_bytes(text.replace(b'"SHA256"', json.dumps(hashlib.sha256(numbers).hexdigest()).encode()))
    path.with_suffix(".bin").write_bytes(numbers)
    return path


@target
def plan(data: bytes) -> None:
    """A plan file: one that is read can be saved, comes back as it was, and a model takes or refuses its plans."""
    with suppress(AdaSkipError):
        found = load_plan(pair(data))
        save_plan(folder() / "again.json", found.plan if found.frontier is None else found.frontier)
        again = load_plan(folder() / "again.json")
        assert again.plans == found.plans and repr(again.frontier) == repr(found.frontier)
        if found.frontier is not None:
            for n_tokens, max_loss in itertools.product((1, 2048, 1 << 20), (0.0, 0.05, 1e300)):
                found.frontier.choose(n_tokens, max_loss)
            found.frontier.readable(0.05, 1 << 20)
        llm = model()
        for each in found.plans:
            llm.reset()
            llm.set_plan(each)
            llm.eval([1, 5, 6])


@target
def profile(data: bytes) -> None:
    """A profile file: one that is read can be saved, comes back as it was, and plans can be made from it or not."""
    with suppress(AdaSkipError):
        found = Profile.load(pair(data))
        found.save(folder() / "again.json")
        assert Profile.load(folder() / "again.json") == found
        for mode in MODES:
            for wanted in ({"n_skip": 3}, {"speedup": 1.2, "context": 2048}):
                with suppress(AdaSkipError):
                    found.plan(mode=mode, **wanted)


@target
def longbench(data: bytes) -> None:
    """Task files: the first line is LongBench's table of prompts, the second that of lengths, the others are items."""
    prompts, _, rest = data.partition(b"\n")
    lengths, _, lines = rest.partition(b"\n")
    paths = [folder() / name for name in ("dataset2prompt.json", "dataset2maxlen.json", "lines.jsonl")]
    for path, content in zip(paths, (prompts, lengths, lines), strict=True):
        path.write_bytes(content)
    with suppress(AdaSkipError):
        for item in task_items(LLM, paths[2:], n_ctx=512, wrap=chat):
            assert 0 <= item.score("Ada, Paragraph 3\n") <= 1
            assert len(item.prompt) + item.max_tokens <= 512


@target
def gguf(data: bytes) -> None:
    """A model with another header, ``{"family": FAMILY, "kv": ...}``, is opened and run by a process of its own.

    See :func:`gguf_files.changed_model`.
    """
    match _read(data):
        case {"family": str() as family} as changes if family in {**FAMILIES, **ENCODERS}:
            path = folder() / "model.gguf"
            try:
                path.write_bytes(changed_model(source(family), changes))
            except (LookupError, RecursionError, TypeError, ValueError):
                return
            in_a_fork(lambda: _open(path))


def _open(path: Path) -> None:
    for number in (signal.SIGABRT, signal.SIGSEGV, signal.SIGFPE, signal.SIGBUS, signal.SIGILL, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)  # a fuzzer's own handlers would report this process, not its parent
    signal.alarm(20)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(ValueError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    with suppress(AdaSkipError):
        llm = AdaSkipLlama(str(path), **SETTINGS)
        assert len(llm.sublayers) == 2 * llm.n_layer
        if llm._ctx.memory is not None:  # llama_cpp.Llama's own eval() is for no others
            llm.eval([0, 0])


ABI_FAMILIES = ("llama", "jamba", "gemma3n", "gemma3", "mamba", "gptneox-parallel")
_expected = functools.cache(lambda family: fresh_logits(model(family)))


@target
def abi(data: bytes) -> None:
    """Calls of adaskip.h, ``{"model": FAMILY, "calls": [[NAME, ARGUMENT, ...], ...]}``, on a tiny model.

    In the contract or not, each returns a code; and after them all the whole model computes what it did before.
    """
    match _read(data):
        case {"model": str() as family, "calls": [*listed]} if family in ABI_FAMILIES:
            pass
        case _:
            return
    expected, llm = _expected(family), model(family)
    with ExitStack() as opened:
        calls = Calls(llm, lambda: opened.enter_context(closing(AdaSkipLlama(llm.model_path, **SETTINGS))))
        for each in listed[:50]:
            if isinstance(each, list) and each:
                calls.run(each[0], each[1:])
    assert fresh_logits(llm) == expected


STATE_FAMILIES = ("llama", "gemma3", "jamba")
FOLDER_KEY, _MAC = bytes(32), 32
READ, OTHER = [1, *range(3, 103)], [1, *range(50, 90)]
"""The prompt whose state is in a file, and one of which nothing is kept."""


def changed_state(content: bytes, changes: dict[str, Any]) -> bytes:
    """Return a file made of a real one.

    ``{"text": T}`` is these bytes alone, as Latin-1. Else ``header`` is put over the header, or in its place where it
    is no dict; ``length`` is what the file says of its length; ``tokens`` replace the tokens; ``put`` is a list of
    [POSITION, VALUE], numbers of 32 bits in the state, from its end where the position is negative; ``repeat`` is how
    often the state is there; ``cut`` leaves so many bytes of the file; ``signed`` has an HMAC of all that.
    """
    if "text" in changes:
        return bytes(changes["text"].encode("latin-1", "replace"))
    start = len(MAGIC) + _MAC + 8
    length = int.from_bytes(content[start - 8 : start], "little")
    header = json.loads(content[start : start + length])
    tokens = content[start + length :][: 4 * header["n_tokens"]]
    state = bytearray(content[start + length + len(tokens) :]) * min(int(changes.get("repeat", 1)), 20)
    for at, value in changes.get("put", ())[:200]:
        first = int(at) % max(len(state) - 3, 1)
        state[first : first + 4] = (int(value) % 2**32).to_bytes(4, "little")
    if "tokens" in changes:
        tokens = b"".join((int(each) % 2**32).to_bytes(4, "little") for each in changes["tokens"])
    other = changes.get("header", {})
    head = json.dumps({**header, **other} if isinstance(other, dict) else other).encode()
    size = (int(changes.get("length", len(head))) % 2**64).to_bytes(8, "little")
    body = size + head + tokens + state
    mac = content[len(MAGIC) : len(MAGIC) + _MAC]
    if changes.get("signed"):
        mac = hmac.digest(FOLDER_KEY, body, "sha256")
    whole = bytes(MAGIC + mac + body)
    return whole[: int(changes["cut"])] if "cut" in changes else whole


class Kept:
    """A model as the server has it, and the file of a prompt that it has read; ``llama`` has a plan with a bulk."""

    def __init__(self, family: str) -> None:
        plans = Plans(BULK_PLAN if family == "llama" else None, None, 0.05, 256)
        self.folder = folder() / f"states-{family}"
        self.elsewhere = folder() / "elsewhere"
        self.llm = ServedLlama(str(source(family)), plans=plans, cache=PrefixCache(1 << 24), **SETTINGS)
        _KEPT.callback(self.llm.close)
        cache = self.opened({})
        self.expected, self.other = self.answer(READ), self.answer(OTHER, reuses=False)
        cache.close()
        (path,) = self.folder.glob("*.adaskip-prefix")
        self.name, self.content = path.name, path.read_bytes()

    def opened(self, files: dict[str, tuple[bytes, str]]) -> PrefixCache:
        """The cache of a folder with these files, links, pipes and folders, and the folder's key if none of them is."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(mode=0o700)
        for name, (content, kind) in {"hmac.key": (FOLDER_KEY, "file"), **files}.items():
            path = self.folder / name
            with suppress(OSError, ValueError):  # a name that no file can have
                if kind == "link":
                    self.elsewhere.write_bytes(content)
                    path.symlink_to(self.elsewhere)
                elif kind == "pipe":
                    os.mkfifo(path)
                elif kind == "folder":
                    path.mkdir()
                else:
                    path.write_bytes(content)
        cache = self.llm.prefix_cache = PrefixCache(1 << 24, self.folder)
        cache.can_rewind = not self.llm.has_state
        return cache

    def answer(self, prompt: list[int], *, reuses: bool = True) -> list[int]:
        self.llm.request = ServedRequest(reuses=reuses)
        with closing(self.llm.generate(prompt, temp=0)) as steps:
            return list(itertools.islice(steps, 3))


_kept = functools.cache(Kept)


@target
def state(data: bytes) -> None:
    """A folder of cached states: bytes of one file, or ``{"model": FAMILY, "files": [{"name": ..., ...}, ...]}``.

    See :func:`changed_state`; a name of "*" is that of the real file. What nobody signed is not believed,
    whatever is signed does no harm to the next request, and nothing outside the folder changes.
    """
    try:
        asked = json.loads(data)
        kept = _kept(asked["model"] if asked["model"] in STATE_FAMILIES else STATE_FAMILIES[0])
        listed = asked["files"][:5]
        names = [kept.name if each["name"] == "*" else str(each["name"]).replace("/", "") for each in listed]
        made = [(changed_state(kept.content, each), each.get("kind", "file")) for each in listed]
        files, is_signed = dict(zip(names, made, strict=True)), any(each.get("signed") for each in listed)
    except (LookupError, RecursionError, TypeError, ValueError, OverflowError, AttributeError):
        kept, is_signed = _kept(STATE_FAMILIES[0]), False
        files = {kept.name: (data, "file")}
    kept.elsewhere.write_bytes(b"elsewhere")
    try:
        cache = kept.opened(files)
    except AdaSkipError:  # its key is a link or a pipe
        return
    before = kept.elsewhere.read_bytes()
    try:
        assert kept.answer(READ) == kept.expected or is_signed
    except AdaSkipError:  # a cell at the last position that there is
        assert is_signed
    for entry in list(cache.entries):
        found = cache.take(entry)
        assert is_signed or found is None or kept.content.endswith(found)
    # The values of a signed state are believed, and may be no numbers.
    kept.llm._ctx.kv_cache_clear()
    kept.llm.reset()
    assert kept.answer(OTHER, reuses=False) == kept.other
    cache.close()
    assert kept.elsewhere.read_bytes() == before


_PATIENCE, _MOST_WAIT, _MOST_CPU = 5, 100, 20
"""Seconds until a client leaves, as a grammar may take long for each token, and those that the server may take then."""


class Served:
    """The server of a tiny model in this process, without sockets."""

    def __init__(self) -> None:
        path = add_chat_template(write_model(folder() / "bare.gguf"), folder() / "served.gguf")
        options = {**SETTINGS, "n_ctx": 512, "plans": Plans(BULK_PLAN, None, 0.05, 512), "cache": PrefixCache(1 << 24)}
        open_ = functools.partial(ServedLlama, str(path), **options)
        worker = InProcess("served", Opening(open_, logs_text=False))
        self._app, _ = make_app(Workers([worker], n_ctx=512), keys=(), names=())
        self._loop = asyncio.new_event_loop()
        _KEPT.callback(worker.end)
        self._expected = self._plain()

    def ask(self, path: bytes, body: bytes) -> bytes:
        """The answer to a request; the next one is answered too."""
        name = path.decode(errors="replace")
        status, content = self._post(name if name in PATHS else PATHS[len(path) % len(PATHS)], body)
        assert status == 0 or 200 <= status < 500, (status, content)  # 0: it left before anything was there
        assert b"the server failed (" not in content, content  # the end of a stream that had begun
        assert self._plain() == self._expected
        return content

    def _plain(self) -> str:
        status, content = self._post("/v1/completions", _PLAIN)
        assert status == 200, content
        return str(json.loads(content)["choices"][0]["text"])

    def _post(self, path: str, body: bytes) -> tuple[int, bytes]:
        return self._loop.run_until_complete(asyncio.wait_for(self._answer(path, body), _MOST_WAIT))

    async def _answer(self, path: str, body: bytes) -> tuple[int, bytes]:
        status, content = 0, bytearray()
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if not waiting:
                await asyncio.sleep(_PATIENCE)
            return waiting.pop() if waiting else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            content.extend(message.get("body", b""))

        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "client": ("127.0.0.1", 1)}
        await self._app({**scope, "headers": [(b"host", b"localhost")]}, receive, send)
        return status, bytes(content)


_served = functools.cache(Served)

_PLAIN = json.dumps({"prompt": "the to", "max_tokens": 2, "temperature": 0, "cache_prompt": False}).encode()
PATHS = [
    *("/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/messages/count_tokens"),
    *("/v1/engines/copilot-codex/completions", "/tokenize", "/detokenize"),
]


@target
def server(data: bytes) -> None:
    """A request: the path in the first line, and its body. No status is 5xx, and the next request is answered."""
    path, _, body = data.partition(b"\n")
    _served().ask(path, body)


def _joined(pieces: Any) -> str:
    return "".join(map(_joined, pieces)) if isinstance(pieces, list) else str(pieces)


@target
def grammar(data: bytes) -> None:
    """A request that asks for an answer of some form, as :func:`server`, with "RULES" for what the last line says.

    That is a grammar, as it is or as a list of its pieces, or a JSON schema. Neither takes long, and an answer that
    ended by itself is JSON where a schema without a pattern was given.
    """
    line, _, rest = data.partition(b"\n")
    body, _, rules = rest.partition(b"\n")
    try:
        found = json.loads(rules)
        if isinstance(found, list):
            rules = json.dumps(_joined(found)).encode()
    except (RecursionError, ValueError):
        rules = json.dumps(rules.decode(errors="replace")).encode()
    body = body.replace(b'"RULES"', rules)
    begun = time.process_time()
    content = _served().ask(line, body)
    assert time.process_time() - begun < _MOST_CPU
    match _read(body), _read(content):
        case (
            {"response_format": {"type": "json_object"}, **more},
            {"choices": [{"finish_reason": "stop", "message": {"content": str() as text}}]},
        ) if not more.keys() & {"stop", "tools", "functions"} and b'"pattern"' not in rules:
            json.loads(text)


def _read(content: bytes) -> Any:
    """JSON, or None where it is none."""
    with suppress(RecursionError, ValueError):
        return json.loads(content)


if __name__ == "__main__":
    for file in sys.argv[2:]:
        print(file, flush=True)  # the last one of a process that ends
        TARGETS[sys.argv[1]](Path(file).read_bytes())
