"""The chat: what it prints, what it keeps, and that no mistake of the user ends it."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from click.testing import Result
from oracles import command_line
from oracles.profiles import tiny_profile

from adaskip_cpp.cli.chat import Conversation
from adaskip_cpp.engine.generation import Generation
from adaskip_cpp.errors import RequestError
from adaskip_cpp.model.identity import plan_path
from adaskip_cpp.model.plan_file import save_plan

Chat = Callable[..., Result]
LONG = "the of to in " * 12


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


def lines(result: Result, begin: str) -> list[str]:
    """The lines of stderr that begin so: ``"prompt "`` those with an answer's figures."""
    return [line for line in result.stderr.splitlines() if line.startswith(begin)]


def test_the_answer_is_that_of_the_stock_chat(model: Path, open_model: Any, chat: Chat) -> None:
    stock = open_model(model, n_ctx=256).create_chat_completion(
        [{"role": "user", "content": "the hat"}], temperature=0, max_tokens=6
    )
    # llama_cpp.Llama decodes a text as a whole, the stream decodes what is complete: bytes that are none differ.
    expected = stock["choices"][0]["message"]["content"].replace("\ufffd", "")
    assert chat("the hat", args=["--ctx", 256]).stdout.strip().replace("\ufffd", "") == expected.strip()


def test_system_text_and_all_turns_are_in_the_prompt_and_a_template_that_fails_names_another_way(
    model: Path, open_model: Any
) -> None:
    llm = open_model(model, n_ctx=256)
    conversation = Conversation(llm, 4, 0.0, "be brief", [("user", "one"), ("assistant", "two")])
    prompt = llm.detokenize(conversation.ask("three").prompt).decode()
    assert "system: be brief\nuser: one\nassistant: two\nuser: three\nassistant:" in prompt
    llm.metadata["tokenizer.chat_template"] = "{{ raise_exception('no such role') }}"
    for system, way_out in (("be brief", "--system"), (None, "generate --raw")):
        with pytest.raises(RequestError, match=way_out):
            Conversation(llm, 4, 0.0, system).ask("hello")


def test_the_plan_beside_the_model_is_in_force_and_figures_of_both_phases_fit_the_terminal(
    chat: Chat, model: Path
) -> None:
    told = {"prompt": "2 bulk, 0 decode", "prefill": "2 prefill, 2 decode", "decode": "0 prefill, 2+0 decode"}
    for mode, words in told.items():
        save_plan(plan_path(model), tiny_profile(model).plan(2, mode=mode))
        (status,) = lines(chat("hello"), "prompt ")
        assert f"skipped {words}" in status and "/8192" in status and len(status) <= 80
    result = chat("hello", "/plan")
    assert "2 of 6 sublayers skipped in decode (chat.adaskip-plan.json)" in " ".join(result.stderr.split())
    assert "strategy adaskip" in result.stderr
    assert "skipped" not in lines(chat("hello", args=["--full"]), "prompt ")[0]


@pytest.mark.usefixtures("tuned_model")
def test_a_conversation_gets_its_plan_when_it_is_long_enough_for_the_promise(chat: Chat) -> None:
    """/plan says which is in force, and the time of a prompt that is read as a whole what it would have been."""
    result = chat("t", "/plan", LONG, "/plan", "and?")
    short, long, _ = lines(result, "prompt ")
    assert "skipped" not in short and "skipped 2 bulk, 0 decode" in long
    assert "Nothing is skipped now" in result.stderr and "2 of 6 sublayers skipped in the bulk" in result.stderr
    assert "Plans lose at most 0.05 nats per token (chat.adaskip-plan.json)" in " ".join(result.stderr.split())
    (tighter,) = lines(chat(LONG, args=["--max-loss", 0.02]), "prompt ")
    assert "skipped 1 bulk, 0 decode" in tighter
    for told, predicted in ((chat(LONG, "and?"), [True, False]), (chat(LONG, args=["--full"]), [False])):
        first = lines(told, "first token after ")
        assert ["; predicted without the plan: " in each for each in first] == predicted


def test_every_piped_line_is_answered_quit_leaves_and_reset_forgets(chat: Chat) -> None:
    result = chat("hello", "", "and now?", "/quit", "never read")
    assert len(lines(result, "prompt ")) == 2
    assert "/s" not in result.stdout and ">" not in result.stderr
    first, again = lines(chat("hello", "/reset", "hello"), "prompt ")
    assert first.split("context")[1] == again.split("context")[1]


def test_mistakes_and_a_full_context_are_told_and_the_chat_goes_on(chat: Chat) -> None:
    result = chat("/nonsense", "hello", "x" * 100, "/reset", "hello", args=["--ctx", 64])
    assert len(lines(result, "prompt ")) == 2 and "no command /nonsense" in result.stderr
    assert "but the context has 64" in result.stderr and "/reset" in result.stderr
    result = chat("x" * 20, args=["--ctx", 48, "--max-tokens", 40])
    assert lines(result, "prompt ")[0].endswith("context 48/48") and "(the context is full" in result.stderr


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    stops = iter((True, False))

    def interrupted(self: Generation) -> Iterator[str]:
        yield "begun"
        if next(stops):
            raise KeyboardInterrupt

    monkeypatch.setattr(Generation, "__iter__", interrupted)
    result = chat("hello", "again")
    assert result.stdout == "begun\nbegun\n" and result.stderr.count("(stopped)") == 1


def test_an_answer_that_fails_is_told_and_its_message_forgotten(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = chat("hello").stdout
    decode, calls = llama_cpp.llama_decode, 0

    def failing(context: Any, batch: Any) -> int:
        nonlocal calls
        calls += 1
        return -3 if calls == 1 else decode(context, batch)

    monkeypatch.setattr("llama_cpp.llama_cpp.llama_decode", failing)
    result = chat("a longer message, which fails", "hello")
    (told,) = lines(result, "Error: ")
    assert "llama_decode returned -3" in told
    assert len(lines(result, "prompt ")) == 1 and result.stdout.endswith(expected)
