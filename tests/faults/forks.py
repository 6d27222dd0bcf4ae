"""Runs a function in a fork of this process, which it may end."""

import multiprocessing
from collections.abc import Callable
from typing import TypeVar

__all__ = ["ForkEndedError", "in_a_fork"]

T = TypeVar("T")


class ForkEndedError(Exception):
    """The fork ended before its function did; ``code`` is its exit code, negative for a signal."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the fork ended with {code}")
        self.code = code


def in_a_fork(function: Callable[[], T]) -> T:
    """What a function returns in a fork of this process.

    Raises:
        ForkEndedError: the fork ended before.
    """
    fork = multiprocessing.get_context("fork")
    reader, writer = fork.Pipe(duplex=False)
    process = fork.Process(target=lambda: writer.send(function()))
    process.start()
    writer.close()
    with reader:
        try:
            result: T = reader.recv()
        except EOFError:
            process.join()
            raise ForkEndedError(process.exitcode or 0) from None
    process.join()
    return result
