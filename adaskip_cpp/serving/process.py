"""Starts the process of a model, sends it requests, and starts it again if it dies. Start at :meth:`Worker.answer`.

The other end of the pipe is :mod:`.worker`. All of it runs in the event loop of the server's first process.
"""

import asyncio
import contextlib
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from ..errors import NativeError
from .answer import Sent
from .request import Gone, Refused, ServedRequest
from .worker import HEAD_BYTES, Call, Done, Leave, Opened, Opening

State: TypeAlias = Literal["unloaded", "loading", "ready", "restarting", "unloading"]

STUCK = 60.0  # seconds that one step of a request may take, or writing the cache at the end
LEAVE = 5.0  # seconds that a request may go on after its client left; or twice the longest step so far

_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds before a restart: at first, doubled each time, and at most
_MOST_VAIN = 3  # processes in a row that may end before the model is ready
_MOST_CALLS = 16  # texts of all clients that are being tokenized
_LOADING = 10  # loading may take this many times the limit of a step
_LOGGER = logging.getLogger(__name__)

_START = "import os, sys; sys.path = sys.argv[1].split(os.pathsep); from adaskip_cpp.serving.worker import main; main()"


@dataclass(eq=False)
class _Asked:
    """A question to a process. ``heard``: time of the last message. ``done``: None if it must be asked again."""

    message: ServedRequest | Call
    done: "asyncio.Future[Done | None]"
    heard: float
    sent: Sent | None = None
    has_begun: bool = False


class Worker:
    """One model, and its process while the model is in memory."""

    def __init__(self, name: str, opening: Opening, *, stuck_timeout: float = STUCK) -> None:
        self.state: State = "unloaded"
        self.about: Opened | None = None  # facts from the last loading
        self.gauges: dict[str, float] = {}
        self.failure: NativeError | None = None  # the reason if it cannot be loaded
        self.n_deaths, self.used = 0, 0.0  # used: time of the last question or answer
        self.name, self._opening, self._stuck_timeout = name, opening, stuck_timeout
        self._asked: dict[str, _Asked] = {}
        self._keeper: asyncio.Task[None] | None = None  # runs while there is a process, or will be one
        self._process: asyncio.subprocess.Process | None = None
        self._opened: asyncio.Future[bool]  # whether the next process became ready
        self._is_closing = self._was_open = False
        self._why, self._pause, self._slowest = "", _PAUSE, 0.0  # why: the reason for which the process ended
        self._failed: NativeError | None = None  # why the model could not be opened

    async def ready(self) -> None:
        """Wait until the model is ready; start its process if there is none. Raises Refused if loading fails."""
        while self.state != "ready":
            if self._keeper is None:
                self.state, self.failure, self._is_closing = "loading", None, False
                self._opened = asyncio.get_running_loop().create_future()
                self._keeper = asyncio.create_task(self._keep())
            if not (await asyncio.shield(self._opened) or self._is_closing):
                raise Refused(500, f"the model {self.name!r} cannot be loaded; see the server's log")

    async def answer(self, request: ServedRequest, sent: Sent) -> None:
        """Let the process answer a request whose turn it is, and update the request's attributes. Raises Refused if the
        answer is an error, for example because the process died; Gone if the client has left.
        """
        done: Done | None = None
        while done is None:
            await self.ready()
            asked = self._ask(request, sent)
            try:
                done = await self._done(asked)
            except asyncio.CancelledError:  # the client has left
                self._tell(Leave(request.id))
                patience = min(max(LEAVE, 2 * self._slowest), self._stuck_timeout)
                if not (await asyncio.wait({asked.done}, timeout=patience))[0]:
                    self.kill(f"it did not stop {patience:.0f} seconds after its client had left, and was ended")
                raise
            finally:
                self.used = time.monotonic()
                del self._asked[request.id]
        if done.error is not None:
            raise Refused(*done.error)
        if done.content is None:
            raise Gone
        await (sent.event(done.content, is_last=True) if request.is_stream else sent.json(200, done.content))

    async def call(self, name: str, *arguments: Any) -> bytes:
        """Call a method of :class:`.Service`, and return its result as JSON. Raises Refused if too many are called."""
        if sum(isinstance(each.message, Call) for each in self._asked.values()) >= _MOST_CALLS:
            raise Refused(429, f"{_MOST_CALLS} other texts are being tokenized; ask again later")
        asked = self._ask(Call(uuid.uuid4().hex, name, arguments))
        # A late one, or one whose client has left, still keeps the process busy.
        asked.done.add_done_callback(lambda _: self._asked.pop(asked.message.id))
        await asyncio.wait({asked.done}, timeout=self._stuck_timeout)
        self.used = time.monotonic()
        done = asked.done.result() if asked.done.done() else None
        if done is None or done.content is None:
            raise Refused(*((done and done.error) or (503, "the model did not answer in time; ask again later")))
        return done.content

    @property
    def request(self) -> ServedRequest | None:
        messages = (each.message for each in self._asked.values())
        return next((each for each in messages if isinstance(each, ServedRequest)), None)

    def _ask(self, message: ServedRequest | Call, sent: Sent | None = None) -> _Asked:
        asked = self._asked[message.id] = _Asked(message, asyncio.Future(), time.monotonic(), sent)
        self._tell(message)
        return asked

    async def _done(self, asked: _Asked) -> Done | None:
        """Wait until a request is done. Kill the process if a step takes too long."""
        while not asked.done.done():
            left = asked.heard + self._stuck_timeout - time.monotonic()
            if left <= 0:
                self.kill(f"it was stuck for {self._stuck_timeout:g} seconds and was ended")
            await asyncio.wait({asked.done}, timeout=left if left > 0 else None)
        return asked.done.result()

    async def unload(self, why: str = "") -> None:
        """End its process after it has written its states to the cache. Log the reason."""
        keeper = self._keeper
        if keeper is None:
            return
        if why:
            self._log(f"unloaded, {why}")
        if self.state == "ready":
            self._lose("unloading")
            self._tell(None)
            late = asyncio.get_running_loop().call_later
            late(self._stuck_timeout, lambda: self.kill() if self._keeper is keeper else None)
        elif self.state != "unloading":
            keeper.cancel()
        self._is_closing = True
        await asyncio.wait({keeper})

    def kill(self, why: str = "") -> None:
        """End its process at once."""
        self._lose("restarting")
        self._why = self._why or why
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    def _lose(self, state: State) -> None:
        """From now on, let requests wait for the next process."""
        if self.state == "ready":
            self.state, self._opened = state, asyncio.get_running_loop().create_future()

    def _log(self, words: str) -> None:
        _LOGGER.warning("%s: %s", self.name, words)

    async def _keep(self) -> None:
        """Run one process after another, until :meth:`unload`, or until the model cannot be loaded."""
        n_vain = 0
        try:
            while True:
                await self._run()
                n_vain = 0 if self._was_open else n_vain + 1
                if self._is_closing:
                    return
                if n_vain == _MOST_VAIN or (self._failed and self.about is None):
                    why = f"{n_vain} starts of {self.name} failed: {self._why}; see the log, or try a smaller --ctx"
                    self.failure = self._failed or NativeError(why)
                    return
                self.state, self.n_deaths = "restarting", self.n_deaths + 1
                self._log(f"{self._why}; it is started again")
                await asyncio.sleep(self._pause)
                self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        finally:
            self.state, self._keeper, self.gauges = "unloaded", None, {}
            self._opened.set_result(False)

    async def _run(self) -> None:
        """Run a process to its end. Then questions without an answer get an error, or None to be asked again."""
        self._was_open, self._why, self._failed = False, "", None
        command = sys.executable, "-c", _START, os.pathsep.join(map(os.path.abspath, sys.path))
        options: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        # Both keep the terminal's Ctrl-C from the process, each on other systems.
        options |= {"start_new_session": True, "creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
        try:
            self._process = process = await asyncio.create_subprocess_exec(*command, **options)
        except OSError as error:
            self._why = f"its process cannot be started ({error.strerror})"
            return
        assert process.stdout is not None
        limit = _LOADING * self._stuck_timeout
        why = f"it did not load within {limit:g} seconds and was ended; use a larger --stuck-timeout"
        slow = asyncio.get_running_loop().call_later(limit, lambda: None if self._was_open else self.kill(why))
        try:
            self._tell(self._opening)
            while True:
                n = int.from_bytes(await process.stdout.readexactly(HEAD_BYTES), "little")
                await self._hear(pickle.loads(await process.stdout.readexactly(n)))
        except asyncio.IncompleteReadError:
            self._lose("restarting")
        except BaseException:
            self.kill()
            raise
        finally:
            slow.cancel()
            code = await process.wait()
            how = f"code {code}" if code >= 0 else signal.strsignal(-code)
            self._why = self._why or str(self._failed or f"its process ended ({how})")
            died = 500, f"the model failed at this request: {self._why}; ask again", "worker_died"
            for asked in self._asked.values():
                if not asked.done.done():
                    asked.done.set_result(Done(asked.message.id, error=died) if asked.has_begun else None)

    def _tell(self, message: Any) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(pickle.dumps(message))

    async def _hear(self, message: Any) -> None:
        if isinstance(message, Opened):
            self.about, self.gauges, self.state, self._was_open = message, message.gauges, "ready", True
            self._opened.set_result(True)
        elif isinstance(message, NativeError):
            self._failed = message
        elif (asked := self._asked.get(message.id)) is not None:
            now = time.monotonic()
            self._slowest, asked.heard, asked.has_begun = max(self._slowest, now - asked.heard), now, True
            for name, value in message.counts.items():
                setattr(asked.message, name, value)
            if isinstance(message, Done):
                self._pause, self.gauges = _PAUSE, message.gauges or self.gauges
                asked.done.set_result(message)
            elif asked.sent is not None and message.content:
                try:
                    await asked.sent.event(message.content)
                except Gone:
                    self._tell(Leave(message.id))
