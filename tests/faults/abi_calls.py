"""Calls of adaskip.h as JSON lists them, with any values, for fuzzing: each checks what every call promises."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from adaskip_cpp.engine.binding import ffi, lib
from adaskip_cpp.engine.native import elide_kv

__all__ = ["Calls", "fresh_logits"]

OK, INTERNAL = 0, -4
_MOST_NUMBERS = 1 << 16


@ffi.callback("adaskip_statistics_callback")  # type: ignore[untyped-decorator]
def _ignore(statistics: Any, user_data: Any) -> None:
    pass


def _int(value: Any, bits: int = 32) -> int:
    """Any value as a C integer."""
    number = int(value) if isinstance(value, int) else 0
    return (number + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)


def _float(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return float("nan")


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


class Arguments:
    """Makes C values of JSON: numbers of any size, and pointers that are null or as long as the contract wants."""

    def __init__(self, n_layer: int, n_embd: int) -> None:
        self._n_layer, self._n_embd = n_layer, n_embd
        self._owners: list[Any] = []

    def array(self, values: Any, dtype: Any, c_type: str, n: int) -> Any:
        if values is None:
            return ffi.NULL
        listed = [_float(each) for each in values] if isinstance(values, list) else []
        with np.errstate(all="ignore"):
            array = np.resize(np.nan_to_num(listed or [0.0]) if dtype == np.uint8 else listed or [0.0], n).astype(dtype)
        self._owners.append(array)
        return ffi.from_buffer(f"{c_type}[]", array)

    def fill(self, target: Any, value: dict[str, Any]) -> None:
        """A set: of another number of layers than the model's no array is read, nor of another length of vectors."""
        target.n_layer, target.n_embd, target.n_rank = (
            _int(value.get(name, default))
            for name, default in (("n_layer", self._n_layer), ("n_embd", self._n_embd), ("n_rank", 0))
        )
        n, rank = 2 * self._n_layer, min(max(target.n_rank, 1), _MOST_NUMBERS // self._n_embd)
        if value.get("down") is not None or value.get("up") is not None:
            target.n_rank = min(target.n_rank, rank)
        sizes = {"bias": n * self._n_embd, "down": n * self._n_embd * rank, "up": n * self._n_embd * rank}
        target.skip = self.array(value.get("skip"), np.uint8, "uint8_t", n)
        target.scale = self.array(value.get("scale", [1]), np.float32, "float", n)
        for name, size in sizes.items():
            setattr(target, name, self.array(value.get(name), np.float32, "float", size))

    def set(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return ffi.NULL
        result = ffi.new("struct adaskip_set *")
        self._owners.append(result)
        self.fill(result, value)
        return result

    def plan(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return ffi.NULL
        result = ffi.new("struct adaskip_plan *")
        result.tag = _int(value.get("tag"), 64) % (1 << 64)
        result.bulk, result.prefill = self.set(value.get("bulk")), self.set(value.get("prefill"))
        result.windowed = self.array(value.get("windowed"), np.uint8, "uint8_t", self._n_layer)
        result.window, result.n_sinks = _int(value.get("window")), _int(value.get("n_sinks"))
        steps = value.get("decode")
        result.n_decode = _int(value.get("n_decode", 0))
        if isinstance(steps, list) and steps:
            array = ffi.new("struct adaskip_step[]", len(steps))
            self._owners.append(array)
            for target, step in zip(array, steps, strict=True):
                target.start = _int(_dict(step).get("start"))
                self.fill(target.set, _dict(_dict(step).get("set")))
            result.decode, result.n_decode = array, min(_int(value.get("n_decode", len(steps))), len(steps))
        if isinstance(ids := value.get("readable"), list):
            result.readable = array = ffi.new("uint64_t[]", [_int(each, 64) % (1 << 64) for each in ids])
            self._owners.append(array)
            result.n_readable = min(_int(value.get("n_readable", len(ids))), len(ids))
        else:
            result.n_readable = _int(value.get("n_readable"))
        if isinstance(online := value.get("online"), dict):
            result.online = params = ffi.new("struct adaskip_online_params *")
            self._owners.append(params)
            params.window, params.scale = _int(online.get("window", 4)), _int(online.get("scale"))
            params.threshold = _float(online.get("threshold", 0.5))
        return result

    def state(self, names: Any) -> Any:
        result = ffi.new("struct adaskip_online_state *")
        for name in names if isinstance(names, list) else ():
            if name in ("similarity", "norm_ratio", "scale"):
                setattr(result, name, self.array([], np.float64, "double", self._n_layer))
            elif name == "added":
                result.added = self.array([], np.uint8, "uint8_t", self._n_layer)
        return result


class Calls:
    """The calls of an input, one after another, on one context. Each checks what every call promises."""

    def __init__(self, llm: Any, open_another: Callable[[], Any]) -> None:
        self._use(llm)
        self._open_another = open_another
        self._opened: list[Any] = []

    def _use(self, llm: Any) -> None:
        self._llm, self._n = llm, 0
        self._ctx = ffi.cast("struct llama_context *", llm.ctx)

    def close(self) -> None:
        for llm in self._opened:
            llm.close()

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

    def do_bulk_set_id(self, make: Arguments, plan: Any, has_room: Any, *_: Any) -> None:
        before, room = self._tag(), ffi.new("uint64_t *") if has_room else ffi.NULL
        self.check(lib.adaskip_bulk_set_id(self._ctx, make.plan(plan), room))
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
        if len(self._opened) < 4:
            listed = [bool(each) for each in mask] if isinstance(mask, list) else None
            with elide_kv(None if not listed else np.array(listed)):
                self._opened.append(self._open_another())
            self._use(self._opened[-1])

    def do_elide(self, make: Arguments, mask: Any, n_layer: Any, *_: Any) -> None:
        n = min(_int(n_layer), 1 << 10)
        self.check(lib.adaskip_elide_kv(make.array(mask, np.uint8, "uint8_t", max(n, 1)), n))
        assert lib.adaskip_elide_kv(ffi.NULL, 0) == OK

    def do_set_statistics(self, make: Arguments, flags: Any, has_callback: Any, *_: Any) -> None:
        callback = _ignore if has_callback else ffi.NULL
        self.check(lib.adaskip_set_statistics(self._ctx, _int(flags), callback, ffi.NULL))

    def do_sublayers(self, make: Arguments, n: Any, has_room: Any, *_: Any) -> None:
        room = ffi.new("struct adaskip_sublayer[]", 2 * self._llm.n_layer) if has_room else ffi.NULL
        self.check(lib.adaskip_sublayers(self._ctx, room, _int(n)))

    def do_elided(self, make: Arguments, n: Any, has_room: Any, *_: Any) -> None:
        room = ffi.new("uint8_t[]", self._llm.n_layer) if has_room else ffi.NULL
        self.check(lib.adaskip_get_elided_kv(self._ctx, room, _int(n)))

    def do_stale(self, make: Arguments, seq_id: Any, phase: Any, has_room: Any) -> None:
        room = ffi.new("int32_t *") if has_room else ffi.NULL
        self.check(lib.adaskip_kv_first_stale(self._ctx, _int(seq_id), _int(phase), room))


_PLAIN: dict[str, Callable[..., Any]] = {
    "begin_request": lambda ctx, *_: lib.adaskip_begin_request(ctx),
    "set_phase": lambda ctx, make, phase, *_: lib.adaskip_set_phase(ctx, _int(phase)),
    "online": lambda ctx, make, names, *_: lib.adaskip_get_online(ctx, make.state(names)),
    "counters": lambda ctx, make, has_room, *_: lib.adaskip_get_counters(
        ctx, ffi.new("struct adaskip_counters *") if has_room else ffi.NULL
    ),
    "take_failure": lambda ctx, *_: lib.adaskip_take_failure(ctx),
}
"""Calls that return a code and promise no more."""


def fresh_logits(llm: Any) -> bytes:
    """The logits after a short prompt, of a context that was set back to how it was made."""
    ctx = ffi.cast("struct llama_context *", llm.ctx)
    lib.adaskip_take_failure(ctx)
    for code in (
        lib.adaskip_set_statistics(ctx, 0, ffi.NULL, ffi.NULL),
        lib.adaskip_set_plan(ctx, ffi.NULL),
        lib.adaskip_set_phase(ctx, 1),
    ):
        assert code == OK
    llm._ctx.kv_cache_clear()
    llm._batch.set_batch(batch=[1, 5, 6, 7], n_past=0, logits_all=False)
    llm._ctx.decode(llm._batch)
    logits = ctypes.string_at(llm._ctx.get_logits(), 4 * llm.n_vocab())
    llm._ctx.kv_cache_clear()
    return bytes(logits)
