"""Micro-benchmarks of the latency model: what this machine's operators cost on a model's shapes, without the model.

Layers, matrices and codes are made up here; nothing of a model but its sizes is used. Where ranks share a machine, all
of them measure at once, since they share its memory: ``meet`` is called before every measurement, and each then lasts
equally long on all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from .layer_program import Program, run_all, sums_of
from .layer_spec import LayerSpec, Norm
from .linear import PackedLinear
from .memory import aligned_empty
from .ops import linear
from .packing import PackedWeight, pack, resolve_group, round_up
from .quant import quantize_rtn

READ_BYTES = 256 << 20  # that a bandwidth measurement reads: beyond the caches
DEPTH = 160  # tokens in the cache of a layer that is measured
_WINDOW_S = 0.3  # of a measurement
_TINY = 32  # width of what costs next to nothing


class Sizes(NamedTuple):
    """Of a decoder layer. bytes: its packed weights."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    bytes: float


class LayerTime(NamedTuple):
    """seconds of one layer in a stack of them, and the bytes that it reads."""

    seconds: float
    bytes: int


def nobody() -> None:
    """What a process that is alone does to meet the others."""


def weight_of(n: int, k: int, form: Any) -> PackedWeight:
    """A packed weight W [n, k] of this form in memory of its own, as packing leaves it; its codes are all alike."""
    group = resolve_group(form.group_size, k)
    scales = torch.full((-(-n // 32), -(-k // group), 32), 0.01, dtype=getattr(torch, form.scales))
    zeros = None
    if form.zeros != "none":
        zeros = torch.full(scales.shape, 8, dtype=torch.uint8 if form.zeros == "point" else scales.dtype)
    codes = aligned_empty((-(-n // 32), round_up(k, 32) // 4, 16 * form.bits)).fill_(0x88)
    return PackedWeight(codes, scales, zeros, n, k, form.bits, form.group_size)


def layer_spec(sizes: Sizes, share: int, form: Any, compute: str) -> LayerSpec:
    """A gated layer with rotary positions that reads ``1 / share`` of the bytes, with that share of the heads.

    The width of the MLP is what the bytes leave beside attention.
    """
    h = sizes.hidden
    per_weight = weight_of(32, h, form).nbytes / (32 * h)
    kv_heads = max(1, sizes.kv_heads // share)
    heads = round_up(max(1, sizes.heads // share), kv_heads)
    q, kv = heads * sizes.head_dim, kv_heads * sizes.head_dim
    inner = (sizes.bytes / share / (h * per_weight) - 2 * q - 2 * kv) / 3
    intermediate = max(32, round(inner / 32) * 32)

    def of(n: int, k: int) -> PackedLinear:
        return PackedLinear(weight_of(n, k, form), dtype=torch.bfloat16, compute=compute)

    return LayerSpec(
        hidden=h,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=sizes.head_dim,
        intermediate=intermediate,
        norm="rms",
        eps=1e-5,
        qkv=(of(q, h), of(kv, h), of(kv, h)),
        o=of(h, q),
        up=(of(intermediate, h), of(intermediate, h)),
        down=of(h, intermediate),
        scale=sizes.head_dim**-0.5,
        act="silu",
        gated=True,
        input_norm=Norm(torch.ones(h)),
        mlp_norm=Norm(torch.ones(h)),
        rotary_dim=sizes.head_dim // 2 * 2,
    )


def layer_time(
    sizes: Sizes,
    share: int,
    form: Any,
    compute: str,
    size: int,
    meet: Callable[[], Any] = nobody,
    ranks: Any = None,
) -> tuple[LayerTime, float | None]:
    """(a layer of :func:`layer_spec` for one token, as one of a stack that no cache holds; seconds of a sum in it).

    size: bytes of the stack. ranks: :class:`torch_cpullm.collective.Ranks` that share memory and all measure: how much
    longer their sums make the layers, waiting for each other's shares included; None: no sums.
    """
    own = 0
    specs: list[LayerSpec] = []
    while own < size or len(specs) < 2:
        specs.append(layer_spec(sizes, share, form, compute))
        own += sum(each.packed.nbytes for each in specs[-1].linears())
    programs, count = [Program(each) for each in specs], len(specs)
    x = torch.ones(1, 1, sizes.hidden, dtype=torch.bfloat16)
    rotary = [torch.ones(1, 1, max(1, specs[0].rotary_dim)) for _ in range(2)]
    room = (1, specs[0].kv_heads, DEPTH + 1, sizes.head_dim)
    caches = [torch.ones(room, dtype=torch.bfloat16) for _ in range(2 * count)]
    handles = [program.handle for program in programs]
    arguments = (handles, x, rotary, [0, 1] * count, [-1] * count, caches, DEPTH, [1] * count, 0)
    alone = typical(lambda: run_all(arguments), meet)
    found = LayerTime(alone / count, own // count)
    if ranks is None or ranks.transport == "gloo":
        return found, None
    before = ranks.all_reduces, ranks.bytes
    cut = [Program(replace(each, ranks=ranks)) for each in specs]
    arguments, sums = ([program.handle for program in cut], *arguments[1:]), sums_of([[p] for p in cut], [None] * count)
    # Every rank runs equally often, or the last sums would wait for nobody.
    together = typical(lambda: run_all(arguments, sums), meet, times=16)
    ranks.all_reduces, ranks.bytes = before
    return found, max(0.0, together - alone) / sum(program.sums for program in cut)


def kernel_gbps(form: Any, compute: str, k: int, size: int, meet: Callable[[], Any] = nobody) -> float:
    """GB/s (1e9 bytes per second) at which ``y = x W^T`` of one row reads W [n, k] of about ``size`` bytes."""
    n = max(32, size // weight_of(32, k, form).nbytes * 32)
    weight, x = weight_of(n, k, form), torch.ones(1, k)
    return weight.nbytes / typical(lambda: linear(x, weight, None, None, compute), meet) / 1e9


def memory_gbps(size: int, meet: Callable[[], Any] = nobody) -> float:
    """GB/s at which all threads read memory."""
    buffer = aligned_empty((round_up(size, 1 << 16),)).fill_(1)
    return buffer.numel() / typical(lambda: torch.ops.cpullm.read_memory.default(buffer), meet) / 1e9


class Barriers(NamedTuple):
    """seconds of one; per_layer: how many; layer_s: of a layer that computes next to nothing."""

    seconds: float
    per_layer: int
    layer_s: float


def barrier_cost() -> Barriers:
    """From layers too small for a second thread to help with: what all threads take longer than one is waiting."""
    threads, count = torch.get_num_threads(), 64
    one = _tiny()
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
    arguments: tuple = ([program.handle] * count, x, [], [-1] * 2 * count, [-1] * count, caches, 0, [1] * count, 0)

    def run() -> None:
        run_all(arguments)

    together = typical(run, times=50)
    barriers = torch.ops.cpullm.layer_barriers.default()
    torch.set_num_threads(1)
    try:
        alone = typical(run, times=50)
    finally:
        torch.set_num_threads(threads)
    seconds = max(0.0, together - alone) / barriers if barriers else 0.0
    return Barriers(seconds, round(barriers / count), together / count)


def dispatch_cost() -> float:
    """Seconds of an operator that computes next to nothing, called from Python."""
    one, x = _tiny().eval(), torch.ones(1, _TINY)

    def run() -> None:
        for _ in range(100):
            one(x)

    with torch.no_grad():
        return typical(run, times=20) / 100


def token_cost(vocabulary: int, layers: int) -> float:
    """Seconds of a decode step of a Llama of width 32 with this many layers and tokens in its vocabulary.

    Embedding, positions, last norm, head, the Python of the model and of its layers, the choice of the likeliest token.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from .swap import optimize

    config: Any = LlamaConfig(
        hidden_size=_TINY,
        intermediate_size=_TINY,
        num_hidden_layers=max(2, layers),
        num_attention_heads=1,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        dtype="bfloat16",
    )
    made: Any = LlamaForCausalLM(config)
    model: Any = optimize(made.to(torch.bfloat16))
    with torch.inference_mode():
        out = model(torch.ones(1, 4, dtype=torch.int64), use_cache=True, logits_to_keep=1)
        at = 3

        def step() -> None:
            nonlocal out, at
            at += 1
            positions = {"position_ids": torch.tensor([[at]])}  # as generate() has it
            chosen = out.logits[:, -1:].argmax(-1)
            out = model(chosen, past_key_values=out.past_key_values, use_cache=True, **positions)

        return typical(step, times=100)


def _tiny() -> PackedLinear:
    return PackedLinear(pack(quantize_rtn(torch.ones(_TINY, _TINY), 4, 32, True, torch.float16)), dtype=torch.float32)


def typical(run: Callable[[], Any], meet: Callable[[], Any] = nobody, times: int = 0) -> float:
    """Median seconds of ``times`` runs, or of as many as fit into a window of time, after one that warms up."""
    run()
    meet()
    spent: list[float] = []
    begin = time.perf_counter()
    while len(spent) < times if times else len(spent) < 3 or time.perf_counter() - begin < _WINDOW_S:
        start = time.perf_counter()
        run()
        spent.append(time.perf_counter() - start)
    return statistics.median(spent)
