"""Round to nearest with an error-minimising clip search per group."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..packing import SCALE_DTYPES, QuantizedWeight, check_bits, check_group_size, resolve_group


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
    of 32, or -1 for one group per row. sym: symmetric levels instead of an integer zero point. clip_search: for 4 bits,
    try clipped ranges (both ends of the range apart) and keep the scale and zero point with the least error, the sum of
    |error|^p with p = 2 for groups of 32, 3 up to 128 and 4 beyond; otherwise the full range of each group.

    The result is on the CPU wherever ``weight`` is. Raises ValueError for a wrong argument, for NaN or inf in
    ``weight``, and for weights whose scale overflows ``scale_dtype``.
    """
    check_bits(bits)
    check_group_size(group_size)
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"scale_dtype must be float16 or bfloat16, got {scale_dtype}")
    if weight.dim() != 2 or 0 in weight.shape or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            "weight must be a float32, bfloat16 or float16 matrix [n, k] with n, k > 0, "
            f"got {weight.dtype} {list(weight.shape)}"
        )
    low, high = torch.aminmax(weight)
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise ValueError("weight must be finite, but holds NaN or inf")
    symmetric = sym or bits == 8
    group = resolve_group(group_size, weight.shape[1])
    codes, scales, zeros = ops.quantize_weights(
        weight.cpu().contiguous(), bits, group, symmetric, clip_search, scale_dtype
    )
    if not bool(torch.isfinite(scales).all()):
        raise ValueError(f"weight is too large: a group's scale overflows {scale_dtype}")
    return QuantizedWeight(codes, scales, None if symmetric else zeros, bits, group_size)
