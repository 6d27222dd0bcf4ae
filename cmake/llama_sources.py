"""Provides llama.cpp's sources for our CMakeLists.txt: downloads, verifies, unpacks and patches them.

The sources come from the sdist of one llama-cpp-python. pip fetches it, so the user's mirrors, proxies and caches are
used. A second run has nothing to do. After a change of the patches, only files with other contents are written, so
incremental builds work. Every failure is one line that ends with the next step.
"""

from __future__ import annotations

import argparse
import filecmp
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any

from releases import TABLE, Release, read_table

__all__ = ["SourceError", "apply_patches", "fetch", "prepare", "read_series"]

# The parts of the 175 MB tree that libllama needs. llama.cpp's CMake files always configure vendor/. ggml's parts are
# for other platforms alone, and without backends: for this one, llama-cpp-python has ggml ready-built.
_PARTS = ("CMakeLists.txt", "LICENSE", "cmake", "include", "src", "vendor")
_PARTS_OF_GGML = ("ggml/CMakeLists.txt", "ggml/cmake/*", "ggml/include/*", "ggml/src/*", "ggml/src/ggml-cpu/*.h")

# Environment variables of pip for a build backend: its build, and the backend's path (in old and new versions of pip).
_OF_PIP = ("PIP_BUILD_TRACKER", "PEP517_", "_PYPROJECT_HOOKS_")


class SourceError(Exception):
    """The sources cannot be provided; the message is one line that ends with the next step."""


def fetch(release: Release, directory: Path) -> Path:
    """Downloads the sdist of ``release`` into ``directory``, unless it is there already, and returns its path.

    Raises:
        SourceError: pip is missing, the registry cannot be reached, or the file's hash is not the table's.
    """
    sdist = directory / release.filename
    if sdist.is_file() and _sha256(sdist) == release.sha256:
        return sdist
    sdist.unlink(missing_ok=True)
    directory.mkdir(parents=True, exist_ok=True)
    requirement = directory / "requirement.txt"  # pip reads hashes from files only
    requirement.write_text(release.requirement + "\n")
    # --no-build-isolation: the running build backend prepares the metadata, where pip would install a second one. If a
    # pip started this script, its variables name our backend, which is not the sdist's.
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    command += ["--no-binary", ":all:", "--no-build-isolation", "--require-hashes", "--progress-bar", "off"]
    command += ["--dest", str(directory), "--requirement", str(requirement)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_OF_PIP)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    output = result.stdout + result.stderr
    if result.returncode == 0 and sdist.is_file():
        return sdist
    if "No module named pip" in output:
        raise SourceError(
            f"{sys.executable} has no pip to download llama.cpp with; run '{sys.executable} -m ensurepip'."
        )
    if "DO NOT MATCH THE HASHES" in output:
        raise SourceError(
            f"the downloaded {release.filename} is not the file of the table (its SHA-256 differs from the one "
            f"in {TABLE}); check the package index that pip uses, then try again."
        )
    lines = output.splitlines() or [f"exit {result.returncode}"]
    # After "ERROR: Exception:" comes a traceback, and its last line is the reason.
    last = next((line for line in reversed(lines) if re.match("ERROR(?!: Exception:)", line)), lines[-1])
    raise SourceError(
        f"pip cannot download {release.filename} ({last.removeprefix('ERROR: ')}); check the network and pip's "
        "index, or pass a downloaded file by CMAKE_ARGS=-DADASKIP_SDIST=FILE."
    )


def apply_patches(root: Path, patches: list[Path]) -> None:
    """Applies ``patches`` (paths inside them start with a/ and b/) to the tree ``root``, in order.

    The lines of a hunk may be anywhere in their file, but must match exactly, and once.

    Raises:
        SourceError: a hunk's lines do not match, or match more than once; ``root`` is then left half patched.
    """
    if not patches:
        return
    try:
        import patch_ng
    except ImportError:
        raise SourceError(
            "the Python package patch-ng, which applies patches/, is missing; pip install patch-ng."
        ) from None
    for path in patches:
        # patch-ng leaves some hunks out with a warning alone, so a warning is a failure, and its reason.
        records: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]  # noqa: B023
        patch_ng.logger.addHandler(handler)
        try:
            patch_set = patch_ng.fromfile(str(path))
            applied = patch_set is not False and len(patch_set) > 0
            if applied:
                _locate_hunks(patch_set, root)
                applied = patch_set.apply(root=str(root))
        except (OSError, ValueError) as error:
            applied, records = False, [str(error)]
        finally:
            patch_ng.logger.removeHandler(handler)
        if not applied or records:
            reason = " ".join(" ".join(records).split()) or "not a readable unified diff"
            raise SourceError(
                f"patch {path.name} does not apply to llama.cpp ({reason}); regenerate it for the release that is "
                "built for, as patches/README.md says."
            )


def _locate_hunks(patch_set: Any, root: Path) -> None:
    """Sets the line of each hunk to the place of its lines, because patch-ng looks only there."""
    for item in patch_set:
        name = item.source.decode().removeprefix("a/")
        lines = (root / name).read_bytes().splitlines()
        for hunk in item.hunks:
            before = [line[1:].rstrip(b"\r\n") for line in hunk.text if line[:1] in (b" ", b"-")]
            starts = [i for i in range(len(lines)) if lines[i : i + len(before)] == before]
            if len(starts) > 1:
                raise ValueError(f"the lines of the hunk at line {hunk.startsrc} are in {name} {len(starts)} times")
            hunk.startsrc = starts[0] + 1 if starts else hunk.startsrc


def prepare(release: Release, patch_directory: Path, work: Path, sdist: Path | None = None) -> Path:
    """Returns the folder ``work``/llama.cpp with the patched sources, after an update if anything has changed.

    Args:
        release: the llama-cpp-python to build for.
        patch_directory: see ``read_series``.
        work: folder that keeps the download and the sources between builds.
        sdist: a downloaded sdist to use instead of pip's.

    Raises:
        SourceError: see ``fetch`` and ``apply_patches``; older sources are left unchanged.
    """
    patches = read_series(patch_directory)
    state = hashlib.sha256(release.sha256.encode() + Path(__file__).read_bytes())
    for path in patches:
        state.update(hashlib.sha256(path.read_bytes()).digest())
    target, stamp = work / "llama.cpp", work / "llama.cpp.stamp"
    if target.is_dir() and stamp.is_file() and stamp.read_text() == state.hexdigest():
        return target
    if sdist is None:
        sdist = fetch(release, work)
    elif not sdist.is_file() or _sha256(sdist) != release.sha256:
        raise SourceError(f"{sdist} is not {release.filename} (SHA-256 {release.sha256}); give that file.")
    fresh = work / "llama.cpp.new"
    shutil.rmtree(fresh, ignore_errors=True)
    _unpack(sdist, release, fresh)
    apply_patches(fresh, patches)
    stamp.unlink(missing_ok=True)
    _mirror(fresh, target)
    shutil.rmtree(fresh)
    stamp.write_text(state.hexdigest())
    return target


def read_series(directory: Path) -> list[Path]:
    """The patches that ``directory``/series lists, in order: one name per line, and '#' starts a comment.

    Raises:
        SourceError: the list or a listed file is missing.
    """
    series = directory / "series"
    if not series.is_file():
        raise SourceError(f"{series} is missing; restore it, an empty file means no patches.")
    lines = [line.partition("#")[0].strip() for line in series.read_text().splitlines()]
    paths = [directory / line for line in lines if line]
    for path in paths:
        if not path.is_file():
            raise SourceError(f"{series} lists {path.name}, which does not exist; restore the file or remove the line.")
    return paths


def _unpack(sdist: Path, release: Release, target: Path) -> None:
    prefix = PurePosixPath(f"llama_cpp_python-{release.version}/vendor/llama.cpp")
    with tarfile.open(sdist) as archive:
        for member in archive:
            name = PurePosixPath(member.name)
            if not member.isfile() or not name.is_relative_to(prefix) or ".." in name.parts:
                continue
            relative = name.relative_to(prefix)
            wanted = any(map(relative.is_relative_to, _PARTS)) or any(map(relative.match, _PARTS_OF_GGML))
            content = archive.extractfile(member) if wanted else None
            if content is not None:
                path = target / relative
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.read())
    if not (target / "CMakeLists.txt").is_file():
        raise SourceError(f"{sdist.name} holds no vendor/llama.cpp; take its line out of cmake/releases.txt.")


def _mirror(source: Path, target: Path) -> None:
    """Makes ``target`` equal to ``source``, and does not touch files that are equal already."""
    wanted = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    for path in [path for path in target.rglob("*") if path.is_file()]:
        if path.relative_to(target) not in wanted:
            path.unlink()
    for relative in wanted:
        path = target / relative
        if not path.is_file() or not filecmp.cmp(source / relative, path, shallow=False):
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / relative, path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def main() -> int:
    """Prints the folder of the patched sources, or one line on stderr with the reason for a failure."""
    table = read_table()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", choices=[release.version for release in table], required=True)
    parser.add_argument("--patches", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--sdist", type=Path)
    arguments = parser.parse_args()
    (release,) = [release for release in table if release.version == arguments.release]
    try:
        print(prepare(release, arguments.patches, arguments.work, arguments.sdist))
    except SourceError as error:
        print(error, file=sys.stderr)
        return 1
    except (OSError, tarfile.TarError) as error:
        print(f"{error}; free disk space or remove {arguments.work}, then try again.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
