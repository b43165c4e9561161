"""Cells: one thing to time each, with weights that rotate past the last-level cache; ours and the peers'.

Letters: m rows, n output columns, k inputs. Weights are random bytes made directly in the form that the kernel reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_cpullm import ops
from torch_cpullm.packing import CHUNK, PANEL, STEP, PackedWeight, resolve_group, round_up

from . import machine

Call = Callable[[], Any]

FORMS = ("sym", "zero", "min")
"""How zero points are stored: none, uint8, float minimum. 8-bit weights have none."""

X_DTYPE = {"int8": torch.bfloat16, "bf16": torch.bfloat16, "fp32": torch.float32}
"""Element type of the activations for each compute type."""

CALL_SHAPES = ("64x64", "4096x4096")
"""Shapes that call_cells() needs from the pool, with groups 32 and 128 and 4 bits."""

BARRIERS = 1000
"""In one region, for the cost of each."""

PEERS = ("torch_bf16", "torch_fp32", "torch_int4pack", "onednn_int8")
"""torch_bf16, torch_fp32: F.linear. torch_int4pack: aten::_weight_int4pack_mm_for_cpu, bf16 (groups 128 and 32).
onednn_int8: onednn::qlinear_pointwise, int8 weights with one scale per column, activations quantised beforehand."""


@dataclass
class Cell:
    """What is timed, in the words of ``rows.KEYS``, and what a run found.

    calls: ready to call without arguments, one per copy of the weight. rotated: their bytes exceed the caches.
    repeats: how often a call does what is timed. samples_s: seconds of each timed call, by repeats.
    """

    engine: str
    m: int
    n: int
    k: int
    group: int
    form: str
    bits: int
    compute: str
    isa: str
    threads: int
    x_dtype: str
    bytes: int
    calls: Sequence[Call]
    op: str = "linear"
    rotated: bool = True
    repeats: int = 1
    position: int = 0
    samples_s: list[float] = field(default_factory=list)
    foreign: machine.ForeignCpu = field(default_factory=machine.ForeignCpu)

    def next_call(self) -> Call:
        """The call on the weight's next copy."""
        self.position = (self.position + 1) % len(self.calls)
        return self.calls[self.position]

    def reset(self) -> None:
        """Forget what was measured."""
        self.samples_s = []
        self.foreign = machine.ForeignCpu()


def name_of(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


# ---- weights --------------------------------------------------------------------------------------------------------


def packed_bytes(k: int, n: int, bits: int) -> int:
    """Bytes of the codes of a packed weight."""
    return round_up(n, PANEL) * round_up(k, CHUNK) * bits // 8


class Pool:
    """One stretch of random memory per kind of data; every weight of a shape is cut from it, copy after copy.

    The copies of a weight together fill ``rotate_bytes`` or more, and are at least two.
    """

    def __init__(self, shapes: list[tuple[int, int]], bits: list[int], groups: list[int], rotate_bytes: int) -> None:
        """shapes: (k, n) of all weights to come; bits, groups: all that they use. rotate_bytes: of codes, see above."""
        self.rotate_bytes = rotate_bytes
        sizes = {(k, n, b): packed_bytes(k, n, b) for (k, n), b in itertools.product(shapes, bits)}
        codes = max(self.copies(size) * size for size in sizes.values())
        scales = max(
            self.copies(size) * self._scales(k, n, group) for (k, n, _), size in sizes.items() for group in groups
        )
        generator = torch.Generator().manual_seed(0)
        count = min(max(codes, scales), 1 << 24)
        self._codes = _tiled(torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator), codes)
        self._zeros = _tiled(torch.randint(0, 16, (count,), dtype=torch.uint8, generator=generator), scales)
        random = torch.rand(count, generator=generator)
        self._scales_f16 = _tiled((0.001 + 0.01 * random).half(), scales)
        self._minima_f16 = _tiled((-0.08 * random).half(), scales)

    def copies(self, size_bytes: int) -> int:
        """Copies of a weight with ``size_bytes`` of codes."""
        return max(2, -(-self.rotate_bytes // size_bytes))

    @staticmethod
    def _scales(k: int, n: int, group: int) -> int:
        """Scales of a packed weight."""
        return round_up(n, PANEL) * -(-k // resolve_group(group, k))

    def weights(self, k: int, n: int, group: int, form: str, bits: int, most: int | None = None) -> list[PackedWeight]:
        """The copies of a random W [n, k], at most ``most``; form: one of FORMS."""
        panels, groups = -(-n // PANEL), -(-k // resolve_group(group, k))
        size, scales = packed_bytes(k, n, bits), self._scales(k, n, group)
        offsets = {"sym": None, "zero": self._zeros, "min": self._minima_f16}[form]
        found = []
        for copy in range(min(self.copies(size), most or self.copies(size))):
            per_group = slice(copy * scales, (copy + 1) * scales)
            found.append(
                PackedWeight(
                    self._codes[copy * size : (copy + 1) * size].view(panels, round_up(k, CHUNK) // STEP, 16 * bits),
                    self._scales_f16[per_group].view(panels, groups, PANEL),
                    None if offsets is None else offsets[per_group].view(panels, groups, PANEL),
                    n,
                    k,
                    bits,
                    group,
                )
            )
        return found

    def raw(self, size_bytes: int, shape: tuple[int, ...], dtype: torch.dtype = torch.uint8) -> list[Tensor]:
        """Copies of random bytes as one-byte ``dtype`` of ``shape``, cut from the codes; fewer if those are short."""
        count = min(self.copies(size_bytes), self._codes.numel() // size_bytes)
        return [self._codes[i * size_bytes : (i + 1) * size_bytes].view(dtype).view(shape) for i in range(count)]


def _tiled(block: Tensor, count: int) -> Tensor:
    """``count`` elements that repeat ``block``, in memory as packed weights get it."""
    out = machine.aligned_bytes(count * block.element_size()).view(block.dtype)
    for start in range(0, count, block.numel()):
        part = out[start : start + block.numel()]
        part.copy_(block[: part.numel()])
    return out


class Activations:
    """Random x [m, k] of each size and type, made once: activations are in cache, as they are in a model."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, int, torch.dtype], Tensor] = {}

    def get(self, m: int, k: int, dtype: torch.dtype) -> Tensor:
        """x [m, k]: normal for float types, 0..255 for uint8."""
        if (m, k, dtype) not in self._made:
            generator = torch.Generator().manual_seed(m * 1_000_003 + k)
            if dtype == torch.uint8:
                self._made[m, k, dtype] = torch.randint(0, 256, (m, k), dtype=dtype, generator=generator)
            else:
                self._made[m, k, dtype] = torch.randn(m, k, generator=generator).to(dtype)
        return self._made[m, k, dtype]


# ---- our cells ------------------------------------------------------------------------------------------------------


def own_cells(
    pool: Pool,
    inputs: Activations,
    shape: tuple[int, int],
    ms: list[int],
    *,
    groups: list[int],
    forms: list[str],
    bits: list[int],
    computes: list[str],
    isas: list[str],
    threads: int,
) -> list[Cell]:
    """Every combination for shape (k, n); 8-bit weights with form sym only, once if another form was asked for."""
    k, n = shape
    found = []
    kinds = dict.fromkeys((b, g, f if b == 4 else "sym") for b in bits for g in groups for f in forms)
    for b, group, form in kinds:
        copies = pool.weights(k, n, group, form, b)
        for compute, isa, m in itertools.product(computes, isas, ms):
            x = inputs.get(m, k, X_DTYPE[compute])
            calls = [partial(ops.linear, x, weight, compute=compute) for weight in copies]
            size, dtype = copies[0].nbytes, name_of(x.dtype)
            found.append(Cell("cpullm", m, n, k, group, form, b, compute, isa, threads, dtype, size, calls))
    return found


def call_cells(pool: Pool, inputs: Activations, isa: str, threads: int) -> list[Cell]:
    """The fixed costs: one call on a 64x64 weight in cache, a parallel region, a barrier inside one, and quantising
    activations of k = 4096 beside the linear.

    quantize: the public operator, which also allocates and fills its four results: an upper bound of what the linear
    spends inside. Its bytes are the activations it reads.
    """
    x = inputs.get(1, 64, torch.bfloat16)
    weight = pool.weights(64, 64, 32, "sym", 4, most=1)[0]  # of 2 KiB there would be a million copies on a large Xeon
    wide = torch.randn(64, 64).bfloat16()
    tiny = Cell(
        "cpullm", 1, 64, 64, 32, "sym", 4, "int8", isa, threads, "bfloat16", weight.nbytes,
        [partial(ops.linear, x, weight)], op="call", rotated=False,
    )  # fmt: skip
    found = [
        tiny,
        replace(
            tiny, engine="torch_bf16", group=0, form="none", bits=16, compute="bf16", isa="native", bytes=wide.nbytes,
            calls=[partial(F.linear, x, wide)], samples_s=[], foreign=machine.ForeignCpu(),
        ),
    ]  # fmt: skip
    waiting = replace(tiny, m=0, n=0, k=0, group=0, form="none", bits=0, x_dtype="none", bytes=0)
    for name, count in (("region", 0), ("barrier", BARRIERS)):
        calls = [partial(torch.ops.cpullm.team_barriers.default, count)]
        fresh: dict[str, Any] = {"samples_s": [], "foreign": machine.ForeignCpu()}
        found.append(replace(waiting, op=name, repeats=max(count, 1), calls=calls, **fresh))
    for m in (1, 512):
        x = inputs.get(m, 4096, torch.bfloat16)
        found.append(
            Cell(
                "cpullm", m, 0, 4096, 0, "none", 0, "int8", isa, threads, "bfloat16", x.nbytes,
                [partial(ops.quantize_activations, x)], op="quantize", rotated=False,
            )
        )  # fmt: skip
    kinds: dict[str, Any] = {"groups": [128], "forms": ["sym"], "bits": [4], "computes": ["int8"], "isas": [isa]}
    return found + own_cells(pool, inputs, (4096, 4096), [1, 512], **kinds, threads=threads)


# ---- peers ----------------------------------------------------------------------------------------------------------


def peer_cells(
    pool: Pool, inputs: Activations, shape: tuple[int, int], ms: list[int], groups: list[int], threads: int
) -> Iterator[Cell]:
    """Cells of PEERS for shape (k, n); torch_int4pack with those of ``groups`` that are positive and divide k.

    Each peer gets copies of its own weight until those fill what the pool's copies fill.
    """
    k, n = shape
    block = torch.randn(min(n * k, 1 << 22), generator=torch.Generator().manual_seed(1))
    for engine, dtype in (("torch_bf16", torch.bfloat16), ("torch_fp32", torch.float32)):
        size = n * k * dtype.itemsize
        stretch = _tiled(block.to(dtype), pool.copies(size) * n * k).view(-1, n, k)
        for m in ms:
            calls = [partial(F.linear, inputs.get(m, k, dtype), w) for w in stretch]
            compute = "bf16" if dtype == torch.bfloat16 else "fp32"
            yield _peer(engine, m, shape, 0, "none", 8 * dtype.itemsize, compute, threads, name_of(dtype), size, calls)
    for group in groups:
        if group <= 0 or k % group or n % PANEL:
            continue
        packed = pool.raw(n * k // 2, (n, k // 2))
        scales = [(0.01 * torch.rand(k // group, n, 2)).bfloat16() for _ in packed]
        size = packed[0].nbytes + scales[0].nbytes
        for m in ms:
            x = inputs.get(m, k, torch.bfloat16)
            op = torch.ops.aten._weight_int4pack_mm_for_cpu.default
            calls = [partial(op, x, w, group, s) for w, s in zip(packed, scales, strict=True)]
            yield _peer("torch_int4pack", m, shape, group, "min", 4, "bf16", threads, "bfloat16", size, calls)
    blocked = [torch.ops.onednn.qlinear_prepack.default(w, None) for w in _int8(pool, k, n)]
    scale, zero = torch.full((n,), 0.01), torch.zeros(n, dtype=torch.int64)
    for m in ms:
        q = inputs.get(m, k, torch.uint8)
        op = torch.ops.onednn.qlinear_pointwise.default
        tail: tuple = (scale, zero, None, 1.0, 0, torch.bfloat16, "none", [], "")
        calls = [partial(op, q, 0.01, 128, w, *tail) for w in blocked]
        yield _peer("onednn_int8", m, shape, -1, "sym", 8, "int8", threads, "uint8", n * k + scale.nbytes, calls)


def _int8(pool: Pool, k: int, n: int) -> Iterator[Tensor]:
    """int8 [n, k], as many as the pool's copies are, cut from its codes again and again: each is to be repacked."""
    cuts = pool.raw(n * k, (n, k), torch.int8) or [torch.randint(-128, 128, (n, k), dtype=torch.int8)]
    return itertools.islice(itertools.cycle(cuts), pool.copies(n * k))


def _peer(
    engine: str,
    m: int,
    shape: tuple[int, int],
    group: int,
    form: str,
    bits: int,
    compute: str,
    threads: int,
    x_dtype: str,
    size: int,
    calls: Sequence[Call],
) -> Cell:
    k, n = shape
    return Cell(engine, m, n, k, group, form, bits, compute, "native", threads, x_dtype, size, calls)
