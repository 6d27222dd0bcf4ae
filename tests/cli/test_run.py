"""``adaskip-cpp run`` and ``replace_llama``: unchanged programs get our model, and all else as ``python`` gives it."""

import inspect
import logging
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from oracles.command_line import RUN, python
from oracles.frontiers import frontier, point
from oracles.tiny_families import tokens
from oracles.tiny_models import write_lora

from adaskip_cpp import AdaSkipLlama, SkipPlan, plan_path, save_plan
from adaskip_cpp.engine.dropin import Llama
from adaskip_cpp.engine.settings import cost_settings
from adaskip_cpp.errors import ModelFileError
from adaskip_cpp.model.identity import ModelInfo, fingerprint
from adaskip_cpp.model.settings import Settings

Logged = Callable[[], list[str]]

PLAN = SkipPlan.manual(3, ffn=(1,), phase="bulk")
OPTIONS: dict[str, Any] = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "verbose": False}


@pytest.fixture
def tuned(model: Path) -> Path:
    """A tiny model with a frontier beside it."""
    plan = replace(PLAN, model=ModelInfo(fingerprint(model), "llama", 3))
    save_plan(plan_path(model), frontier([point(plan, 0.01, {1024: 1.2})]))
    return model


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Logged:
    """``logged()``: what was logged under the package's name."""
    caplog.set_level(logging.INFO, "adaskip_cpp")
    return lambda: [f"{each.levelname} {each.getMessage()}" for each in caplog.records if each.name == "adaskip_cpp"]


def test_it_uses_the_plans_or_the_one_plan_beside_the_model(tuned: Path, logged: Logged) -> None:
    llm = Llama(str(tuned), **OPTIONS)
    llm.create_completion(tokens(600), max_tokens=1)
    save_plan(plan_path(tuned), PLAN)
    for each in (llm, Llama(tuned, **OPTIONS)):
        assert each.plan is not None and each.plan.skipped("bulk").n_skip == 1
    words = "plans of m.adaskip-plan.json lose at most 0.05 nats per token, in prompts of 512 tokens or more"
    assert logged() == [f"INFO {tuned}: {words}", f"INFO {tuned}: the plan of m.adaskip-plan.json is in force"]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"logits_all": True}, "logits_all=True asks for the logits of the prompt's own tokens"),
        ({"embedding": True}, "embedding=True computes embeddings"),
        ({"vocab_only": True}, "vocab_only=True loads no layers"),
        ({"lora_path": "lora.gguf"}, "its LoRA adapter is none"),
        ({"n_ctx": 256}, "no plan keeps 0.05 nats per token in 256 tokens"),
    ],
)
def test_where_plans_cannot_be_used_the_whole_model_runs(
    options: dict[str, Any], why: str, tuned: Path, logged: Logged
) -> None:
    if "lora_path" in options:
        options = {"lora_path": str(write_lora(tuned.with_name(options["lora_path"])))}
    llm = Llama(tuned, **{**OPTIONS, **options})
    (told,) = logged()
    assert told.startswith(f"WARNING {tuned}: the whole model runs: ") and why in told
    if not options.get("vocab_only"):
        llm.eval(tokens(200 if "n_ctx" in options else 600))
        assert llm.plan is None


def test_plans_that_the_model_cannot_run_or_that_cannot_be_read_are_left_out(model: Path, logged: Logged) -> None:
    save_plan(plan_path(model), frontier([point(SkipPlan.manual(4, ffn=(1,), phase="bulk"), 0.01, {1024: 1.2})]))
    assert Llama(model, **OPTIONS).frontier is None
    Path(plan_path(model)).write_text("{")
    assert Llama(model, **OPTIONS).plan is None
    other, broken = logged()
    assert "the plan is for 4 layers" in other and "truncated or is not JSON" in broken
    with pytest.raises(ModelFileError, match="there is no model file"):
        Llama(str(model.with_name("none.gguf")))
    assert len(logged()) == 2, "an error as ever"


def test_what_libraries_leave_out_by_passing_none_is_as_tuned(model: Path) -> None:
    machine = cost_settings(AdaSkipLlama(model, **OPTIONS))
    found = frontier([point(PLAN, 0.01, {1024: 1.2})], settings=Settings(n_threads=3), machine=machine)
    save_plan(plan_path(model), found)
    llm = Llama(model, n_ctx=1024, n_threads=None, n_threads_batch=1, verbose=False)
    assert llm.n_threads == 3


def test_it_can_be_pickled(tuned: Path, logged: Logged) -> None:
    llm = Llama(tuned, **OPTIONS)
    again = pickle.loads(pickle.dumps(llm))
    assert type(again) is Llama and again.frontier == llm.frontier and again.max_loss == 0.05
    stock = Llama.__new__(Llama)
    stock.__setstate__(llama_cpp.Llama.__getstate__(llm))
    assert stock.frontier == llm.frontier and len(logged()) == 2


def test_it_passes_for_llama_cpp_pythons_class_with_the_names_of_its_arguments(model: Path) -> None:
    class Mine(Llama):
        pass

    assert isinstance(AdaSkipLlama(model, **OPTIONS), Llama) and issubclass(llama_cpp.Llama, Llama)
    ours = Llama(model, **OPTIONS)
    assert isinstance(ours, llama_cpp.Llama) and not isinstance(ours, Mine) and not isinstance(model, Llama)
    assert "n_gpu_layers" in inspect.signature(Llama).parameters


def test_in_python_it_is_replaced_before_it_is_imported(tuned: Path) -> None:
    ours = "import adaskip_cpp; adaskip_cpp.replace_llama(); adaskip_cpp.replace_llama(); "
    opened = f"from llama_cpp import Llama; print(Llama({str(tuned)!r}, verbose=False).frontier)"
    done = python(tuned.parent, "-c", ours + opened)
    assert done.stdout.startswith("Frontier("), done.stderr
    late = python(tuned.parent, "-c", f"import adaskip_cpp; from llama_cpp import Llama; {ours}")
    assert "LibraryError: __main__" in late.stderr and "imported llama_cpp.Llama already" in late.stderr


APP = f"""
import pickle, sys, llama_cpp, llama_cpp.llama
from llama_cpp import Llama

class Mine(Llama):
    pass

def main():
    llm = Llama(sys.argv[1], **{OPTIONS!r})
    assert isinstance(llm, llama_cpp.Llama) and llama_cpp.Llama is llama_cpp.llama.Llama is Llama
    assert isinstance(Mine(sys.argv[1], **{OPTIONS!r}), Llama) and pickle.loads(pickle.dumps(Mine)) is Mine
    answer = llm.create_completion([1] + [7, 8, 9] * 200, max_tokens=5, temperature=0)
    print(answer["choices"][0]["text"].encode(), sys.argv[1:], __name__, __file__, sys.path[0])
    print(getattr(llm, "plan", None))

if __name__ == "__main__":
    main()
"""


def test_a_program_is_run_unchanged(model: Path, tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "app.py").write_text(APP)
    ours, stock = (python(tmp_path, *how, "app/app.py", model, "-x", "--help", "--") for how in (RUN, ()))
    assert ours.returncode == stock.returncode == 0, ours.stderr
    assert ours.stdout == stock.stdout
    assert [each for each in ours.stderr.splitlines() if each.startswith("adaskip-cpp")] == 2 * [
        f"adaskip-cpp: {model}: the whole model runs: there is no plan {plan_path(model)!r} beside the model; run "
        f"`adaskip-cpp tune {model}`"
    ]


def test_its_models_use_their_plans(tuned: Path, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__main__.py").write_text(APP)
    for how in (["app.py"], ["-m", "package"]):
        done = python(tmp_path, *RUN, *how, tuned)
        assert "SkipPlan(" in done.stdout, done.stderr
        assert done.stderr.count("plans of m.adaskip-plan.json lose at most 0.05 nats per token") == 2


@pytest.mark.parametrize(
    "code",
    [
        "import sys; print(1); sys.exit(3)",
        "import sys; sys.exit('words')",
        "def f():\n    1 / 0\n\ntry:\n    f()\nexcept ArithmeticError as error:\n    raise ValueError('x') from error",
        "import sys\nsys.excepthook = lambda kind, error, trace: print(kind, error)\nopen('none')",
        "x = (",
        "raise KeyboardInterrupt",
        "import signal; print(signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))",
        "import atexit, threading; atexit.register(print, 'end'); threading.Timer(0.1, print, ['late']).start()",
    ],
)
def test_it_ends_as_under_python(code: str, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(code)
    ours, stock = (python(tmp_path, *how, "app.py") for how in (RUN, ()))
    assert ours.returncode == (130 if "Interrupt" in code else stock.returncode)
    assert (ours.stdout, ours.stderr) == (stock.stdout, stock.stderr)


def test_a_program_that_is_not_there_is_an_error_of_one_line(tmp_path: Path) -> None:
    for arguments, code, words in ((["none.py"], 2, "there is no program 'none.py'"), (["-m", "none"], 1, "none")):
        done = python(tmp_path, *RUN, *arguments)
        assert done.returncode == code and words in done.stderr and len(done.stderr.splitlines()) == 1
