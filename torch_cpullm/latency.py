"""What a decoded token costs on one or more sockets, predicted from a model's bytes and a few micro-benchmarks.

    t = sum of bytes / bandwidth + layers * t_steps + t_token + operators * t_dispatch
        + all-reduces * (t_net + t_barrier), those of all ranks and those of teams

Bytes are the packed weights that one rank reads for one token; bandwidth is that at which the operator of a layer, or
of the head, reads made-up weights of these sizes and forms. t_steps is what a layer takes beside that: its barriers,
norms, quantised inputs, attention over a short cache. t_token is a decode step without what its layers compute: their
Python, embedding, last norm, the choice of a token. An all-reduce inside an operator, through shared memory, has a
barrier of its own; operators are those beyond the one of all layers. No constant comes from a run of a model
(:mod:`latency_constants`). Left out: long contexts, and what generate() does around the model's call. Each socket is
taken to be like the cores that were measured, with memory of its own, and an all-reduce over s ranks to take log2(s)
times that of two.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from .checkpoint import Form, form_of, read_forms
from .config import Recipe, Settings
from .experts import WEIGHTS
from .latency_constants import (
    READ_BYTES,
    Sizes,
    barrier_cost,
    dispatch_cost,
    kernel_gbps,
    layer_time,
    memory_gbps,
    nobody,
    token_cost,
)
from .launch import cache_bytes
from .layer_match import decoders
from .linear import PackedEmbedding, PackedModule, entry
from .ops import isa
from .packing import PackedStack, resolve_group, round_up
from .plan import find_targets, head_compute, stored_targets

ALL_REDUCE_S = 114e-6
"""Seconds of an all-reduce of two processes where nobody measured it: the least of gloo on one (busy) machine."""

_CUT = 6  # operators of a layer cut among hosts: attention and MLP, each with a sum and an addition


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
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 64
    vocabulary: int = 32000


@dataclass(frozen=True)
class Constants:
    """Micro-benchmarks of one process. gbps: bandwidth per kind, of all its threads; steps_s: of a layer, its barriers
    among them; token_s: a decode step without what layers compute; barriers: of one layer; transport: of the
    all-reduce that was measured, empty where it is assumed; team_sum_s: an all-reduce of a team, None: as that of as
    many ranks.
    """

    gbps: Mapping[Kind, float]
    steps_s: float
    token_s: float
    barrier_s: float
    barriers: int
    dispatch_s: float
    all_reduce_s: float
    threads: int
    transport: str = ""
    team_sum_s: float | None = None


@dataclass(frozen=True)
class Work:
    """What the busiest rank does for one token. operators: called for layers, beyond one for all; ranks: of an
    all-reduce; inside: operators make them themselves; team_sums: all-reduces of teams of ``team`` ranks.
    """

    read: Bytes
    layers: int
    operators: int
    all_reduces: int = 0
    ranks: int = 1
    inside: bool = False
    team_sums: int = 0
    team: int = 1


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
    config = cast("Any", decoder.owner.config)
    hidden, heads = int(config.hidden_size), int(getattr(config, "num_attention_heads", 1) or 1)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or max(2, hidden // heads))
    return Footprint(tuple(layers), rest, hidden, heads, kv_heads, head_dim, int(config.vocab_size))


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
    return Work(_sum([*of.layers, of.rest]), len(of.layers), 0)


def tensor_parallel(of: Footprint, ranks: int, *, inside: bool = False) -> Work:
    """Every layer cut in ``ranks``, an all-reduce after attention and one after the MLP; the head whole.

    inside: all layers are one operator, which makes the all-reduces in shared memory; otherwise a layer is two.
    """
    count = len(of.layers)
    operators = 0 if inside else _CUT * count
    return Work(_sum([_sum(of.layers, ranks), of.rest]), count, operators, 2 * count, ranks, inside)


def cqil_ranks(of: Footprint, groups: Sequence[tuple[int, int]], ranks: int, *, inside: bool = False) -> Work:
    """Members of groups spread over ranks, one all-reduce per group; every other layer whole on every rank.

    inside: as of :func:`tensor_parallel`; otherwise a layer is one operator, and a group's sum four.
    """
    work = cqil_of_tensor_parallel(of, groups, ranks, 1)
    return replace(work, inside=inside, operators=0 if inside else work.layers + 4 * len(groups))


def cqil_of_tensor_parallel(
    of: Footprint, groups: Sequence[tuple[int, int]], ranks: int, cut: int, *, inside: bool = False
) -> Work:
    """Members of groups spread over ``ranks`` teams of ``cut`` ranks, which cut a layer; all cut the other layers.

    A group is one all-reduce of all, and one of its team for each member's attention. inside: as of
    :func:`tensor_parallel`.
    """
    member = {first + i: i for first, size in groups for i in range(size)}
    mine = [layer for i, layer in enumerate(of.layers) if i in member and member[i] % ranks == 0]
    outside = [layer for i, layer in enumerate(of.layers) if i not in member]
    everyone = ranks * cut if cut > 1 else 1
    read = _sum([_sum(mine, cut), _sum(outside, everyone), of.rest])
    steps = [math.ceil(size / ranks) for _, size in groups]
    reduces = len(groups) + (2 * len(outside) if cut > 1 else 0) if ranks * cut > 1 else 0
    layers = len(outside) + sum(steps)
    operators = 0 if inside else (_CUT if cut > 1 else 1) * layers
    return Work(read, layers, operators, reduces, ranks * cut, inside, sum(steps) if cut > 1 else 0, cut)


def _sum(many: Sequence[Bytes], parts: int = 1) -> Bytes:
    total: dict[Kind, float] = {}
    for each in many:
        for kind, size in each.items():
            total[kind] = total.get(kind, 0) + size / parts
    return total


def seconds(work: Work, constants: Constants) -> float:
    """The equation at the top of this file."""
    reading = sum(size / constants.gbps[kind] / 1e9 for kind, size in work.read.items())
    beside = work.layers * constants.steps_s + constants.token_s + work.operators * constants.dispatch_s
    waiting = work.inside * (work.all_reduces + work.team_sums) * constants.barrier_s
    team_s = constants.team_sum_s
    team_s = constants.all_reduce_s * math.log2(work.team) if team_s is None else team_s
    sums = work.all_reduces * constants.all_reduce_s * math.log2(work.ranks) + work.team_sums * team_s
    return reading + beside + waiting + sums


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
            row["CQIL"] = seconds(cqil_ranks(of, own, ranks, inside=inside), constants) if own else None
            own = groups or default_groups(len(of.layers), 2)
            ranks = max((size for _, size in own), default=1)
            if own and count > ranks and count % ranks == 0:
                work = cqil_of_tensor_parallel(of, own, ranks, count // ranks, inside=inside)
                row["CQIL of TP groups"] = seconds(work, constants)
        rows.append(row)
    return rows


# ---- constants ------------------------------------------------------------------------------------------------------


def measure(
    of: Footprint,
    all_reduce: tuple[float, str] | None = None,
    *,
    share: int = 4,
    ranks: Any = None,
    meet: Callable[[], Any] = nobody,
    read_bytes: float | None = None,
) -> Constants:
    """Constants of this process, with torch's threads, by :mod:`latency_constants`.

    A layer's bandwidth and fixed time are the line through a whole one and ``1 / share`` of one. all_reduce: (seconds,
    transport) that the caller measured, None: ALL_REDUCE_S. ranks: a sharded model's, which all measure at once, as
    ``meet`` sees to; an all-reduce then costs what it adds to layers that are cut in as many, and one of a team the
    same among its ranks. read_bytes: what a decode step reads, None: the layers. The measured stacks are as large, so
    that caches hold as much of them, but no larger than what no cache holds: 256 MiB, or four times the caches.
    """
    isa()  # an impossible CPULLM_ISA is an error here, before memory is taken
    size = int(min(read_bytes or sum(sum(layer.values()) for layer in of.layers), max(READ_BYTES, 4 * cache_bytes())))
    inside = _sum(of.layers, len(of.layers))
    packed = {kind: held for kind, held in inside.items() if kind.form is not None}
    barriers = barrier_cost()
    net, transport = (ALL_REDUCE_S, "") if all_reduce is None else all_reduce
    gbps, steps_s, team_s = {FLOAT: memory_gbps(size, meet)}, 0.0, None
    team = None if ranks is None else ranks.team
    for kind in sorted(packed, key=lambda kind: packed[kind]):  # the one with most bytes last: its fixed time counts
        sizes = Sizes(of.hidden, of.heads, of.kv_heads, of.head_dim, sum(packed.values()))
        arguments = (kind.form, kind.compute, size, meet)
        whole, _ = layer_time(sizes, 1, *arguments)
        part, sum_s = layer_time(sizes, share, *arguments, ranks)
        slope = max(0.0, whole.seconds - part.seconds) / max(1, whole.bytes - part.bytes)
        steps_s = max(0.0, whole.seconds - slope * whole.bytes)
        gbps[kind] = whole.bytes / (whole.seconds - steps_s) / 1e9 if slope else whole.bytes / whole.seconds / 1e9
        net = net if sum_s is None else max(net, sum_s - barriers.seconds)
        if team is not None:
            _, sum_s = layer_time(sizes, team.size, *arguments, team)
            team_s = None if sum_s is None else max(0.0, sum_s - barriers.seconds)
    for kind in of.rest:
        if kind not in gbps and kind.form is not None:
            gbps[kind] = kernel_gbps(kind.form, kind.compute, of.hidden, size, meet)
    meet()
    count = len(of.layers)
    token_s = max(0.0, token_cost(of.vocabulary, count) - count * barriers.layer_s)
    return Constants(
        gbps,
        steps_s,
        token_s,
        barriers.seconds,
        barriers.per_layer,
        dispatch_cost(),
        net,
        torch.get_num_threads(),
        transport,
        team_s,
    )
