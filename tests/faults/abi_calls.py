"""Calls of adaskip.h as JSON lists them, with any values, for fuzzing: each checks what every call promises."""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from adaskip_cpp.engine.binding import ffi, lib
from adaskip_cpp.engine.native import elide_kv

OK, INTERNAL = 0, -4
_MOST_NUMBERS = 1 << 16


@ffi.callback("adaskip_statistics_callback")  # type: ignore[untyped-decorator]
def _ignore(statistics: Any, user_data: Any) -> None:
    pass


def _int(value: Any, bits: int = 32) -> int:
    number = int(value) if isinstance(value, int) else 0
    return (number + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)


def _float(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return float("nan")


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _room(c_type: str, has_room: Any, *size: int) -> Any:
    return ffi.new(c_type, *size) if has_room else ffi.NULL


class Arguments:
    """Makes C values of JSON: numbers of any size, and pointers that are null or as long as the contract wants."""

    def __init__(self, n_layer: int, n_embd: int) -> None:
        self.n_layer, self.n_embd = n_layer, n_embd
        self._owners: list[Any] = []

    def new(self, c_type: str, init: Any = None) -> Any:
        self._owners.append(ffi.new(c_type, init))
        return self._owners[-1]

    def array(self, values: Any, c_type: str, n: int) -> Any:
        if values is None:
            return ffi.NULL
        dtype = {"uint8_t": np.uint8, "float": np.float32, "double": np.float64}[c_type]
        numbers = np.array([_float(each) for each in values] if isinstance(values, list) and values else [0.0])
        with np.errstate(all="ignore"):
            array = np.resize(np.nan_to_num(numbers) if dtype is np.uint8 else numbers, n).astype(dtype)
        self._owners.append(array)
        return ffi.from_buffer(f"{c_type}[]", array)

    def fill(self, target: Any, value: dict[str, Any]) -> None:
        """A set: of another number of layers than the model's no array is read, nor of another length of vectors."""
        for name, default in (("n_layer", self.n_layer), ("n_embd", self.n_embd), ("n_rank", 0)):
            setattr(target, name, _int(value.get(name, default)))
        n, rank = 2 * self.n_layer, min(max(target.n_rank, 1), _MOST_NUMBERS // self.n_embd)
        if value.get("down") is not None or value.get("up") is not None:
            target.n_rank = min(target.n_rank, rank)
        target.skip = self.array(value.get("skip"), "uint8_t", n)
        target.scale = self.array(value.get("scale", [1]), "float", n)
        for name, size in (("bias", self.n_embd), ("down", self.n_embd * rank), ("up", self.n_embd * rank)):
            setattr(target, name, self.array(value.get(name), "float", n * size))

    def set(self, value: Any) -> Any:
        result = self.new("struct adaskip_set *")
        self.fill(result, _dict(value))
        return result if isinstance(value, dict) else ffi.NULL

    def plan(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return ffi.NULL
        result = self.new("struct adaskip_plan *")
        result.tag = _int(value.get("tag"), 64) % (1 << 64)
        result.bulk, result.prefill = self.set(value.get("bulk")), self.set(value.get("prefill"))
        result.windowed = self.array(value.get("windowed"), "uint8_t", self.n_layer)
        for name in ("window", "n_sinks", "refits", "n_decode", "n_readable"):
            setattr(result, name, _int(value.get(name)))
        if isinstance(steps := value.get("decode"), list) and steps:
            result.decode = self.new("struct adaskip_step[]", len(steps))
            result.n_decode = min(_int(value.get("n_decode", len(steps))), len(steps))
            for i, step in enumerate(map(_dict, steps)):
                result.decode[i].start = _int(step.get("start"))
                self.fill(result.decode[i].set, _dict(step.get("set")))
        if isinstance(ids := value.get("readable"), list):
            result.readable = self.new("uint64_t[]", [_int(each, 64) % (1 << 64) for each in ids])
            result.n_readable = min(_int(value.get("n_readable", len(ids))), len(ids))
        if isinstance(online := value.get("online"), dict):
            result.online = self.new("struct adaskip_online_params *")
            result.online.window, result.online.scale = _int(online.get("window", 4)), _int(online.get("scale"))
            result.online.threshold = _float(online.get("threshold", 0.5))
        return result

    def state(self, names: Any) -> Any:
        result = self.new("struct adaskip_online_state *")
        for name in names if isinstance(names, list) else ():
            if name in ("similarity", "norm_ratio", "scale", "added"):
                setattr(result, name, self.array([], "uint8_t" if name == "added" else "double", self.n_layer))
        return result


class Calls:
    """The calls of an input, one after another, on one context. Each checks what every call promises."""

    def __init__(self, llm: Any, open_another: Callable[[], Any]) -> None:
        self._use(llm)
        self._open_another, self._n_opened = open_another, 0

    def _use(self, llm: Any) -> None:
        self._llm, self._n = llm, 0
        self._ctx = ffi.cast("struct llama_context *", llm.ctx)

    def run(self, name: Any, values: list[Any]) -> None:
        make, given = Arguments(self._llm.n_layer, self._llm.n_embd()), [*values, *[None] * 3][:3]
        if isinstance(name, str) and name in _PLAIN:
            self.check(_PLAIN[name](self._ctx, make, *given))
        elif isinstance(name, str) and (call := getattr(self, f"do_{name}", None)):
            call(make, *given)

    def check(self, code: int, may_fail_inside: bool = False) -> int:
        assert code >= 0 or (code >= -8 and ffi.string(lib.adaskip_last_error())), code
        assert code != INTERNAL or may_fail_inside, ffi.string(lib.adaskip_last_error())
        return code

    def _tag(self) -> int:
        tag = ffi.new("uint64_t *")
        assert lib.adaskip_get_plan_tag(self._ctx, tag) == OK
        return int(tag[0])

    def do_set_plan(self, make: Arguments, plan: Any, *_: Any) -> None:
        before = self._tag()
        pointer = make.plan(plan)
        code = self.check(lib.adaskip_set_plan(self._ctx, pointer))
        assert self._tag() == (before if code else pointer.tag if pointer else 0), "a failed call changes nothing"

    def do_bulk_set_ids(self, make: Arguments, plan: Any, has_room: Any, n: Any, *_: Any) -> None:
        before = self._tag()
        self.check(lib.adaskip_bulk_set_ids(self._ctx, make.plan(plan), _room("uint64_t *", has_room), min(_int(n), 1)))
        assert self._tag() == before

    def do_decode(self, make: Arguments, n: Any, *_: Any) -> None:
        """Evaluate some tokens after those that are cached."""
        n = min(max(_int(n), 1), 64, self._llm.context_size - self._n)
        if n < 1:
            return
        self._llm._batch.set_batch(batch=[3 + i % 200 for i in range(n)], n_past=self._n, logits_all=False)
        try:
            self._llm._ctx.decode(self._llm._batch)
            self._n += n
        except RuntimeError:
            assert self.check(lib.adaskip_take_failure(self._ctx), may_fail_inside=True) < 0

    def do_clear(self, make: Arguments, *_: Any) -> None:
        self._llm._ctx.kv_cache_clear()
        self._n = 0

    def do_open(self, make: Arguments, mask: Any, n_layer: Any, *_: Any) -> None:
        """Go on with a new context, which has no KV for the attentions of a mask of any length."""
        if self._n_opened < 4:
            self._n_opened += 1
            listed = [bool(each) for each in mask] if isinstance(mask, list) else None
            with elide_kv(None if not listed else np.array(listed)):
                self._use(self._open_another())

    def do_elide(self, make: Arguments, mask: Any, n_layer: Any, *_: Any) -> None:
        n = min(_int(n_layer), 1 << 10)
        self.check(lib.adaskip_elide_kv(make.array(mask, "uint8_t", max(n, 1)), n))
        assert lib.adaskip_elide_kv(ffi.NULL, 0) == OK


_PLAIN: dict[str, Callable[..., Any]] = {
    "begin_request": lambda ctx, *_: lib.adaskip_begin_request(ctx),
    "set_phase": lambda ctx, make, phase, *_: lib.adaskip_set_phase(ctx, _int(phase)),
    "refit": lambda ctx, make, layer, kind, rank: lib.adaskip_refit(
        ctx, _int(layer), _int(kind), make.array([0.5], "float", _MOST_NUMBERS), _int(_int(rank) * make.n_embd)
    ),
    "online": lambda ctx, make, names, *_: lib.adaskip_get_online(ctx, make.state(names)),
    "counters": lambda ctx, make, has_room, *_: lib.adaskip_get_counters(
        ctx, _room("struct adaskip_counters *", has_room)
    ),
    "take_failure": lambda ctx, *_: lib.adaskip_take_failure(ctx),
    "set_statistics": lambda ctx, make, flags, has_callback, *_: lib.adaskip_set_statistics(
        ctx, _int(flags), _ignore if has_callback else ffi.NULL, ffi.NULL
    ),
    "sublayers": lambda ctx, make, n, has_room, *_: lib.adaskip_sublayers(
        ctx, _room("struct adaskip_sublayer[]", has_room, 2 * make.n_layer), _int(n)
    ),
    "elided": lambda ctx, make, n, has_room, *_: lib.adaskip_get_elided_kv(
        ctx, _room("uint8_t[]", has_room, make.n_layer), _int(n)
    ),
    "stale": lambda ctx, make, seq_id, phase, has_room: lib.adaskip_kv_first_stale(
        ctx, _int(seq_id), _int(phase), _room("int32_t *", has_room)
    ),
}
"""Calls that return a code and promise no more."""


def fresh_logits(llm: Any) -> bytes:
    """The logits after a short prompt, of a context that was set back to how it was made."""
    ctx = ffi.cast("struct llama_context *", llm.ctx)
    lib.adaskip_take_failure(ctx)
    assert lib.adaskip_set_statistics(ctx, 0, ffi.NULL, ffi.NULL) == lib.adaskip_set_plan(ctx, ffi.NULL) == OK
    assert lib.adaskip_set_phase(ctx, 1) == OK
    llm._ctx.kv_cache_clear()
    llm._batch.set_batch(batch=[1, 5, 6, 7], n_past=0, logits_all=False)
    llm._ctx.decode(llm._batch)
    logits = ctypes.string_at(llm._ctx.get_logits(), 4 * llm.n_vocab())
    llm._ctx.kv_cache_clear()
    return bytes(logits)
