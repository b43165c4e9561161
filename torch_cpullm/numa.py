"""NUMA nodes: which CPUs they have, and where this process's memory comes from.

A node is a socket, or a part of one, with memory of its own: reading another node's memory takes longer and shares
a narrower bus. Every reader takes ``root``, the directory that holds ``sys``. Nothing here imports torch.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Collection
from pathlib import Path

# set_mempolicy(2): glibc has no function for it, libnuma is not everywhere, numactl would be one more process.
_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}
_PREFERRED, _BIND = 1, 2

_MOST_CPUS = 1 << 16


def parse_cpus(text: str) -> frozenset[int]:
    """``"0-3,8"`` -> {0, 1, 2, 3, 8}, as taskset and /sys write CPUs; ValueError says what is wrong."""
    cpus: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:\s*-\s*(\d{1,6}))?\s*", part)
        if match is None:
            raise ValueError(f"{part.strip()!r} is neither a number nor a range like 0-7")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"{part.strip()} runs backwards")
        if last >= _MOST_CPUS:
            raise ValueError(f"{last} is too large")
        cpus.update(range(first, last + 1))
    return frozenset(cpus)


def format_cpus(cpus: Collection[int]) -> str:
    """{0, 1, 2, 3, 8} -> ``"0-3,8"``; at most four ranges, then an ellipsis."""
    ranges: list[list[int]] = []
    for cpu in sorted(cpus):
        if ranges and ranges[-1][1] == cpu - 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in ranges]
    return ",".join(texts if len(texts) <= 4 else [*texts[:3], "...", texts[-1]])


def nodes(*, root: str | Path = "/") -> dict[int, frozenset[int]]:
    """Node -> its CPUs, in ascending order, nodes without CPUs included; empty where the system names no nodes."""
    found: dict[int, frozenset[int]] = {}
    for directory in Path(root, "sys/devices/system/node").glob("node[0-9]*"):
        try:
            text = (directory / "cpulist").read_text(encoding="ascii").strip()
            found[int(directory.name[4:])] = parse_cpus(text) if text else frozenset()
        except (OSError, ValueError):
            continue
    return dict(sorted(found.items()))


def set_memory_node(node: int, *, strict: bool = False) -> None:
    """Take this thread's new pages, and those of what it executes, from ``node``.

    When the node is full the next one helps out; with ``strict`` none does, and the process may be killed for want of
    memory. OSError where the system refuses: some containers forbid the call, and a node may have no memory.
    """
    number = _SET_MEMPOLICY.get(platform.machine())
    if number is None:
        raise OSError(f"not known how to ask for it on {platform.machine()}")
    bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    words = node // bits + 1
    mask = (ctypes.c_ulong * words)()
    mask[node // bits] = 1 << node % bits
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    arguments = (ctypes.c_long(_BIND if strict else _PREFERRED), mask, ctypes.c_ulong(words * bits + 1))
    if syscall(ctypes.c_long(number), *arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
