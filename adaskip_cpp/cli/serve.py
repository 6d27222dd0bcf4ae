"""``adaskip-cpp serve``: answers over HTTP by OpenAI's API. Reads the options; :mod:`..serving` does the work."""

import functools
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import NativeError, PackageMissingError
from ..files import read_text
from ..measuring.running import Running, quietly
from ..model.edits import REUSES, Reuse, ReuseName
from ..model.frontier import DEFAULT_LOSS
from ..model.identity import check_gguf, plan_path
from .planning import PlanSource, find_plan_source, max_loss_option
from .terminal import Real, model_options, option, run_option, tell, users_error, verb

if TYPE_CHECKING:
    from ..serving.llama import ServedLlama

_who = functools.partial(option, group="Who may use it")
_kept = functools.partial(option, group="Models and memory")

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def _size(text: str) -> int:
    """Return the bytes of a size such as 500M (500 * 10^6) or 2G."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)B?", text.upper())
    if not found:
        raise click.BadParameter(f"{text!r} is not a size; use a number of bytes, or for example 500M or 2G")
    return int(float(found[1]) * _UNITS[found[2]])


@verb(
    "Serve models by OpenAI's API.",
    "model.gguf",
    "model.gguf --cache-dir ~/.cache/adaskip-cpp --ctx 16384",
    "small.gguf large.gguf --keep 2",
)
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@option("--plan", "plan_file", metavar="auto|none|PLAN", default="auto", help="auto: plans of `tune` beside MODEL. "
        "none: the whole model. Or a plan file. Requests may choose others.")  # fmt: skip
@max_loss_option
@option("--host", default="127.0.0.1", help="Address to listen on.")
@option("--port", type=click.IntRange(0, 65535), default=8000, help="Port to listen on; 0: any free one.")
@_who("--api-key-file", metavar="FILE", help="File of API keys, one per line; each client must send one.  [default: "
      "the key in ADASKIP_API_KEY, if set]")  # fmt: skip
@_who("--allow-host", "allowed", metavar="NAME", multiple=True, help="Host name to accept without a key; repeatable.")
@_who("--insecure", is_flag=True, help="Let other machines use it without a key.")
@_who("--log-prompts", is_flag=True, help="Print all requests to stderr; else no client's text is printed.")
@_kept("--alias", "aliases", metavar="NAME", multiple=True, help="Clients' name for the first model; repeat it for "
       "the second, and so on.  [default: X for X.gguf]")  # fmt: skip
@_kept("--keep", type=click.IntRange(1), default=1, help="Models kept in memory. The least recently used is unloaded.")
@_kept("--keep-alive", type=Real(0, min_open=True), metavar="MINUTES",
       help="Unload a model after this many minutes without a request.  [default: never]")  # fmt: skip
@_kept("--reuse", type=click.Choice(REUSES), default="auto", help="Tokens of an earlier prompt that are not read "
       "again. prefix: those at its beginning. edits: also equal runs of 96 tokens at other places. auto: edits, if "
       "`tune` measured that they keep the promise. Requests may choose.")  # fmt: skip
@_kept("--cache-dir", metavar="FOLDER", help="Also save read prompts here, for a restart.  [default: only in memory]")
@_kept("--cache-size", metavar="SIZE", type=_size, default="2G",
       help="Most bytes of saved prompts per model: in memory, and as many in the folder.")  # fmt: skip
@run_option("--ctx", type=click.IntRange(256, 2**31 - 1), default=8192, help="Size of the context in tokens.")
@run_option("--stuck-timeout", metavar="SECONDS", type=Real(0, min_open=True), default=60,
            help="Restart a model if one step takes longer: 512 tokens of a prompt, or one of an answer.")  # fmt: skip
@model_options
def serve(
    models: tuple[str, ...], plan_file: str, max_loss: float | None, host: str, port: int, api_key_file: str | None,
    allowed: tuple[str, ...], insecure: bool, log_prompts: bool, aliases: tuple[str, ...], keep: int,
    keep_alive: float | None, reuse: ReuseName, cache_dir: str | None, cache_size: int, ctx: int, stuck_timeout: float,
    running: Running
) -> None:  # fmt: skip
    """Serve each MODEL, a GGUF file, to clients of OpenAI's API, or of Anthropic's Messages API.

    Long prompts are read faster with a plan, and text that was read before is not read again.
    """
    try:
        from ..serving.app import make_app
        from ..serving.middleware import is_loopback
        from ..serving.prefix_cache import usable
        from ..serving.process import Worker
        from ..serving.server import Server, listen
        from ..serving.worker import Opening
        from ..serving.workers import Workers
    except ImportError as error:
        needed = f"the server needs more packages ({error}); run `pip install 'adaskip-cpp[serve]'`"
        raise PackageMissingError(needed) from error
    keys = _keys(api_key_file)
    if not (is_loopback(host) or keys or insecure):
        way_out = "give --api-key-file, or --insecure to let everyone in"
        raise click.UsageError(f"other machines can reach {host}; {way_out}")
    if cache_dir is not None:
        with usable(Path(cache_dir)):  # fails now, not when a process opens its model
            pass
    ctx = -(-ctx // 256) * 256  # llama.cpp rounds up to this, and llama_cpp.Llama would not know
    names, all_ = _names(models, aliases), []
    for name, model in zip(names, models, strict=True):
        check_gguf(model)
        if note := _source(model, plan_file, max_loss).note:
            tell(note)
        open_ = functools.partial(_open, name, model, plan_file, max_loss, ctx, reuse, cache_size, cache_dir, running)
        all_.append(Worker(name, Opening(open_, log_prompts), stuck_timeout=stuck_timeout))
    with listen(host, port) as listener:
        workers = Workers(all_, n_ctx=ctx, keep=keep, keep_alive=60 * (keep_alive or math.inf))
        app, queue = make_app(workers, keys=keys, names=(host, *allowed), log_prompts=log_prompts)
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        ready = f"Serving {', '.join(names)} at {address}/v1. A page to try it: {address}. Ctrl-C ends it."
        Server(app, queue, workers, listener, functools.partial(tell, ready, style="")).run()


def _names(models: tuple[str, ...], aliases: tuple[str, ...]) -> list[str]:
    """Return what clients call the models."""
    names = [*aliases, *(os.path.basename(model).removesuffix(".gguf") for model in models[len(aliases) :])]
    if len(aliases) > len(models):
        raise click.UsageError("--alias is given more often than there are models; give one for each model")
    if twice := [name for name in names if names.count(name) > 1]:
        raise click.UsageError(f"two models have the name {twice[0]!r}; give each its own name with --alias")
    return names


def _open(
    name: str, model: str, plan_file: str, max_loss: float | None, ctx: int, reuse: Reuse, cache_size: int,
    cache_dir: str | None, running: Running
) -> "ServedLlama":  # fmt: skip
    """Open a model; runs in the model's process. A user's error becomes a NativeError, whose text the log shows."""
    from ..serving.llama import ServedLlama
    from ..serving.plans import Plans
    from ..serving.prefix_cache import PrefixCache

    try:
        source = _source(model, plan_file, max_loss)
        plans = Plans(source.plan, source.frontier, DEFAULT_LOSS if max_loss is None else max_loss, ctx)
        cache = PrefixCache(cache_size, cache_dir)
        served = functools.partial(ServedLlama, name=name, reuse=reuse, plans=plans, cache=cache)
        return quietly(served, model, ctx, running, plan=source.frontier)  # whose settings are used to open the model
    except Exception as error:
        if (line := users_error(error)) is None:
            raise
        raise NativeError(line) from error


def _keys(file: str | None) -> list[str]:
    """Return the keys from a file or from the environment. All users could see a key on the command line."""
    lines = os.environ.get("ADASKIP_API_KEY", "") if file is None else read_text(file)
    keys = list(dict.fromkeys(filter(None, map(str.strip, lines.splitlines()))))
    if file is not None and not keys:
        raise click.UsageError(f"{file!r} has no key; write one per line, or leave out --api-key-file")
    return keys


def _source(model: str, plan: str, max_loss: float | None) -> PlanSource:
    if plan == "none":
        if max_loss is not None:
            raise click.UsageError("--plan none runs the whole model; leave out --max-loss")
        return PlanSource()
    found = find_plan_source(model, None if plan == "auto" else plan, max_loss, opt_out="--plan none")
    if plan == "auto" and found.file is None and not found.note:
        name = os.path.basename(plan_path(model))
        return PlanSource(note=f"There is no {name}, so the whole model runs. `adaskip-cpp tune {model}` finds plans.")
    return found
