"""Half-quadratic zero points, without any data."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packing import QuantizedWeight, resolve_group
from .groups import as_groups, base_of, canonical, check_form, codes_of, fit_groups

_ROUNDS, _NORM, _BETA, _GROWTH = 20, 0.7, 10.0, 1.01


def quantize_hqq(
    weight: Tensor,
    bits: int = 4,
    group_size: int = 32,
    zeros: str = "point",
    scale_dtype: torch.dtype = torch.float16,
) -> QuantizedWeight:
    """Zero points that minimise ``sum |w - level|^0.7``, which forgives outliers, by half-quadratic splitting.

    weight: float [n, k], finite. zeros: "point" or "minimum" ("none" leaves nothing to optimise and is the clip search
    of :func:`fit_groups`). Integer zero points are rounded at the end and kept where they lower that norm.
    Raises ValueError for a wrong argument, NaN or inf. Source: Badri and Shaji 2023, "Half-Quadratic Quantization".
    """
    check_form(weight, bits, group_size, zeros, scale_dtype)
    w = as_groups(weight.detach().float(), resolve_group(group_size, weight.shape[1]))
    scale, zero = fit_groups(w, w.new_ones(()), bits, zeros, scale_dtype)

    def norm(z: Tensor) -> Tensor:
        base = base_of(scale, z, zeros)[..., None]
        return (codes_of(w, scale[..., None], base, bits) * scale[..., None] + base - w).abs().pow(_NORM).sum(-1)

    if zeros != "none":
        base, beta = base_of(scale, zero, zeros), _BETA
        for _ in range(_ROUNDS):
            level = codes_of(w, scale[..., None], base[..., None], bits) * scale[..., None]
            error = w - level - base[..., None]
            size = error.abs().clamp_min(1e-8)
            outlier = error.sign() * (size - size.pow(_NORM - 1) / beta).clamp_min(0)
            base, beta = (w - level - outlier).mean(-1), beta * _GROWTH
        if zeros == "minimum":
            moved = base.to(scale_dtype).float()
        else:
            moved = (-base / scale).round().clamp(0, (1 << bits) - 1)
        zero = torch.where(norm(moved) < norm(zero), moved, zero)
    codes = codes_of(w, scale[..., None], base_of(scale, zero, zeros)[..., None], bits)
    codes = codes.flatten(-2)[:, : weight.shape[1]]
    return canonical(codes, scale, zero, bits, group_size, zeros, scale_dtype)
