"""How fast the linear operators are, beside what this machine can do at best.

Weights rotate past the last-level cache, every repetition of one shape's cells is interleaved with the others', and the
limits are read before and after each shape with the same threads: BW, the larger of two readings of memory bandwidth,
and the peak of each kernel level's int8 dot products. A shape whose readings differ by more than 10 %, or that other
processes disturbed, is measured again (--retries) and its rows are marked if that does not help.

Columns: us median time of a call; +us what it takes beyond the larger of bytes/BW and operations/peak;
GB/s stored bytes of the weight per second; %BW of the bandwidth; GOP/s multiplications and additions;
%peak of the level's int8 peak (avx2's kernels save one of its loop's 18 operations); cpu CPU time of other processes
in cores.
Marks: * cpu above 0.25, ~ unstable bandwidth.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from torch_cpullm import launch, ops
from torch_cpullm.packing import check_group_size

from . import cells, machine, rows
from .cells import Cell

SHAPES: tuple[str, ...] = (
    "4096x4096",
    "4096x11008",
    "11008x4096",
    "4096x32000",
    "2048x5632",
    "576x1536",
    "1536x576",
    "896x151936",
)
M = (1, 2, 4, 8, 16, 32, 64, 128, 512)
GROUPS = (32, 64, 128)
QUICK_SHAPES, QUICK_M, QUICK_GROUPS = ("4096x11008", "576x1536"), (1, 4, 32, 512), (32, 128)
BUDGET_S, QUICK_BUDGET_S = 1.0, 0.3
# With 32 MiB of L3, a 64 MiB buffer that is read again and again reads twice as fast as DRAM; 256 MiB do not.
ROTATE_CACHES = 8
ROUNDS, QUICK_ROUNDS = 5, 3

_LINE = "{:<14} {:>4} {:<12} {:<7} {:<8} {:>7} {:>7} {:>6} {:>4} {:>6} {:>5} {:>5} {}"
HEADER = _LINE.format(
    "engine", "M", "weights", "compute", "isa", "us", "+us", "GB/s", "%BW", "GOP/s", "%peak", "cpu", ""
)


# ---- timing ---------------------------------------------------------------------------------------------------------


def burst(cell: Cell, seconds: float) -> None:
    """Call the cell for ``seconds``, at least once. The first of three or more calls only warms up."""
    clock = time.perf_counter
    samples = []
    with cell.foreign:
        end = clock() + seconds
        while True:
            call = cell.next_call()
            start = clock()
            call()
            stop = clock()
            samples.append((stop - start) / cell.repeats)
            if stop >= end:
                break
    cell.samples_s += samples[1:] if len(samples) > 2 else samples


def on_level(cell: Cell, seconds: float) -> None:
    """:func:`burst` at the cell's kernel level."""
    if cell.isa == "native":
        burst(cell, seconds)
    else:
        with ops.use_isa(cell.isa):
            burst(cell, seconds)


def warm_up(todo: Sequence[Cell], longest_s: float) -> list[Cell]:
    """Two calls of each cell; leaves out cells of the ref level that would take more than ``longest_s``, judged from a
    smaller m.
    """
    kept: list[Cell] = []
    per_row_s: dict[tuple, float] = {}  # of the ref level, by weight
    for cell in todo:
        weight = (cell.n, cell.k, cell.bits, cell.group, cell.form, cell.compute)
        if cell.isa == "ref" and per_row_s.get(weight, 0.0) * cell.m > longest_s:
            continue
        for _ in range(2):
            on_level(cell, 0.0)
        if cell.isa == "ref":
            per_row_s[weight] = min(cell.samples_s) / cell.m
        kept.append(cell)
        cell.reset()
    return kept


def interleave(todo: Sequence[Cell], budget_s: float, rounds: int) -> None:
    """``rounds`` passes over all cells, forwards and backwards in turn, each cell for budget_s / rounds seconds."""
    for index in range(rounds):
        for cell in todo if index % 2 == 0 else reversed(todo):
            on_level(cell, budget_s / rounds)


class Bench:
    """What is the same for all comparisons of a run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.top = ops.isa()
        self.facts = {
            "machine": machine.machine_name(),
            "commit": args.commit or machine.git_commit(),
            "torch": str(torch.__version__),
        }
        self.memory = machine.Memory(args.buffer_mib << 20)
        self.inputs = cells.Activations()

    def limits(self, todo: Sequence[Cell], threads: int) -> tuple[float, dict[str, float]]:
        """Memory bandwidth in GB/s, and the peak in GOP/s of every level used; for peers the top level's."""
        levels = dict.fromkeys(self.top if cell.isa == "native" else cell.isa for cell in todo)
        seconds = min(0.02, self.args.budget)
        peaks = {isa: machine.peak_gops(isa, threads, seconds=seconds) for isa in levels if isa != "ref"}
        return self.memory.read_gbps(threads), peaks

    def compare(self, title: str, todo: Sequence[Cell], threads: int) -> list[rows.Row]:
        """Measure cells interleaved, print them, append them to --json; returns their rows."""
        with machine.Threads(threads), torch.inference_mode():
            kept = warm_up(todo, self.args.longest)
            if not kept:
                return []
            for retry in range(self.args.retries + 1):
                found = self._measure(kept, threads)
                if retry == self.args.retries or not any(row["unstable"] or rows.busy(row) for row in found):
                    break
                print(f"{title}: disturbed, measured again", file=sys.stderr, flush=True)
                for cell in kept:
                    cell.reset()
        self._print(title, threads, found, len(todo) - len(kept))
        if self.args.json:
            rows.append(self.args.json, found)
        return found

    def _measure(self, todo: Sequence[Cell], threads: int) -> list[rows.Row]:
        date = machine.now()
        before, peaks = self.limits(todo, threads)
        gc.collect()
        gc.disable()
        try:
            interleave(todo, self.args.budget, self.args.rounds)
        finally:
            gc.enable()
        after, peaks_after = self.limits(todo, threads)
        found = []
        for cell in todo:
            isa = self.top if cell.isa == "native" else cell.isa
            samples = sorted(cell.samples_s)
            values: dict[str, Any] = {key: getattr(cell, key) for key in rows.KEYS if hasattr(cell, key)}
            found.append(
                rows.make(
                    rotated=cell.rotated,
                    **values,
                    **self.facts,
                    us=1e6 * samples[len(samples) // 2],
                    us_min=1e6 * samples[0],
                    reps=len(samples),
                    foreign_cpu=cell.foreign.cores,
                    date=date,
                    bw_before=before,
                    bw_after=after,
                    peak_gops=max(peaks[isa], peaks_after[isa]) if isa in peaks else None,
                )
            )
        return found

    def _print(self, title: str, threads: int, found: Sequence[rows.Row], skipped: int) -> None:
        first = found[0]
        peaks = {row["isa"] if row["isa"] != "native" else self.top: row["peak_gops"] for row in found}
        peak = ", ".join(f"{isa} {gops:.0f}" for isa, gops in peaks.items() if gops)
        print(f"\n{title}, {threads} thread{'s' * (threads != 1)}")
        print(f"BW {first['bw_before']:.1f} before, {first['bw_after']:.1f} GB/s after; int8 peak {peak or '-'} GOP/s")
        print(HEADER.rstrip())
        for row in found:
            print(line(row))
        if skipped:
            print(f"left out: {skipped} cells of ref with calls of more than {self.args.longest:g} s (--longest)")
        if first["unstable"]:
            print("warning: the bandwidth changed by more than 10 % meanwhile; rows are marked ~")
        disturbed = [row["foreign_cpu"] for row in found if rows.busy(row)]
        if disturbed:
            count = f"{len(disturbed)} of {len(found)} rows are marked *"
            print(f"warning: other processes used up to {max(disturbed):.2f} cores meanwhile; {count}")
        sys.stdout.flush()


def excess_us(row: rows.Row) -> float | None:
    """µs beyond the larger of bytes/BW and operations/peak; None where the row has neither share."""
    if row["pct_bw"] is None:
        return None
    return row["us"] * (1 - max(row["pct_bw"], row["pct_peak"] or 0) / 100)


def weights_of(row: rows.Row) -> str:
    """The kind of weight in a few characters: ``4b g128 sym``, ``8b col sym`` with one scale per column, ``16b``."""
    if row["form"] == "none":
        return f"{row['bits']}b" if row["bits"] else "-"
    return f"{row['bits']}b {'col' if row['group'] == -1 else 'g' + str(row['group'])} {row['form']}"


def line(row: rows.Row) -> str:
    """A row as at most 100 columns of text under HEADER."""

    def show(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    def us(value: float | None) -> str:
        return show(value, 2 if value is None or abs(value) < 100 else 1 if abs(value) < 1e4 else 0)

    marks = "*" * rows.busy(row) + "~" * row["unstable"]
    engine = row["engine"] if row["op"] == "linear" else f"{row['op']} {row['engine'].replace('cpullm', '')}"
    return _LINE.format(
        engine, row["m"], weights_of(row), row["compute"], row["isa"], us(row["us"]), us(excess_us(row)),
        show(row["gbps"], 1), show(row["pct_bw"], 0), show(row["gops"], 0), show(row["pct_peak"], 1),
        show(row["foreign_cpu"], 2), marks,
    ).rstrip()  # fmt: skip


# ---- what to run ----------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> list[rows.Row]:
    """Everything that parsed arguments ask for; returns the rows."""
    bench = Bench(args)
    caches = machine.l3_bytes()
    names, groups, bits = args.shapes, args.groups, args.bits
    if args.call:
        names, groups, bits = cells.CALL_SHAPES, [32, 128], [4]
    shapes = [parse_shape(name) for name in names]
    rotate = args.rotate_mib << 20 if args.rotate_mib else min(ROTATE_CACHES * caches, machine.available_bytes() // 8)
    print(
        f"{bench.facts['machine']}, {caches >> 20} MiB of last-level cache\n"
        f"weights rotate over {rotate >> 20} MiB, bandwidth is read over {bench.memory.size_bytes >> 20} MiB; "
        f"torch {torch.__version__}, commit {bench.facts['commit']}",
        flush=True,
    )
    pool = cells.Pool(shapes, bits, groups, rotate)
    found = []
    for threads in args.threads:
        if args.call:
            for isa in args.isa:
                part = bench.compare("fixed costs", cells.call_cells(pool, bench.inputs, isa, threads), threads)
                _print_shares(part)
                found += part
            continue
        for name, shape in zip(names, shapes, strict=True):
            with machine.Threads(threads):
                todo = cells.own_cells(
                    pool, bench.inputs, shape, args.m, groups=groups, forms=args.forms, bits=args.bits,
                    computes=args.compute, isas=args.isa, threads=threads,
                )  # fmt: skip
                if args.peers:
                    peers = [group for group in (128, 32) if group in groups]
                    todo += cells.peer_cells(pool, bench.inputs, shape, args.m, peers, threads)
            part = bench.compare(f"{name} (k x n)", todo, threads)
            if args.curve:
                _print_curves(part)
            found += part
    return found


def _print_shares(found: Sequence[rows.Row]) -> None:
    """What quantising activations takes of the linear with the same m: ``found`` is from one comparison."""
    times = {(row["op"], row["m"]): row["us"] for row in found if row["isa"] != "native"}
    for m in (1, 512):
        if ("linear", m) not in times:
            continue
        part, whole = times["quantize", m], times["linear", m]
        print(
            f"quantising activations, M={m}, k=4096: {part:.1f} us, {100 * part / whole:.1f} % of the 4096x4096 linear "
            "(upper bound)"
        )


def _print_curves(found: Sequence[rows.Row]) -> None:
    """Time over m: beside the time at the smallest m, the row before, and max(M=1 time, operations / 75 % of peak)."""
    kinds: dict[tuple, list[rows.Row]] = {}
    for row in found:
        key = tuple(row[name] for name in ("engine", "bits", "group", "form", "compute", "isa"))
        kinds.setdefault(key, []).append(row)
    for key, curve in kinds.items():
        curve.sort(key=lambda row: row["m"])
        print(f"\ncurve of {' '.join(map(str, key))}")
        print(f"{'M':>4} {'us':>10} {'/ first':>8} {'/ before':>9} {'/ bound':>8}")
        first = before = curve[0]
        for row in curve:
            bound = "-"
            if row["peak_gops"]:
                least_us = 2e-3 * row["m"] * row["n"] * row["k"] / (0.75 * row["peak_gops"])
                bound = f"{row['us'] / max(first['us'], least_us):.2f}"
            ratios = f"{row['us'] / first['us']:>8.2f} {row['us'] / before['us']:>9.2f}"
            print(f"{row['m']:>4} {row['us']:>10.1f} {ratios} {bound:>8}")
            before = row


# ---- arguments ------------------------------------------------------------------------------------------------------


def parse_shape(text: str) -> tuple[int, int]:
    """``4096x11008`` -> (k, n) = (4096, 11008): inputs first, as y = x W^T maps k inputs to n outputs."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or not int(match[1]) or not int(match[2]):
        raise ValueError(f"a shape must be KxN with k inputs and n outputs, for example 4096x11008, got {text!r}")
    return int(match[1]), int(match[2])


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line -> arguments with every default filled in; a wrong one ends the process with a message."""
    text, _, columns = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m benchmarks.bench_ops", description=text, epilog=columns,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    reachable = [name for name, can_run in ops.isa_levels().items() if can_run]
    add("--quick", action="store_true", help="2 shapes, 4 values of M, 1 GiB of reads: less than 50 s on 2 cores")
    shapes = f"k inputs x n outputs; 4096x11008 is k=4096, n=11008 ({' '.join(SHAPES)})"
    add("--shapes", nargs="+", metavar="KxN", help=shapes)
    add("--m", nargs="+", type=int, help=f"rows of activations ({' '.join(map(str, M))})")
    add("--groups", nargs="+", type=int, help=f"inputs per scale, -1 = one per column ({' '.join(map(str, GROUPS))})")
    add("--forms", nargs="+", choices=cells.FORMS, default=["sym"], help="zero points: none, uint8, float (sym)")
    add("--bits", nargs="+", type=int, choices=(4, 8), default=[4], help="bits per weight (4)")
    add("--compute", nargs="+", choices=list(ops.COMPUTE), default=["int8"], help="type of the products (int8)")
    add("--isa", nargs="+", choices=[*reachable, "all"], help="kernel levels (the highest reachable)")
    add("--threads", nargs="+", type=int, help="threads, one count after the other (as optimize() chooses)")
    add("--peers", action="store_true", help=f"measure {', '.join(cells.PEERS)} interleaved with ours")
    add("--curve", action="store_true", help="M = 1..64 of one shape (4096x4096, group 128), with ratios")
    add("--call", action="store_true", help="instead: one call of a tiny linear, and quantising activations")
    add("--json", metavar="FILE", help="append one JSON line per cell, see benchmarks/rows.py")
    add("--budget", type=float, metavar="S", help="seconds per cell (1; quick 0.3)")
    add("--rounds", type=int, help=f"interleaved rounds that share the budget ({ROUNDS}; quick {QUICK_ROUNDS})")
    add("--retries", type=int, help="how often to measure a disturbed shape again (1; quick 0)")
    add("--longest", type=float, default=3.0, metavar="S", help="leave out ref cells whose call takes longer (3)")
    add("--buffer-mib", type=int, metavar="MIB", help="buffer of the bandwidth reads (4096; quick 1024)")
    add("--rotate-mib", type=int, metavar="MIB", help=f"size of a weight's copies ({ROTATE_CACHES} x last-level cache)")
    add("--commit", help="commit to note in the rows, for a copy without .git")
    args = parser.parse_args(argv)
    quick = args.quick
    one = args.curve
    args.shapes = args.shapes or list(SHAPES[:1] if one else QUICK_SHAPES if quick else SHAPES)
    args.m = sorted(args.m or (range(1, 65) if one else QUICK_M if quick else M))
    args.groups = args.groups or list((128,) if one else QUICK_GROUPS if quick else GROUPS)
    args.isa = reachable if args.isa and "all" in args.isa else args.isa or [ops.isa()]
    args.threads = args.threads or [launch.apply_default_threads().count]
    args.budget = args.budget if args.budget is not None else QUICK_BUDGET_S if quick else BUDGET_S
    args.rounds = args.rounds or (QUICK_ROUNDS if quick else ROUNDS)
    args.retries = args.retries if args.retries is not None else 0 if quick else 1
    args.buffer_mib = args.buffer_mib or (1024 if quick else 4096)
    try:
        for shape in args.shapes:
            parse_shape(shape)
        for group in args.groups:
            check_group_size(group)
        for name in ("m", "threads"):
            if min(getattr(args, name)) < 1:
                raise ValueError(f"--{name} must be at least 1, got {min(getattr(args, name))}")
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    run(parse(argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
