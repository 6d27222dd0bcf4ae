"""What is fuzzed: for every kind of input that may come from elsewhere, a function that takes one such input.

What the package promises is that its own errors alone come out. Whatever else a function raises is a finding, and so is
the end of its process. Inputs are text where they can be, so that seeds are written, and findings read, by people.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import itertools
import json
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

from faults.abi_calls import Calls, fresh_logits
from faults.forks import ForkEndedError, in_a_fork
from faults.state_files import FOLDER_KEY, changed_state, put_file
from oracles.gguf_files import changed_model
from oracles.questions import LLM, chat
from oracles.served import BULK_PLAN, InProcess
from oracles.tiny_families import ENCODERS, FAMILIES
from oracles.tiny_models import add_chat_template, write_model

from adaskip_cpp import AdaSkipLlama, Profile
from adaskip_cpp.errors import AdaSkipError
from adaskip_cpp.measuring.task_files import task_items
from adaskip_cpp.model.mode import MODES
from adaskip_cpp.model.plan_file import load_plan, save_plan
from adaskip_cpp.serving.app import make_app
from adaskip_cpp.serving.llama import ServedLlama
from adaskip_cpp.serving.plans import Plans
from adaskip_cpp.serving.prefix_cache import PrefixCache
from adaskip_cpp.serving.request import ServedRequest
from adaskip_cpp.serving.worker import Opening
from adaskip_cpp.serving.workers import Workers

__all__ = ["TARGETS", "GgufError"]

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


# --- files ------------------------------------------------------------------------------------------------------------


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


# --- models -----------------------------------------------------------------------------------------------------------

_MOST_MEMORY, _MOST_SECONDS = 8 << 30, 20


class GgufError(Exception):
    """Opening a model ended its process, or raised what is none of our errors."""


@target
def gguf(data: bytes) -> None:
    """A model with another header, ``{"family": FAMILY, "kv": ...}``, is opened and run by a process of its own.

    See :func:`gguf_files.changed_model`.
    """
    try:
        changes = json.loads(data)
        if changes["family"] not in {**FAMILIES, **ENCODERS}:
            return
        content = changed_model(source(changes["family"]), changes)
    except (LookupError, RecursionError, TypeError, ValueError):
        return
    path = folder() / "model.gguf"
    path.write_bytes(content)
    try:
        error = in_a_fork(lambda: _open(path))
    except ForkEndedError as ended:
        raise GgufError(f"the process ended with {ended.code}") from ended
    if error:
        raise GgufError(error)


def _open(path: Path) -> str:
    """Open a model, in a process of its own; return what goes wrong."""
    for number in (signal.SIGABRT, signal.SIGSEGV, signal.SIGFPE, signal.SIGBUS, signal.SIGILL, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)  # a fuzzer's own handlers would report this process, not its parent
    signal.alarm(_MOST_SECONDS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(ValueError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
    try:
        llm = AdaSkipLlama(str(path), **SETTINGS)
        assert len(llm.sublayers) == 2 * llm.n_layer
        if llm._ctx.memory is not None:  # llama_cpp.Llama's own eval() is for no others
            llm.eval([0, 0])
    except AdaSkipError:
        pass
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return ""


# --- the C ABI --------------------------------------------------------------------------------------------------------

ABI_FAMILIES = ("llama", "jamba", "gemma3n", "gemma3", "mamba", "gptneox-parallel")


@functools.cache
def _expected(family: str) -> bytes:
    return fresh_logits(model(family))


@target
def abi(data: bytes) -> None:
    """Calls of adaskip.h, ``{"model": FAMILY, "calls": [[NAME, ARGUMENT, ...], ...]}``, on a tiny model.

    In the contract or not, each returns a code; and after them all the whole model computes what it did before.
    """
    try:
        asked = json.loads(data)
        family, listed = asked["model"], asked["calls"]
    except (LookupError, RecursionError, TypeError, ValueError):
        return
    if family not in ABI_FAMILIES or not isinstance(listed, list):
        return
    expected, llm = _expected(family), model(family)
    calls = Calls(llm, lambda: AdaSkipLlama(llm.model_path, **SETTINGS))
    try:
        for each in listed[:50]:
            if isinstance(each, list) and each:
                calls.run(each[0], each[1:])
    finally:
        calls.close()
    assert fresh_logits(llm) == expected


# --- cached states ----------------------------------------------------------------------------------------------------

STATE_FAMILIES = ("llama", "gemma3", "jamba")


class Kept:
    """A model as the server has it, and the file of a prompt that it has read; ``llama`` has a plan with a bulk."""

    def __init__(self, family: str) -> None:
        plans = Plans(BULK_PLAN if family == "llama" else None, None, 0.05, 256)
        self.folder = folder() / f"states-{family}"
        self.elsewhere = folder() / "elsewhere"
        self._llm = ServedLlama(str(source(family)), plans=plans, cache=PrefixCache(1 << 24), **SETTINGS)
        self._tokens = [1, *range(3, 103)]
        _KEPT.callback(self._llm.close)
        cache = self.opened({})
        self.expected = self.answer()
        self.plain = self.plain_answer()
        cache.close()
        (path,) = self.folder.glob("*.adaskip-prefix")
        self.name, self.content = path.name, path.read_bytes()

    def opened(self, files: dict[str, tuple[bytes, str]]) -> PrefixCache:
        """The cache of a folder with these files, and the folder's key if none of them is one."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(mode=0o700)
        for name, (content, kind) in {"hmac.key": (FOLDER_KEY, "file"), **files}.items():
            with suppress(OSError, ValueError):  # a name that no file can have
                put_file(self.folder / name, content, kind, self.elsewhere)
        cache = self._llm.prefix_cache = PrefixCache(1 << 24, self.folder)
        cache.can_rewind = not self._llm.has_state
        return cache

    def _answer(self, prompt: list[int], *, reuses: bool = True) -> list[int]:
        self._llm.request = ServedRequest(reuses=reuses)
        with closing(self._llm.generate(prompt, temp=0)) as steps:
            return list(itertools.islice(steps, 3))

    def forget(self) -> None:
        """Empty its memory: the values of a signed state are believed, and may be no numbers."""
        self._llm._ctx.kv_cache_clear()
        self._llm.reset()

    def answer(self) -> list[int]:
        """What it answers to the prompt that was read."""
        return self._answer(self._tokens)

    def plain_answer(self) -> list[int]:
        """What it answers to another one, of which nothing is kept."""
        return self._answer([1, *range(50, 90)], reuses=False)


@functools.cache
def _kept(family: str) -> Kept:
    return Kept(family)


@target
def state(data: bytes) -> None:
    """A folder of cached states: bytes of one file, or ``{"model": FAMILY, "files": [{"name": ..., ...}, ...]}``.

    See :func:`state_files.changed_state`; a name of "*" is that of the real file. What nobody signed is not believed,
    whatever is signed does no harm to the next request, and nothing outside the folder changes.
    """
    try:
        asked = json.loads(data)
        kept = _kept(asked["model"] if asked["model"] in STATE_FAMILIES else STATE_FAMILIES[0])
        listed = asked["files"][:5]
        made = [changed_state(kept.content, each) for each in listed]
        names = [kept.name if each["name"] == "*" else str(each["name"]).replace("/", "") for each in listed]
        files = {
            name: (content, each.get("kind", "file"))
            for name, each, (content, _) in zip(names, listed, made, strict=True)
        }
        is_signed = any(each.get("signed") for each in listed)
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
        answer = kept.answer()
        assert is_signed or answer == kept.expected
    except AdaSkipError:  # a cell at the last position that there is
        assert is_signed
    for entry in list(cache.entries):
        found = cache.take(entry)
        assert is_signed or found is None or kept.content.endswith(found)
    kept.forget()
    assert kept.plain_answer() == kept.plain
    cache.close()
    assert kept.elsewhere.read_bytes() == before


# --- the server -------------------------------------------------------------------------------------------------------

_PATIENCE, _MOST_WAIT, _MOST_CPU = 5, 100, 20
"""Seconds that a client waits before it leaves, as a grammar may take long for each token; the server ends it then.

Meanwhile it may take somewhat more of the processor, and on a busy machine far longer."""


class Served:
    """The server of a tiny model in this process, without sockets."""

    def __init__(self) -> None:
        path = add_chat_template(write_model(folder() / "bare.gguf"), folder() / "served.gguf")

        def open_() -> ServedLlama:
            return ServedLlama(
                str(path),
                plans=Plans(BULK_PLAN, None, 0.05, 512),
                cache=PrefixCache(1 << 24),
                **{**SETTINGS, "n_ctx": 512},
            )

        worker = InProcess("served", Opening(open_, logs_text=False))
        self._app, _ = make_app(Workers([worker], n_ctx=512), keys=(), names=())
        self._loop = asyncio.new_event_loop()
        _KEPT.callback(worker.end)

    def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        return self._loop.run_until_complete(asyncio.wait_for(self._post(path, body), _MOST_WAIT))

    async def _post(self, path: str, body: bytes) -> tuple[int, bytes]:
        status, content = 0, bytearray()
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if waiting:
                return waiting.pop()
            await asyncio.sleep(_PATIENCE)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            content.extend(message.get("body", b""))

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"host", b"localhost")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
        }
        await self._app(scope, receive, send)
        return status, bytes(content)


@functools.cache
def _served() -> Served:
    return Served()


_PLAIN = json.dumps({"prompt": "the to", "max_tokens": 2, "temperature": 0, "cache_prompt": False}).encode()
PATHS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/messages",
    "/v1/responses",
    "/v1/messages/count_tokens",
    "/v1/engines/copilot-codex/completions",
    "/tokenize",
    "/detokenize",
)


def _text(answer: tuple[int, bytes]) -> str:
    status, content = answer
    assert status == 200, content
    return str(json.loads(content)["choices"][0]["text"])


@functools.cache
def _plain_text() -> str:
    return _text(_served().post("/v1/completions", _PLAIN))


@target
def server(data: bytes) -> None:
    """A request: the path in the first line, and its body. No status is 5xx, and the next request is answered."""
    path, _, body = data.partition(b"\n")
    _ask(path, body)


def _ask(path: bytes, body: bytes) -> bytes:
    expected = _plain_text()
    name = path.decode(errors="replace")
    status, content = _served().post(name if name in PATHS else PATHS[len(path) % len(PATHS)], body)
    assert status == 0 or 200 <= status < 500, (status, content)  # 0: it left before anything was there
    assert b"the server failed (" not in content, content  # the end of a stream that had begun
    assert _text(_served().post("/v1/completions", _PLAIN)) == expected
    return content


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
    content = _ask(line, body)
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
