"""The chat: what it prints, what it keeps, and that no mistake of the user ends it."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from click.testing import Result
from oracles import command_line
from oracles.frontiers import frontier, point
from oracles.profiles import tiny_profile
from rich.console import Console

import adaskip_cpp.model.frontier
from adaskip_cpp import SkipPlan
from adaskip_cpp.cli.chat import Conversation
from adaskip_cpp.engine.generation import Generation
from adaskip_cpp.errors import PlanError, RequestError
from adaskip_cpp.model.identity import plan_path
from adaskip_cpp.model.plan_file import save_plan

Chat = Callable[..., Result]


@pytest.fixture
def model(served_model: Path, tmp_path: Path) -> Path:
    """A tiny model with a chat template, in a folder of its own."""
    return Path(shutil.copy(served_model, tmp_path / "chat.gguf"))


@pytest.fixture
def chat(model: Path) -> Chat:
    """``chat("hello", "/quit", args=[...])``: the chat with these lines on stdin."""

    def run(*lines: str, args: list[object] | None = None) -> Result:
        words = ["chat", model, "--temp", 0, "--max-tokens", 6, *(args or [])]
        return command_line.run(*words, stdin="".join(f"{line}\n" for line in lines))

    return run


def statuses(result: Result) -> list[str]:
    """The lines that tell an answer's figures."""
    return [line for line in result.stderr.splitlines() if line.startswith("prompt ")]


# --- a conversation ---------------------------------------------------------------------------------------------------


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
    conversation = Conversation(llm, 4, 0.0, Console(), "be brief", [("user", "one"), ("assistant", "two")])
    prompt = llm.detokenize(conversation.ask("three").prompt).decode()
    assert "system: be brief\nuser: one\nassistant: two\nuser: three\nassistant:" in prompt


def test_the_status_line_tells_both_phases_and_fits_the_terminal(chat: Chat, model: Path) -> None:
    told = {"prompt": "2 bulk, 0 decode", "prefill": "2 prefill, 2 decode", "decode": "0 prefill, 2+0 decode"}
    for mode, words in told.items():
        save_plan(plan_path(model), tiny_profile(model).plan(2, mode=mode))
        (status,) = statuses(chat("hello"))
        assert f"skipped {words}" in status and "/8192" in status
        assert len(status) <= 80


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tuned_model")
def test_the_time_to_the_first_token_is_told_and_of_a_whole_prompt_what_it_would_have_been(chat: Chat) -> None:
    for options, predicted in (((), [True, False]), (("--full",), [False, False])):
        told = chat("the of to in " * 12, "and?", args=[*options]).stderr.splitlines()
        first = [text for text in told if text.startswith("first token after ")]
        assert ["; predicted without the plan: " in text for text in first] == predicted


def test_every_piped_line_is_answered_quit_leaves_and_reset_forgets(chat: Chat) -> None:
    result = chat("hello", "", "and now?", "/quit", "never read")
    assert len(statuses(result)) == 2
    assert "/s" not in result.stdout and ">" not in result.stderr
    first, again = statuses(chat("hello", "/reset", "hello"))
    assert first.split("context")[1] == again.split("context")[1]


def test_mistakes_are_told_and_the_chat_goes_on(chat: Chat) -> None:
    result = chat("/nonsense", "/plan", "hello")
    assert len(statuses(result)) == 1
    assert "no command /nonsense" in result.stderr and "Nothing is skipped" in result.stderr


# --- limits -----------------------------------------------------------------------------------------------------------


def test_a_full_context_is_told_and_reset_helps_and_an_answer_cut_off_by_it_says_so(chat: Chat) -> None:
    result = chat("hello", "x" * 100, "/reset", "hello", args=["--ctx", 64])
    assert len(statuses(result)) == 2
    assert "but the context has 64" in result.stderr and "/reset" in result.stderr
    assert "Traceback" not in result.output
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


@pytest.mark.parametrize(("system", "way_out"), [("be brief", "--system"), (None, "generate --raw")])
def test_a_template_that_fails_names_another_way(
    model: Path, open_model: Any, system: str | None, way_out: str
) -> None:
    llm = open_model(model, n_ctx=256)
    llm.metadata["tokenizer.chat_template"] = "{{ raise_exception('no such role') }}"
    with pytest.raises(RequestError, match=way_out):
        Conversation(llm, 4, 0.0, Console(), system).ask("hello")


def test_a_plan_beside_the_model_is_used_and_told(chat: Chat, model: Path) -> None:
    chosen: Any = {"attention": (2,), "ffn": (0,), "compensation": "median", "mode": "e2e"}
    save_plan(plan_path(model), tiny_profile(model).plan(strategy="manual", **chosen))
    result = chat("hello", "/plan")
    assert statuses(result)[0].count("skipped 2 prefill, 2 decode") == 1
    assert "2 of 6 sublayers skipped (chat.adaskip-plan.json)" in " ".join(result.stderr.split())
    assert "strategy manual" in result.stderr
    assert "skipped" not in statuses(chat("hello", args=["--full"]))[0]


def test_a_conversation_gets_its_plan_when_it_is_long_enough_for_the_promise(
    chat: Chat, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 64 tokens on; /plan tells what is in force."""
    monkeypatch.setattr(adaskip_cpp.model.frontier, "LEAST_CONTEXT", 64)
    plan = SkipPlan.manual(3, ffn=[1], phase="bulk")
    save_plan(plan_path(model), frontier([point(plan, 0.04, {64: 1.5, 2048: 1.6})]))
    result = chat("the", "/plan", "the of to in " * 12, "/plan")
    short, long = statuses(result)
    assert "skipped" not in short and "skipped 1 bulk, 0 decode" in long
    assert "Nothing is skipped now" in result.stderr and "1 of 6 sublayers skipped in the bulk" in result.stderr
    assert "Plans lose at most 0.05 nats per token (chat.adaskip-plan.json)" in " ".join(result.stderr.split())
    (tighter,) = statuses(chat("the of to in " * 12, args=["--max-loss", 0.02]))
    assert "skipped" not in tighter
