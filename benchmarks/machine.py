"""What machine this is, what it can do at best, and how much of it other processes use.

Sizes in bytes, bandwidth in GB/s (1e9 bytes per second), rates of arithmetic in GOP/s (1e9, a multiply-add is two).
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from torch_cpullm import doctor, launch, memory, ops

ROOT = Path(__file__).resolve().parents[1]
GIB = 1 << 30
UNKNOWN_L3_BYTES = 64 << 20  # where the system does not say


# ---- facts ----------------------------------------------------------------------------------------------------------


def machine_name(root: str | Path = "/") -> str:
    """The machine in words, without its name: ``AMD EPYC (family 26 model 2), 2 cores``; cores are those usable."""
    text = _read(Path(root, "proc/cpuinfo"))
    numbers = [re.search(rf"^{name}\s*:\s*(\d+)$", text, re.MULTILINE) for name in ("cpu family", "model")]
    family = f" (family {numbers[0][1]} model {numbers[1][1]})" if numbers[0] and numbers[1] else ""
    cores = launch.physical_cores(launch.cpu_affinity(), root=root)
    return f"{doctor.cpu_model(root)}{family}, {cores} core{'s' * (cores != 1)}"


def l3_bytes(root: str | Path = "/") -> int:
    """Size of all last-level caches that the usable CPUs reach; 64 MiB where the system does not say."""
    return launch.cache_bytes(root=root) or UNKNOWN_L3_BYTES


def available_bytes(root: str | Path = "/") -> int:
    """Memory that a new process may take: the system's estimate, or the control group's limit where that is lower."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB$", _read(Path(root, "proc/meminfo")), re.MULTILINE)
    available = int(match[1]) * 1024 if match else GIB
    limit = launch.cgroup_memory_limit_bytes(root)
    return available if limit is None else min(available, limit)


def git_commit() -> str:
    """Short hash of the checkout's commit, + where tracked files differ from it; "unknown" outside a checkout."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + "+" * bool(_beyond_results(changed.stdout))


def _beyond_results(status: str) -> list[str]:
    """Lines of git's short status that are not about measured rows, which a run itself appends to."""
    return [line for line in status.splitlines() if "benchmarks/results/" not in line]


def now() -> str:
    """UTC, to the millisecond: it also tells one comparison from the next."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _read(path: Path) -> str:
    """Stripped text of a file of /proc or /sys; empty where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


# ---- other processes ------------------------------------------------------------------------------------------------


class ForeignCpu:
    """CPU time that other processes took, summed over ``with`` blocks: all busy time of the system, time stolen by the
    hypervisor included, minus this process's own.

    The system counts in ticks (10 ms), so a single short block is noisy; the sum over many is not.
    """

    def __init__(self, root: str | Path = "/") -> None:
        self.wall_s = self.own_s = self.busy_s = 0.0
        self._stat = Path(root, "proc/stat")
        self._start = (0.0, 0.0, 0.0)

    def _clocks(self) -> tuple[float, float, float]:
        fields = _read(self._stat).partition("\n")[0].split()[1:]
        user, nice, system, _idle, _iowait, irq, softirq, steal = [int(f) for f in fields[:8]] + [0] * (8 - len(fields))
        ticks = user + nice + system + irq + softirq + steal
        return time.perf_counter(), time.process_time(), ticks / os.sysconf("SC_CLK_TCK")

    def __enter__(self) -> ForeignCpu:
        self._start = self._clocks()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        wall, own, busy = (end - start for end, start in zip(self._clocks(), self._start, strict=True))
        self.wall_s += wall
        self.own_s += own
        self.busy_s += busy

    @property
    def cores(self) -> float | None:
        """Other processes' CPU time per second; None where the system's counters stand still (some sandboxes)."""
        if self.wall_s == 0 or (self.busy_s == 0 and self.own_s > 0.1):
            return None
        return max(0.0, self.busy_s - self.own_s) / self.wall_s


# ---- limits ---------------------------------------------------------------------------------------------------------


def aligned_bytes(count: int) -> Tensor:
    """uint8 [count], uninitialised, from the same allocator as packed weights."""
    return memory.aligned_empty((count,))


class Memory:
    """A buffer far larger than the caches, to read memory bandwidth from with any number of threads."""

    def __init__(self, size_bytes: int) -> None:
        """size_bytes: the buffer's size; at most a third of the available memory is taken."""
        self.size_bytes = max(1 << 20, min(size_bytes, available_bytes() // 3)) // 65536 * 65536
        self._buffer = aligned_bytes(self.size_bytes).fill_(1)

    def read_gbps(self, threads: int, reads: int = 2) -> float:
        """The largest of ``reads`` passes over the buffer with ``threads`` threads, at the highest level allowed."""
        with Threads(threads):
            return max(self._pass_gbps() for _ in range(reads))

    def _pass_gbps(self) -> float:
        start = time.perf_counter()
        done = torch.ops.cpullm.read_memory.default(self._buffer)
        return done / (time.perf_counter() - start) / 1e9


def peak_gops(isa: str, threads: int, *, seconds: float = 0.02, reps: int = 5) -> float:
    """The largest of ``reps`` readings of a level's int8 dot products on registers with ``threads`` threads."""

    def reading(rounds: int) -> tuple[float, float]:
        start = time.perf_counter()
        done = torch.ops.cpullm.dot_peak.default(rounds)
        spent = time.perf_counter() - start
        return spent, done / spent / 1e9

    with Threads(threads), ops.use_isa(isa):
        rounds = 1000
        # The shortest of three: one that lost its core for a while would end the search too early.
        while (spent := min(reading(rounds)[0] for _ in range(3))) < seconds / 2 and rounds < 1 << 40:
            rounds = int(rounds * min(100.0, max(2.0, seconds / spent)))
        return max(reading(rounds)[1] for _ in range(reps))


class Threads:
    """``with Threads(4):`` sets torch's thread count and gives the old one back."""

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"threads must be at least 1, got {count}")
        self._count = count
        self._before = count

    def __enter__(self) -> None:
        self._before = torch.get_num_threads()
        torch.set_num_threads(self._count)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        torch.set_num_threads(self._before)
