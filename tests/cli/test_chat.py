"""The chat: what it prints, what it keeps, and that no mistake of the user ends it."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from click.testing import CliRunner, Result
from oracles.costs import cost_model
from oracles.frontiers import frontier, point
from oracles.tiny_families import N_EMBD
from oracles.tiny_models import add_chat_template
from rich.console import Console

import adaskip_cpp.model.frontier
from adaskip_cpp import Profile, SkipPlan
from adaskip_cpp.cli.chat import Conversation
from adaskip_cpp.cli.main import main
from adaskip_cpp.engine.generation import Generation
from adaskip_cpp.errors import PlanError, RequestError
from adaskip_cpp.model.identity import ModelInfo, fingerprint, plan_path
from adaskip_cpp.model.plan_file import save_plan
from adaskip_cpp.model.statistics import PhaseStatistics

Chat = Callable[..., Result]


@pytest.fixture(scope="module")
def model(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama model with a chat template."""
    return add_chat_template(tiny(), tmp_path_factory.mktemp("chat") / "chat.gguf")


@pytest.fixture
def profile(model: Path, tmp_path: Path) -> Path:
    """A profile of it."""
    path = tmp_path / "p.json"
    ones, zeros = np.ones((3, 2)), np.zeros((3, 2, N_EMBD), np.float32)
    similarity = np.linspace(0.5, 0.99, 6).reshape(3, 2)
    statistics = PhaseStatistics(similarity, ones, ones, np.ones(3), zeros, zeros, 10)
    known = ModelInfo(fingerprint(model), "llama", 3)
    Profile(statistics, statistics, 1, 10, known, divergence=1 - similarity, copying=1 - similarity).save(path)
    return path


@pytest.fixture
def chat(model: Path) -> Chat:
    """``chat("hello", "/quit", args=[...])``: the chat with these lines on stdin."""

    def run(*lines: str, args: list[object] | None = None) -> Result:
        words = ["chat", str(model), "--temp", "0", "--max-tokens", "6", *map(str, args or [])]
        return CliRunner().invoke(main, words, input="".join(f"{line}\n" for line in lines), prog_name="adaskip-cpp")

    return run


def statuses(result: Result) -> list[str]:
    """The lines that tell an answer's figures."""
    assert result.exit_code == 0, result.output
    return [line for line in result.stderr.splitlines() if line.startswith("prompt ")]


# --- a conversation ---------------------------------------------------------------------------------------------------


def test_every_piped_line_is_answered(chat: Chat) -> None:
    result = chat("hello", "", "and now?")
    assert len(statuses(result)) == 2
    assert "/s" not in result.stdout and ">" not in result.stderr


def test_the_answer_is_that_of_the_stock_chat(model: Path, open_model: Any, chat: Chat) -> None:
    stock = open_model(model, n_ctx=256).create_chat_completion(
        [{"role": "user", "content": "the hat"}], temperature=0, max_tokens=6
    )
    # llama_cpp.Llama decodes a text as a whole, the stream decodes what is complete: bytes that are none differ.
    expected = stock["choices"][0]["message"]["content"].replace("\ufffd", "")
    assert chat("the hat", args=["--ctx", 256]).stdout.strip().replace("\ufffd", "") == expected.strip()


def test_a_turn_reads_only_what_is_new(model: Path, open_model: Any) -> None:
    llm = open_model(model, n_ctx=256, logits_all=False)
    first = Generation(llm, list(range(3, 43)), max_tokens=5)
    list(first)
    assert first.timing is not None and (first.timing.n_prompt, first.timing.n_evaluated) == (40, 40)
    second = Generation(llm, [*range(3, 43), *range(50, 60)], max_tokens=5)
    cached = llm.input_ids[: llm.n_tokens].tolist()
    list(second)
    assert second.timing is not None
    n_common = next(i for i, (a, b) in enumerate(zip([*cached, -1], second.prompt, strict=False)) if a != b)
    assert (second.timing.n_prompt, second.timing.n_evaluated) == (50, 50 - n_common)


def test_the_system_text_and_all_turns_are_in_the_prompt(model: Path, open_model: Any) -> None:
    llm = open_model(model, n_ctx=256)
    conversation = Conversation(llm, None, 4, 0.0, Console(), "be brief", [("user", "one"), ("assistant", "two")])
    prompt = llm.detokenize(conversation.ask("three").prompt).decode()
    assert "system: be brief\nuser: one\nassistant: two\nuser: three\nassistant:" in prompt


def test_the_status_line_tells_both_phases_and_fits_the_terminal(chat: Chat, profile: Path) -> None:
    (status,) = statuses(chat("hello", args=["--profile", profile, "--skip", 2]))
    assert "skipped 2 bulk, 0 decode" in status and "/8192" in status
    (status,) = statuses(chat("hello", args=["--profile", profile, "--skip", 2, "--mode", "prefill"]))
    assert "skipped 2 prefill, 2 decode" in status
    (status,) = statuses(chat("hello", args=["--profile", profile, "--skip", 2, "--mode", "decode"]))
    assert "skipped 0 prefill, 2+0 decode" in status
    assert len(status) <= 80


# --- commands ---------------------------------------------------------------------------------------------------------


def test_the_time_to_the_first_token_is_told_and_what_it_would_have_been(
    chat: Chat, profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_cost = replace(Profile.load(profile), cost=cost_model(0.1, [1] * 3, [1] * 3, size=64))
    monkeypatch.setattr(Profile, "load", lambda path: with_cost)
    first = [text for text in chat("hello").stderr.splitlines() if text.startswith("first token after ")]
    assert len(first) == 1 and "without" not in first[0]
    told = chat("hello" * 20, "and?", args=["--profile", profile, "--skip", 2]).stderr
    first = [text for text in told.splitlines() if text.startswith("first token after ")]
    assert len(first) == 2 and all("; predicted without the plan: " in text for text in first)
    taken, whole = (float(each) for each in re.findall(r"[\d.]+(?= m?s\b)", first[1]))
    assert taken == whole, "the second message is no more than a tail"


def test_quit_leaves_and_reset_forgets(chat: Chat) -> None:
    assert len(statuses(chat("hello", "/quit", "never read"))) == 1
    first, again = statuses(chat("hello", "/reset", "hello"))
    assert first.split("context")[1] == again.split("context")[1]


def test_mistakes_are_told_and_the_chat_goes_on(chat: Chat) -> None:
    result = chat("/nonsense", "/plan", "hello")
    assert len(statuses(result)) == 1
    assert "no command /nonsense" in result.stderr and "Nothing is skipped" in result.stderr


# --- limits -----------------------------------------------------------------------------------------------------------


def test_a_full_context_is_told_and_reset_helps(chat: Chat) -> None:
    result = chat("hello", "x" * 100, "/reset", "hello", args=["--ctx", 64])
    assert len(statuses(result)) == 2
    assert "but the context has 64" in result.stderr and "/reset" in result.stderr
    assert "Traceback" not in result.output


def test_an_answer_cut_off_by_the_context_says_so(chat: Chat) -> None:
    result = chat("x" * 20, args=["--ctx", 48, "--max-tokens", 40])
    (status,) = statuses(result)
    assert status.endswith("context 48/48")
    assert "(the context is full" in result.stderr


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0

    def interrupted(self: Generation) -> Iterator[str]:
        nonlocal asked
        asked += 1
        yield "begun"
        if asked == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Generation, "__iter__", interrupted)
    result = chat("hello", "again")
    assert result.exit_code == 0, result.output
    assert result.stdout == "begun\nbegun\n"
    assert result.stderr.count("(stopped)") == 1


@pytest.mark.parametrize(
    "error", [None, PlanError("the plan is none; make another"), MemoryError()], ids=["llama.cpp's", "ours", "memory"]
)
def test_an_answer_that_fails_is_told_and_the_chat_goes_on(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    expected = chat("hello").stdout
    decode, calls = llama_cpp.llama_decode, 0

    def failing(context: Any, batch: Any) -> int:
        nonlocal calls
        calls += 1
        if calls > 1:
            return decode(context, batch)
        if error is not None:
            raise error
        return -3

    monkeypatch.setattr("llama_cpp.llama_cpp.llama_decode", failing)
    result = chat("a longer message, which fails", "hello")
    assert len(statuses(result)) == 1
    (told,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert ("llama_decode returned -3" if error is None else str(error) or "out of memory") in told
    assert result.stdout.endswith(expected), "the message that failed is forgotten"


def test_a_mistake_of_ours_ends_the_chat_and_shows_where_it_is(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(self: Generation) -> Iterator[str]:
        raise RuntimeError("a mistake of ours")
        yield

    monkeypatch.setattr(Generation, "__iter__", mistaken)
    assert isinstance(chat("hello").exception, RuntimeError)


@pytest.mark.parametrize(("system", "way_out"), [("be brief", "--system"), (None, "generate --raw")])
def test_a_template_that_fails_names_another_way(
    model: Path, open_model: Any, system: str | None, way_out: str
) -> None:
    llm = open_model(model, n_ctx=256)
    llm.metadata["tokenizer.chat_template"] = "{{ raise_exception('no such role') }}"
    with pytest.raises(RequestError, match=way_out):
        Conversation(llm, None, 4, 0.0, Console(), system).ask("hello")


def test_a_plan_beside_the_model_is_used_and_told(model: Path, profile: Path) -> None:
    file = Path(plan_path(model))
    try:
        plan = Profile.load(profile).plan(
            strategy="manual", attention=(2,), ffn=(0,), compensation="median", mode="e2e"
        )
        save_plan(file, plan)
        words = ["chat", str(model), "--temp", "0", "--max-tokens", "6"]
        result = CliRunner().invoke(main, words, input="hello\n/plan\n", prog_name="adaskip-cpp")
        assert statuses(result)[0].count("skipped 2 prefill, 2 decode") == 1
        assert "2 of 6 sublayers skipped (chat.adaskip-plan.json)" in " ".join(result.stderr.split())
        assert "strategy manual" in result.stderr
        full = CliRunner().invoke(main, [*words, "--full"], input="hello\n", prog_name="adaskip-cpp")
        assert "skipped" not in statuses(full)[0]
    finally:
        file.unlink(missing_ok=True)


# --- a frontier -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tuned(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file beside the model that tells a plan for conversations from 64 tokens on."""
    monkeypatch.setattr(adaskip_cpp.model.frontier, "LEAST_CONTEXT", 64)
    path = Path(plan_path(model))
    save_plan(path, frontier([point(SkipPlan.manual(3, ffn=[1], phase="bulk"), 0.04, {64: 1.5, 2048: 1.6})]))
    yield path
    path.unlink()


@pytest.mark.usefixtures("tuned")
def test_a_conversation_gets_its_plan_when_it_is_long_enough(chat: Chat) -> None:
    result = chat("the", "the of to in " * 12)
    short, long = statuses(result)
    assert "skipped" not in short and "skipped 1 bulk, 0 decode" in long
    assert "Plans lose at most 0.05 nats per token (chat.adaskip-plan.json)" in " ".join(result.stderr.split())


@pytest.mark.usefixtures("tuned")
def test_a_tighter_promise_leaves_the_conversation_whole(chat: Chat) -> None:
    (status,) = statuses(chat("the of to in " * 12, args=["--max-loss", 0.02]))
    assert "skipped" not in status


@pytest.mark.usefixtures("tuned")
def test_the_plan_of_a_conversation_that_none_was_chosen_for_is_told_to_be_none(chat: Chat) -> None:
    result = chat("the", "/plan", "the of to in " * 12, "/plan")
    assert "Nothing is skipped now" in result.stderr and "1 of 6 sublayers skipped in the bulk" in result.stderr
