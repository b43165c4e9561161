"""What one decoder layer computes, as data: the input of the layer program and of its oracle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .linear import PackedLinear

NORMS = ("rms", "layer")
ROPE_STYLES = ("half", "interleaved")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
IGNORED = ("tokenizer",)  # generate() hands it on to every forward, and no layer computes with it


@dataclass(frozen=True, eq=False)
class Norm:
    """``y = (x - mean) / sqrt(var + eps) * gain + bias``, or for kind "rms" ``y = x / sqrt(mean(x^2) + eps) * gain``.

    gain, bias: float32 [n] over the last dimension; an offset that a model adds to its weight is in the gain.
    """

    gain: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class QkvLayout:
    """Output columns of the fused query-key-value linear, head_dim columns each.

    Query head i begins at ``(i // q_per_group) * group_stride + (i % q_per_group) * head_dim``, key head j at
    ``k_start + j * kv_stride``, value head j at ``v_start + j * kv_stride``.
    """

    q_per_group: int
    group_stride: int
    k_start: int
    v_start: int
    kv_stride: int

    @staticmethod
    def concat(heads: int, kv_heads: int, head_dim: int) -> QkvLayout:
        """All queries, then all keys, then all values."""
        return QkvLayout(heads, 0, heads * head_dim, (heads + kv_heads) * head_dim, head_dim)

    @staticmethod
    def grouped(heads: int, kv_heads: int, head_dim: int) -> QkvLayout:
        """Per head of keys: its queries, then the key, then the value."""
        per_group = heads // kv_heads
        stride = (per_group + 2) * head_dim
        return QkvLayout(per_group, stride, per_group * head_dim, (per_group + 1) * head_dim, stride)


@dataclass(frozen=True, eq=False)
class LayerSpec:
    """One decoder layer. x [b, s, hidden] -> y [b, s, hidden]; weights, biases, compute and the order of inputs are the
    PackedLinears'.

    ::

        h = norm(x, input_norm)                                     None: h = x
        q, k, v = h Wqkv; q, k = rms(q, q_norm), rms(k, k_norm)     None: as they are
        q, k = rope(q, k) over the first rotary_dim of head_dim     0: none
        a = norm(attention(q, k, v) Wo, post_attention_norm)        None: as it is
        sequential: r = x + residual_scale * a
                    y = r + residual_scale * norm(mlp(norm(r, mlp_norm)), post_mlp_norm)
        parallel:   y = x + a + mlp(norm(x, mlp_norm))              mlp_norm None: mlp(h)
        mlp(m) = Wdown(act(Wgate m) * (Wup m)), or Wdown(act(Wup m))

    attention: softmax over ``softcap * tanh(scale * q k / softcap)`` (softcap 0: ``scale * q k``), of the last window
    keys (0: all); sinks: float32 [heads], one more score per head that takes part in the softmax and has no value.
    norm: kind of input_norm, post_attention_norm, mlp_norm, post_mlp_norm; q_norm and k_norm are RMS, with a gain of
    [head_dim] per head or of [heads * head_dim], [kv_heads * head_dim] over the full width. eps: of all norms.
    qkv: (query, key, value), or one linear with ``qkv_layout``. up: (gate, up), one linear of [gate | up] rows, or
    (up,) without gate; ``gated`` tells the last two apart. rope_style "half" pairs element i with i + rotary_dim / 2,
    "interleaved" 2i with 2i + 1; cos and sin hold a value per element, so each twice.

    ranks: a :class:`torch_cpullm.collective.Ranks` of a layer that is cut among ranks. All of the above is this rank's
    share then, and what Wo and Wdown give is summed over the ranks (of a parallel layer, the two together).
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    norm: str
    eps: float
    qkv: tuple[PackedLinear, ...]
    o: PackedLinear
    up: tuple[PackedLinear, ...]
    down: PackedLinear
    scale: float
    act: str
    gated: bool
    qkv_layout: QkvLayout | None = None
    input_norm: Norm | None = None
    post_attention_norm: Norm | None = None
    mlp_norm: Norm | None = None
    post_mlp_norm: Norm | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    rotary_dim: int = 0
    rope_style: str = "half"
    softcap: float = 0.0
    window: int = 0
    sinks: Tensor | None = None
    parallel: bool = False
    residual_scale: float = 1.0
    ranks: Any = None

    def linears(self) -> Iterator[PackedLinear]:
        """All linears of the layer, in the order of use."""
        yield from (*self.qkv, self.o, *self.up, self.down)

    def __post_init__(self) -> None:
        """Raise ValueError where sizes do not fit each other."""
        if self.norm not in NORMS or self.rope_style not in ROPE_STYLES or self.act not in ACTIVATIONS:
            raise ValueError(f"unknown norm, rope style or activation: {self.norm}, {self.rope_style}, {self.act}")
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim <= self.head_dim:
            raise ValueError(f"rotary_dim must be even and at most {self.head_dim}, got {self.rotary_dim}")
        if len(self.qkv) != (3 if self.qkv_layout is None else 1):
            raise ValueError(f"qkv must be three linears, or one with a layout, got {len(self.qkv)}")
        if self.parallel and (self.residual_scale != 1.0 or self.post_mlp_norm is not None):
            raise ValueError("a parallel layer has neither a residual scale nor a norm behind its MLP")
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        outputs = (q, kv, kv) if self.qkv_layout is None else (q + 2 * kv,)
        width = (2 if self.gated and len(self.up) == 1 else 1) * self.intermediate
        want = [
            *((self.hidden, n) for n in outputs),
            (q, self.hidden),
            *((self.hidden, width) for _ in self.up),
            (self.intermediate, self.hidden),
        ]
        got = [(linear.in_features, linear.out_features) for linear in self.linears()]
        if got != want or (len(self.up) == 2 and not self.gated):
            raise ValueError(f"linears must be {want} (inputs, outputs), got {got}")
