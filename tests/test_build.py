"""The build: what the library may depend on, what a wheel is called, what a failing build says.

Everything runs setup.py of this tree; compiled objects are reused, so a test costs seconds.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import venv
import zipfile
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[1]

# The newest symbol versions that the library may ask for, as the README states them (GLIBC 2.32 comes from libstdc++'s
# shared_ptr, __libc_single_threaded). Every g++ >= 11 brings a libstdc++ with GLIBCXX 3.4.29.
FLOOR = {"GLIBC": (2, 32), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13)}


def environment(**changes):
    """This process's environment without what steers a build, with ``changes``."""
    steering = re.compile("CXX|CXXFLAGS|LDFLAGS|LD_PRELOAD|CPULLM_.*|MAKEFLAGS|MAKELEVEL")
    return {k: v for k, v in os.environ.items() if not steering.fullmatch(k)} | changes


def setup_py(*arguments, root=ROOT, python=sys.executable, **changes):
    """Run ``setup.py *arguments`` of the tree ``root``; returns the completed process with its two texts."""
    command = [str(python), "setup.py", *map(str, arguments)]
    return subprocess.run(command, cwd=root, env=environment(**changes), capture_output=True, text=True, check=False)


def output_of(*command):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


def assert_one_line(done, *parts):
    """The process failed and said one line, holding each of ``parts`` and no traceback."""
    assert done.returncode != 0, done.stdout
    said = [line for line in done.stderr.splitlines() if line.strip()]
    lines = [line for line in said if "torch_cpullm: " in line]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in lines[0], lines[0]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """Path of the wheel that `pip wheel` makes of this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(folder), "."]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="session")
def library(wheel, tmp_path_factory):
    """Path of the library inside the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract("torch_cpullm/_C.abi3.so", tmp_path_factory.mktemp("library")))


def test_wheel_is_one_for_every_python(wheel):
    assert re.fullmatch(r"torch_cpullm-[\d.]+-cp310-abi3-linux_\w+\.whl", wheel.name)


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert [n for n in names if n.endswith(".so")] == ["torch_cpullm/_C.abi3.so"]
    assert {n.split("/")[0].split("-")[0] for n in names} == {"torch_cpullm"}
    in_tree = {str(p.relative_to(ROOT)) for p in (ROOT / "torch_cpullm").rglob("*.py")}
    assert in_tree == {n for n in names if n.endswith(".py")}
    assert "cpullm = torch_cpullm.backend:cpullm" in entry_points
    assert "cpullm = torch_cpullm.cli:main" in entry_points


def test_library_needs_torch_and_no_openmp_of_its_own(library):
    dynamic = output_of("readelf", "-d", library)
    needed = set(re.findall(r"NEEDED.*\[(.+)\]", dynamic))
    assert "libtorch_cpu.so" in needed
    assert needed <= {"libtorch_cpu.so", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6"} | {
        name for name in needed if name.startswith("ld-linux")
    }
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def test_library_uses_only_the_stable_abi_of_torch(library):
    """No C++ symbol of torch, no symbol of Python, and nothing that flips the process to flush-to-zero at load."""
    symbols = output_of("nm", "-C", library)
    undefined = re.findall(r" U (.+)", symbols)
    assert not [s for s in undefined if s.startswith(("at::", "c10::", "torch::", "Py", "_Py"))]
    assert "set_fast_math" not in symbols


def test_library_stays_within_the_stated_floor(library):
    found = {}
    symbols = output_of("readelf", "--dyn-syms", "-W", library)
    for name, version in re.findall(r"@(GLIBC|GLIBCXX|CXXABI)_([\d.]+)", symbols):
        found[name] = max(found.get(name, ()), tuple(map(int, version.split("."))))
    print("highest symbol versions:", {name: ".".join(map(str, version)) for name, version in found.items()})
    assert found["GLIBC"] <= FLOOR["GLIBC"]
    assert found["GLIBCXX"] <= FLOOR["GLIBCXX"]
    assert found.get("CXXABI", ()) <= FLOOR["CXXABI"]


def test_readme_states_the_floor():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("GLIBC", "GLIBCXX"):
        version = ".".join(map(str, FLOOR[name]))
        assert re.search(rf"{name}[ _]{re.escape(version)}\b", readme), f"README.md does not name {name} {version}"


def test_kernel_objects_define_no_weak_symbol(library):
    """A weak symbol compiled under AVX-512 flags may replace the baseline's copy and crash an older CPU."""
    machine = "x86_64" if os.uname().machine == "x86_64" else "aarch64-ref"
    sources = sorted((ROOT / "csrc/kernels").glob("*.cpp"))
    objects = [ROOT / "build/cpullm" / machine / "kernels" / (source.stem + ".o") for source in sources]
    if machine != "x86_64":
        objects = [path for path in objects if path.stem in ("ref", "dispatch")]
    weak = {path.name: re.findall(r" [WVu] (\S+)", output_of("nm", "--defined-only", path)) for path in objects}
    assert len(weak) >= 2
    assert not {name: symbols for name, symbols in weak.items() if symbols}


# -- A small tree with the real setup.py

KERNEL = '#include "kernels.h"\nextern "C" int {name}() {{ return VALUE; }}\n'


@pytest.fixture
def project(tmp_path):
    """A tree with this setup.py and three quick files of C++; each proves the flags it was compiled with."""
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "torch_cpullm").mkdir()
    (tmp_path / "torch_cpullm/__init__.py").touch()
    kernels = tmp_path / "csrc/kernels"
    kernels.mkdir(parents=True)
    (kernels / "kernels.h").write_text("#define VALUE 1\n")
    (kernels / "ref.cpp").write_text("#ifdef __AVX__\n#error\n#endif\n" + KERNEL.format(name="ref"))
    (kernels / "plain.cpp").write_text("#ifdef __FAST_MATH__\n#error\n#endif\nint plain() { return 1; }\n")
    (kernels / "mul_avx512.cpp").write_text("#ifndef __AVX512VNNI__\n#error\n#endif\n" + KERNEL.format(name="mul"))
    return tmp_path


def compiled(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return sorted(re.findall(r"compiling csrc/kernels/(\w+)\.cpp", done.stdout))


x86_64_only = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the x86 kernels are compiled on x86-64 only")


@x86_64_only
def test_only_what_changed_is_compiled_again(project):
    build = ("build_ext", "--inplace")
    assert compiled(setup_py(*build, root=project)) == ["mul_avx512", "plain", "ref"]
    assert (project / "torch_cpullm/_C.abi3.so").is_file()
    assert compiled(setup_py(*build, root=project)) == []
    later = time.time() + 5
    os.utime(project / "csrc/kernels/kernels.h", (later, later))
    done = setup_py(*build, root=project)
    assert compiled(done) == ["mul_avx512", "ref"]
    assert "linking _C.abi3.so" in done.stdout
    # Flags that would change the arithmetic do not get through; others do.
    assert compiled(setup_py(*build, root=project, CXXFLAGS="-ffast-math -g")) == ["mul_avx512", "plain", "ref"]


def test_reference_build_leaves_the_x86_kernels_out(project):
    (project / "csrc/kernels/plain.cpp").write_text("#ifndef CPULLM_REF_ONLY\n#error\n#endif\n")
    done = setup_py("build_ext", "--inplace", root=project, CPULLM_REF_ONLY="1")
    assert compiled(done) == ["plain", "ref"]


def test_compile_error_ends_the_build_with_the_compilers_words(project):
    (project / "csrc/kernels/plain.cpp").write_text("int plain() { return undeclared_thing; }\n")
    done = setup_py("build_ext", "--inplace", root=project)
    assert_one_line(done, "compiling csrc/kernels/plain.cpp failed")
    assert "undeclared_thing" in done.stderr
    assert not (project / "torch_cpullm/_C.abi3.so").exists()


# -- Builds that cannot succeed say why in one line


def fake_compiler(folder, body):
    path = folder / "fake-g++"
    path.write_text("#!/bin/sh\n" + body)
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("command", ["build_ext", "bdist_wheel"])
def test_missing_compiler(tmp_path, project, command):
    done = setup_py(command, root=project, CXX=str(tmp_path / "nowhere/g++"))
    assert_one_line(done, "nowhere/g++ was not found", "apt install g++", "dnf install gcc-c++")


def test_missing_compiler_by_an_empty_path(tmp_path, project):
    done = setup_py("bdist_wheel", root=project, PATH=str(tmp_path))
    assert_one_line(done, "g++ was not found", "apt install g++")


def test_old_compiler(tmp_path, project):
    old = fake_compiler(tmp_path, "echo '#define __GNUC__ 9'\necho '#define __VERSION__ \"9.4.0\"'\n")
    assert_one_line(setup_py("bdist_wheel", root=project, CXX=old), "9.4.0", "too old", "g++ >= 11")


def test_broken_compiler(tmp_path, project):
    broken = fake_compiler(tmp_path, "exit 3\n")
    assert_one_line(setup_py("bdist_wheel", root=project, CXX=broken), "does not work", "exit 3")


def test_old_torch(tmp_path, project):
    (tmp_path / "old/torch").mkdir(parents=True)
    (tmp_path / "old/torch/__init__.py").write_text("raise AssertionError('setup.py must not import torch')")
    (tmp_path / "old/torch/version.py").write_text("__version__ = '2.9.1+cpu'\n")
    done = setup_py("bdist_wheel", root=project, PYTHONPATH=str(tmp_path / "old"))
    assert_one_line(done, "torch >= 2.10 is needed", "torch 2.9.1+cpu")


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_other_operating_systems(project, platform):
    code = (
        "import sys, runpy, setuptools.command.bdist_wheel, setuptools.command.editable_wheel\n"
        f"sys.platform = {platform!r}; sys.argv = ['setup.py', 'dist_info']\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=project, env=environment(), capture_output=True, text=True, check=False)
    assert_one_line(done, "only Linux is supported", platform)


@pytest.fixture
def only_setuptools(tmp_path):
    """A folder for PYTHONPATH with setuptools and nothing else, as in pip's build isolation."""
    folder = tmp_path / "only-setuptools"
    folder.mkdir()
    source = Path(setuptools.__file__).parent
    (folder / "setuptools").symlink_to(source)
    for path in (source.parent / "_distutils_hack", *source.parent.glob("setuptools-*.dist-info")):
        (folder / path.name).symlink_to(path)
    return str(folder)


def test_isolated_build_finds_the_environments_torch(only_setuptools):
    """-S hides this environment's packages from the process, as pip's build isolation does."""
    code = "import runpy; print(*runpy.run_path('setup.py')['find_torch']())"
    command = [sys.executable, "-S", "-c", code]
    env = environment(PYTHONPATH=only_setuptools, PYTHONNOUSERSITE="1")
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    here = runpy.run_path(str(ROOT / "setup.py"))["find_torch"]()
    assert done.stdout.strip() == " ".join(map(str, here)), done.stderr


def test_isolated_build_without_torch_stops_at_once(tmp_path, project, only_setuptools):
    venv.create(tmp_path / "empty", with_pip=False, symlinks=True)
    started = time.monotonic()
    done = setup_py("dist_info", root=project, python=tmp_path / "empty/bin/python", PYTHONPATH=only_setuptools)
    assert_one_line(done, "--no-build-isolation", "torch >= 2.10")
    assert time.monotonic() - started < 20


def test_make_names_the_missing_package(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    command = ["make", "--no-print-directory", "tools", f"CXX={tmp_path}/g++"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert_one_line(done, "is missing", "apt install g++")
