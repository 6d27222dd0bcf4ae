"""Measures the loss of answers to edited prompts, for ``tune.py``. Start at :func:`edit_points`.

The earlier forms of a prompt are made backwards, one edit at a time, from a prompt that the whole model was judged on.
"""

import random
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import pairwise

from ..engine.llama import AdaSkipLlama
from ..measuring.corpus import tokens_of
from ..measuring.judge import Judge, passkey, passkey_line
from ..model.edits import FEW, MANY, WIDE, Edits
from ..model.frontier import EditPoint
from .figures import Judged
from .memo import Memo

_N_TEXTS = 2  # texts whose prompts are edited: they take as many tokens as judging a plan
_HEAD, _TAIL = 64, 128  # tokens at the two ends of a prompt that stay, like a system prompt and a question
_N_DOCUMENTS = 5
_LINE = "\nThe limit was raised to 4096 in March, as the notes of the maintainers say.\n"

_Tokens = list[int]


def edit_points(llm: AdaSkipLlama, judge: Judge, memo: Memo, on_progress: Callable[[float], object]) -> list[EditPoint]:
    """Measure small edits, then new orders of documents. Return [] if the model or the prompts allow no moves.

    Small edits change, insert and delete lines, and one drops a message of a twelfth of the prompt. Each kind is
    measured after as many edits as its ``most_moves`` allows. The last edit changes a pass key: the judge's probes must
    have pass keys, numbered as :func:`passkey` does.
    """
    prompts = list(dict.fromkeys((each.text, each.tokens[: each.n_prompt]) for each in judge.probes))
    judged_at, line, found = len(prompts[0][1]), tokens_of(llm, _LINE), list[EditPoint]()
    if not llm.can_move or judged_at < _HEAD + _TAIL + 2 * _N_DOCUMENTS * Edits.least:
        return []

    def before(i: int, most_moves: int) -> list[_Tokens]:
        """Return the earlier forms of a prompt, the oldest first."""
        prompt, message, draw = list(prompts[i][1]), list(prompts[i - 1][1][: judged_at // 12]), random.Random(i)
        new, old = (passkey_line(llm, passkey(number)) for number in (i, i + len(prompts)))
        forms = [_replaced(prompt, new, old)]
        if most_moves == MANY:
            forms[0] = _reordered(forms[0], draw)
            forms += [_reordered(forms[0], draw) for _ in range((MANY - FEW) // WIDE - 1)]
        else:
            cuts = [(line, len(line) - 3), (line, 0), ([], len(line)), (message, 0), ([], len(line)), (line, 0)]
            for n, (older, n_newer) in enumerate([*cuts, cuts[0]]):
                at = _HEAD if older is message else draw.randrange(_HEAD, judged_at - _TAIL)
                forms.append([*forms[n][:at], *older, *forms[n][at + n_newer :]])
        return forms[::-1]

    def judged(edits: Edits) -> Judged:
        numbers = range(0, len(prompts), max(len(prompts) // _N_TEXTS, 1))
        own = llm.reuse
        llm.set_reuse(edits)
        try:
            scores = judge.edited({prompts[i][0]: before(i, edits.most_moves) for i in numbers})
        finally:
            llm.set_reuse(own)
        if llm.n_moved == 0:
            raise _NothingMovedError
        return Judged.of(*scores)

    with suppress(_NothingMovedError):
        for edits in (Edits(most_moves=FEW), Edits(most_moves=MANY)):
            one = memo.get(f"edits {edits.most_moves}", Judged, partial(judged, edits))
            found.append(EditPoint(judged_at, one.continuation, one.copying, one.passkeys, (), edits))
            on_progress(len(found) / 2)
    return found


class _NothingMovedError(Exception):
    """The memory lacks the tokens to move, for example because they left a sliding window."""


def _reordered(tokens: _Tokens, draw: random.Random) -> _Tokens:
    """Return a prompt with its documents in another order."""
    n = len(tokens) - _HEAD - _TAIL
    ends = [_HEAD + i * n // _N_DOCUMENTS for i in range(_N_DOCUMENTS + 1)]
    documents = [tokens[begin:end] for begin, end in pairwise(ends)]
    order = documents
    while order == documents:
        order = draw.sample(documents, len(documents))
    return [*tokens[:_HEAD], *(token for each in order for token in each), *tokens[-_TAIL:]]


def _replaced(tokens: _Tokens, old: _Tokens, new: _Tokens) -> _Tokens:
    """Return tokens with the first run ``old`` replaced by ``new``; unchanged if there is none."""
    at = next((i for i in range(len(tokens)) if tokens[i : i + len(old)] == old), None)
    return tokens if at is None else [*tokens[:at], *new, *tokens[at + len(old) :]]
