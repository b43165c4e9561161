"""GPTQ: round one input after another, and let those still to come make up for the error."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..packing import QuantizedWeight, resolve_group
from .groups import as_groups, base_of, canonical, check_form, codes_of, fit_groups
from .statistics import Statistics, check_statistics

log = logging.getLogger("torch_cpullm")

_BLOCK = 128  # inputs whose errors are spread one by one; beyond a block they are spread as one product


def inverse_factor(second: Tensor, damping: float) -> Tensor:
    """U, upper triangular with ``U^T U = (H + d I)^-1``, H = ``second`` [k, k]; d = damping times H's mean diagonal.

    H that stays singular (float32 rounding, inputs that repeat each other) gets ten times the damping until it is not.
    """
    mean = float(second.diagonal().mean())
    eye = torch.eye(len(second), device=second.device)
    for attempt in range(6):
        lower, info = torch.linalg.cholesky_ex(second + eye * (mean * damping * 10**attempt + 1e-12))
        if not int(info):
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(info):
                if attempt:
                    log.info("GPTQ: a singular Hessian took %g times the damping", 10**attempt)
                return upper
    raise ValueError("the Hessian of the inputs is not positive definite: their statistics are damaged")


def order_by_group(diagonal: Tensor, group: int) -> Tensor:
    """Inputs [k], large ones first, groups kept together: groups by their largest diagonal, inputs inside by theirs.

    So a group is finished before the next begins, and inference needs no order of its own. Source: group-aware
    reordering (GAR), Gafni et al. 2025, "Dual precision quantization".
    """
    grouped = as_groups(diagonal + 1e-30, group)  # the filling, zero, sorts last
    inside = grouped.argsort(dim=-1, descending=True, stable=True)
    groups = grouped.amax(-1).argsort(descending=True, stable=True)
    first = group * torch.arange(len(grouped), device=diagonal.device)[:, None]
    order = (inside + first)[groups].flatten()
    return order[order < len(diagonal)]


def quantize_gptq(
    weight: Tensor,
    statistics: Statistics,
    bits: int = 4,
    group_size: int = 32,
    zeros: str = "point",
    scale_dtype: torch.dtype = torch.float16,
    *,
    damping: float = 0.01,
) -> QuantizedWeight:
    """Codes that keep ``E|x W^T - x Q^T|^2`` small: rounding errors are made up for by the inputs not yet rounded.

    weight: float [n, k]. statistics: of its inputs. zeros: "none" (symmetric), "point" (integer zero points) or
    "minimum". A group's levels are chosen when its turn comes, for the weights as they are then, errors weighted by
    what they cost. An input that is always zero gets the weight's own nearest code. Order: :func:`order_by_group`.

    Raises ValueError for a wrong argument, NaN, or inf.
    Source: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers".
    """
    check_form(weight, bits, group_size, zeros, scale_dtype)
    check_statistics(statistics, weight.shape[1])
    if not 0 < damping < 1:
        raise ValueError(f"damping must lie between 0 and 1, got {damping!r}")
    k, group = weight.shape[1], resolve_group(group_size, weight.shape[1])
    order = order_by_group(statistics.second.diagonal(), group)
    second = statistics.second[order][:, order]
    w = weight.detach().float().T[order].contiguous()  # [k, n]: an input's weights lie together
    factor = inverse_factor(second, damping)
    codes = torch.empty_like(w)
    scale = w.new_empty(-(-k // group), w.shape[1])
    zero = torch.empty_like(scale)
    ends, groups = _group_ends(order, group), (order // group).tolist()
    begin = 0
    for end in _block_ends(ends):
        errors = w.new_empty(end - begin, w.shape[1])
        for j in range(begin, end):
            if j == 0 or j in ends:
                g, last = groups[j], min(e for e in ends if e > j)
                importance = factor.diagonal()[j:last].square().reciprocal()
                scale[g], zero[g] = fit_groups(w[j:last].T, importance, bits, zeros, scale_dtype)
                base = base_of(scale[g], zero[g], zeros)
            codes[j] = codes_of(w[j], scale[g], base, bits)
            error = (w[j] - (codes[j] * scale[g] + base)) / factor[j, j]
            errors[j - begin] = error
            w[j + 1 : end].addr_(factor[j, j + 1 : end], error, alpha=-1)
        w[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
        begin = end
    back = torch.empty_like(codes)
    back[order] = codes
    return canonical(back.T, scale.T, zero.T, bits, group_size, zeros, scale_dtype)


def _group_ends(order: Tensor, group: int) -> list[int]:
    """Positions in ``order`` where a group has ended."""
    groups = order // group
    inner = (groups[1:] != groups[:-1]).nonzero().flatten() + 1
    return [*inner.tolist(), len(order)]


def _block_ends(ends: list[int]) -> list[int]:
    """Those of ``ends`` that leave blocks of whole groups, at least _BLOCK inputs each but for the last."""
    found = [0]
    for end in ends:
        if end - found[-1] >= _BLOCK or end == ends[-1]:
            found.append(end)
    return found[1:]


def refine(
    weight: Tensor, quantized: QuantizedWeight, statistics: Statistics, sweeps: int = 2, damping: float = 0.01
) -> QuantizedWeight:
    """Lower ``E|x W^T - x Q^T|^2`` of codes found before: each sweep fits all scales of a row, then visits every code.

    Scales are the least-squares solution for fixed codes, kept where they help after rounding; a code is set to the
    best value with all others fixed. Zero points stay. Never worse than before.
    Source: coordinate descent, Behdin et al. 2023, "QuantEase"; the scales' fit is plain linear regression.
    """
    check_statistics(statistics, weight.shape[1])
    k, bits, n = quantized.k, quantized.bits, quantized.n
    group = resolve_group(quantized.group_size, k)
    zeros = "none" if quantized.zeros is None else "point" if quantized.zeros.dtype == torch.uint8 else "minimum"
    second = statistics.second + torch.eye(k, device=weight.device) * (
        damping * float(statistics.second.diagonal().mean()) + 1e-12
    )
    w, dtype = weight.detach().float(), quantized.scales.dtype
    codes, scale = quantized.codes.float(), quantized.scales.float()
    zero = torch.full_like(scale, 1 << (bits - 1)) if quantized.zeros is None else quantized.zeros.float()
    target = w @ second

    def spread(x: Tensor) -> Tensor:
        return x.repeat_interleave(group, 1)[:, :k]

    def cost(s: Tensor) -> Tensor:
        change = codes * spread(s) + spread(base_of(s, zero, zeros)) - w
        return ((change @ second) * change).sum(1)

    for _ in range(sweeps):
        fitted = _fitted_scales(codes, zero, scale, target, second, group, zeros).to(dtype).float()
        usable = torch.isfinite(fitted).all(1) & (fitted != 0).all(1)
        fitted = torch.where(usable[:, None], fitted, scale)
        scale = torch.where((cost(fitted) < cost(scale))[:, None], fitted, scale)
        step, base = spread(scale).T.contiguous(), spread(base_of(scale, zero, zeros)).T.contiguous()
        now = codes.T.contiguous()
        residual = second @ (now * step + base - w.T)  # half the gradient, [k, n]
        for begin in range(0, k, _BLOCK):
            end = min(begin + _BLOCK, k)
            own, moved = residual[begin:end].clone(), residual.new_empty(end - begin, n)
            for j in range(begin, end):
                i = j - begin
                value = now[j] * step[j] + base[j]
                best = codes_of(value - own[i] / second[j, j], step[j], base[j], bits)
                moved[i] = (best - now[j]) * step[j]
                now[j] = best
                own[i + 1 :].addr_(second[j + 1 : end, j], moved[i])
            residual.addmm_(second[:, begin:end], moved)
        codes = now.T.contiguous()
    return canonical(codes, scale, zero, bits, quantized.group_size, zeros, dtype)


def _fitted_scales(
    codes: Tensor, zero: Tensor, scale: Tensor, target: Tensor, second: Tensor, group: int, zeros: str
) -> Tensor:
    """Scales [n, groups] of the least squared output error for fixed codes (and minima)."""
    n, k = codes.shape
    if zeros == "minimum":
        levels = codes
        target = target - zero.repeat_interleave(group, 1)[:, :k] @ second
    else:
        levels = codes - zero.repeat_interleave(group, 1)[:, :k]
    right = as_groups(levels * target, group).sum(-1)
    fitted = torch.empty_like(scale)
    groups = scale.shape[1]
    rows = max(1, (1 << 24) // max(k, groups * groups))
    for begin in range(0, n, rows):
        part = levels[begin : begin + rows]
        left = part.new_empty(len(part), groups, groups)
        for g in range(groups):  # the blocks on and right of the diagonal; those below mirror them
            own, rest = slice(g * group, (g + 1) * group), slice(g * group, None)
            left[:, g, g:] = as_groups((part[:, own] @ second[own, rest]) * part[:, rest], group).sum(-1)
            left[:, g:, g] = left[:, g, g:]
        left.diagonal(dim1=1, dim2=2).add_(1e-6 * left.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + 1e-20)
        fitted[begin : begin + rows] = torch.linalg.solve_ex(left, right[begin : begin + rows, :, None])[0][..., 0]
    return fitted
