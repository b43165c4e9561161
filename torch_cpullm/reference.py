"""Oracles: what the operators mean, in plain torch. They quantise exactly as the kernels do, so a kernel may differ
from them by rounding only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .packing import ACT_BLOCK, CHUNK, PackedStack, PackedWeight, dequantize, resolve_group, round_up, unpack

MOST_APART = 16256  # largest quantised magnitude of an input kept apart


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 activations of x [.., k] in blocks of 128 inputs: ``q = round(x / scale)``.

    A block's largest magnitude maps to 127. Where the others need at most 0.7 of that range they decide the scale, and
    the largest is kept apart, as a multiple of the same scale up to 16256. Returns q int32 [m, k'] and scale float32
    [m, ceil(k'/128)]; k' = k rounded up to 32. A block with inf or nan has scale nan and q zero; a block whose scale is
    below 2^-100 is zero.
    """
    k = x.shape[-1]
    x = x.reshape(-1, k).float()
    kp, full = round_up(k, CHUNK), round_up(k, ACT_BLOCK)
    blocks = torch.nn.functional.pad(x, (0, full - k)).view(x.shape[0], full // ACT_BLOCK, ACT_BLOCK)
    finite = torch.isfinite(blocks).all(-1)
    blocks = torch.where(finite[..., None], blocks, torch.zeros(()))
    most, second = blocks.abs().topk(2, -1).values.unbind(-1)
    apart = second <= most * torch.tensor(0.7)
    rest = torch.maximum(second * torch.tensor(1.0 / 127.0), most * torch.tensor(1.0 / MOST_APART))
    scale = torch.where(apart, rest, most * torch.tensor(1.0 / 127.0))
    usable = finite & (scale >= 2.0**-100)
    inverse = torch.where(usable, torch.ones(()) / torch.where(usable, scale, torch.ones(())), torch.zeros(()))
    q = torch.round(blocks * inverse[..., None]).to(torch.int32)
    scale = torch.where(usable, scale, torch.where(finite, torch.zeros(()), torch.full((), torch.nan)))
    return q.view(x.shape[0], full)[:, :kp].contiguous(), scale


def dequantize_activations(x: Tensor) -> Tensor:
    """x [.., k] as int8 compute sees it, float64 [m, k]."""
    q, scale = quantize_activations(x)
    return (q.double() * scale.double().repeat_interleave(ACT_BLOCK, 1)[:, : q.shape[1]])[:, : x.shape[-1]]


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


def activate(name: str, x: Tensor) -> Tensor:
    """One of the activations of :func:`torch_cpullm.ops.activation`."""
    if name == "silu":
        return torch.nn.functional.silu(x)
    if name == "relu":
        return torch.nn.functional.relu(x)
    return torch.nn.functional.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


def experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: PackedStack,
    down: PackedStack,
    act: str = "silu",
    compute: str = "int8",
) -> Tensor:
    """A mixture of experts, pair of token and slot by pair, from :func:`linear`; float64 [tokens, hidden].

    Arguments as :func:`torch_cpullm.ops.experts`. Between the products values are rounded to float32, as the operator
    keeps them.
    """
    y = torch.zeros(x.shape, dtype=torch.float64)
    for t, s in torch.cartesian_prod(*map(torch.arange, index.shape)).tolist() if index.numel() else ():
        e = int(index[t, s])
        gate, up = linear(x[t : t + 1].float(), gate_up[e], compute=compute).chunk(2, -1)
        inner = (activate(act, gate.double()) * up.double()).float()
        y[t] += weights[t, s].double() * linear(inner, down[e], compute=compute)[0].double()
    return y


def error_bound(x: Tensor, weight: PackedWeight, compute: str = "int8", bias: Tensor | None = None) -> Tensor:
    """Largest rounding error allowed of a kernel's float32 result, [m, n] float64: ``2 c eps (|x| |W|')``.

    |W|' adds the magnitudes of the two terms of the float-minimum form. c counts the roundings of one output's chain:
    int8: two per group and activation block, plus two; fp32: k + 2; bf16: as many, and 2^-8 for the two factors.
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
    return (2 * roundings * 2.0**-24 + (1.01 * 2.0**-8 if compute == "bf16" else 0.0)) * bound
