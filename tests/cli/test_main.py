"""The command line: its help, and that a user's error is one readable line."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from oracles.command_line import line

from adaskip_cpp.cli import terminal
from adaskip_cpp.cli.main import main
from adaskip_cpp.engine.generation import Generation

Run = Callable[..., Result]


def groups(run: Run, verb: str) -> dict[str, list[str]]:
    """The sections of a verb's help after its text, and the options that each lists."""
    sections = re.split(r"^(\S.*):\n", run(verb, "--help").stdout, flags=re.MULTILINE)
    pairs = zip(sections[1::2], sections[2::2], strict=True)
    return {heading: re.findall(r"^  (?:-\w, )?(--[a-z-]+)", text, re.MULTILINE) for heading, text in pairs}


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", main.commands)
def test_every_verb_has_help_with_an_example(run: Run, verb: str) -> None:
    result = run(verb, "--help")
    assert result.exit_code == 0
    assert re.search(f"Example:\n +adaskip-cpp {verb}", result.stdout)


@pytest.mark.parametrize("verb", main.commands)
def test_help_begins_with_the_few_options_that_matter(run: Run, verb: str) -> None:
    assert 1 <= len(groups(run, verb)["Options"]) <= 8


def test_help_groups_the_other_options(run: Run) -> None:
    shown = groups(run, "calibrate")
    assert list(shown) == ["Example", "Options", "What to measure", "Running the model"]
    assert shown["Running the model"] == ["--threads", "--gpu-layers", "--flash-attn", "--rpc"]


def test_rpc_servers_are_added_before_a_model_is_opened_but_by_bench(
    run: Run, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    added: list[str] = []
    monkeypatch.setattr(terminal, "add_rpc_server", added.append)
    assert run("inspect", str(tiny()), "--rpc", "there:1", "--rpc", "elsewhere:2").exit_code == 0
    assert added == ["there:1", "elsewhere:2"]
    refused = run("bench", str(tiny()), "--rpc", "there:1")
    assert refused.exit_code == 2 and "an rpc-server serves one process" in refused.stderr


def test_without_a_verb_it_lists_them(run: Run) -> None:
    result = run()
    assert result.exit_code == 0
    assert all(verb in result.stdout for verb in ("calibrate", "chat", "demo", "generate", "inspect", "plan"))


def test_help_imports_neither_gguf_nor_matplotlib() -> None:
    code = (
        "import sys\nfrom adaskip_cpp.cli.main import main\ntry: main(['--help'])\n"
        "except SystemExit: pass\nprint([m for m in ('gguf', 'matplotlib') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["inspect", "calibrate", "generate", "chat", "bench", "evaluate"])
def test_a_model_that_is_none_is_an_error_of_one_line(run: Run, tmp_path: Path, verb: str) -> None:
    output = ["-o", tmp_path / "p.json"]
    rest = {"calibrate": output, "generate": ["-p", "hello"], "evaluate": output}.get(verb, [])
    (tmp_path / "text.gguf").write_text("hello")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(40))
    assert "no model file" in line(run(verb, tmp_path / "nope.gguf", *rest))
    assert "not a GGUF" in line(run(verb, tmp_path / "text.gguf", *rest))
    assert "folder" in line(run(verb, tmp_path, *rest))
    assert "cannot open" in line(run(verb, tmp_path / "broken.gguf", *rest))
    assert not (tmp_path / "p.json").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nonsense"], "No such command"),
        (["--nonsense"], "--nonsense"),
        (["inspect"], "MODEL"),
        (["generate", "m.gguf"], "give it with -p, or a file with -f"),
        (["generate", "m.gguf", "-p", "a", "-f", "b"], "give it with -p, or a file with -f"),
        (["generate", "m.gguf", "-p", "a", "--skip", "3"], "made from a profile"),
        (["chat", "m.gguf", "--mode", "decode"], "made from a profile"),
        (["plan", "p", "--skip", "3", "--speedup", "1.2"], "either --skip or --speedup"),
        (["plan", "p", "--strategy", "manual"], "--strategy"),
        (["plan", "p", "--strategy", "best"], "skip_decode"),
        (["plan", "p", "--speedup", "0.5"], "--speedup"),
        (["generate", "m.gguf", "-p", "a", "--temp", "-1"], "--temp"),
        (["generate", "m.gguf", "-p", "a", "--compensation", "best"], "--compensation"),
        (["calibrate", "m.gguf"], "--output"),
        (["calibrate", "m.gguf", "-o", "p", "--tokens", "1"], "--tokens"),
    ],
)
def test_a_usage_error_is_one_line_and_names_the_help(run: Run, args: list[str], message: str) -> None:
    error = line(run(*args), code=2)
    assert message in error and "--help)" in error


def test_a_profile_that_is_none_is_an_error_of_one_line(run: Run, tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    args = ["generate", tiny(), "-p", "hello", "--profile", path]
    assert "no profile" in line(run(*args))
    path.write_text('{"format": "adaskip-profile", "version": 99}')
    assert "format version" in line(run(*args))
    path.write_text('{"format": ')
    assert "truncated" in line(run(*args))


def test_a_budget_beyond_the_model_is_an_error_of_one_line(run: Run, tiny: Any, profile_path: Path) -> None:
    assert "0 to 6" in line(run("generate", tiny(), "-p", "hello", "--profile", profile_path, "--skip", 7))


def test_what_is_around_the_bulk_goes_with_its_mode_alone(run: Run, profile_path: Path) -> None:
    for option in ("--head", "--tail"):
        assert "mode 'prompt'" in line(run("plan", profile_path, option, 3, "--mode", "e2e"))


def test_a_speedup_needs_a_profile_with_times(run: Run, profile_path: Path) -> None:
    assert "no cost model" in line(run("plan", profile_path, "--speedup", "1.2"))


def test_a_model_without_a_chat_template_cannot_chat(run: Run, tiny: Any) -> None:
    assert "no chat template" in line(run("chat", tiny(), stdin="hello"))


def test_a_profile_of_another_model_is_an_error_of_one_line(run: Run, tiny: Any, profile_path: Path) -> None:
    args = ["generate", tiny(seed=1), "-p", "hello", "--profile", profile_path, "--skip", 1]
    assert "another model" in line(run(*args))


def test_files_that_cannot_be_used_are_errors_of_one_line(run: Run, tiny: Any, tmp_path: Path) -> None:
    output = ["-o", tmp_path / "p.json"]
    assert "nope" in line(run("generate", tiny(), "-f", tmp_path / "nope"))
    assert "not UTF-8" in line(run("generate", tiny(), "-f", tiny()))
    assert "nope" in line(run("calibrate", tiny(), *output, "--data", tmp_path / "nope"))
    assert "not UTF-8" in line(run("calibrate", tiny(), *output, "--data", tiny()))
    assert "no folder" in line(run("calibrate", tiny(), "-o", tmp_path / "nope" / "p.json"))
    assert "cannot write" in line(run("calibrate", tiny(), "-o", tmp_path))
    assert os.listdir(tmp_path) == []


def test_an_empty_or_too_long_prompt_is_an_error_of_one_line(run: Run, tiny: Any) -> None:
    assert "empty" in line(run("generate", tiny(), "-p", "", "--raw"))
    assert "--ctx" in line(run("generate", tiny(), "-p", "hello " * 300, "--raw", "--ctx", 64))
    assert "chat template" in line(run("generate", tiny(), "-p", "hello", "--chat"))


def test_a_prompt_that_is_no_unicode_is_read_as_far_as_it_is(run: Run, tiny: Any) -> None:
    # Bytes that are no UTF-8 reach Python's arguments as lone surrogates.
    assert run("generate", tiny(), "-p", "hello \udcff", "--max-tokens", 2).exit_code == 0


def test_what_llama_cpp_refuses_is_an_error_of_one_line(
    run: Run, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for code in (-3, -2, 1):  # a failed computation, no memory, no room in the KV cache
        monkeypatch.setattr("llama_cpp.llama_cpp.llama_decode", lambda context, batch, code=code: code)
        assert f"returned {code}" in line(run("generate", tiny(), "-p", "hello"))
        assert f"returned {code}" in line(run("calibrate", tiny(), "--no-cost", "-o", tmp_path / "p.json"))


def test_numbers_that_llama_cpp_would_die_of_are_usage_errors(run: Run, tiny: Any) -> None:
    for name, value in (("--ctx", 2**40), ("--threads", 100_000)):
        assert name in line(run("generate", tiny(), "-p", "hello", name, value), code=2)


def test_why_llama_cpp_cannot_load_a_model_is_told(run: Run, tiny: Any, tmp_path: Path) -> None:
    content = tiny().read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: len(content) // 2])
    (tmp_path / "other.gguf").write_bytes(content.replace(b"llama", b"lxxma"))
    assert "corrupted or incomplete" in line(run("inspect", tmp_path / "cut.gguf"))
    assert "unknown model architecture: 'lxxma'" in line(run("inspect", tmp_path / "other.gguf"))


def test_a_mistake_of_ours_shows_where_it_is(run: Run, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(self: Generation) -> Iterator[str]:
        raise RuntimeError("a mistake of ours")
        yield

    monkeypatch.setattr(Generation, "__iter__", mistaken)
    result = run("generate", tiny(), "-p", "hello")
    assert isinstance(result.exception, RuntimeError) and "Error:" not in result.stderr


def test_an_interrupted_command_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("adaskip_cpp.cli.demo.packaged_model", interrupt)
    result = run("demo")
    assert result.exit_code == 130
    assert result.stderr.strip() == "Error: interrupted"


def test_being_terminated_is_an_interrupt(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def terminate() -> str:
        signal.raise_signal(signal.SIGTERM)
        return ""

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("adaskip_cpp.cli.demo.packaged_model", terminate)
    result = run("demo")
    assert (result.exit_code, result.stderr.strip()) == (130, "Error: interrupted")
    assert signal.getsignal(signal.SIGTERM) is before
