"""What a decoded token costs on one or more sockets, predicted from a model's bytes and a few micro-benchmarks.

    t = sum of bytes / bandwidth + barriers * t_barrier + operators * t_dispatch + all-reduces * t_net

An all-reduce inside an operator, through shared memory, has a barrier of its own.

Bytes are the packed weights that one rank reads for one token; bandwidth is that of the one-row product of weights of
that form, as this machine's operator reads them; the rest are counts. No constant comes from a run of a model. Left
out: the cache of keys and values (short contexts), and what generate() does around the model. Each socket is taken to
be like the cores that were measured, with memory of its own, and an all-reduce over s ranks to take log2(s) times
that of two.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from .checkpoint import Form, form_of, read_forms
from .config import Recipe, Settings
from .experts import WEIGHTS
from .layer_match import decoders
from .layer_program import Program
from .layer_spec import LayerSpec
from .linear import PackedEmbedding, PackedLinear, PackedModule, entry
from .ops import isa, linear
from .packing import PackedStack, PackedWeight, pack, resolve_group, round_up
from .plan import find_targets, head_compute, stored_targets
from .quant import quantize_rtn

ALL_REDUCE_S = 114e-6
"""Seconds of an all-reduce of two processes where nobody measured it: the least of gloo on one (busy) machine."""

_OUTSIDE = 4  # operators of a token beside its layers: embedding, positions, last norm, head
_CUT = 6  # of a layer cut among hosts: attention and MLP, each with a sum and an addition
_READ_BYTES = 256 << 20  # of a bandwidth measurement: beyond the caches
_TINY = 32  # width of the layer whose barriers are timed: one panel, nothing for a second thread to do


@dataclass(frozen=True)
class Kind:
    """How weights are stored and multiplied. form None: floats, which are read at the memory's bandwidth."""

    form: Form | None
    compute: str = ""


FLOAT = Kind(None)
Bytes = Mapping[Kind, float]


@dataclass(frozen=True)
class Footprint:
    """Bytes that one token reads: of every decoder layer, and of the rest (the head). Of experts, those in use."""

    layers: tuple[Bytes, ...]
    rest: Bytes
    hidden: int


@dataclass(frozen=True)
class Constants:
    """Micro-benchmarks of one process. gbps: bandwidth per kind, of all its threads; barriers: of one layer; transport:
    of the all-reduce that was measured, empty where it is assumed.
    """

    gbps: Mapping[Kind, float]
    barrier_s: float
    barriers: int
    dispatch_s: float
    all_reduce_s: float
    threads: int
    transport: str = ""


@dataclass(frozen=True)
class Work:
    """What the busiest rank does for one token. ranks: of an all-reduce; inside: operators make them themselves."""

    read: Bytes
    layers: int
    operators: int
    all_reduces: int = 0
    ranks: int = 1
    inside: bool = False


# ---- bytes ----------------------------------------------------------------------------------------------------------


def packed_bytes(n: int, k: int, form: Form) -> int:
    """Bytes of a packed weight W [n, k], scales, zeros and padding included."""
    rows = round_up(n, 32)
    groups = -(-k // resolve_group(form.group_size, k))
    per_group = 2 + {"none": 0, "point": 1, "minimum": 2}[form.zeros]
    return rows * round_up(k, 32) * form.bits // 8 + rows * groups * per_group


def footprint(model: nn.Module, settings: Settings | None = None) -> Footprint:
    """The bytes of ``model``: an optimised one as it is, any other as it would be packed; it may be on meta.

    settings: how to pack; None: as the checkpoint's config says (``quantization_config`` of a saved model), otherwise
    the defaults. Raises ValueError for a model that does not have one stack of decoder layers.
    """
    found = list(decoders(model))
    if len(found) != 1:
        raise ValueError(f"model must have one stack of decoder layers, {type(model).__name__} has {len(found)}")
    decoder = found[0]
    layers: list[Counter[Kind]] = [Counter() for _ in decoder.layers]
    rest: Counter[Kind] = Counter()
    used = _experts_in_use(decoder.owner.config)
    tables = {name for name, module in model.named_modules() if isinstance(module, (nn.Embedding, PackedEmbedding))}
    for name, kind, size, experts in _weights(model, settings):
        if name.removesuffix(".weight") in tables:
            continue  # a row of it
        inside = name.removeprefix(decoder.name + ".") if name.startswith(decoder.name + ".") else ""
        to = layers[int(inside.partition(".")[0])] if inside else rest
        to[kind] += size if not experts else size * min(used or experts, experts) // experts
    return Footprint(tuple(layers), rest, int(cast("Any", decoder.owner.config).hidden_size))


def _experts_in_use(config: Any) -> int:
    """Experts that a token is sent to; 0 where the config does not say."""
    return int(getattr(config, "num_experts_per_tok", 0) or 0)


def _weights(model: nn.Module, settings: Settings | None) -> Iterator[tuple[str, Kind, int, int]]:
    """(name, kind, bytes, experts or 0) of every weight."""
    done: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            for key, packed in module.weights().items():
                kind = Kind(Form.of(packed), module.compute or "")
                yield entry(name, key), kind, packed.nbytes, packed.count if isinstance(packed, PackedStack) else 0
    if not any(isinstance(module, PackedModule) for module in model.modules()):
        for target, forms, compute in _planned(model, settings):
            for (key, stored), form in zip(target.parameters.items(), forms, strict=True):
                *count, n, k = target.shape(stored)
                done.update(f"{name}.{key}" for name in target.names)
                size = packed_bytes(n, k, form) * (count[0] if count else 1)
                yield entry(target.name, key), Kind(form, compute), size, count[0] if count else 0
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in done:
            yield name, FLOAT, parameter.nbytes, parameter.shape[0] if name.rpartition(".")[2] in WEIGHTS else 0


def _planned(model: nn.Module, settings: Settings | None) -> Iterator[tuple[Any, list[Form], str]]:
    """(target, form of each parameter, compute) of what is to be packed."""
    saved = getattr(getattr(model, "config", None), "quantization_config", None)
    saved = saved if isinstance(saved, dict) or saved is None else saved.to_dict()
    if settings is None and saved is not None and saved.get("quant_method") == "cpullm" and saved.get("modules"):
        forms, prefix = read_forms(saved["modules"]), getattr(model, "base_model_prefix", "")

        compute = str(saved.get("compute", "int8"))
        for target in stored_targets(model, lambda name: form_of(name, forms, prefix) is not None):
            own = [form_of(entry(target.name, key), forms, prefix) for key in target.parameters]
            yield target, [form for form in own if form], head_compute(compute) if target.head else compute
        return
    settings = settings or Settings()
    for target in find_targets(model, settings)[0]:
        recipe = cast("Recipe", target.recipe)
        form = Form(recipe.bits, recipe.group_size, "none" if recipe.sym else "point", settings.scale_dtype)
        yield (
            target,
            [form] * len(target.parameters),
            head_compute(settings.compute) if target.head else settings.compute,
        )


# ---- counting -------------------------------------------------------------------------------------------------------


def default_groups(layers: int, size: int) -> tuple[tuple[int, int], ...]:
    """Groups of ``size`` layers from 0.4 of the depth to two before the end: where published groupings lie.

    Source: the configurations released with CQIL (Zou et al., ACL 2024).
    """
    end = layers - 2
    count = max(0, end - math.ceil(0.4 * layers)) // size
    return tuple((end - size * i, size) for i in range(count, 0, -1))


def one_process(of: Footprint) -> Work:
    """All layers in one operator."""
    return Work(_sum([*of.layers, of.rest]), len(of.layers), 1 + _OUTSIDE)


def tensor_parallel(of: Footprint, ranks: int, *, inside: bool = False) -> Work:
    """Every layer cut in ``ranks``, an all-reduce after attention and one after the MLP; the head whole.

    inside: all layers are one operator, which makes the all-reduces in shared memory; otherwise a layer is two.
    """
    count = len(of.layers)
    operators = (1 if inside else _CUT * count) + _OUTSIDE
    return Work(_sum([_sum(of.layers, ranks), of.rest]), count, operators, 2 * count, ranks, inside)


def cqil_ranks(of: Footprint, groups: Sequence[tuple[int, int]], ranks: int) -> Work:
    """Members of groups spread over ranks, one all-reduce per group; every other layer whole on every rank."""
    return cqil_of_tensor_parallel(of, groups, ranks, 1)


def cqil_of_tensor_parallel(of: Footprint, groups: Sequence[tuple[int, int]], ranks: int, cut: int) -> Work:
    """Members of groups spread over ``ranks`` sets of ``cut`` ranks, which cut a layer; all cut the other layers."""
    member = {first + i: i for first, size in groups for i in range(size)}
    mine = [layer for i, layer in enumerate(of.layers) if i in member and member[i] % ranks == 0]
    outside = [layer for i, layer in enumerate(of.layers) if i not in member]
    everyone = ranks * cut if cut > 1 else 1
    read = _sum([_sum(mine, cut), _sum(outside, everyone), of.rest])
    steps = [math.ceil(size / ranks) for _, size in groups]
    reduces = len(groups) + (2 * len(outside) + sum(steps) if cut > 1 else 0)
    layers = len(outside) + sum(steps)
    return Work(
        read, layers, (_CUT if cut > 1 else 1) * layers + _OUTSIDE, reduces if ranks * cut > 1 else 0, ranks * cut
    )


def _sum(many: Sequence[Bytes], parts: int = 1) -> Bytes:
    total: dict[Kind, float] = {}
    for each in many:
        for kind, size in each.items():
            total[kind] = total.get(kind, 0) + size / parts
    return total


def seconds(work: Work, constants: Constants) -> float:
    """The equation at the top of this file."""
    reading = sum(size / constants.gbps[kind] / 1e9 for kind, size in work.read.items())
    waiting = (work.layers * constants.barriers + work.inside * work.all_reduces) * constants.barrier_s
    net = work.all_reduces * constants.all_reduce_s * math.log2(max(work.ranks, 1))
    return reading + waiting + work.operators * constants.dispatch_s + net


def predict(
    of: Footprint, constants: Constants, sockets: Sequence[int], groups: Sequence[tuple[int, int]] | None = None
) -> list[dict[str, float | int | None]]:
    """Seconds per token for each number of sockets: one process, TP, CQIL, and CQIL of TP groups (None: no such split).

    groups: those of a plan; None: the default window, in pairs on two sockets and in fours beyond, pairs of TP groups.
    """
    rows: list[dict[str, float | int | None]] = []
    for count in sockets:
        row: dict[str, float | int | None] = {"sockets": count, "one process": seconds(one_process(of), constants)}
        row |= dict.fromkeys(("tensor parallel", "CQIL", "CQIL of TP groups"))
        if count > 1:
            inside = constants.transport == "shared memory"
            row["tensor parallel"] = seconds(tensor_parallel(of, count, inside=inside), constants)
            own = groups or default_groups(len(of.layers), min(count, 4))
            ranks = min(count, max((size for _, size in own), default=1))
            row["CQIL"] = seconds(cqil_ranks(of, own, ranks), constants) if own else None
            own = groups or default_groups(len(of.layers), 2)
            ranks = max((size for _, size in own), default=1)
            if own and count > ranks and count % ranks == 0:
                work = cqil_of_tensor_parallel(of, own, ranks, count // ranks)
                row["CQIL of TP groups"] = seconds(work, constants)
        rows.append(row)
    return rows


# ---- micro-benchmarks -----------------------------------------------------------------------------------------------


def measure(of: Footprint, all_reduce: tuple[float, str] | None = None, *, read_bytes: int | None = None) -> Constants:
    """Constants of this process, with torch's threads. all_reduce: (seconds, transport) that the caller
    measured, None: ALL_REDUCE_S.

    read_bytes: how much memory a bandwidth measurement reads.
    """
    isa()  # an impossible CPULLM_ISA is an error here, before memory is taken
    kinds = {kind for each in (*of.layers, of.rest) for kind in each}
    read_bytes = read_bytes or _READ_BYTES
    memory = memory_gbps(read_bytes)
    gbps = {kind: min(memory, kernel_gbps(kind, read_bytes)) if kind.form else memory for kind in kinds}
    barrier_s, barriers = barrier_cost()
    net, transport = (ALL_REDUCE_S, "") if all_reduce is None else all_reduce
    dispatch_s, threads = dispatch_cost(), torch.get_num_threads()
    return Constants(gbps, barrier_s, barriers, dispatch_s, net, threads, transport)


def memory_gbps(size: int = _READ_BYTES) -> float:
    """GB/s (1e9 bytes per second) at which all threads read memory."""
    buffer = torch.ones(round_up(size, 1 << 16), dtype=torch.uint8)
    return buffer.numel() / _least(lambda: torch.ops.cpullm.read_memory.default(buffer), 5) / 1e9


def kernel_gbps(kind: Kind, size: int = _READ_BYTES, k: int = 4096) -> float:
    """GB/s at which ``y = x W^T`` of one row reads packed weights of this kind, W [n, k] of about ``size`` bytes."""
    form = kind.form
    assert form is not None
    n = max(32, size // packed_bytes(32, k, form) * 32)
    group = resolve_group(form.group_size, k)
    scales = torch.full((n // 32, -(-k // group), 32), 0.01, dtype=getattr(torch, form.scales))
    zeros = None
    if form.zeros != "none":
        zeros = torch.full(scales.shape, 8, dtype=torch.uint8 if form.zeros == "point" else scales.dtype)
    codes = torch.full((n // 32, k // 4, 64 if form.bits == 4 else 128), 0x88, dtype=torch.uint8)
    weight = PackedWeight(codes, scales, zeros, n, k, form.bits, form.group_size)
    x = torch.ones(1, k)
    return weight.nbytes / _least(lambda: linear(x, weight, None, None, kind.compute), 5) / 1e9


def barrier_cost() -> tuple[float, int]:
    """(seconds of one barrier, barriers of a layer) from layers too small for a second thread to help with.

    What all threads take longer than one is their waiting for each other.
    """
    threads, count = torch.get_num_threads(), 64
    matrix = pack(quantize_rtn(torch.ones(_TINY, _TINY), 4, 32, True, torch.float16))
    one = PackedLinear(matrix, dtype=torch.float32)
    spec = LayerSpec(
        hidden=_TINY,
        heads=1,
        kv_heads=1,
        head_dim=_TINY,
        intermediate=_TINY,
        norm="rms",
        eps=1e-5,
        qkv=(one, one, one),
        o=one,
        up=(one, one),
        down=one,
        scale=1.0,
        act="silu",
        gated=True,
    )
    program, x = Program(spec), torch.ones(1, 1, _TINY)
    caches = [torch.zeros(1, 1, 32, _TINY) for _ in range(2 * count)]
    handles, none = [program.handle] * count, [-1] * count

    def run() -> None:
        torch.ops.cpullm.layers_forward.default(handles, x, [], none * 2, none, caches, 0, [1] * count, 0)

    together = _least(run, 50)
    barriers = torch.ops.cpullm.layer_barriers.default()
    torch.set_num_threads(1)
    try:
        alone = _least(run, 50)
    finally:
        torch.set_num_threads(threads)
    return max(0.0, together - alone) / barriers if barriers else 0.0, round(barriers / count)


def dispatch_cost() -> float:
    """Seconds of an operator that computes next to nothing, called from Python."""
    matrix = pack(quantize_rtn(torch.ones(_TINY, _TINY), 4, 32, True, torch.float16))
    one, x = PackedLinear(matrix, dtype=torch.float32).eval(), torch.ones(1, _TINY)

    def run() -> None:
        for _ in range(100):
            one(x)

    with torch.no_grad():
        return _least(run, 20) / 100


def _least(run: Callable[[], Any], times: int) -> float:
    """Seconds of the shortest of ``times`` runs, after one that warms up."""
    run()
    best = math.inf
    for _ in range(times):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best
