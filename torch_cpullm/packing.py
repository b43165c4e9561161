"""Quantised weights: the canonical row-major form and the packed form that kernels read.

Letters: n output columns, k inputs. ``groups = ceil(k / group_size)``; the last group may be shorter.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import torch
from torch import Tensor

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
        codes, scales, zeros = self.codes, self.scales, self.zeros
        if codes.dtype != torch.uint8 or codes.dim() != 2 or 0 in codes.shape:
            raise ValueError(f"codes must be uint8 [n, k], got {codes.dtype} {list(codes.shape)}")
        if self.bits == 4 and bool((codes > 15).any()):
            raise ValueError(f"codes must lie in 0..15 for bits=4, got {int(codes.max())}")
        shape = [codes.shape[0], self.groups]
        if scales.dtype not in SCALE_DTYPES or list(scales.shape) != shape:
            raise ValueError(
                f"scales must be float16 or bfloat16 {shape}, got {scales.dtype} {list(scales.shape)} "
                f"(codes {list(codes.shape)}, group_size {self.group_size})"
            )
        if not bool(torch.isfinite(scales).all()):
            raise ValueError("scales must be finite")
        if zeros is None:
            return
        if self.bits != 4:
            raise ValueError("zeros are supported for bits=4 only; 8-bit weights are symmetric")
        if zeros.dtype not in (torch.uint8, scales.dtype) or list(zeros.shape) != shape:
            raise ValueError(f"zeros must be uint8 or {scales.dtype} {shape}, got {zeros.dtype} {list(zeros.shape)}")
        if zeros.dtype == torch.uint8 and bool((zeros > 15).any()):
            raise ValueError(f"zero points must lie in 0..15, got {int(zeros.max())}")
        if zeros.dtype != torch.uint8 and not bool(torch.isfinite(zeros).all()):
            raise ValueError("minima must be finite")

    @property
    def n(self) -> int:
        """Output columns."""
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        """Inputs."""
        return self.codes.shape[1]

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

    @property
    def group(self) -> int:
        """Inputs per group, with -1 resolved."""
        return resolve_group(self.group_size, self.k)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros as stored."""
        return sum(t.nbytes for t in (self.codes, self.scales, self.zeros) if t is not None)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of W, scales, zeros and padding included."""
        return 8 * self.nbytes / (self.n * self.k)


def _panels(x: Tensor, pad_value: float = 0) -> Tensor:
    """[n, groups] -> [n'/32, groups, 32], contiguous."""
    pad = round_up(x.shape[0], PANEL) - x.shape[0]
    if pad:
        x = torch.cat([x, x.new_full((pad, x.shape[1]), pad_value)])
    return x.view(-1, PANEL, x.shape[1]).transpose(1, 2).contiguous()


_HUGE_PAGE = 1 << 21
_MADV_HUGEPAGE = 14  # Linux


def _aligned_empty(shape: tuple[int, ...]) -> Tensor:
    """Uninitialised uint8 tensor at a 64-byte boundary; from 2 MiB on at a huge page's, and advised to use huge pages.

    The advice is a hint: nothing depends on it, and systems without huge pages ignore it.
    """
    count = math.prod(shape)
    alignment = _HUGE_PAGE if count >= _HUGE_PAGE else 64
    raw = torch.empty(count + alignment - 1, dtype=torch.uint8)
    start = -raw.data_ptr() % alignment
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if alignment == _HUGE_PAGE and madvise is not None:
        madvise(
            ctypes.c_void_p(raw.data_ptr() + start), ctypes.c_size_t(count // _HUGE_PAGE * _HUGE_PAGE), _MADV_HUGEPAGE
        )
    return raw[start : start + count].view(shape)


def pack(weight: QuantizedWeight) -> PackedWeight:
    """The packed form of ``weight``; :func:`unpack` gives back the same codes, scales and zeros."""
    n, k = weight.n, weight.k
    kp, panels = round_up(k, CHUNK), -(-n // PANEL)
    bits = weight.bits
    out = _aligned_empty((panels, kp // STEP, 16 * bits))
    step = max(1, (1 << 24) // (PANEL * kp))  # panels at a time: bounds the temporary memory
    for first in range(0, panels, step):
        last = min(first + step, panels)
        rows = weight.codes[first * PANEL : last * PANEL]
        if rows.shape != ((last - first) * PANEL, kp):
            padded = rows.new_zeros((last - first) * PANEL, kp)
            padded[: rows.shape[0], :k] = rows
            rows = padded
        blocks = rows.view(last - first, PANEL, kp // STEP, STEP).transpose(1, 2)  # [panels, k/4, 32, 4]
        if bits == 4:
            blocks = blocks[:, :, :16] | (blocks[:, :, 16:] << 4)
        out[first:last] = blocks.reshape(last - first, kp // STEP, 16 * bits)
    zeros = None if weight.zeros is None else _panels(weight.zeros)
    return PackedWeight(out, _panels(weight.scales), zeros, n, k, bits, weight.group_size)


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


def from_stored(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, n: int, k: int, bits: int, group_size: int
) -> QuantizedWeight:
    """The weight [n, k] of a checkpoint's tensors, checked; ValueError says what does not fit."""
    if codes.dtype != torch.uint8 or list(codes.shape) != [n, stored_width(k, bits)]:
        raise ValueError(
            f"weight_codes must be uint8 {[n, stored_width(k, bits)]}, got {codes.dtype} {list(codes.shape)}"
        )
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1).view(n, -1)[:, :k]
    return QuantizedWeight(codes, scales, zeros, bits, group_size)
