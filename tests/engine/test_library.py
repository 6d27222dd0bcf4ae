"""``import adaskip_cpp`` puts our libllama under llama-cpp-python, or says why it cannot and what to do."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from faults.preloaded import build

import adaskip_cpp
from adaskip_cpp.engine import binding as _binding
from adaskip_cpp.engine import library as _library
from adaskip_cpp.errors import LibraryError

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")

# A copy of the package is imported by its path: the finder of an editable installation would prefer the original.
BY_PATH = "import sys; sys.meta_path = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]\n"
MAPPED = "{line.split()[-1] for line in open('/proc/self/maps') if '/lib' + name in line}"


def run(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` in a fresh Python in ``folder``, away from the sources."""
    variables = {name: value for name, value in os.environ.items() if name not in ("LLAMA_CPP_LIB_PATH", "PYTHONPATH")}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=folder, env=variables | environment, capture_output=True, text=True, check=False, timeout=120
    )


def output(code: str, folder: Path, **environment: str) -> str:
    result = run(code, folder, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def error(code: str, folder: Path, **environment: str) -> str:
    """The last line on stderr of ``code``, which must fail."""
    result = run(code, folder, **environment)
    assert result.returncode != 0, result.stdout
    return result.stderr.strip().splitlines()[-1]


def distribution(folder: Path, version: str) -> str:
    """A PYTHONPATH on which llama-cpp-python's metadata say ``version``."""
    information = folder / f"llama_cpp_python-{version.partition('+')[0]}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {version}\n")
    return str(folder)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package with what was built, copied to a folder of its own, to be damaged by a test."""
    target = tmp_path / "copy" / "adaskip_cpp"
    for folder in adaskip_cpp.__path__:
        shutil.copytree(folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def test_source_code_in_front_of_an_installation_is_refused_with_both_ways_out(tmp_path: Path) -> None:
    """As in a clone in which ``pip install .`` was run: Python looks into the current folder first."""
    sources = Path(_library.__file__).parent.parent
    shutil.copytree(sources, tmp_path / "adaskip_cpp", ignore=shutil.ignore_patterns("__pycache__", "lib", "include"))
    (tmp_path / "CMakeLists.txt").touch()
    said = run(BY_PATH + "import adaskip_cpp", tmp_path).stderr
    assert "LibraryError: Python found the source code in" in said
    assert "start Python in another folder, or run 'pip install -e .' in this one." in said


@linux_only
def test_server_and_multimodal_share_our_library(tmp_path: Path) -> None:
    code = (
        "import adaskip_cpp, llama_cpp.server.app, llama_cpp.mtmd_cpp\n"
        f"for name in ('llama.', 'mtmd.', 'ggml.', 'ggml-base.'): print(*{MAPPED})"
    )
    llama, *others = output(code, tmp_path).splitlines()
    assert Path(llama).samefile(_library.path())
    assert [len(line.split()) for line in others] == [1, 1, 1]
    assert {Path(line).parent.parent.name for line in others} == {"llama_cpp"}


@linux_only
def test_library_finds_ggml_by_itself(tmp_path: Path) -> None:
    code = f"import ctypes; ctypes.CDLL({str(_library.path())!r}); name = 'ggml.'; print(*{MAPPED})"
    assert Path(output(code, tmp_path)).parent.parent.name == "llama_cpp"


OURS = pytest.mark.skipif(sys.platform == "win32", reason="a DLL names no folder: the package opens ggml first")


@pytest.mark.parametrize(
    ("first", "before"),
    [("", None), ("", "/elsewhere"), pytest.param("llama_cpp, ", str(_library.path().parent), marks=OURS)],
)
def test_it_is_imported_for_any_backend_and_leaves_no_variable(first: str, before: str | None, tmp_path: Path) -> None:
    code = f"import {first}adaskip_cpp, os; print(os.environ.get('LLAMA_CPP_LIB_PATH'))"
    environment = {"PYTHONPATH": distribution(tmp_path, f"{_library.release()}+cu124")}
    if before is not None:
        environment["LLAMA_CPP_LIB_PATH"] = before
    assert output(code, tmp_path, **environment) == str(before)


NONE = """
import importlib.metadata as m
def version(name): raise m.PackageNotFoundError(name)
m.version = version
import adaskip_cpp
"""


@pytest.mark.parametrize(
    ("code", "version", "why"),
    [
        ("import llama_cpp, adaskip_cpp", None, "llama_cpp was imported before adaskip_cpp .*import adaskip_cpp first"),
        (NONE, None, "llama-cpp-python is not installed; run 'pip install llama-cpp-python=="),
        ("import adaskip_cpp", "0.3.1", "llama-cpp-python 0.3.1 is installed.* run 'pip install llama-cpp-python=={}'"),
    ],
)
def test_what_it_cannot_be_put_under_is_said_before_it_is_loaded(
    code: str, version: str | None, why: str, tmp_path: Path
) -> None:
    paths = {} if version is None else {"PYTHONPATH": distribution(tmp_path, version)}
    if version is not None:
        (tmp_path / "llama_cpp.py").write_text("raise SystemExit('it was loaded')")
    said = error(code, tmp_path, **paths)
    assert re.match(r"adaskip_cpp\.errors\.LibraryError: " + why.format(re.escape(_library.release())), said)


def test_a_library_that_the_system_lacks_is_named(copy: Path, tmp_path: Path) -> None:
    lacking = build("foreign_exception.cpp", tmp_path)
    build("foreign_exception.cpp", copy / "lib", "-Wl,--no-as-needed", str(lacking)).replace(
        copy / "lib" / "libllama.so"
    )
    lacking.unlink()
    message = error(BY_PATH + "import adaskip_cpp", copy.parent)
    assert f"install the package of your system that has {lacking}" in message and "reinstall" not in message


# The script that pip writes for the command `adaskip-cpp`, as far as an import can tell.
SCRIPT = "import sys; sys.argv[0] = r'{}'\nfrom adaskip_cpp.cli.main import main\nsys.exit(main())"
SCRIPTS = [SCRIPT.format(path) for path in ("/usr/bin/adaskip-cpp", r"C:\Scripts\adaskip-cpp.exe")]
LIBRARY, RECORD = f"lib/{_library.path().name}", "lib/build.json"
NO_CFFI = "raise ModuleNotFoundError('No module named cffi', name='cffi')"
BROKEN: dict[str, tuple[str, str | None, str]] = {
    "no library": (LIBRARY, None, rf"LibraryError: adaskip_cpp in .*{_library.path().name}.*pip install"),
    "no record": (RECORD, None, r"LibraryError: adaskip_cpp in .*build\.json.*pip install"),
    **{f"the record {text!r}": (RECORD, text, "LibraryError: .*is damaged.*pip install") for text in ("", "[]", "{}")},
    "a broken library": (LIBRARY, "not a library", "LibraryError: llama_cpp cannot be imported on.*pip install"),
    "no cffi": ("../cffi.py", NO_CFFI, "ModuleNotFoundError: .*cffi"),
}
"""The file that is changed, what it contains then, None for no file, and what is said."""


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_installation_is_said_and_by_the_command_in_one_line(what: str, copy: Path) -> None:
    name, content, said = BROKEN[what]
    if content is None:
        (copy / name).unlink()
    else:
        (copy / name).write_text(content)
    paths = {"PYTHONPATH": str(copy.parent)}
    assert re.match(rf"(adaskip_cpp\.errors\.)?{said}", error(BY_PATH + "import adaskip_cpp", copy.parent, **paths))
    for script in SCRIPTS:
        result = run(BY_PATH + script, copy.parent, **paths)
        assert (result.returncode, result.stdout) == (1, "")
        (line,) = result.stderr.splitlines()
        assert line.startswith("Error: ") and re.search(said.partition(": ")[2], line) and "pip install" in line


def test_the_command_shows_where_a_mistake_of_ours_is(copy: Path) -> None:
    (copy / "errors.py").write_text("from . import nothing_of_this_name\n")
    result = run(BY_PATH + SCRIPTS[0], copy.parent)
    assert result.returncode == 1 and result.stderr.startswith("Traceback")


@pytest.mark.parametrize(
    ("differs", "wanted"),
    [
        ({"ADASKIP_ABI_VERSION": 99}, "different builds; run 'pip install --force-reinstall --no-deps adaskip-cpp'"),
        ({"ggml_tensor_overhead": lambda: 500}, r"tensors of 500 bytes.*for \d+; run 'pip install .* adaskip-cpp'"),
    ],
)
def test_a_library_of_another_layout_is_refused_when_it_is_loaded(differs: dict[str, Any], wanted: str) -> None:
    names = ("ADASKIP_ABI_VERSION", "adaskip_abi_version", "ggml_tensor_overhead", "adaskip_ggml_tensor_overhead")
    lib = SimpleNamespace(**{name: getattr(_binding.lib, name) for name in names})
    _binding.check_build(lib)
    vars(lib).update(differs)
    with pytest.raises(LibraryError, match=wanted) as caught:
        _binding.check_build(lib)
    assert isinstance(caught.value, ImportError)
