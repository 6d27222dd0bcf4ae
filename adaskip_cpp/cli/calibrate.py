"""``adaskip-cpp calibrate``: measures the sublayers of a model and writes a profile."""

import os
import time
from functools import partial

import click

from ..calibration.calibrate import calibrate as run
from ..files import read_text
from ..measuring import corpus
from ..measuring.running import Running, open_quietly
from ..model.stored import check_output, vectors_path
from .terminal import console, model_options, option, verb

_CTX_TIMED = 8192  # context for timing sublayers, in tokens: the default of `generate`, to cover its prompts

_learning = partial(option, group="What to measure")


@verb("Measure a model's sublayers.", "model.gguf --data notes.txt -o model.adaskip.json")
@click.argument("model")
@option("-o", "--output", required=True, metavar="PROFILE", help="Profile file to write.")
@option("--data", "files", multiple=True, metavar="FILE", help="UTF-8 text to calibrate on, - for stdin; may be "
        "repeated. Text like your prompts is best.  [default: documentation and code of Python "
        "and of packages]")  # fmt: skip
@_learning("--requests", type=click.IntRange(1), default=corpus.N_REQUESTS, help="Requests to cut from the text.")
@_learning("--tokens", type=click.IntRange(2), default=corpus.N_TOKENS, help="Tokens in each request.")
@_learning("--decode-tokens", "n_decode", type=click.IntRange(1), default=32,
           help="Tokens to decode after 20 of the requests.")  # fmt: skip
@_learning("--no-cost", is_flag=True, help="Do not time the sublayers. Then --speedup cannot be used.")
@model_options
def calibrate(
    model: str, output: str, files: tuple[str, ...], requests: int, tokens: int, n_decode: int,
    no_cost: bool, running: Running
) -> None:  # fmt: skip
    """Measure which sublayers of MODEL, a GGUF file, change their input least, and write a profile.

    The whole model reads requests, cut from the text at even distances. It answers some of them with a few tokens. The
    profile also gets linear maps, which replace skipped sublayers, and the time of each sublayer on this machine.
    """
    check_output(output, model, *files)
    start, out = time.monotonic(), console()
    llm = open_quietly(model, max(tokens + n_decode, 0 if no_cost else _CTX_TIMED), running)
    data = corpus.cut(llm, "\n\n".join(map(read_text, files)), requests, tokens) if files else None
    names = ", ".join(map(os.path.basename, files)) or None
    profile = run(
        llm, data, n_requests=requests, n_tokens=tokens, n_decode=n_decode, cost=not no_cost, description=names
    )
    profile.save(output)
    short = f" (the text is too short for {requests})" if profile.n_requests < requests else ""
    out.print(f"Calibrated on {profile.n_requests} requests{short}: {profile.n_tokens:,} tokens of {profile.corpus}.")
    timed = ". No sublayer was timed." if profile.cost is None else ", and the sublayers were timed on this machine."
    out.print(f"{profile.decode.n_tokens:,} tokens were decoded{timed}")
    out.print(f"{profile.skippable.sum()} of {2 * profile.n_layer} sublayers can be skipped.")
    vectors = vectors_path(output)
    out.print(f"Profile written to {output}, its vectors to {vectors}. Keep both together.", soft_wrap=True)
    took = f"It took {time.monotonic() - start:.0f} s."
    out.print(f"{took} Next: adaskip-cpp plan {output}", style="dim", soft_wrap=True)
