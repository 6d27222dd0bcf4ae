"""``adaskip-cpp inspect``: the sublayers of a model."""

import json
from typing import Any

from oracles.command_line import run


def test_inspect_lists_the_sublayers(tiny: Any) -> None:
    result = run("inspect", tiny())
    assert "6 of 6 sublayers can be skipped." in result.stdout
    assert run("inspect", tiny("gemma3")).stdout.count("window of 8") == 2  # layers 0 and 2
    sharing = run("inspect", tiny("gemma4")).stdout
    assert "6 of 8 sublayers can be skipped, 2 more in the bulk of a prompt." in sharing
    assert "in the bulk only, window of 8: its KV is shared" in " ".join(sharing.split())
    data = json.loads(run("inspect", tiny(), "--json").stdout)
    assert (data["architecture"], data["n_layer"], data["n_skippable"]) == ("llama", 3, 6)
    assert [(row["layer"], row["kind"]) for row in data["sublayers"]] == [
        (layer, kind) for layer in range(3) for kind in ("attention", "ffn")
    ]
