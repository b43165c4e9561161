"""Quantised weights: the canonical row-major form and the packed form that kernels read.

Letters: n output columns, k inputs. ``groups = ceil(k / group_size)``; the last group may be shorter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from . import library  # noqa: F401  it loads the operators
from .memory import HUGE_PAGE, aligned_empty, huge_pages

PANEL = 32  # output columns of a panel
STEP = 4  # inputs of a block
CHUNK = 32  # k is padded to a multiple of it; a group is a multiple of it
ACT_BLOCK = 128  # inputs that share one activation scale in int8 compute

SCALE_DTYPES = (torch.float16, torch.bfloat16)


def round_up(value: int, multiple: int) -> int:
    """Smallest multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple


def check_bits(bits: int) -> None:
    """Raise ValueError unless ``bits`` is 4 or 8."""
    if type(bits) is not int or bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits!r}")


def check_group_size(group_size: int) -> None:
    """Raise ValueError unless ``group_size`` is -1 (one group per row) or a positive multiple of 32 below 2**31."""
    if not isinstance(group_size, int) or isinstance(group_size, bool):
        raise ValueError(f"group_size must be an integer, got {group_size!r}")
    if group_size != -1 and (group_size <= 0 or group_size % CHUNK):
        raise ValueError(f"group_size must be -1 (per channel) or a positive multiple of {CHUNK}, got {group_size}")
    if group_size >= 1 << 31:
        raise ValueError(f"group_size must be below 2**31, got {group_size}")


def resolve_group(group_size: int, k: int) -> int:
    """Inputs per group for a row of ``k`` inputs: at most k rounded up to 32, which is what -1 stands for."""
    whole = round_up(k, CHUNK)
    return whole if group_size == -1 else min(group_size, whole)


def _check_scales(scales: Tensor, zeros: Tensor | None, n: int, k: int, bits: int, group_size: int) -> None:
    """ValueError for scales or zeros that no weight [n, k] of this form has; see :class:`QuantizedWeight`."""
    shape = [n, -(-k // resolve_group(group_size, k))]
    if scales.dtype not in SCALE_DTYPES or list(scales.shape) != shape:
        raise ValueError(
            f"scales must be float16 or bfloat16 {shape}, got {scales.dtype} {list(scales.shape)} "
            f"(codes {[n, k]}, group_size {group_size})"
        )
    if not _all_finite(scales):
        raise ValueError("scales must be finite")
    if zeros is None:
        return
    if bits != 4:
        raise ValueError("zeros are supported for bits=4 only; 8-bit weights are symmetric")
    if zeros.dtype not in (torch.uint8, scales.dtype) or list(zeros.shape) != shape:
        raise ValueError(f"zeros must be uint8 or {scales.dtype} {shape}, got {zeros.dtype} {list(zeros.shape)}")
    if zeros.dtype == torch.uint8:
        if int(zeros.max()) > 15:
            raise ValueError(f"zero points must lie in 0..15, got {int(zeros.max())}")
    elif not _all_finite(zeros):
        raise ValueError("minima must be finite")


def _all_finite(x: Tensor) -> bool:
    """isfinite(x).all() of float16 or bfloat16, by the exponent's bits: torch converts 16-bit floats one by one."""
    exponent = 0x7C00 if x.dtype == torch.float16 else 0x7F80
    return int((x.contiguous().view(torch.int16) & 0x7FFF).max()) < exponent


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight matrix W [n, k] in canonical row-major form, the same on every instruction set.

    codes: uint8 [n, k], one code per byte: 0..15 (bits 4) or int8 value + 128 (bits 8).
    scales: float16 | bfloat16 [n, groups].
    zeros: None, symmetric: ``w = scale * (code - 8)`` or ``scale * (code - 128)``;
        uint8 [n, groups] in 0..15, integer zero point: ``w = scale * (code - zero)`` (bits 4 only);
        the scales' dtype [n, groups], float minimum: ``w = scale * code + minimum`` (bits 4 only; GGUF Q4_1).
    group_size: a positive multiple of 32, or -1 for one group per row.

    Raises ValueError when shapes, dtypes or ranges disagree. NaN and inf scales are refused.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_group_size(self.group_size)
        codes = self.codes
        if codes.dtype != torch.uint8 or codes.dim() != 2 or 0 in codes.shape:
            raise ValueError(f"codes must be uint8 [n, k], got {codes.dtype} {list(codes.shape)}")
        if self.bits == 4 and int(codes.max()) > 15:
            raise ValueError(f"codes must lie in 0..15 for bits=4, got {int(codes.max())}")
        _check_scales(self.scales, self.zeros, self.n, self.k, self.bits, self.group_size)

    @property
    def n(self) -> int:
        """Output columns."""
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        """Inputs."""
        return self.codes.shape[1]

    def to(self, device: str | torch.device) -> QuantizedWeight:
        """The same on ``device``."""
        zeros = None if self.zeros is None else self.zeros.to(device)
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device), zeros=zeros)

    @property
    def groups(self) -> int:
        """Groups per row."""
        return -(-self.k // resolve_group(self.group_size, self.k))


@dataclass(frozen=True)
class PackedWeight:
    """W [n, k] in the layout every kernel reads, padded with zero weights to n' = 32 ceil(n/32), k' = 32 ceil(k/32).

    codes: uint8 [n'/32, k'/4, 64] for 4 bits: byte ``4c + i`` of a block holds column c (low nibble) and column c + 16
        (high nibble), input i; uint8 [n'/32, k'/4, 128] for 8 bits: byte ``4c + i`` holds column c, input i.
    scales, zeros: [n'/32, groups, 32], as in QuantizedWeight.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    n: int
    k: int
    bits: int
    group_size: int

    def __getstate__(self) -> dict[str, object]:
        """What a copy takes over: the fields, and not the number that ``ops`` has given to this object."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def group(self) -> int:
        """Inputs per group, with -1 resolved."""
        return resolve_group(self.group_size, self.k)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes, scales and zeros."""
        return self.codes, self.scales, self.zeros

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros as stored."""
        return sum(t.nbytes for t in self.tensors if t is not None)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of W, scales, zeros and padding included."""
        return 8 * self.nbytes / (self.n * self.k)


@dataclass(frozen=True)
class PackedStack:
    """Matrices W [count, n, k] of one form, packed one after the other, each padded to whole panels.

    whole: the packed weight [count * n', k], n' = n rounded up to 32.
    """

    whole: PackedWeight
    count: int
    n: int

    def __getitem__(self, i: int) -> PackedWeight:
        """Matrix i, in the memory of the stack."""
        if not 0 <= i < self.count:
            raise IndexError(f"matrix {i} of a stack of {self.count}")
        panels = -(-self.n // PANEL)
        own, w = slice(i * panels, (i + 1) * panels), self.whole
        return replace(
            w, codes=w.codes[own], scales=w.scales[own], zeros=None if w.zeros is None else w.zeros[own], n=self.n
        )

    @property
    def k(self) -> int:
        """Inputs."""
        return self.whole.k

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros as stored."""
        return self.whole.nbytes


def stack(count: int, matrix: Callable[[int], PackedWeight]) -> PackedStack:
    """The packed matrices ``matrix(0)``, ``matrix(1)``, ... in one memory; only one of them exists beside it.

    They must be of one shape and form; ValueError otherwise.
    """
    first = matrix(0)
    panels = first.codes.shape[0]

    def room(t: Tensor) -> Tensor:
        return aligned_empty((count * t.nbytes,)).view(t.dtype).view(count * panels, *t.shape[1:])

    zeros = None if first.zeros is None else room(first.zeros)
    whole = replace(first, codes=room(first.codes), scales=room(first.scales), zeros=zeros, n=count * panels * PANEL)
    for i in range(count):
        each = matrix(i) if i else first
        for to, t in zip(whole.tensors, each.tensors, strict=True):
            if to is None or t is None:
                same = to is t
            else:
                own = to[i * panels : (i + 1) * panels]
                same = t.dtype == own.dtype and t.shape == own.shape
                if same:
                    own.copy_(t)
            if not same or (each.n, each.k, each.group_size) != (first.n, first.k, first.group_size):
                raise ValueError(f"matrix {i} of a stack has another form than the first")
    return PackedStack(whole, count, first.n)


def alike(a: PackedWeight | PackedStack, b: PackedWeight | PackedStack) -> bool:
    """Whether two weights have the same codes, scales and zeros."""
    a, b = (each.whole if isinstance(each, PackedStack) else each for each in (a, b))
    pairs = zip(a.tensors, b.tensors, strict=True)
    return all((x is None and y is None) or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)


def gathered(weights: list[PackedWeight]) -> list[PackedWeight]:
    """The same weights, their tensors below 2 MiB copied one after the other into huge pages; as they are where these
    together fill none.

    Cores read less from memory where it is in small pages: on Zen 4, two of them 31 GB/s and not 36. The memory is
    freed with the last of the tensors, each of which has a storage of its own.
    """
    small = [t for w in weights for t in w.tensors if t is not None and t.nbytes < HUGE_PAGE]
    total = sum(round_up(t.nbytes, 64) for t in small)
    if total < HUGE_PAGE:
        return weights
    mapping, free = huge_pages(total)

    def moved(t: Tensor) -> Tensor:
        nonlocal free
        if t.nbytes >= HUGE_PAGE:
            return t
        to = torch.frombuffer(mapping, dtype=t.dtype, count=t.numel(), offset=free).view(t.shape)
        free += round_up(t.nbytes, 64)
        return to.copy_(t)

    return [
        replace(w, codes=moved(w.codes), scales=moved(w.scales), zeros=None if w.zeros is None else moved(w.zeros))
        for w in weights
    ]


def pack(weight: QuantizedWeight) -> PackedWeight:
    """The packed form of ``weight``; :func:`unpack` gives back the same codes, scales and zeros."""
    return _packed(weight.codes, weight.scales, weight.zeros, weight.k, weight.bits, weight.group_size, stored=8)


def _packed(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, k: int, bits: int, group_size: int, *, stored: int
) -> PackedWeight:
    """The packed weight of checked tensors; stored: bits that a code takes in ``codes``. No temporary memory."""
    n, operators = codes.shape[0], torch.ops.cpullm
    out = aligned_empty((-(-n // PANEL), round_up(k, CHUNK) // STEP, 16 * bits))
    operators.pack_codes.default(out, codes.contiguous(), k, bits, stored)

    def columns(x: Tensor) -> Tensor:
        made = x.new_empty(out.shape[0], x.shape[1], PANEL)
        operators.pack_columns.default(made, x.contiguous())
        return made

    return PackedWeight(out, columns(scales), None if zeros is None else columns(zeros), n, k, bits, group_size)


def unpack(packed: PackedWeight) -> QuantizedWeight:
    """The canonical form of ``packed``: the exact inverse of :func:`pack`."""
    panels = packed.codes.shape[0]
    blocks = packed.codes.view(panels, -1, 4 * packed.bits, STEP)  # [panels, k/4, 16 | 32, 4]
    if packed.bits == 4:
        blocks = torch.cat([blocks & 15, blocks >> 4], dim=2)
    codes = blocks.transpose(1, 2).reshape(panels * PANEL, -1)[: packed.n, : packed.k].contiguous()

    def rows(x: Tensor) -> Tensor:
        return x.transpose(1, 2).reshape(panels * PANEL, -1)[: packed.n].contiguous()

    zeros = None if packed.zeros is None else rows(packed.zeros)
    return QuantizedWeight(codes, rows(packed.scales), zeros, packed.bits, packed.group_size)


def dequantize(weight: QuantizedWeight | PackedWeight) -> Tensor:
    """W as float32 [n, k]: ``fma(code, scale, base)``, base the minimum or ``-zero * scale``; exact but for one
    rounding of the float-minimum form.
    """
    w = unpack(weight) if isinstance(weight, PackedWeight) else weight
    group = resolve_group(w.group_size, w.k)
    codes = w.codes.float()
    scales = w.scales.float().repeat_interleave(group, 1)[:, : w.k]
    if w.zeros is None:
        return (codes - (8 if w.bits == 4 else 128)) * scales
    zeros = w.zeros.float().repeat_interleave(group, 1)[:, : w.k]
    if w.zeros.dtype == torch.uint8:
        return (codes - zeros) * scales
    return codes * scales + zeros


def stored_form(weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """(codes, scales, zeros) as checkpoints have them: two 4-bit codes to a byte, the one of even input low."""
    codes = weight.codes
    if weight.bits == 4:
        if weight.k % 2:
            codes = torch.cat([codes, codes.new_zeros(weight.n, 1)], 1)
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    return codes, weight.scales, weight.zeros


def stored_width(k: int, bits: int) -> int:
    """Bytes of a row of k codes in :func:`stored_form`."""
    return -(-k // 2) if bits == 4 else k


def stored_stack(weights: PackedStack) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`stored_form` of every matrix of a stack: codes [count, n, ..] and so on."""
    codes, scales, zeros = zip(*(stored_form(unpack(weights[i])) for i in range(weights.count)), strict=True)
    return torch.stack(codes), torch.stack(scales), None if zeros[0] is None else torch.stack(zeros)


def pack_stored_stack(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, count: int, n: int, k: int, bits: int, group_size: int
) -> PackedStack:
    """The stack of :func:`stored_stack`, checked; ValueError says what does not fit."""
    shapes = [list(t.shape) for t in (codes, scales, zeros) if t is not None]
    if any(len(shape) != 3 or shape[0] != count for shape in shapes):
        raise ValueError(f"codes, scales and zeros must be {count} matrices each, got {shapes}")
    return stack(
        count,
        lambda i: pack_stored(codes[i], scales[i], None if zeros is None else zeros[i], n, k, bits, group_size),
    )


def pack_stored(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, n: int, k: int, bits: int, group_size: int
) -> PackedWeight:
    """The packed weight [n, k] of :func:`stored_form`, checked; ValueError says what does not fit."""
    check_bits(bits)
    check_group_size(group_size)
    if codes.dtype != torch.uint8 or list(codes.shape) != [n, stored_width(k, bits)]:
        raise ValueError(
            f"weight_codes must be uint8 {[n, stored_width(k, bits)]}, got {codes.dtype} {list(codes.shape)}"
        )
    if bits == 8:
        return pack(QuantizedWeight(codes, scales, zeros, bits, group_size))
    _check_scales(scales, zeros, n, k, bits, group_size)
    if k % 2 and int(codes[:, -1].max()) > 15:
        raise ValueError("weight_codes: the unused half of a row's last byte must be zero")

    return _packed(codes, scales, zeros, k, bits, group_size, stored=4)
