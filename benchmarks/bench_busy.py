"""How much decode speed is left when another process takes part of one core.

``python -m benchmarks.bench_busy``: tokens per second of a shape with random weights while a process pinned to the last
usable CPU computes: all the time, half of every 20 ms, half of every 0.2 ms (a scheduler lets a neighbour of the first
kind have a core for milliseconds, longer than a token's steps; of the second kind for less than a step). Rounds are
interleaved; ratios are to the quiet run of the same round, medians over rounds.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOADS = {"quiet": (0.0, 0.0), "half of 20 ms": (0.5, 20.0), "half of 0.2 ms": (0.5, 0.2), "all": (1.0, 20.0)}
"""Name -> (share of the time that it computes, length of a period in ms)."""

_BUSY = """
import os, sys, time
os.sched_setaffinity(0, {int(sys.argv[1])})
share, period = float(sys.argv[2]), float(sys.argv[3]) / 1000
print("ready", flush=True)
while True:
    start = time.perf_counter()
    while time.perf_counter() - start < share * period:
        pass
    if share < 1:
        time.sleep((1 - share) * period)
"""


@contextmanager
def busy(cpu: int, share: float, period_ms: float) -> Iterator[None]:
    """A process that computes ``share`` of every period on ``cpu``; none for share 0."""
    if share == 0:
        yield
        return
    command = [sys.executable, "-c", _BUSY, *map(str, (cpu, share, period_ms))]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout
            process.stdout.readline()
            yield
        finally:
            process.kill()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tinyllama-1.1b", help="a shape of benchmarks/shapes.py")
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--tg", type=int, default=40, help="tokens of a run, at least 3")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, help="append rows to this file")
    args = parser.parse_args(argv)
    if args.tg < 3 or args.rounds < 1:
        parser.error("--tg is at least 3, --rounds at least 1")
    return args


def summary(times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """times: seconds per token of each load, one per round -> one row per load."""
    quiet = times["quiet"]
    return [
        {
            "bench": "busy",
            "load": name,
            "tg_tps": round(1 / statistics.median(seconds), 2),
            "pct_of_quiet": round(100 * statistics.median(q / s for q, s in zip(quiet, seconds, strict=True)), 1),
            "rounds": len(seconds),
        }
        for name, seconds in times.items()
    ]


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    import torch

    from torch_cpullm import CpuLlmConfig, launch

    from . import engines, rows, shapes

    threads = args.threads or launch.default_threads().count
    torch.set_num_threads(threads)
    settings = CpuLlmConfig(group_size=args.group, sym=True)
    engine = engines.HuggingFace(shapes.packed_model(args.model, settings), 0, 0)
    request = {"depth": 0, "pp": 8, "tg": args.tg, "batch": 1, "seed": 0}
    cpu = max(launch.cpu_affinity())
    engine.run(request, engines.Clock())
    times: dict[str, list[float]] = {name: [] for name in LOADS}
    for _ in range(args.rounds):
        for name, (share, period_ms) in LOADS.items():
            with busy(cpu, share, period_ms):
                time.sleep(0.1)
                clock = engines.Clock()
                engine.run(request, clock)
                times[name].append(statistics.mean(clock.times[1:]))
    facts = {"model": args.model, "group": args.group, "form": "sym", "threads": threads, "tg": args.tg}
    for row in summary(times):
        print(f"{row['load']:<15} {row['tg_tps']:>8.2f} tok/s {row['pct_of_quiet']:>6.1f} % of quiet")
        rows.write(row | facts, args.json)


if __name__ == "__main__":
    main()
