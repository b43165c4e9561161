"""Layer specs of every structure, inputs and caches, for the tests of the layer operators."""

import torch
from cases import generator

from torch_cpullm.kv_cache import CpuLlmCacheLayer
from torch_cpullm.layer_spec import LayerSpec, Norm, QkvLayout
from torch_cpullm.linear import PackedLinear
from torch_cpullm.packing import QuantizedWeight, pack, resolve_group
from torch_cpullm.quant import quantize_rtn


def linear(n, k, gen, *, bias=False, compute="fp32", group=32, form="zero", bits=4, ordered=False):
    """A packed linear of random weights; form: sym, zero or minimum; ordered: inputs in an order that k decides."""
    weight = torch.randn(n, k, generator=gen) / k**0.5
    quantized = quantize_rtn(weight, bits, group, form == "sym" or bits == 8)
    if form == "minimum" and bits == 4:
        groups = -(-k // resolve_group(group, k))
        scale = torch.full((n, groups), k**-0.5 / 4, dtype=torch.float16)
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=gen)
        quantized = QuantizedWeight(codes, scale, scale * -7.3, 4, group)
    vector = torch.randn(n, generator=gen) * 0.1 if bias else None
    order = torch.randperm(k, generator=generator(k)).int() if ordered else None
    return PackedLinear(pack(quantized), vector, dtype=torch.float32, compute=compute, order=order)


def spec(
    hidden=96,
    heads=4,
    kv_heads=2,
    head_dim=32,
    intermediate=160,
    qkv="apart",
    mlp="gated",
    norm="rms",
    norms=("input", "mlp"),
    qk_norm=None,
    rotary_dim=None,
    sinks=False,
    seed=0,
    act="silu",
    linears=None,
    **others,
):
    """qkv: apart, concat or grouped. mlp: gated, fused or plain. qk_norm: None, head or whole.

    linears: options of :func:`linear`; others: fields of LayerSpec.
    """
    gen = generator(seed)
    options = linears or {}

    def of(n, k):
        return linear(n, k, gen, **options)

    def gain(n, layer=norm == "layer"):
        return Norm(torch.rand(n, generator=gen) + 0.5, torch.randn(n, generator=gen) * 0.1 if layer else None)

    q, kv = heads * head_dim, kv_heads * head_dim
    layout = None if qkv == "apart" else getattr(QkvLayout, qkv)(heads, kv_heads, head_dim)
    names = {"input": "input_norm", "attention": "post_attention_norm", "mlp": "mlp_norm", "end": "post_mlp_norm"}
    ups = {"gated": (1, 1), "fused": (2,), "plain": (1,)}[mlp]
    return LayerSpec(
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=intermediate,
        norm=norm,
        eps=1e-5,
        qkv=tuple(of(n, hidden) for n in ((q, kv, kv) if layout is None else (q + 2 * kv,))),
        o=of(hidden, q),
        up=tuple(of(count * intermediate, hidden) for count in ups),
        down=of(hidden, intermediate),
        scale=head_dim**-0.5,
        act=act,
        gated=mlp != "plain",
        qkv_layout=layout,
        q_norm=gain(head_dim if qk_norm == "head" else q, False) if qk_norm else None,
        k_norm=gain(head_dim if qk_norm == "head" else kv, False) if qk_norm else None,
        rotary_dim=head_dim if rotary_dim is None else rotary_dim,
        sinks=torch.randn(heads, generator=gen) if sinks else None,
        **{names[name]: gain(hidden) for name in norms},
        **others,
    )


LAYER = {"norm": "layer"}
PARALLEL = {"parallel": True, "mlp": "plain", **LAYER}
INTERLEAVED = {"rope_style": "interleaved"}
ODD = {"hidden": 75, "head_dim": 7, "intermediate": 37}
STRUCTURES = {
    "llama": {},
    "biases": {"linears": {"bias": True}},
    "qwen3": {"qk_norm": "head"},
    "q and k of different sizes": {"qk_norm": "whole", "norms": ("attention", "end")},  # OLMo 2
    "one kv head, both readings of its norm": {"qk_norm": "whole", "kv_heads": 1, "qkv": "grouped"},
    "gemma2": {"norms": ("input", "attention", "mlp", "end"), "softcap": 5.0, "window": 5, "act": "gelu_tanh"},
    "phi3": {"qkv": "concat", "mlp": "fused", "rotary_dim": 24},
    "halves not at panels": {"qkv": "concat", "mlp": "fused", "intermediate": 168},
    "neox": {
        "qkv": "grouped",
        "kv_heads": 4,
        "parallel": True,
        "rotary_dim": 16,
        "mlp": "plain",
        "act": "gelu",
        **LAYER,
    },
    "falcon": {"qkv": "grouped", **PARALLEL, "act": "gelu", "norms": ("input",)},
    "gptj": {"kv_heads": 4, "rotary_dim": 16, **PARALLEL, **INTERLEAVED, "act": "gelu_tanh", "norms": ("input",)},
    "opt": {"rotary_dim": 0, "mlp": "plain", "act": "relu", "linears": {"bias": True}, **LAYER},
    "granite": {"residual_scale": 0.3},
    "sinks": {"sinks": True, "window": 4},
    "no norms": {"norms": ()},
    "odd sizes": {**ODD, "heads": 3, "kv_heads": 1, "rotary_dim": 6},
    "odd sizes, interleaved": {**ODD, "heads": 5, "kv_heads": 5, "rotary_dim": 2, "qkv": "grouped", **INTERLEAVED},
    "wide heads": {"heads": 2, "kv_heads": 1, "head_dim": 136, "qkv": "concat"},
    "groups of 64": {"linears": {"group": 64, "form": "sym"}},
    "groups of 128, longer than some rows": {"linears": {"group": 128, "form": "minimum"}, "intermediate": 288},
    "per channel": {"linears": {"group": -1, "form": "minimum", "bias": True}, "mlp": "fused"},
    "desc_act": {"linears": {"ordered": True}, "hidden": 136},
    "desc_act, one input for all": {"linears": {"ordered": True}, "qkv": "concat", **PARALLEL, "norms": ("input",)},
    "8 bits": {"linears": {"bits": 8, "group": 64}},
}


def call(layer, batch, tokens, position=0, dtype=torch.float32, seed=0, rope_dtype=torch.float32):
    """(x, cos, sin) of ``tokens`` tokens from ``position`` on."""
    gen = generator(1000 * position + tokens + seed)
    x = torch.randn(batch, tokens, layer.hidden, generator=gen).to(dtype)
    width = layer.rotary_dim
    if not width:
        return x, None, None
    angle = torch.arange(position, position + tokens)[:, None] / 100 ** (torch.arange(0, width, 2) / width)
    both = torch.cat([angle, angle], -1) if layer.rope_style == "half" else angle.repeat_interleave(2, -1)
    return x, both.cos()[None].to(rope_dtype), both.sin()[None].to(rope_dtype)


def padded_mask(layer, tokens, position, pads=(0, 3, 1)):
    """Causal bool mask [b, 1, s, t] of left-padded rows, with the layer's window; a query of padding sees itself."""
    keys = position + tokens
    ahead = torch.arange(keys) - torch.arange(position, keys)[:, None]
    causal = ahead <= 0
    if layer.window:
        causal = causal & (ahead > -layer.window)
    real = torch.arange(keys) >= torch.tensor(pads)[:, None]
    return (causal & real[:, None, :] | (ahead == 0))[:, None]


def cache_of(kind):
    """A cache layer that stores ``kind``, a dtype; None: no cache."""
    return None if kind is None else CpuLlmCacheLayer(kind)


def error(got, want):
    """Largest difference by the largest value of ``want``."""
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())
