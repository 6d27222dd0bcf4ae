"""Progress on stderr for whatever takes longer than two seconds."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

__all__ = ["RequestProgress", "fraction_progress", "told_progress"]

_SHOW_AFTER_S = 2.0
"""Work that is expected to take longer than this gets a progress display."""
_LINES_S = 60.0
"""Between two lines of progress where there is no terminal."""


@contextlib.contextmanager
def fraction_progress(label: str, show: bool | None) -> Iterator[Callable[[float], None] | None]:
    """Yield a function that takes the fraction of the work done, or None where nothing is shown.

    Args:
        label: what is being done.
        show: True shows it, False does not; None does where stderr is a terminal.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = TextColumn(label), BarColumn(bar_width=30), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=console.is_terminal) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda fraction: bar.update(task, completed=fraction)


@contextlib.contextmanager
def told_progress(label: str) -> Iterator[Callable[[float], None]]:
    """Yield a function that takes the fraction of the work done; not a terminal, stderr gets a line a minute."""
    if sys.stderr.isatty():
        with fraction_progress(label, True) as on_progress:
            assert on_progress is not None
            yield on_progress
        return
    start = last = time.monotonic()

    def line(fraction: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _LINES_S and 0 < fraction < 1:
            last = now
            left = max(round((now - start) * (1 - fraction) / fraction / 60), 1)
            print(f"{label}: {fraction:.0%} done, about {left} min left", file=sys.stderr, flush=True)

    yield line


class RequestProgress:
    """A progress bar on stderr that appears once the work is known to take long."""

    def __init__(self, lengths: list[int], show: bool | None) -> None:
        self._total = sum(lengths)
        self._n_requests = len(lengths)
        self._finished = 0
        self._done = 0
        self._start = time.monotonic()
        self._show = sys.stderr.isatty() if show is None else show
        self._always = show is True
        self._stack = contextlib.ExitStack()
        self._update: Callable[[], None] | None = None

    def __enter__(self) -> RequestProgress:
        if self._always:
            self._open()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def advance(self, n_tokens: int) -> None:
        """Count tokens that have been seen."""
        self._done += n_tokens
        if self._show and self._update is None:
            expected = (time.monotonic() - self._start) * self._total / self._done
            if expected > _SHOW_AFTER_S:
                self._open()
        if self._update is not None:
            self._update()

    def finish_request(self) -> None:
        """Count a request that is complete."""
        self._finished += 1
        if self._update is not None:
            self._update()

    def _open(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        bar = self._stack.enter_context(
            Progress(
                TextColumn("Calibrating"),
                BarColumn(bar_width=30),
                TextColumn("{task.fields[requests]}/{task.fields[n_requests]} requests, {task.completed:,} tokens"),
                TimeRemainingColumn(),
                console=console,
                transient=console.is_terminal,  # elsewhere rich prints the last state, once
            )
        )
        task = bar.add_task("", total=self._total, requests=self._finished, n_requests=self._n_requests)
        self._update = lambda: bar.update(task, completed=self._done, requests=self._finished)
