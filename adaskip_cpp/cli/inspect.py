"""``adaskip-cpp inspect``: shows the sublayers of a model, and which of them can be skipped."""

import itertools

import click
from rich.table import Column
from rich.text import Text

from ..engine.native import Sublayer
from ..measuring.running import Running, open_quietly
from .terminal import console, model_options, table, verb


@verb("Show which sublayers can be skipped.", "model.gguf")
@click.argument("model")
@model_options
def inspect(model: str, running: Running) -> None:
    """Show the sublayers of MODEL, a GGUF file: which can be skipped, and why others cannot.

    Neighbouring layers of equal kind share a line. "window of N": the model's own attention sees N tokens, not all.
    """
    llm, out = open_quietly(model, 512, running), console()
    sublayers, n, name = llm.sublayers, llm.n_params, llm.metadata.get("general.name", "")
    parameters = f"{n / 1e9:.1f} billion" if n >= 1e9 else f"{n / 1e6:,.0f} million"
    what = f"{llm.model_info.architecture}, {llm.n_layer} layers, {parameters} parameters"
    out.print(Text.assemble((f"{name}  " if name else "", "bold"), what))
    trained = f"trained on contexts of {llm.n_ctx_train:,} tokens"
    out.print(f"width {llm.n_embd():,}, {trained}, {llm.weight_bytes / 1e6:,.0f} MB of weights")
    out.print(f"fingerprint {llm.model_info.fingerprint[:16]}")
    printed = table("layers", Column("attention"), Column("FFN"))
    rows = [(_cell(attention), _cell(ffn)) for attention, ffn in zip(sublayers[::2], sublayers[1::2], strict=True)]
    for alike, group in itertools.groupby(range(len(rows)), key=rows.__getitem__):
        layers = list(group)
        printed.add_row(str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}", *alike)
    out.print(printed)
    n_in_bulk = sum(row.in_bulk and not row.skippable for row in sublayers)
    in_bulk = f", {n_in_bulk} more in the bulk of a prompt" if n_in_bulk else ""
    out.print(f"{sum(row.skippable for row in sublayers)} of {len(sublayers)} sublayers can be skipped{in_bulk}.")
    if n_windowable := sum(row.windowable and not row.window for row in sublayers):
        out.print(f"{n_windowable} attentions can use a window in the bulk (option --windowed).")
    if not llm.can_move:
        out.print("Its KV cells cannot be moved: an edited prompt is read again from its first changed token on.")


def _cell(row: Sublayer) -> Text:
    window = f", window of {row.window:,}" if row.window else ""
    if row.skippable:
        return Text.assemble(("yes", "green"), window)
    where = "in the bulk only" if row.in_bulk else "no"
    return Text.assemble((where, "yellow"), window * row.in_bulk, f": {row.reason}")
