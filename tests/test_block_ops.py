"""Norms, rope, activations and the cache's append against float64, on every level."""

import math

import pytest
import torch
from torch.nn import functional

from torch_cpullm import ops

# Below, at and beyond the vectors' 8 and 16, and beyond two of them.
WIDTHS = [1, 2, 7, 8, 16, 17, 40, 64, 100, 576]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- norms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", WIDTHS)
def test_norms(width, dtype, isa):
    x = randn(3, 5, width, dtype=dtype) * 3 + 2
    gain, bias = randn(width, seed=1), randn(width, seed=2)
    for weight in (None, gain):
        got = ops.rms_norm(x, weight, 1e-5)
        want = functional.rms_norm(x.double(), (width,), weight if weight is None else weight.double(), 1e-5)
        assert (got.dtype, got.shape) == (torch.float32, x.shape)
        assert torch.allclose(got.double(), want, rtol=2e-6, atol=1e-6)
    for weight, shift in ((None, None), (gain, None), (gain, bias)):
        got = ops.layer_norm(x, weight, shift, 1e-5)
        wide = [t if t is None else t.double() for t in (weight, shift)]
        want = functional.layer_norm(x.double(), (width,), *wide, 1e-5)
        assert torch.allclose(got.double(), want, rtol=1e-5, atol=2e-5 if width > 2 else 2e-3)


def test_layer_norm_far_from_zero(isa):
    """The variance is that of the differences: a large mean costs no more than its own rounding."""
    x = randn(4, 100) + 1000
    want = functional.layer_norm(x.double(), (100,), eps=1e-5)
    assert torch.allclose(ops.layer_norm(x, None, None, 1e-5).double(), want, atol=1e-4)


def test_norms_of_views_and_nan(isa):
    x = randn(6, 40)
    assert torch.equal(ops.rms_norm(x[::2, 3:30], None, 1e-6), ops.rms_norm(x[::2, 3:30].contiguous(), None, 1e-6))
    x[1, 3] = math.nan
    x[2, 3] = math.inf
    for got in (ops.rms_norm(x, None, 1e-6), ops.layer_norm(x, None, None, 1e-6)):
        assert got[1].isnan().all()
        assert got[2].isnan().any()
        assert got[[0, 3, 4, 5]].isfinite().all()
    assert ops.rms_norm(torch.zeros(2, 9), None, 1e-6).eq(0).all()


# ---- rope -----------------------------------------------------------------------------------------------------------


def rotated(x, cos, sin, style):
    """As transformers writes it; x [b, s, h, d] float64."""
    if style == "interleaved_once":
        cos, sin = (t.repeat_interleave(2, -1) for t in (cos, sin))
    cos, sin = (t.double()[:, :, None] for t in (cos, sin))
    width = cos.shape[-1]
    turned, kept = x[..., :width], x[..., width:]
    if style == "half":
        first, second = turned.chunk(2, -1)
        other = torch.cat((-second, first), -1)
    else:
        other = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    return torch.cat((turned * cos + other * sin, kept), -1)


@pytest.mark.parametrize("style", ["half", "interleaved", "interleaved_once"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "rotary"), [(64, 64), (80, 32), (128, 128), (16, 4), (10, 6), (96, 48), (2, 2)])
def test_rope(width, rotary, dtype, style, isa):
    x = randn(2, 3, 5, width)
    for b in (1, 2):
        # Both halves have values of their own here, so that a kernel that reads the wrong one is seen.
        cos, sin = (randn(b, 3, rotary // (1 + (style == "interleaved_once")), seed=i, dtype=dtype) for i in (1, 2))
        got = x.clone()
        ops.rope(got, cos, sin, style)
        assert torch.allclose(got.double(), rotated(x.double(), cos, sin, style), atol=1e-5)
        assert torch.equal(got[..., rotary:], x[..., rotary:])


# ---- activation -----------------------------------------------------------------------------------------------------

EXACT = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


@pytest.mark.parametrize("act", EXACT)
def test_activation(act, isa):
    x = torch.cat([torch.linspace(-30, 30, 40_001), torch.linspace(-1e-3, 1e-3, 1001), torch.tensor([-1e4, 1e4, 0.0])])
    want = EXACT[act](x.double())
    got = ops.activation(x, None, act).double()
    assert bool(((got - want).abs() <= 1e-6 * want.abs().clamp_min(1.0)).all())
    # Near zero the absolute bound says little.
    near = x.abs() < 0.5
    assert bool(((got - want).abs() <= 1e-6 * x.abs() + 1e-30)[near].all())
    for width in WIDTHS:
        gate, up = randn(3, width), randn(3, width, seed=1)
        got = ops.activation(gate, up, act).double()
        assert torch.allclose(got, EXACT[act](gate.double()) * up, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("act", EXACT)
def test_activation_of_inf_and_nan(act, isa):
    got = ops.activation(torch.tensor([[math.inf, math.nan, -math.inf, 1.0]]), None, act)[0]
    assert got[0] == math.inf
    assert got[1].isnan()
    assert abs(got[2]) < 1e-30 or (isa == "ref" and got[2].isnan())  # -inf times 0 where the formula is taken literally
    assert got[3].isfinite()


# ---- cache ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [7, 16, 40, 64])
def test_append(width, dtype, isa):
    x = randn(2, 3, 4, width)
    cache = torch.full((2, 4, 9, width), 5.0, dtype=dtype)
    ops.cache_append(x, cache, None, 5)
    assert torch.equal(cache[:, :, 5:8], x.transpose(1, 2).to(dtype))
    cache[:, :, 5:8] = 5.0
    assert cache.eq(5.0).all()


@pytest.mark.parametrize("width", [7, 16, 40, 64])
def test_append_int8(width, isa):
    x = randn(2, 3, 4, width)
    x[0, 1, 2] = 0
    x[1, 0, 1, 3] = math.inf
    x[1, 2, 3, 0] = math.nan
    cache, scale = torch.full((2, 4, 9, width), 99, dtype=torch.int8), torch.full((2, 4, 9), 7.0)
    ops.cache_append(x, cache, scale, 5)
    heads = x.transpose(1, 2)
    most = heads.abs().amax(-1)
    finite = most.isfinite()
    new, new_scale = cache[:, :, 5:8], scale[:, :, 5:8]
    assert new_scale[~finite].isnan().all()
    assert torch.allclose(new_scale[finite], most[finite] / 127, rtol=1e-6, atol=0.0)
    off = (new * new_scale[..., None] - heads)[finite].abs()
    assert bool((off <= 0.5001 * new_scale[finite][:, None]).all())
    assert new[finite].abs().amax(-1)[most[finite] > 0].eq(127).all()
    assert cache[:, :, :5].eq(99).all()
    assert cache[:, :, 8:].eq(99).all()
    assert scale[:, :, :5].eq(7).all()
    assert scale[:, :, 8:].eq(7).all()


def test_append_rounds_to_even_on_every_level(isa):
    x = torch.tensor([127.0, 0.5, 1.5, -0.5, -2.5, 2.5, 3.49, -126.5]).view(1, 1, 1, 8)
    cache, scale = torch.zeros(1, 1, 1, 8, dtype=torch.int8), torch.zeros(1, 1, 1)
    ops.cache_append(x, cache, scale, 0)
    assert cache.flatten().tolist() == [127, 0, 2, 0, -2, 2, 3, -126]


# ---- arguments, threads, compilation --------------------------------------------------------------------------------


def test_wrong_arguments():
    x = randn(2, 3, 4, 8)
    for bad in (torch.ones(7), torch.ones(8, dtype=torch.float16), torch.ones(16)[::2]):
        with pytest.raises(RuntimeError, match="cpullm::rms_norm: gain must be"):
            ops.rms_norm(x, bad, 1e-5)
        with pytest.raises(RuntimeError, match="cpullm::layer_norm: bias must be"):
            ops.layer_norm(x, None, bad, 1e-5)
    with pytest.raises(RuntimeError, match="must not be empty"):
        ops.rms_norm(x[..., :0], None, 1e-5)
    with pytest.raises(RuntimeError, match="x must be float32, bfloat16 or float16"):
        ops.rms_norm(x.double(), None, 1e-5)
    cos = randn(1, 3, 8)
    with pytest.raises(RuntimeError, match="style must be"):
        ops.rope(x, cos, cos, "whole")
    for bad in (randn(1, 3, 10), randn(1, 3, 7), randn(1, 4, 8), randn(3, 3, 8), randn(3, 8)):
        with pytest.raises(RuntimeError, match="cpullm::rope"):
            ops.rope(x, bad, bad)
    with pytest.raises(RuntimeError, match="cpullm::rope"):
        ops.rope(x, cos, cos.bfloat16())
    with pytest.raises(RuntimeError, match="width must be even and at most"):
        ops.rope(x, cos, cos, "interleaved_once")
    with pytest.raises(RuntimeError, match="x must be contiguous"):
        ops.rope(x.transpose(1, 2), cos, cos)
    with pytest.raises(RuntimeError, match="act must be"):
        ops.activation(x, None, "swish")
    with pytest.raises(RuntimeError, match="up must have gate's shape"):
        ops.activation(x, x[:1], "silu")
    cache = torch.zeros(2, 4, 9, 8)
    for position in (-1, 7, 1 << 60):
        with pytest.raises(RuntimeError, match="do not fit a cache of capacity 9"):
            ops.cache_append(x, cache, None, position)
    with pytest.raises(RuntimeError, match="cache must be a CPU tensor of shape"):
        ops.cache_append(x, cache[:, :3], None, 0)
    with pytest.raises(RuntimeError, match="an int8 cache needs scale"):
        ops.cache_append(x, cache.to(torch.int8), None, 0)
    with pytest.raises(RuntimeError, match="scale is for an int8 cache"):
        ops.cache_append(x, cache, torch.zeros(2, 4, 9), 0)


def test_threads_do_not_change_a_bit(isa):
    x, cos, sin = randn(2, 150, 9, 64), randn(2, 150, 64, seed=1), randn(2, 150, 64, seed=2)

    def run():
        turned, cache, scale = x.clone(), torch.zeros(2, 9, 150, 64, dtype=torch.int8), torch.zeros(2, 9, 150)
        ops.rope(turned, cos, sin)
        ops.cache_append(x, cache, scale, 0)
        return turned, cache, scale, ops.rms_norm(x, None, 1e-5), ops.activation(x, x, "gelu")

    two = run()
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(two, run(), strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_opcheck():
    x = randn(2, 3, 4, 8)
    cos = randn(1, 3, 8)
    named = torch.ops.cpullm
    torch.library.opcheck(named.rms_norm.default, (x, torch.ones(8), 1e-5))
    torch.library.opcheck(named.layer_norm.default, (x, torch.ones(8), None, 1e-5))
    torch.library.opcheck(named.rope.default, (x.clone(), cos, cos, "half"))
    torch.library.opcheck(named.activation.default, (x, x, "silu"))
    torch.library.opcheck(named.cache_append.default, (x, torch.zeros(2, 4, 9, 8), None, 2))
    int8 = (x, torch.zeros(2, 4, 9, 8, dtype=torch.int8), torch.zeros(2, 4, 9), 2)
    torch.library.opcheck(named.cache_append.default, int8)
