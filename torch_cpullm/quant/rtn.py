"""Round to nearest with an error-minimising clip search per group."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packing import QuantizedWeight, check_bits, check_group_size, resolve_group

CLIP_RATIOS = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82, 0.78, 0.74, 0.7)
"""Fractions of a group's range that are tried; the one with the least squared error wins."""

_ROWS_BYTES = 1 << 25  # float32 bytes of the rows handled at a time


def quantize_rtn(
    weight: Tensor,
    bits: int = 4,
    group_size: int = 32,
    sym: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    clip_search: bool = True,
) -> QuantizedWeight:
    """Quantise W [n, k] group by group, each group on its own.

    weight: float32 | bfloat16 | float16 [n, k], finite. bits: 4, or 8 (symmetric only). group_size: a positive multiple
    of 32, or -1 for one group per row. sym: symmetric levels instead of an integer zero point. clip_search: try
    :data:`CLIP_RATIOS` of each group's range and keep the one with the least squared error.

    Raises ValueError for a wrong argument, for NaN or inf in ``weight``, and for weights whose scale overflows
    ``scale_dtype``.
    """
    check_bits(bits)
    check_group_size(group_size)
    if weight.dim() != 2 or 0 in weight.shape or not weight.is_floating_point():
        raise ValueError(f"weight must be a float matrix [n, k] with n, k > 0, got {weight.dtype} {list(weight.shape)}")
    n, k = weight.shape
    group = resolve_group(group_size, k)
    groups = -(-k // group)
    codes = torch.empty((n, k), dtype=torch.uint8)
    scales = torch.empty((n, groups), dtype=scale_dtype)
    symmetric = sym or bits == 8
    zeros = None if symmetric else torch.empty((n, groups), dtype=torch.uint8)
    ratios = CLIP_RATIOS if clip_search and bits == 4 else (1.0,)
    step = max(1, _ROWS_BYTES // (4 * groups * group))
    for first in range(0, n, step):
        rows = slice(first, min(first + step, n))
        x = weight[rows].float()
        if not bool(torch.isfinite(x).all()):
            raise ValueError("weight must be finite, but holds NaN or inf")
        if groups * group > k:
            # Repeat the last value: padding must not widen the range of a short last group.
            x = torch.cat([x, x[:, -1:].expand(-1, groups * group - k)], 1)
        x = x.view(-1, groups, group)
        found = _symmetric(x, bits, scale_dtype, ratios) if symmetric else _asymmetric(x, scale_dtype, ratios)
        codes[rows] = found[0].view(x.shape[0], -1)[:, :k]
        scales[rows] = found[1]
        if zeros is not None:
            zeros[rows] = found[2]
    if not bool(torch.isfinite(scales).all()):
        raise ValueError(f"weight is too large: a group's scale overflows {scale_dtype}")
    return QuantizedWeight(codes, scales, zeros, bits, group_size)


def _keep_better(best: tuple | None, error: Tensor, *values: Tensor) -> tuple:
    """(error, *values) where ``error`` is lower than in ``best``, else ``best``; one choice per group."""
    if best is None:
        return (error, *values)
    better = error < best[0]
    return tuple(torch.where(better, new, old) for new, old in zip((error, *values), best, strict=True))


def _symmetric(x: Tensor, bits: int, scale_dtype: torch.dtype, ratios: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """x [rows, groups, group] -> codes, scales. The value of largest magnitude sits on the long side of the levels."""
    low, high, offset = (-8, 7, 8) if bits == 4 else (-127, 127, 128)
    amax = x.abs().amax(-1)
    top = x.gather(-1, x.abs().argmax(-1, keepdim=True)).squeeze(-1) if bits == 4 else amax
    best = None
    for ratio in ratios:
        scale = (top * (ratio / (low if bits == 4 else high))).to(scale_dtype)
        q = _levels(x, scale, low, high, 0.0)
        best = _keep_better(best, _error(x, q, scale), scale)
    assert best is not None
    q = _levels(x, best[1], low, high, 0.0)
    return (q + offset).to(torch.uint8), best[1]


def _asymmetric(x: Tensor, scale_dtype: torch.dtype, ratios: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """x [rows, groups, group] -> codes, scales, zero points in 0..15; zero is always a level."""
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    best = None
    for ratio in ratios:
        scale = ((high - low) * (ratio / 15)).to(scale_dtype)
        zero = torch.round(-low * ratio / _divisor(scale)).clamp_(0, 15)
        q = _levels(x, scale, 0, 15, zero) - zero[..., None]
        best = _keep_better(best, _error(x, q, scale), scale, zero)
    assert best is not None
    q = _levels(x, best[1], 0, 15, best[2])
    return q.to(torch.uint8), best[1], best[2].to(torch.uint8)


def _divisor(scale: Tensor) -> Tensor:
    scale = scale.float()
    return torch.where(scale == 0, torch.ones(()), scale)


def _levels(x: Tensor, scale: Tensor, low: int, high: int, zero: Tensor | float) -> Tensor:
    q = x / _divisor(scale)[..., None]
    if isinstance(zero, Tensor):
        q += zero[..., None]
    return q.round_().clamp_(low, high)


def _error(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    return (q * scale.float()[..., None]).sub_(x).square_().sum(-1)
