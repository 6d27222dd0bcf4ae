"""Provides text that every installation has to calibrate on, and cuts text into requests. Start at :func:`requests`."""

import ast
import contextlib
import sysconfig
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import numpy as np
from llama_cpp import Llama

from ..errors import DataError, RequestError
from ..files import read_text

PAGES = "pages of pydoc_data.topics (Python's language reference)"
DESCRIPTION = (
    f"{PAGES}, sources and docstrings of its standard library, docstrings and C headers of numpy, "
    "descriptions of packages"
)
"""The text of :func:`requests`. Maps that were fitted on Python's manual and library alone lose a seventh more on other
kinds of text, such as stories: docs/dev/method.md."""

SOURCES = (
    "_pydecimal argparse configparser difflib doctest fractions imaplib ipaddress mailbox optparse pickle random "
    "shutil smtplib statistics subprocess tarfile tempfile textwrap threading"
)
"""Modules of the standard library that calibration leaves out, to judge on. They are single files of 4,000 to 60,000
tokens that every supported Python has."""

_PACKAGES = "asyncio collections concurrent email html http importlib json logging multiprocessing unittest urllib xml"
"""Packages of the standard library: their docstrings, but not their code, are text to calibrate on."""

_NUMPY = "fft lib linalg ma polynomial"  # likewise of numpy
_DESCRIBED = "rich", "diskcache", "markdown-it-py", "gguf", "msgspec"  # installed with this package; long descriptions

_LONGEST = 60_000  # most characters of one source, so that no module dominates the text
_LEAST = 200  # fewest characters of a docstring

_HELD_OUT = "comparisons customization debugger formatstrings function import objects string-methods typesmapping"
HELD_OUT = frozenset(_HELD_OUT.split())
"""Pages that calibration leaves out by default, to judge on: a third of the text."""

N_REQUESTS, N_TOKENS = 80, 512
"""The default cut. The authors' 20 requests are enough for statistics, but not for linear maps. With 80, SmolLM2 loses
8% less at 6 of 60 sublayers, 13% at 12 and 16% at 15, on text of another kind."""

SEPARATOR = "\n\n\n"  # between two pages of a text

MOST_PER_TOKEN = 64
"""Characters of a long text that are tokenized for each token wanted. For all, llama.cpp may take minutes. Measured
with Gemma 3's tokenizer: 154 s for 2.1 million characters, and 8 s for a quarter of them."""


def pages() -> dict[str, str]:
    """Return the pages of ``pydoc_data.topics`` by name, in alphabetical order.

    A quarter of the module is pages that contain other pages. So every paragraph is kept once, in its shortest page: a
    page that calibration leaves out is unseen text.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise RequestError("this Python lacks pydoc_data.topics; pass your own requests (--data FILE)") from error
    seen: set[str] = set()
    kept = {}
    for name in sorted(topics, key=lambda name: (len(topics[name]), name)):
        paragraphs = [each for each in dict.fromkeys(topics[name].split("\n\n")) if each.strip() and each not in seen]
        seen.update(paragraphs)
        if paragraphs:
            kept[name] = "\n\n".join(paragraphs)
    return dict(sorted(kept.items()))


def held_out() -> dict[str, str]:
    """Return the pages of :data:`HELD_OUT` that this Python has, by name."""
    return {name: page for name, page in pages().items() if name in HELD_OUT}


def text(exclude: Collection[str] = HELD_OUT) -> str:
    return SEPARATOR.join(page for name, page in pages().items() if name not in exclude)


def descriptions(packages: Iterable[str]) -> dict[str, str]:
    """Return the descriptions of those packages that are installed, by name: prose with lists and examples."""
    found = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            if text := str(metadata.metadata(name).json.get("description", "")).strip():
                found[name] = text
    return found


def _sources(paths: Iterable[Path]) -> str:
    """Return files of text, without :data:`SOURCES`."""
    held_out, found = {f"{name}.py" for name in SOURCES.split()}, []
    for path in sorted(paths):
        with contextlib.suppress(DataError):
            if path.name not in held_out and len(source := read_text(path)) <= _LONGEST:
                found.append(source)
    return SEPARATOR.join(found)


@cache
def _docstrings(folder: Path, packages: str) -> str:
    """Return the docstrings in packages of a folder, cached because finding them takes a second."""
    return SEPARATOR.join(
        text
        for package in packages.split()
        for path in sorted((folder / package).rglob("*.py"))
        if not {"test", "tests"} & {*path.relative_to(folder).parts}
        for text in _docstrings_of(path)
    )


def _docstrings_of(path: Path) -> Iterator[str]:
    """Yield the docstrings of a module, its classes and functions, in order, without those inside functions."""
    with contextlib.suppress(DataError, SyntaxError, ValueError):
        nodes: list[ast.AST] = [ast.parse(read_text(path))]
        while nodes:
            node = nodes.pop()
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                if len(found := ast.get_docstring(node) or "") >= _LEAST:
                    yield found
                if isinstance(node, ast.Module | ast.ClassDef):
                    nodes.extend(reversed(node.body))


def requests(tokenizer: Llama, n_requests: int, n_tokens: int) -> list[list[int]]:
    """Cut requests from each kind of text in :data:`DESCRIPTION` in turn; RequestError if this Python lacks all."""
    library, numpy = Path(sysconfig.get_path("stdlib")), Path(np.__file__).parent
    kinds = []
    with contextlib.suppress(RequestError):
        kinds.append(text())
    kinds += [
        _sources(library.glob("*.py")),
        _docstrings(library, _PACKAGES),
        _docstrings(numpy, _NUMPY),
        _sources(Path(np.get_include(), "numpy").glob("[a-z]*.h")),  # others are generated
        SEPARATOR.join(descriptions(_DESCRIBED).values()),
    ]
    kinds = [kind for kind in kinds if kind.strip()]
    if not kinds:
        raise RequestError("this Python has no text to calibrate on; pass your own requests (--data FILE)")
    n_each = [len(range(i, n_requests, len(kinds))) for i in range(len(kinds))]
    dealt = [cut(tokenizer, kind, n, n_tokens) for kind, n in zip(kinds, n_each, strict=True) if n or n_requests < 1]
    return [each[turn] for turn in range(max(map(len, dealt))) for each in dealt if turn < len(each)]


def tokens_of(tokenizer: Llama, text: str, *, bos: bool = False) -> list[int]:
    """Return the token ids of a text, without special tokens in it, and with BOS before them if ``bos``."""
    return tokenizer.tokenize(text.encode("utf-8", "replace"), add_bos=bos, special=False)


def cut(tokenizer: Llama, text: str, n_requests: int, n_tokens: int) -> list[list[int]]:
    """Cut a text into requests of ``n_tokens``, BOS included, spread evenly over it, without overlap.

    A text that is too short gives fewer requests, at least one, which may be shorter.
    """
    if n_requests < 1 or n_tokens < 2:
        raise RequestError(f"cannot cut {n_requests} requests of {n_tokens} tokens; use at least 1 request of 2 tokens")
    bos = tokens_of(tokenizer, "", bos=True)[:1]
    length, part, enough = n_tokens - len(bos), len(text) // n_requests, MOST_PER_TOKEN * n_tokens
    if part > enough:
        found = [tokens_of(tokenizer, text[i * part : i * part + enough])[:length] for i in range(n_requests)]
        if all(len(each) == length for each in found):
            return [bos + each for each in found]
    tokens = tokens_of(tokenizer, text)
    if not tokens:
        raise RequestError("the calibration text is empty; give a text of at least a few hundred words")
    n_fit = max(len(tokens) // length, 1)
    n_cut = min(n_requests, n_fit)
    starts = [(i * n_fit // n_cut) * length for i in range(n_cut)]
    return [bos + tokens[start : start + length] for start in starts]
