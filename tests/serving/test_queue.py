"""adaskip_cpp.serving.queue: clients have their turns."""

import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaskip_cpp.serving.queue import FairQueue
from adaskip_cpp.serving.request import Refused


def test_names_that_a_client_gives_itself_earn_it_no_turns() -> None:
    asked = [*(("a", str(i)) for i in range(60)), ("a", "1"), ("b", "")]
    order: list[int] = []  # of the turns of requests that are all there at once

    async def scenario() -> None:
        queue = FairQueue(64)

        async def one(number: int) -> None:
            async with queue.turn(*asked[number]):
                order.append(number)
                await asyncio.sleep(0)

        await asyncio.gather(*map(one, range(len(asked))))

    asyncio.run(scenario())
    assert order[:3] == [0, 1, 61] and order[-1] == 60, "within an address its users have their turns one by one"


def test_one_client_cannot_take_every_place() -> None:
    """Of four places: who comes takes one from whom it finds with two more than it has, of its user with the most."""

    async def scenario() -> list[str]:
        queue, refused, tasks = FairQueue(4), [], []

        async def one(party: str, user: str) -> None:
            try:
                async with queue.turn(party, user):
                    await asyncio.sleep(0)
            except Refused:
                refused.append(party + user)

        async with queue.turn("c"):
            for each in ("a1", "a1", "a2", "a3", "a4", "b1", "b2", "b3", "c1"):
                tasks.append(asyncio.ensure_future(one(*each)))
                await asyncio.sleep(0)
                assert len(queue) <= 4
        await asyncio.gather(*tasks)
        return refused

    assert asyncio.run(scenario()) == ["a4", "a1", "a3", "b3", "b2"]


def test_a_closed_queue_refuses_all() -> None:
    async def scenario() -> None:
        queue = FairQueue(1)
        async with queue.turn("a"):
            waiting = asyncio.ensure_future(queue.turn("b").__aenter__())
            await asyncio.sleep(0)
            queue.close()
            with pytest.raises(Refused, match="503"):
                await waiting
        with pytest.raises(Refused, match="503"):
            await queue.turn("a").__aenter__()

    asyncio.run(scenario())


@given(st.lists(st.sampled_from(["come", "leave", "run"]), max_size=60), st.integers(0, 2**32 - 1))
def test_nobody_is_forgotten_and_never_two_run(steps: list[str], seed: int) -> None:
    rng = np.random.default_rng(seed)

    async def scenario() -> None:
        queue, running, served = FairQueue(1000), 0, 0
        tasks: list[asyncio.Task[None]] = []
        go = asyncio.Event()

        async def one(client: str) -> None:
            nonlocal running, served
            async with queue.turn(client):
                running += 1
                try:
                    assert running == 1
                    await go.wait()
                    served += 1
                finally:
                    running -= 1

        for step in steps:
            if step == "come":
                tasks.append(asyncio.ensure_future(one(str(rng.integers(3)))))
            elif step == "leave" and tasks:
                tasks[rng.integers(len(tasks))].cancel()
            else:
                go.set()
                await asyncio.sleep(0)
                go.clear()
            await asyncio.sleep(0)
        go.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(each is None or isinstance(each, asyncio.CancelledError) for each in results)
        assert served <= sum(each is None for each in results) and not queue.is_busy and len(queue) == 0

    asyncio.run(scenario())
