"""The oracle of the layer program: one decoder layer from its spec, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from . import reference
from .layer_spec import LayerSpec, Norm
from .linear import PackedLinear


class CacheLayer(Protocol):
    """One layer's keys and values of the tokens before."""

    def reserve(
        self, batch: int, tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int]:
        """Room for ``tokens`` more: (k, v, k_scale, v_scale, length).

        k, v: [b, kv_heads, capacity, head_dim]; scales: float32 [b, kv_heads, capacity] of int8 ones, else None.
        length: tokens that are there already.
        """
        ...

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` more as there."""
        ...


def run_layer(
    spec: LayerSpec,
    x: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    mask: Tensor | None,
    cache: CacheLayer | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The layer's output [b, s, hidden] of x's dtype, computed in ``dtype`` (float32 or float64).

    x: [b, s, hidden]. cos, sin: [1 | b, s, rotary_dim], None where rotary_dim is 0. mask: None for causal attention
    aligned at the last key, of the spec's window; or [1 | b, 1 | h, s, length + s], bool (true: attend) or float
    (added), and then it alone decides. A query that may attend to nothing gets zero. cache: gets the s new tokens.

    Raises ValueError for a mask of another shape.
    """
    return run_group([spec], [(x, cos, sin, mask, cache)], 0, dtype)


def run_group(
    specs: Sequence[LayerSpec], calls: Sequence[tuple], bypass: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The output of layers that read one x; see :func:`torch_cpullm.layer_group.combine`.

    calls: (x, cos, sin, mask, cache) of each layer, as in :func:`run_layer`; all x are equal.
    """
    x = calls[0][0]
    wide = x.to(dtype)
    inputs = [_norm(spec, wide, spec.input_norm) for spec in specs]
    attended = []
    for spec, h, (_, cos, sin, mask, cache) in zip(specs, inputs, calls, strict=True):
        a = _attention_block(spec, h, cos, sin, mask, cache, x.dtype)
        attended.append(spec.residual_scale * _norm(spec, a, spec.post_attention_norm))
    y = wide
    if specs[0].parallel:
        for spec, h, a in zip(specs, inputs, attended, strict=True):
            y = y + (a + _mlp(spec, h if spec.mlp_norm is None else _norm(spec, wide, spec.mlp_norm)))
        return y.to(x.dtype)
    for a in attended:
        y = y + a
    fed = []
    for i, spec in enumerate(specs):
        r = y
        if bypass >= 0:
            r = wide + attended[i]
            for a in attended[max(0, i - bypass) : i]:
                r = r + a
        fed.append(spec.residual_scale * _norm(spec, _mlp(spec, _norm(spec, r, spec.mlp_norm)), spec.post_mlp_norm))
    for m in fed:
        y = y + m
    return y.to(x.dtype)


def _linear(linear: PackedLinear, x: Tensor) -> Tensor:
    return reference.linear(x, linear.packed, linear.bias, linear.order, linear.compute)


def _norm(spec: LayerSpec, x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else apply_norm(spec.norm, spec.eps, norm, x)


def apply_norm(kind: str, eps: float, norm: Norm, x: Tensor) -> Tensor:
    """Normalise x [.., n] over its last dimension; see :class:`torch_cpullm.layer_spec.Norm`."""
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * norm.gain
    return y if norm.bias is None else y + norm.bias


def _mlp(spec: LayerSpec, x: Tensor) -> Tensor:
    up = [_linear(linear, x) for linear in spec.up]
    if len(up) == 1 and spec.gated:
        up = list(up[0].chunk(2, -1))
    inner = reference.activate(spec.act, up[0])
    return _linear(spec.down, inner * up[1] if spec.gated else inner)


def _qkv(spec: LayerSpec, h: Tensor) -> list[Tensor]:
    """q [b, heads, s, d], k and v [b, kv_heads, s, d]."""
    d = spec.head_dim
    if spec.qkv_layout is None:
        out = [_linear(linear, h).unflatten(-1, (-1, d)) for linear in spec.qkv]
    else:
        fused, layout = _linear(spec.qkv[0], h), spec.qkv_layout
        starts = [
            [i // layout.q_per_group * layout.group_stride + i % layout.q_per_group * d for i in range(spec.heads)],
            [layout.k_start + j * layout.kv_stride for j in range(spec.kv_heads)],
            [layout.v_start + j * layout.kv_stride for j in range(spec.kv_heads)],
        ]
        out = [torch.stack([fused[..., at : at + d] for at in of_kind], -2) for of_kind in starts]
    for i, norm in enumerate((spec.q_norm, spec.k_norm)):
        if norm is not None:
            per_head = norm.gain.shape[-1] == d
            y = apply_norm("rms", spec.eps, norm, out[i] if per_head else out[i].flatten(-2))
            out[i] = y.view_as(out[i])
    return [t.transpose(1, 2) for t in out]


def _rope(spec: LayerSpec, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first rotary_dim elements of every head; x [b, heads, s, d]."""
    cos, sin = (t.to(x.dtype).unsqueeze(1) for t in (cos, sin))
    turned, rest = x[..., : spec.rotary_dim], x[..., spec.rotary_dim :]
    if spec.rope_style == "half":
        first, second = turned.chunk(2, -1)
        across = torch.cat([-second, first], -1)
    else:
        across = torch.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2)
    return torch.cat([turned * cos + across * sin, rest], -1)


def _attention_block(
    spec: LayerSpec,
    h: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    mask: Tensor | None,
    cache: CacheLayer | None,
    dtype: torch.dtype,
) -> Tensor:
    """Attention of the new tokens h [b, s, hidden] over the cache and themselves, and the output linear."""
    batch, tokens = h.shape[:2]
    q, k, v = _qkv(spec, h)
    if spec.rotary_dim:
        if cos is None or sin is None:
            raise ValueError("the layer rotates queries and keys: cos and sin must be given")
        q, k = _rope(spec, q, cos, sin), _rope(spec, k, cos, sin)
    length = 0
    if cache is not None:
        k_all, v_all, k_scale, v_scale, length = cache.reserve(batch, tokens, spec.kv_heads, spec.head_dim, dtype)
        k, v = (
            _append(*pair, length).to(h.dtype) for pair in ((k_all, k_scale, k), (v_all, v_scale, v))
        )  # what the cache made of them
        cache.advance(tokens)
    repeat = spec.heads // spec.kv_heads
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = q @ k.transpose(2, 3) * spec.scale
    if spec.softcap:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    scores = _masked(spec, scores, mask, length)
    if spec.sinks is not None:
        sinks = spec.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    out = weights.nan_to_num(0.0) @ v  # a row of -inf alone: nothing to attend to
    return _linear(spec.o, out.transpose(1, 2).flatten(2))


def _masked(spec: LayerSpec, scores: Tensor, mask: Tensor | None, length: int) -> Tensor:
    """Scores [b, h, s, length + s] with -inf where a query must not look."""
    tokens, total = scores.shape[2:]
    if mask is None:
        ahead = torch.arange(total) - torch.arange(length, length + tokens)[:, None]
        mask = ahead <= 0
        if spec.window:
            mask &= ahead > -spec.window
    elif mask.dim() != 4 or mask.shape[2:] != scores.shape[2:]:
        raise ValueError(f"mask must be [b, h, {tokens}, {total}], got {list(mask.shape)}")
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)


def _append(store: Tensor, scale: Tensor | None, new: Tensor, length: int) -> Tensor:
    """Write new [b, g, s, d] behind the first ``length`` tokens of the store, and read all tokens [b, g, total, d]."""
    end = length + new.shape[2]
    if scale is None:
        store[:, :, length:end] = new
        return store[:, :, :end]
    peak = new.abs().amax(-1)
    scale[:, :, length:end] = peak / 127
    step = torch.where(peak > 0, peak / 127, torch.ones_like(peak))
    store[:, :, length:end] = torch.round(new / step[..., None]).to(torch.int8)
    return store[:, :, :end].to(new.dtype) * scale[:, :, :end, None]
