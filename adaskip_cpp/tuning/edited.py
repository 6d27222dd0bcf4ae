"""Measures the loss of answers to edited prompts, for ``tune.py``. Start at :func:`edit_points`.

The earlier forms of a prompt are made backwards, one edit at a time, from a prompt that the whole model was judged on.
"""

import random
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from itertools import cycle, islice, pairwise

from ..engine.llama import AdaSkipLlama
from ..measuring.corpus import tokens_of
from ..measuring.judge import Judge
from ..measuring.memo import Memo
from ..measuring.probes import Probe, passkey_lines
from ..model.edits import FEW, MANY, TOGETHER, WIDE, Edits
from ..model.frontier import DEFAULT_LOSS, EDITS_SHARE, EditPoint
from .figures import Judged

_HEAD, _TAIL = 64, 128  # tokens at the two ends of a prompt that stay, like a system prompt and a question
_N_DOCUMENTS = 5
_FACTORS = {MANY: 3.0, TOGETHER: 2.0}  # the expected loss over that of the kind before: docs/dev/method.md
_LINE = "\nThe limit was raised to 4096 in March, as the notes of the maintainers say.\n"

_Tokens = list[int]


def edit_points(llm: AdaSkipLlama, judge: Judge, memo: Memo, on_progress: Callable[[float], object]) -> list[EditPoint]:
    """Measure small edits, new orders of documents, and documents that were read alone and are put together.

    Each kind is measured after as many moves as its ``most_moves`` allows. Small edits change, insert and delete lines,
    and one drops a message, which is the continuation of another text. A kind is measured if the default promise
    allows its expected loss, by that of the kind before.

    The last edit changes the pass keys of one place. Before it the i-th text has those of number -1 - i there, and in
    the judge's prompt those of number i. Return [] if the model or the prompts allow no moves.
    """
    prompts = list({each.text: each.tokens[: each.n_prompt] for each in judge.probes}.items())  # the longest of each
    # Other prompts would bring pass keys with the same names.
    messages = {each.text: list(each.answer) for each in judge.probes if each.kind == "continuation"}
    judged_at, line, found = len(prompts[0][1]), tokens_of(llm, _LINE), list[EditPoint]()
    if not llm.can_move or judged_at < _HEAD + _TAIL + 2 * _N_DOCUMENTS * Edits.least:
        return []

    def before(i: int, most_moves: int) -> list[_Tokens]:
        """Return the earlier forms of a prompt, the oldest first."""
        prompt, message, draw = list(prompts[i][1]), messages[prompts[i - 1][0]], random.Random(i)
        new, old = (passkey_lines(llm, number)[0] for number in (i, -1 - i))
        forms = [_replaced(prompt, new, old)]
        if most_moves == FEW:
            cuts = [(line, len(line) - 3), (line, 0), ([], len(line)), (message, 0), ([], len(line)), (line, 0)]
            for n, (older, n_newer) in enumerate(islice(cycle(cuts), FEW - 1)):
                at = _HEAD if older is message else draw.randrange(_HEAD, judged_at - _TAIL)
                forms.append([*forms[n][:at], *older, *forms[n][at + n_newer :]])
        else:
            forms[0] = _reordered(forms[0], draw)
            n_orders = (MANY - FEW) // WIDE if most_moves == MANY else 1
            forms += [_reordered(forms[0], draw) for _ in range(n_orders - 1)]
        return forms[::-1]

    def read(edits: Edits, probe: Probe) -> None:
        """Read the earlier forms of a probe's prompt and the prompt; first its documents alone, if these are asked.

        Earlier forms leave their tail moved, which is faster. The prompt reads its own, so its answers are the same.
        """
        i = [text for text, _ in prompts].index(probe.text)
        forms = before(i, edits.most_moves)
        if edits.most_moves == TOGETHER:
            saved = []
            for document in _documents(forms[0]):
                llm.reset()
                llm.eval([*forms[0][:_HEAD], *document])
                saved.append(llm.save_prompt())
            llm.reset()
            llm.saved_prompts = saved
        for n, prompt in enumerate([*forms, prompts[i][1]]):
            llm.set_reuse(edits if n == len(forms) else replace(edits, tail=1))
            with closing(llm.generate(prompt, temp=0.0)) as steps:
                next(steps)
            if llm.n_moved == 0 and (n == len(forms) or llm.saved_prompts):
                raise _NothingMovedError

    def judged(edits: Edits) -> Judged:
        own = llm.reuse, llm.saved_prompts
        llm.saved_prompts = ()
        try:
            scores = judge.edited(partial(read, edits))
        finally:
            llm.saved_prompts = own[1]
            llm.set_reuse(own[0])
        return Judged.of(*scores)

    with suppress(_NothingMovedError):
        for most_moves in (FEW, MANY, TOGETHER):
            if found and _FACTORS[most_moves] * found[-1].needs(judged_at) > EDITS_SHARE * DEFAULT_LOSS:
                break
            edits = Edits(most_moves=most_moves)
            one = memo.get(f"edits {most_moves}", Judged, partial(judged, edits))
            found.append(EditPoint(judged_at, *one.kinds, one.passkeys, (), edits))
            on_progress(len(found) / 3)
    return found


class _NothingMovedError(Exception):
    """The memory lacks the tokens to move, for example because they left a sliding window."""


def _documents(tokens: Sequence[int]) -> list[_Tokens]:
    """Return the documents of a prompt."""
    n = len(tokens) - _HEAD - _TAIL
    ends = [_HEAD + i * n // _N_DOCUMENTS for i in range(_N_DOCUMENTS + 1)]
    return [list(tokens[begin:end]) for begin, end in pairwise(ends)]


def _reordered(tokens: _Tokens, draw: random.Random) -> _Tokens:
    """Return a prompt with its documents in another order."""
    order = documents = _documents(tokens)
    while order == documents:
        order = draw.sample(documents, len(documents))
    return [*tokens[:_HEAD], *(token for each in order for token in each), *tokens[-_TAIL:]]


def _replaced(tokens: _Tokens, old: _Tokens, new: _Tokens) -> _Tokens:
    """Return tokens with the first run ``old`` replaced by ``new``; unchanged if there is none."""
    at = next((i for i in range(len(tokens)) if tokens[i : i + len(old)] == old), None)
    return tokens if at is None else [*tokens[:at], *new, *tokens[at + len(old) :]]
