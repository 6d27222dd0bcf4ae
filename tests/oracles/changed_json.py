"""Files of JSON, changed by hand."""

import json
from pathlib import Path
from typing import Any

LOST = object()
"""In the place of a value: the key goes."""


def put(data: Any, path: str, value: Any) -> None:
    """Set the value at a path such as ``"points.1.plan"``."""
    *folders, name = (int(part) if part.isdigit() else part for part in path.split("."))
    for folder in folders:
        data = data[folder]
    if value is LOST:
        del data[name]
    else:
        data[name] = value


def change(file: Path, path: str, value: Any) -> None:
    data = json.loads(file.read_text())
    put(data, path, value)
    file.write_text(json.dumps(data))
