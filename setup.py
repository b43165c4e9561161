"""Builds torch_cpullm/_C.abi3.so, the operator library of torch_cpullm. Everything declarative is in pyproject.toml.

The library registers its operators when ``torch.ops.load_library`` opens it: it needs neither Python.h nor libpython,
and it uses torch's stable ABI, so one file serves every Python >= 3.10 and every torch >= 2.10.

Files in csrc/ named ``ops.cpp`` or ``ops_*.cpp`` see torch's headers. A file whose name is an instruction set
(``avx2``, ``avx_vnni``, ``avx512``, ``amx``), or ends in ``_`` and one, is compiled for it; every other file for the
baseline of the platform. On anything but x86-64 those files are left out and ``CPULLM_REF_ONLY`` is defined.

Environment
    CXX, CXXFLAGS, LDFLAGS   compiler (default g++) and extra flags
    MAX_JOBS                 files compiled at a time (default: the cores of this process, at most 8)
    CPULLM_SANITIZE=1        AddressSanitizer and UndefinedBehaviorSanitizer (CONTRIBUTING.md says how to run it)
    CPULLM_REF_ONLY=1        leave the x86 kernels out, as on other processors
"""

import concurrent.futures
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"torch_cpullm: setuptools >= 77 is needed, not {setuptools.__version__}: pip install -U setuptools"
    )

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.dist_info import dist_info
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
MIN_TORCH = (2, 10)
MIN_GCC = 11

# -ffp-contract=off: kernels write their fused multiply-adds out, so that every rung rounds alike.
COMMON_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra"]
# After CXXFLAGS: no environment may change the arithmetic or bring a second OpenMP runtime in.
FINAL_FLAGS = ["-fno-fast-math", "-fno-math-errno", "-ffp-contract=off", "-fno-openmp"]
TORCH_FLAGS = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # the stable ABI of torch 2.10
SANITIZE_FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"]
SANITIZE_FLAGS += ["-fno-omit-frame-pointer", "-g", "-O1"]
LINK_FLAGS = ["-shared", "-Wl,-z,defs", "-Wl,-z,relro", "-Wl,-z,now", "-Wl,-z,noexecstack"]

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]
ISA_FLAGS = {
    "avx2": AVX2,
    "avx_vnni": [*AVX2, "-mavxvnni"],
    "avx512": AVX512,
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
}


def stop(message):
    """End the build with one line and no traceback."""
    raise SystemExit(f"torch_cpullm: {message}")


def isa_of(source):
    """Name of the instruction set that ``source`` (a path) is compiled for, or None for the platform's baseline."""
    stem = Path(source).stem
    return next((isa for isa in ISA_FLAGS if stem == isa or stem.endswith("_" + isa)), None)


def uses_torch(source):
    """Whether ``source`` (a path) may include torch's headers."""
    stem = Path(source).stem
    return stem == "ops" or stem.startswith("ops_")


def check_platform():
    """Stop on an operating system that is not supported."""
    if not sys.platform.startswith("linux"):
        stop(f"only Linux is supported (x86-64; aarch64 at reference speed), not {sys.platform}: nothing is installed.")


def find_torch():
    """Return (directory, version text) of the torch of the target environment, without importing it.

    pip's build isolation hides the environment's packages from this process, not from a fresh one of the same Python.
    """
    spec = importlib.util.find_spec("torch")
    origin = spec.origin if spec else None
    if origin is None:
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONHOME")}
        code = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s and s.origin else '')"
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
        origin = done.stdout.strip() or None
    if origin is None:
        stop(
            "this build sees no torch: install torch >= 2.10 in this environment first, "
            "then run `pip install --no-build-isolation .`"
        )
    directory = Path(origin).parent
    try:
        text = (directory / "version.py").read_text(encoding="utf-8")
        found = re.search(r"__version__\s*=\s*['\"](\d+)\.(\d+)([^'\"]*)", text)
    except OSError:
        found = None
    if found is None:
        stop(f"the torch in {directory} has no readable version.py: install torch >= 2.10 again.")
    version = f"{found[1]}.{found[2]}{found[3]}"
    if (int(found[1]), int(found[2])) < MIN_TORCH:
        stop(f"torch >= 2.10 is needed, and this environment has torch {version} in {directory}.")
    if not (directory / "include/torch/csrc/stable/library.h").is_file():
        stop(f"torch {version} in {directory} was installed without its C++ headers: install torch from a wheel.")
    return directory, version


def find_compiler():
    """Return (command, macros): the C++ compiler's command words and the macros it predefines."""
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    package = "install g++ >= 11 (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++) or set CXX."
    if shutil.which(command[0]) is None:
        stop(f"no C++ compiler: {command[0]} was not found; {package}")
    probe = subprocess.run(
        [*command, "-dM", "-E", "-x", "c++", "-"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    macros = dict(re.findall(r"^#define (\w+) (.*)$", probe.stdout, re.MULTILINE))
    if probe.returncode or "__GNUC__" not in macros:
        stop(f"the C++ compiler does not work: `{shlex.join(command)}` is no g++ (exit {probe.returncode}); {package}")
    if "__clang__" not in macros and int(macros["__GNUC__"]) < MIN_GCC:
        stop(f"g++ {macros['__VERSION__'].strip()} ({command[0]}) is too old; {package}")
    return command, macros


def check_environment():
    """Stop, before anything is downloaded or compiled, where a build cannot succeed."""
    check_platform()
    find_torch()
    find_compiler()


def switched_on(name):
    """Whether the environment variable ``name`` is set to anything but nothing or 0."""
    return os.environ.get(name, "0") not in ("", "0")


def key_of(command, version):
    """Text that changes when a command, or the compiler behind it, changes."""
    return hashlib.sha256("\0".join([*command, version]).encode()).hexdigest()


def is_fresh(output, key):
    """Whether ``output`` was made by the command behind ``key`` and is newer than every file in its depfile."""
    depfile, keyfile = output.with_suffix(".d"), output.with_suffix(".key")
    try:
        if keyfile.read_text() != key:
            return False
        words = depfile.read_text().replace("\\\n", " ").partition(": ")[2].replace("\\ ", "\0").split()
        made = output.stat().st_mtime_ns
        return all((ROOT / word.replace("\0", " ")).stat().st_mtime_ns <= made for word in words)
    except OSError:
        return False


def make(output, command, what, version):
    """Run a compiler ``command`` that writes ``output``; show what the compiler says, and stop where it fails."""
    print(what + "\n", end="", flush=True)  # one write: two files compile at a time
    output.parent.mkdir(parents=True, exist_ok=True)
    # A scratch name: an interrupted run leaves no half-written file behind under the real one.
    scratch = output.with_name(output.name + ".new")
    full = [*command, "-o", str(scratch)]
    done = subprocess.run(full, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.stdout:
        print(done.stdout, file=sys.stderr, flush=True)
    if done.returncode:
        stop(f"{what} failed (exit {done.returncode}); the command was: {shlex.join(full)}")
    scratch.replace(output)
    output.with_suffix(".key").write_text(key_of(command, version))


class BuildExt(build_ext):
    """Compiles csrc/ into objects that later builds reuse (build/cpullm/<machine>[-variant]/), and links them."""

    def run(self):
        check_platform()
        # Two builds in one tree take turns.
        import fcntl  # not on Windows

        (ROOT / "build/cpullm").mkdir(parents=True, exist_ok=True)
        with (ROOT / "build/cpullm/lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            super().run()

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".abi3.so"

    def build_extension(self, ext):
        torch_dir, torch_version = find_torch()
        compiler, macros = find_compiler()
        version = macros["__VERSION__"] + torch_version
        machine = "x86_64" if "__x86_64__" in macros else "aarch64" if "__aarch64__" in macros else "other"
        ref_only = machine != "x86_64" or switched_on("CPULLM_REF_ONLY")
        sanitize = SANITIZE_FLAGS if switched_on("CPULLM_SANITIZE") else []
        objects_dir = ROOT / "build/cpullm" / (machine + "-ref" * ref_only + "-sanitize" * bool(sanitize))

        flags = [*COMMON_FLAGS, "-Icsrc", *(["-DCPULLM_REF_ONLY"] if ref_only else []), *sanitize]
        flags += shlex.split(os.environ.get("CXXFLAGS", ""))
        jobs, objects = [], []
        for source in ext.sources:
            isa = isa_of(source)
            if isa and ref_only:
                continue
            output = objects_dir / Path(source).relative_to("csrc").with_suffix(".o")
            objects.append(output)
            torch_flags = [*TORCH_FLAGS, "-isystem", str(torch_dir / "include")] if uses_torch(source) else []
            command = [*compiler, *flags, *ISA_FLAGS.get(isa, []), *torch_flags, *FINAL_FLAGS]
            command += ["-MMD", "-MF", str(output.with_suffix(".d")), "-c", source]
            if self.force or not is_fresh(output, key_of(command, version)):
                jobs.append((output, command, f"compiling {source}", version))
        os.chdir(ROOT)
        workers = int(os.environ.get("MAX_JOBS", 0)) or min(len(os.sched_getaffinity(0)), 8)
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            made = [pool.submit(make, *job) for job in jobs]
            try:
                for job in made:
                    job.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

        library = objects_dir / Path(self.get_ext_filename(ext.name)).name
        link = [*compiler, *LINK_FLAGS, *sanitize, *map(str, objects), "-L" + str(torch_dir / "lib"), "-ltorch_cpu"]
        link += shlex.split(os.environ.get("LDFLAGS", ""))
        if jobs or not is_fresh(library, key_of(link, version)):
            depends = " ".join(str(path).replace(" ", "\\ ") for path in objects)
            library.with_suffix(".d").write_text(f"library: {depends}\n")
            make(library, link, f"linking {library.name}", version)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(library, target)


class BuildPy(build_py):
    """Copies the Python files, without those that an earlier build left in build/lib and the tree no longer has."""

    def run(self):
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "torch_cpullm", ignore_errors=True)
        super().run()


def checked(base):
    """The command ``base``, preceded by check_environment(): pip asks for metadata before it downloads dependencies."""

    def run(self):
        check_environment()
        base.run(self)

    return type(base.__name__, (base,), {"run": run, "__doc__": base.__doc__})


if __name__ == "__main__":
    # A free-threaded Python has no abi3 tag, so its wheel is named after that Python; the library is the same.
    abi3 = {} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"bdist_wheel": {"py_limited_api": "cp310"}}
    setup(
        ext_modules=[Extension("torch_cpullm._C", SOURCES, py_limited_api=True)],
        cmdclass={
            "build_ext": BuildExt,
            "build_py": BuildPy,
            **{base.__name__: checked(base) for base in (bdist_wheel, dist_info, editable_wheel)},
        },
        options=abi3,
    )
