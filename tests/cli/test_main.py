"""The command line: its help, and that a user's error is one readable line."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from oracles.command_line import fails, run

from adaskip_cpp.cli.main import main
from adaskip_cpp.engine.generation import Generation


def groups(verb: str) -> dict[str, list[str]]:
    """The sections of a verb's help after its text, and the options that each lists."""
    sections = re.split(r"^(\S.*):\n", run(verb, "--help").stdout, flags=re.MULTILINE)
    pairs = zip(sections[1::2], sections[2::2], strict=True)
    return {heading: re.findall(r"^  (?:-\w, )?(--[a-z-]+)", text, re.MULTILINE) for heading, text in pairs}


@pytest.mark.parametrize("verb", main.commands)
def test_the_help_of_every_verb_has_an_example_and_begins_with_the_few_options_that_matter(verb: str) -> None:
    shown = groups(verb)
    assert re.search(f"Example:\n +adaskip-cpp {verb}", run(verb, "--help").stdout)
    assert [*shown][:2] == ["Example", "Options"] and 1 <= len(shown["Options"]) <= 8
    if verb == "calibrate":
        assert shown["Running the model"] == ["--threads", "--gpu-layers", "--flash-attn"]
    assert verb in run().stdout, "without a verb it lists the verbs"


def test_help_imports_neither_gguf_nor_matplotlib() -> None:
    code = (
        "import sys\nfrom adaskip_cpp.cli.main import main\ntry: main(['--help'])\n"
        "except SystemExit: pass\nprint([m for m in ('gguf', 'matplotlib') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("verb", ["inspect", "calibrate", "generate", "chat", "bench", "evaluate"])
def test_a_model_that_is_none_is_an_error_of_one_line_that_says_why(tiny: Any, tmp_path: Path, verb: str) -> None:
    output, model, whole = str(tmp_path / "p.json"), tmp_path / "m.gguf", tiny().read_bytes()
    rest = {"calibrate": ["-o", output], "generate": ["-p", "hello"], "evaluate": ["-o", output]}.get(verb, [])
    assert "no model file" in fails(verb, model, *rest)
    for content, why in (
        (whole[: len(whole) // 2], "corrupted or incomplete"),
        (whole.replace(b"llama", b"lxxma"), "unknown model architecture: 'lxxma'"),
    ):
        model.write_bytes(content)
        assert why in fails(verb, model, *rest)
    assert [*tmp_path.iterdir()] == [model]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", "m.gguf", "-p", "a", "-f", "b"], "give it with -p, or a file with -f"),
        (["plan", "p", "--skip", "3", "--speedup", "1.2"], "either --skip or --speedup"),
        (["generate", "m.gguf", "-p", "a", "--ctx", str(2**40)], "--ctx"),  # llama.cpp would die of it
        (["generate", "m.gguf", "-p", "a", "--threads", "100000"], "--threads"),
        (["evaluate", "m", "-o", "out", "--skip", "6;12"], "'6;12' is not a list such as 6,12,15"),
        (["evaluate", "m", "-o", "out", "--compensation", "best"], "'best' is not a list of: none, paper, median"),
        (["bench", "m", "--contexts", "0"], "not a list"),
    ],
)
def test_a_usage_error_is_one_line_and_names_the_help(args: list[str], message: str) -> None:
    error = fails(*args, code=2)
    assert message in error and "--help)" in error


def test_what_does_not_fit_or_cannot_be_read_or_written_is_an_error_of_one_line(
    tiny: Any, profile_path: Path, tmp_path: Path
) -> None:
    generate, plan = ("generate", tiny(), "-p", "hello"), ("plan", profile_path)
    calibrate, before = ("calibrate", tiny(), "-o", tmp_path / "new.json"), {*tmp_path.iterdir()}
    for args, message in (
        (plan, "cannot skip 12 .* from 0 to 4"),  # the default; the first of three layers is left out
        ((*generate, "--chat"), "chat template"),
        ((*generate[:3], "", "--raw"), "empty"),
        ((*generate[:3], "hello " * 300, "--raw", "--ctx", 64), "--ctx"),
        ((*generate, "--plan", tiny()), "is a model; name its plan file"),
        (("chat", tiny()), "no chat template"),
        (("plan", tmp_path / "x.json"), "there is no profile.*calibrate"),
        (("plan", tiny()), "is a model; name its profile, which `adaskip-cpp calibrate"),
        (("tune", tmp_path / "nope.gguf"), "cannot read the model"),
        (("bench", tiny(), "--plan", tmp_path / "x.json"), "there is no plan file.*adaskip-cpp tune"),
        (("generate", tiny(), "-f", tmp_path / "nope"), "nope"),
        ((*calibrate, "--data", tiny()), "not UTF-8"),
        ((*calibrate[:3], tmp_path / "nope" / "p.json"), "no folder"),
        ((*calibrate[:3], tmp_path), "cannot write"),
    ):
        assert re.search(message, fails(*args))
    assert {*tmp_path.iterdir()} == before


def test_a_prompt_that_is_no_unicode_is_read_as_far_as_it_is(tiny: Any) -> None:
    # Bytes that are no UTF-8 reach Python's arguments as lone surrogates.
    run("generate", tiny(), "-p", "hello \udcff", "--max-tokens", 2)


def test_what_llama_cpp_refuses_is_an_error_of_one_line(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for decode, words in (
        (Mock(return_value=-3), "returned -3"),  # a failed computation
        (Mock(return_value=1), "returned 1"),  # no room in the KV cache
        (Mock(side_effect=MemoryError), "out of memory"),
    ):
        monkeypatch.setattr("llama_cpp.llama_cpp.llama_decode", decode)
        assert words in fails("generate", tiny(), "-p", "hello")
        assert words in fails("calibrate", tiny(), "--no-cost", "-o", tmp_path / "p.json")


def test_a_mistake_of_ours_shows_where_it_is(served_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(self: Generation) -> Iterator[str]:
        raise RuntimeError("a mistake of ours")
        yield

    monkeypatch.setattr(Generation, "__iter__", mistaken)
    for args in (("generate", served_model, "-p", "hello"), ("chat", served_model)):
        result = run(*args, stdin="hello\n", code=1)
        assert isinstance(result.exception, RuntimeError) and "Error:" not in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_interrupted_or_terminated_says_so(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end() -> str:
        signal.raise_signal(number)
        return ""

    before = signal.getsignal(number)
    monkeypatch.setattr("adaskip_cpp.cli.demo.packaged_model", end)
    assert run("demo", code=130).stderr.strip() == "Error: interrupted"
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("option", ["--max-loss", "--temp"])
def test_a_number_that_is_none_is_a_wrong_option(option: str, tiny: Any) -> None:
    for value in ("nan", "inf"):
        assert "is not a finite number" in fails("generate", tiny(), "-p", "the", option, value, code=2)
