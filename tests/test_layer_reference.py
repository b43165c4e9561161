"""The oracle of the layer program: caches, masks, windows, sinks and types, apart from any model."""

import pytest
import torch

from torch_cpullm import reference
from torch_cpullm.layer_execute import prepare
from torch_cpullm.layer_probe import ProbeCache
from torch_cpullm.layer_reference import run_layer
from torch_cpullm.layer_spec import LayerSpec, Norm, QkvLayout
from torch_cpullm.linear import PackedLinear
from torch_cpullm.packing import pack
from torch_cpullm.quant import quantize_rtn

HIDDEN, HEADS, GROUPS, DIM, INNER = 48, 4, 2, 16, 40


def linear(n, k, seed, compute="fp32"):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) * k**-0.5
    return PackedLinear(
        pack(quantize_rtn(weight)), torch.randn(n, generator=generator), dtype=torch.float32, compute=compute
    )


def spec(compute="fp32", **changes):
    sizes = [(HEADS * DIM, HIDDEN), (GROUPS * DIM, HIDDEN), (GROUPS * DIM, HIDDEN)]
    values = {
        "hidden": HIDDEN,
        "heads": HEADS,
        "kv_heads": GROUPS,
        "head_dim": DIM,
        "intermediate": INNER,
        "norm": "rms",
        "eps": 1e-6,
        "qkv": tuple(linear(*size, seed, compute) for seed, size in enumerate(sizes)),
        "o": linear(HIDDEN, HEADS * DIM, 3, compute),
        "up": (linear(INNER, HIDDEN, 4, compute), linear(INNER, HIDDEN, 5, compute)),
        "down": linear(HIDDEN, INNER, 6, compute),
        "scale": DIM**-0.5,
        "act": "silu",
        "gated": True,
        "input_norm": Norm(torch.linspace(0.5, 2, HIDDEN)),
        "mlp_norm": Norm(torch.linspace(2, 0.5, HIDDEN)),
        "rotary_dim": 8,
    }
    return LayerSpec(**{**values, **changes})


def inputs(batch=2, tokens=9, dtype=torch.float32):
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(batch, tokens, HIDDEN, generator=generator).to(dtype)
    angle = torch.randn(1, tokens, 4, generator=generator).repeat(1, 1, 2)
    return x, angle.cos(), angle.sin()


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("window", [0, 4])
def test_a_cache_changes_nothing(style, window):
    """Prefill at once, or in pieces of 4, 1, 1 and 3 behind a cache."""
    layer = spec(rope_style=style, window=window)
    x, cos, sin = inputs()
    whole = run_layer(layer, x, cos, sin, None, None)
    cache, parts, start = ProbeCache(), [], 0
    for tokens in (4, 1, 1, 3):
        at = slice(start, start + tokens)
        parts.append(run_layer(layer, x[:, at], cos[:, at], sin[:, at], None, cache))
        start += tokens
    assert cache.length == 9
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_decide_alone(window, kind):
    x, cos, sin = inputs()
    ahead = torch.arange(9) - torch.arange(9)[:, None]
    allowed = (ahead <= 0) & (ahead > -4)
    mask = allowed if kind == "bool" else torch.zeros(9, 9).masked_fill(~allowed, torch.finfo(torch.float32).min)
    want = run_layer(spec(window=4), x, cos, sin, None, None)
    got = run_layer(spec(window=window), x, cos, sin, mask[None, None], None)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"mask must be \[b, h, 9, 9\], got \[2, 1, 9, 8\]"):
        run_layer(spec(), x, cos, sin, torch.ones(2, 1, 9, 8, dtype=torch.bool), None)


def test_a_query_without_keys_gets_zero():
    x, cos, sin = inputs()
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    mask[1, :, :3] = False
    layer = spec()
    y = run_layer(layer, x, cos, sin, mask, None)
    assert bool(torch.isfinite(y).all())
    layer = spec(o=linear(HIDDEN, HEADS * DIM, 3))
    alone = run_layer(layer, x[1:, :1], cos[:, :1], sin[:, :1], torch.zeros(1, 1, 1, 1, dtype=torch.bool), None)
    torch.testing.assert_close(y[1:, :1], alone)


def test_an_int8_cache_is_read_as_it_was_rounded():
    """One scale per token and head: off by at most half a step, and zeros stay zeros."""

    class Int8Cache:
        def __init__(self):
            self.length = 0
            self.k, self.v = (torch.zeros(2, GROUPS, 12, DIM, dtype=torch.int8) for _ in range(2))
            self.scales = [torch.zeros(2, GROUPS, 12) for _ in range(2)]

        def reserve(self, batch, tokens, kv_heads, head_dim, dtype):
            return self.k, self.v, *self.scales, self.length

        def advance(self, tokens):
            self.length += tokens

    x, cos, sin = inputs()
    cache, plain = Int8Cache(), ProbeCache()
    got = run_layer(spec(), x, cos, sin, None, cache)
    want = run_layer(spec(), x, cos, sin, None, plain)
    assert cache.length == 9
    values = cache.v.float() * cache.scales[1][..., None]
    step = plain.v[:, :, :9].abs().amax(-1, keepdim=True) / 127
    assert bool(((values[:, :, :9] - plain.v[:, :, :9]).abs() <= 0.51 * step).all())
    assert float((got - want).abs().max()) < 0.03 * float(want.abs().max())


def test_sinks_take_weight_away():
    """A sink far below all scores is none; one far above takes everything."""
    x, cos, sin = inputs()
    want = run_layer(spec(), x, cos, sin, None, None)
    none = run_layer(spec(sinks=torch.full((HEADS,), -1e4)), x, cos, sin, None, None)
    torch.testing.assert_close(none, want)
    nothing = torch.zeros(1, 1, 9, 9, dtype=torch.bool)
    everything = run_layer(spec(sinks=torch.full((HEADS,), 1e4)), x, cos, sin, None, None)
    torch.testing.assert_close(everything, run_layer(spec(), x, cos, sin, nothing, None))


def test_softcap_bounds_the_scores():
    x, cos, sin = inputs()
    flat = run_layer(spec(softcap=1e-6), x, cos, sin, None, None)
    mean = run_layer(spec(scale=0.0), x, cos, sin, None, None)
    torch.testing.assert_close(flat, mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        run_layer(spec(softcap=1e6), x, cos, sin, None, None, torch.float64),
        run_layer(spec(), x, cos, sin, None, None, torch.float64),
    )


def test_fused_linears_by_layout():
    """The same queries, keys and values from one linear, its rows in either order."""
    x, cos, sin = inputs()
    apart = spec()
    want = run_layer(apart, x, cos, sin, None, None)
    rows = [reference.unpack(each.packed) for each in apart.qkv]
    heads = [[i * DIM + j for j in range(DIM)] for i in range(HEADS)]
    total = torch.cat([each.codes for each in rows])
    orders = {
        QkvLayout.concat(HEADS, GROUPS, DIM): list(range(total.shape[0])),
        QkvLayout.grouped(HEADS, GROUPS, DIM): [
            row
            for g in range(GROUPS)
            for head in (
                *heads[2 * g : 2 * g + 2],
                *([(HEADS + part * GROUPS + g) * DIM + j for j in range(DIM)] for part in range(2)),
            )
            for row in head
        ],
    }
    scales, zeros = (torch.cat([getattr(each, name) for each in rows]) for name in ("scales", "zeros"))
    bias = torch.cat([each.bias for each in apart.qkv])
    for layout, order in orders.items():
        weight = pack(type(rows[0])(total[order], scales[order], zeros[order], 4, rows[0].group_size))
        fused = PackedLinear(weight, bias[order], dtype=torch.float32, compute="fp32")
        got = run_layer(spec(qkv=(fused,), qkv_layout=layout), x, cos, sin, None, None)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types(dtype):
    """The result has x's type; inside it is float32 or float64."""
    x, cos, sin = inputs(dtype=dtype)
    y = prepare(spec())(x, cos, sin, None, None)
    assert y.dtype == dtype
    exact = run_layer(spec(), x.double(), cos, sin, None, None, torch.float64)
    assert exact.dtype == torch.float64
    bound = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    assert float((y.double() - exact).abs().max()) <= bound * float(exact.abs().max())


def test_int8_compute_is_that_of_the_linears():
    x, cos, sin = inputs()
    exact, rounded = (run_layer(spec(compute), x, cos, sin, None, None) for compute in ("fp32", "int8"))
    assert not torch.equal(exact, rounded)
    assert float((exact - rounded).abs().max()) < 0.05 * float(exact.abs().max())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm": "batch"}, "unknown norm"),
        ({"kv_heads": 3}, "multiple of kv_heads"),
        ({"rotary_dim": 7}, "must be even"),
        ({"rotary_dim": 18}, "at most 16"),
        ({"intermediate": 41}, "linears must be"),
        ({"gated": False}, "linears must be"),
        ({"qkv_layout": QkvLayout.concat(4, 2, 16)}, "one with a layout"),
        ({"parallel": True, "residual_scale": 0.5}, "parallel"),
    ],
)
def test_sizes_that_do_not_fit(changes, words):
    with pytest.raises(ValueError, match=words):
        spec(**changes)


def test_a_rotary_layer_needs_cosines():
    x, _, _ = inputs()
    with pytest.raises(ValueError, match="cos and sin must be given"):
        run_layer(spec(), x, None, None, None, None)
