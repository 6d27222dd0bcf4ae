"""Progress on stderr for whatever takes longer than two seconds."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Protocol

__all__ = ["progress_bar", "told_progress"]

_SHOW_AFTER_S = 2.0
"""Work that is expected to take longer than this gets a progress display."""
_LINES_S = 60.0
"""Between two lines of progress where there is no terminal."""


class OnProgress(Protocol):
    """Takes the fraction of the work done, and how much that is in words."""

    def __call__(self, fraction: float, words: str = "") -> None: ...


@contextlib.contextmanager
def progress_bar(label: str, show: bool | None = None, *, still: bool = False) -> Iterator[OnProgress]:
    """Yield what moves a progress bar.

    Args:
        label: what is being done.
        show: True shows it at once, False never; None does on a terminal, once it is known to take more than 2 s.
        still: draw it when it is moved and never else, as what is measured meanwhile would pay for that.
    """
    start = time.monotonic()
    update: Callable[..., None] | None = None
    with contextlib.ExitStack() as stack:

        def appear() -> Callable[..., None]:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            console = Console(stderr=True)
            columns = TextColumn(label), BarColumn(bar_width=30), TaskProgressColumn(), TextColumn("{task.description}")
            # Elsewhere than on a terminal rich prints the last state, once.
            bar = Progress(
                *columns,
                TimeRemainingColumn(),
                console=console,
                transient=console.is_terminal,
                auto_refresh=not still,
            )
            task = stack.enter_context(bar).add_task("", total=1.0)
            return lambda fraction, words: bar.update(task, completed=fraction, description=words, refresh=still)

        def on_progress(fraction: float, words: str = "") -> None:
            nonlocal update
            expected = (time.monotonic() - start) / fraction if fraction > 0 else 0.0
            if update is None and show is None and sys.stderr.isatty() and expected > _SHOW_AFTER_S:
                update = appear()
            if update is not None:
                update(fraction, words)

        if show:
            update = appear()
        yield on_progress


@contextlib.contextmanager
def told_progress(label: str, *, still: bool = False) -> Iterator[OnProgress]:
    """Yield what moves a progress bar; where there is no terminal, stderr gets a line a minute."""
    if sys.stderr.isatty():
        with progress_bar(label, show=True, still=still) as on_progress:
            yield on_progress
        return
    start = last = time.monotonic()

    def line(fraction: float, words: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _LINES_S and 0 < fraction < 1:
            last = now
            left = max(round((now - start) * (1 - fraction) / fraction / 60), 1)
            print(f"{label}: {fraction:.0%} done, about {left} min left", file=sys.stderr, flush=True)

    yield line
