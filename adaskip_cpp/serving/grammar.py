"""JSON schemas that answers must follow: what is too large, or cannot become a grammar, is refused.

llama-cpp-python makes the grammar. Where it cannot, it takes any JSON instead, and does not say so.
"""

import re
from typing import Any

import msgspec
from llama_cpp.llama_grammar import SchemaConverter

from ..errors import RequestError

MOST_REPEATED = 900
"""Of one item, character or part of a pattern: each that may be left out is one more pair of parentheses, of which
libllama reads 1,000 in one another."""
MOST_DEPTH = 64  # of values in one another: Python's JSON and the converter call themselves for each
MOST_BYTES = 1 << 16  # of a schema as JSON, and so of the name that its innermost rule has
_MOST_WORK = 16_000_000
"""Characters that the converter reads and writes, 0.3 s. A rule goes on with each property that need not be there, so
500 of them take as much."""

_REPEATS = ("minLength", "maxLength", "minItems", "maxItems")


class _Converter(SchemaConverter):
    """The converter, which ends where it would take for ever: it visits a reference as often as somebody has it."""

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
    """Refuse, by a RequestError, a schema that cannot become a grammar, or takes for ever to.

    Args:
        where: what has it, for the message.
    """
    check_depth(where, schema)
    try:
        content = msgspec.json.encode(schema)
        if len(content) > MOST_BYTES:
            raise RequestError(f"it has more than {MOST_BYTES:,} bytes")
        _check_values(schema)
        converter = _Converter()
        copy = converter.resolve_refs(msgspec.json.decode(content), "stdin")
        converter.visit(copy, "")
    except Exception as error:  # the converter checks nothing, so any mistake of a schema raises anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise RequestError(f"the schema of {where} cannot become a grammar ({reason}); use a simpler one") from error


def check_depth(where: str, value: Any) -> None:
    """Refuse, by a RequestError, values too deep in one another."""
    level, depth = [value], 0
    while level := [
        inner
        for each in level
        if isinstance(each, dict | list)
        for inner in (each.values() if isinstance(each, dict) else each)
    ]:
        depth += 1
        if depth > MOST_DEPTH:
            raise RequestError(f"{where} has more than {MOST_DEPTH} values in one another; use fewer")


def _check_values(schema: Any) -> None:
    """Refuse what is repeated too often, and patterns that the converter never ends with."""
    waiting = [schema]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            for key, value in each.items():
                if key in _REPEATS and isinstance(value, int | float) and not 0 <= value <= MOST_REPEATED:
                    raise RequestError(f"{key} is {value!r}, and at most {MOST_REPEATED} can be")
                if key == "pattern" and isinstance(value, str):
                    _check_pattern(value)
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each


def _check_pattern(pattern: str) -> None:
    times = re.findall(r"\d{1,18}", " ".join(re.findall(r"\{[\d, ]*", pattern)))
    if max(map(int, times), default=0) > MOST_REPEATED:
        raise RequestError(f"a pattern repeats more than {MOST_REPEATED} times")
    if re.search(r"[]}]", re.sub(r"\\.|\[(?:\\.|[^]\\])*\]?|\{[^}]*\}?", "", pattern, flags=re.DOTALL)):
        raise RequestError(r"a pattern has ] or } that nothing opened; write \] or \}")
