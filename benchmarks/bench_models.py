"""Prompt and decode speed of whole models, engines side by side.

Every engine runs in its own process with the same threads and prompt; rounds are interleaved, so that a machine that
changes speed changes it for all. Reported as llama-bench does: pp = prompt tokens/s, tg = generated tokens/s (median
step).

    python -m benchmarks.bench_models --model tinyllama-1.1b --engines cpullm,hf-bf16,torchao --pp 512 --tg 64
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from . import engines


def busy_cpu_s() -> float:
    """CPU seconds of all processes since boot."""
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _, _, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / 100


class Engine:
    """A process of benchmarks.engines."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name = name
        command = [sys.executable, "-m", "benchmarks.engines", name, args.model, "--threads", str(args.threads)]
        command += ["--group", str(args.group), "--compute", args.compute] + (["--sym"] if args.sym else [])
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.results: list[dict[str, Any]] = []

    def run(self, pp: int, tg: int, seed: int) -> dict[str, Any]:
        """One timed generation; adds foreign_cpu, the cores other processes used meanwhile."""
        assert self.process.stdin
        assert self.process.stdout
        start, busy = time.perf_counter(), busy_cpu_s()
        self.process.stdin.write(json.dumps({"pp": pp, "tg": tg, "seed": seed}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"engine {self.name} ended with status {self.process.wait()}")
        result = json.loads(line)
        wall = time.perf_counter() - start
        result["foreign_cpu"] = max(0.0, (busy_cpu_s() - busy - result["own_cpu_s"]) / wall)
        return result

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def available(name: str) -> bool:
    """Whether the engine's package is installed."""
    return name != "torchao" or importlib.util.find_spec("torchao") is not None


def summarise(engine: Engine, args: argparse.Namespace, commit: str, machine: str) -> dict[str, Any]:
    """The row of one engine: medians over rounds and steps."""
    results = engine.results
    steps = [step for result in results for step in result["step_s"]]
    ttft = statistics.median(result["ttft_s"] for result in results)
    return {
        "bench": "models",
        "engine": engine.name,
        "model": args.model,
        "group": args.group if engine.name != "hf-bf16" else None,
        "form": ("sym" if args.sym else "zero point") if engine.name == "cpullm" else None,
        "compute": args.compute if engine.name == "cpullm" else None,
        "pp": args.pp,
        "tg": args.tg,
        "pp_tps": args.pp / ttft,
        "tg_tps": 1 / statistics.median(steps),
        "ttft_s": ttft,
        "ms_per_token": 1000 * statistics.median(steps),
        "load_s": results[0]["load_s"],
        "rss_peak_gib": results[-1]["rss_peak_gib"],
        "threads": args.threads,
        "foreign_cpu": max(result["foreign_cpu"] for result in results),
        "rounds": len(results),
        "commit": commit,
        "machine": machine,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="tinyllama-1.1b", help=f"{', '.join(engines.SHAPES)}, {engines.REAL} or a path"
    )
    parser.add_argument("--engines", default="cpullm,hf-bf16")
    parser.add_argument("--pp", type=int, default=512, help="prompt tokens")
    parser.add_argument("--tg", type=int, default=64, help="generated tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--sym", action="store_true")
    parser.add_argument("--compute", choices=["int8", "fp32"], default="int8")
    parser.add_argument("--json", type=Path, help="append rows to this file")
    args = parser.parse_args()
    from torch_cpullm.launch import default_threads

    from . import machine

    args.threads = args.threads or default_threads().count
    facts = machine.machine_name(), machine.git_commit()
    running = []
    for name in args.engines.split(","):
        if name not in engines.ENGINES:
            parser.error(f"--engines: {name!r} is not one of {', '.join(engines.ENGINES)}")
        if available(name):
            running.append(Engine(name, args))
            running[-1].run(args.pp, 4, seed=0)  # warm-up, and one engine at a time while loading
        else:
            print(f"{name:<10} -  (not installed)")
    for round_ in range(args.rounds):
        for engine in running:
            engine.results.append(engine.run(args.pp, args.tg, seed=round_))
    print(f"{args.model}, {args.threads} threads, pp{args.pp} tg{args.tg}, {facts[0]}")
    print(
        f"{'engine':<10} {'pp t/s':>8} {'tg t/s':>8} {'TTFT s':>7} {'ms/token':>9} {'peak GiB':>9} {'foreign CPU':>12}"
    )
    for engine in running:
        row = summarise(engine, args, facts[1], facts[0])
        print(
            f"{row['engine']:<10} {row['pp_tps']:>8.1f} {row['tg_tps']:>8.2f} {row['ttft_s']:>7.2f} "
            f"{row['ms_per_token']:>9.2f} {row['rss_peak_gib']:>9.2f} {row['foreign_cpu']:>12.2f}"
        )
        if args.json:
            with args.json.open("a") as file:
                file.write(json.dumps(row) + "\n")
        engine.close()


if __name__ == "__main__":
    main()
