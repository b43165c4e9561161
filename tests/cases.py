"""The grid of the operator tests, with the reason for each size, and how to make the tensors of a case.

Sizes stand around the edges of what kernels work in: panels of 32 columns, blocks of 4 inputs, chunks of 32 inputs,
activation blocks of 128 inputs, 512 inputs unpacked at a time, tiles of at most 16 rows.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch

from torch_cpullm.packing import PackedWeight, QuantizedWeight, pack, resolve_group

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
LEAST = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}  # smallest positive number

ROWS = {
    0: "no rows: an empty result, nothing read",
    1: "decode: the codes are read in packed form",
    2: "two rows, the last that fp32 compute dequantises in registers",
    3: "first fp32 tile that dequantises to memory",
    7: "one below a tile of 8; two even tiles of 4 and 3",
    8: "the last count that fp32 compute of wide levels reads packed",
    9: "the first that it unpacks",
    14: "tiles of 5, 5 and 4 on avx512",
    15: "three full tiles of avx512",
    16: "kMaxTile",
    17: "an odd count over kMaxTile",
    29: "an uneven last tile",
    33: "several tiles, the last one short",
}


@dataclass(frozen=True)
class Case:
    """One weight matrix and what goes with it. form: sym, zero or minimum."""

    reason: str
    n: int
    k: int
    group: int
    form: str = "sym"
    bits: int = 4
    scale: torch.dtype = torch.float16
    x: torch.dtype = torch.float32
    bias: torch.dtype | None = None
    perm: bool = False

    def __str__(self):
        short = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
        extras = f"-bias_{short[self.bias]}" if self.bias else ""
        extras += "-perm" if self.perm else ""
        return f"n{self.n}-k{self.k}-g{self.group}-{self.form}{self.bits}-{short[self.scale]}-x_{short[self.x]}{extras}"


F32, BF16, F16 = FLOATS

# Every n, k, group and form meets each level and both computes; dtypes, bias and perm are spread over the list.
CASES = [
    Case("one whole block of everything", 32, 32, 32),
    Case("one weight: all the rest is padding", 1, 1, 32, bias=F32),
    Case("one weight of 8 bits", 1, 1, 32, bits=8, x=F16),
    Case("two panels, two groups", 64, 64, 32, "zero", x=BF16, bias=BF16),
    Case("one column and one input past a panel and a chunk", 33, 33, 32, "minimum", x=F16),
    Case("one column below a panel", 31, 96, 32, "zero", scale=BF16, perm=True),
    Case("a group that is no power of two and fills the row", 96, 96, 96, scale=BF16, bias=F16),
    Case("a group longer than the row", 32, 64, 128, "zero", x=F16, bias=F32),
    Case("group 96: groups and activation blocks cut each other", 32, 160, 96, "zero", perm=True, bias=F32),
    Case("the same with minima and bf16 scales", 64, 288, 96, "minimum", scale=BF16, x=BF16),
    Case("odd n, short last group of 44 in the second block", 45, 172, 64, "zero", scale=BF16),
    Case("the same, symmetric, permuted input", 45, 172, 64, x=BF16, perm=True, bias=BF16),
    Case("hidden 576 with group 128: a last group of half length", 96, 576, 128, "zero", x=F32, bias=F32),
    Case("the same, symmetric", 64, 576, 128, x=F16),
    Case("the same with minima", 64, 576, 128, "minimum", bias=F16),
    Case("a group over two activation blocks", 64, 512, 256, scale=BF16),
    Case("per channel", 32, 384, -1, x=BF16),
    Case("per channel, odd sizes, zero point", 45, 300, -1, "zero", scale=BF16, x=F16, bias=F32),
    Case("per channel past 1,024 inputs, minima", 33, 1100, -1, "minimum", perm=True),
    Case("one chunk past 1,024 inputs", 32, 1056, 32),
    Case("18 groups past 1,024 inputs", 64, 1152, 64, "zero", x=BF16),
    Case("a group of 96 lies across input 1,024 and input 2,048", 33, 2080, 96, "zero", bias=F32),
    Case("8 bits, one block", 32, 32, 32, bits=8, bias=BF16),
    Case("8 bits, group 32 as in Q8_0", 96, 576, 32, bits=8, x=BF16),
    Case("8 bits, odd n and a short group", 45, 172, 64, bits=8, scale=BF16, x=F16, perm=True),
    Case("8 bits, group 96, one chunk past 1,024 inputs", 33, 1056, 96, bits=8, bias=F32),
    Case("8 bits per channel", 64, 384, -1, bits=8),
]


@contextmanager
def one_thread():
    """For oracles: their many small steps wait for each other's threads on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def quantized(n, k, group, form="sym", bits=4, scale=torch.float16, seed=0):
    """Random canonical weight: every code, scales over two decades and of both signs, every zero point."""
    gen = generator(1000 * n + k + seed)
    groups = -(-k // resolve_group(group, k))
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=gen)
    scales = 10 ** (torch.rand(n, groups, generator=gen) * 2 - 3)
    scales = torch.where(torch.rand(n, groups, generator=gen) < 0.25, -scales, scales).to(scale)
    zeros = None
    if form == "zero":
        zeros = torch.randint(0, 16, (n, groups), dtype=torch.uint8, generator=gen)
    elif form == "minimum":
        zeros = (torch.randn(n, groups, generator=gen) * 0.1).to(scale)
    return QuantizedWeight(codes, scales, zeros, bits, group)


def activations(m, k, dtype=torch.float32, seed=0):
    """Random [m, k]; rows differ in size by up to 10^6, so that a scale shared between rows would show."""
    gen = generator(7000 * m + k + seed)
    return (torch.randn(m, k, generator=gen) * 10 ** (torch.rand(m, 1, generator=gen) * 6 - 4)).to(dtype)


def tensors(case, m):
    """(packed weight, x [m, k], bias or None, perm or None) of a case."""
    gen = generator(case.n + case.k)
    weight = pack(quantized(case.n, case.k, case.group, case.form, case.bits, case.scale))
    bias = torch.randn(case.n, generator=gen).to(case.bias) if case.bias else None
    perm = torch.randperm(case.k, generator=gen).to(torch.int32) if case.perm else None
    return weight, activations(m, case.k, case.x), bias, perm


def allowed(exact, bound, dtype):
    """``bound`` on a float32 result plus one rounding to ``dtype``; exact, bound: float64."""
    total = bound if dtype == torch.float32 else bound + UNIT_ROUNDOFF[dtype] * (exact.abs() + bound)
    return total + LEAST[dtype] + LEAST[torch.float32] * exact.shape[-1]


def at_offset(tensor, offset):
    """The same values in memory that starts ``offset`` bytes after a 64-byte boundary."""
    size = tensor.element_size()
    raw = torch.empty(tensor.numel() * size + 128, dtype=torch.uint8)
    start = (offset - raw.data_ptr()) % 64
    moved = raw[start : start + tensor.numel() * size].view(tensor.dtype).view(tensor.shape)
    moved.copy_(tensor)
    assert moved.data_ptr() % 64 == offset
    return moved


def replaced(weight, **changes):
    """A PackedWeight with other fields."""
    return PackedWeight(**{**{name: getattr(weight, name) for name in weight.__dataclass_fields__}, **changes})


def layouts(x):
    """name -> (tensor, shape of the leading dimensions of the result): the rows of x [m, k], stored in other ways."""
    m, k = x.shape
    size = x.element_size()
    wide = torch.full((m, k + 5), float("nan"), dtype=x.dtype)
    wide[:, :k] = x
    spread = torch.full((m, 3 * k), float("nan"), dtype=x.dtype)
    spread[:, ::3] = x
    pair = torch.full((m, k, 2), float("nan"), dtype=x.dtype)
    pair[..., 1] = x
    return {
        "8 bytes past a cache line": (at_offset(x, 8), (m,)),
        "one element past a cache line": (at_offset(x, size), (m,)),
        "3-D": (x.view(2, m // 2, k), (2, m // 2)),
        "4-D with ones": (x.view(1, m, 1, k), (1, m, 1)),
        "rows with a stride": (wide[:, :k], (m,)),
        "rows with a stride, 3-D": (wide[:, :k].view(2, m // 2, k), (2, m // 2)),
        "column-major": (x.T.contiguous().T, (m,)),
        "every third column": (spread[:, ::3], (m,)),
        "last dimension of stride 2": (pair[..., 1], (m,)),
        "rows out of order in memory": (x.flip(0)[torch.arange(m - 1, -1, -1)], (m,)),
    }
