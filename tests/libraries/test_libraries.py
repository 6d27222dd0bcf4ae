"""The lines of docs/libraries.md, with the real packages and a tiny model; `make test-libraries` installs these."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
from oracles.command_line import RUN, python
from oracles.frontiers import frontier, point
from oracles.tiny_models import add_chat_template, write_model

from adaskip_cpp import SkipPlan, plan_path, save_plan

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parents[2] / "docs" / "libraries.md").read_text(encoding="utf-8")
PROMPT = f"prompt = {'the to of an re in er ' * 60!r}\n"
TOLD = "plans of model.adaskip-plan.json lose at most 0.05 nats per token"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tiny model of that name, and a frontier beside it."""
    model = add_chat_template(write_model(tmp_path / "bare.gguf"), tmp_path / "model.gguf")
    plan = SkipPlan.manual(3, ffn=(1,), phase="bulk")
    save_plan(plan_path(model), frontier([point(plan, 0.01, dict.fromkeys((1024, 2048), 1.2))]))
    return tmp_path


def output(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    done = python(folder, *command, LLM_USER_PATH=str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def lines(library: str, model: str) -> str:
    """The lines about a library, and one more that prints how many sublayers the prompt has skipped in ``model``."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    (block,) = (each for each in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if f" {library}" in each)
    return PROMPT + block + f"print({model}.plan and {model}.plan.skipped('bulk').n_skip)\n"


@pytest.mark.parametrize(
    ("library", "model"), [("langchain_community", "llm.client"), ("llama_index.llms.llama_cpp", "llm._model")]
)
def test_a_library_that_opens_the_model_uses_its_plans(library: str, model: str, folder: Path) -> None:
    pytest.importorskip(library.partition(".")[0])
    (folder / "app.py").write_text(lines(library, model))
    done = output(folder, *RUN, "app.py")
    assert done.stdout.splitlines()[-1] == "1" and TOLD in done.stderr


@pytest.mark.parametrize("library", ["outlines", "instructor"])
def test_a_library_that_takes_the_model_uses_its_plans(library: str, folder: Path) -> None:
    assert output(folder, "-c", lines(library, "llm")).stdout.splitlines()[-1] == "1"


def test_outlines_constrains_an_answer(folder: Path) -> None:
    pytest.importorskip("llguidance")
    constrained = "print(outlines.Generator(model, Literal['yes', 'no'], backend='llguidance')(prompt, max_tokens=4))"
    code = lines("outlines", "llm") + "from typing import Literal\n" + constrained
    assert output(folder, "-c", code).stdout.splitlines()[-1] in ("yes", "no")


def test_guidance_runs_the_whole_model(folder: Path) -> None:
    pytest.importorskip("guidance")
    code = (
        f"{PROMPT}import adaskip_cpp, guidance, sys\n"
        "whole, tuned = (adaskip_cpp.AdaSkipLlama('model.gguf', n_ctx=1024, plan=plan, verbose=False)\n"
        "                for plan in (None, 'auto'))\n"
        "for llm in (whole, tuned, 'model.gguf'):\n"
        "    more = {'n_ctx': 1024} if isinstance(llm, str) else {}\n"
        "    said = guidance.models.LlamaCpp(llm, echo=False, **more) + prompt + guidance.gen('x', max_tokens=9)\n"
        "    print(repr(said['x']))\n"
        "print(tuned.plan)\n"
    )
    (folder / "app.py").write_text(code)
    done = output(folder, *RUN, "app.py")
    *answers, plan = done.stdout.splitlines()[-4:]
    assert len(set(answers)) == 1 and plan == "None"
    assert "the whole model runs: logits_all=True" in done.stderr


def test_llm_gguf_uses_the_plans(folder: Path) -> None:
    pytest.importorskip("llm_gguf")
    output(folder, "-m", "llm", "gguf", "register-model", "model", "model.gguf", "--n-ctx", "1024")
    done = output(folder, *RUN, "-m", "llm", "-m", "gguf/model", "the to of an re in er " * 60)
    assert done.stdout.strip() and TOLD in done.stderr
