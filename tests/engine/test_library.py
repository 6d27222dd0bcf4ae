"""``import adaskip_cpp`` puts our libllama under llama-cpp-python, or says why it cannot and what to do."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
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


@pytest.mark.parametrize("before", [None, "/elsewhere"])
def test_environment_is_as_before(tmp_path: Path, before: str | None) -> None:
    code = "import adaskip_cpp, os; print(os.environ.get('LLAMA_CPP_LIB_PATH'))"
    environment = {} if before is None else {"LLAMA_CPP_LIB_PATH": before}
    assert output(code, tmp_path, **environment) == str(before)


def test_llama_cpp_imported_first_is_refused(tmp_path: Path) -> None:
    message = error("import llama_cpp, adaskip_cpp", tmp_path)
    assert message.startswith("adaskip_cpp.errors.LibraryError: llama_cpp was imported before adaskip_cpp")
    assert "import adaskip_cpp first" in message


@pytest.mark.skipif(sys.platform == "win32", reason="a DLL names no folder: the package opens ggml first")
def test_llama_cpp_imported_first_on_our_library_is_fine(tmp_path: Path) -> None:
    code = "import llama_cpp, adaskip_cpp; print('fine')"
    assert output(code, tmp_path, LLAMA_CPP_LIB_PATH=str(_library.path().parent)) == "fine"


def test_other_version_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    code = "import sys\ntry:\n    import adaskip_cpp\nfinally:\n    print('llama_cpp' in sys.modules)"
    result = run(code, tmp_path, PYTHONPATH=distribution(tmp_path, "0.3.1"))
    assert result.stdout.strip() == "False"
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("adaskip_cpp.errors.LibraryError: llama-cpp-python 0.3.1 is installed")
    assert f"pip install llama-cpp-python=={_library.release()}" in message


def test_version_with_a_backend_suffix_is_the_same_version(tmp_path: Path) -> None:
    version = f"{_library.release()}+cu124"
    assert output("import adaskip_cpp; print('fine')", tmp_path, PYTHONPATH=distribution(tmp_path, version)) == "fine"


def test_missing_llama_cpp_python_is_said(tmp_path: Path) -> None:
    code = (
        "import importlib.metadata as m\n"
        "def version(name): raise m.PackageNotFoundError(name)\n"
        "m.version = version\n"
        "import adaskip_cpp"
    )
    message = error(code, tmp_path)
    assert "LibraryError: llama-cpp-python is not installed; run 'pip install llama-cpp-python==" in message


def test_a_library_that_the_system_lacks_is_named(copy: Path, tmp_path: Path) -> None:
    lacking = build("foreign_exception.cpp", tmp_path)
    build("foreign_exception.cpp", copy / "lib", "-Wl,--no-as-needed", str(lacking)).replace(
        copy / "lib" / "libllama.so"
    )
    lacking.unlink()
    message = error(BY_PATH + "import adaskip_cpp", copy.parent)
    assert f"install the package of your system that has {lacking}" in message and "reinstall" not in message


# The script that pip writes for the command `adaskip-cpp`, as far as an import can tell.
SCRIPT = "import sys; sys.argv[0] = '/usr/bin/adaskip-cpp'\nfrom adaskip_cpp.cli.main import main\nsys.exit(main())"

LIBRARY, RECORD = f"lib/{_library.path().name}", "lib/build.json"


def without(name: str) -> Callable[[Path], object]:
    return lambda package: (package / name).unlink()


def with_content(name: str, content: str) -> Callable[[Path], object]:
    return lambda package: (package / name).write_text(content)


NO_CFFI = "raise ModuleNotFoundError('No module named cffi', name='cffi')"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no library": (without(LIBRARY), rf"LibraryError: adaskip_cpp in .*{_library.path().name}.*pip install"),
    "no record": (without(RECORD), r"LibraryError: adaskip_cpp in .*build\.json.*pip install"),
    **{
        f"the record {text!r}": (with_content(RECORD, text), "LibraryError: .*is damaged.*pip install")
        for text in ("", "[]", "{}")
    },
    "a broken library": (
        with_content(LIBRARY, "not a library"),
        "LibraryError: llama_cpp cannot be imported on.*pip install --force-reinstall",
    ),
    "another llama-cpp-python": (
        lambda package: distribution(package.parent, "0.3.1"),
        r"LibraryError: llama-cpp-python 0\.3\.1 is installed.*pip install",
    ),
    "no cffi": (with_content("../cffi.py", NO_CFFI), "ModuleNotFoundError: .*cffi"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_installation_is_said_and_by_the_command_in_one_line(what: str, copy: Path) -> None:
    damage, said = BROKEN[what]
    damage(copy)
    paths = {"PYTHONPATH": str(copy.parent)}
    assert re.match(rf"(adaskip_cpp\.errors\.)?{said}", error(BY_PATH + "import adaskip_cpp", copy.parent, **paths))
    result = run(BY_PATH + SCRIPT, copy.parent, **paths)
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ") and re.search(said.partition(": ")[2], line) and "pip install" in line


def test_the_command_of_windows_says_so_too(copy: Path) -> None:
    (copy / "lib" / "build.json").unlink()
    script = SCRIPT.replace("/usr/bin/adaskip-cpp", r"C:\\Scripts\\adaskip-cpp.exe")
    (line,) = run(BY_PATH + script, copy.parent).stderr.splitlines()
    assert line.startswith("Error: ") and "build.json" in line


def test_the_command_shows_where_a_mistake_of_ours_is(copy: Path) -> None:
    (copy / "errors.py").write_text("from . import nothing_of_this_name\n")
    result = run(BY_PATH + SCRIPT, copy.parent)
    assert result.returncode == 1 and result.stderr.startswith("Traceback")


def test_an_import_failure_is_an_import_error() -> None:
    assert issubclass(LibraryError, ImportError)


@pytest.mark.parametrize(
    ("differs", "wanted"),
    [
        ({"ADASKIP_ABI_VERSION": 99}, "different builds; run 'pip install --force-reinstall --no-deps adaskip-cpp'"),
        (
            {"ggml_tensor_overhead": lambda: 500},
            r"tensors of 500 bytes.*built for \d+; run 'pip install .* adaskip-cpp'",
        ),
    ],
)
def test_a_library_of_another_layout_is_refused_when_it_is_loaded(differs: dict[str, Any], wanted: str) -> None:
    names = ("ADASKIP_ABI_VERSION", "adaskip_abi_version", "ggml_tensor_overhead", "adaskip_ggml_tensor_overhead")
    lib = SimpleNamespace(**{name: getattr(_binding.lib, name) for name in names})
    _binding.check_build(lib)
    vars(lib).update(differs)
    with pytest.raises(LibraryError, match=wanted):
        _binding.check_build(lib)
