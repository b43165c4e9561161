"""Round to nearest, ranges clipped for the error of the layer's output instead of the weight's."""

from __future__ import annotations

import torch
from torch import Tensor

from ..packing import QuantizedWeight, resolve_group
from .groups import as_groups, base_of, canonical, check_form, codes_of, fit_groups
from .statistics import Statistics, check_statistics


def quantize_clip(
    weight: Tensor,
    statistics: Statistics,
    bits: int = 4,
    group_size: int = 32,
    zeros: str = "point",
    scale_dtype: torch.dtype = torch.float16,
) -> QuantizedWeight:
    """Levels that minimise ``sum E[x^2] (w - level)^2`` per group, each weight at the nearest.

    weight: float [n, k], finite. statistics: of its inputs. Raises ValueError for a wrong argument, NaN or inf.
    Source: the clipping step of AWQ, Lin et al. 2023.
    """
    check_form(weight, bits, group_size, zeros, scale_dtype)
    check_statistics(statistics, weight.shape[1])
    group = resolve_group(group_size, weight.shape[1])
    w = as_groups(weight.detach().float(), group)
    importance = as_groups(statistics.second.diagonal(), group)
    scale, zero = fit_groups(w, importance, bits, zeros, scale_dtype)
    codes = codes_of(w, scale[..., None], base_of(scale, zero, zeros)[..., None], bits)
    return canonical(codes.flatten(-2)[:, : weight.shape[1]], scale, zero, bits, group_size, zeros, scale_dtype)
