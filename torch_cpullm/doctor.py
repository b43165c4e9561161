"""``cpullm doctor``: what this machine offers, what torch_cpullm will use of it, and what is wrong.

``collect()`` gathers the facts, ``render()`` writes them for a person (at most 100 columns, no colours in a pipe).
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from . import __version__, launch

_X86 = ("x86_64", "amd64")
WIDTH = 100


@dataclass
class Diagnosis:
    """Facts about the machine and this process. Sizes in bytes, bandwidth in GB/s (1e9 bytes per second)."""

    cpu: str
    architecture: str
    isa: str | None  # the rung in use; None where it could not be chosen (see errors)
    isa_levels: dict[str, bool]  # rung -> can run here
    isa_cap: str | None  # CPULLM_ISA
    threads: int
    threads_reason: str
    affinity: int
    physical_cores: int
    cgroup_cpu_quota: float | None
    cgroup_memory_limit_bytes: int | None
    memory_total_bytes: int
    memory_available_bytes: int
    transparent_huge_pages: str | None
    openmp_runtimes: list[str]
    openmp_in_use: list[str]  # the others are mapped, but a preloaded one stands before them
    bandwidth_gbps: dict[str, float]  # threads (as text, for JSON) -> measured DRAM read bandwidth
    versions: dict[str, str]
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """1 where something keeps torch_cpullm from working, else 0."""
        return 1 if self.errors else 0


def collect(*, measure: bool = True) -> Diagnosis:
    """Look at the machine; with ``measure`` also time reads from memory (about two seconds)."""
    import torch

    errors: list[str] = []
    warnings: list[str] = []
    isa, levels = _isa(errors)
    choice = launch.apply_default_threads()
    runtimes = launch.openmp_runtimes()
    in_use = launch.openmp_in_use(runtimes, os.environ.get("LD_PRELOAD", ""))
    if len(in_use) > 1:
        warnings.append(
            f"{len(in_use)} OpenMP runtimes are loaded: their threads compete for the same cores, and some pairs "
            "give wrong results. Import torch first, and remove the package that brings the second one."
        )
    architecture = platform.machine()
    if architecture.lower() not in _X86:
        warnings.append(f"on {architecture} only the reference level (ref) runs: results are right, speed is not.")
    if choice.cgroup_quota is not None and choice.cgroup_quota < choice.count:
        warnings.append(
            f"{choice.count} threads share a cgroup quota of {choice.cgroup_quota:.4g} CPUs: they will be stopped in "
            f"every scheduling period ({choice.reason})."
        )
    meminfo = _meminfo()
    bandwidth: dict[str, float] = {}
    if measure:
        for threads in sorted({1, choice.count}):
            bandwidth[str(threads)] = round(read_bandwidth_gbps(threads), 1)
    return Diagnosis(
        cpu=cpu_model(),
        architecture=architecture,
        isa=isa,
        isa_levels=levels,
        isa_cap=os.environ.get("CPULLM_ISA") or None,
        threads=choice.count,
        threads_reason=choice.reason,
        affinity=choice.affinity,
        physical_cores=choice.physical_cores,
        cgroup_cpu_quota=choice.cgroup_quota,
        cgroup_memory_limit_bytes=launch.cgroup_memory_limit_bytes(),
        memory_total_bytes=meminfo.get("MemTotal", 0),
        memory_available_bytes=meminfo.get("MemAvailable", 0),
        transparent_huge_pages=_transparent_huge_pages(),
        openmp_runtimes=runtimes,
        openmp_in_use=in_use,
        bandwidth_gbps=bandwidth,
        versions={
            "torch_cpullm": __version__,
            "torch": str(torch.__version__),
            "transformers": _version("transformers"),
            "python": platform.python_version(),
            "glibc": platform.libc_ver()[1] or "none",
            "kernel": f"{platform.system()} {platform.release()}",
        },
        errors=errors,
        warnings=warnings,
    )


def _isa(errors: list[str]) -> tuple[str | None, dict[str, bool]]:
    """(rung in use, rung -> reachable); what goes wrong is appended to ``errors``."""
    try:
        from . import ops

        levels = dict(ops.isa_levels())
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        errors.append(first_line(error))
        return None, {}
    try:
        return ops.isa(), levels
    except (RuntimeError, ValueError) as error:
        errors.append(first_line(error))
        return None, levels


def first_line(error: BaseException) -> str:
    """First non-empty line of an error's text, or the error's class name.

    C++ errors carry "function, file.cpp:line, " before their text and a backtrace below it: both are left out.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"^\w+, \S+\.cpp:\d+, ", "", lines[0]) if lines else type(error).__name__


def read_bandwidth_gbps(threads: int, *, seconds: float = 0.5) -> float:
    """Measured DRAM read bandwidth in GB/s with ``threads`` threads: best of repeated sums over up to 1 GiB of int64.

    The buffer (at most a quarter of the available memory) is filled by the same number of threads, so that on a
    machine with several memory nodes each thread reads what it wrote. torch's thread count is restored.
    """
    import torch

    available = _meminfo().get("MemAvailable", 1 << 30)
    elements = max(1 << 20, min(1 << 30, available // 4) // 8)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        buffer = torch.ones(elements, dtype=torch.int64)
        best = float("inf")
        end = time.perf_counter() + seconds
        while best == float("inf") or time.perf_counter() < end:
            start = time.perf_counter()
            buffer.sum()
            best = min(best, time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return elements * 8 / best / 1e9


def cpu_model(root: str | Path = "/") -> str:
    """Name of the CPU as /proc/cpuinfo gives it, else the architecture."""
    try:
        text = Path(root, "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    match = re.search(r"^(?:model name|Model|cpu model)\s*:\s*(\S.*)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def _meminfo() -> dict[str, int]:
    """/proc/meminfo in bytes."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return {}
    return {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def _transparent_huge_pages() -> str | None:
    """always, madvise or never; None where the kernel has none."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="ascii")
    except OSError:
        return None
    match = re.search(r"\[(\w+)\]", text)
    return match[1] if match else None


def _version(distribution: str) -> str:
    """Installed version of a package, without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gib(size_bytes: int | None) -> str:
    return "none" if size_bytes is None else f"{size_bytes / 2**30:.1f} GiB"


def _rows(found: Diagnosis) -> list[tuple[str, str]]:
    """(label, text) of every line of the report."""
    reachable = [name for name, can_run in found.isa_levels.items() if can_run]
    missing = [name for name, can_run in found.isa_levels.items() if not can_run]
    levels = f"reachable: {', '.join(reachable) or 'unknown'}"
    if missing:
        levels += f"; not here: {', '.join(missing)}"
    if found.isa_cap:
        levels += f"; CPULLM_ISA={found.isa_cap}"
    quota = found.cgroup_cpu_quota
    bandwidth = ", ".join(
        f"{gbps:.1f} GB/s with {threads} thread{'s' * (threads != '1')}"
        for threads, gbps in found.bandwidth_gbps.items()
    )
    unused = set(found.openmp_runtimes) - set(found.openmp_in_use)
    runtimes = "\n".join(path + " (not in use)" * (path in unused) for path in found.openmp_runtimes) or "none"
    return [
        ("CPU", f"{found.cpu} ({found.affinity} CPUs usable, {found.physical_cores} cores, {found.architecture})"),
        ("ISA level", f"{found.isa or 'none'} ({levels})"),
        ("threads", f"{found.threads} ({found.threads_reason})"),
        ("cgroup", f"CPU quota {'none' if quota is None else f'{quota:.4g} CPUs'}, "
                   f"memory limit {_gib(found.cgroup_memory_limit_bytes)}"),
        ("memory", f"{_gib(found.memory_available_bytes)} available of {_gib(found.memory_total_bytes)}, "
                   f"transparent huge pages: {found.transparent_huge_pages or 'none'}"),
        ("bandwidth", f"reads from memory: {bandwidth}" if bandwidth else "not measured"),
        ("OpenMP", runtimes),
        ("versions", ", ".join(f"{name} {found.versions[name]}" for name in ("torch_cpullm", "torch", "transformers"))),
        ("system", ", ".join(f"{name} {found.versions[name]}" for name in ("python", "glibc", "kernel"))),
    ]  # fmt: skip


def render(found: Diagnosis, file: TextIO | None = None) -> None:
    """Write the report to ``file`` (default: standard output), at most 100 columns wide."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=file, highlight=False)
    console.width = min(WIDTH, console.width) if console.is_terminal else WIDTH
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in _rows(found):
        grid.add_row(Text(label, style="bold"), Text(text))
    for text in found.warnings:
        grid.add_row(Text("warning", style="bold yellow"), Text(text, style="yellow"))
    for text in found.errors:
        grid.add_row(Text("error", style="bold red"), Text(text, style="red"))
    if not found.warnings and not found.errors:
        grid.add_row(Text("result", style="bold"), Text("no problems found", style="green"))
    with console.capture() as capture:
        console.print(grid)
    for line in capture.get().splitlines():
        console.file.write(line.rstrip() + "\n")
