"""The scripts of examples/, as a stranger runs them: on a tiny model, with and without plans beside it."""

import ast
import re
import shutil
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from gguf import GGUFReader
from oracles.served import frontier_of, serving
from oracles.tiny_families import FAMILIES, N_LAYER
from oracles.tiny_models import add_chat_template, write_model

from adaskip_cpp import AdaSkipLlama
from adaskip_cpp.engine.settings import cost_settings
from adaskip_cpp.model.identity import plan_path
from adaskip_cpp.model.plan_file import save_plan
from adaskip_cpp.model.settings import Settings

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXT = "The fox sleeps in the den, and the dog looks at the fox. " * 40
"""About 2,000 tokens of the tiny vocabulary."""


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a chat template and a context for long prompts, without plans."""
    folder = tmp_path_factory.mktemp("examples")
    family = replace(FAMILIES["llama"], metadata={"context_length": 8192})
    model = write_model(folder / "no-template.gguf", family)
    (output,) = (each for each in GGUFReader(model, "r+").tensors if each.name == "output.weight")
    output.data[3 + 128 : 3 + 256] = 0  # answers are ASCII: bytes that are no text are held back, at quadratic cost
    return add_chat_template(model, folder / "bare.gguf")


@pytest.fixture(scope="module")
def tuned(bare: Path) -> Path:
    """The same model with plans, and settings by which scripts run it on one thread."""
    model = bare.with_name("tuned.gguf")
    shutil.copy(bare, model)
    with closing(AdaSkipLlama(str(model), n_ctx=256, n_threads=1, verbose=False)) as llm:
        machine = cost_settings(llm)
    save_plan(
        plan_path(model), frontier_of(N_LAYER, settings=Settings(n_threads=1, n_threads_batch=1), machine=machine)
    )
    return model


@pytest.fixture(scope="module")
def text(bare: Path) -> Path:
    path = bare.with_name("text.txt")
    path.write_text(TEXT, encoding="utf-8")
    return path


def run(script: str, *arguments: object, stdin: str = "", code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    ran = subprocess.run(command, input=stdin, capture_output=True, text=True, encoding="utf-8", check=False)
    assert ran.returncode == code, ran.stderr
    return ran


def test_summarise_answers_and_tells_which_context_a_long_text_needs(bare: Path, tuned: Path, text: Path) -> None:
    assert run("summarise.py", tuned, text).stdout.strip()
    found = re.search(
        r"the text has (\d+) tokens; use --ctx (\d+)", run("summarise.py", bare, text, "--ctx", 1024, code=2).stderr
    )
    assert found and run("summarise.py", bare, text, "--ctx", found[2]).stdout.strip()


@pytest.mark.parametrize("name", ["bare", "tuned"])
def test_chat_over_document_reads_the_document_once(name: str, text: Path, request: pytest.FixtureRequest) -> None:
    told = run("chat_over_document.py", request.getfixturevalue(name), text, stdin="the to\nof an\nin\n\n").stdout
    first, *later = map(int, re.findall(r"\[(\d+) tokens read, first token after \d+\.\d\d s\]", told))
    assert len(later) == 2 and max(later) < first / 2


def test_chat_over_document_ends_where_the_input_ends_or_the_context_is_full(bare: Path, text: Path) -> None:
    assert "Question" in run("chat_over_document.py", bare, text).stdout
    full = run("chat_over_document.py", bare, text, "--ctx", 1024, stdin="the to\n", code=2)
    assert "use a larger --ctx" in full.stderr


def test_agent_tells_what_was_moved(bare: Path) -> None:
    with serving(bare, "--ctx", "8192", "--reuse", "edits") as server:
        told = run("agent.py", server.url).stdout
    turns = [ast.literal_eval(line) for line in told.splitlines() if line.startswith("{'prompt_tokens_reused'")]
    assert len(turns) == 4 and turns[0]["reread_because"] == "new"
    for before, turn in pairwise(turns):
        assert turn["prompt_tokens_moved"] > before["prompt_tokens_moved"] and turn["reread_because"] == "text"


@pytest.mark.slow
def test_evaluate_mine_needs_plans_and_prints_a_line_for_each_promise(bare: Path, tuned: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text(5 * TEXT, encoding="utf-8")
    assert "run `adaskip-cpp tune" in run("evaluate_mine.py", bare, mine, code=1).stderr
    told = run("evaluate_mine.py", tuned, mine).stdout
    for words in ("whole model: loss", "promise, 0.05: loss", "promise, 0.1: loss", "promise 0.02 is left out"):
        assert words in told
    assert (tmp_path / "mine.txt.results" / "report.html").exists()
