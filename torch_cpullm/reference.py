"""Oracles: what the operators mean, in plain torch. They quantise exactly as the kernels do, so a kernel may differ
from them by rounding only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .packing import ACT_BLOCK, CHUNK, PackedWeight, dequantize, resolve_group, round_up, unpack


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """int8 activations of x [.., k] in blocks of 32 inputs: ``q = clamp(round(x / scale) + zero, -127, 127)``.

    A block's range, widened to include zero, maps to -127..127; zero is exact. Returns q int8 [m, k'], scale float32
    and zero int16 [m, k'/32], sums of ``q - zero`` int16 [m, k'/32]; k' = k rounded up to 32. A block with inf or
    nan has scale nan and q zero; a block whose scale is below 2^-100 is zero.
    """
    k = x.shape[-1]
    x = x.reshape(-1, k).float()
    kp, full = round_up(k, CHUNK), round_up(k, ACT_BLOCK)
    blocks = torch.nn.functional.pad(x, (0, full - k)).view(x.shape[0], full // ACT_BLOCK, ACT_BLOCK)
    finite = torch.isfinite(blocks).all(-1)
    blocks = torch.where(finite[..., None], blocks, torch.zeros(()))
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    scale = high * torch.tensor(1.0 / 254.0) - low * torch.tensor(1.0 / 254.0)
    usable = finite & (scale >= 2.0**-100)
    inverse = torch.where(usable, torch.ones(()) / torch.where(usable, scale, torch.ones(())), torch.zeros(()))
    zero = torch.where(usable, torch.round(-127.0 - low * inverse), torch.zeros(()))
    q = (torch.round(blocks * inverse[..., None]) + zero[..., None]).clamp_(-127, 127)
    sums = (q - zero[..., None]).view(x.shape[0], full // CHUNK, CHUNK).sum(-1).to(torch.int16)[:, : kp // CHUNK]
    scale = torch.where(usable, scale, torch.where(finite, torch.zeros(()), torch.full((), torch.nan)))
    q = q.view(x.shape[0], full)[:, :kp]
    return q.to(torch.int8).contiguous(), scale, zero.to(torch.int16), sums.contiguous()


def dequantize_activations(x: Tensor) -> Tensor:
    """x [.., k] as int8 compute sees it, float64 [m, k]."""
    q, scale, zero, _ = quantize_activations(x)
    spread = (t.double().repeat_interleave(ACT_BLOCK, 1)[:, : q.shape[1]] for t in (scale, zero))
    scale64, zero64 = spread
    return ((q.double() - zero64) * scale64)[:, : x.shape[-1]]


def linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None = None, perm: Tensor | None = None, compute: str = "int8"
) -> Tensor:
    """``y = x W^T + bias`` in float64 over the same quantised values, rounded once to x's dtype at the end.

    Shapes as :func:`torch_cpullm.ops.linear`.
    """
    rows = x.reshape(-1, x.shape[-1])
    if perm is not None:
        rows = rows[:, perm.long()]
    w = unpack(weight)
    values = dequantize(w).double()
    if compute == "int8":
        rows = dequantize_activations(rows)
        values = _exact(w)
    y = rows.double() @ values.T
    if bias is not None:
        y = y + bias.double()
    return y.to(x.dtype).view(*x.shape[:-1], weight.n)


def _exact(w) -> Tensor:
    """W in float64 without any rounding."""
    group = resolve_group(w.group_size, w.k)
    scales = w.scales.double().repeat_interleave(group, 1)[:, : w.k]
    if w.zeros is None:
        return (w.codes.double() - (8 if w.bits == 4 else 128)) * scales
    zeros = w.zeros.double().repeat_interleave(group, 1)[:, : w.k]
    return (w.codes.double() - zeros) * scales if w.zeros.dtype == torch.uint8 else w.codes.double() * scales + zeros


def error_bound(x: Tensor, weight: PackedWeight, compute: str = "int8", bias: Tensor | None = None) -> Tensor:
    """Largest rounding error allowed of a kernel's float32 result, [m, n] float64: ``2 c eps (|x| |W|')``.

    |W|' adds the magnitudes of the two terms of the float-minimum form. c counts the roundings of one output's chain:
    int8: two per group and activation block, plus two; fp32: k + 2.
    """
    w = unpack(weight)
    group = resolve_group(w.group_size, w.k)
    scales = w.scales.double().repeat_interleave(group, 1)[:, : w.k].abs()
    if w.zeros is None:
        size = (w.codes.double() - (8 if w.bits == 4 else 128)).abs() * scales
    elif w.zeros.dtype == torch.uint8:
        size = (w.codes.double() - w.zeros.double().repeat_interleave(group, 1)[:, : w.k]).abs() * scales
    else:
        size = w.codes.double() * scales + w.zeros.double().abs().repeat_interleave(group, 1)[:, : w.k]
    rows = x.reshape(-1, w.k)
    if compute == "int8":
        rows = dequantize_activations(rows)
        roundings = 2 * (w.groups + 2 * -(-w.k // ACT_BLOCK)) + 2
    else:
        roundings = w.k + 2
    bound = rows.double().abs() @ size.T
    if bias is not None:
        bound = bound + bias.double().abs()
    return 2 * roundings * 2.0**-24 * bound
