"""A wheel of the checkout, and those that `make wheels` leaves in dist/: what each library is, needs and offers.

It is read without running it. No module of Python is compiled, so there is nothing for abi3audit; what auditwheel would
look for is looked for here.
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

lief = pytest.importorskip("lief")

ROOT = Path(__file__).parents[2]
WHEELS = sorted((ROOT / "dist").glob("adaskip_cpp-*.whl"))
LLAMA_CPP = Path(str(importlib.metadata.distribution("llama-cpp-python").locate_file("llama_cpp")))
# Functions of C++ have another name in an mtmd.dll, which MSVC compiles.
MSVC = {"_Z24llama_model_get_tok_embdPK11llama_modelPf": "?llama_model_get_tok_embd@@YAIPEBUllama_model@@PEAM@Z"}


@dataclass(frozen=True)
class Platform:
    """What a library for a platform must be; names of other libraries that it may ask for match ``system``."""

    name: str
    format: str
    machine: str
    ggml: frozenset[str]
    system: str


def linux(machine: str, loader: str, system: str) -> Platform:
    ggml = frozenset({"libggml.so.0", "libggml-base.so.0"})
    return Platform(
        "libllama.so", "ELF", f"ARCH.{machine}", ggml, rf"lib({system}|c|m|gcc_s)\.so\.\d|ld-linux-{loader}"
    )


def macos(machine: str) -> Platform:
    ggml = frozenset({"@rpath/libggml.0.dylib", "@rpath/libggml-base.0.dylib"})
    return Platform("libllama.dylib", "MACHO", f"CPU_TYPE.{machine}", ggml, r"/usr/lib/libSystem\.B\.dylib")


X86_64, AARCH64 = ("X86_64", r"x86-64\.so\.2"), ("AARCH64", r"aarch64\.so\.1")
PLATFORMS = {
    "linux_x86_64": linux(*X86_64, r"stdc\+\+"),
    "linux_aarch64": linux(*AARCH64, r"stdc\+\+"),
    "manylinux_2_17_x86_64": linux(*X86_64, "dl|pthread"),
    "manylinux_2_17_aarch64": linux(*AARCH64, "dl|pthread"),
    "macosx_11_0_arm64": macos("ARM64"),
    "macosx_10_15_x86_64": macos("X86_64"),
    "win_amd64": Platform(
        "llama.dll",
        "PE",
        "MACHINE_TYPES.AMD64",
        frozenset({"ggml.dll", "ggml-base.dll"}),
        r"(?i)kernel32\.dll|advapi32\.dll|ntdll\.dll|api-ms-win-crt-[\w-]+\.dll",
    ),
}


@dataclass(frozen=True)
class Wheel:
    """A wheel, opened: its platform's tag, and the library in it, in bytes and as lief reads it."""

    path: Path
    tag: str
    content: bytes
    library: Any

    def read(self, name: str) -> str:
        """Text of the file whose path ends in ``name``."""
        with zipfile.ZipFile(self.path) as archive:
            (member,) = [member for member in archive.namelist() if member.endswith(name)]
            return archive.read(member).decode()

    @property
    def platform(self) -> Platform:
        """What it must be."""
        return PLATFORMS[self.tag]

    @property
    def needed(self) -> set[str]:
        """Names of the libraries that the loader opens for this one."""
        if self.platform.format == "ELF":
            return set(self.library.libraries)
        if self.platform.format == "PE":
            return {entry.name for entry in self.library.imports}
        own = lief.MachO.LoadCommand.TYPE.ID_DYLIB
        return {entry.name for entry in self.library.libraries if entry.command != own}

    @property
    def exported(self) -> set[str]:
        """Names that other libraries can call, without the underscore that macOS puts in front."""
        if self.platform.format == "PE":
            return {entry.name for entry in self.library.get_export().entries}
        prefix = "_" if self.platform.format == "MACHO" else ""
        return {symbol.name.removeprefix(prefix) for symbol in self.library.exported_symbols}


@pytest.fixture(scope="session")
def wheel_of_the_checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It shares the build folder, and so the objects, with the editable installation."""
    import fcntl

    pytest.importorskip("scikit_build_core")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with open(tmp_path_factory.getbasetemp().parent / "wheel.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two processes of tests would build in one folder
        subprocess.run([*command, str(ROOT)], check=True, env=os.environ | {"PATH": path}, timeout=1800)
    (wheel,) = folder.iterdir()
    return wheel


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(None, id="checkout", marks=pytest.mark.slow),
        *(pytest.param(path, id=path.stem.rpartition("-")[2]) for path in WHEELS),
    ],
)
def wheel(request: pytest.FixtureRequest) -> Wheel:
    """Each wheel."""
    path = request.param or request.getfixturevalue("wheel_of_the_checkout")
    tag = path.stem.rpartition("-")[2]
    if tag not in PLATFORMS:
        pytest.skip(f"libraries for {tag} are read where they were made for any machine, in dist/")
    with zipfile.ZipFile(path) as archive:
        content = archive.read(f"adaskip_cpp/lib/{PLATFORMS[tag].name}")
    library = lief.parse(list(content))
    return Wheel(path, tag, content, library.at(0) if isinstance(library, lief.MachO.FatBinary) else library)


@pytest.mark.slow
def test_wheel_works_in_another_environment(wheel_of_the_checkout: Path, tmp_path: Path) -> None:
    for entry in LLAMA_CPP.parent.iterdir():
        if "adaskip" not in entry.name:
            (tmp_path / entry.name).symlink_to(entry)
    zipfile.ZipFile(wheel_of_the_checkout).extractall(tmp_path)
    code = "import adaskip_cpp, llama_cpp; print(llama_cpp.llama_cpp._lib._name); llama_cpp.llama_backend_init()"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-S", "-c", code]  # -S: without the site-packages of this environment
    opened = subprocess.check_output(command, cwd=tmp_path, env=environment, text=True, timeout=120)
    assert Path(opened.strip()).parent == tmp_path / "adaskip_cpp" / "lib"


def test_wheel_is_small_and_with_its_library_of_one_platform(wheel: Wheel) -> None:
    assert wheel.path.stat().st_size < 10e6
    assert f"\nTag: py3-none-{wheel.tag}\n" in wheel.read(".dist-info/WHEEL")
    assert "\nRoot-Is-Purelib: false\n" in wheel.read(".dist-info/WHEEL")
    machine = {"ELF": "machine_type", "PE": "machine", "MACHO": "cpu_type"}[wheel.platform.format]
    assert str(getattr(wheel.library.header, machine)) == wheel.platform.machine


def test_wheel_holds_our_library_alone_and_requires_the_release_that_it_was_built_from(wheel: Wheel) -> None:
    names = zipfile.ZipFile(wheel.path).namelist()
    library = f"adaskip_cpp/lib/{wheel.platform.name}"
    assert [name for name in names if re.search(r"\.(so|dylib|dll|a|lib|pdb|exe)\b", name)] == [library]
    built = {name for name in names if name.startswith(("adaskip_cpp/lib/", "adaskip_cpp/include/"))}
    others = {"adaskip_cpp/lib/LICENSE.llama.cpp", "adaskip_cpp/lib/build.json", "adaskip_cpp/include/adaskip.h"}
    assert built == {library, *others}
    version = wheel.path.name.split("-")[1]
    assert {name.split("/")[0] for name in names} == {"adaskip_cpp", f"adaskip_cpp-{version}.dist-info"}
    assert "adaskip_cpp/py.typed" in names
    release = json.loads(wheel.read("lib/build.json"))["llama_cpp_python"]
    required = re.findall(r"^Requires-Dist: llama-cpp-python\b(.*)$", wheel.read(".dist-info/METADATA"), re.MULTILINE)
    assert required[0] == f"=={release}" and all(f"=={release}" in line for line in required)


def test_library_needs_ggml_and_the_oldest_system_of_the_tag_alone(wheel: Wheel) -> None:
    assert wheel.platform.ggml <= wheel.needed
    others = wheel.needed - wheel.platform.ggml
    assert not {name for name in others if not re.fullmatch(wheel.platform.system, name)}
    oldest = tuple(map(int, re.findall(r"_(\d+)", wheel.tag)[:2]))
    if wheel.platform.format == "PE":
        assert (wheel.library.optional_header.major_subsystem_version, 0) <= (10, 0)
    elif wheel.platform.format == "MACHO":
        assert tuple(wheel.library.build_version.minos)[:2] == oldest
    elif not wheel.tag.startswith("linux"):  # which is for this machine alone
        versions = re.findall(rb"GLIBC_(\d+)\.(\d+)", wheel.content)
        assert versions and max((int(major), int(minor)) for major, minor in versions) <= oldest


def test_library_finds_ggml_beside_llama_cpp_python_and_answers_for_the_one_that_mtmd_needs(wheel: Wheel) -> None:
    if wheel.platform.format == "ELF":
        entries = [(entry.tag.name, entry) for entry in wheel.library.dynamic_entries]
        (runpath,) = [entry.runpath for tag, entry in entries if tag == "RUNPATH"]
        assert runpath == "$ORIGIN/../../llama_cpp/lib" and "RPATH" not in dict(entries)
        assert [entry.name for tag, entry in entries if tag == "SONAME"] == ["libllama.so.0"]
    elif wheel.platform.format == "MACHO":
        assert [command.path for command in wheel.library.rpaths] == ["@loader_path/../../llama_cpp/lib"]
        own = lief.MachO.LoadCommand.TYPE.ID_DYLIB
        assert [entry.name for entry in wheel.library.libraries if entry.command == own] == ["@rpath/libllama.0.dylib"]
    else:  # a DLL names no folder: the package opens ggml first
        assert wheel.library.get_export().name == "llama.dll"


def test_library_exports_our_abi_and_what_llama_cpp_python_and_mtmd_call(wheel: Wheel) -> None:
    without_comments = re.sub(r"//.*", "", wheel.read("include/adaskip.h"))
    declared = set(re.findall(r"\b(adaskip_\w+)\(", without_comments)) - {"adaskip_statistics_callback"}
    assert {name for name in wheel.exported if name.startswith("adaskip_")} == declared
    bound = set(re.findall(r'@ctypes_function\(\s*"(llama_\w+)"', (LLAMA_CPP / "llama_cpp.py").read_text()))
    assert len(bound) > 200 and bound <= wheel.exported
    path = LLAMA_CPP / "lib" / "libmtmd.so"
    if path.exists():  # names of functions are read in an ELF file
        mtmd = lief.parse(str(path))  # its symbols are gone when it is
        imported = {symbol.name for symbol in mtmd.imported_symbols}
        called = {name for name in imported if re.match(r"(_Z\d+)?llama_", name)}
        assert len(called) > 20
        if wheel.platform.format == "PE":
            called = {MSVC.get(name, name) for name in called}
        assert called <= wheel.exported


def test_library_keeps_the_exceptions_of_its_runtime_to_itself_and_unwinds_as_ggml_does(wheel: Wheel) -> None:
    assert not {name for name in wheel.exported if name.startswith(("__cxa_", "_Unwind_", "__gxx_"))}
    if wheel.platform.format == "ELF":  # macOS and Windows have one unwinder, in the system
        assert "libgcc_s.so.1" in wheel.needed
        assert "_Unwind_Resume" in {symbol.name for symbol in wheel.library.imported_symbols}


def test_library_names_no_folder_of_the_build(wheel: Wheel) -> None:
    # the assertions' file names are there, without the folder
    assert re.search(rb"llama\.cpp[/\\]src[/\\]", wheel.content)
    assert not re.search(rb"/(site-packages|pip-build-env\S*|ziglang)/", wheel.content)
    for folder in (ROOT, Path(sys.prefix), Path.home()):
        assert not re.search(rb"(?<![\w.-])" + re.escape(bytes(folder)) + rb"/", wheel.content), folder
