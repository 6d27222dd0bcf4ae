"""Chooses the release of llama-cpp-python to build for, from the table cmake/releases.txt.

The environment variable ADASKIP_LLAMA_CPP_PYTHON names it. Else it is the installed release, and libllama is linked to
its ggml. Else it is the table's newest. Every failure is one line that ends with the next step.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = ["TABLE", "VARIABLE", "Installed", "Release", "ReleaseError", "choose", "installed", "read_table"]

TABLE = Path(__file__).with_name("releases.txt")
VARIABLE = "ADASKIP_LLAMA_CPP_PYTHON"


class ReleaseError(Exception):
    """There is no release to build for; the message is one line that ends with the next step."""


@dataclass(frozen=True)
class Release:
    """A release of llama-cpp-python: its version and the SHA-256 (hex) of its sdist."""

    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        """The line that asks pip for this sdist and no other."""
        return f"llama-cpp-python=={self.version} --hash=sha256:{self.sha256}"

    @property
    def filename(self) -> str:
        """Name of the sdist's file."""
        return f"llama_cpp_python-{self.version}.tar.gz"


@dataclass(frozen=True)
class Installed:
    """An installed llama-cpp-python: its version and its site-packages folder."""

    version: str
    folder: Path

    @property
    def ggml(self) -> Path:
        """Folder of ggml's CMake package; some wheels of llama-cpp-python lack it."""
        return self.folder / "lib" / "cmake" / "ggml"


def read_table(path: Path = TABLE) -> list[Release]:
    """The supported releases, newest first."""
    lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    matches = [re.fullmatch(r"llama-cpp-python==(\S+) --hash=sha256:([0-9a-f]{64})", line) for line in lines if line]
    releases = [Release(match[1], match[2]) for match in matches if match]
    if not releases or None in matches:
        raise ReleaseError(
            f"{path} is no list of releases; write lines of 'llama-cpp-python==VERSION --hash=sha256:HEX' alone."
        )
    return releases


def installed() -> list[Installed]:
    """Each llama-cpp-python that a build may use; the first is the one that Python would import.

    pip builds in an environment of its own, with the Python of the target environment. Without the variables that pip
    sets for the build (``-E``), this Python finds the target's packages.
    """
    code = (
        "import importlib.metadata as m, json; "
        "print(json.dumps([(d.version, str(d.locate_file(''))) for d in m.distributions(name='llama-cpp-python')]))"
    )
    found = [
        (distribution.version, str(distribution.locate_file("")))
        for distribution in importlib.metadata.distributions(name="llama-cpp-python")
    ]
    target = subprocess.run([sys.executable, "-E", "-c", code], capture_output=True, text=True, check=False)
    if target.returncode == 0:
        found += json.loads(target.stdout)
    # The local part of the version names the backend, such as +cu124.
    return [Installed(version.partition("+")[0], Path(folder)) for version, folder in found]


def choose(table: list[Release], found: list[Installed]) -> Release:
    """The release of ``table`` to build for if ``found`` is installed.

    Raises:
        ReleaseError: that release is not in the table.
    """
    named = os.environ.get(VARIABLE)
    version = named or (found[0].version if found else table[0].version)
    for release in table:
        if release.version == version:
            return release
    known = ", ".join(release.version for release in table)
    asked = f"{VARIABLE} names llama-cpp-python {version}" if named else f"llama-cpp-python {version} is installed"
    raise ReleaseError(
        f"{asked}, but adaskip-cpp can be built for {known}; pip install llama-cpp-python=={table[0].version}, or add "
        f"{version} to cmake/releases.txt with patches that apply to it, as CONTRIBUTING.md says."
    )


def _find(table: list[Release], found: list[Installed]) -> tuple[Release, Installed]:
    release = choose(table, found)
    install = f"pip install llama-cpp-python=={release.version}"
    if not found:
        raise ReleaseError(f"{sys.executable} has no llama-cpp-python, whose ggml libllama is linked to; {install}.")
    fitting = [one for one in found if one.version == release.version]
    if not fitting:
        raise ReleaseError(
            f"llama-cpp-python {found[0].version} is installed, but {VARIABLE} names {release.version}; {install}."
        )
    if not (fitting[0].ggml / "ggml-config.cmake").is_file():
        raise ReleaseError(
            f"llama-cpp-python {release.version} has no CMake package of ggml in {fitting[0].ggml}; pip install "
            f"--force-reinstall --no-binary llama-cpp-python llama-cpp-python=={release.version}."
        )
    return release, fitting[0]


def main() -> int:
    """Prints a CMake list: the release, the sdist's SHA-256 and the folder of ggml's CMake package."""
    try:
        release, found = _find(read_table(), installed())
    except ReleaseError as error:
        print(error, file=sys.stderr)
        return 1
    print(release.version, release.sha256, found.ggml.as_posix(), sep=";")
    return 0


if __name__ == "__main__":
    sys.exit(main())
