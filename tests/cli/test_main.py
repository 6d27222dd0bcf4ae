"""The command line: its help, and that a user's error is one readable line."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from oracles.command_line import fails, run

from adaskip_cpp.cli.main import main
from adaskip_cpp.engine.generation import Generation
from adaskip_cpp.model.identity import plan_path


def groups(verb: str) -> dict[str, list[str]]:
    """The sections of a verb's help after its text, and the options that each lists."""
    sections = re.split(r"^(\S.*):\n", run(verb, "--help").stdout, flags=re.MULTILINE)
    pairs = zip(sections[1::2], sections[2::2], strict=True)
    return {heading: re.findall(r"^  (?:-\w, )?(--[a-z-]+)", text, re.MULTILINE) for heading, text in pairs}


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", main.commands)
def test_the_help_of_every_verb_has_an_example_and_begins_with_the_few_options_that_matter(verb: str) -> None:
    result = run(verb, "--help")
    assert re.search(f"Example:\n +adaskip-cpp {verb}", result.stdout)
    assert 1 <= len(groups(verb)["Options"]) <= 8


def test_help_groups_the_other_options_and_without_a_verb_it_lists_the_verbs() -> None:
    shown = groups("calibrate")
    assert list(shown) == ["Example", "Options", "What to measure", "Running the model"]
    assert shown["Running the model"] == ["--threads", "--gpu-layers", "--flash-attn"]
    listed = run().stdout
    assert all(verb in listed for verb in main.commands)


def test_help_imports_neither_gguf_nor_matplotlib() -> None:
    code = (
        "import sys\nfrom adaskip_cpp.cli.main import main\ntry: main(['--help'])\n"
        "except SystemExit: pass\nprint([m for m in ('gguf', 'matplotlib') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["inspect", "calibrate", "generate", "chat", "bench", "evaluate"])
def test_a_model_that_is_none_is_an_error_of_one_line_that_says_why(tiny: Any, tmp_path: Path, verb: str) -> None:
    output, whole = ["-o", tmp_path / "p.json"], tiny().read_bytes()
    rest = {"calibrate": output, "generate": ["-p", "hello"], "evaluate": output}.get(verb, [])
    for name, content, why in (
        ("text.gguf", b"hello", "not a GGUF"),
        ("broken.gguf", b"GGUF\x03\x00\x00\x00" + bytes(40), "cannot open"),
        ("cut.gguf", whole[: len(whole) // 2], "corrupted or incomplete"),
        ("other.gguf", whole.replace(b"llama", b"lxxma"), "unknown model architecture: 'lxxma'"),
    ):
        (tmp_path / name).write_bytes(content)
        assert why in fails(verb, tmp_path / name, *rest)
    assert "no model file" in fails(verb, tmp_path / "nope.gguf", *rest)
    assert "folder" in fails(verb, tmp_path, *rest)
    assert not (tmp_path / "p.json").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nonsense"], "No such command"),
        (["--nonsense"], "--nonsense"),
        (["inspect"], "MODEL"),
        (["generate", "m.gguf"], "give it with -p, or a file with -f"),
        (["generate", "m.gguf", "-p", "a", "-f", "b"], "give it with -p, or a file with -f"),
        (["plan", "p", "--skip", "3", "--speedup", "1.2"], "either --skip or --speedup"),
        (["plan", "p", "--strategy", "manual"], "--strategy"),
        (["plan", "p", "--strategy", "best"], "skip_decode"),
        (["plan", "p", "--speedup", "0.5"], "--speedup"),
        (["generate", "m.gguf", "-p", "a", "--temp", "-1"], "--temp"),
        (["plan", "p", "--compensation", "best"], "--compensation"),
        (["calibrate", "m.gguf"], "--output"),
        (["calibrate", "m.gguf", "-o", "p", "--tokens", "1"], "--tokens"),
        (["generate", "m.gguf", "-p", "a", "--ctx", str(2**40)], "--ctx"),  # llama.cpp would die of it
        (["generate", "m.gguf", "-p", "a", "--threads", "100000"], "--threads"),
        (["plot", "p.json"], "--output"),
        (["evaluate", "m", "-o", "out", "--skip", "6;12"], "'6;12' is not a list such as 6,12,15"),
        (["evaluate", "m", "-o", "out", "--compensation", "best"], "'best' is not a list of: none, paper, median"),
        (["evaluate", "m", "-o", "out", "--synthetic", "chess"], "'chess' is not a list of: passkey"),
        (["bench", "m", "--contexts", "512,x"], "not a list such as 512,2048"),
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
        ((*plan, "--skip", 7, "--mode", "e2e"), "from 0 to 6"),
        ((*generate, "--chat"), "chat template"),
        ((*generate[:3], "", "--raw"), "empty"),
        ((*generate[:3], "hello " * 300, "--raw", "--ctx", 64), "--ctx"),
        ((*generate, "--plan", tiny()), "is a model; name its plan file"),
        (("chat", tiny()), "no chat template"),
        ((*plan, "--head", 3, "--mode", "e2e"), "mode 'prompt'"),
        ((*plan, "--tail", 3, "--mode", "e2e"), "mode 'prompt'"),
        ((*plan, "--speedup", "1.2"), "no cost model"),
        (("plan", tmp_path / "x.json"), "there is no profile.*calibrate"),
        (("plan", tiny()), "is a model; name its profile, which `adaskip-cpp calibrate"),
        (("plan", plan_path(tmp_path / "x.gguf")), "there is no plan file.*tune"),
        (("plot", tmp_path / "x.json", "-o", tmp_path / "out"), "there is no profile"),
        (("tune", tmp_path / "nope.gguf"), "cannot read the model"),
        (("bench", tiny(), "--contexts", 10**6), "do not fit into the model's context"),
        (("bench", tiny(), "--plan", tmp_path / "x.json"), "there is no plan file.*adaskip-cpp tune"),
        (("generate", tiny(), "-f", tmp_path / "nope"), "nope"),
        (("generate", tiny(), "-f", tiny()), "not UTF-8"),
        ((*calibrate, "--data", tmp_path / "nope"), "nope"),
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
    for code in (-3, -2, 1):  # a failed computation, no memory, no room in the KV cache
        monkeypatch.setattr("llama_cpp.llama_cpp.llama_decode", lambda context, batch, code=code: code)
        assert f"returned {code}" in fails("generate", tiny(), "-p", "hello")
        assert f"returned {code}" in fails("calibrate", tiny(), "--no-cost", "-o", tmp_path / "p.json")


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
