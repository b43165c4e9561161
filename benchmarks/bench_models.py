"""Prompt and decode speed of whole models, engines side by side.

Every engine runs in its own process and environment with the same threads, prompt and depth. pp = prompt tokens/s after
--depth tokens of context, tg = generated tokens/s (median step) after the prompt; with --batch the tokens of all
sequences together.

Memory bandwidth of a shared machine may double and halve within a minute, so engines take turns of a fraction of a
second. In a round each computes its prompt, then all decode in turns of --turn tokens, A B C A B C, and wait with their
caches in between; the bandwidth is read between turns. The first token of a turn finds cold caches and does not count.
tg_ratio and pp_ratio are medians of paired ratios to the first engine, with their quartiles: a turn against that
engine's turns before and after, see benchmarks/turns.py. pct_bw is the median over turns of GB/s over the larger
reading beside the turn.

Rule: a row is ``unstable`` where the 95 % interval of the median of tg_ratio or pp_ratio, +- 1.57 (q3 - q1) /
sqrt(pairs), is wider than 5 % up or down, or where there are fewer than three pairs. More --rounds narrow it. The
memory's own wandering (bw_min, bw_max) does not count. Engines that do not fit into memory together are loaded anew in
every round and take its turns alone: their pairs are minutes apart, and a machine that wanders shows as unstable.

    python -m benchmarks.bench_models --model tinyllama-1.1b --engines cpullm,llama.cpp,openvino,hf-bf16,torchao

An engine may carry settings, and may come more than once: cpullm:g32:sym, cpullm:g128, cpullm:fp32, torchao:g64,
openvino:g32, llama.cpp:q4_0 (llama.cpp alone is Q4_0 and Q4_K_M). Peers come with `make peers`; a missing one is a
dash.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from . import machine, peers, rows, shapes, turns
from .peers import GIB, Missing
from .turns import Turn

ROTATE_CACHES = 8  # as bench_ops reads memory
SETTLE_S = 0.02  # OpenMP's threads spin on for about 10 ms after their last work, and would take the next one's cores


def busy_cpu_s() -> float:
    """CPU seconds of all processes since boot."""
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _, _, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / 100


# ---- what to run ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """An engine with its settings; those that it has not are None."""

    name: str
    group: int | None = None
    form: str | None = None
    compute: str | None = None

    @property
    def label(self) -> str:
        """Engine and settings in a few characters."""
        group = None if self.group is None else f"g{self.group}"
        return " ".join(part for part in (self.name, group, self.form, self.compute) if part)

    def peak_bytes(self, weights: float, packed: bool = False) -> float:
        """About what loading takes at most; packed: ours makes packed weights at once, see shapes.MADE_PACKED."""
        floats = ("hf-bf16", "torchao") if packed else ("cpullm", "hf-bf16", "torchao")
        return weights * (2.3 if self.name in floats else 0.9)

    def resident_bytes(self, weights: float) -> float:
        """About what a loaded model takes."""
        return weights * (2.1 if self.name == "hf-bf16" else 0.8)


def choices(text: str, args: argparse.Namespace) -> list[Choice]:
    """The engines that --engines names; ValueError says what is wrong."""
    defaults = {
        "cpullm": Choice("cpullm", args.group, "sym" if args.sym else "zero point", args.compute),
        "llama.cpp": Choice("llama.cpp"),
        "openvino": Choice("openvino", 128, "sym"),
        "hf-bf16": Choice("hf-bf16"),
        "torchao": Choice("torchao", args.group),
    }
    marks: dict[str, tuple[str, str, str]] = {  # mark -> engine, setting, value
        "sym": ("cpullm", "form", "sym"),
        "zero": ("cpullm", "form", "zero point"),
        "int8": ("cpullm", "compute", "int8"),
        "fp32": ("cpullm", "compute", "fp32"),
        "bf16": ("cpullm", "compute", "bf16"),
        "q4_0": ("llama.cpp", "form", "Q4_0"),
        "q4_k_m": ("llama.cpp", "form", "Q4_K_M"),
    }
    found = []
    for part in text.split(","):
        name, *settings = part.strip().split(":")
        if name not in defaults:
            raise ValueError(f"--engines: {name!r} is not one of {', '.join(defaults)}")
        choice = defaults[name]
        for mark in settings:
            size = re.fullmatch(r"g(\d+)", mark)
            if size and choice.group is not None and int(size[1]) in (32, 64, 128):
                choice = replace(choice, group=int(size[1]))
            elif mark.lower() in marks and marks[mark.lower()][0] == name:
                _, key, value = marks[mark.lower()]
                choice = replace(choice, **{key: value})
            else:
                raise ValueError(f"--engines: {name} has no setting {mark!r}")
        if name != "llama.cpp":
            found.append(choice)
        for form in (choice.form,) if choice.form else ("Q4_0", "Q4_K_M"):
            if name == "llama.cpp":
                found.append(replace(choice, form=form, group=32 if form == "Q4_0" else None))
    return list(dict.fromkeys(found))


def weights_of(model: str) -> float:
    """About how many weights a model has."""
    known = shapes.parameters(model)
    if known is not None:
        return known
    path = shapes.find(model)
    if path.is_dir():
        return sum(file.stat().st_size for file in path.glob("*.safetensors")) / 2
    return path.stat().st_size / 0.6


# ---- a running engine -----------------------------------------------------------------------------------------------


class Engine:
    """A process of benchmarks.engines."""

    def __init__(self, choice: Choice, args: argparse.Namespace) -> None:
        """Makes the peer's form of the model where it needs one; Missing says why the engine cannot run."""
        self.choice = choice
        self.prompts: list[Turn] = []
        self.decodes: list[Turn] = []
        self.rss_peak_gib = 0.0
        self.ways = 1
        self.loaded: dict[str, Any] = {}
        room = args.depth + args.pp + max(args.tg, 4)
        self._request = {"pp": args.pp, "tg": args.tg, "depth": args.depth, "batch": args.batch, "room": room}
        self._process: subprocess.Popen[str] | None = None
        python, self._environment = sys.executable, dict(os.environ)
        file: Path | None = None
        if choice.name in peers.PACKAGES:
            python = str(peers.PYTHON)
            file, group = peers.prepare(
                choice.name,
                args.model,
                form=choice.form,
                group=choice.group,
                threads=args.threads,
                weights=weights_of(args.model),
                available=machine.available_bytes(),
            )
            self.choice = replace(choice, group=group)
        if choice.name == "llama.cpp":
            self._environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
            if os.environ.get("CPULLM_ISA") == "avx2":  # a build for the same instructions
                self._environment["PYTHONPATH"] = str(peers.LLAMA_AVX2)
        if choice.name == "torchao" and peers.TORCHAO.is_dir():
            path = [str(peers.TORCHAO), *filter(None, [os.environ.get("PYTHONPATH")])]
            self._environment["PYTHONPATH"] = os.pathsep.join(path)
        self._command = [python, "-m", "benchmarks.engines", choice.name, args.model, "--threads", str(args.threads)]
        self._command += ["--file", str(file)] if file else []
        self._command += ["--group", str(choice.group)] if choice.group else []
        self._command += ["--compute", choice.compute] if choice.compute else []
        self._command += ["--sym"] if choice.form == "sym" else []

    def start(self) -> None:
        """Load the model and generate a few tokens."""
        self._process = subprocess.Popen(
            self._command,
            cwd=peers.ROOT,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.loaded = self._answer()
        self.ways = self.loaded["ways"]
        self.prompt(0, tg=4)
        for _ in range(self.ways):
            self.decode(0, 3)
        self.end()

    def prompt(self, round_: int, tg: int | None = None) -> list[Turn]:
        """Random tokens by the round's number, once in each way; the caches stay for ``decode``."""
        first = self._turn(self._request | {"seed": round_, "tg": tg or self._request["tg"]}, round_)
        return [first, *(self._turn({"go": 1}, round_) for _ in range(self.ways - 1))]

    def decode(self, round_: int, tokens: int) -> Turn:
        """The next tokens of the sequence."""
        return self._turn({"go": tokens}, round_)

    def end(self) -> None:
        """End the sequence."""
        self._tell({"go": 0})

    def _turn(self, request: dict[str, Any], round_: int) -> Turn:
        start, busy = time.perf_counter(), busy_cpu_s()
        self._tell(request)
        answer = self._answer()
        wall = time.perf_counter() - start
        if self.ways == 1 or not self.rss_peak_gib:  # with several, before the second has a cache too
            self.rss_peak_gib = answer["rss_peak_gib"]
        foreign = busy_cpu_s() - busy - answer["own_cpu_s"]
        middle = time.perf_counter() - sum(answer["times"]) / 2
        return Turn(round_, answer["way"], middle, answer["times"], wall_s=wall, foreign_s=foreign)

    def _tell(self, request: dict[str, Any]) -> None:
        assert self._process
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # the next answer says why
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._process
        assert self._process.stdout
        line = self._process.stdout.readline()
        message = json.loads(line) if line else {"error": f"ended with status {self._process.wait()}"}
        if "error" in message:
            self.close()
            raise Missing(message["error"])
        return message

    def close(self) -> None:
        """End the process."""
        if self._process:
            assert self._process.stdin
            assert self._process.stdout
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()
            self._process = None


def summarise(engine: Engine, first: Engine, args: argparse.Namespace, bandwidth: Sequence[float]) -> dict[str, Any]:
    """The row of one engine, ratios to ``first``. bandwidth: all readings in GB/s in order."""
    choice, loaded = engine.choice, engine.loaded
    decodes, prompts = turns.best_way(engine.decodes), turns.best_way(engine.prompts)
    theirs = turns.best_way(first.decodes), turns.best_way(first.prompts)
    found = turns.conclude(decodes, prompts, theirs, loaded["weight_bytes"])
    row = {
        "bench": "models",
        "engine": choice.name,
        "model": args.model if args.model in (*shapes.SHAPES, shapes.REAL) else Path(args.model).name,
        "group": choice.group,
        "form": choice.form,
        "compute": choice.compute,
        "isa": os.environ.get("CPULLM_ISA"),
        "pp": args.pp,
        "tg": args.tg,
        "pp_tps": args.batch * args.pp / found["ttft_s"],
        "tg_tps": 1000 * args.batch / found["ms_per_token"],
        **found,
        "ratio_to": first.choice.label,
        "load_s": loaded["load_s"],
        "rss_peak_gib": engine.rss_peak_gib,
        "threads": args.threads,
        "foreign_cpu": turns.foreign_cores([*engine.prompts, *engine.decodes]),
        "rounds": len({turn.round for turn in prompts}),
        "turn": args.turn,
        "depth": args.depth,
        "batch": args.batch,
        "bits": round(8 * loaded["weight_bytes"] / loaded["weights"], 2),
        "bw_before": bandwidth[0],
        "bw_after": bandwidth[-1],
        "bw_min": min(bandwidth),
        "bw_max": max(bandwidth),
        "version": loaded["version"],
    }
    row["unstable"] = any(rows.uncertain(row, name) for name in ("tg_ratio", "pp_ratio"))
    if engine.ways > 1:
        row["flash_attention"] = f"pp {prompts[0].way}, tg {decodes[0].way}"
    return row


# ---- the run --------------------------------------------------------------------------------------------------------

_LINE = "{:<27} {:>5} {:>8} {:>6} {:>8} {:>6} {:>7} {:>9} {:>6} {:>4} {:>9} {:>8}"
HEADER = _LINE.format(
    "engine", "bits", "pp t/s", "ratio", "tg t/s", "ratio", "TTFT s", "ms/token", "GB/s", "%BW", "peak GiB", "foreign"
)


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    label = Choice(row["engine"], row["group"], row["form"], row["compute"]).label
    mark = "*" * (row["foreign_cpu"] > rows.FOREIGN_LIMIT) + "~" * row["unstable"]
    speeds = [f"{row['pp_tps']:.1f}", _ratio(row["pp_ratio"]), f"{row['tg_tps']:.2f}", _ratio(row["tg_ratio"])]
    rest = (f"{row['gbps']:.1f}", f"{row['pct_bw']:.0f}", f"{row['rss_peak_gib']:.2f}", f"{row['foreign_cpu']:.2f}")
    times = f"{row['ttft_s']:.3f}", f"{row['ms_per_token']:.2f}"
    return _LINE.format(label, f"{row['bits']:.2f}", *speeds, *times, *rest) + mark


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def dash(choice: Choice, why: str) -> str:
    """The line of an engine that cannot run."""
    return f"{choice.label:<27} {'-':>5}  ({why})"


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[Choice]]:
    """The arguments, checked, and the engines to run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="tinyllama-1.1b", help=f"{', '.join(shapes.SHAPES)}, {shapes.REAL} or a path"
    )
    parser.add_argument("--engines", default="cpullm,hf-bf16")
    parser.add_argument("--pp", type=int, default=512, help="prompt tokens")
    parser.add_argument("--tg", type=int, default=64, help="generated tokens of a round")
    parser.add_argument("--turn", type=int, default=8, help="tokens of a turn, the first of which does not count")
    parser.add_argument("--depth", type=int, default=0, help="tokens in the cache before the prompt, not timed")
    parser.add_argument("--batch", type=int, default=1, help="sequences at once")
    parser.add_argument("--rounds", type=int, default=4, help="prompts of each engine")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--group", type=int, default=32, help="of cpullm and torchao, unless said per engine")
    parser.add_argument("--sym", action="store_true", help="cpullm without zero points")
    parser.add_argument("--compute", choices=["int8", "bf16", "fp32"], default="int8", help="of cpullm")
    parser.add_argument("--json", type=Path, help="append rows to this file")
    args = parser.parse_args(argv)
    for name, least in (("pp", 1), ("tg", 2), ("turn", 2), ("depth", 0), ("batch", 1), ("rounds", 1), ("threads", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name} must be at least {least}, got {value}")
    try:
        found = choices(args.engines, args)
        if args.model not in shapes.SHAPES and args.model != shapes.REAL:
            args.model = str(shapes.find(args.model).resolve())
    except ValueError as error:
        parser.error(str(error))
    from torch_cpullm.launch import default_threads

    args.threads = args.threads or default_threads().count
    return args, found


def ready(found: Sequence[Choice], args: argparse.Namespace) -> tuple[list[Engine], bool]:
    """The engines that can run, and whether all fit into memory together; prints a dash for the others."""
    available, packed = machine.available_bytes(), shapes.made_packed(args.model)
    running: list[Engine] = []
    weights = None
    for choice in found:
        why = peers.missing(choice.name)
        if not why:
            weights = weights_of(args.model) if weights is None else weights
            needed = choice.peak_bytes(weights, packed)
            why = f"needs about {needed / GIB:.0f} GiB of memory" if needed > available else None
        try:
            if why:
                raise Missing(why)
            running.append(Engine(choice, args))
        except Missing as error:
            print(dash(choice, str(error)), flush=True)
    if not running or weights is None:
        return [], True
    loaded = sum(engine.choice.resident_bytes(weights) for engine in running)
    loading = max(e.choice.peak_bytes(weights, packed) - e.choice.resident_bytes(weights) for e in running)
    return running, loaded + loading < 0.8 * available


def measure(running: list[Engine], args: argparse.Namespace, together: bool) -> list[float]:
    """All rounds; engines that fail go from ``running`` with a dash. Returns all readings of the bandwidth."""
    memory = machine.Memory(ROTATE_CACHES * machine.l3_bytes())
    readings: list[float] = []
    tokens = turns.sizes(args.tg - 1, args.turn)

    def read_gbps() -> float:
        time.sleep(SETTLE_S)
        readings.append(memory.read_gbps(args.threads))
        time.sleep(SETTLE_S)
        return readings[-1]

    def attempt(engine: Engine, what: Callable[[], None]) -> bool:
        try:
            what()
        except Missing as error:
            running.remove(engine)
            print(dash(engine.choice, str(error)), flush=True)
        return engine in running

    if not together:
        print("not all fit into memory together: each is loaded again in every round", file=sys.stderr)
    for round_ in range(args.rounds):
        for group in [running[:]] if together else [[engine] for engine in running]:
            fresh = round_ == 0 or not together
            loaded = [engine for engine in group if not fresh or attempt(engine, engine.start)]
            turns.play(loaded, round_, tokens, read_gbps, attempt)
            for engine in [] if together else group:
                engine.close()
    return readings


def main(argv: Sequence[str] | None = None) -> int:
    args, found = parse(argv)
    facts = {
        "commit": machine.git_commit(),
        "machine": machine.machine_name(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
    running, together = ready(found, args)
    if not running:
        return 1
    try:
        readings = measure(running, args, together)
        made = [summarise(engine, running[0], args, readings) | facts for engine in running]
    finally:
        for engine in running:
            engine.close()
    where = f" after {args.depth} tokens" * bool(args.depth) + f", batch {args.batch}" * (args.batch > 1)
    print(f"{args.model}, {args.threads} threads, pp{args.pp} tg{args.tg}{where}, {facts['machine']}")
    if made:
        print(f"memory {min(readings):.1f} to {max(readings):.1f} GB/s, read {len(readings)} times between turns")
    print(HEADER)
    for row in made:
        print(line(row))
    if any(row["foreign_cpu"] > rows.FOREIGN_LIMIT for row in made):
        print("* other processes took more than a quarter of a core: measure again on a quiet machine")
    if any(row["unstable"] for row in made):
        print("~ the median of a ratio is not known to within 5 %: more --rounds")
    if args.json and made:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        with args.json.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in made)
    return 0 if made else 1


if __name__ == "__main__":
    sys.exit(main())
