"""The build: which release it is for, its sources, and what stops it, each in one line."""

import hashlib
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from types import ModuleType

import llama_sources
import pytest
import releases

from adaskip_cpp.engine import library as _library

ROOT = Path(__file__).parents[2]
PATCH = """A reason.
---
--- a/src/one.cpp
+++ b/src/one.cpp
@@ -1,3 +1,4 @@
 first
+inserted
 second
 third
"""

TWICE = """---
--- a/src/twice.cpp
+++ b/src/twice.cpp
@@ -1,1 +1,2 @@
 same
+inserted
"""

TABLE = [releases.Release("2.1", "b" * 64), releases.Release("2.0", "a" * 64)]


@pytest.fixture(autouse=True)
def no_release_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(releases.VARIABLE, raising=False)


def installed_release() -> releases.Release:
    version = importlib.metadata.version("llama-cpp-python").partition("+")[0]
    (release,) = [release for release in releases.read_table() if release.version == version]
    return release


def pretend(folder: Path, version: str) -> Path:
    """Makes ``folder`` a site-packages whose metadata say that llama-cpp-python ``version`` is installed."""
    information = folder / f"llama_cpp_python-{version.partition('+')[0]}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {version}\n")
    return folder


def test_build_record_is_of_the_installed_release_which_the_installation_requires() -> None:
    release = installed_release()
    record = json.loads(_library.path().with_name("build.json").read_text())
    assert (record["llama_cpp_python"], record["sdist_sha256"]) == (release.version, release.sha256)
    assert re.fullmatch(r"\d+\.\d+\.\d+", record["ggml"])
    assert _library.release() == release.version
    required = importlib.metadata.requires("adaskip-cpp") or []
    exact = f"=={release.version}"
    ours = [f"llama-cpp-python{exact}", f'llama-cpp-python[server]{exact}; extra == "serve"']
    assert [line for line in required if "llama-cpp-python" in line] == ours
    assert "cffi>=1.16" in required, "what pyproject.toml itself lists"


def test_table_lists_releases_newest_first_in_lines_that_pip_reads(tmp_path: Path) -> None:
    versions = [tuple(map(int, release.version.split("."))) for release in releases.read_table()]
    assert versions == sorted(set(versions), reverse=True)
    table = tmp_path / "releases.txt"
    table.write_text("# newest first\n" + "".join(f"{release.requirement}\n" for release in TABLE))
    assert releases.read_table(table) == TABLE
    assert TABLE[0].requirement == f"llama-cpp-python==2.1 --hash=sha256:{'b' * 64}"
    for content in ("\n", f"{TABLE[0].requirement}\nllama-cpp-python==2.2\n"):
        table.write_text(content)
        with pytest.raises(releases.ReleaseError, match=r"is no list of releases; write lines of"):
            releases.read_table(table)


@pytest.mark.parametrize("there", ["2.0+cu124", None])
def test_isolated_build_finds_what_is_installed_outside(tmp_path: Path, there: str | None) -> None:
    """pip builds a project for another environment; its backend only tells what it found."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    if there:
        pretend(packages, there)
    project = tmp_path / "project"
    project.mkdir()
    shutil.copy(releases.__file__, project)
    (project / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "tell"\nbackend-path = ["."]\n'
    )
    (project / "tell.py").write_text(
        "import importlib.metadata, pathlib, sys, releases\n"
        "def get_requires_for_build_wheel(config_settings=None):\n"
        "    inside = list(importlib.metadata.distributions(name='llama-cpp-python'))\n"
        "    found = [(one.version, str(one.folder)) for one in releases.installed()]\n"
        "    pathlib.Path('told').write_text(repr((len(inside), found)))\n"
        "    sys.exit(1)\n"
    )
    # The developer's own site-packages, on the paths of the user's site, would be found too.
    command = [sys.executable, "-m", "pip", "--python", str(tmp_path / "venv"), "wheel", "--no-index", str(project)]
    subprocess.run(command, cwd=project, capture_output=True, check=False, timeout=120)
    assert eval((project / "told").read_text()) == (0, [("2.0", str(packages))] if there else [])


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., ModuleType]:
    """``backend(*found, named=None)``: the build backend, of the table above; these are installed, that is named."""
    pytest.importorskip("scikit_build_core")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(releases, "read_table", lambda: TABLE)

    def backend_(*found: str, named: str | None = None) -> ModuleType:
        monkeypatch.setattr(releases, "installed", lambda: [releases.Installed(one, tmp_path) for one in found])
        if named:
            monkeypatch.setenv(releases.VARIABLE, named)
        return importlib.import_module("backend")

    return backend_


@pytest.mark.parametrize(
    ("found", "named", "chosen"),
    [
        ([], None, "2.1"),
        (["2.0"], None, "2.0"),
        (["2.0"], "2.1", "2.1"),
        (["2.1", "2.0"], None, "2.1"),
        (["2.1", "2.0"], "2.0", "2.0"),
    ],
)
def test_build_requires_the_named_or_installed_or_newest_release_unless_it_is_installed(
    backend: Callable[..., ModuleType], found: list[str], named: str | None, chosen: str
) -> None:
    built = backend(*found, named=named)
    for requires in (built.get_requires_for_build_wheel, built.get_requires_for_build_editable):
        ours = [requirement for requirement in requires() if "llama" in requirement]
        assert ours == ([] if chosen in found else [f"llama-cpp-python=={chosen}"])
    assert built.dynamic_metadata({}, {})["dependencies"] == [f"llama-cpp-python=={chosen}"]


@pytest.mark.parametrize(
    ("found", "named", "said"),
    [
        (
            ["1.9"],
            None,
            "llama-cpp-python 1.9 is installed, but adaskip-cpp can be built for 2.1, 2.0; pip install .*2.1",
        ),
        (
            ["2.0"],
            "1.9",
            "ADASKIP_LLAMA_CPP_PYTHON names llama-cpp-python 1.9, but .* or add 1.9 to cmake/releases.txt",
        ),
        ([], None, "has no llama-cpp-python, whose ggml libllama is linked to; pip install llama-cpp-python==2.1"),
        (["2.0"], "2.1", "2.0 is installed, but ADASKIP_LLAMA_CPP_PYTHON names 2.1; pip install llama-cpp-python==2.1"),
    ],
)
def test_build_without_a_fitting_release_ends_in_one_line(
    backend: Callable[..., ModuleType],
    found: list[str],
    named: str | None,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    built = backend(*found, named=named)
    assert releases.main() == 1
    line = capsys.readouterr().err
    assert re.search(said, line) and line.count("\n") == 1
    if "1.9" in said:
        with pytest.raises(SystemExit) as ended:
            built.get_requires_for_build_wheel()
        assert f"{ended.value.code}\n" == f"adaskip-cpp: {line}"


def test_sdist_is_of_no_release(backend: Callable[..., ModuleType], tmp_path: Path) -> None:
    built = backend()
    assert not [requirement for requirement in built.get_requires_for_build_sdist() if "llama" in requirement]
    with tarfile.open(tmp_path / built.build_sdist(str(tmp_path))) as archive:
        (folder,) = {name.split("/")[0] for name in archive.getnames()}
        names = {name.removeprefix(f"{folder}/") for name in archive.getnames()}
        information = archive.extractfile(f"{folder}/PKG-INFO")
        assert information is not None
        lines = information.read().decode().splitlines()
    assert {"Dynamic: Requires-Dist", "Dynamic: Provides-Extra"} <= set(lines)
    assert {"cmake/backend.py", "cmake/releases.py", "cmake/releases.txt", "patches/series"} <= names


@pytest.fixture
def tiny_sources(tmp_path: Path) -> Callable[..., Path]:
    """Prepares the sources of a tiny sdist under patches, given as contents by name."""
    sdist = tmp_path / "tiny.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        files = {
            "CMakeLists.txt": "",
            "src/one.cpp": "first\nsecond\nthird\n",
            "src/two.cpp": "",
            "src/twice.cpp": "same\nother\nsame\n",
            "docs/left_out": "",
        }
        for name, content in files.items():
            member = tarfile.TarInfo(f"llama_cpp_python-1.0/vendor/llama.cpp/{name}")
            member.size = len(content)
            archive.addfile(member, BytesIO(content.encode()))
    release = releases.Release("1.0", hashlib.sha256(sdist.read_bytes()).hexdigest())

    def prepare(**patches: str) -> Path:
        folder = tmp_path / "patches"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, content in patches.items():
            (folder / f"{name}.patch").write_text(content)
        (folder / "series").write_text("# comment\n" + "".join(f"{name}.patch\n" for name in patches))
        return llama_sources.prepare(release, folder, tmp_path / "work", sdist)

    return prepare


def test_patches_are_applied_in_order_and_each_hunk_where_its_lines_are(tiny_sources: Callable[..., Path]) -> None:
    before = PATCH.replace("@@ -1,3 +1,4 @@\n first\n+inserted\n second\n", "@@ -1,1 +1,3 @@\n+above\n+above\n first\n")
    second = PATCH.replace(" second\n third", "+also inserted\n inserted").replace("@@ -1,3 +1,4", "@@ -1,2 +1,3")
    second = second.replace("+inserted\n+also", "+also")
    root = tiny_sources(c=before.replace(" third\n", ""), b=PATCH, a=second)
    assert (root / "src/one.cpp").read_text() == "above\nabove\nfirst\nalso inserted\ninserted\nsecond\nthird\n"
    names = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert names == {"CMakeLists.txt", "src/one.cpp", "src/two.cpp", "src/twice.cpp"}, "only what is built"


def test_only_what_changed_patches_change_is_touched(tiny_sources: Callable[..., Path]) -> None:
    root = tiny_sources(a=PATCH)
    for path in root.rglob("*.cpp"):
        os.utime(path, ns=(0, 0))
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert {path: path.stat().st_mtime_ns for path in tiny_sources(a=PATCH).rglob("*")} == before
    tiny_sources()
    assert (root / "src/one.cpp").read_text() == "first\nsecond\nthird\n"
    assert (root / "src/one.cpp").stat().st_mtime_ns > 0
    assert (root / "src/two.cpp").stat().st_mtime_ns == 0


@pytest.mark.parametrize(
    "patch",
    [PATCH, PATCH.replace("second", "other"), PATCH.replace("one.cpp", "none.cpp"), TWICE, "no patch at all\n", ""],
    ids=["applied before", "context differs", "no such file", "lines twice", "not a patch", "empty"],
)
def test_patch_that_does_not_apply_is_named_and_leaves_the_sources(
    tiny_sources: Callable[..., Path], patch: str
) -> None:
    root = tiny_sources(a=PATCH)
    with pytest.raises(llama_sources.SourceError, match=r"^patch bad\.patch does not apply .* regenerate it"):
        tiny_sources(a=PATCH, bad=patch)
    assert "inserted" in (root / "src/one.cpp").read_text()
    assert tiny_sources(a=PATCH) == root


def test_patch_that_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "series").write_text("gone.patch\n")
    with pytest.raises(llama_sources.SourceError, match=r"lists gone\.patch, which does not exist; restore the file"):
        llama_sources.read_series(tmp_path)


def reason(folder: Path, *definitions: str, **environment: str) -> str:
    """The one line with which configuring stops."""
    command = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(folder)]
    command += [f"-D{definition}" for definition in (f"Python3_EXECUTABLE={sys.executable}", *definitions)]
    variables = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "PYTHONPATH")}
    variables |= {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])} | environment
    result = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode != 0
    (line,) = [line for line in result.stderr.splitlines() if "adaskip-cpp: " in line]
    assert result.stderr.count("CMake Error") == 1, result.stderr
    return line.partition("adaskip-cpp: ")[2]


def registry(folder: Path) -> dict[str, str]:
    """Environment in which pip knows ``folder`` alone, and an index that refuses connections."""
    return {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_FIND_LINKS": str(folder),
        "PIP_RETRIES": "0",
        "PIP_NO_CACHE_DIR": "1",
    }


@pytest.mark.parametrize("variable", ["CC", "CXX"])
def test_missing_compiler_stops_with_one_line(tmp_path: Path, variable: str) -> None:
    line = reason(tmp_path, **{variable: "/nonexistent/compiler"})
    assert line.startswith(f"no working {variable.replace('CC', 'C')} compiler found; install one")


def test_llama_cpp_python_without_ggml_for_cmake_stops_with_one_line(tmp_path: Path) -> None:
    packages = pretend(tmp_path / "packages", installed_release().version)
    line = reason(tmp_path / "build", PYTHONPATH=str(packages))
    assert "has no CMake package of ggml in" in line and "; pip install" in line


def test_unreachable_registry_and_a_file_with_another_hash_stop_with_one_line(tmp_path: Path) -> None:
    line = reason(tmp_path / "build", **registry(tmp_path))
    assert re.search(r"^pip cannot download llama_cpp_python-.*check the network.*-DADASKIP_SDIST=FILE\.$", line)
    wrong = tmp_path / installed_release().filename
    wrong.write_bytes(b"something else")
    line = reason(tmp_path / "downloaded", **registry(tmp_path))
    assert re.search(r"^the downloaded .* is not the file of the table .*; check the package index", line)
    line = reason(tmp_path / "given", f"ADASKIP_SDIST={wrong.rename(tmp_path / 'sdist')}")
    assert re.search(r"is not llama_cpp_python-.* give that file\.$", line)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed release's sdist, from the checkout's build folder or through pip."""
    release = installed_release()
    folder = next((path.parent for path in ROOT.glob(f"build/*/{release.filename}")), tmp_path_factory.mktemp("sdist"))
    return llama_sources.fetch(release, folder)


def test_what_pip_sets_for_our_backend_is_not_for_that_of_the_sdist(
    tmp_path: Path, sdist: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama-cpp-python's metadata is prepared by the pip that we start; an in-tree backend of ours is none of its."""
    for name, value in registry(sdist.parent).items():
        monkeypatch.setenv(name, value)
    for name in ("PEP517_BACKEND_PATH", "_PYPROJECT_HOOKS_BACKEND_PATH"):  # of pip up to 23.2, and since
        monkeypatch.setenv(name, str(ROOT / "cmake"))
    assert llama_sources.fetch(installed_release(), tmp_path).read_bytes() == sdist.read_bytes()
