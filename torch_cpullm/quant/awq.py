"""Scales of input channels, s: W diag(s) is quantised, and the operation before computes x / s. AWQ and TEQ find s."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..packing import dequantize, resolve_group
from .groups import as_groups, check_form
from .rtn import quantize_rtn
from .statistics import Statistics, check_statistics, output_error

_GRID = 10
_TEQ_STEPS, _TEQ_RATE = 60, 0.01


def _rounded(weight: Tensor, bits: int, group_size: int, zeros: str, scale_dtype: torch.dtype) -> Tensor:
    """What round-to-nearest makes of ``weight``; minima stand at a zero point's place for the search."""
    return dequantize(quantize_rtn(weight, bits, group_size, zeros == "none", scale_dtype).to(weight.device))


def awq_scales(
    weights: Sequence[Tensor],
    statistics: Statistics,
    bits: int = 4,
    group_size: int = 32,
    zeros: str = "point",
    scale_dtype: torch.dtype = torch.float16,
    spread: Tensor | None = None,
) -> Tensor:
    """s [channels] > 0, ``E|x|^a`` with the power a of 0, 0.1 .. 0.9 that leaves the least output error; a = 0: ones.

    weights: [n_i, k] of all linears that read x. spread: int64 [k], the channel that each input belongs to where
    several share one; None: each has its own. The error is summed over the linears, rounding to nearest.
    Source: Lin et al. 2023, "AWQ: Activation-aware Weight Quantization".
    """
    for weight in weights:
        check_form(weight, bits, group_size, zeros, scale_dtype)
        check_statistics(statistics, weight.shape[1])
    seen = statistics.magnitude
    index = torch.arange(len(seen), device=seen.device) if spread is None else spread.to(seen.device)
    channels = int(index.max()) + 1
    magnitude = seen.new_zeros(channels).index_add(0, index, seen) / torch.bincount(index, minlength=channels)
    magnitude = magnitude.clamp_min(1e-4 * float(magnitude.mean()) + 1e-12)
    best, found = torch.inf, seen.new_ones(channels)
    for step in range(_GRID):
        s = magnitude ** (step / _GRID)
        s = s / (s.max() * s.min()).sqrt()
        full = s[index]
        error = sum(
            output_error(
                _rounded(w.float() * full, bits, group_size, zeros, scale_dtype) / full - w.float(), statistics
            )
            for w in weights
        )
        if error < best:
            best, found = error, s
    return found


def teq_scales(
    weights: Sequence[Tensor],
    statistics: Statistics,
    bits: int = 4,
    group_size: int = 32,
    zeros: str = "point",
    scale_dtype: torch.dtype = torch.float16,
    spread: Tensor | None = None,
) -> Tensor:
    """s [channels] > 0 as :func:`awq_scales`, found by gradient descent on the output error, from AWQ's s on.

    Rounding passes gradients straight through. The best s of all steps is returned, so it is no worse than AWQ's
    for full-range levels.
    Source: Cheng et al. 2023, "TEQ: Trainable Equivalent Transformation for Quantization of LLMs".
    """
    start = awq_scales(weights, statistics, bits, group_size, zeros, scale_dtype, spread)
    index = torch.arange(len(start), device=start.device) if spread is None else spread.to(start.device)
    logarithm = start.log().requires_grad_()
    optimizer = torch.optim.Adam([logarithm], _TEQ_RATE)
    best, found = torch.inf, start
    with torch.enable_grad():
        for _ in range(_TEQ_STEPS):
            full = logarithm.exp()[index]
            error = start.new_zeros(())
            for weight in weights:
                w = weight.detach().float()
                change = _full_range(w * full, bits, group_size, zeros) / full - w
                error = error + ((change @ statistics.second) * change).sum()
            now = float(error.detach())
            if now < best:
                best, found = now, logarithm.detach().exp()
            optimizer.zero_grad()
            error.log().backward()
            optimizer.step()
    return found


def _full_range(w: Tensor, bits: int, group_size: int, zeros: str) -> Tensor:
    """Round to nearest over each group's full range, differentiable: rounding's derivative counts as one."""
    k, top = w.shape[1], (1 << bits) - 1
    grouped = as_groups(w, resolve_group(group_size, k))
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    if zeros == "none":
        high = torch.maximum(high, -low)
        low = -high
    scale = ((high - low) / top).clamp_min(1e-12)
    steps = (grouped - low) / scale
    steps = steps + (steps.round() - steps).detach()
    return (steps * scale + low).flatten(-2)[:, :k]
