"""adaskip_cpp.pictures.heatmap: in a terminal."""

import numpy as np
from rich.console import Console

from adaskip_cpp.pictures.heatmap import print_heatmap


def show(width: int, n_layer: int, *, colour: bool = False) -> list[str]:
    console = Console(width=width, force_terminal=colour, color_system="truecolor" if colour else None, record=True)
    similarity = np.linspace(0.1, 0.9, 2 * n_layer).reshape(n_layer, 2)
    similarity[0, 0] = np.nan
    skip = np.zeros((n_layer, 2), bool)
    skip[-1] = True
    with console.capture() as capture:
        print_heatmap(console, similarity, skip)
    return capture.get().splitlines()


def test_thirty_layers_fit_eighty_columns_in_two_rows() -> None:
    header, attention, ffn, legend = show(80, 30)
    assert header.split() == ["layer", "0", "5", "10", "15", "20", "25"]
    assert attention.split()[0] == "attention" and attention.split()[1] == "-" and attention.endswith("9x")
    assert ffn.startswith("FFN") and ffn.endswith("9x")
    assert "0.1" in legend and "0.9" in legend and "x skipped" in legend
    assert max(map(len, (header, attention, ffn, legend))) <= 80


def test_more_layers_than_fit_go_on_below() -> None:
    lines = show(60, 80)
    assert sum(text.startswith("attention") for text in lines) == 4
    assert max(map(len, lines)) <= 60


def test_colours_are_only_for_terminals() -> None:
    assert not any("\x1b" in text for text in show(80, 30))
    assert any("\x1b[" in text for text in show(80, 30, colour=True))
