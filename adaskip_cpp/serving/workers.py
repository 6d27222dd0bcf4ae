"""The models that are served, each in a process of its own, which is started again where it dies.

All of it runs in one event loop.
"""

import asyncio
import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from ..errors import NativeError
from .answer import Sent
from .request import Gone, Refused, ServedRequest
from .worker import HEAD_BYTES, Ask, Call, Close, Done, Failed, Leave, Opened, Opening, Part

State: TypeAlias = Literal["unloaded", "loading", "ready", "restarting", "unloading"]

STUCK = 60.0  # seconds in which a request takes a step, and in which a process writes its cache when it is to end
LEAVE = 5.0  # seconds in which a request ends when its client has left; or twice the longest step that there was

_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds before a process is started again: twice as many each time
_MOST_VAIN = 3  # processes in a row that end before they can be asked

_START = (
    f"import sys; sys.path[:] = sys.argv.pop(1).split({os.pathsep!r}); "
    "from adaskip_cpp.serving.worker import main; main()"
)


@dataclass(eq=False)
class _Asked:
    """What a process was asked and has not done: when it was heard of last, and where its answer goes."""

    id: str
    done: asyncio.Future[Done]
    heard: float
    request: ServedRequest | None = None
    sent: Sent | None = None
    has_begun: bool = False
    is_lost: bool = False


class Worker:
    """One model, and the process that holds it while it is in memory.

    Args:
        name: of the model, for clients.
        opening: what opens it there.
        stuck_timeout: seconds in which a request takes a step; else its process is ended.
    """

    def __init__(self, name: str, opening: Opening, *, stuck_timeout: float = STUCK) -> None:
        self.name = name
        self.state: State = "unloaded"
        self.about: Opened | None = None  # what it told when it was loaded last
        self.gauges: dict[str, float] = {}
        self.failure: NativeError | None = None  # why it cannot be loaded
        self.on_death: Callable[[], object] = lambda: None
        self._opening, self._stuck_timeout = opening, stuck_timeout
        self._asked: dict[str, _Asked] = {}
        self._keeper: asyncio.Task[None] | None = None  # runs while there is a process, or is to be one
        self._process: asyncio.subprocess.Process | None = None
        self._opened: asyncio.Future[bool]  # whether it can be asked, or cannot be loaded
        self._is_closing = self._is_open = False
        self._why = self._failed = ""  # it ended, or will at once; what it failed with
        self._pause, self._slowest = _PAUSE, 0.0

    # -- to be asked -------------------------------------------------------------------------------------------------

    async def ready(self) -> None:
        """Wait until it can be asked; where there is no process one is started. Refused where that is in vain."""
        if self._is_closing and self._keeper is not None:
            await asyncio.wait({self._keeper})
        if self._keeper is None:
            self.state, self.failure, self._is_closing = "loading", None, False
            self._opened = asyncio.get_running_loop().create_future()
            self._keeper = asyncio.create_task(self._keep())
        opened = self._opened
        await asyncio.wait({opened})
        if not opened.result():
            raise Refused(500, f"the model {self.name!r} cannot be loaded; see the server's log")

    async def answer(self, request: ServedRequest, sent: Sent) -> None:
        """Have a request answered, in its turn. What becomes of it is told by its attributes.

        Raises:
            Refused: it is answered with an error, as where the process dies of it.
            Gone: nobody waits for it any more.
        """
        is_lost = True
        while is_lost:  # with a process that had not begun with it
            await self.ready()
            asked = self._ask(Ask(request), request.id, request, sent)
            try:
                done = await self._done(asked)
            except asyncio.CancelledError:
                await self._leave(asked)
                raise
            finally:
                del self._asked[request.id]
            is_lost = asked.is_lost and not asked.has_begun
        if done.error is not None:
            raise Refused(*done.error)
        if done.content is None:
            raise Gone
        await (sent.event(done.content, is_last=True) if request.is_stream else sent.json(200, done.content))

    async def call(self, name: str, *arguments: Any) -> bytes:
        """Ask one of the small questions, see :class:`.Service`; the answer is JSON."""
        id = uuid.uuid4().hex
        asked = self._ask(Call(id, name, arguments), id)
        try:
            await asyncio.wait({asked.done}, timeout=self._stuck_timeout)
        finally:
            del self._asked[id]
        if not asked.done.done():
            raise Refused(503, "there is no answer yet; ask again later")
        done = asked.done.result()
        if done.content is None:
            assert done.error is not None
            raise Refused(*done.error)
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

    async def _done(self, asked: _Asked) -> Done:
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

    async def unload(self) -> None:
        """End its process, which writes what it has read to the cache first."""
        keeper, loop = self._keeper, asyncio.get_running_loop()
        if keeper is None:
            return
        if not self._is_closing:
            self._is_closing = True
            if self.state == "ready":
                self._lose("unloading")
                self._tell(Close())
                loop.call_later(STUCK, lambda: self.kill() if self._keeper is keeper else None)
            else:
                keeper.cancel()
        await asyncio.wait({keeper})

    def kill(self, why: str = "") -> None:
        """End its process at once."""
        self._lose("restarting")
        self._why = self._why or why
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    def _lose(self, state: State) -> None:
        """Have who comes now wait for the next process."""
        if self.state == "ready":
            self.state, self._opened = state, asyncio.get_running_loop().create_future()

    async def _keep(self) -> None:
        """Run one process after another, until one is to close, or the model cannot be loaded."""
        n_started = n_vain = 0
        try:
            while True:
                await self._run()
                n_started, n_vain = n_started + 1, 0 if self._is_open else n_vain + 1
                if self._is_closing:
                    return
                if n_vain == _MOST_VAIN or (self._failed and n_started == 1):
                    self.failure = NativeError(self._failed or f"{self.name}: {self._why}, {n_vain} times at its start")
                    return
                self.state = "restarting"
                self.on_death()
                print(f"{self.name}: {self._why}; it is started again", file=sys.stderr, flush=True)
                await asyncio.sleep(self._pause)
                self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        finally:
            self.state, self._keeper, self.gauges = "unloaded", None, {}
            self._opened.set_result(False)

    async def _run(self) -> None:
        """Run a process to its end, and fail what it was asked."""
        self._is_open, self._why, self._failed = False, "", ""
        self._process = process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _START, os.pathsep.join(map(os.path.abspath, sys.path))),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # The terminal's Ctrl-C is not for it; each of the two is for other systems.
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        assert process.stdout is not None
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
            code = await process.wait()
            name = f"code {code}" if code >= 0 else signal.Signals(-code).name
            self._why = self._why or self._failed or f"its process ended with {name}"
            unloaded = 503, "the model was unloaded; ask again", "unloaded"
            died = 500, f"the model failed at this request: {self._why}; ask again", "worker_died"
            for asked in self._asked.values():
                if not asked.done.done():
                    asked.is_lost = True
                    asked.done.set_result(Done(asked.id, error=unloaded if self._is_closing else died))

    def _tell(self, message: Any) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(pickle.dumps(message))

    async def _hear(self, message: Any) -> None:
        if isinstance(message, Opened):
            self.about, self.gauges, self._is_open = message, message.gauges, True
            if not self._is_closing:
                self.state = "ready"
                self._opened.set_result(True)
        elif isinstance(message, Failed):
            self._failed = message.why
        elif (asked := self._asked.get(message.id)) is not None:
            now = time.monotonic()
            self._slowest, asked.heard = max(self._slowest, now - asked.heard), now
            asked.has_begun = True
            if isinstance(message, Part):
                await self._pass_on(asked, message.content)
            elif asked.request is not None:
                vars(asked.request).update(message.counts)
            if isinstance(message, Done) and not asked.done.done():
                self._pause, self.gauges = _PAUSE, message.gauges or self.gauges
                asked.done.set_result(message)

    async def _pass_on(self, asked: _Asked, content: bytes) -> None:
        assert asked.sent is not None
        try:
            await asked.sent.event(content)
        except Gone:
            self._tell(Leave(asked.id))


class Workers:
    """The models that are served, of which one is in memory at a time. The first is for who names none.

    Args:
        n_ctx: tokens of their contexts.
    """

    def __init__(self, workers: list[Worker], *, n_ctx: int) -> None:
        self.all, self.n_ctx = workers, n_ctx

    def choose(self, name: str | None) -> Worker:
        """Return the model of this name; where there is one alone it is meant by every name."""
        return self.all[0]

    async def load(self, worker: Worker) -> None:
        """Have a model in memory, in one's turn."""
        await worker.ready()

    @property
    def state(self) -> State:
        """What is told of the server's health: that of the model which is furthest from being ready."""
        return self.all[0].state

    @property
    def failure(self) -> NativeError | None:
        """Why there is nothing to be served."""
        return self.all[0].failure

    async def close(self, seconds: float) -> None:
        """End all processes; those that take longer are killed."""
        ending = [asyncio.ensure_future(each.unload()) for each in self.all]
        await asyncio.wait(ending, timeout=seconds)
        for each in self.all:
            each.kill()
        await asyncio.wait(ending)
