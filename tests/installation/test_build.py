"""The build: what is in the binary and in the wheel, and what stops it, each in one line."""

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
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

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

# Written out by hand: what is installed, and what the table lists, is not what these tests are about.
TABLE = [releases.Release("2.1", "b" * 64), releases.Release("2.0", "a" * 64)]

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")


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


@pytest.fixture
def venv(tmp_path: Path) -> tuple[Path, Path]:
    """The Python of an environment with nothing in it, and its site-packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    return tmp_path / "venv" / "bin" / "python", packages


# --- the binary ---------------------------------------------------------------------------------------------------


def dynamic_section() -> dict[str, list[str]]:
    """Strings of the library's dynamic section, by tag."""
    from elftools.elf.elffile import ELFFile

    strings: dict[str, list[str]] = {}
    with _library.path().open("rb") as file:
        for tag in ELFFile(file).get_section_by_name(".dynamic").iter_tags():
            for attribute in ("needed", "soname", "rpath", "runpath"):
                if hasattr(tag, attribute):
                    strings.setdefault(attribute, []).append(getattr(tag, attribute))
    return strings


@linux_only
def test_library_finds_ggml_relative_to_itself_and_answers_for_the_one_that_libmtmd_needs() -> None:
    section = dynamic_section()
    assert section["runpath"] == ["$ORIGIN/../../llama_cpp/lib"]
    assert "rpath" not in section
    assert not [name for names in section.values() for name in names if name.startswith("/")]
    needed = {name for name in section["needed"] if "ggml" in name}
    assert needed == {"libggml.so.0", "libggml-base.so.0"}, "and no backend"
    assert section["soname"] == ["libllama.so.0"]


def test_library_names_no_folder_of_the_build() -> None:
    content = _library.path().read_bytes()
    assert b"llama.cpp/src/" in content  # the assertions' file names are there, without the folder
    assert not re.search(rb"/(site-packages|pip-build-env\S*)/", content)
    for folder in (ROOT, Path(sys.prefix), Path.home()):
        # The character before tells a checkout in /src from llama.cpp/src.
        assert not re.search(rb"(?<![\w.-])" + re.escape(bytes(folder)) + rb"/", content), folder


def test_build_record_is_of_the_installed_release_which_the_installation_requires() -> None:
    release = installed_release()
    record = json.loads(_library.path().with_name("build.json").read_text())
    assert (record["llama_cpp_python"], record["sdist_sha256"]) == (release.version, release.sha256)
    assert re.fullmatch(r"\d+\.\d+\.\d+", record["ggml"])
    assert _library.release() == release.version
    required = [line for line in importlib.metadata.requires("adaskip-cpp") or [] if "llama-cpp-python" in line]
    exact = f"=={release.version}"
    assert required == [f"llama-cpp-python{exact}", f'llama-cpp-python[server]{exact}; extra == "serve"']


# --- which release ------------------------------------------------------------------------------------------------


def test_table_lists_releases_newest_first() -> None:
    versions = [tuple(map(int, release.version.split("."))) for release in releases.read_table()]
    assert versions == sorted(set(versions), reverse=True)


def test_table_is_of_lines_that_pip_reads(tmp_path: Path) -> None:
    table = tmp_path / "releases.txt"
    table.write_text("# newest first\n" + "".join(f"{release.requirement}\n" for release in TABLE))
    assert releases.read_table(table) == TABLE
    assert TABLE[0].requirement == f"llama-cpp-python==2.1 --hash=sha256:{'b' * 64}"


@pytest.mark.parametrize("line", ["", "llama-cpp-python==2.2", f"llama-cpp-python>=2.2 --hash=sha256:{'c' * 64}"])
def test_line_without_version_and_hash_is_refused(tmp_path: Path, line: str) -> None:
    table = tmp_path / "releases.txt"
    table.write_text(f"{line}\n" if not line else f"{TABLE[0].requirement}\n{line}\n")
    with pytest.raises(releases.ReleaseError, match=r"is no list of releases; write lines of"):
        releases.read_table(table)


@pytest.mark.parametrize(
    ("found", "named", "chosen"),
    [
        ([], None, "2.1"),
        (["2.0"], None, "2.0"),
        (["2.0"], "2.1", "2.1"),
        (["2.1", "2.0"], None, "2.1"),
        ([], "2.0", "2.0"),
    ],
    ids=["none installed", "one installed", "another is named", "two installed", "none installed, one named"],
)
def test_release_is_the_named_one_or_the_installed_one_or_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: list[str], named: str | None, chosen: str
) -> None:
    if named:
        monkeypatch.setenv(releases.VARIABLE, named)
    assert releases.choose(TABLE, [releases.Installed(version, tmp_path) for version in found]).version == chosen


@pytest.mark.parametrize("named", [False, True])
def test_release_that_is_not_in_the_table_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    if named:
        monkeypatch.setenv(releases.VARIABLE, "1.9")
    with pytest.raises(releases.ReleaseError) as raised:
        releases.choose(TABLE, [releases.Installed("2.0" if named else "1.9", tmp_path)])
    said = "ADASKIP_LLAMA_CPP_PYTHON names llama-cpp-python 1.9" if named else "llama-cpp-python 1.9 is installed"
    assert str(raised.value) == (
        f"{said}, but adaskip-cpp can be built for 2.1, 2.0; pip install llama-cpp-python==2.1, or add 1.9 to "
        "cmake/releases.txt with patches that apply to it, as CONTRIBUTING.md says."
    )


@pytest.mark.parametrize("there", ["2.0", "2.0+cu124", None])
def test_isolated_build_finds_what_is_installed_outside(
    tmp_path: Path, venv: tuple[Path, Path], there: str | None
) -> None:
    """pip builds a project for another environment; its backend only tells what it found."""
    _, packages = venv
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
def backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The build backend in the checkout, of the table that is written out here."""
    pytest.importorskip("scikit_build_core")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(releases, "read_table", lambda: TABLE)
    return importlib.import_module("backend")


@pytest.mark.parametrize(
    ("found", "named", "required"),
    [([], None, "2.1"), (["2.0"], None, None), (["2.0"], "2.1", "2.1"), (["2.1", "2.0"], "2.0", None)],
    ids=["none installed", "one installed", "another is named", "the named one is installed"],
)
def test_build_requires_the_release_unless_it_is_installed(
    backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: Any, named: Any, required: Any
) -> None:
    monkeypatch.setattr(releases, "installed", lambda: [releases.Installed(one, tmp_path) for one in found])
    if named:
        monkeypatch.setenv(releases.VARIABLE, named)
    for requires in (backend.get_requires_for_build_wheel, backend.get_requires_for_build_editable):
        ours = [requirement for requirement in requires() if "llama" in requirement]
        assert ours == ([f"llama-cpp-python=={required}"] if required else [])


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_metadata_require_the_release_that_is_built_for(
    backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(releases, "installed", lambda: [releases.Installed("2.0", tmp_path)])
    name = getattr(backend, f"prepare_metadata_for_build_{kind}")(str(tmp_path))
    required = importlib.metadata.Distribution.at(tmp_path / name).requires or []
    assert [line for line in required if "llama-cpp-python" in line] == [
        "llama-cpp-python==2.0",
        'llama-cpp-python[server]==2.0; extra == "serve"',
    ]
    assert "cffi>=1.16" in required  # what pyproject.toml itself lists


def test_build_for_a_release_that_is_not_in_the_table_ends_in_one_line(
    backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(releases, "installed", lambda: [releases.Installed("1.9", tmp_path)])
    with pytest.raises(SystemExit, match=r"^adaskip-cpp: llama-cpp-python 1\.9 is installed, but [^\n]* says\.$"):
        backend.get_requires_for_build_wheel()


def test_sdist_is_of_no_release(backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(releases, "installed", list)
    assert not [requirement for requirement in backend.get_requires_for_build_sdist() if "llama" in requirement]
    with tarfile.open(tmp_path / backend.build_sdist(str(tmp_path))) as archive:
        (folder,) = {name.split("/")[0] for name in archive.getnames()}
        names = {name.removeprefix(f"{folder}/") for name in archive.getnames()}
        information = archive.extractfile(f"{folder}/PKG-INFO")
        assert information is not None
        lines = information.read().decode().splitlines()
    assert {"Dynamic: Requires-Dist", "Dynamic: Provides-Extra"} <= set(lines)
    assert {"cmake/backend.py", "cmake/releases.py", "cmake/releases.txt", "patches/series"} <= names


# --- the wheel ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the checkout; shares the build folder, and so the objects, with the editable installation."""
    import fcntl

    pytest.importorskip("scikit_build_core")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    with open(tmp_path_factory.getbasetemp().parent / "wheel.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two processes of tests would build in one folder
        subprocess.run([*command, str(ROOT)], check=True, env=os.environ | {"PATH": tools_path()}, timeout=1800)
    (path,) = folder.iterdir()
    return path


@pytest.mark.slow
def test_wheel_serves_every_python_of_one_platform_and_holds_our_library_and_nothing_of_ggml(wheel: Path) -> None:
    version = importlib.metadata.version("adaskip-cpp")
    assert re.fullmatch(rf"adaskip_cpp-{re.escape(version)}-py3-none-(linux|macosx)_\w+\.whl", wheel.name)
    assert wheel.stat().st_size < 10e6
    names = zipfile.ZipFile(wheel).namelist()
    library = f"adaskip_cpp/lib/{_library.path().name}"
    built = {name for name in names if name.startswith(("adaskip_cpp/lib/", "adaskip_cpp/include/"))}
    others = {"adaskip_cpp/lib/LICENSE.llama.cpp", "adaskip_cpp/lib/build.json", "adaskip_cpp/include/adaskip.h"}
    assert built == {library, *others}
    assert [name for name in names if re.search(r"\.(so|dylib|dll|a)\b", name)] == [library]
    information = f"adaskip_cpp-{wheel.name.split('-')[1]}.dist-info"
    assert {name.split("/")[0] for name in names} == {"adaskip_cpp", information}
    assert "adaskip_cpp/py.typed" in names
    with zipfile.ZipFile(wheel) as archive:
        built_for = json.loads(archive.read("adaskip_cpp/lib/build.json"))["llama_cpp_python"]
        metadata = archive.read(f"{information}/METADATA").decode()
    required = re.findall(r"^Requires-Dist: llama-cpp-python(?:\[server\])?==([^\s;]*)", metadata, re.MULTILINE)
    assert required == [built_for] * 2


@pytest.mark.slow
def test_wheel_works_in_another_environment(wheel: Path, tmp_path: Path, venv: tuple[Path, Path]) -> None:
    here = Path(importlib.metadata.distribution("llama-cpp-python").locate_file(""))  # type: ignore[arg-type]
    python, there = venv
    for entry in here.iterdir():
        if "adaskip" not in entry.name:
            (there / entry.name).symlink_to(entry)
    zipfile.ZipFile(wheel).extractall(there)
    code = "import adaskip_cpp, llama_cpp; print(llama_cpp.llama_cpp._lib._name); llama_cpp.llama_backend_init()"
    command = [str(python), "-c", code]
    loaded = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120).stdout
    assert Path(loaded.strip()) == there / "adaskip_cpp" / "lib" / _library.path().name


# --- the sources, on a tiny sdist -----------------------------------------------------------------------------------


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


def test_sources_hold_only_what_is_built(tiny_sources: Callable[..., Path]) -> None:
    root = tiny_sources()
    names = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert names == {"CMakeLists.txt", "src/one.cpp", "src/two.cpp", "src/twice.cpp"}


def test_a_hunk_is_applied_where_its_lines_are(tiny_sources: Callable[..., Path]) -> None:
    before = PATCH.replace("@@ -1,3 +1,4 @@\n first\n+inserted\n second\n", "@@ -1,1 +1,3 @@\n+above\n+above\n first\n")
    root = tiny_sources(a=before.replace(" third\n", ""), b=PATCH)
    assert (root / "src/one.cpp").read_text() == "above\nabove\nfirst\ninserted\nsecond\nthird\n"


def test_patches_are_applied_in_order(tiny_sources: Callable[..., Path]) -> None:
    second = PATCH.replace(" second\n third", "+also inserted\n inserted").replace("@@ -1,3 +1,4", "@@ -1,2 +1,3")
    second = second.replace("+inserted\n+also", "+also")
    assert (
        tiny_sources(b=PATCH, a=second) / "src/one.cpp"
    ).read_text() == "first\nalso inserted\ninserted\nsecond\nthird\n"


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
    [PATCH.replace("second", "other"), PATCH.replace("one.cpp", "none.cpp"), TWICE, "no patch at all\n", ""],
    ids=["context differs", "no such file", "lines twice", "not a patch", "empty"],
)
def test_patch_that_does_not_apply_is_named_and_leaves_the_sources(
    tiny_sources: Callable[..., Path], patch: str
) -> None:
    root = tiny_sources(a=PATCH)
    with pytest.raises(llama_sources.SourceError, match=r"^patch bad\.patch does not apply .* regenerate it"):
        tiny_sources(a=PATCH, bad=patch)
    assert "inserted" in (root / "src/one.cpp").read_text()
    assert tiny_sources(a=PATCH) == root


def test_patch_applied_twice_is_refused(tiny_sources: Callable[..., Path]) -> None:
    with pytest.raises(llama_sources.SourceError, match=r"patch again\.patch does not apply"):
        tiny_sources(a=PATCH, again=PATCH)


# --- what stops CMake -------------------------------------------------------------------------------------------------


def tools_path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def configure(folder: Path, *definitions: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(folder)]
    command += [f"-D{definition}" for definition in (f"Python3_EXECUTABLE={sys.executable}", *definitions)]
    variables = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "PYTHONPATH")}
    variables |= {"PATH": tools_path()} | environment
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=300)


def reason(folder: Path, *definitions: str, **environment: str) -> str:
    """The one line with which configuring stops."""
    result = configure(folder, *definitions, **environment)
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


def test_python_without_the_named_or_any_llama_cpp_python_stops_with_one_line(
    tmp_path: Path, venv: tuple[Path, Path]
) -> None:
    python = f"Python3_EXECUTABLE={venv[0]}"
    line = reason(tmp_path / "build", python)
    assert re.search(r"has no llama-cpp-python.*; pip install llama-cpp-python==[\d.]+\.$", line)
    version = releases.read_table()[0].version
    pretend(venv[1], "0.3.1")
    assert reason(tmp_path / "again", python, ADASKIP_LLAMA_CPP_PYTHON=version) == (
        f"llama-cpp-python 0.3.1 is installed, but ADASKIP_LLAMA_CPP_PYTHON names {version}; "
        f"pip install llama-cpp-python=={version}."
    )


@pytest.mark.parametrize(
    ("version", "expected"),
    [("0.3.1", "llama-cpp-python 0.3.1 is installed, but"), (None, "has no CMake package of ggml in")],
)
def test_unfit_llama_cpp_python_stops_with_one_line(tmp_path: Path, version: str | None, expected: str) -> None:
    packages = pretend(tmp_path / "packages", version or installed_release().version)
    line = reason(tmp_path / "build", PYTHONPATH=str(packages))
    assert expected in line
    assert "; pip install" in line


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


def test_patch_that_does_not_apply_or_is_missing_stops_with_one_line(tmp_path: Path, sdist: Path) -> None:
    definitions = f"ADASKIP_SDIST={sdist}", f"ADASKIP_PATCHES={tmp_path}"
    (tmp_path / "series").write_text("bad.patch\n")
    (tmp_path / "bad.patch").write_text(PATCH.replace("one.cpp", "llama-graph.cpp"))
    assert reason(tmp_path / "build", *definitions).startswith("patch bad.patch does not apply to llama.cpp")
    (tmp_path / "series").write_text("gone.patch\n")
    line = reason(tmp_path / "again", *definitions)
    assert "lists gone.patch, which does not exist; restore the file" in line


@pytest.mark.slow
def test_configuring_twice_changes_no_source_and_tells_native_code_the_release(tmp_path: Path, sdist: Path) -> None:
    times = []
    for _ in range(2):
        result = configure(tmp_path, f"ADASKIP_SDIST={sdist}")
        assert result.returncode == 0, result.stderr
        times.append({path: path.stat().st_mtime_ns for path in (tmp_path / "llama.cpp").rglob("*")})
    assert times[0] == times[1]
    assert len(times[0]) > 100
    number = installed_release().version.split(".")[2]
    assert set(re.findall(r"-DADASKIP_RELEASE=(\S*)", (tmp_path / "build.ninja").read_text())) == {number}
