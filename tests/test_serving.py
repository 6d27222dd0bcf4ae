"""The parts of the server, each by itself: the queue, what was read before, log-probabilities, bodies and plans."""

import asyncio
import contextlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Collection, Coroutine, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from frontiers import quality
from hypothesis import given
from hypothesis import strategies as st
from served import Nobody, frontier_of
from tiny_models import write_model

from adaskip_cpp import AdaSkipLlama, SkipPlan
from adaskip_cpp.engine.settings import cost_settings
from adaskip_cpp.errors import DataError, RequestError
from adaskip_cpp.measuring.running import Running, quietly
from adaskip_cpp.model.edits import FEW, MANY, Edits
from adaskip_cpp.model.frontier import EditPoint, Frontier, Passkeys
from adaskip_cpp.model.settings import Settings
from adaskip_cpp.serving import answer, middleware, server
from adaskip_cpp.serving.body import read_body
from adaskip_cpp.serving.llama import ServedLlama
from adaskip_cpp.serving.middleware import Gate, is_loopback, network_of
from adaskip_cpp.serving.plans import Choice, Plans, plan_key
from adaskip_cpp.serving.prefix_cache import PrefixCache, n_common
from adaskip_cpp.serving.queue import FairQueue
from adaskip_cpp.serving.request import Gone, Refused, ServedRequest
from adaskip_cpp.serving.server import listen

Tiny = Callable[..., Path]
Tokens = Callable[..., list[int]]


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def answered(app: Any, path: str, headers: dict[str, str]) -> tuple[int, str]:
    """Status and body of what an application answers to a GET."""
    sent: list[Any] = []

    async def ask() -> None:
        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            return {"type": "http.request"}

        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await app({"type": "http", "path": path, "method": "GET", "headers": raw}, receive, send)

    asyncio.run(ask())
    return sent[0]["status"], b"".join(each.get("body", b"") for each in sent[1:]).decode()


# --- the queue --------------------------------------------------------------------------------------------------------


def test_clients_have_their_turns_one_by_one() -> None:
    """Three requests of one client and one of another, all there at once: the other is second."""

    async def scenario() -> list[str]:
        queue, order = FairQueue(10), []

        async def one(client: str, name: str) -> None:
            async with queue.turn(client):
                order.append(name)
                await asyncio.sleep(0)

        await asyncio.gather(*(one(*each) for each in (("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1"))))
        assert not queue.is_busy and len(queue) == 0
        return order

    assert asyncio.run(scenario()) == ["a1", "a2", "b1", "a3"]


def test_names_that_a_client_gives_itself_earn_it_no_turns() -> None:
    """60 requests of one address, each under another name, then one of another address: that one is third."""

    async def scenario() -> list[str]:
        queue, order = FairQueue(64), []

        async def one(party: str, user: str) -> None:
            async with queue.turn(party, user):
                order.append(party + user)
                await asyncio.sleep(0)

        names = [("a", str(i)) for i in range(60)]
        await asyncio.gather(*(one(*each) for each in (*names, ("a", "1"), ("b", ""))))
        return order

    order = asyncio.run(scenario())
    assert order.index("b") == 2 and order[-1] == "a1", "within an address its users have their turns one by one"


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


def test_a_full_queue_refuses_and_a_closed_one_empties() -> None:
    async def scenario() -> None:
        queue = FairQueue(1)
        async with queue.turn("a"):
            waiting = asyncio.ensure_future(queue.turn("b").__aenter__())
            await asyncio.sleep(0)
            with pytest.raises(Refused, match="429"):
                await queue.turn("c").__aenter__()
            queue.close()
            with pytest.raises(Refused, match="503"):
                await waiting
        with pytest.raises(Refused, match="503"):
            await queue.turn("a").__aenter__()

    asyncio.run(scenario())


@given(st.lists(st.sampled_from(["come", "leave", "run"]), max_size=60), st.integers(0, 2**32 - 1))
def test_nobody_is_forgotten_and_never_two_run(steps: list[str], seed: int) -> None:
    """Clients come, leave while they wait, and are served, in any order."""
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


# --- what was read before ---------------------------------------------------------------------------------------------


def states(folder: Path) -> list[Path]:
    """The files of states in a folder."""
    return sorted(folder.glob("*.adaskip-prefix"))


def test_the_longest_common_beginning_of_the_right_key_is_found() -> None:
    cache = PrefixCache(100)
    cache.put("a", ids(1, 2, 3), bytearray(b"abc"))
    cache.put("a", ids(1, 9, 9, 9), bytearray(b"a999"))
    cache.put("b", ids(1, 2, 3, 4, 5), bytearray(b"other"))
    found, n = cache.find({"a"}, ids(1, 2, 3, 4, 5))
    assert found is not None and (found.state, n) == (b"abc", 3)
    assert cache.find({"a", "b"}, ids(1, 2, 3, 4, 7))[1] == 4
    assert cache.find({"c"}, ids(1, 2)) == (None, 0) and cache.find({"a"}, ids(7)) == (None, 0)
    strict = PrefixCache(100)
    strict.can_rewind = False
    strict.put("a", ids(1, 2, 3), bytearray(b"abc"))
    assert strict.find({"a"}, ids(1, 2, 4)) == (None, 0) and strict.find({"a"}, ids(1, 2, 3, 4))[1] == 3


def test_a_longer_state_takes_the_place_of_its_beginning() -> None:
    cache = PrefixCache(100)
    cache.put("a", ids(1, 2), bytearray(b"x" * 10))
    cache.put("a", ids(1, 2, 3), bytearray(b"y" * 10))
    cache.put("b", ids(1, 2), bytearray(b"z" * 10))
    assert [each.state for each in cache.entries] == [b"y" * 10, b"z" * 10]


def test_the_least_recently_used_go_first() -> None:
    cache = PrefixCache(25)
    for token in (1, 2):
        cache.put("a", ids(token), bytearray(bytes([token]) * 10))
    assert cache.take(cache.find({"a"}, ids(1))[0]) == b"\1" * 10  # type: ignore[arg-type]
    cache.put("a", ids(3), bytearray(b"\3" * 10))
    assert [each.tokens[0] for each in cache.entries] == [1, 3] and cache.n_bytes == 20
    cache.put("a", ids(4), bytearray(b"\4" * 26))
    assert [each.tokens[0] for each in cache.entries] == [1, 3], "what does not fit is not kept, and takes no room"


def test_files_outlast_the_process_within_their_bounds(tmp_path: Path) -> None:
    first = PrefixCache(4000, tmp_path / "new" / "folder")
    for token in range(6):
        first.put("a", ids(token, token), bytearray(bytes([token]) * 10))
        assert first._writing is not None
        first._writing.result(10)
    first.close()
    files = states(tmp_path / "new" / "folder")
    assert len(files) == 3, "each counts for 1 kB beside its tokens and its state"
    assert max(path.stat().st_size for path in files) < 1000
    everything = tmp_path / "new" / "folder", *(tmp_path / "new" / "folder").iterdir()
    assert os.name != "posix" or all(path.stat().st_mode & 0o077 == 0 for path in everything)
    second = PrefixCache(4000, tmp_path / "new" / "folder")
    entry, n = second.find({"a"}, ids(5, 5, 7))
    assert entry is not None and n == 2 and entry.state is None and second.take(entry) == b"\5" * 10
    assert second.find({"a"}, ids(0, 0))[1] == 0


def test_entries_whose_files_are_gone_are_forgotten(tmp_path: Path) -> None:
    cache = PrefixCache(4000, tmp_path)
    for token in range(50):
        cache.put("a", ids(token), bytearray(1500))
        if cache._writing is not None:
            cache._writing.result(10)
    assert len(cache.entries) == 2 and cache.n_bytes == 3000
    cache.close()


def test_where_nothing_can_be_written_it_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = PrefixCache(10_000, tmp_path / "kept")
    shutil.rmtree(tmp_path / "kept")
    for token in range(3):
        cache.put("a", ids(token), bytearray(10))
    cache.close()
    assert capsys.readouterr().err.count("kept in memory alone") == 1
    assert cache.take(cache.find({"a"}, ids(1))[0]) == bytearray(10)  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", ["cut", "flip", "foreign", "empty", "header", "long", "gone", "link", "pipe"])
def test_a_torn_or_foreign_file_is_ignored_and_removed(tmp_path: Path, damage: str) -> None:
    folder, other = tmp_path / "kept", tmp_path / "other"
    cache = PrefixCache(10_000, folder)
    cache.put("a", ids(1, 2), bytearray(b"state"))
    cache.close()
    (path,) = states(folder)
    content = path.read_bytes()
    changed = {
        "cut": content[:-1],
        "flip": content[:-1] + b"!",
        "foreign": b"hello",
        "empty": b"",
        "header": content.replace(b'"n_tokens":2', b'"n_tokens":1'),
    }
    if damage == "long":  # of no bytes on disk
        with open(path, "r+b") as file:
            file.truncate(10**12)
    elif damage == "link":
        path.rename(other)
        path.symlink_to(other)
    elif damage == "pipe":
        if not hasattr(os, "mkfifo"):
            pytest.skip("there are no pipes with names")
        path.unlink()
        os.mkfifo(path)
    elif damage != "gone":
        path.write_bytes(changed[damage])
    (folder / "notes.txt").write_text("mine")
    cache = PrefixCache(10_000, folder)
    entry, _ = cache.find({"a"}, ids(1, 2))
    if entry is not None:
        if damage == "gone":
            path.unlink()
        assert cache.take(entry) is None
    assert cache.find({"a"}, ids(1, 2)) == (None, 0)
    cache.close()
    assert sorted(each.name for each in folder.iterdir()) == ["hmac.key", "notes.txt"]
    assert damage != "link" or other.read_bytes() == content


def test_a_state_from_elsewhere_is_not_believed(tmp_path: Path) -> None:
    """Neither one that another folder's owner wrote, nor one with a digest that anyone can compute."""
    for name in ("ours", "theirs"):
        cache = PrefixCache(10_000, tmp_path / name)
        cache.put("a", ids(1, 2), bytearray(name.encode()))
        cache.close()
    (theirs,), (ours,) = (states(tmp_path / name) for name in ("theirs", "ours"))
    assert theirs.name == ours.name
    shutil.copy(theirs, ours)
    cache = PrefixCache(10_000, tmp_path / "ours")
    assert cache.take(cache.find({"a"}, ids(1, 2))[0]) is None  # type: ignore[arg-type]
    cache.close()


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="there are no owners of folders")
def test_a_folder_that_others_own_or_may_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shared").mkdir()
    for mode in (0o770, 0o702, 0o1777):
        (tmp_path / "shared").chmod(mode)
        with pytest.raises(DataError, match="other users may write in"):
            PrefixCache(1, tmp_path / "shared")
    (tmp_path / "shared").chmod(0o755)
    PrefixCache(1, tmp_path / "shared").close()
    monkeypatch.setattr(os, "geteuid", lambda: (tmp_path / "shared").stat().st_uid + 1)
    with pytest.raises(DataError, match="belongs to another user; choose another --cache-dir"):
        PrefixCache(1, tmp_path / "shared")


def test_what_a_link_leads_to_is_not_overwritten(tmp_path: Path) -> None:
    cache = PrefixCache(10_000, tmp_path / "kept")
    cache.put("a", ids(1, 2), bytearray(b"state"))
    cache.close()
    (path,) = states(tmp_path / "kept")
    path.unlink()
    (tmp_path / "victim").write_text("mine")
    cache = PrefixCache(10_000, tmp_path / "kept")
    path.symlink_to(tmp_path / "victim")
    cache.put("a", ids(1, 2), bytearray(b"state"))
    cache.close()
    assert (tmp_path / "victim").read_text() == "mine" and path.is_file() and not path.is_symlink()


def test_what_another_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    """Until it is an hour old: then nobody is writing it any more."""
    young, old = (tmp_path / f".{name}.adaskip-prefix.0a.tmp" for name in ("young", "old"))
    for each in (young, old):
        each.write_text("half")
    os.utime(old, times=(time.time() - 4000,) * 2)
    PrefixCache(10_000, tmp_path).close()
    assert young.exists() and not old.exists()


@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)))
def test_common_tokens_are_counted(a: list[int], b: list[int]) -> None:
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert n_common(ids(*a), ids(*b)) == expected


# --- the model --------------------------------------------------------------------------------------------------------


PLAN = SkipPlan.manual(3, attention=[1], ffn=[2], phase="bulk")


FRONTIER = frontier_of(3)
CAREFUL, FAST = (point.plan for point in FRONTIER.points)


OPTIONS: Any = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "type_k": 0, "type_v": 0, "verbose": False}
"""KV is F32, so that the rounding of other batches cannot decide."""


@pytest.fixture
def open_served() -> Iterator[Callable[..., ServedLlama]]:
    """``open_served(path, plan or frontier, folder)``: a model as the server has it, closed after the test."""
    opened = []

    def open_(
        path: Any, plan: Any = PLAN, folder: Path | None = None, options: Any = OPTIONS, **more: Any
    ) -> ServedLlama:
        own, frontier = (None, plan) if isinstance(plan, Frontier) else (plan, None)
        kwargs = {**options, **more}
        plans = Plans(own, frontier, 0.07, None, kwargs["n_ctx"])
        cache = PrefixCache(10**8, folder)
        opened.append(ServedLlama(str(path), plan=frontier, plans=plans, cache=cache, **kwargs))
        return opened[-1]

    yield open_
    for llm in opened:
        llm.close()


@pytest.fixture
def served(open_served: Callable[..., ServedLlama], tiny: Tiny) -> ServedLlama:
    return open_served(tiny())


def run(
    llm: ServedLlama, prompt: list[int], wish: Any = "auto", n: int = 6, salt: str = ""
) -> tuple[list[int], ServedRequest]:
    request = ServedRequest(wish=wish, salt=salt)
    llm.request = request
    steps = llm.generate(prompt, temp=0)
    answer = [token for token, _ in zip(steps, range(n), strict=False)]
    steps.close()
    return answer, request


@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma4", "mamba", "jamba", "lfm2"])
def test_answers_are_those_of_a_model_by_itself(
    name: str, open_served: Callable[..., ServedLlama], tiny: Tiny, tokens: Tokens
) -> None:
    """Three conversations under two plans, alternating and growing: each as if it had the model for itself.

    Against three of AdaSkipLlama, one each. With sliding windows, and with states that stand for all tokens so far.
    """
    with closing(AdaSkipLlama(str(tiny(name)), **OPTIONS)) as llm:
        n_layer = llm.n_layer
        ffn = [each.layer for each in llm.sublayers if each.kind == "ffn" and each.in_bulk][1:]
    plan = SkipPlan.manual(n_layer, ffn=ffn, phase="bulk")
    served = open_served(tiny(name), plan)
    talks = {seed: tokens(400, seed) for seed in (1, 2, 3)}
    wishes = {1: "auto", 2: "none", 3: "auto"}
    alone = {
        seed: AdaSkipLlama(str(tiny(name)), plan=plan if wish == "auto" else None, **OPTIONS)
        for seed, wish in wishes.items()
    }
    n_read = []
    for turn in range(3):
        for seed, talk in talks.items():
            answer, request = run(served, talk, wishes[seed])
            with closing(alone[seed].generate(talk, temp=0)) as steps:
                assert answer == [token for token, _ in zip(steps, range(6), strict=False)]
            n_read.append(request.n_read)
            talk += answer + tokens(20, 10 * turn + seed)[1:]
    assert min(n_read[:3]) >= 399 and max(n_read[3:]) < 50, "all but the last few tokens are known"
    for each in alone.values():
        each.close()


def test_what_a_plan_skipped_is_never_read_without_it(served: ServedLlama, tokens: Tokens) -> None:
    prompt = tokens(500)
    _, first = run(served, prompt)
    _, second = run(served, prompt, "none")
    assert first.n_skipping > 0 and second.n_read >= 500 - 4
    _, third = run(served, prompt)
    assert third.n_read == 1, "what the whole model read serves any plan"


LONG: Any = {"n_ctx": 2048}


def test_a_chat_that_grows_over_a_change_of_plan_reads_nothing_again(
    open_served: Callable[..., ServedLlama], tiny: Tiny, tokens: Tokens
) -> None:
    served = open_served(tiny(), FRONTIER, **LONG)
    talk = tokens(900)
    answer, first = run(served, talk)
    assert first.choice.plan is FAST and first.n_skipping > 0
    talk += answer + tokens(300, 2)[1:]
    _, second = run(served, talk)
    assert second.choice.plan is CAREFUL and second.n_reused >= 900 + len(answer) - 1
    _, third = run(served, talk[:1000])
    assert third.choice.plan is FAST and third.n_reused >= 999, "nor where it goes back"


def test_what_was_read_under_another_plan_of_the_frontier_outlasts_a_restart(
    open_served: Callable[..., ServedLlama], tiny: Tiny, tokens: Tokens, tmp_path: Path
) -> None:
    talk = tokens(1200)
    first = open_served(tiny(), FRONTIER, tmp_path, **LONG)
    run(first, talk[:900])
    first.close()
    # Of equal figures, as another process reads them from a plan file.
    again = open_served(tiny(), frontier_of(3), tmp_path, **LONG)
    expected, request = run(again, talk)
    assert request.choice.plan == CAREFUL and request.n_reused >= 899
    again.close()
    # The same answer as that of one model that read all of it.
    with closing(AdaSkipLlama(str(tiny()), **{**OPTIONS, **LONG})) as llm:
        llm.set_plan(FAST, readable=[CAREFUL])
        llm.eval(talk[:900])
        llm.set_plan(CAREFUL, readable=[FAST])
        with closing(llm.generate(talk, temp=0)) as steps:
            assert expected == [token for token, _ in zip(steps, range(6), strict=False)]


def edited_frontier(*losses: float) -> Frontier:
    """That of before, and edited prompts that lose so many nats in few moves and in many, at 1,024 tokens."""
    moves = (Edits(most_moves=FEW), Edits(most_moves=MANY))
    both = zip(losses, moves[: len(losses)], strict=True)
    points = (EditPoint(1024, *[quality(loss)] * 2, Passkeys(2, 2, 2), (), each) for loss, each in both)
    return replace(FRONTIER, edits=tuple(points))


def test_edits_are_used_again_as_far_as_the_promise_allows(
    open_served: Callable[..., ServedLlama], tiny: Tiny, tokens: Tokens
) -> None:
    """Of 0.07 nats small edits may take 0.035, and the plan has the rest."""
    served = open_served(tiny(), edited_frontier(0.03, 0.2), **LONG)
    a, b, line = tokens(400), tokens(500, 1)[1:], tokens(9, 2)[1:]
    _, first = run(served, a + b)
    assert first.choice.plan is CAREFUL and first.reuse == "edits", "0.06 and 0.03 would be too much"
    _, second = run(served, a[:300] + line + a[300:] + b)
    assert second.n_moved > 400 and second.n_read < 200
    _, third = run(served, a[:1] + b + a[1:])
    assert third.n_moved == 0 and third.n_read > 890, "another order loses too much"
    _, fourth = run(served, a[:1] + line + b + a[1:], {"max_loss": 0.05})
    assert fourth.reuse == "prefix" and fourth.n_read > 890 and fourth.choice.plan is CAREFUL
    _, fifth = run(served, a[:1] + b + a[1:], "none")
    assert fifth.reuse == "prefix" and fifth.n_read > 890, "the whole model reads nothing that was moved"


def test_a_new_order_is_read_where_the_promise_allows_that(
    open_served: Callable[..., ServedLlama], tiny: Tiny, tokens: Tokens
) -> None:
    served = open_served(tiny(), edited_frontier(0.01, 0.02), **LONG)
    a, b = tokens(400), tokens(500, 1)[1:]
    run(served, a + b)
    _, second = run(served, a[:1] + b + a[1:])
    assert second.n_moved > 700 and second.n_read < 200
    _, third = run(served, a[:1] + b + a[1:], {"max_loss": 0.039})
    assert third.reuse == "edits" and third.n_read > 880, "few moves alone keep this promise"


def test_documents_that_others_asked_about_are_put_together(
    open_served: Callable[..., ServedLlama], tiny: Tiny, tokens: Tokens, tmp_path: Path
) -> None:
    """From states in memory and on disk, of the same owner alone, and only where the promise allows new orders."""
    head, documents = tokens(80), [tokens(300, seed)[1:] for seed in (1, 2, 3)]
    prompt = [*head, *documents[2], *documents[0], *documents[1]]
    served = open_served(tiny(), edited_frontier(0.01, 0.02), tmp_path, **LONG)
    for each in documents:
        run(served, [*head, *each])
    served.close()
    again = open_served(tiny(), edited_frontier(0.01, 0.02), tmp_path, **LONG)
    _, other = run(again, prompt, salt="another")
    assert other.n_read == len(prompt) and other.n_moved == 0
    run(again, tokens(500, 9))
    _, request = run(again, [*prompt, *tokens(9, 8)])
    assert request.n_moved > 500 and request.n_read < 200
    prompt = [*head, *documents[1], *documents[0], *documents[2]]
    _, careful = run(again, prompt, {"max_loss": 0.039})
    assert careful.n_moved == 0 and careful.n_read == len(prompt) - len(head) - len(documents[1])


def test_a_tighter_promise_reads_again_what_was_read_under_a_plan_that_does_not_keep_it(
    open_served: Callable[..., ServedLlama], tiny: Tiny, tokens: Tokens
) -> None:
    served, prompt = open_served(tiny(), FRONTIER, **LONG), tokens(900)
    run(served, prompt)
    answer, tighter = run(served, prompt, {"max_loss": 0.05})
    assert tighter.choice.plan is CAREFUL and tighter.n_skipping > 0 and tighter.n_reused < 100
    with (
        closing(AdaSkipLlama(str(tiny()), plan=CAREFUL, **{**OPTIONS, **LONG})) as llm,
        closing(llm.generate(prompt, temp=0)) as steps,
    ):
        assert answer == [token for token, _ in zip(steps, range(6), strict=False)]
    assert run(served, prompt)[1].n_read == 1, "what keeps the tighter promise keeps the other"


def test_after_plans_the_whole_model_is_itself_bit_for_bit(
    open_served: Callable[..., ServedLlama], tiny: Tiny, tokens: Tokens
) -> None:
    served, prompt = open_served(tiny(), FRONTIER, **LONG), tokens(900)
    for wish in ("auto", {"max_loss": 0.05}, {"speedup": 1.4}):
        run(served, prompt, wish)
    request = ServedRequest(wish="none", reuses=False)
    served.request = request
    with closing(served.generate(prompt, temp=0)) as steps:
        next(steps)
        logits = np.ctypeslib.as_array(served._ctx.get_logits_ith(-1), (served.n_vocab(),)).copy()
    with (
        closing(AdaSkipLlama(str(tiny()), **{**OPTIONS, **LONG})) as llm,
        closing(llm.generate(prompt, temp=0)) as steps,
    ):
        next(steps)
        np.testing.assert_array_equal(logits, np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), (llm.n_vocab(),)))
    assert run(served, prompt, "none")[1].n_skipping == 0 == request.n_skipping


def test_it_is_opened_with_the_settings_that_were_found_on_this_machine(
    open_served: Callable[..., ServedLlama], tiny: Tiny, open_model: Callable[..., Any]
) -> None:
    machine, found = cost_settings(open_model(tiny())), Settings(flash_attn=True, repack=False, n_batch=96, n_ubatch=64)
    opened = []
    for each in (machine, replace(machine, cpu="another")):
        frontier = frontier_of(3, settings=found, machine=each)
        served = quietly(partial(open_served, options={}), tiny(), 1024, Running(n_threads=1), plan=frontier)
        opened.append(cost_settings(served))
    assert [(each.flash_attention, each.repack, each.n_batch, each.n_ubatch) for each in opened] == [
        (True, False, 96, 64),
        (False, True, 512, 512),
    ]


def test_a_prompt_that_shall_be_read_anew_is_and_leaves_the_others(served: ServedLlama, tokens: Tokens) -> None:
    talk, other = tokens(300, 1), tokens(300, 2)
    run(served, talk)
    for _ in range(2):
        request = ServedRequest(reuses=False)
        served.request = request
        assert next(served.generate(other, temp=0)) >= 0 and request.n_read == 300
    assert run(served, talk)[1].n_read == 1
    assert run(served, other)[1].n_read >= 299, "nor is it read on"
    run(served, talk)
    assert run(served, other)[1].n_read == 1, "what is read in the ordinary way is kept again"
    assert {tuple(each.tokens[:300]) for each in served.prefix_cache.entries} == {tuple(talk), tuple(other)}


def test_what_others_wrote_is_not_told(served: ServedLlama, tokens: Tokens) -> None:
    """Not even as a count of tokens that need not be read: of what is in memory, and of what the cache has."""

    def ask(prompt: list[int], **whose: str) -> int:
        request = ServedRequest(**whose)
        served.request = request
        with closing(served.generate(prompt, temp=0)) as steps:
            next(steps)
        return request.n_reused

    talk, other = tokens(300, 1), tokens(300, 2)
    assert ask(talk, salt="a") == 0 == ask(talk, salt="b") == ask(talk) == ask(talk, owner="a")
    ask(other)  # so that the cache has it
    assert ask(talk, owner="b") == 0 == ask(talk, salt="c") == ask(talk, owner="a", salt="a")
    assert [ask(talk, **whose) for whose in ({"salt": "a"}, {"owner": "a"}, {"salt": "b"}, {})] == [299] * 4


def test_an_answer_tells_why_its_prompt_was_read(
    open_served: Callable[..., ServedLlama], tiny: Tiny, tokens: Tokens
) -> None:
    served = open_served(tiny())
    talk, other = tokens(300, 1), tokens(300, 2)
    assert run(served, talk)[1].reread_because == "new"
    assert run(served, talk)[1].reread_because is None
    assert run(served, talk[:200] + other[1:100])[1].reread_because == "text"
    assert run(served, talk[:24] + other[1:100])[1].reread_because == "text"
    assert run(served, other)[1].reread_because == "new", "but for its first token, which all have"
    assert run(served, talk, "none")[1].reread_because == "plan"
    request = served.request = ServedRequest(reuses=False)
    next(served.generate(other, temp=0))
    assert request.reread_because == "cache_prompt" and request.summary["reread_because"] == "cache_prompt"
    request = served.request = ServedRequest(salt="of another")
    next(served.generate(talk, temp=0))
    assert request.reread_because == "new", "that it is there for others is not told"
    served.request = ServedRequest()
    served.create_completion("the " * 100, max_tokens=1, echo=True, logprobs=1)
    assert served.request.reread_because == "logprobs"


def test_an_answer_tells_that_its_prompt_was_forgotten(
    open_served: Callable[..., ServedLlama], tiny: Tiny, tokens: Tokens
) -> None:
    served = open_served(tiny())
    run(served, tokens(300, 1))
    run(served, tokens(300, 2))
    (kept,) = served.prefix_cache.entries
    served.prefix_cache.most = kept.n_bytes + 10
    run(served, tokens(300, 3))
    assert run(served, tokens(300, 1))[1].reread_because == "evicted"
    served.prefix_cache.most = 10
    run(served, tokens(300, 4))
    assert run(served, tokens(300, 1))[1].reread_because == "evicted", "it did not fit at all"


def test_a_recurrent_state_cannot_go_back(open_served: Callable[..., ServedLlama], tiny: Tiny, tokens: Tokens) -> None:
    served = open_served(tiny("mamba"), None)
    run(served, tokens(300))
    assert run(served, tokens(300)[:200])[1].reread_because == "memory"


def test_the_progress_of_a_prompt_is_told_batch_by_batch(served: ServedLlama, tokens: Tokens) -> None:
    """Under a plan with a bulk, which cuts a prompt in three; and of one of which a part was known."""

    def ask(prompt: list[int]) -> list[tuple[int, int, int]]:
        told = []
        request = served.request = ServedRequest(
            on_step=lambda: told.append((request.n_prompt, request.n_cached, request.n_done, request.n_generated))
        )
        with closing(served.generate(prompt, temp=0)) as steps:
            next(steps)
            next(steps)
        assert [each[3] for each in told[-2:]] == [0, 1], "then the answer token by token"
        return list(dict.fromkeys(each[:3] for each in told if each[1] is not None and not each[3]))

    talk = tokens(900)
    first = ask(talk)
    done = [each[2] for each in first]
    assert done[0] == 0 and done[-1] == 900 and done == sorted(set(done)) and len(done) >= 4
    assert {each[:2] for each in first} == {(900, 0)}
    assert ask(talk[:500] + tokens(100, 2)[1:])[0] == (599, 500, 500)


def test_a_request_that_nobody_waits_for_ends_at_the_next_batch(served: ServedLlama, tokens: Tokens) -> None:
    request = ServedRequest()
    served.request = request
    steps = served.generate(tokens(100), temp=0)
    next(steps)
    request.is_left = True
    with pytest.raises(Gone):
        next(steps)
    request = ServedRequest()
    request.is_left = True
    served.request = request
    with pytest.raises(Gone):
        next(served.generate(tokens(900, 5), temp=0))
    assert served.n_tokens < 200
    answer, _ = run(served, tokens(300, 6))
    assert len(answer) == 6


def test_an_answer_that_ends_within_a_character_ends_after_its_last_byte_or_where_the_context_is_full(
    served: ServedLlama,
) -> None:
    """Stock goes on beyond ``max_tokens`` until the character is whole, and fails where there is no room."""
    half = next(token for token in range(served.n_vocab()) if served.detokenize([token]) == b"\xe3")
    body = {"prompt": "the", "temperature": 0, "logit_bias": {half: 100}}
    for most, n_expected in ((2000, served.context_size + 1 - 4), (2, 5)):
        request = read_body("/v1/completions", json.dumps({**body, "max_tokens": most}).encode())
        (choice,) = served.answer(request)["choices"]
        assert choice["finish_reason"] == "length"
        assert request.n_generated == n_expected, "the last token needs no room, and a character has four bytes at most"
    letter = served.tokenize(b"x", add_bos=False)[-1]
    biased = {"logit_bias": {letter: 50, half: 49.9}, "frequency_penalty": 0.05, "max_tokens": 2}
    (choice,) = served.answer(read_body("/v1/completions", json.dumps({**body, **biased}).encode()))["choices"]
    assert choice["text"] == "x" and choice["finish_reason"] == "length", "stock forgets what came before it"


def test_what_follows_a_schema_is_json_whatever_the_model_prefers(served: ServedLlama) -> None:
    """Stock lets line breaks into texts, as they are."""
    (line_break,) = (token for token in range(served.n_vocab()) if served.detokenize([token]) == b"\n")
    form = {"type": "json_object", "schema": {"type": "string", "maxLength": 3}}
    body = {"messages": [{"role": "user", "content": "a"}], "response_format": form, "max_tokens": 20}
    body |= {"logit_bias": {line_break: 100}, "temperature": 0}
    (choice,) = served.answer(read_body("/v1/chat/completions", json.dumps(body).encode()))["choices"]
    assert choice["finish_reason"] == "stop" and json.loads(choice["message"]["content"]) is not None


def test_logprobs_are_those_of_the_stock_library(served: ServedLlama, tiny: Tiny) -> None:
    """Against llama-cpp-python with ``logits_all``: of a prompt and its answer; it tells none of the first token."""
    options = {"max_tokens": 5, "temperature": 0.0, "logprobs": 3, "echo": True, "logit_bias": {2: -100.0}}
    stock = AdaSkipLlama(str(tiny()), logits_all=True, **OPTIONS)
    expected: Any = stock.create_completion("the to of an re", **options)  # type: ignore[arg-type]
    served.request = ServedRequest()
    found: Any = served.create_completion("the to of an re", **options)  # type: ignore[arg-type]
    ours, theirs = (each["choices"][0]["logprobs"] for each in (found, expected))
    assert found["choices"][0]["text"] == expected["choices"][0]["text"] and ours["tokens"] == theirs["tokens"]
    np.testing.assert_allclose(ours["token_logprobs"][1:], theirs["token_logprobs"][1:], atol=1e-4)
    assert theirs["token_logprobs"][0] is None and ours["token_logprobs"][0] < 0, "BOS is before it"
    streamed = ServedRequest(wish="none")
    served.request = streamed
    chunks: Any = list(served.create_completion("the to of an re", **options, stream=True))  # type: ignore[arg-type]
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    assert [token for part in parts for token in part["tokens"]] == ours["tokens"]
    assert len(served.scores) == served.n_batch, "no row per position"
    stock.close()


def test_nothing_is_generated_where_nothing_is_wanted(served: ServedLlama) -> None:
    """Stock takes 0 as no limit."""
    served.request = ServedRequest()
    answer: Any = served.create_completion("the to", max_tokens=0, echo=True, logprobs=1)
    assert answer["choices"][0]["text"] == "the to"
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == answer["usage"]["prompt_tokens"] - 1


def test_a_text_without_tokens_is_not_embedded(tmp_path: Path) -> None:
    """Of a vocabulary that begins texts with no token. Stock writes out of bounds for it."""
    model = write_model(tmp_path / "bytes.gguf", pre="gpt-2")
    with (
        closing(AdaSkipLlama(str(model), embedding=True, **OPTIONS)) as llm,
        pytest.raises(RequestError, match="a text to embed is empty"),
    ):
        llm.embed(["the", ""])


def test_an_error_of_the_server_is_logged_without_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    for logs_text in (False, True):
        try:
            raise KeyError("the to".upper())  # the line itself is in the log, as it is none that a client wrote
        except KeyError as error:
            status, message, _ = answer.explained(error, logs_text=logs_text)
        log = capsys.readouterr().err
        assert status == 500 and "THE TO" not in message
        assert "in test_an_error" in log and "KeyError" in log and ("THE TO" in log) == logs_text


# --- bodies and plans -------------------------------------------------------------------------------------------------


def test_a_body_may_have_what_the_schema_lacks() -> None:
    request = read_body("/v1/completions", b'{"prompt": [[1, 2]], "temperature": null, "stream_options": {}}')
    body: Any = request.body
    assert request.prompt_tokens == [1, 2] and (body.prompt, body.temperature) == ("", 0.8)
    assert request.wish == "auto" and not request.includes_usage
    chat = (
        b'{"messages": [{"role": "developer", "content": [{"type": "text", "text": "a"}]}], "max_completion_tokens": 3}'
    )
    body = read_body("/v1/chat/completions", chat).body
    assert body.messages == [{"role": "system", "content": "a"}] and body.max_tokens == 3
    assert read_body("/v1/completions", b'{"prompt": "a", "cache_salt": "mine"}').salt == "mine" and request.salt == ""
    with pytest.raises(RequestError, match="cache_salt is 3"):
        read_body("/v1/completions", b'{"prompt": "a", "cache_salt": 3}')


def test_what_calls_a_tool_needs_no_content() -> None:
    """As the openai package sends back the message that it got."""
    call = {"id": "a", "type": "function", "function": {"name": "go", "arguments": "{}"}}
    for content in ({"content": None}, {}):
        asked = {"messages": [{"role": "assistant", **content, "tool_calls": [call]}]}
        body: Any = read_body("/v1/chat/completions", json.dumps(asked).encode()).body
        assert body.messages == [{"role": "assistant", "content": "", "tool_calls": [call]}]


def chosen(wish: Any, n_tokens: int, frontier: Frontier | None = FRONTIER, own: SkipPlan | None = None) -> Choice:
    """What a server of 4,096 tokens that promises 0.07 chooses."""
    return Plans(own, frontier, 0.07, None, 4096).choose(wish, n_tokens)


def test_edits_and_plan_share_a_promise() -> None:
    plans = Plans(None, edited_frontier(0.01), 0.07, None, 4096)
    for wish, plan, moves in (
        ("auto", FAST, FEW),  # 0.06 and 0.01
        ({"max_loss": 0.069}, CAREFUL, FEW),
        ({"max_loss": 0.019}, None, None),
        ({"speedup": 1.4}, FAST, None),  # which needs the whole promise that it names
        ("none", None, None),
    ):
        choice = plans.choose(wish, 1000, edited=True)
        assert choice.plan is plan and (choice.edits.most_moves if choice.edits else None) == moves
        assert plans.choose(wish, 1000).edits is None


def test_a_promise_chooses_by_the_length_of_the_prompt() -> None:
    """The promise of the server, or the request's own. Losses grow with the length."""
    plans = {n: chosen("auto", n).plan for n in (511, 512, 1024, 1025, 4096)}
    assert plans == {511: None, 512: FAST, 1024: FAST, 1025: CAREFUL, 4096: CAREFUL}
    assert chosen({"max_loss": 0.03}, 1000).plan is CAREFUL and chosen({"max_loss": 0.15}, 4000).plan is FAST
    choice = chosen({"max_loss": 0.029}, 1000)
    assert (choice.plan, choice.name, choice.point, choice.readable) == (None, "none", None, ())
    assert chosen("none", 1000) == Choice()
    choice = chosen("auto", 1025)
    assert (choice.name, choice.max_loss, choice.speedup) == ("promise 0.07", 0.07, pytest.approx(1.3))
    assert set(map(id, choice.readable)) == {id(CAREFUL), id(FAST)}, "in shorter prompts the fast one keeps it"
    assert chosen({"max_loss": 0.05}, 1025).readable == (CAREFUL,)


def test_a_speed_up_is_had_under_the_least_promise_that_gives_it() -> None:
    choice = chosen({"speedup": 1.2}, 1000)
    assert choice.plan is CAREFUL and choice.readable == (CAREFUL,)
    assert chosen({"speedup": 1.4}, 2000).plan is FAST
    assert chosen({"speedup": 2}, 100) == chosen({"speedup": 1}, 100) != chosen({"speedup": 1.2}, 1000)
    assert chosen({"speedup": 2}, 100).plan is None, "a short prompt has little bulk, and a chat begins with one"
    with pytest.raises(RequestError, match=r"2 times as fast at 1024 tokens; ask for at most 1\.5"):
        chosen({"speedup": 2}, 1000)


def test_a_speed_up_is_had_where_losses_are_not_known_exactly() -> None:
    """The promise covers 1.6 standard errors too, and a plan that loses a pass key counts as none."""
    (careful, fast), losing = FRONTIER.points, Passkeys(2, 2, 1)
    unsure = replace(fast, copying=replace(fast.copying, error=0.02))
    choice = chosen({"speedup": 1.4}, 1000, Frontier((careful, unsure)))
    assert choice.plan is FAST and choice.max_loss == pytest.approx(fast.copying.harm + 1.6 * 0.02)
    with pytest.raises(RequestError, match=r"at most 1\.2"):
        chosen({"speedup": 1.4}, 1000, Frontier((careful, replace(fast, passkeys=losing))))


def test_without_a_frontier_a_promise_is_kept_by_the_whole_model_and_a_speed_up_needs_a_profile() -> None:
    assert chosen({"max_loss": 9}, 1000, None, PLAN) == chosen("auto", 1000, None) == Choice()
    assert chosen("auto", 1000, None, PLAN) == Choice(PLAN, "auto")
    with pytest.raises(RequestError, match="adaskip-cpp calibrate"):
        chosen({"speedup": 1.5}, 10, None)


def test_an_answer_tells_its_point_of_the_frontier() -> None:
    told = ServedRequest(n_layer=3, choice=chosen("auto", 1025)).summary
    assert told["plan"] == "promise 0.07" and told["max_loss"] == 0.07
    assert (told["loss_measured"], told["speedup_predicted"]) == (0.03, pytest.approx(1.3))
    told = ServedRequest(n_layer=3, choice=chosen("none", 1025)).summary
    assert told["plan"] == "none" and told["max_loss"] is told["loss_measured"] is told["speedup_predicted"] is None


def test_a_chat_keeps_its_plan_while_it_grows() -> None:
    asked = []

    def plan(request: Any) -> SkipPlan:
        asked.append(request.context)
        return PLAN

    profile: Any = SimpleNamespace(plan=plan)
    plans = Plans(None, None, 0.05, profile, 5000)
    for n_tokens in (1, 1000, 1024, 1025, 2048, 4097):
        assert plans.choose({"speedup": 1.5}, n_tokens).plan is PLAN
    assert asked == [1024, 2048, 5000]


def test_equal_plans_have_one_key() -> None:
    again = SkipPlan.manual(3, attention=[1], ffn=[2], phase="bulk")
    assert plan_key(again) == plan_key(PLAN) != plan_key(SkipPlan.manual(3, ffn=[2], phase="bulk"))
    assert plan_key(None) == "whole"


def test_a_client_that_takes_nothing_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "STALL", 0.05)

    async def stuck(message: Any) -> None:
        await asyncio.sleep(60)

    async def send() -> None:
        sent = answer.Sent(stuck)
        await sent.event(b"first")
        await asyncio.sleep(0.2)
        await sent.error(500, "nobody hears it")
        await sent.event(b"second")

    with pytest.raises(Gone):
        asyncio.run(send())


def through_the_gate(
    send: Any, body: bytes, answer: Callable[[Any, Any], Any], queue: FairQueue | None = None
) -> Coroutine[Any, Any, None]:
    """A completion as a gate answers it, of a worker that answers so; what is sent goes to ``send``."""
    nothing: Any = SimpleNamespace(answered=lambda *_: None, ran=lambda *_: None)

    async def load(worker: Any) -> None:
        pass

    workers: Any = SimpleNamespace(choose=lambda name: SimpleNamespace(answer=answer), load=load)
    queue = FairQueue(1) if queue is None else queue
    gate = Gate(workers, {}, queue, nothing, keys=(), names=("",), most_body=1000)
    messages = [{"type": "http.request", "body": body}]

    async def receive() -> Any:
        return messages.pop() if messages else await asyncio.sleep(60)

    return gate({"type": "http", "path": "/v1/completions", "method": "POST", "headers": []}, receive, send)


STREAM = b'{"prompt": "a", "stream": true}'


def test_a_slow_reader_does_not_hold_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes an event in a tenth of a second, and has half a second for what it has not taken at the end."""
    monkeypatch.setattr(answer, "LEFT", 0.5)
    taken: list[Any] = []
    n_taken: list[int] = []  # when the turn ended

    async def send(message: Any) -> None:
        await asyncio.sleep(0.1)
        taken.append(message)

    async def fast(request: Any, sent: Any) -> None:
        for _ in range(200):
            await sent.event(b"word")
        await sent.event(b"end", is_last=True)
        n_taken.append(len(taken))

    asyncio.run(through_the_gate(send, STREAM, fast))
    assert n_taken[0] < 100 and n_taken[0] < len(taken) < n_taken[0] + 50


def test_a_stream_that_says_nothing_gets_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it waits for its turn, and while the model works."""
    monkeypatch.setattr(middleware, "PING", 0.02)
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        sent.append(message.get("body", b"begin"))

    async def slow(request: Any, sent: Any) -> None:
        await asyncio.sleep(0.1)
        await sent.event(b"word", is_last=True)

    async def whole(request: Any, sent: Any) -> None:
        await asyncio.sleep(0.1)
        await sent.json(200, b"{}")

    async def scenario() -> int:
        queue = FairQueue(1)
        async with queue.turn("another"):
            asked = asyncio.ensure_future(through_the_gate(send, STREAM, slow, queue))
            await asyncio.sleep(0.1)
            n_waiting = len(sent)
        await asked
        return n_waiting

    n_waiting = asyncio.run(scenario())
    assert sent[0] == b"begin" and sent[-1] == b"word"
    assert 2 < n_waiting < len(sent) - 2 and set(sent[1:-1]) == {b": ping\n\n"}
    sent.clear()
    asyncio.run(through_the_gate(send, b'{"prompt": "a"}', whole))
    assert sent == [b"begin", b"{}"]


def admitted(headers: dict[str, str], keys: Collection[str] = (), names: Collection[str] = ("localhost",)) -> int:
    """The status that a gate answers to a request for something that is not there: 404 where it may ask."""
    nothing: Any = SimpleNamespace(answered=lambda *_: None)
    gate = Gate(nothing, {}, FairQueue(1), nothing, keys=keys, names=names, most_body=1)
    return answered(gate, "/v1/none", headers)[0]


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    assert admitted({"authorization": "Bearer x"}, ("k", "l")) == 401
    assert admitted({"authorization": "Bearer k"}, ("k", "l")) == 404
    assert compared == [(b"x", b"k"), (b"x", b"l"), (b"k", b"k"), (b"k", b"l")], "all, whichever it is"


def test_without_a_key_it_is_asked_by_an_address_or_a_listed_name() -> None:
    """The owner of any other name may let it lead here. Names of this machine are announced by others too (mDNS)."""
    own = socket.gethostname()
    for host in ("127.0.0.1:8000", "[::1]:8000", "192.168.0.7", "localhost:1"):
        assert admitted({"host": host}) == 404
    for host in ("127.0.0.1.example", "127.x.example", "example.com", f"{own}.local", own, "[::1", ""):
        assert admitted({"host": host}) == 403
    assert admitted({"host": "Box.lan:80"}, names=("localhost", "box.lan")) == 404
    assert admitted({"host": "box.lan", "origin": "http://127.x.example"}, names=("box.lan",)) == 403
    assert admitted({"host": "box.lan", "origin": "http://box.lan"}, names=("box.lan",)) == 404
    assert not is_loopback("127.x.example") and is_loopback("127.0.0.2") and is_loopback("::1")


def test_an_ipv6_client_has_all_addresses_of_its_network() -> None:
    assert network_of("2001:db8::1") == network_of("2001:db8::ffff:2") != network_of("2001:db8:0:1::1")
    assert network_of("::ffff:10.0.0.1") == network_of("10.0.0.1") != network_of("10.0.0.2")


# --- connections ------------------------------------------------------------------------------------------------------


def served_by(app: Any, clients: Callable[[int], Any]) -> None:
    """Run a server of an application in this process, and what ``clients`` does with its port."""

    async def scenario() -> None:
        listener = listen("127.0.0.1", 0)
        running = server.Server(app, FairQueue(1), Nobody(), listener)
        serving = asyncio.create_task(running.serve())
        while not running.started:
            await asyncio.sleep(0.01)
        try:
            await asyncio.wait_for(clients(listener.getsockname()[1]), 30)
        finally:
            running.should_exit = True
            await serving

    asyncio.run(scenario())


async def fine(scope: Any, receive: Any, send: Any) -> None:
    """An application that has nothing to say."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


ASKING = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"


def test_headers_that_do_not_come_end_their_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one that sends a byte now and then, and of one that asks no more behind an answer, in whatever it sends."""
    monkeypatch.setattr(server, "HEAD", 0.5)

    async def clients(port: int) -> None:
        for first in (b"", ASKING):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            begin = time.monotonic()
            writer.write(first + b"GET / HTTP/1.1\r\n")
            with contextlib.suppress(OSError):
                while not reader.at_eof():
                    writer.write(b"a")
                    with contextlib.suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(reader.read(1000), 0.1)
            assert 0.4 < time.monotonic() - begin < 10
            writer.close()

    served_by(fine, clients)


def test_a_body_that_does_not_come_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "BODY", 0.1)
    nothing: Any = SimpleNamespace(answered=lambda *_: None)
    gate = Gate(nothing, {}, FairQueue(1), nothing, keys=(), names=("localhost",), most_body=1000)

    async def clients(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n1")
        assert b" 408 " in await reader.readline()
        writer.close()

    served_by(gate, clients)


def test_a_connection_more_takes_the_place_of_one_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight, four of one address: four that wait for a head or a body give way one by one, four that run do not."""
    monkeypatch.setattr(server, "_most_connections", lambda: 8)
    go, n_running = asyncio.Event(), 0

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        nonlocal n_running
        if scope["path"] == "/slow":
            n_running += 1
            await go.wait()
        await fine(scope, receive, send)

    async def clients(port: int) -> None:
        opened = []

        async def open_(content: bytes) -> asyncio.StreamReader:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            opened.append(writer)
            writer.write(content)
            await asyncio.sleep(0.05)
            return reader

        idle = [await open_(begun) for begun in (b"", b"GET /", b"", ASKING.replace(b"GET", b"PUT"))]
        first = await open_(ASKING.replace(b"/", b"/slow", 1))
        assert await idle[0].read() == b"" and not idle[1].at_eof()
        running = [first, *[await open_(ASKING.replace(b"/", b"/slow", 1)) for _ in range(3)]]
        assert n_running == 4 and [await each.read() for each in idle[1:3]] == [b"", b""]
        with contextlib.suppress(ConnectionResetError):
            assert await (await open_(ASKING)).read() == b"", "there is no room"
        go.set()
        for each in running:
            assert b" 200 " in await each.readline()
        assert b" 200 " in await (await open_(ASKING)).readline(), "they are between two requests"
        for each in opened:
            each.close()

    served_by(slow, clients)


def test_what_repeats_itself_is_logged_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    log = server._Seldom()
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def passes(text: str) -> bool:
        return log.filter(logging.LogRecord("uvicorn.error", logging.WARNING, "", 1, text, (), None))

    assert [passes(text) for text in ("a", "a\nmore", "b", "a")] == [True, False, True, False]
    now += 61
    assert passes("a") and not passes("a")
