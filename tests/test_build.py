"""The build: what is in the binary and in the wheel, and what stops it, each in one line."""

import hashlib
import importlib.metadata
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

import llama_sources
import pytest

from adaskip_cpp.engine import library as _library

ROOT = Path(__file__).parent.parent
PIN = ROOT / "cmake" / "llama-cpp-python.txt"
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

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")


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
def test_library_finds_ggml_relative_to_itself() -> None:
    section = dynamic_section()
    assert section["runpath"] == ["$ORIGIN/../../llama_cpp/lib"]
    assert "rpath" not in section
    assert not [name for names in section.values() for name in names if name.startswith("/")]


@linux_only
def test_library_needs_ggml_but_no_backend() -> None:
    needed = {name for name in dynamic_section()["needed"] if "ggml" in name}
    assert needed == {"libggml.so.0", "libggml-base.so.0"}


@linux_only
def test_library_answers_for_the_one_that_libmtmd_needs() -> None:
    assert dynamic_section()["soname"] == ["libllama.so.0"]


def test_library_names_no_folder_of_the_build() -> None:
    content = _library.path().read_bytes()
    assert b"llama.cpp/src/" in content  # the assertions' file names are there, without the folder
    assert not re.search(rb"/(site-packages|pip-build-env\S*)/", content)
    for folder in (ROOT, Path(sys.prefix), Path.home()):
        # The character before tells a checkout in /src from llama.cpp/src.
        assert not re.search(rb"(?<![\w.-])" + re.escape(bytes(folder)) + rb"/", content), folder


def test_build_record_is_of_the_pinned_release() -> None:
    requirement = llama_sources.Requirement.read(PIN)
    information = _library.build_info()
    assert (information.llama_cpp_python, information.sdist_sha256) == (requirement.version, requirement.sha256)
    assert re.fullmatch(r"\d+\.\d+\.\d+", information.ggml)


def test_all_pins_agree() -> None:
    version = llama_sources.Requirement.read(PIN).version
    pins = re.findall(r'"llama-cpp-python(?:\[\w+\])?([^"]*)"', (ROOT / "pyproject.toml").read_text())
    assert pins == [f"=={version}"] * 3
    assert f"llama-cpp-python=={version}" in (importlib.metadata.requires("adaskip-cpp") or [])


# --- the wheel ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the checkout; shares the build folder, and so the objects, with the editable installation."""
    pytest.importorskip("scikit_build_core")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([*command, str(ROOT)], check=True, env=os.environ | {"PATH": tools_path()}, timeout=1800)
    (path,) = folder.iterdir()
    return path


@pytest.mark.slow
def test_wheel_serves_every_python_of_one_platform(wheel: Path) -> None:
    version = importlib.metadata.version("adaskip-cpp")
    assert re.fullmatch(rf"adaskip_cpp-{re.escape(version)}-py3-none-(linux|macosx)_\w+\.whl", wheel.name)


@pytest.mark.slow
def test_wheel_holds_our_library_and_nothing_of_ggml(wheel: Path) -> None:
    assert wheel.stat().st_size < 10e6
    names = zipfile.ZipFile(wheel).namelist()
    built = {name for name in names if name.startswith(("adaskip_cpp/lib/", "adaskip_cpp/include/"))}
    library = f"adaskip_cpp/lib/{_library.path().name}"
    assert built == {
        library,
        "adaskip_cpp/lib/LICENSE.llama.cpp",
        "adaskip_cpp/lib/build.json",
        "adaskip_cpp/include/adaskip.h",
    }
    assert [name for name in names if re.search(r"\.(so|dylib|dll|a)\b", name)] == [library]
    assert {name.split("/")[0] for name in names} == {
        "adaskip_cpp",
        f"adaskip_cpp-{wheel.name.split('-')[1]}.dist-info",
    }
    assert "adaskip_cpp/py.typed" in names


@pytest.mark.slow
def test_wheel_works_in_another_environment(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    here = Path(importlib.metadata.distribution("llama-cpp-python").locate_file(""))  # type: ignore[arg-type]
    (there,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    for entry in here.iterdir():
        if "adaskip" not in entry.name:
            (there / entry.name).symlink_to(entry)
    zipfile.ZipFile(wheel).extractall(there)
    code = "import adaskip_cpp, llama_cpp; print(llama_cpp.llama_cpp._lib._name); llama_cpp.llama_backend_init()"
    command = [str(tmp_path / "venv" / "bin" / "python"), "-c", code]
    loaded = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120).stdout
    assert Path(loaded.strip()) == there / "adaskip_cpp" / "lib" / _library.path().name


# --- the sources, on a tiny sdist -----------------------------------------------------------------------------------


@pytest.fixture
def tiny_sources(tmp_path: Path) -> Callable[..., Path]:
    """Prepares the sources of a tiny sdist under the given patches (contents by file name)."""
    sdist = tmp_path / "tiny.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        files = {"CMakeLists.txt": "", "src/one.cpp": "first\nsecond\nthird\n", "src/two.cpp": "", "docs/left_out": ""}
        for name, content in files.items():
            member = tarfile.TarInfo(f"llama_cpp_python-1.0/vendor/llama.cpp/{name}")
            member.size = len(content)
            archive.addfile(member, BytesIO(content.encode()))
    pin = tmp_path / "pin.txt"
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    pin.write_text(f"llama-cpp-python==1.0 --hash=sha256:{digest}\n")

    def prepare(**patches: str) -> Path:
        folder = tmp_path / "patches"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, content in patches.items():
            (folder / f"{name}.patch").write_text(content)
        (folder / "series").write_text("# comment\n" + "".join(f"{name}.patch\n" for name in patches))
        return llama_sources.prepare(pin, folder, tmp_path / "work", sdist)

    return prepare


def test_sources_hold_only_what_is_built(tiny_sources: Callable[..., Path]) -> None:
    root = tiny_sources()
    names = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert names == {"CMakeLists.txt", "src/one.cpp", "src/two.cpp"}


def test_patches_are_applied_in_order(tiny_sources: Callable[..., Path]) -> None:
    second = PATCH.replace(" second\n third", "+also inserted\n inserted").replace("@@ -1,3 +1,4", "@@ -1,2 +1,3")
    second = second.replace("+inserted\n+also", "+also")
    assert (
        tiny_sources(b=PATCH, a=second) / "src/one.cpp"
    ).read_text() == "first\nalso inserted\ninserted\nsecond\nthird\n"


def test_unchanged_patches_leave_every_file_untouched(tiny_sources: Callable[..., Path]) -> None:
    root = tiny_sources(a=PATCH)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert {path: path.stat().st_mtime_ns for path in tiny_sources(a=PATCH).rglob("*")} == before


def test_changed_patches_touch_only_what_they_change(tiny_sources: Callable[..., Path]) -> None:
    root = tiny_sources(a=PATCH)
    for path in root.rglob("*.cpp"):
        os.utime(path, ns=(0, 0))
    tiny_sources()
    assert (root / "src/one.cpp").read_text() == "first\nsecond\nthird\n"
    assert (root / "src/one.cpp").stat().st_mtime_ns > 0
    assert (root / "src/two.cpp").stat().st_mtime_ns == 0


@pytest.mark.parametrize(
    "patch",
    [
        PATCH.replace("second", "other"),
        PATCH.replace("one.cpp", "none.cpp"),
        PATCH.replace("@@ -1,3 +1,4 @@", "@@ -2,3 +2,4 @@"),
        "no patch at all\n",
        "",
    ],
    ids=["context differs", "no such file", "line differs", "not a patch", "empty"],
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


def test_python_without_llama_cpp_python_stops_with_one_line(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    line = reason(tmp_path / "build", f"Python3_EXECUTABLE={tmp_path / 'venv' / 'bin' / 'python'}")
    assert re.search(r"has no llama-cpp-python.*; pip install llama-cpp-python==[\d.]+\.$", line)


@pytest.mark.parametrize(
    ("version", "expected"),
    [("0.3.1", "llama-cpp-python 0.3.1 is installed but"), (None, "has no CMake package of ggml in")],
)
def test_unfit_llama_cpp_python_stops_with_one_line(tmp_path: Path, version: str | None, expected: str) -> None:
    version = version or llama_sources.Requirement.read(PIN).version
    information = tmp_path / f"llama_cpp_python-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {version}\n")
    line = reason(tmp_path / "build", PYTHONPATH=str(tmp_path))
    assert expected in line
    assert "; pip install" in line


def test_unreachable_registry_stops_with_one_line(tmp_path: Path) -> None:
    line = reason(tmp_path / "build", **registry(tmp_path))
    assert re.search(r"^pip cannot download llama_cpp_python-.*check the network.*-DADASKIP_SDIST=FILE\.$", line)


def test_download_with_another_hash_stops_with_one_line(tmp_path: Path) -> None:
    (tmp_path / llama_sources.Requirement.read(PIN).filename).write_bytes(b"something else")
    line = reason(tmp_path / "build", **registry(tmp_path))
    assert re.search(r"^the downloaded .* is not the pinned file .*; check the package index", line)


def test_given_sdist_with_another_hash_stops_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "sdist").write_bytes(b"something else")
    line = reason(tmp_path / "build", f"ADASKIP_SDIST={tmp_path / 'sdist'}")
    assert re.search(r"is not the pinned llama_cpp_python-.* give that file\.$", line)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pinned sdist, from the checkout's build folder or through pip."""
    filename = llama_sources.Requirement.read(PIN).filename
    folder = next((path.parent for path in ROOT.glob(f"build/*/{filename}")), tmp_path_factory.mktemp("sdist"))
    return llama_sources.fetch(PIN, folder)


def test_patch_that_does_not_apply_stops_with_one_line(tmp_path: Path, sdist: Path) -> None:
    (tmp_path / "series").write_text("bad.patch\n")
    (tmp_path / "bad.patch").write_text(PATCH.replace("one.cpp", "llama-graph.cpp"))
    line = reason(tmp_path / "build", f"ADASKIP_SDIST={sdist}", f"ADASKIP_PATCHES={tmp_path}")
    assert line.startswith("patch bad.patch does not apply to llama.cpp")


def test_patch_that_is_missing_stops_with_one_line(tmp_path: Path, sdist: Path) -> None:
    (tmp_path / "series").write_text("gone.patch\n")
    line = reason(tmp_path / "build", f"ADASKIP_SDIST={sdist}", f"ADASKIP_PATCHES={tmp_path}")
    assert "lists gone.patch, which does not exist; restore the file" in line


@pytest.mark.slow
def test_configuring_twice_changes_no_source(tmp_path: Path, sdist: Path) -> None:
    times = []
    for _ in range(2):
        result = configure(tmp_path, f"ADASKIP_SDIST={sdist}")
        assert result.returncode == 0, result.stderr
        times.append({path: path.stat().st_mtime_ns for path in (tmp_path / "llama.cpp").rglob("*")})
    assert times[0] == times[1]
    assert len(times[0]) > 100
