"""``adaskip-cpp serve``: answer over HTTP as OpenAI's API does."""

import functools
import os
import re
from typing import TYPE_CHECKING

import click

from ..engine.rpc import add_rpc_server
from ..errors import NativeError, PackageMissingError
from ..files import read_text
from ..measuring.running import Running, quietly
from ..model.frontier import DEFAULT_LOSS
from ..model.identity import plan_path, profile_path
from .planning import PlanSource, find_plan_source, load_profile, max_loss_option
from .terminal import RUNNING, console, model_options, option, users_error, verb

if TYPE_CHECKING:
    from ..serving.llama import ServedLlama

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def _size(text: str) -> int:
    """Return the bytes of a size such as 500M or 2G."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)B?", text.upper())
    if not found:
        raise click.BadParameter(f"{text!r} is no size; use bytes, or as 500M, 2G")
    return int(float(found[1]) * _UNITS[found[2]])


@verb(
    "Serve a model over HTTP, as OpenAI's API does.",
    example="adaskip-cpp serve model.gguf\nadaskip-cpp serve model.gguf --cache-dir ~/.cache/adaskip-cpp --ctx 16384",
)
@click.argument("model")
@option(
    "--plan",
    "plan_file",
    metavar="auto|none|PLAN",
    default="auto",
    help="What to skip: what `tune` wrote beside MODEL, nothing, or a plan file. A request can ask for another.",
)
@max_loss_option
@option("--host", default="127.0.0.1", help="Address to listen on.")
@option("--port", type=click.IntRange(0, 65535), default=8000, help="Port to listen on; 0 for a free one.")
@option(
    "--api-key-file",
    metavar="FILE",
    help="Keys, one a line; clients must send one of them.  [default: the one in ADASKIP_API_KEY, if it is set]",
)
@option("--allow-host", "allowed", metavar="NAME", multiple=True, help="A name that it may be asked by without a key.")
@option("--insecure", is_flag=True, help="Listen beyond this machine without a key.")
@option("--log-prompts", is_flag=True, help="Print what clients send to stderr; else it is never in the log.")
@option(
    "--cache-dir",
    group="What is kept",
    metavar="FOLDER",
    help="Keep what was read there too, so that a restart forgets nothing.  [default: in memory alone]",
)
@option(
    "--cache-size",
    group="What is kept",
    metavar="SIZE",
    type=_size,
    default="2G",
    help="Most that is kept, in memory and in the folder each.",
)
@option("--ctx", group=RUNNING, type=click.IntRange(256, 2**31 - 1), default=8192, help="Context in tokens.")
@model_options
def serve(
    model: str,
    plan_file: str,
    max_loss: float | None,
    host: str,
    port: int,
    api_key_file: str | None,
    allowed: tuple[str, ...],
    insecure: bool,
    log_prompts: bool,
    cache_dir: str | None,
    cache_size: int,
    ctx: int,
    running: Running,
) -> None:
    """Serve MODEL, a GGUF file, to every client that speaks OpenAI's API.

    Long prompts are read faster by the plan, and what was read before is not read again.
    """
    try:
        from ..serving.app import make_app
        from ..serving.middleware import is_loopback
        from ..serving.server import listen, run
        from ..serving.worker import Opening
        from ..serving.workers import Worker, Workers
    except ImportError as error:
        raise PackageMissingError(
            f"serving needs further packages ({error}); run `pip install 'adaskip-cpp[serve]'`"
        ) from error
    keys = _keys(api_key_file)
    if not (is_loopback(host) or keys or insecure):
        raise click.UsageError(
            f"{host} can be reached from other machines; give --api-key-file, or --insecure to let everyone in"
        )
    ctx = -(-ctx // 256) * 256  # as llama.cpp rounds it, unlike llama_cpp.Llama
    err = console(stderr=True)
    source = _source(model, plan_file, max_loss)
    open_ = functools.partial(_open, model, plan_file, max_loss, ctx, cache_size, cache_dir, running)
    name = os.path.basename(model).removesuffix(".gguf")
    with listen(host, port) as listener:
        if source.note:
            err.print(source.note, style="dim", markup=False)
        workers = Workers([Worker(name, Opening(open_, log_prompts))], n_ctx=ctx)
        app, queue = make_app(workers, keys=keys, names=(host, *allowed), log_prompts=log_prompts)
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        ready = f"{name} at {address}/v1, to look at {address}; Ctrl-C ends it."
        run(app, queue, workers, listener, functools.partial(err.print, ready, markup=False, soft_wrap=True))


def _open(
    model: str,
    plan_file: str,
    max_loss: float | None,
    ctx: int,
    cache_size: int,
    cache_dir: str | None,
    running: Running,
) -> "ServedLlama":
    """Open a model, in its own process; what it raises is told as it is."""
    from ..serving.llama import ServedLlama
    from ..serving.plans import Plans
    from ..serving.prefix_cache import PrefixCache

    try:
        for endpoint in running.rpc_servers:
            add_rpc_server(endpoint)
        source = _source(model, plan_file, max_loss)
        profile = load_profile(model, profile_path(model)) if os.path.exists(profile_path(model)) else None
        own, promise = source.plan(ctx), DEFAULT_LOSS if max_loss is None else max_loss
        return quietly(
            ServedLlama,
            model,
            ctx,
            running,
            plan=source.frontier,  # for its settings
            plans=Plans(own, source.frontier, promise, profile, ctx),
            cache=PrefixCache(cache_size, cache_dir),
        )
    except Exception as error:
        if (line := users_error(error)) is None:
            raise
        raise NativeError(line) from error


def _keys(file: str | None) -> list[str]:
    """Return the keys of a file, or the one in the environment: what stands in a command, all users can see."""
    lines = os.environ.get("ADASKIP_API_KEY", "") if file is None else read_text(file)
    keys = list(dict.fromkeys(filter(None, map(str.strip, lines.splitlines()))))
    if file is not None and not keys:
        raise click.UsageError(f"there is no key in {file!r}; write one a line, or leave --api-key-file out")
    return keys


def _source(model: str, plan: str, max_loss: float | None) -> PlanSource:
    if plan == "none":
        return PlanSource()
    named = None if plan == "auto" else plan
    found = find_plan_source(model, plan_file=named, max_loss=max_loss, to_be_whole="--plan none")
    if plan == "auto" and found.file is None and not found.note:
        name = os.path.basename(plan_path(model))
        return PlanSource(note=f"There is no {name}: the whole model runs; `adaskip-cpp tune {model}` finds a plan.")
    return found
