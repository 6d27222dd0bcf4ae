"""adaskip_cpp.files: texts as people and programs write them."""

import json
from pathlib import Path

from adaskip_cpp.files import json_text, read_text


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    """Notepad writes one, and PowerShell: the first key of a file would be refused, the first line of JSON too."""
    path = tmp_path / "keys.txt"
    path.write_bytes(b"\xef\xbb\xbfsecret\n")
    assert read_text(path) == "secret\n"


def test_lists_on_one_line_keep_their_texts() -> None:
    data = {"devices": ["one,  two", "three, four", "a,\n b"], "n": [1, 2]}
    text = json_text(data)
    assert json.loads(text) == data and '"n": [1, 2]' in text
