"""The models that are served, each in a process of its own, which is started again where it dies.

All of it runs in one event loop.
"""

import asyncio
import contextlib
import math
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
from .queue import FairQueue
from .request import Gone, Refused, ServedRequest
from .worker import HEAD_BYTES, Ask, Call, Close, Done, Failed, Leave, Opened, Opening, Part

State: TypeAlias = Literal["unloaded", "loading", "ready", "restarting", "unloading"]

STUCK = 60.0  # seconds in which a request takes a step, and in which a process that is to end writes its cache
LEAVE = 5.0  # seconds in which a request ends when its client has left; or twice the longest step that there was

_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds before a process is started again: twice as many each time
_MOST_VAIN = 3  # processes in a row that end before they can be asked
_LOADING = 10  # times the limit of a step: the longest that loading takes

_START = (
    f"import sys; sys.path[:] = sys.argv.pop(1).split({os.pathsep!r}); "
    "from adaskip_cpp.serving.worker import main; main()"
)


@dataclass(eq=False)
class _Asked:
    """What a process was asked: when it was heard of last, where the answer goes, and the end; None of what it lost."""

    id: str
    done: "asyncio.Future[Done | None]"
    heard: float
    request: ServedRequest | None = None
    sent: Sent | None = None
    has_begun: bool = False


class Worker:
    """One model, and the process that holds it while it is in memory.

    Args:
        name: of the model, for clients.
        opening: what opens it there.
        stuck_timeout: seconds in which a request takes a step; the model is loaded in ten times as many. A process that
            takes longer is ended.
    """

    def __init__(self, name: str, opening: Opening, *, stuck_timeout: float = STUCK) -> None:
        self.name = name
        self.state: State = "unloaded"
        self.about: Opened | None = None  # what it told when it was loaded last
        self.gauges: dict[str, float] = {}
        self.failure: NativeError | None = None  # why it cannot be loaded
        self.n_deaths, self.used = 0, 0.0  # when it was asked or answered last
        self._opening, self._stuck_timeout = opening, stuck_timeout
        self._asked: dict[str, _Asked] = {}
        self._keeper: asyncio.Task[None] | None = None  # runs while there is a process, or is to be one
        self._process: asyncio.subprocess.Process | None = None
        self._opened: asyncio.Future[bool]  # whether the process that is to come can be asked
        self._is_closing = self._was_open = False
        self._why = self._failed = ""  # it ended; what it could not open the model for
        self._pause, self._slowest = _PAUSE, 0.0

    # -- to be asked -------------------------------------------------------------------------------------------------

    async def ready(self) -> None:
        """Wait until it can be asked; where there is no process one is started. Refused where that is in vain."""
        while self.state != "ready":
            if self._keeper is None:
                self.state, self.failure, self._is_closing = "loading", None, False
                self._opened = asyncio.get_running_loop().create_future()
                self._keeper = asyncio.create_task(self._keep())
            opened = self._opened
            await asyncio.wait({opened})
            if not (opened.result() or self._is_closing):
                raise Refused(500, f"the model {self.name!r} cannot be loaded; see the server's log")

    async def answer(self, request: ServedRequest, sent: Sent) -> None:
        """Have a request answered, in its turn. What becomes of it is told by its attributes.

        Raises:
            Refused: it is answered with an error, as where the process dies of it.
            Gone: nobody waits for it any more.
        """
        done: Done | None = None
        while done is None:
            await self.ready()
            asked = self._ask(Ask(request), request.id, request, sent)
            try:
                done = await self._done(asked)
            except asyncio.CancelledError:
                await self._leave(asked)
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
        """Ask one of the small questions, see :class:`.Service`; the answer is JSON."""
        id = uuid.uuid4().hex
        asked = self._ask(Call(id, name, arguments), id)
        await asyncio.wait({asked.done}, timeout=self._stuck_timeout)
        self.used = time.monotonic()
        del self._asked[id]
        done = asked.done.result() if asked.done.done() else None
        if done is None or done.content is None:
            raise Refused(*((done and done.error) or (503, "there is no answer yet; ask again later")))
        return done.content

    @property
    def request(self) -> ServedRequest | None:
        """The request that it works for."""
        return next((each.request for each in self._asked.values() if each.request is not None), None)

    def _ask(self, message: Any, id: str, request: ServedRequest | None = None, sent: Sent | None = None) -> _Asked:
        done = asyncio.get_running_loop().create_future()
        asked = self._asked[id] = _Asked(id, done, time.monotonic(), request, sent)
        self._tell(message)
        return asked

    async def _done(self, asked: _Asked) -> Done | None:
        """Wait until a request is done. Where it takes no step, the process is ended."""
        while not asked.done.done():
            left = asked.heard + self._stuck_timeout - time.monotonic()
            if left <= 0:
                self.kill(f"it was stuck for {self._stuck_timeout:g} seconds and was ended")
            await asyncio.wait({asked.done}, timeout=left if left > 0 else None)
        return asked.done.result()

    async def _leave(self, asked: _Asked) -> None:
        """End a request that nobody waits for any more."""
        self._tell(Leave(asked.id))
        patience = min(max(LEAVE, 2 * self._slowest), self._stuck_timeout)
        if not (await asyncio.wait({asked.done}, timeout=patience))[0]:
            self.kill(f"it did not stop {patience:.0f} seconds after its client had left, and was ended")

    # -- its process -------------------------------------------------------------------------------------------------

    async def unload(self, why: str = "") -> None:
        """End its process, which writes what it has read to the cache first; the log is told why."""
        keeper = self._keeper
        if keeper is None:
            return
        if why:
            self._log(f"unloaded, {why}")
        if self.state == "ready":
            self._lose("unloading")
            self._tell(Close())
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
        """Have who comes now wait for the next process."""
        if self.state == "ready":
            self.state, self._opened = state, asyncio.get_running_loop().create_future()

    def _log(self, words: str) -> None:
        print(f"{self.name}: {words}", file=sys.stderr, flush=True)

    async def _keep(self) -> None:
        """Run one process after another, until one is to close, or the model cannot be loaded."""
        n_vain = 0
        try:
            while True:
                await self._run()
                n_vain = 0 if self._was_open else n_vain + 1
                if self._is_closing:
                    return
                if n_vain == _MOST_VAIN or (self._failed and self.about is None):
                    self.failure = NativeError(self._failed or f"{self.name}: {self._why}, {n_vain} times at its start")
                    return
                self.state, self.n_deaths = "restarting", self.n_deaths + 1
                self._log(f"{self._why}; it is started again")
                await asyncio.sleep(self._pause)
                self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        finally:
            self.state, self._keeper, self.gauges = "unloaded", None, {}
            self._opened.set_result(False)

    async def _run(self) -> None:
        """Run a process to its end, and fail what it was asked."""
        self._was_open, self._why, self._failed = False, "", ""
        try:
            self._process = process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", _START, os.pathsep.join(map(os.path.abspath, sys.path))),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # The terminal's Ctrl-C is not for it; each of the two is for other systems.
                start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        except OSError as error:
            self._why = f"its process cannot be started ({error.strerror})"
            return
        assert process.stdout is not None
        limit = _LOADING * self._stuck_timeout
        why = f"it did not load within {limit:g} seconds and was ended; --stuck-timeout gives it more"
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
            self._why = self._why or self._failed or f"its process ended ({how})"
            died = 500, f"the model failed at this request: {self._why}; ask again", "worker_died"
            for asked in self._asked.values():
                if not asked.done.done():
                    asked.done.set_result(Done(asked.id, error=died) if asked.has_begun else None)

    def _tell(self, message: Any) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(pickle.dumps(message))

    async def _hear(self, message: Any) -> None:
        if isinstance(message, Opened):
            self.about, self.gauges, self.state, self._was_open = message, message.gauges, "ready", True
            self._opened.set_result(True)
        elif isinstance(message, Failed):
            self._failed = message.why
        elif (asked := self._asked.get(message.id)) is not None:
            now = time.monotonic()
            self._slowest, asked.heard, asked.has_begun = max(self._slowest, now - asked.heard), now, True
            if isinstance(message, Part):
                assert asked.sent is not None
                try:
                    await asked.sent.event(message.content)
                except Gone:
                    self._tell(Leave(asked.id))
            elif asked.request is not None:
                vars(asked.request).update(message.counts)
            if isinstance(message, Done):
                self._pause, self.gauges = _PAUSE, message.gauges or self.gauges
                asked.done.set_result(message)


class Workers:
    """The models that are served, the first of which is for who names none.

    Args:
        n_ctx: tokens of their contexts.
        keep: so many are in memory at a time; the one that was not used for longest makes room.
        keep_alive: seconds without a request after which a model is unloaded.
    """

    def __init__(self, workers: list[Worker], *, n_ctx: int, keep: int = 1, keep_alive: float = math.inf) -> None:
        self.all, self.n_ctx, self._keep, self._keep_alive = workers, n_ctx, keep, keep_alive

    def choose(self, name: str | None) -> Worker:
        """Return the model of this name. Where there is one alone, every name means it; else Refused for others."""
        found = next((each for each in self.all if each.name == name), None)
        if found is None and name and len(self.all) > 1:
            raise Refused(404, f"there is no model {name!r}; /v1/models lists those there are", "model_not_found")
        return found or self.all[0]

    async def load(self, worker: Worker) -> None:
        """Have a model in memory, in one's turn; Refused where it cannot be loaded."""
        if worker.state in ("unloaded", "unloading"):
            others = [each for each in self.all if each is not worker and each.state != "unloaded"]
            for each in sorted(others, key=lambda each: each.used)[: max(len(others) + 1 - self._keep, 0)]:
                await each.unload(f"to make room for {worker.name}")
            if any(each.about for each in self.all):
                worker._log("loading")
        worker.used = time.monotonic()
        try:
            await worker.ready()
        except Refused:
            if worker.failure is not self.failure:
                print(worker.failure, file=sys.stderr, flush=True)
            raise

    async def unload_idle(self, queue: FairQueue) -> None:
        """Unload models, for ever, that nobody asks for."""
        while True:
            await asyncio.sleep(min(self._keep_alive / 10, 1))
            for each in self.all:
                if each.state == "ready" and not queue.is_busy and time.monotonic() - each.used > self._keep_alive:
                    async with queue.turn(""):
                        await each.unload("as nobody asks for it")

    @property
    def state(self) -> State:
        """That of the model that is furthest from being ready; one that is not loaded is no matter."""
        states = {each.state for each in self.all}
        return "restarting" if "restarting" in states else "loading" if "loading" in states else "ready"

    @property
    def failure(self) -> NativeError | None:
        """Why there is nothing to be served: the one model cannot be loaded, or at the start the first of several."""
        first = self.all[0]
        return first.failure if len(self.all) == 1 or first.about is None else None

    async def close(self, seconds: float) -> None:
        """End all processes; those that take longer are killed."""
        ending = [asyncio.ensure_future(each.unload()) for each in self.all]
        await asyncio.wait(ending, timeout=seconds)
        for each in self.all:
            each.kill()
        await asyncio.wait(ending)
