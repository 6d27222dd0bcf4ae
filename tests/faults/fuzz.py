"""Fuzzing: ``PYTHONPATH=tests python tests/faults/fuzz.py TARGET [libFuzzer's options and files]``.

Coverage of the package steers atheris, which is libFuzzer for Python. Inputs are lines of JSON: most often values of
one are changed, else bytes.
"""

import gc
import importlib
import json
import os
import random
import sys
import types
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

_STEERING = ("adaskip_cpp", "faults.abi_calls", "faults.fuzz_targets", "oracles.gguf_files")
"""Modules whose coverage steers; native code's is not seen, so what an input asks of it stands for it."""

_RAW = [
    *("null", "true", "false", "0", "1", "-1", "2", "3", "4", "63", "64", "65", "255", "256", "0.5", "-0.0", "1e-320"),
    *("1e308", "1e999", "-1e999", "2147483647", "2147483648", "-2147483648", "4294967296", "9223372036854775808"),
    *("18446744073709551616", "1" + "0" * 400, "1" + "0" * 5000, "1.5e-5", '""', '"a"', '"\\u0000"', '"\\ud800"'),
    *('"\\u2028"', '"é"', '"{context}"', '"{"', '"%s"', '"../x"', "[]", "{}", "[[]]", "[null]", '{"a": null}'),
    *(f'"{"the " * 600}"', "[" * 300 + "]" * 300, "[" * 5000 + "]" * 5000, '{"a":' * 400 + "1" + "}" * 400),
]
"""What may stand in the place of any value: edges of C's and NumPy's numbers, texts that mean something, depth."""


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container of a JSON value with each of its keys."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def changed(value: Any, rng: random.Random) -> bytes:
    """Return JSON with one to three things changed: another value, one of its own elsewhere, one more, one less."""
    whole, raw = [value], {}
    for _ in range(rng.choice((1, 1, 2, 3))):
        every, what = list(places(whole)), rng.randrange(6)
        (container, key), (other, at) = rng.choice(every), rng.choice(every)
        copy = json.loads(json.dumps(other[at]))
        if what <= 1:
            name = f"@{len(raw)}@"
            raw[json.dumps(name)] = rng.choice(_RAW)
            container[key] = name
        elif what == 2:
            container[key] = copy
        elif what == 3 and container is not whole:
            del container[key]
        elif what == 4 and isinstance(container, list) and container is not whole:
            container[key:key] = [copy] * rng.choice((1, 1, 2, 40))
        elif isinstance(container[key], int | float):
            container[key] = type(container[key])(container[key] + rng.choice((-1, 1, 2, 100)))
        elif isinstance(container, dict):
            container[at if isinstance(at, str) else rng.choice(list(container))] = copy
    text = json.dumps(whole[0])
    for name, put in raw.items():
        text = text.replace(name, put)
    return text.encode()


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """Change one of the lines of an input that are JSON; what stands after a zero byte is libFuzzer's."""
    import atheris

    rng = random.Random(seed)
    text, zero, rest = data.partition(b"\0")
    lines = text.split(b"\n")
    at = rng.randrange(len(lines))
    if rng.random() < 0.7:
        with suppress(ValueError, OverflowError, RecursionError):
            lines[at] = changed(json.loads(lines[at]), rng)
            result = b"\n".join(lines) + zero + rest
            if len(result) <= most:
                return result
    return bytes(atheris.Mutate(data, most))


def fuzz(name: str, options: list[str]) -> None:
    import atheris

    targets = importlib.import_module("faults.fuzz_targets").TARGETS
    for each in gc.get_objects():  # as what atheris does to imports does not reach an editable installation
        if isinstance(each, types.FunctionType) and str(each.__module__).startswith(_STEERING):
            atheris.instrument_func(each)
    atheris.Setup([sys.argv[0], *options], targets[name], custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    os.environ["GGML_NO_BACKTRACE"] = "1"
    sys.dont_write_bytecode = True
    fuzz(sys.argv[1], sys.argv[2:])
