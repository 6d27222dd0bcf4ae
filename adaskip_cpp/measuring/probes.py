"""Makes probes, prompts with answers of known tokens, for ``judge.py``: they continue, copy, or give a hidden pass key.

Start at :func:`probes_of`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from ..engine.llama import AdaSkipLlama
from ..errors import DataError
from .corpus import tokens_of

ProbeKind: TypeAlias = Literal["continuation", "copying", "retrieval"]
KINDS: tuple[ProbeKind, ...] = get_args(ProbeKind)

N_CONTINUED, N_COPIED, N_CUE = 48, 72, 8  # tokens of continuing and copying answers; the cue of a copy is not judged

_SHIPS = "Ophelia", "Endeavour", "Kestrel", "Aurora", "Nautilus", "Meridian", "Calypso", "Halcyon", "Sirius", "Tempest"
_HIDDEN = "The pass key", "The name of the ship"
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


def passkeys(i: int) -> tuple[str, str]:
    """Return what the prompt of the i-th text hides: a number and the name of a ship; those of -1 - i are others."""
    return str(10007 + 7919 * i % 89989), _SHIPS[i % len(_SHIPS)]


def passkey_lines(tokenizer: AdaSkipLlama, i: int) -> list[int]:
    """Return the tokens that hide the pass keys of the i-th text in a prompt."""
    pairs = zip(_HIDDEN, passkeys(i), strict=True)
    lines = [f"{name} is {word}. Remember it. {word} is {name.lower()}.\n\n" for name, word in pairs]
    return tokens_of(tokenizer, "\n\n" + "".join(lines))


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

    A copy repeats the prompt from a quarter of its length on. If pass keys stand there, it begins after them, where the
    prompt is long enough: models copy these more easily than text. ``key`` hides the pass keys of that number at a
    depth, 0 to 1, of the longest prompt, and asks for them after that prompt. Half-way between, a line speaks of the
    ship without its name. Raises DataError if the text is too short: it must have ``n_continued`` tokens after the last
    cut.
    """
    if not cuts or len(tokens) < max(cuts) + n_continued:
        raise DataError(f"text {text!r} has {len(tokens)} tokens, prompts up to {max(cuts, default=0)} need "
                        f"{max(cuts, default=0) + n_continued}; give a longer text")  # fmt: skip
    given, hidden = list(tokens), range(0)
    if key is not None:
        at = max(round(key[1] * max(cuts)), 1)
        later = (at + max(cuts)) // 2
        given[later:later] = tokens_of(tokenizer, _LATER)
        lines = passkey_lines(tokenizer, key[0])
        given[at:at] = lines
        hidden = range(at, at + len(lines))
    whole, found = tuple(given), list[Probe]()
    for cut in sorted(cuts):
        found.append(Probe(text, "continuation", whole, cut, whole[cut : cut + n_continued]))
        begin = cut // 4
        if begin < hidden.stop and hidden.start < begin + n_copied and hidden.stop + n_copied <= cut:
            begin = hidden.stop
        copied = whole[begin : begin + n_copied]
        if len(copied) > 2 * N_CUE and begin + n_copied <= cut:
            found.append(Probe(text, "copying", whole, cut, copied, N_CUE))
    for name, word in () if key is None else zip(_HIDDEN, passkeys(key[0]), strict=True):
        question, stated = (tokens_of(tokenizer, f"\n\n{name} is{rest}") for rest in ("", f" {word}"))
        n_same = next((i for i, (a, b) in enumerate(zip(question, stated, strict=False)) if a != b), len(question))
        found.append(Probe(text, "retrieval", whole, max(cuts), tuple(stated), n_same))
    return found
