"""What tests of the command line share."""

from click.testing import Result

__all__ = ["line"]


def line(result: Result, code: int = 1) -> str:
    """The one line of a user's error, which is all that is printed."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    (only,) = result.stderr.splitlines()
    assert only.startswith("Error: ")
    return only
