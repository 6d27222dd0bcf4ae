"""``adaskip-cpp inspect``: the sublayers of a model."""

from pathlib import Path
from typing import Any

from oracles.command_line import run
from oracles.tiny_models import with_metadata


def test_inspect_lists_the_sublayers(tiny: Any) -> None:
    result = run("inspect", tiny())
    assert "llama, 3 layers" in result.stdout
    assert "6 of 6 sublayers can be skipped." in result.stdout
    assert "3 attentions can use a window in the bulk" in result.stdout
    assert run("inspect", tiny("gemma3")).stdout.count("window of 8") == 2  # layers 0 and 2
    sharing = run("inspect", tiny("gemma4")).stdout
    assert "6 of 8 sublayers can be skipped, 2 more in the bulk of a prompt." in sharing
    assert "in the bulk only, window of 8: its KV is shared" in " ".join(sharing.split())


def test_the_name_in_a_model_is_printed_as_it_is(tiny: Any, tmp_path: Path) -> None:
    path = with_metadata(tiny(), tmp_path / "named.gguf", **{"general.name": "a [/INST] [b]"})
    assert "a [/INST] [b]  llama, 3 layers" in run("inspect", path).stdout
