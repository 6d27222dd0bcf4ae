"""Progress where there is no terminal."""

import pytest

from adaskip_cpp.progress import told_progress


def test_without_a_terminal_there_is_a_line_a_minute_with_an_estimate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr("adaskip_cpp.progress.time.monotonic", lambda: now)
    with told_progress("Searching") as on_progress:
        for now, fraction in ((130.0, 0.1), (160.0, 0.2), (190.0, 0.3), (221.0, 0.4)):  # noqa: B007  # read above
            on_progress(fraction)
    assert capsys.readouterr().err.splitlines() == [
        "Searching: 20% done, about 4 min left",
        "Searching: 40% done, about 3 min left",
    ]
