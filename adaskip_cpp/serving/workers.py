"""The models of a server: chooses, loads and unloads them. Start at :meth:`Workers.load`."""

import asyncio
import logging
import math
import time
from dataclasses import dataclass

from ..errors import NativeError
from .process import Worker
from .queue import FairQueue
from .request import Refused

_LOGGER = logging.getLogger(__name__)


@dataclass(eq=False)
class Workers:
    """The models of a server. The first answers requests without a model's name."""

    all: list[Worker]
    n_ctx: int  # tokens in each context
    keep: int = 1  # most models in memory; the least recently used one is unloaded for another
    keep_alive: float = math.inf  # seconds without a request after which a model is unloaded

    def choose(self, name: str | None) -> Worker:
        """Return the model of this name. A single model has every name. Raises Refused for unknown names."""
        found = next((each for each in self.all if each.name == name), None)
        if found is None and name and len(self.all) > 1:
            raise Refused(404, f"there is no model {name!r}; choose one of /v1/models", "model_not_found")
        return found or self.all[0]

    async def load(self, worker: Worker) -> None:
        """Load a model; the caller must hold the turn of the queue. Raises Refused if it cannot be loaded."""
        if worker.state in ("unloaded", "unloading"):
            others = [each for each in self.all if each is not worker and each.state != "unloaded"]
            for each in sorted(others, key=lambda each: each.used)[: max(len(others) + 1 - self.keep, 0)]:
                await each.unload(f"to make room for {worker.name}")
            if any(each.about for each in self.all):
                worker._log("loading")
        worker.used = time.monotonic()
        try:
            await worker.ready()
        except Refused:
            if worker.failure is not self.failure:
                _LOGGER.warning("%s", worker.failure)
            raise

    async def unload_idle(self, queue: FairQueue) -> None:
        """Unload models without requests; runs for ever."""
        while True:
            await asyncio.sleep(min(self.keep_alive / 10, 1))
            for each in self.all:
                if each.state == "ready" and not queue.is_busy and time.monotonic() - each.used > self.keep_alive:
                    async with queue.turn(""):
                        await each.unload("as there was no request for it")

    @property
    def failure(self) -> NativeError | None:
        """Why the server must end: its only model cannot be loaded, or the first of several at the start."""
        first = self.all[0]
        return first.failure if len(self.all) == 1 or first.about is None else None

    async def close(self, seconds: float) -> None:
        """End all processes; kill those that take longer than ``seconds``."""
        ending = [asyncio.ensure_future(each.unload()) for each in self.all]
        await asyncio.wait(ending, timeout=seconds)
        for each in self.all:
            each.kill()
        await asyncio.wait(ending)
