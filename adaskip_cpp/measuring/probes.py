"""Makes probes, prompts with answers of known tokens, for ``judge.py``. Start at :func:`probes_of`."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, TypeAlias, get_args

from ..engine.llama import AdaSkipLlama
from ..errors import DataError
from .corpus import tokens_of

ProbeKind: TypeAlias = Literal["continuation", "copying", "retrieval"]
KINDS: tuple[ProbeKind, ...] = get_args(ProbeKind)

N_CONTINUED, N_COPIED, N_CUE = 48, 72, 8  # tokens of continuing and copying answers; the cue of a copy is not judged

_NAMES = "Ophelia", "Endeavour", "Kestrel", "Aurora", "Nautilus", "Meridian", "Calypso", "Halcyon", "Sirius", "Tempest"
# What the pass keys at three places of a prompt are called: at each, a number and a name.
_HIDDEN = (
    ("The pass key", "The name of the ship"),
    ("The number of the train", "The name of the harbour"),
    ("The code of the door", "The name of the captain"),
)
# A later line of the prompt speaks of the ship without its name. If an edit
# moves that line, its K and V were computed after the old name.
_LATER = "\n\nThe captain says that the ship sails at dawn.\n\n"


@dataclass(frozen=True)
class Probe:
    """A prompt and an answer of known tokens."""

    text: str  # name of its text; probes of different texts are independent, those of one text are not
    kind: ProbeKind  # whether the answer continues the prompt, copies a part of it, or is a pass key
    tokens: tuple[int, ...]  # the text, one object for all its probes; the prompt is its first n_prompt tokens
    n_prompt: int
    answer: tuple[int, ...]  # tokens that follow the prompt
    n_cue: int = 1  # tokens of the answer that are given and not judged, at least 1


def passkeys(i: int) -> list[tuple[str, str]]:
    """Return the pass keys of the i-th text: at each place a number and a name; those of -1 - i are others."""
    numbers = range(len(_HIDDEN) * i, len(_HIDDEN) * (i + 1))
    return [(str(10007 + 7919 * number % 89989), _NAMES[number % len(_NAMES)]) for number in numbers]


def passkey_lines(tokenizer: AdaSkipLlama, i: int) -> list[list[int]]:
    """Return the tokens that hide the pass keys of the i-th text at each place of a prompt."""
    found = []
    for called, words in zip(_HIDDEN, passkeys(i), strict=True):
        pairs = zip(called, words, strict=True)
        lines = [f"{name} is {word}. Remember it. {word} is {name.lower()}.\n\n" for name, word in pairs]
        found.append(tokens_of(tokenizer, "\n\n" + "".join(lines)))
    return found


def probes_of(
    tokenizer: AdaSkipLlama,
    text: str,
    tokens: Sequence[int],
    cuts: Sequence[int],
    *,
    n_continued: int = N_CONTINUED,
    n_copied: int = N_COPIED,
    key: tuple[int, float] | None = None,
) -> list[Probe]:
    """Return the probes of a text: for each prompt length in ``cuts`` a continuation and, if it fits, a copy.

    A copy repeats the prompt from a quarter of its length on, after every second prompt from half of it on. If pass
    keys stand there, it begins after them, where the prompt is long enough: models copy these more easily than text.

    ``key`` hides the pass keys of that number at three places of the longest prompt, and asks for them after that
    prompt. The first place is at a depth, 0 to 1; the others follow after a third each, from the beginning again after
    the end. Half-way from the first place to the end, a line speaks of the ship without its name. Raises DataError if
    the text is too short: it must have ``n_continued`` tokens after the last cut.
    """
    longest = max(cuts, default=0)
    if not cuts or len(tokens) < longest + n_continued:
        why = f"text {text!r} has {len(tokens)} tokens, prompts up to {longest} need {longest + n_continued}"
        raise DataError(f"{why}; give a longer text")
    given, hidden, questions = list(tokens), list[range](), list[tuple[str, str]]()
    if key is not None:
        lines, later = passkey_lines(tokenizer, key[0]), tokens_of(tokenizer, _LATER)
        room = max(longest - len(later) - sum(map(len, lines)), 1)
        places = [max(round((key[1] + n / len(lines)) % 1 * room), 1) for n in range(len(lines))]
        given, hidden = _with_lines(given, [*zip(places, lines, strict=True), ((places[0] + room) // 2, later)])
        questions = [*zip(chain(*_HIDDEN), chain(*passkeys(key[0])), strict=True)]
    whole, found = tuple(given), list[Probe]()
    for i, cut in enumerate(sorted(cuts)):
        found.append(Probe(text, "continuation", whole, cut, whole[cut : cut + n_continued]))
        begin = cut // (2 if i % 2 else 4)
        for each in hidden:
            if begin < each.stop and each.start < begin + n_copied and each.stop + n_copied <= cut:
                begin = each.stop
        copied = whole[begin : begin + n_copied]
        if len(copied) > 2 * N_CUE and begin + n_copied <= cut:
            found.append(Probe(text, "copying", whole, cut, copied, N_CUE))
    for name, word in questions:
        question, stated = (tokens_of(tokenizer, f"\n\n{name} is{rest}") for rest in ("", f" {word}"))
        n_same = next((i for i, (a, b) in enumerate(zip(question, stated, strict=False)) if a != b), len(question))
        found.append(Probe(text, "retrieval", whole, longest, tuple(stated), n_same))
    return found


def _with_lines(tokens: list[int], lines: Sequence[tuple[int, list[int]]]) -> tuple[list[int], list[range]]:
    """Insert each line before the token of its number. Return all tokens, and where the lines are among them."""
    found, ranges, begin = list[int](), list[range](), 0
    for at, line in sorted(lines):
        found += tokens[begin:at]
        ranges.append(range(len(found), len(found) + len(line)))
        found += line
        begin = at
    return found + tokens[begin:], ranges
