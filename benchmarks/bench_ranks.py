"""Two ranks of one core each against one process with two threads: tokens/s, all-reduces and bytes per token.

    python -m benchmarks.bench_ranks --json benchmarks/results/ranks.jsonl
    python -m benchmarks.bench_ranks --model smollm2-135m --ways "one process" CQIL     its 9 heads cannot be halved
    python -m benchmarks.bench_ranks --sums                                             one all-reduce, by transport

Every round runs one process, tensor parallel and CQIL one after the other, all on the same two cores; a row has the
median of the rounds, and the median of the ratios to the one process of the same round. CQIL groups are pairs in the
middle of the model (latency.default_groups); the one process runs the model without groups. "predicted ms" is the
latency model of this machine: of one core as a socket for the ranks, of two threads for the one process. Two cores of
one socket share its memory: what two sockets would gain, this does not show.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import torch_cpullm
from torch_cpullm import collective, cqil, distributed, latency

from . import machine, shapes
from .bench_cqil import timed, write

WIDTHS = (576, 2048, 4096, 8192)
WAYS = ("one process", "tensor parallel", "CQIL")


def load(name: str, group_size: int) -> Any:
    """The packed model, symmetric INT4."""
    model = shapes.float_model(name, torch.float32 if name == shapes.REAL else torch.bfloat16)
    return torch_cpullm.optimize(model, torch_cpullm.CpuLlmConfig(group_size=group_size, sym=True))


def rank(index: int, way: str, cores: list[int], folder: str, args: argparse.Namespace) -> None:
    """One rank of a run, or the one process; rank 0 leaves its numbers in ``folder``."""
    alone = way == WAYS[0]
    os.sched_setaffinity(0, set(cores) if alone else {cores[index]})
    torch.set_num_threads(len(cores) if alone else 1)
    model = load(args.model, args.group)
    of = latency.footprint(model)
    count = len(of.layers)
    traffic = [0, 0]
    if not alone:
        where = f"file://{folder}/meet"
        dist.init_process_group("gloo", init_method=where, rank=index, world_size=2, timeout=timedelta(minutes=5))
        dist.barrier()  # the ranks load at their own pace
        if way == "CQIL":
            cqil.apply(model, cqil.Plan.of(model, latency.default_groups(count, 2)))
            distributed.shard_groups(model, transport=args.transport)
        else:
            distributed.shard_tensors(model, transport=args.transport)
    ids = torch.randint(0, model.config.vocab_size, (1, args.pp), generator=torch.Generator().manual_seed(0))
    timed(model, ids, 4)
    speeds = []
    foreign = machine.ForeignCpu()
    for _ in range(args.reps):
        with foreign:
            speeds.append(timed(model, ids, args.tg))
    own_s = torch.tensor([foreign.own_s])
    if not alone:
        dist.all_reduce(own_s)  # the other rank is no stranger
        before = distributed.traffic(model)
        timed(model, ids[:, :1], 1)  # two passes of one token
        traffic = [(b - a) // 2 for a, b in zip(before, distributed.traffic(model), strict=True)]
        args.transport = distributed.transport(model)
    if index == 0:
        others = None if foreign.cores is None else max(0.0, foreign.busy_s - float(own_s)) / foreign.wall_s
        found = {"pp": statistics.median(pp for pp, _ in speeds), "tg": statistics.median(tg for _, tg in speeds)}
        found |= {"sums": traffic[0], "sent": traffic[1], "foreign": others, "transport": args.transport}
        Path(folder, "found.json").write_text(json.dumps(found), encoding="ascii")
    if not alone:
        dist.barrier()
        dist.destroy_process_group()


def run(way: str, cores: list[int], args: argparse.Namespace) -> dict[str, Any]:
    """What rank 0 measured."""
    return together(rank, 1 if way == WAYS[0] else 2, lambda i, folder: (i, way, cores, folder, args))


def sums(index: int, cores: list[int], folder: str, rounds: int) -> None:
    """One rank of the comparison of transports, in turn; rank 0 leaves the median µs."""
    os.sched_setaffinity(0, {cores[index]})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=index, world_size=2)
    ways = {name: collective.Ranks(None, 60.0) for name in ("gloo", "shared memory")}
    for name, ranks in ways.items():
        ranks.use(name, 1)
    found = {}
    for width in WIDTHS:
        spent: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, ranks in ways.items():
                x = torch.ones(width)
                start = time.perf_counter()
                ranks.sum(x)
                spent[name].append(time.perf_counter() - start)
        found[width] = {name: round(1e6 * statistics.median(each), 1) for name, each in spent.items()}
    if index == 0:
        Path(folder, "found.json").write_text(json.dumps(found), encoding="ascii")
    dist.barrier()
    dist.destroy_process_group()


def together(target: Any, count: int, arguments: Any) -> dict[str, Any]:
    """What rank 0 of ``count`` processes found; arguments: of a rank and the folder that they share."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=target, args=arguments(i, folder)) for i in range(count)]
        for each in ranks:
            each.start()
        for each in ranks:
            each.join()
        if any(each.exitcode for each in ranks):
            raise SystemExit(f"a rank ended with {[each.exitcode for each in ranks]}")
        return dict(json.loads(Path(folder, "found.json").read_text(encoding="ascii")))


def predictions(args: argparse.Namespace, cores: list[int]) -> dict[str, float]:
    """Way -> ms per token."""
    of = latency.footprint(load(args.model, args.group))
    net = collective.all_reduce_seconds(of.hidden)
    torch.set_num_threads(len(cores))
    alone = latency.seconds(latency.one_process(of), latency.measure(of, net))
    torch.set_num_threads(1)
    row = latency.predict(of, latency.measure(of, net), [2])[0]
    found = {WAYS[0]: alone, **{way: row[way] for way in WAYS[1:]}}
    return {way: round(1e3 * float(value), 2) for way, value in found.items() if value is not None}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="tinyllama-1.1b", help=f"{', '.join(shapes.SHAPES)}, {shapes.REAL} or a path"
    )
    parser.add_argument("--pp", type=int, default=128, help="prompt tokens")
    parser.add_argument("--tg", type=int, default=64, help="decoded tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--reps", type=int, default=3, help="prompts per round and way")
    parser.add_argument("--group", type=int, default=32, help="weights that share a scale")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--transport", choices=collective.TRANSPORTS, default="auto")
    parser.add_argument("--sums", action="store_true", help="only compare the transports of sums")
    parser.add_argument("--cores", type=int, nargs=2, metavar="CPU", help="default: the first two that are usable")
    parser.add_argument("--json", type=Path, help="append rows to this file")
    args = parser.parse_args(argv)
    cores = args.cores or sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("two cores are needed, one for each rank")
    if args.sums:
        for width, found in together(sums, 2, lambda i, folder: (i, cores, folder, 2000)).items():
            write(
                {"bench": "sums", "ranks": 2, "floats": int(width), **{f"{k}, µs": v for k, v in found.items()}},
                args.json,
            )
        return
    predicted = predictions(args, cores)
    rounds = [{way: run(way, cores, args) for way in args.ways} for _ in range(args.rounds)]
    for way in args.ways:
        own = [each[way] for each in rounds]
        base = [each.get(WAYS[0]) for each in rounds]
        ratios = [mine["tg"] / its["tg"] for mine, its in zip(own, base, strict=True) if its]
        tg = statistics.median(each["tg"] for each in own)
        foreign = [each["foreign"] for each in own if each["foreign"] is not None]
        write(
            {
                "bench": "ranks",
                "model": args.model,
                "way": way,
                "ranks": 1 if way == WAYS[0] else 2,
                "threads per rank": 2 if way == WAYS[0] else 1,
                "group": args.group,
                "test": f"pp{args.pp}, tg{args.tg}",
                "pp tok/s": round(statistics.median(each["pp"] for each in own), 1),
                "tg tok/s": round(tg, 2),
                "tg, times": round(statistics.median(ratios), 3) if ratios else None,
                "ms/token": round(1e3 / tg, 2),
                "predicted ms": predicted.get(way),
                "all-reduces per token": own[0]["sums"],
                "bytes per token": own[0]["sent"],
                "transport": "" if way == WAYS[0] else own[0]["transport"],
                "foreign_cpu": round(statistics.median(foreign), 2) if foreign else None,
            },
            args.json,
        )


if __name__ == "__main__":
    main()
