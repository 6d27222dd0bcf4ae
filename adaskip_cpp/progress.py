"""Shows progress on stderr of work longer than two seconds, for calibration, tuning and commands: ``progress_bar``."""

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_SHOW_AFTER_S = 2.0  # work that takes longer than this, or is expected to, gets a progress display
_DRAWN_HZ = 2  # low, because drawing takes processor time from the model
_LINES_S = 60.0  # between two lines of progress where there is no terminal


class OnProgress(Protocol):  # called with the fraction of the work that is done, and words to show
    def __call__(self, fraction: float, words: str = "") -> None: ...


Stage: TypeAlias = Callable[[str], AbstractContextManager[OnProgress]]  # begins a stage of work, by its name


def silent(label: str) -> AbstractContextManager[OnProgress]:
    """A :data:`Stage` that shows nothing."""
    return contextlib.nullcontext(lambda fraction, words="": None)


@contextlib.contextmanager
def progress_bar(label: str, *, still: bool = False, lines: bool = False) -> Iterator[OnProgress]:
    """Yield a function that moves a progress bar on stderr.

    On a terminal, the bar appears after 2 s, or once the work is known to take longer. If ``still``, it is drawn only
    when it moves, because drawing disturbs measurements. Elsewhere nothing is shown, or with ``lines`` a line a minute.
    """
    if not sys.stderr.isatty():
        yield _line_a_minute(label) if lines else lambda fraction, words="": None
        return
    start = time.monotonic()
    words = TextColumn("{task.description}", markup=False)  # has names of files
    columns = TextColumn(label), BarColumn(bar_width=30), TaskProgressColumn(), words
    bar = Progress(
        *columns,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        auto_refresh=not still,
        refresh_per_second=_DRAWN_HZ,
        speed_estimate_period=math.inf,  # a move may take minutes
    )
    task = bar.add_task("", total=1.0)
    bar.advance(task, 1e-9)  # rich shows the time left from the second move on
    shown_later = threading.Timer(_SHOW_AFTER_S, bar.start)

    def on_progress(fraction: float, words: str = "") -> None:
        if not bar.live.is_started and fraction > 0 and (time.monotonic() - start) / fraction > _SHOW_AFTER_S:
            bar.start()
        bar.update(task, completed=fraction, description=words, refresh=still)

    try:
        shown_later.start()
        yield on_progress
    finally:
        shown_later.cancel()
        shown_later.join()
        if bar.live.is_started:
            bar.stop()


def _line_a_minute(label: str) -> OnProgress:
    start = last = time.monotonic()

    def on_progress(fraction: float, words: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _LINES_S and 0 < fraction < 1:
            last = now
            left = max(round((now - start) * (1 - fraction) / fraction / 60), 1)
            print(f"{label}: {math.floor(fraction * 100)}% done, about {left} min left", file=sys.stderr, flush=True)

    return on_progress
