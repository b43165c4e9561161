"""Decode and prompt speed of one model under torch's own OpenMP runtime (libgomp) and under Intel's (libiomp5).

Each runtime has a process of its own, started by ``cpullm run``; rounds are interleaved and their order alternates, so
that a machine that changes speed changes it for all. A ratio is the median over rounds of libgomp's time by the
runtime's time in the same round: above 1 the runtime is faster. intel is pinned (one thread per core, as ``cpullm run``
does it), intel-free is not.

    pip install intel-openmp
    python -m benchmarks.bench_openmp --model tinyllama-1.1b --tg 64 --rounds 7
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VARIANTS: dict[str, tuple[str, dict[str, str]]] = {
    "gnu": ("default", {}),
    "intel": ("intel", {}),
    "intel-free": ("intel", {"KMP_AFFINITY": "disabled"}),
}
"""Name -> (--openmp, environment variables)."""


# ---- a runtime's process --------------------------------------------------------------------------------------------


class Clock:
    """A streamer that writes down when tokens came; the first call carries the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def serve(args: argparse.Namespace) -> None:
    """Load the model, say under what it runs, then time one generation per line of standard input (its seed)."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not look like an answer
    import torch

    import torch_cpullm
    from torch_cpullm import launch

    from .shapes import float_model

    def say(message: dict[str, Any]) -> None:
        answer.write(json.dumps(message) + "\n")
        answer.flush()

    config = torch_cpullm.CpuLlmConfig(group_size=args.group, sym=args.sym)
    model = torch_cpullm.optimize(float_model(args.model, torch.bfloat16), config)
    runtimes = launch.openmp_in_use(launch.openmp_runtimes(), os.environ.get("LD_PRELOAD", ""))
    say({"runtimes": [Path(path).name for path in runtimes], "threads": torch.get_num_threads()})
    vocab = model.config.get_text_config().vocab_size
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": vocab, "max_new_tokens": args.tg}
    for line in sys.stdin:
        ids = torch.randint(3, vocab, (1, args.pp), generator=torch.Generator().manual_seed(int(line)))
        clock, used, start = Clock(), os.times(), time.perf_counter()
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **settings)
        now, times = os.times(), clock.times[1:]
        steps = [b - a for a, b in itertools.pairwise(times)]
        own = now.user + now.system - used.user - used.system
        say({"ttft_s": times[0] - start, "step_s": statistics.median(steps), "own_cpu_s": own})


class Runtime:
    """The process of one variant."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        openmp, variables = VARIANTS[name]
        self.name = name
        self.results: list[dict[str, float]] = []
        command = [sys.executable, "-m", "torch_cpullm", "run", "--quiet", "--openmp", openmp]
        command += ["--threads", str(args.threads)] if args.threads else []
        command += ["-m", "benchmarks.bench_openmp", "--serve", "--model", args.model, "--group", str(args.group)]
        command += ["--pp", str(args.pp), "--tg", str(args.tg)] + ["--sym"] * args.sym
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "KMP_", "GOMP_"))}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=inherited | variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.loaded = self._answer()

    def run(self, seed: int) -> dict[str, float]:
        """One timed generation; foreign_cpu: cores that other processes used meanwhile."""
        from .bench_models import busy_cpu_s

        assert self.process.stdin
        start, busy = time.perf_counter(), busy_cpu_s()
        self.process.stdin.write(f"{seed}\n")
        self.process.stdin.flush()
        result = self._answer()
        spent = busy_cpu_s() - busy - result["own_cpu_s"]
        return {**result, "foreign_cpu": max(0.0, spent / (time.perf_counter() - start))}

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"bench_openmp: {self.name} ended with status {self.process.wait()}")
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


# ---- comparing ------------------------------------------------------------------------------------------------------


def rows(runtimes: Sequence[Runtime], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per runtime: medians over rounds, and ratios to the first runtime round by round."""

    def ratio(runtime: Runtime, key: str) -> float:
        pairs = zip(runtimes[0].results, runtime.results, strict=True)
        return statistics.median(first[key] / other[key] for first, other in pairs)

    def median(runtime: Runtime, key: str) -> float:
        return statistics.median(result[key] for result in runtime.results)

    return [
        {
            "bench": "openmp",
            "variant": runtime.name,
            "runtime": "+".join(runtime.loaded["runtimes"]),
            "model": args.model,
            "group": args.group,
            "form": "sym" if args.sym else "zero point",
            "threads": runtime.loaded["threads"],
            "pp": args.pp,
            "tg": args.tg,
            "rounds": args.rounds,
            "pp_tps": args.pp / median(runtime, "ttft_s"),
            "pp_ratio": ratio(runtime, "ttft_s"),
            "ms_per_token": 1000 * median(runtime, "step_s"),
            "tg_ratio": ratio(runtime, "step_s"),
            "tg_ratios": [
                round(first["step_s"] / other["step_s"], 4)
                for first, other in zip(runtimes[0].results, runtime.results, strict=True)
            ],
            "foreign_cpu": max(result["foreign_cpu"] for result in runtime.results),
        }
        for runtime in runtimes
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tinyllama-1.1b", help="as bench_models has it")
    parser.add_argument("--variants", default="gnu,intel,intel-free", help="the first one is what ratios are against")
    parser.add_argument("--pp", type=int, default=64, help="prompt tokens")
    parser.add_argument("--tg", type=int, default=64, help="generated tokens, at least 3")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--sym", action="store_true")
    parser.add_argument("--json", type=Path, help="append rows to this file")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.variants = args.variants.split(",")
    unknown = set(args.variants) - set(VARIANTS)
    if unknown or args.tg < 3 or args.rounds < 1:
        parser.error(f"--variants knows {', '.join(VARIANTS)}; --tg is at least 3, --rounds at least 1")
    return args


def main() -> None:
    args = parse()
    if args.serve:
        serve(args)
        return
    from . import machine

    runtimes = []
    for name in args.variants:  # one at a time: loading takes memory and all cores
        runtimes.append(Runtime(name, args))
        runtimes[-1].run(seed=0)
    for round_ in range(args.rounds):
        for runtime in runtimes if round_ % 2 == 0 else reversed(runtimes):
            runtime.results.append(runtime.run(seed=round_))
    for runtime in runtimes:
        runtime.close()
    facts = {"machine": machine.machine_name(), "commit": machine.git_commit(), "date": machine.now()}
    print(f"{args.model}, pp{args.pp} tg{args.tg}, {args.rounds} rounds, {facts['machine']}")
    print(f"{'variant':<11} {'runtime':<16} {'threads':>7} {'pp t/s':>8} {'ratio':>6} {'ms/token':>9} {'ratio':>6}")
    for row in rows(runtimes, args):
        print(
            f"{row['variant']:<11} {row['runtime']:<16} {row['threads']:>7} {row['pp_tps']:>8.1f} "
            f"{row['pp_ratio']:>6.3f} {row['ms_per_token']:>9.2f} {row['tg_ratio']:>6.3f}   "
            f"rounds {min(row['tg_ratios']):.3f}-{max(row['tg_ratios']):.3f}, foreign CPU {row['foreign_cpu']:.2f}"
        )
        if args.json:
            with args.json.open("a") as file:
                file.write(json.dumps(row | facts) + "\n")


if __name__ == "__main__":
    main()
