"""``adaskip-cpp inspect``: shows the sublayers of a model, and which of them can be skipped."""

import itertools
from typing import Any

import click
from rich.table import Column

from ..engine.native import Sublayer
from ..files import json_text
from ..measuring.running import Running, open_quietly
from .terminal import console, json_option, model_options, table, verb


@verb("Show which sublayers can be skipped.", example="adaskip-cpp inspect model.gguf")
@click.argument("model")
@model_options
@json_option
def inspect(model: str, running: Running, as_json: bool) -> None:
    """Show the sublayers of MODEL, a GGUF file: which can be skipped, and why others cannot.

    Neighbouring layers of equal kind share a line. "window of N": the model's own attention sees N tokens, not all.
    """
    llm = open_quietly(model, 512, running)
    facts: dict[str, Any] = {
        "file": model,
        "name": llm.metadata.get("general.name", ""),
        "architecture": llm.model_info.architecture,
        "n_layer": llm.n_layer,
        "n_embd": llm.n_embd(),
        "n_ctx_train": llm.n_ctx_train,
        "n_params": llm.n_params,
        "n_bytes": llm.weight_bytes,
        "fingerprint": llm.model_info.fingerprint,
        "n_skippable": sum(row.skippable for row in llm.sublayers),
        "can_move": llm.can_move,
    }
    if as_json:
        click.echo(json_text({**facts, "sublayers": llm.sublayers}), nl=False)
    else:
        _print(facts, llm.sublayers)


def _print(facts: dict[str, Any], sublayers: tuple[Sublayer, ...]) -> None:
    out = console()
    n = facts["n_params"]
    parameters = f"{n / 1e9:.1f} billion" if n >= 1e9 else f"{n / 1e6:,.0f} million"
    title = f"{facts['name']}  " if facts["name"] else ""
    out.print(f"[bold]{title}[/]{facts['architecture']}, {facts['n_layer']} layers, {parameters} parameters")
    out.print(
        f"width {facts['n_embd']:,}, trained on contexts of {facts['n_ctx_train']:,} tokens, "
        f"{facts['n_bytes'] / 1e6:,.0f} MB of weights"
    )
    out.print(f"fingerprint {facts['fingerprint'][:16]}")
    printed = table("layers", Column("attention"), Column("FFN"))
    rows = [(_cell(attention), _cell(ffn)) for attention, ffn in zip(sublayers[::2], sublayers[1::2], strict=True)]
    for alike, group in itertools.groupby(range(len(rows)), key=rows.__getitem__):
        layers = list(group)
        printed.add_row(str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}", *alike)
    out.print(printed)
    n_in_bulk = sum(row.in_bulk and not row.skippable for row in sublayers)
    in_bulk = f", {n_in_bulk} more in the bulk of a prompt" if n_in_bulk else ""
    out.print(f"{facts['n_skippable']} of {2 * facts['n_layer']} sublayers can be skipped{in_bulk}.")
    if n_windowable := sum(row.windowable for row in sublayers):
        out.print(f"{n_windowable} attentions can use a window in the bulk (option --windowed).")
    if not facts["can_move"]:
        out.print("Its KV cells cannot be moved: an edited prompt is read again from its first changed token on.")


def _cell(row: Sublayer) -> str:
    window = f", window of {row.window:,}" if row.window else ""
    if row.skippable:
        return f"[green]yes[/]{window}"
    return f"[yellow]in the bulk only[/]{window}: {row.reason}" if row.in_bulk else f"[yellow]no[/]: {row.reason}"
