"""How many threads to use, and what the process may use: affinity, cgroup limits, physical cores, OpenMP runtimes.

threads = max(1, min(CPUs in the affinity mask, floor(cgroup CPU quota), physical cores within the mask))

torch looks at neither the cgroup quota nor (without MKL) at hyper-threads: in a container with 4 CPUs of a 64-CPU host
it starts 64 threads, which then wait for each other. ``optimize()`` and the command line call
``apply_default_threads()``; importing the package changes nothing. Every reader takes ``root``, the directory that
holds ``proc`` and ``sys``, so that the tests run on a fake tree. Importing this module does not import torch.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from . import _torch_threads

logger = logging.getLogger("torch_cpullm")

#: OpenMP settings that only the user can have made; any of them means that torch's thread count is left alone.
#: The binding variables matter too: libgomp then pins the main thread, whose affinity mask shrinks to one CPU.
USER_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OMP_PROC_BIND",
    "OMP_PLACES",
    "GOMP_CPU_AFFINITY",
    "KMP_AFFINITY",
)

# cgroup v1 writes "no limit" as the largest multiple of the page size below 2**63.
_NO_MEMORY_LIMIT_BYTES = 1 << 60


# What torch said when this package was imported: another value later means that somebody called torch.set_num_threads.
_torch_threads_at_import = _torch_threads


@dataclass(frozen=True)
class ThreadChoice:
    """A thread count and where it comes from.

    count           threads to use, at least 1
    affinity        CPUs that the scheduler lets this process use
    cgroup_quota    CPUs that the control group may use (2.5 = two and a half), None without a quota
    physical_cores  distinct physical cores among the affinity's CPUs
    source          "default", an environment variable's name, "torch.set_num_threads" or "argument"
    reason          one line for a person, without the count
    """

    count: int
    affinity: int
    cgroup_quota: float | None
    physical_cores: int
    source: str
    reason: str


def default_threads(*, root: str | Path = "/", affinity: Collection[int] | None = None) -> ThreadChoice:
    """max(1, min(affinity, floor(cgroup quota), physical cores)); looks only, changes nothing.

    root: directory that holds ``proc`` and ``sys``. affinity: CPU numbers; None asks the scheduler.
    """
    cpus = cpu_affinity() if affinity is None else frozenset(affinity)
    quota = cgroup_cpu_quota(root)
    cores = physical_cores(cpus, root=root)
    count = max(1, min([len(cpus), cores] + ([] if quota is None else [math.floor(quota)])))
    quota_text = "none" if quota is None else f"{quota:.4g}"
    reason = f"least of: affinity {len(cpus)}, cgroup quota {quota_text}, physical cores {cores}"
    return ThreadChoice(count, len(cpus), quota, cores, "default", reason)


_applied: ThreadChoice | None = None


def apply_default_threads() -> ThreadChoice:
    """Set torch's thread count to ``default_threads()``, unless the user has set one; say so once through logging.

    The user has, if one of ``USER_VARIABLES`` is in the environment, or if ``torch.set_num_threads`` was called.
    torch does not record that call, so it is inferred: the count differs from the one at import of this module, or it
    is none of the numbers torch starts with by itself (CPUs in the mask, physical cores, all CPUs). A call that names
    one of those numbers, made before this module is imported, cannot be told from the start-up value;
    OMP_NUM_THREADS can.
    Calling this again changes nothing.
    """
    global _applied
    import torch

    current = torch.get_num_threads()
    first = _applied is None
    choice = _applied if _applied is not None and _applied.count == current else _choose(current)
    if choice.count != current:
        torch.set_num_threads(choice.count)
    if first:
        logger.info("torch_cpullm uses %d thread%s (%s)", choice.count, "s" * (choice.count != 1), choice.reason)
    _applied = choice
    return choice


def set_threads(count: int) -> ThreadChoice:
    """Set torch's thread count to ``count`` (>= 1) on the user's order; later ``apply_default_threads()`` keep it."""
    global _applied
    import torch

    if count < 1:
        raise ValueError(f"threads must be at least 1, got {count}")
    choice = replace(default_threads(), count=count, source="argument", reason="asked for")
    torch.set_num_threads(count)
    _applied = choice
    return choice


def _choose(current: int) -> ThreadChoice:
    """The choice for a process whose torch uses ``current`` threads."""
    default = default_threads()
    for name in USER_VARIABLES:
        value = os.environ.get(name, "").strip()
        if value and not (name == "OMP_PROC_BIND" and value.lower() == "false"):
            return replace(default, count=current, source=name, reason=f"{name}={value} is set")
    untouched = {default.affinity, default.physical_cores, os.cpu_count() or 1}
    known = _torch_threads_at_import if _applied is None else _applied.count
    if current not in untouched or (known is not None and current != known):
        return replace(
            default, count=current, source="torch.set_num_threads", reason="torch.set_num_threads was called"
        )
    return default


# ---- CPUs -----------------------------------------------------------------------------------------------------------


def cpu_affinity() -> frozenset[int]:
    """CPU numbers that this process may run on (all CPUs where the system has no affinity masks)."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def physical_cores(cpus: Collection[int], *, root: str | Path = "/") -> int:
    """Distinct physical cores among ``cpus``: hyper-threads of one core count once."""
    return max(1, len(one_cpu_per_core(cpus, root=root)))


def one_cpu_per_core(cpus: Collection[int], *, root: str | Path = "/") -> list[int]:
    """The lowest of ``cpus`` on each physical core, ascending.

    Reads /sys/devices/system/cpu/cpuN/topology: the list of sibling threads, else (package, core). A CPU without
    topology counts as a core of its own.
    """
    first: dict[object, int] = {}
    for cpu in sorted(cpus):
        topology = Path(root, f"sys/devices/system/cpu/cpu{cpu}/topology")
        siblings = _read(topology / "thread_siblings_list") or _read(topology / "core_cpus_list")
        core = _read(topology / "core_id")
        if siblings:
            key: object = siblings
        elif core is not None:
            key = (_read(topology / "physical_package_id"), core)
        else:
            key = ("cpu", cpu)
        first.setdefault(key, cpu)
    return list(first.values())


# ---- control groups -------------------------------------------------------------------------------------------------


def cache_bytes(*, root: str | Path = "/") -> int:
    """Size of all last-level caches that the usable CPUs reach; 0 where the system does not say."""
    caches: dict[str, int] = {}
    for cpu in cpu_affinity():
        levels: dict[int, tuple[str, int]] = {}
        for index in Path(root, f"sys/devices/system/cpu/cpu{cpu}/cache").glob("index*"):
            size = re.fullmatch(r"(\d+)([KMG]?)", _read(index / "size") or "")
            level = _read(index / "level") or ""
            if size and level.isdecimal() and _read(index / "type") != "Instruction":
                unit = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[size[2]]
                levels[int(level)] = (_read(index / "shared_cpu_list") or str(cpu), int(size[1]) * unit)
        if levels:
            shared, size_bytes = levels[max(levels)]
            caches[shared] = size_bytes
    return sum(caches.values())


def cgroup_cpu_quota(root: str | Path = "/") -> float | None:
    """CPUs that this process's control group may use, the smallest along the hierarchy; None without a quota.

    v2: cpu.max ("200000 100000" = 2 CPUs). v1: cpu.cfs_quota_us / cpu.cfs_period_us. Both are read on mixed systems.
    """
    quotas = []
    for version, directory in _cgroup_directories(Path(root), "cpu"):
        if version == 2:
            quota, _, period = (_read(directory / "cpu.max") or "").partition(" ")
        else:
            quota = _read(directory / "cpu.cfs_quota_us") or ""
            period = _read(directory / "cpu.cfs_period_us") or ""
        if quota.isdecimal() and period.isdecimal() and int(quota) > 0 and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def cgroup_memory_limit_bytes(root: str | Path = "/") -> int | None:
    """Bytes of memory that the control group may use, the smallest along the hierarchy; None without a limit."""
    limits = []
    for version, directory in _cgroup_directories(Path(root), "memory"):
        text = _read(directory / ("memory.max" if version == 2 else "memory.limit_in_bytes")) or ""
        if text.isdecimal() and int(text) < _NO_MEMORY_LIMIT_BYTES:
            limits.append(int(text))
    return min(limits, default=None)


def _cgroup_directories(root: Path, controller: str) -> Iterator[tuple[int, Path]]:
    """(version, directory) from this process's own control group up to the mount point, for v2 and for v1."""
    own: dict[int, str] = {}
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and not controllers:
            own[2] = path
        elif controller in controllers.split(","):
            own[1] = path
    for version, mount_root, mount_point in _cgroup_mounts(root, controller):
        top = root / mount_point.lstrip("/")
        yield version, top
        inside = _below(own.get(version, "/"), mount_root)
        for depth in range(1, len(inside) + 1):
            yield version, top.joinpath(*inside[:depth])


def _cgroup_mounts(root: Path, controller: str) -> Iterator[tuple[int, str, str]]:
    """(version, path inside the hierarchy that is mounted, mount point); the usual places if mountinfo names none."""
    found = False
    for line in (_read(root / "proc/self/mountinfo") or "").splitlines():
        before, separator, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if not separator or len(fields) < 5 or len(kind) < 3:
            continue
        if kind[0] == "cgroup2":
            version = 2
        elif kind[0] == "cgroup" and controller in kind[2].split(","):
            version = 1
        else:
            continue
        found = True
        yield version, _unescape(fields[3]), _unescape(fields[4])
    if not found:
        yield 2, "/", "/sys/fs/cgroup"
        for name in (controller, "cpu,cpuacct") if controller == "cpu" else (controller,):
            yield 1, "/", f"/sys/fs/cgroup/{name}"


def _below(path: str, mount_root: str) -> tuple[str, ...]:
    """Parts of ``path`` below ``mount_root``; none where it lies outside of what is mounted."""
    own, top = PurePosixPath(path), PurePosixPath(mount_root)
    if ".." in own.parts or not own.is_relative_to(top):
        return ()
    return own.relative_to(top).parts


def _unescape(field: str) -> str:
    """Undo mountinfo's octal escapes of blanks, tabs and backslashes."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


# ---- OpenMP ---------------------------------------------------------------------------------------------------------

_OPENMP_NAME = re.compile(r"^lib(gomp|iomp5|omp5?)([-.].*)?\.so(\..*)?$")


def openmp_runtimes(*, root: str | Path = "/") -> list[str]:
    """Paths of the distinct OpenMP runtimes mapped into this process (libgomp, libiomp5, libomp), in load order.

    Two of them in one process fight over the cores, and some pairs give wrong results.
    """
    found: dict[str, str] = {}
    for line in (_read(Path(root, "proc/self/maps")) or "").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) < 6:
            continue
        path = fields[5].removesuffix(" (deleted)")
        if _OPENMP_NAME.match(PurePosixPath(path).name):
            found.setdefault(f"{fields[3]} {fields[4]}", path)  # device and inode: one file under two names counts once
    return list(found.values())


def openmp_in_use(runtimes: Sequence[str], preload: str) -> list[str]:
    """Those of ``runtimes`` (paths) that are called: all, or the one that ``preload`` (LD_PRELOAD) puts before them.

    libiomp5 and libomp have every function of libgomp under the same names and versions. The loader finds the
    preloaded one first, so that torch's libgomp is mapped, but nobody calls it.
    """
    for path in re.split(r"[:\s]+", preload):
        for runtime in runtimes:
            with contextlib.suppress(OSError):
                if "gomp" not in Path(path).name and os.path.samefile(path, runtime):
                    return [runtime]
    return list(runtimes)


def _read(path: Path) -> str | None:
    """Stripped text of a file of /proc or /sys; None where it does not exist or may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
