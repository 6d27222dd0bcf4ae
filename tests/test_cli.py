"""The command line: what it prints, what it exits with, and that a user's error is one readable line."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from command_line import line
from frontiers import frontier, point
from rich.console import Console
from test_cost import cost_model
from tiny_families import N_EMBD

import adaskip_cpp.model.frontier
from adaskip_cpp import AdaSkipLlama, Profile, SkipPlan
from adaskip_cpp.cli import terminal
from adaskip_cpp.cli.main import main
from adaskip_cpp.cli.report import first_token_line, layer_list, megabytes, skipped_counts, skipped_lines
from adaskip_cpp.engine.generation import Generation, Timing
from adaskip_cpp.intervals import Interval
from adaskip_cpp.measuring import running
from adaskip_cpp.measuring.cores import physical_cores
from adaskip_cpp.model.frontier import SpeedUp
from adaskip_cpp.model.identity import ModelInfo, fingerprint, plan_path
from adaskip_cpp.model.mode import MODES
from adaskip_cpp.model.plan import OnlineStage
from adaskip_cpp.model.plan_file import load_plan, save_plan
from adaskip_cpp.model.profile import Windows
from adaskip_cpp.model.settings import Settings, Tried
from adaskip_cpp.model.statistics import PhaseStatistics
from adaskip_cpp.pictures.heatmap import print_heatmap

Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    """``run("verb", ...)``: the command's result, in this process."""

    def invoke(*args: object, stdin: str | None = None) -> Result:
        return CliRunner().invoke(main, [str(arg) for arg in args], input=stdin, prog_name="adaskip-cpp")

    return invoke


@pytest.fixture
def profile_path(tiny: Any, tmp_path: Path) -> Path:
    """A profile of the tiny llama model, which ranks its last layer first: FFN 2, attention 2, FFN 1, and so on.

    In the bulk of a prompt the last layer loses nothing, so that there attention 2 comes before FFN 2.
    """
    path = tmp_path / "p.json"
    n_layer = 3
    ones = np.ones((n_layer, 2))
    similarity = np.linspace(0.5, 0.99, 2 * n_layer).reshape(n_layer, 2)
    zeros = np.zeros((n_layer, 2, N_EMBD), np.float32)
    statistics = PhaseStatistics(similarity, ones, 2 * ones, np.ones(n_layer), zeros, zeros, 10)
    model = ModelInfo(fingerprint(tiny()), "llama", n_layer)
    Profile(statistics, statistics, 1, 10, model, divergence=1 - similarity, copying=1 - similarity).save(path)
    return path


def groups(run: Run, verb: str) -> dict[str, list[str]]:
    """The sections of a verb's help behind its text, and the options that each lists."""
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
    assert list(shown) == ["Example", "Options", "What is learned", "Running the model", "Output"]
    assert shown["Running the model"] == ["--threads", "--gpu-layers", "--flash-attn", "--rpc"]
    assert shown["Output"] == ["--json"]


def test_rpc_servers_are_added_before_a_model_is_opened_but_by_bench(
    run: Run, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    added: list[str] = []
    monkeypatch.setattr(terminal, "add_rpc_server", added.append)
    assert run("inspect", str(tiny()), "--rpc", "there:1", "--rpc", "elsewhere:2").exit_code == 0
    assert added == ["there:1", "elsewhere:2"]
    refused = run("bench", str(tiny()), "--rpc", "there:1")
    assert refused.exit_code == 2 and "a server serves one process" in refused.stderr


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


@pytest.mark.parametrize("verb", ["inspect", "calibrate", "generate", "chat"])
def test_a_model_that_is_none_is_an_error_of_one_line(run: Run, tmp_path: Path, verb: str) -> None:
    rest = {"inspect": [], "calibrate": ["-o", tmp_path / "p.json"], "generate": ["-p", "hello"], "chat": []}[verb]
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
        (["generate", "m.gguf"], "either with -p or with -f"),
        (["generate", "m.gguf", "-p", "a", "-f", "b"], "either with -p or with -f"),
        (["generate", "m.gguf", "-p", "a", "--skip", "3"], "needs --profile"),
        (["chat", "m.gguf", "--mode", "decode"], "needs --profile"),
        (["plan", "p", "--skip", "3", "--speedup", "1.2"], "either --skip or --speedup"),
        (["plan", "p", "--skip", "3", "--ffn", "1"], "--attention and --ffn"),
        (["plan", "p", "--strategy", "early_exit", "--ffn", "1"], "--attention and --ffn"),
        (["plan", "p", "--strategy", "manual"], "needs --attention or --ffn"),
        (["plan", "p", "--strategy", "best"], "skip_decode"),
        (["plan", "p", "--attention", "1,two"], "not a list of layers"),
        (["plan", "p", "--speedup", "0.5"], "--speedup"),
        (["plan", "p", "--skip", "3", "--no-online"], "--decode or --mode"),
        (["demo", "--attention", "1", "--speedup", "1.2"], "--attention and --ffn"),
        (["generate", "m.gguf", "-p", "a", "--temp", "-1"], "--temp"),
        (["generate", "m.gguf", "-p", "a", "--compensation", "best"], "--compensation"),
        (["calibrate", "m.gguf"], "--output"),
        (["calibrate", "m.gguf", "-o", "p", "--tokens", "1"], "--tokens"),
        (["calibrate", "m.gguf", "-o", "p", "--rank", "-1"], "--rank"),
        (["calibrate", "m.gguf", "-o", "p", "--rank", "4097"], "--rank"),
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


def test_layers_that_are_not_there_are_an_error_of_one_line(run: Run, profile_path: Path) -> None:
    assert "layer 3" in line(run("plan", profile_path, "--attention", "3"))


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


# --- verbs on a tiny model --------------------------------------------------------------------------------------------


def test_inspect_lists_the_sublayers(run: Run, tiny: Any) -> None:
    result = run("inspect", tiny())
    assert result.exit_code == 0
    assert "6 of 6 sublayers can be skipped." in result.stdout
    assert run("inspect", tiny("gemma3")).stdout.count("window of 8") == 2  # layers 0 and 2
    sharing = run("inspect", tiny("gemma4")).stdout
    assert "6 of 8 sublayers can be skipped, 2 more in the bulk of a prompt." in sharing
    assert "in the bulk alone, window of 8: its KV is shared" in " ".join(sharing.split())
    data = json.loads(run("inspect", tiny(), "--json").stdout)
    assert (data["architecture"], data["n_layer"], data["n_skippable"]) == ("llama", 3, 6)
    assert [(row["layer"], row["kind"]) for row in data["sublayers"]] == [
        (layer, kind) for layer in range(3) for kind in ("attention", "ffn")
    ]


def test_calibrate_writes_a_profile_that_generate_takes(run: Run, tiny: Any, tmp_path: Path) -> None:
    output, data = tmp_path / "out.json", tmp_path / "text.txt"
    data.write_text("the quick brown fox " * 40)
    args = ["calibrate", tiny(), "--data", data, "--requests", 4, "--tokens", 20, "-o", output]
    args += ["--decode-tokens", 5, "--no-cost"]
    result = run(*args)
    assert result.exit_code == 0, result.output
    assert "4 requests: 80 tokens of text.txt" in result.stdout
    assert "20 tokens were decoded" in result.stdout
    assert str(output) in result.stdout and str(output.with_suffix(".bin")) in result.stdout
    profile = Profile.load(output)
    assert (profile.n_requests, profile.n_tokens, profile.corpus) == (4, 80, "text.txt")
    assert (profile.decode.n_tokens, profile.prefill.mean_u.shape[2], profile.cost) == (20, N_EMBD, None)
    assert json.loads(run(*args, "--json").stdout)["prefill"] == profile.to_dict()["prefill"]

    result = run("generate", tiny(), "-p", "hello", "--profile", output, "--skip", 2, "--max-tokens", 5)
    assert result.exit_code == 0, result.output
    assert "skipped: 2 of 6 sublayers in the bulk of a prompt" in result.stderr
    assert "0 of 6 in decode" in result.stderr
    assert "tokens/s" in result.stderr and "tokens/s" not in result.stdout


@pytest.mark.parametrize(("rank", "compensation"), [(3, "linear"), (0, "affine")])
def test_the_rank_of_the_maps_decides_what_a_plan_compensates_with(
    run: Run, tiny: Any, tmp_path: Path, rank: int, compensation: str
) -> None:
    output, data = tmp_path / "out.json", tmp_path / "text.txt"
    data.write_text("the quick brown fox " * 40)
    args = ["calibrate", tiny(), "--data", data, "--requests", 4, "--tokens", 20, "-o", output, "--no-cost"]
    assert run(*args, "--rank", rank).exit_code == 0
    maps = Profile.load(output).maps
    assert (0 if maps is None else maps.up.shape[3]) == rank
    assert json.loads(run("plan", output, "--skip", 2, "--json").stdout)["plan"]["compensation"] == compensation
    assert run("generate", tiny(), "-p", "hello", "--profile", output, "--skip", 2, "--max-tokens", 5).exit_code == 0


def test_text_may_come_from_stdin(run: Run, tiny: Any, tmp_path: Path) -> None:
    result = run("generate", tiny(), "-f", "-", "--max-tokens", 3, stdin="hello")
    assert result.exit_code == 0 and "prompt:" in result.stderr
    args = ["calibrate", tiny(), "--data", "-", "--tokens", 8, "--requests", 1, "--no-cost", "-o", tmp_path / "p.json"]
    assert run(*args, stdin="hello world, hello").exit_code == 0


def test_the_same_seed_gives_the_same_text(run: Run, tiny: Any) -> None:
    texts = [run("generate", tiny(), "-p", "hello", "--max-tokens", 20, "--seed", seed).stdout for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_generate_allocates_no_kv_for_attentions_that_never_run(run: Run, tiny: Any, profile_path: Path) -> None:
    args = ["generate", tiny(), "-p", "hello", "--max-tokens", 2, "--profile", profile_path, "--ctx", 256]
    # f16 K and V of 2 heads of 16 for 256 positions: 32,768 bytes a layer.
    result = run(*args, "--attention", "0,2", "--mode", "e2e")
    assert "KV:      33 kB, none for 2 of 3 layers" in result.stderr
    assert "KV:      98 kB\n" in run(*args, "--attention", "0,2", "--mode", "decode").stderr
    assert "KV:      98 kB\n" in run(*args, "--ffn", "0", "--mode", "e2e").stderr
    assert "KV:      98 kB\n" in run(*args, "--attention", "0,2").stderr, "the bulk keeps its K and V"


def test_generate_tells_what_each_phase_skipped(run: Run, tiny: Any, profile_path: Path) -> None:
    args = ["generate", tiny(), "-p", "hello", "--max-tokens", 8, "--profile", profile_path, "--raw"]
    decode_only = run(*args, "--mode", "decode", "--skip", 1, "--no-online").stderr
    assert "skipped: 0 of 6 sublayers in prefill" in decode_only
    assert "1 of 6 in decode (0 attention, 1 FFN)" in decode_only
    assert "online" not in decode_only
    assert "of 20 tokens observed" in run(*args, "--skip", 1, "--mode", "e2e").stderr


def test_ffns_added_online_are_counted(run: Run, tiny: Any, profile_path: Path) -> None:
    # The sixth of six similarities, 0.5, is the threshold; nothing but attentions is in the fixed set.
    profile = Profile.load(profile_path)
    plan = profile.plan(strategy="manual", attention=[0], mode="e2e")
    stage = OnlineStage(threshold=-1.0, scale="median")
    plan = replace(plan, online=stage)
    llm = running.open_quietly(str(tiny()), 64, running.Running(1, 0, False), plan=plan)
    answer = Generation(llm, llm.tokenize(b"hello"), max_tokens=30)
    list(answer)
    assert answer.timing is not None
    if answer.timing.n_generated > stage.window + 1:
        assert skipped_counts(llm, answer.timing.n_generated) == (1, 1, 3)
        assert any("layers 0-2 added" in text for text in skipped_lines(llm, 29))
    llm.close()


def test_plan_ranks_every_sublayer(run: Run, profile_path: Path) -> None:
    args = ("plan", profile_path, "--skip", 2, "--compensation", "median", "--json")
    data = json.loads(run(*args, "--mode", "e2e").stdout)
    # By hand: the profile's similarity rises from attention of layer 0 to FFN of layer 2.
    order = [(row["layer"], row["kind"]) for row in data["sublayers"]]
    assert order == [(2, "ffn"), (2, "attention"), (1, "ffn"), (1, "attention"), (0, "ffn"), (0, "attention")]
    assert [row["rank"] for row in data["sublayers"]] == [1, 2, 3, 4, 5, 6]
    assert [row["skipped"] for row in data["sublayers"]] == [["prefill", "decode"]] * 2 + [[]] * 4
    assert [row["scale"] for row in data["sublayers"]] == [2.0, 2.0, None, None, None, None]
    assert (data["predicted_speedup"], data["layers_without_kv"]) == (None, [2])
    assert data["plan"]["online"]["threshold"] == pytest.approx(0.99 - 0.49 / 5)
    by_default = json.loads(run(*args).stdout)
    assert [row["skipped"] for row in by_default["sublayers"]] == [["bulk"]] * 2 + [[]] * 4
    assert by_default["plan"]["mode"] == "prompt" and by_default["layers_without_kv"] == []
    # In the bulk the last layer costs nothing, whatever its divergence: its attention comes first.
    order = [(row["layer"], row["kind"]) for row in by_default["sublayers"]]
    assert order == [(2, "attention"), (2, "ffn"), (1, "ffn"), (1, "attention"), (0, "ffn"), (0, "attention")]
    told = [row["divergence"] for row in by_default["sublayers"]]
    assert told == pytest.approx([0.108, 0.01, 0.206, 0.304, 0.402, 0.5]) and data["sublayers"][0]["divergence"] is None
    assert "diver-" in run(*args[:-1]).stdout and "108.00" in run(*args[:-1]).stdout
    assert "simi-" in run(*args[:-1], "--mode", "e2e").stdout


# Decoding a token, an attention takes 2 ms, an FFN 1 ms, the rest 1 ms, so that 3 layers take 10 ms.
COST = cost_model(0.1, [0.2] * 3, [0.1] * 3)


def test_plan_tells_what_skipping_saves(run: Run, profile_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = replace(Profile.load(profile_path), cost=COST)
    monkeypatch.setattr(Profile, "load", lambda path: profile)
    args = ["plan", profile_path, "--skip", 2, "--mode", "decode"]
    data = json.loads(run(*args, "--json").stdout)
    assert {row["kind"]: round(row["saved_ms"], 6) for row in data["sublayers"]} == {"attention": 2.0, "ffn": 1.0}
    assert data["predicted_speedup"] == pytest.approx({"prefill": 1.0, "decode": 10 / 7})
    assert data["phase"] == "decode"
    text = run(*args).stdout
    assert "prefill 1.00 x, decode 1.43 x as fast" in text and max(map(len, text.splitlines())) <= 80


def test_a_speedup_takes_as_many_sublayers_as_it_needs(
    run: Run, profile_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = replace(Profile.load(profile_path), cost=COST)
    monkeypatch.setattr(Profile, "load", lambda path: profile)
    for mode in ("prompt", "e2e"):
        data = json.loads(run("plan", profile_path, "--speedup", 1.25, "--mode", mode, "--json").stdout)
        assert data["predicted_speedup"]["prefill"] >= 1.25 and data["plan"]["mode"] == mode
        assert "at most" in line(run("plan", profile_path, "--speedup", 11, "--mode", mode))


def test_a_speedup_for_a_prompt_loads_the_weights_once(
    run: Run, tiny: Any, profile_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = replace(Profile.load(profile_path), cost=COST)
    monkeypatch.setattr(Profile, "load", lambda path: profile)
    opened, init = [], AdaSkipLlama.__init__

    def spy(self: AdaSkipLlama, *args: Any, **options: Any) -> None:
        opened.append(options)
        init(self, *args, **options)

    monkeypatch.setattr(AdaSkipLlama, "__init__", spy)
    args = ("-p", "hello", "--profile", profile_path, "--speedup", 1.25, "--max-tokens", 2, "--mode", "e2e")
    result = run("generate", tiny(), *args)
    assert result.exit_code == 0, result.output
    assert [options.get("vocab_only", False) for options in opened] == [True, False]
    again = run("generate", tiny(), *args[:-2])
    assert again.exit_code == 0 and "in the bulk of a prompt" in again.stderr, "a short prompt is no error"
    # By hand: attention 2 saves 2 of 10 ms.
    assert "skipped: 1 of 6 sublayers in prefill" in result.stderr and "none for 1 of 3 layers" in result.stderr


def test_plan_shows_phases_apart_where_they_differ(run: Run, profile_path: Path) -> None:
    text = run("plan", profile_path, "--skip", 2, "--mode", "decode").stdout
    assert "0 of 6 sublayers skipped in prefill, 2 in decode" in text
    assert "attention skipped in prefill in layers: none" in text
    assert "attention skipped in decode in layers: 2" in text
    assert "KV memory is needed for all layers" in text
    assert "after 20 tokens of an answer" in text


def test_plan_tells_the_bulk_and_the_time_to_the_first_token(
    run: Run, profile_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = replace(Profile.load(profile_path), cost=cost_model(1, [1] * 3, [1] * 3, size=64, kept=[0.25] * 3))
    monkeypatch.setattr(Profile, "load", lambda path: profile)
    args = ["plan", profile_path, "--mode", "prompt", "--strategy", "suffix", "--skip", 4, "--decode", 1]
    args += ["--context", 65 + 64, "--head", 0, "--tail", 1, "-o", tmp_path / "plan.json"]
    data = json.loads(run(*args, "--json").stdout)
    # By hand, two ubatches of the bulk and a token: of the whole model 1 + 4 + 0.25 s, of the plan 1 + 2 + 2 * 0.25.
    whole, plan = 2 * (1 + 4 + 0.25) + 0.07, 2 * (1 + 2 + 0.5) + 0.07
    assert data["predicted_first_token_s"] == pytest.approx({"full": whole, "plan": plan})
    assert data["predicted_speedup"] == pytest.approx({"prefill": whole / plan, "decode": 7 / 6})
    assert (data["phase"], data["layers_without_kv"]) == ("bulk", [])
    marks = {(row["layer"], row["kind"]): row["skipped"] for row in data["sublayers"] if row["skipped"]}
    bulk = ["bulk"]
    assert marks == {(1, "attention"): bulk, (1, "ffn"): bulk, (2, "attention"): bulk, (2, "ffn"): [*bulk, "decode"]}
    assert (data["plan"]["bulk"]["head"], data["plan"]["bulk"]["tail"]) == (0, 1)
    text = run(*args).stdout
    assert "4 of 6 sublayers skipped in the bulk of a prompt, 1 in decode: strategy suffix" in " ".join(text.split())
    assert "attention skipped in the bulk in layers: 1, 2" in text and "FFN skipped in decode in layers: 2" in text
    assert "The bulk is all of a prompt but its first 0 tokens and its last 1." in text
    assert "First token after 7.07 s, without skipping 10.6 s." in text
    assert "needed for all layers: the bulk of a prompt keeps its K and V" in text
    assert max(len(each) for each in text.splitlines() if "plan.json" not in each) <= 80
    shown = run("plan", tmp_path / "plan.json").stdout
    assert "4 of 6 sublayers skipped in the bulk of a prompt, 1 in decode" in shown and "its last 1." in shown


def test_generate_tells_what_the_bulk_skipped(run: Run, tiny: Any, profile_path: Path, tmp_path: Path) -> None:
    args = ["--mode", "prompt", "--skip", 2, "--head", 0, "--tail", 4]
    result = run("generate", tiny(), "-p", "hello", "--profile", profile_path, *args, "--max-tokens", 2)
    assert result.exit_code == 0, result.output
    assert "skipped: 2 of 6 sublayers in the bulk of a prompt" in result.stderr
    assert run("plan", profile_path, *args, "-o", tmp_path / "plan.json").exit_code == 0
    again = run("generate", tiny(), "-p", "hello", "--plan", tmp_path / "plan.json", "--max-tokens", 2)
    assert again.exit_code == 0 and "in the bulk of a prompt" in again.stderr


def test_windows_are_chosen_by_hand_and_told(run: Run, tiny: Any, profile_path: Path, tmp_path: Path) -> None:
    profile = Profile.load(profile_path)
    replace(profile, windows=Windows((0, 1, 2), (0.0, 0.1, 0.2, 0.3))).save(profile_path)
    args = ["--skip", 1, "--windowed", 3, "--window-size", 5, "--head", 0, "--tail", 4]  # one of the three is skipped
    shown = run("plan", profile_path, *args, "-o", tmp_path / "plan.json").stdout
    words = "1 of 6 sublayers skipped in the bulk of a prompt, 2 attentions windowed to 5 tokens, 0 in decode"
    assert words in " ".join(shown.split())
    assert "attention in the bulk looks back at 5 tokens in layers: 0, 1" in shown
    assert "looks back at 5 tokens" in run("plan", tmp_path / "plan.json").stdout
    result = run("generate", tiny(), "-p", "hello", "--plan", tmp_path / "plan.json", "--max-tokens", 2)
    assert result.exit_code == 0, result.output
    assert "(1 attention, 0 FFN), 2 attentions windowed to 5 tokens" in " ".join(result.stderr.split())
    assert "3 attentions can look back at a window in the bulk." in run("inspect", tiny()).stdout


def test_windows_alone_are_a_plan(run: Run, tiny: Any, profile_path: Path, tmp_path: Path) -> None:
    profile = Profile.load(profile_path)
    replace(profile, windows=Windows((0, 1, 2), (0.0, 0.1, 0.2, 0.3))).save(profile_path)
    assert run("plan", profile_path, "--skip", 0, "--windowed", 1, "-o", tmp_path / "plan.json").exit_code == 0
    result = run("generate", tiny(), "-p", "hello", "--plan", tmp_path / "plan.json", "--max-tokens", 2)
    assert "1 attention windowed to 252 tokens" in " ".join(result.stderr.split())


def test_generate_tells_what_the_first_token_would_have_taken_without_skipping(
    run: Run, tiny: Any, profile_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timing = Timing(n_prompt=66, n_evaluated=66, n_generated=2, first_token_s=3.0, decode_s=0.1, is_cut=False)
    monkeypatch.setattr(Generation, "timing", property(lambda self: timing, lambda self, value: None), raising=False)
    cost = cost_model(0, [1] * 3, [1] * 3, size=64, kept=[0.5] * 3)
    profile = replace(Profile.load(profile_path), cost=cost)
    monkeypatch.setattr(Profile, "load", lambda path: profile)
    args = ["generate", tiny(), "-p", "hello", "--profile", profile_path, "--ffn", "0,1", "--head", 1, "--tail", 1]
    told = run(*args, "--max-tokens", 2).stderr
    # By hand, of 64 tokens without outputs: two layers and the last one's K and V take 4.5 s, without two FFNs 2.5. The
    # plan cuts 1 + 64 + 1 tokens, the whole model 64 + 2, of which the two lie between 0.06 s for one and 5.01 for 64.
    whole, bulk = 4.5 + 0.06 + (5.01 - 0.06) / 63, 0.04 + 2.5 + 0.06
    assert f"first token after 3.0 s; {3.0 * whole / bulk:.1f} s without skipping, as predicted\n" in told
    told = run("generate", tiny(), "-p", "hello", "--max-tokens", 2).stderr
    assert "first token after 3.0 s\n" in told


def test_what_tune_predicted_is_told_where_there_is_no_profile() -> None:
    timing = Timing(n_prompt=2000, n_evaluated=2000, n_generated=2, first_token_s=0.25, decode_s=0.1, is_cut=False)
    plan = SkipPlan.manual(3, ffn=[1], phase="bulk")
    found = point(plan, 0.01, {1024: 1.2, 2048: 1.6})
    told = first_token_line(timing, plan, point=found)
    assert told == "first token after 0.25 s; 0.40 s without skipping, as predicted"
    assert first_token_line(timing, None, point=found) == "first token after 0.25 s"
    partly_cached = replace(timing, n_evaluated=100)
    assert first_token_line(partly_cached, plan, point=found) == "first token after 0.25 s", "that was not predicted"


# --- a frontier -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tuned_model(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with a frontier beside it: one plan that loses 0.01 nats and one that loses 0.04, from 32 tokens on."""
    monkeypatch.setattr(adaskip_cpp.model.frontier, "LEAST_CONTEXT", 32)
    path = Path(shutil.copy(tiny(), tmp_path / "m.gguf"))
    mild, strong = (SkipPlan.manual(3, ffn=ffn, phase="bulk") for ffn in ([1], [1, 2]))
    lengths = {1024: 1.2, 2048: 1.3, 4096: 1.4}
    faster = {length: 2 * ratio for length, ratio in lengths.items()}
    found = frontier([point(mild, 0.01, lengths), point(strong, 0.04, faster)], settings=Settings(flash_attn=True),
                     tried=(Tried(Settings(), 0.01, 0.02, 0.1, 9.0, True),
                            Tried(Settings(flash_attn=True), 0.01, 0.01, 0.1, 8.0, True),
                            Tried(Settings(flash_attn=True, repack=False), *[math.inf] * 4, False)),
                     speeds=(SpeedUp("both", 2048, Interval(1.5, 1.4, 1.6, 2), (3.0, 2.0)),))  # fmt: skip
    save_plan(plan_path(path), found)
    return path


LONG = "the of to in " * 20


def test_plan_shows_a_frontier_within_80_columns(run: Run, tuned_model: Path) -> None:
    result = run("plan", plan_path(tuned_model))
    assert result.exit_code == 0, result.output
    told = " ".join(result.stdout.split())
    assert "Plans, judged after prompts of 2,048 tokens" in told
    assert "Chosen: flash_attn True. They change answers by rounding alone." in told and "repack False fails" in told
    assert "A promise of 0.02 nats per token gives 1.30 times the speed at 2,048 tokens." in told
    assert "A promise of 0.05 nats per token (the default) gives 2.60 times the speed" in told
    assert "after 2,048 tokens comes 1.50 (1.40 to 1.60) times as fast with both as with stock (2 s instead" in told
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_plan_tells_a_frontier_as_json(run: Run, tuned_model: Path) -> None:
    data = json.loads(run("plan", plan_path(tuned_model), "--json").stdout)
    assert [each["plan"]["bulk"]["skip"]["skip"]["ffn"] for each in data["frontier"]["points"]] == [[1], [1, 2]]
    assert [each["continuation"]["divergence"]["value"] for each in data["frontier"]["points"]] == [0.01, 0.04]
    assert data["frontier"]["settings"]["flash_attn"] is True


def test_a_model_in_the_place_of_its_profile_or_plan_is_told(run: Run, tiny: Any) -> None:
    assert "is a model; name its profile, which `adaskip-cpp calibrate" in line(run("plan", tiny()))
    assert "is a model; name its plan file" in line(run("generate", tiny(), "-p", "the", "--plan", tiny()))


def test_a_plan_file_is_shown_as_it_is(run: Run, tuned_model: Path) -> None:
    assert "leave out other options" in line(run("plan", plan_path(tuned_model), "--skip", 2), 2)


@pytest.mark.parametrize(("options", "n_skip"), [((), 2), (("--max-loss", 0.02), 1), (("--max-loss", 0), 0)])
def test_generate_skips_what_keeps_the_promise(
    options: tuple[object, ...], n_skip: int, run: Run, tuned_model: Path
) -> None:
    result = run("generate", tuned_model, "-p", LONG, "--max-tokens", 2, *options)
    assert result.exit_code == 0, result.output
    assert f"Plans lose at most {options[-1] if options else 0.05:g} nats per token" in result.stderr
    assert ("skipped:" in result.stderr) is (n_skip > 0)
    assert not n_skip or f"skipped: {n_skip} of 6 sublayers in the bulk of a prompt" in result.stderr


def test_generate_runs_a_short_prompt_whole(run: Run, tuned_model: Path) -> None:
    result = run("generate", tuned_model, "-p", "the", "--max-tokens", 2)
    assert result.exit_code == 0 and "skipped:" not in result.stderr


def test_generate_takes_a_frontier_from_elsewhere(run: Run, tuned_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    save_plan(other, load_plan(plan_path(tuned_model)).frontier)
    os.remove(plan_path(tuned_model))
    result = run("generate", tuned_model, "-p", LONG, "--max-tokens", 2, "--plan", other, "--max-loss", 0.02)
    assert result.exit_code == 0 and "skipped: 1 of 6" in result.stderr


def test_full_runs_the_whole_model_whatever_was_found(run: Run, tuned_model: Path) -> None:
    result = run("generate", tuned_model, "-p", LONG, "--max-tokens", 2, "--full")
    assert result.exit_code == 0 and "skipped:" not in result.stderr and "Plans lose" not in result.stderr


@pytest.mark.parametrize("options", [("--full",), ("--skip", 1)])
def test_a_promise_beside_what_else_to_skip_is_a_usage_error(
    options: tuple[object, ...], run: Run, tuned_model: Path
) -> None:
    result = run("generate", tuned_model, "-p", "the", "--max-loss", 0.1, *options)
    assert "--max-loss chooses from what `tune` found" in line(result, 2)


def test_a_promise_without_what_tune_found_is_a_usage_error(run: Run, tuned_model: Path, tmp_path: Path) -> None:
    save_plan(tmp_path / "one.json", SkipPlan.manual(3, ffn=[1]))
    result = run("generate", tuned_model, "-p", "the", "--max-loss", 0.1, "--plan", tmp_path / "one.json")
    assert "has one plan alone" in line(result, 2)
    os.remove(plan_path(tuned_model))
    result = run("generate", tuned_model, "-p", "the", "--max-loss", 0.1)
    assert f"run `adaskip-cpp tune {tuned_model}`" in line(result, 2)


@pytest.mark.parametrize("value", ["-0.1", "much"])
def test_a_promise_that_is_no_loss_is_a_usage_error(value: str, run: Run, tuned_model: Path) -> None:
    assert "--max-loss" in line(run("generate", tuned_model, "-p", "the", "--max-loss", value), 2)


def test_settings_that_were_found_here_are_used_and_options_win(
    run: Run, tuned_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, init = [], adaskip_cpp.AdaSkipLlama.__init__

    def spy(self: AdaSkipLlama, *args: Any, **options: Any) -> None:
        opened.append(options)
        init(self, *args, **options)

    monkeypatch.setattr(AdaSkipLlama, "__init__", spy)
    for here, options, flash_attn in ((True, (), True), (True, ("--no-flash-attn",), False), (False, (), None)):
        monkeypatch.setattr(running, "is_here", lambda machine, here=here: here)
        assert run("generate", tuned_model, "-p", "the", "--max-tokens", 1, *options).exit_code == 0
        assert opened[-1].get("flash_attn") is flash_attn


def test_plan_shows_a_schedule(run: Run, profile_path: Path) -> None:
    text = run("plan", profile_path, "--strategy", "skip_decode", "--skip", 4, "--mode", "e2e").stdout
    assert "from token 1 of an answer: 4 skipped" in text


@pytest.mark.parametrize("strategy", ["adaskip", "early_exit", "suffix", "skip_decode", "unified_skipping"])
def test_every_strategy_can_be_planned_within_80_columns(run: Run, profile_path: Path, strategy: str) -> None:
    for mode in MODES:
        result = run("plan", profile_path, "--strategy", strategy, "--skip", 2, "--mode", mode)
        assert result.exit_code == 0, result.output
        assert f"strategy {strategy}, mode {mode}" in " ".join(result.stdout.split())
        assert max(map(len, result.stdout.splitlines())) <= 80


def test_a_list_of_layers_is_short() -> None:
    assert layer_list(()) == "none"
    assert layer_list((3,)) == "3"
    assert layer_list((0, 1, 4, 5, 6, 9)) == "0, 1, 4-6, 9"


def test_bytes_are_decimal() -> None:
    assert [megabytes(n) for n in (32_768, 1_500_000, 188_743_680)] == ["33 kB", "1.5 MB", "189 MB"]


# --- the heat map -----------------------------------------------------------------------------------------------------


def show(width: int, n_layer: int, *, colour: bool = False) -> list[str]:
    console = Console(width=width, force_terminal=colour, color_system="truecolor" if colour else None, record=True)
    similarity = np.linspace(0.1, 0.9, 2 * n_layer).reshape(n_layer, 2)
    similarity[0, 0] = np.nan
    skip = np.zeros((n_layer, 2), bool)
    skip[-1] = True
    with console.capture() as capture:
        print_heatmap(console, similarity, skip)
    return capture.get().splitlines()


def test_thirty_layers_fit_eighty_columns_in_two_rows() -> None:
    header, attention, ffn, legend = show(80, 30)
    assert header.split() == ["layer", "0", "5", "10", "15", "20", "25"]
    assert attention.split()[0] == "attention" and attention.split()[1] == "-" and attention.endswith("9x")
    assert ffn.startswith("FFN") and ffn.endswith("9x")
    assert "0.1" in legend and "0.9" in legend and "x skipped" in legend
    assert max(map(len, (header, attention, ffn, legend))) <= 80


def test_more_layers_than_fit_go_on_below() -> None:
    lines = show(60, 80)
    assert sum(text.startswith("attention") for text in lines) == 4
    assert max(map(len, lines)) <= 60


def test_colours_are_only_for_terminals() -> None:
    assert not any("\x1b" in text for text in show(80, 30))
    assert any("\x1b[" in text for text in show(80, 30, colour=True))


# --- the machine ------------------------------------------------------------------------------------------------------


def test_there_is_a_core_to_run_on() -> None:
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)
