"""Refuses JSON schemas that are too large or cannot become a grammar: llama-cpp-python would then allow any JSON."""

import re
from collections.abc import Iterator
from typing import Any

import msgspec
from llama_cpp.llama_grammar import SchemaConverter

from ..errors import RequestError

MOST_REPEATED = 900  # repetitions; each optional one nests parentheses in the grammar, and libllama reads 1,000 levels
MOST_DEPTH = 64  # levels of nested values: Python's JSON and the converter recurse once for each
MOST_BYTES = 1 << 16  # of a schema as JSON; this also bounds the longest name of a rule
_MOST_WORK = 16_000_000  # characters that the converter may read and write, 0.3 s; 500 optional properties need as many

_REPEATS = ("minLength", "maxLength", "minItems", "maxItems")


class _Converter(SchemaConverter):
    """The converter, with a limit of work: it visits a reference again for each use, which may take for ever."""

    def __init__(self) -> None:
        super().__init__(prop_order={}, allow_fetch=False, dotall=False, raw_pattern=False)  # type: ignore[no-untyped-call]
        self._room = _MOST_WORK

    def visit(self, schema: Any, name: str) -> Any:
        self._spend(len(name) + len(msgspec.json.encode(schema)))
        return super().visit(schema, name)  # type: ignore[no-untyped-call]

    def _add_rule(self, name: str, rule: str) -> Any:
        self._spend(len(name) + len(rule))
        return super()._add_rule(name, rule)  # type: ignore[no-untyped-call]

    def _spend(self, n: int) -> None:
        self._room -= n
        if self._room < 0:
            raise RequestError("it is too large")


def check_schema(where: str, schema: Any) -> None:
    """Raise RequestError if a schema cannot become a grammar in time; ``where`` names its owner in the message."""
    check_depth(where, schema)
    try:
        content = msgspec.json.encode(schema)
        if len(content) > MOST_BYTES:
            raise RequestError(f"it has more than {MOST_BYTES:,} bytes")
        _check_values(schema)
        converter = _Converter()
        converter.visit(converter.resolve_refs(msgspec.json.decode(content), "stdin"), "")
    except Exception as error:  # the converter checks nothing, so a wrong schema may raise any exception
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise RequestError(f"the schema of {where} cannot become a grammar ({reason}); use a simpler one") from error


def check_depth(where: str, value: Any) -> None:
    """Raise RequestError if values are nested too deeply."""
    if any(depth > MOST_DEPTH for depth, _ in _nested(value)):
        raise RequestError(f"{where} has more than {MOST_DEPTH} levels of nested values; use fewer")


def _nested(value: Any) -> Iterator[tuple[int, Any]]:
    """Yield a value of JSON and all values inside it, each with its depth."""
    waiting = [(0, value)]
    while waiting:
        depth, each = waiting.pop()
        yield depth, each
        inner = each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
        waiting += [(depth + 1, value) for value in inner]


def _check_values(schema: Any) -> None:
    """Refuse too many repetitions, and patterns on which the converter never ends."""
    for _, each in _nested(schema):
        for key, value in each.items() if isinstance(each, dict) else ():
            if key in _REPEATS and isinstance(value, int | float) and not 0 <= value <= MOST_REPEATED:
                raise RequestError(f"{key} is {value!r}, not a number from 0 to {MOST_REPEATED}")
            if key != "pattern" or not isinstance(value, str):
                continue
            times = re.findall(r"\d{1,18}", " ".join(re.findall(r"\{[\d, ]*", value)))
            if max(map(int, times), default=0) > MOST_REPEATED:
                raise RequestError(f"a pattern repeats more than {MOST_REPEATED} times")
            if re.search(r"[]}]", re.sub(r"\\.|\[(?:\\.|[^]\\])*\]?|\{[^}]*\}?", "", value, flags=re.DOTALL)):
                raise RequestError(r"a pattern has ] or } that nothing opened; write \] or \}")
