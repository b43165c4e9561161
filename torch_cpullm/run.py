"""``cpullm run``: a Python program bound to the cores and the memory of one NUMA node.

    decide()   options and machine -> Plan; raises InputError where the two do not fit
    bind()     CPUs and memory of this process, which a program that it becomes keeps
    become()   the program in the place of this process: exit status and signals are its own
    ranks()    instead: several processes of this command, started as torchrun does, which bind and become one each

What the system refuses (some containers forbid binding) is said and left out, unless the user asked for it by name.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import signal
import struct
import sys
import sysconfig
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import launch, numa
from .runner import InputError

# Library -> (file name patterns in the order of preference, what to install).
LIBRARIES = {
    "intel": (("libiomp5.so",), "pip install intel-openmp"),
    "jemalloc": (("libjemalloc.so", "libjemalloc.so.*"), "apt install libjemalloc2 (dnf: jemalloc)"),
    "tcmalloc": (
        ("libtcmalloc.so", "libtcmalloc.so.*", "libtcmalloc_minimal.so", "libtcmalloc_minimal.so.*"),
        "apt install libtcmalloc-minimal4 (dnf: gperftools-libs)",
    ),
}

# What each library gets unless the user has set it. KMP_BLOCKTIME: threads wait for the next parallel region for 1 ms
# before they sleep, as torch's own launcher has it; the runtime's 200 ms would burn the cores between tokens.
SETTINGS = {
    "intel": {"KMP_BLOCKTIME": "1"},
    "jemalloc": {"MALLOC_CONF": "oversize_threshold:1,background_thread:true,metadata_thp:auto"},
    "tcmalloc": {},
}
PIN_INTEL = "granularity=fine,compact,1,0"
_PINNING = ("KMP_AFFINITY", "OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY")


@dataclass(frozen=True)
class Options:
    """What the user asked for; None: not said. cores: CPU numbers as text; memory: prefer, bind or any.

    rank: (number, how many there are) of a process that shares the machine with others like it.
    """

    threads: int | None = None
    cores: str | None = None
    node: int | None = None
    memory: str = "prefer"
    openmp: str = "default"
    malloc: str = "default"
    rank: tuple[int, int] | None = None


@dataclass
class Plan:
    """How to start the program.

    cpus       CPUs to run on
    threads    OMP_NUM_THREADS as text
    node       node to take memory from; None: as the system does, each page on the node that writes it first
    where      the CPUs' node or nodes in words, empty on a machine with one node
    preload    libraries to load before all others
    variables  environment variables to set
    notes      what deserves a warning
    """

    cpus: frozenset[int]
    threads: str
    node: int | None
    where: str
    preload: list[Path] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


# ---- deciding -------------------------------------------------------------------------------------------------------


def decide(
    options: Options,
    *,
    root: str | Path = "/",
    affinity: Collection[int] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Plan:
    """The plan for this machine: of the CPUs that the process may use already, those of one node.

    root: directory that holds ``proc`` and ``sys``; affinity: CPUs of the present mask; environment: os.environ.
    """
    env = os.environ if environment is None else environment
    usable = launch.cpu_affinity() if affinity is None else frozenset(affinity)
    nodes = {node: cpus & usable for node, cpus in numa.nodes(root=root).items()}
    if options.cores is not None and options.node is not None:
        raise InputError("--cores and --node exclude each other")
    if options.cores is not None:
        cpus = _listed(options.cores, usable)
        nodes = {node: there & cpus for node, there in nodes.items()}
    if options.rank is not None:
        chosen = {options.node: nodes.get(options.node, frozenset())} if options.node is not None else nodes
        cpus = _of_rank(options, chosen, usable if options.cores is None else cpus, root)
    elif options.cores is None:
        cpus = _of_one_node(options, nodes, usable, root)
    threads, notes = _threads(options, cpus, env, root)
    ours = [node for node, there in nodes.items() if there & cpus]
    several = len(nodes) > 1
    where = f"node{'s' * (len(ours) > 1)} {numa.format_cpus(ours)}" if several and ours else ""
    one = several and len(ours) == 1 and options.memory != "any"
    plan = Plan(cpus, threads, ours[0] if one else None, where, notes=notes)
    if options.memory == "bind" and len(ours) > 1:
        raise InputError(f"--memory bind needs the CPUs of one node; --cores has those of {plan.where}")
    _preload(options, plan, env)
    return plan


def _listed(text: str, usable: Collection[int]) -> frozenset[int]:
    """The CPUs of ``--cores``, all of which must be usable."""
    try:
        cpus = numa.parse_cpus(text)
    except ValueError as error:
        raise InputError(f"--cores: {error}") from None
    missing = cpus - frozenset(usable)
    if missing:
        shown = numa.format_cpus(usable)
        raise InputError(f"--cores: CPU {numa.format_cpus(missing)} is not available here; there is {shown}")
    return cpus


def _of_one_node(
    options: Options, nodes: Mapping[int, frozenset[int]], usable: frozenset[int], root: str | Path
) -> frozenset[int]:
    """One CPU per core of the chosen node, or of the one with the most usable cores; all if more threads are wanted."""
    candidates = {node: cpus for node, cpus in nodes.items() if cpus} or {0: usable}
    if options.node is not None and options.node not in candidates:
        there = numa.format_cpus(candidates)
        raise InputError(f"--node: node {options.node} has no CPU that can be used here; there is node {there}")
    cores = {node: launch.one_cpu_per_core(cpus, root=root) for node, cpus in candidates.items()}
    node = max(cores, key=lambda number: (len(cores[number]), -number)) if options.node is None else options.node
    if options.threads is None or options.threads <= len(cores[node]):
        return frozenset(cores[node])
    if options.threads <= len(candidates[node]):
        return candidates[node]
    hint = "; --cores can name CPUs of several nodes" if options.threads <= len(usable) else ""
    have = len(candidates[node])
    raise InputError(f"--threads: {options.threads} threads, but {have} CPU{'s' * (have > 1)} to run on{hint}")


def _of_rank(
    options: Options, nodes: Mapping[int, frozenset[int]], usable: frozenset[int], root: str | Path
) -> frozenset[int]:
    """One CPU per core of a node for each rank, or where there are fewer nodes, an even part of all, node by node."""
    rank, count = options.rank or (0, 1)
    found = [launch.one_cpu_per_core(cpus, root=root) for cpus in nodes.values() if cpus]
    if not found and options.node is None:
        found = [launch.one_cpu_per_core(usable, root=root)]
    if len(found) >= count:
        return frozenset(found[rank])
    cores = [cpu for node in found for cpu in node]
    if len(cores) < count:
        raise InputError(f"--nproc: {count} ranks, but {len(cores)} core{'s' * (len(cores) != 1)} to run on")
    return frozenset(cores[len(cores) * rank // count : len(cores) * (rank + 1) // count])


def _threads(options: Options, cpus: frozenset[int], env: Mapping[str, str], root: str | Path) -> tuple[str, list[str]]:
    """(OMP_NUM_THREADS, warnings): the option, else the user's variable, else what cores and cgroup quota allow."""
    default = launch.default_threads(root=root, affinity=cpus)
    asked = env.get("OMP_NUM_THREADS", "").strip()
    if options.threads is not None:
        if options.threads > len(cpus):
            raise InputError(f"--threads: {options.threads} threads, but --cores names {len(cpus)} CPUs")
        asked = str(options.threads)
    quota = default.cgroup_quota
    if options.rank is not None and quota is not None:
        quota /= options.rank[1]
    if not asked:
        return str(default.count if quota is None else max(1, min(default.count, math.floor(quota)))), []
    first = asked.split(",")[0].strip()
    count = int(first) if first.isascii() and first.isdecimal() else 0
    notes = []
    if count > len(cpus):
        notes.append(f"OMP_NUM_THREADS={asked} is more than the {len(cpus)} CPUs to run on")
    elif quota is not None and count > max(1, math.floor(quota)):
        notes.append(f"{count} threads share a cgroup quota of {quota:.4g} CPUs")
    return asked, notes


# ---- libraries ------------------------------------------------------------------------------------------------------


def _preload(options: Options, plan: Plan, env: Mapping[str, str]) -> None:
    """Fill in the plan's libraries and variables."""
    for option, name in (("--openmp", options.openmp), ("--malloc", options.malloc)):
        if name == "default":
            continue
        path = find_library(name, env)
        if path is None:
            raise InputError(f"{option} {name}: not found; try: {LIBRARIES[name][1]}")
        if any(mark in str(path) for mark in " :\t\n"):
            raise InputError(f"{option} {name}: {path} cannot be preloaded: its name has a blank or a colon")
        plan.preload.append(path)
        plan.variables |= {key: value for key, value in SETTINGS[name].items() if not env.get(key)}
    # Pinned only where every thread has a CPU to itself: otherwise (a cgroup quota, --threads) the first CPUs of the
    # list would go to whoever starts, while others idle.
    pinned = options.openmp == "intel" and plan.threads == str(len(plan.cpus))
    if pinned and not any(env.get(name) for name in _PINNING):
        plan.variables["KMP_AFFINITY"] = PIN_INTEL
    plan.variables["OMP_NUM_THREADS"] = plan.threads
    if plan.preload:
        earlier = env.get("LD_PRELOAD", "").replace(":", " ").split()
        ours = [str(path) for path in plan.preload]
        plan.variables["LD_PRELOAD"] = ":".join([*ours, *(entry for entry in earlier if entry not in ours)])


def find_library(name: str, env: Mapping[str, str]) -> Path | None:
    """The file of ``intel``, ``jemalloc`` or ``tcmalloc`` that this interpreter can load; None where there is none."""
    for directory in _directories(name, env):
        for pattern in LIBRARIES[name][0]:
            for path in sorted(directory.absolute().glob(pattern)):
                if _same_machine(path):
                    return path
    return None


def _directories(name: str, env: Mapping[str, str]) -> Iterator[Path]:
    """Where libraries are: LD_LIBRARY_PATH, Python environments, the user's own and the system's, in this order."""
    yield from (Path(entry) for entry in env.get("LD_LIBRARY_PATH", "").split(":") if entry)
    if name == "intel":
        yield from _of_package("intel-openmp", "libiomp5.so")
    yield Path(sys.prefix, "lib")
    yield from (Path(env[variable], "lib") for variable in ("VIRTUAL_ENV", "CONDA_PREFIX") if env.get(variable))
    yield Path.home() / ".local/lib"
    if name == "intel":
        yield Path("/opt/intel/oneapi/compiler/latest/lib")
    yield from (Path("/usr/local/lib"), Path("/usr/local/lib64"))
    multiarch = sysconfig.get_config_var("MULTIARCH") or f"{platform.machine()}-linux-gnu"
    yield from (Path("/usr/lib", multiarch), Path("/lib", multiarch))
    yield from (Path("/usr/lib64"), Path("/usr/lib"))


def _of_package(distribution: str, file: str) -> Iterator[Path]:
    """Directories in which an installed package has put the file."""
    try:
        found = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for entry in found:
        if entry.name == file:
            yield Path(str(entry.locate())).resolve().parent


def _same_machine(path: Path) -> bool:
    """Whether the file is a shared object of this interpreter's word size and processor."""
    try:
        heads = []
        for file in (path, Path("/proc/self/exe")):
            with file.open("rb") as stream:
                heads.append(stream.read(20))
    except OSError:
        return False
    library, python = heads
    if len(library) < 20 or len(python) < 20 or library[:4] != b"\x7fELF":
        return False
    return library[4:6] == python[4:6] and struct.unpack("<HH", library[16:]) == (
        3,
        struct.unpack("<H", python[18:])[0],
    )


# ---- starting -------------------------------------------------------------------------------------------------------


def command(target: str, arguments: Sequence[str], *, module: bool) -> list[str]:
    """The interpreter's command line for a script (``-``: standard input) or a module; InputError: no such script."""
    if not sys.executable:
        raise InputError("this Python does not know its own path")
    if not module and target != "-" and not Path(target).exists():
        raise InputError(f"no such file: {target}")
    return [sys.executable, *(["-m"] if module else []), target, *arguments]


def bind(plan: Plan, options: Options) -> str:
    """Bind this process; returns one line that says what was done, and adds to ``plan.notes`` what was refused.

    InputError where the refused was asked for by name.
    """
    cpus = f"{'CPU' if len(plan.cpus) == 1 else 'CPUs'} {numa.format_cpus(plan.cpus)}"
    done = []
    try:
        os.sched_setaffinity(0, plan.cpus)
        done.append(f"{cpus} of {plan.where}" if plan.where else cpus)
    except OSError as error:
        if options.cores is not None or options.node is not None:
            raise InputError(f"the system refuses to bind to {cpus}: {error.strerror}") from error
        plan.notes.append(f"not bound to CPUs: {error.strerror}")
    done.append(f"{plan.threads} thread{'s' * (plan.threads != '1')}")
    if plan.node is not None:
        try:
            numa.set_memory_node(plan.node, strict=options.memory == "bind")
            done.append(f"memory of node {plan.node}")
        except OSError as error:
            if options.memory == "bind":
                raise InputError(f"--memory bind: the system refuses: {error.strerror or error}") from error
            plan.notes.append(f"memory not bound to node {plan.node}: {error.strerror or error}")
    who = "" if options.rank is None else f"rank {options.rank[0]} of {options.rank[1]}: "
    return f"cpullm run: {who}" + ", ".join([*done, *(path.name for path in plan.preload)])


def become(words: Sequence[str], plan: Plan) -> None:
    """Replace this process by the program; does not return."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed by the caller: ">&-"
            stream.flush()
    os.execve(words[0], list(words), {**os.environ, **plan.variables})


# ---- several ranks --------------------------------------------------------------------------------------------------


def rank_of(count: int, env: Mapping[str, str]) -> tuple[int, int] | None:
    """(number, ``count``) of a process that torch's launcher has started as one of ``count``; None for any other."""
    started = "TORCHELASTIC_RUN_ID" in env and env.get("LOCAL_WORLD_SIZE") == str(count)
    return (int(env["LOCAL_RANK"]), count) if started else None


def ranks(words: Sequence[str], count: int) -> int:
    """Start ``count`` processes with these words as torchrun does, RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.

    Returns the exit status: 0, that of the first rank that failed, or 128 + the signal that ended it or this process.
    When a rank fails or a signal comes, all others are ended.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, words[0])(*words[1:])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        what = f"exit status {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        print(f"cpullm run: rank {rank} ended with {what}; the others were ended", file=sys.stderr)
        return code if code >= 0 else 128 - code
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0
