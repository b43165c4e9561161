"""Ranks of some cores each against one process with all of them: tokens/s, all-reduces and bytes per token.

    python -m benchmarks.bench_ranks --json benchmarks/results/ranks_epyc.jsonl
    python -m benchmarks.bench_ranks --splits 2x8 4x4 2x4 --model llama-2-7b
    python -m benchmarks.bench_ranks --splits 4x4 --ways "one process" "tensor parallel" 2x2
    python -m benchmarks.bench_ranks --sums --splits 2x1 4x1                    one all-reduce, by transport
    python -m benchmarks.bench_ranks --simulate --json benchmarks/results/sockets.jsonl     16 to 64 sockets
    python -m benchmarks.bench_ranks --load /a/folder --splits 2x1 4x1           memory of ranks that load their shares

A split PxC is P ranks of C cores each. Every round runs one process, tensor parallel and CQIL one after the other, all
on the same P x C cores; a row has the median of the rounds, and the median of the ratios to the one process of the same
round. CQIL groups are of P layers in the middle of the model (latency.default_groups); ``--ways 2x2``, of 4 ranks, has
pairs of layers, each member cut among two ranks, and the other layers cut among all. The one process runs the model
without groups. Named shapes have random codes, which cost no time to make.

"predicted ms" is the latency model: its micro-benchmarks run in the same processes just before the model, on all ranks
at once, since cores of one socket share its memory; the all-reduce is that of these ranks. What sockets of their own
would gain, a split of one socket does not show.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import torch_cpullm
from torch_cpullm import collective, cqil, distributed, latency
from torch_cpullm.share import Share

from . import bench_load, machine, shapes
from .bench_cqil import timed, write

WIDTHS = (576, 2048, 4096, 8192)
WAYS = ("one process", "tensor parallel", "CQIL", "2x2")
SOCKETS = (1, 2, 4, 8, 16, 32, 64)


def settings_of(group_size: int) -> Any:
    """Symmetric INT4."""
    return torch_cpullm.CpuLlmConfig(group_size=group_size, sym=True)


def on_meta(name: str) -> Any:
    """A named shape without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**shapes.SHAPES[name], tie_word_embeddings=False), dtype=torch.bfloat16
        )


def load(name: str, group_size: int, share: Share | None = None, **sums: Any) -> Any:
    """The packed model, symmetric INT4; a named shape's share of a rank where one is given, else whole."""
    settings = settings_of(group_size)
    if name in shapes.SHAPES:
        return shapes.packed_model(name, settings, share, **sums)
    model = shapes.float_model(name, torch.float32 if name == shapes.REAL else torch.bfloat16)
    return torch_cpullm.optimize(model, settings)


def meet(index: int, count: int, folder: str) -> None:
    """Join the other ranks of a run."""
    where = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=where, rank=index, world_size=count, timeout=timedelta(minutes=5))
    dist.barrier()  # they come at their own pace


def rank(index: int, way: str, count: int, cores: list[int], folder: str, args: argparse.Namespace) -> None:
    """One of ``count`` ranks with an even share of the cores; rank 0 leaves its numbers in ``folder``."""
    each = len(cores) // count
    os.sched_setaffinity(0, cores[index * each : (index + 1) * each])
    torch.set_num_threads(each)
    sums = {"transport": args.transport, "timeout_s": 60}
    if count > 1:
        meet(index, count, folder)
    cut = way == WAYS[1] and args.model in shapes.SHAPES
    of = latency.footprint(on_meta(args.model), settings_of(args.group)) if cut else None
    model = load(args.model, args.group, Share(index, count), **sums) if cut else load(args.model, args.group)
    of = of or latency.footprint(model)
    tp_size = 2 if way == "2x2" else 1
    groups = latency.default_groups(len(of.layers), count // tp_size)
    net, work = (0.0, ""), latency.one_process(of)
    if count > 1:
        if way in WAYS[2:]:
            cqil.apply(model, cqil.Plan.of(model, groups))
            distributed.shard_groups(model, tp_size=tp_size, **sums)
            inside = distributed.ranks_of(model).inside
            work = latency.cqil_ranks(of, groups, count, inside=inside)
            if tp_size > 1:
                work = latency.cqil_of_tensor_parallel(of, groups, count // tp_size, tp_size, inside=inside)
        else:
            if not cut:
                distributed.shard_tensors(model, **sums)
            inside = distributed.transport(model) == "shared memory"
            work = latency.tensor_parallel(of, count, inside=inside)
        net = distributed.all_reduce_seconds(model, of.hidden), distributed.transport(model)
        work = replace(work, ranks=2)  # the all-reduce that was measured is that of all ranks
        dist.barrier()
    ways = {"ranks": distributed.ranks_of(model), "meet": dist.barrier} if count > 1 else {}
    read = sum(work.read.values()) - sum(of.rest.values())
    constants = latency.measure(of, net, share=max(2, count), read_bytes=read, **ways)
    predicted = latency.seconds(work, constants)
    if index == 0:
        print(f"{way}: {constants}", file=sys.stderr, flush=True)
    ids = torch.randint(0, model.config.vocab_size, (1, args.pp), generator=torch.Generator().manual_seed(0))
    if count > 1:
        dist.barrier()
    timed(model, ids, 4)
    speeds, traffic = [], [0, 0]
    foreign = machine.ForeignCpu()
    for _ in range(args.reps):
        with foreign:
            speeds.append(timed(model, ids, args.tg))
    own_s = torch.tensor([foreign.own_s])
    if count > 1:
        dist.all_reduce(own_s)  # the other ranks are no strangers
        before = distributed.traffic(model)
        timed(model, ids[:, :1], 1)  # two passes of one token
        traffic = [(b - a) // 2 for a, b in zip(before, distributed.traffic(model), strict=True)]
    if index == 0:
        others = None if foreign.cores is None else max(0.0, foreign.busy_s - float(own_s)) / foreign.wall_s
        found = {"pp": statistics.median(pp for pp, _ in speeds), "tg": statistics.median(tg for _, tg in speeds)}
        found |= {"sums": traffic[0], "sent": traffic[1], "foreign": others, "transport": net[1]}
        found |= {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
        found |= {"predicted": predicted, "gbps": _layers_gbps(of, constants), "net": constants.all_reduce_s}
        Path(folder, "found.json").write_text(json.dumps(found), encoding="ascii")
    if count > 1:
        dist.barrier()
        dist.destroy_process_group()


def _layers_gbps(of: latency.Footprint, constants: latency.Constants) -> float:
    """Bandwidth of the kind of weights that has most bytes in the layers."""
    return constants.gbps[max(of.layers[0], key=lambda kind: of.layers[0][kind])]


def sums(index: int, count: int, cores: list[int], folder: str, rounds: int) -> None:
    """One rank of the comparison of transports, in turn; rank 0 leaves the median µs."""
    os.sched_setaffinity(0, {cores[index]})
    torch.set_num_threads(1)
    meet(index, count, folder)
    ways = {name: collective.Ranks(None, 60.0) for name in ("gloo", "shared memory")}
    for name, ranks in ways.items():
        ranks.use(name, WIDTHS[-1])
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


def loaded(index: int, count: int, folder: str, checkpoint: str, quantise: bool) -> None:
    """One rank that loads its share of a checkpoint; rank 0 leaves the largest memory of all."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    from torch_cpullm.swap import packed_modules

    torch.set_num_threads(1)
    meet(index, count, folder)
    settings = torch_cpullm.CpuLlmConfig()  # which also makes cpullm known to transformers, whatever is installed
    options: dict[str, Any] = {"quantization_config": settings} if quantise else {}
    if count > 1:
        options["distributed_config"] = DistributedConfig(tp_size=count)
    watch = bench_load.Peak()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, **options)
    peak, _ = watch.stop()
    weights = {id(weight): weight for _, module in packed_modules(model) for weight in module.weights().values()}
    own = [peak, sum(each.nbytes for each in weights.values()), max(2 * each.n * each.k for each in weights.values())]
    most = torch.tensor(own)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if index == 0:
        found = dict(
            zip(("peak MiB", "share MiB", "largest module MiB"), (most // bench_load.MIB).tolist(), strict=True)
        )
        Path(folder, "found.json").write_text(json.dumps(found), encoding="ascii")
    dist.barrier()
    dist.destroy_process_group()


def loads(args: argparse.Namespace) -> None:
    """Rows of the memory that one process, and each of several ranks, takes to load a float and a saved checkpoint."""
    float_folder, saved = args.load / f"{args.model}-bf16", args.load / f"{args.model}-cpullm"
    config, sizes = bench_load.tensor_sizes(args.model, None)
    if not float_folder.exists():
        bench_load.check_space(args.load, 3 * sum(size.numel() for size in sizes.values()))
        bench_load.write_checkpoint(float_folder, config, sizes, 4)
    if not saved.exists():
        bench_load.measure("save", float_folder, saved, 0)
    for count in (1, *(ranks for ranks, _ in args.splits)):
        for name, path in (("float", float_folder), ("saved", saved)):
            arguments = (str(path), name == "float")
            found = together(loaded, count, lambda i, folder, c=count, rest=arguments: (i, c, folder, *rest))
            write({"bench": "shares", "model": args.model, "checkpoint": name, "ranks": count, **found}, args.json)


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


def compare(count: int, cores: list[int], args: argparse.Namespace) -> None:
    """The rows of one split."""

    def run(way: str) -> dict[str, Any]:
        ranks = 1 if way == WAYS[0] else count
        return together(rank, ranks, lambda i, folder: (i, way, ranks, cores, folder, args))

    rounds: list[dict[str, dict[str, Any]]] = [{} for _ in range(args.rounds)]
    for found, way in itertools.product(rounds, args.ways):
        found[way] = run(way)
        if found is not rounds[-1]:
            continue
        own = [each[way] for each in rounds]
        ratios = [each[way]["tg"] / each[WAYS[0]]["tg"] for each in rounds if WAYS[0] in each]
        tg = statistics.median(each["tg"] for each in own)
        predicted = statistics.median(each["predicted"] for each in own)
        foreign = [each["foreign"] for each in own if each["foreign"] is not None]
        ranks = 1 if way == WAYS[0] else count
        row = {
            "bench": "ranks",
            "model": args.model,
            "way": way,
            "ranks": ranks,
            "cores per rank": len(cores) // ranks,
            "group": args.group,
            "test": f"pp{args.pp}, tg{args.tg}",
            "pp tok/s": round(statistics.median(each["pp"] for each in own), 1),
            "tg tok/s": round(tg, 2),
            "tg, times": round(statistics.median(ratios), 3) if ratios else None,
            "ms/token": round(1e3 / tg, 2),
            "predicted ms": round(1e3 * predicted, 2),
            "predicted / measured": round(predicted * tg, 2),
            "all-reduces": own[0]["sums"],
            "KiB sent": round(own[0]["sent"] / 1024, 1),
            "transport": own[0]["transport"],
            "all-reduce, µs": round(1e6 * statistics.median(each["net"] for each in own), 1) if ranks > 1 else None,
            "GB/s per rank": round(statistics.median(each["gbps"] for each in own), 1),
            "peak MiB": round(max(each["peak"] for each in own)),
            "foreign_cpu": round(statistics.median(foreign), 2) if foreign else None,
        }
        write(row, args.json)


def simulate(args: argparse.Namespace) -> None:
    """Rows of what many sockets like this one would take: predictions, of nothing that was run."""
    of = latency.footprint(load(args.model, args.group))
    constants = latency.measure(of, collective.all_reduce_seconds(of.hidden))
    for row in latency.predict(of, constants, SOCKETS):
        ms = {f"{way}, ms": None if row[way] is None else round(1e3 * float(row[way] or 0), 2) for way in list(row)[1:]}
        write({"bench": "sockets", "model": args.model, "sockets": row["sockets"], **ms}, args.json)


def split(text: str) -> tuple[int, int]:
    """``2x8`` -> (ranks, cores of each)."""
    ranks, _, cores = text.partition("x")
    if not (ranks.isdecimal() and cores.isdecimal() and int(ranks) > 1 and int(cores) > 0):
        raise argparse.ArgumentTypeError(f"a split is ranks x cores of each, as 2x8, got {text!r}")
    return int(ranks), int(cores)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="tinyllama-1.1b", help=f"{', '.join(shapes.SHAPES)}, {shapes.REAL} or a path"
    )
    parser.add_argument("--splits", nargs="+", type=split, default=[(2, 1)], metavar="PxC", help="default: 2x1")
    parser.add_argument("--pp", type=int, default=128, help="prompt tokens")
    parser.add_argument("--tg", type=int, default=64, help="decoded tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--reps", type=int, default=3, help="prompts per round and way")
    parser.add_argument("--group", type=int, default=32, help="weights that share a scale")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS[:3])
    parser.add_argument("--transport", choices=collective.TRANSPORTS, default="auto")
    parser.add_argument("--sums", action="store_true", help="only compare the transports of sums, ranks of one core")
    parser.add_argument("--simulate", action="store_true", help="only predict: 1 to 64 sockets like this machine")
    parser.add_argument("--load", type=Path, metavar="FOLDER", help="only load shares of checkpoints, made there once")
    parser.add_argument("--json", type=Path, help="append rows to this file")
    args = parser.parse_args(argv)
    if args.simulate:
        simulate(args)
        return
    if args.load:
        loads(args)
        return
    usable = sorted(os.sched_getaffinity(0))
    for ranks, cores in args.splits:
        needed = ranks * (1 if args.sums else cores)
        if "2x2" in args.ways and ranks != 4:
            raise SystemExit(f"2x2 is a layout of 4 ranks, not of {ranks}")
        if len(usable) < needed:
            raise SystemExit(f"{ranks}x{cores} needs {needed} cores, {len(usable)} are usable")
        if not args.sums:
            compare(ranks, usable[:needed], args)
            continue
        found = together(sums, ranks, lambda i, folder, ranks=ranks: (i, ranks, usable, folder, 2000))
        for width, us in found.items():
            row = {"bench": "sums", "ranks": ranks, "floats": int(width), **{f"{k}, µs": v for k, v in us.items()}}
            write(row, args.json)


if __name__ == "__main__":
    main()
