"""Levels of a group of weights: ``w ~ scale * code + base``, chosen for the least weighted squared error.

base is ``-scale * zero`` with an integer zero point, ``-scale * 8`` (8 bits: 128) for symmetric levels, or a minimum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..packing import SCALE_DTYPES, QuantizedWeight, check_bits, check_group_size

ZEROS = ("none", "point", "minimum")
_RATIOS = tuple(1 - 0.05 * step for step in range(8))  # of a group's full range, clipped


def check_form(weight: Tensor, bits: int, group_size: int, zeros: str, scale_dtype: torch.dtype) -> None:
    """ValueError for a weight that is no finite float matrix, or levels that no kernel has."""
    check_bits(bits)
    check_group_size(group_size)
    if zeros not in ZEROS or (bits == 8 and zeros != "none"):
        raise ValueError(f"zeros must be one of {', '.join(ZEROS)}, and none for 8 bits, got {zeros!r}")
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"scale_dtype must be float16 or bfloat16, got {scale_dtype}")
    if weight.dim() != 2 or 0 in weight.shape or not weight.is_floating_point():
        raise ValueError(f"weight must be a float matrix [n, k] with n, k > 0, got {weight.dtype} {list(weight.shape)}")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight must be finite, but holds NaN or inf")


def as_groups(x: Tensor, group: int) -> Tensor:
    """[.., k] -> [.., groups, group], the last group filled with zeros."""
    pad = -x.shape[-1] % group
    filled = torch.nn.functional.pad(x, (0, pad)) if pad else x  # without the test torch would copy
    return filled.unflatten(-1, (-1, group))


def codes_of(w: Tensor, scale: Tensor, base: Tensor, bits: int) -> Tensor:
    """The nearest codes, as floats: ``round((w - base) / scale)`` within 0 .. 2^bits - 1."""
    return ((w - base) / scale).round_().clamp_(0, (1 << bits) - 1)


def fit_groups(w: Tensor, weights: Tensor, bits: int, zeros: str, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(scale, zero or minimum) per group, float32 [..], for the least ``sum weights * (w - level)^2`` of those tried.

    w: [.., g]; weights: [.., g], broadcast. Tried are ranges clipped to 65 .. 100 %, zero points one up and down, and
    the best fit of the scale to the codes found. Scales are rounded to ``scale_dtype``; zero is 2^(bits-1) where
    symmetric. Raises ValueError where no scale fits into ``scale_dtype``.
    """
    top, half = (1 << bits) - 1, 1 << (bits - 1)
    low, high = torch.aminmax(w, dim=-1)
    best = torch.full_like(low, torch.inf)
    scale, zero = torch.ones_like(low), torch.zeros_like(low)

    def try_levels(s: Tensor, z: Tensor) -> None:
        nonlocal best, scale, zero
        s = s.to(scale_dtype).float()
        s = torch.where(s == 0, torch.ones_like(s), s)
        if zeros == "minimum":
            z = z.to(scale_dtype).float()
        codes = codes_of(w, s[..., None], base_of(s, z, zeros)[..., None], bits)
        error = (weights * (codes * s[..., None] + base_of(s, z, zeros)[..., None] - w).square_()).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)

    for ratio in _RATIOS if bits == 4 else _RATIOS[:1]:
        if zeros == "none":
            largest = torch.where(-low > high, low, -high)  # it gets code 0, the one with the larger magnitude
            for s in (-largest / half, largest / half, torch.maximum(-low, high) / (half - 1)):
                try_levels(ratio * s, torch.full_like(s, half))
        elif zeros == "point":
            bottom, upper = low.clamp(max=0), high.clamp(min=0)
            s = ratio * (upper - bottom) / top
            s = torch.where(s == 0, torch.ones_like(s), s)
            middle = (top / 2 - (upper + bottom) / 2 / s).round()
            for step in (0, -1, 1):
                try_levels(s, (middle + step).clamp(0, top))
        else:
            s = ratio * (high - low) / top
            try_levels(s, (high + low) / 2 - s * top / 2)
    if not bool(torch.isfinite(best).all()):
        raise ValueError(f"weight is too large: a group's scale overflows {scale_dtype}")
    codes = codes_of(w, scale[..., None], base_of(scale, zero, zeros)[..., None], bits)
    if zeros == "minimum":
        total = weights.expand_as(w).sum(-1).clamp_min(1e-30)
        mean_c, mean_w = ((weights * x).sum(-1) / total for x in (codes, w))
        c, v = codes - mean_c[..., None], w - mean_w[..., None]
        slope = (weights * c * v).sum(-1) / (weights * c * c).sum(-1).clamp_min(1e-30)
        try_levels(slope, mean_w - slope * mean_c)
    else:
        c = codes - zero[..., None]
        try_levels((weights * c * w).sum(-1) / (weights * c * c).sum(-1).clamp_min(1e-30), zero)
    return scale, zero


def base_of(scale: Tensor, zero: Tensor, zeros: str) -> Tensor:
    """What code 0 stands for."""
    return zero if zeros == "minimum" else -scale * zero


def canonical(
    codes: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int, zeros: str, scale_dtype: torch.dtype
) -> QuantizedWeight:
    """QuantizedWeight of float codes [n, k], scales and zeros [n, groups]."""
    stored = scale.to(scale_dtype)
    kept = {"none": None, "point": zero.to(torch.uint8), "minimum": zero.to(scale_dtype)}[zeros]
    return QuantizedWeight(
        codes.to(torch.uint8).contiguous(),
        stored.contiguous(),
        None if kept is None else kept.contiguous(),
        bits,
        group_size,
    )
