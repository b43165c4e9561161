"""Round to nearest: what it gives on numbers a person can follow, what it never does worse than, what it refuses."""

import pytest
import torch
from cases import FLOATS, generator

from torch_cpullm import ops
from torch_cpullm.packing import dequantize, resolve_group
from torch_cpullm.quant import quantize_rtn

FORMS = [(4, False), (4, True), (8, True)]
U = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def weights(n, k, seed=0):
    """Normal values with an outlier in every seventh row and another size in every row."""
    gen = generator(seed)
    w = torch.randn(n, k, generator=gen) * 10 ** (torch.rand(n, 1, generator=gen) * 3 - 3)
    w[::7, k // 3] *= 12
    return w


def errors(w, weight, power):
    """[n, groups] float64: the sum of |error|^power of each group."""
    group = weight.group_size if weight.group_size > 0 else w.shape[1]
    error = (dequantize(weight).double() - w.double()).abs() ** power
    return torch.stack([part.sum(1) for part in error.split(group, 1)], 1)


def squared_errors(w, weight):
    """[n, groups] float64: the squared error of each group."""
    return errors(w, weight, 2)


# ---- by hand --------------------------------------------------------------------------------------------------------


def test_whole_numbers_come_back():
    """-8..7 with scale 1 and 0..15 with a zero point need no rounding at all."""
    w = torch.arange(-8.0, 8.0).repeat(2)[None]
    for search in (False, True):
        symmetric = quantize_rtn(w, sym=True, clip_search=search)
        assert torch.equal(dequantize(symmetric), w)
        assert float(symmetric.scales[0, 0].abs()) == 1.0
    for shift in (0, 3, 15):
        w = (torch.arange(16.0) - shift).repeat(2)[None]
        asymmetric = quantize_rtn(w, clip_search=False)
        assert torch.equal(dequantize(asymmetric), w)
        assert asymmetric.zeros.tolist() == [[shift]]
        assert torch.equal(dequantize(quantize_rtn(w)), w)


def test_symmetric_uses_the_long_side():
    """-8..7 has one more level below zero: the value of largest magnitude lies there, whatever its sign."""
    for sign in (1.0, -1.0):
        w = torch.linspace(-0.5, 0.5, 32)[None].clone()
        w[0, 5] = sign
        weight = quantize_rtn(w, sym=True, clip_search=False)
        assert int(weight.codes[0, 5]) == 0
        assert float(weight.scales[0, 0]) == -sign / 8
        assert float(dequantize(weight)[0, 5]) == sign


def test_eight_bits_by_hand():
    w = torch.tensor([[127.0, -127.0, 1.0, 0.4, -64.4] + [0.0] * 27])
    weight = quantize_rtn(w, bits=8)
    assert weight.zeros is None
    assert float(weight.scales[0, 0].abs()) == 1.0
    assert dequantize(weight)[0, :5].tolist() == [127.0, -127.0, 1.0, 0.0, -64.0]


def test_zero_is_always_a_level():
    """Padding and pruned weights stay exactly zero, also in groups whose values all have one sign."""
    for bits, sym in FORMS:
        w = weights(40, 96).abs() + 0.5
        w[20:] *= -1
        w[:, ::5] = 0.0
        assert torch.equal(dequantize(quantize_rtn(w, bits, sym=sym))[:, ::5], torch.zeros(40, 20))


@pytest.mark.parametrize(("bits", "sym"), FORMS)
def test_constant_groups(bits, sym):
    for value in (0.0, 1.0, -3.0, 1e-3, 60000.0):
        weight = quantize_rtn(torch.full((3, 70), value), bits, sym=sym)
        got = dequantize(weight)
        assert bool(((got - value).abs() <= abs(value) * 2 * U[torch.float16]).all())
    assert torch.equal(dequantize(quantize_rtn(torch.zeros(2, 64), bits, sym=sym)), torch.zeros(2, 64))


# ---- properties -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bits", "sym"), FORMS)
@pytest.mark.parametrize(("n", "k", "group"), [(1, 1, 32), (33, 31, 32), (9, 172, 64), (5, 300, -1), (7, 576, 128)])
def test_form_of_the_result(bits, sym, scale, n, k, group):
    w = weights(n, k)
    weight = quantize_rtn(w, bits, group, sym, scale)
    assert (weight.n, weight.k, weight.bits, weight.group_size) == (n, k, bits, group)
    assert weight.scales.dtype == scale
    assert (weight.zeros is None) == (sym or bits == 8)


@pytest.mark.parametrize("scale", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bits", "sym"), FORMS)
def test_plain_error_is_half_a_step(bits, sym, scale):
    """Without clipping no weight is further off than half a step, and what the rounding of the scale adds."""
    w = weights(50, 172)
    weight = quantize_rtn(w, bits, 64, sym, scale, clip_search=False)
    step = weight.scales.float().abs().repeat_interleave(64, 1)[:, :172]
    levels = {(4, False): 15, (4, True): 8, (8, True): 127}[bits, sym]
    # Symmetric 4 bits: a value on the short side may lie a whole step beyond level 7.
    beyond = 1.0 if (bits, sym) == (4, True) else 0.5
    # A zero point is rounded too, which moves both ends by up to half a step.
    beyond += 0.5 if weight.zeros is not None else 0.0
    limit = step * (beyond + levels * U[scale] + 1e-5) + 2.0**-24
    assert bool(((dequantize(weight) - w).abs() <= limit).all())


@pytest.mark.parametrize("scale", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize(("k", "group"), [(172, 64), (40, 32), (33, 32), (31, 32), (576, 128), (300, -1), (64, 128)])
def test_search_is_never_worse_than_the_full_range(sym, scale, k, group):
    """Group by group, a short last group included, in the power by which a group of this length is judged."""
    w = weights(70, k)
    inputs = resolve_group(group, k)
    power = 2 if inputs <= 32 else 3 if inputs <= 128 else 4
    plain = errors(w, quantize_rtn(w, 4, group, sym, scale, clip_search=False), power)
    searched = errors(w, quantize_rtn(w, 4, group, sym, scale), power)
    assert bool((searched <= plain * (1 + 1e-4) + 1e-14).all())


def test_search_looks_at_the_whole_of_a_long_row():
    """One scale for 40,000 weights, the outliers at the end: clipping them away is dear, and has to be seen."""
    w = torch.randn(2, 40_000, generator=generator(5)) * 0.01
    w[:, 39_000:] = torch.linspace(-1, 1, 1000)
    for sym in (False, True):
        plain = squared_errors(w, quantize_rtn(w, 4, -1, sym, clip_search=False))
        searched = squared_errors(w, quantize_rtn(w, 4, -1, sym))
        assert bool((searched <= plain * (1 + 1e-5)).all())


def test_search_gains_on_normal_weights():
    """The reason for its cost: on normal weights, group 32, the mean squared error falls by 5 % or more."""
    w = torch.randn(64, 512, generator=generator(1))
    for sym in (False, True):
        plain = squared_errors(w, quantize_rtn(w, sym=sym, clip_search=False)).sum()
        searched = squared_errors(w, quantize_rtn(w, sym=sym)).sum()
        assert float(searched) < 0.95 * float(plain)


def test_eight_bits_need_no_search():
    w = weights(30, 96)
    a, b = quantize_rtn(w, 8, clip_search=True), quantize_rtn(w, 8, clip_search=False)
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scales, b.scales)


@pytest.mark.parametrize(("bits", "sym"), FORMS)
def test_groups_do_not_touch_each_other(bits, sym):
    """A group's codes depend on its own weights: a short last group on no padding, a row on no other row."""
    w = weights(20, 172)
    whole = quantize_rtn(w, bits, 64, sym)
    parts = [quantize_rtn(part.contiguous(), bits, 64, sym) for part in w.split(64, 1)]
    assert torch.equal(torch.cat([p.codes for p in parts], 1), whole.codes)
    assert torch.equal(torch.cat([p.scales for p in parts], 1), whole.scales)
    rows = [quantize_rtn(row[None], bits, 64, sym) for row in w]
    assert torch.equal(torch.cat([r.codes for r in rows]), whole.codes)


@pytest.mark.parametrize(("bits", "sym"), FORMS)
def test_group_longer_than_the_row(bits, sym):
    w = weights(20, 40)
    one, long = quantize_rtn(w, bits, -1, sym), quantize_rtn(w, bits, 4096, sym)
    assert torch.equal(one.codes, long.codes)
    assert torch.equal(one.scales, long.scales)


@pytest.mark.parametrize("group", [2**40, 2**62, 2**63 - 32])
def test_group_that_no_row_has(group):
    """Refused, naming the argument, or one group per row; never values that nobody computed."""
    w = weights(20, 40)
    try:
        weight = quantize_rtn(w, 4, group)
    except ValueError as error:
        assert "group_size" in str(error)  # noqa: PT017
        return
    assert torch.equal(weight.codes, quantize_rtn(w, 4, -1).codes)


@pytest.mark.parametrize(("bits", "sym"), FORMS)
def test_every_level_gives_the_same_codes(bits, sym, isa):
    w = weights(40, 300)
    for dtype in FLOATS:
        got = quantize_rtn(w.to(dtype), bits, 96, sym)
        with ops.use_isa("ref"):
            want = quantize_rtn(w.to(dtype), bits, 96, sym)
        assert torch.equal(got.codes, want.codes)
        assert torch.equal(got.scales, want.scales)
        assert got.zeros is None or torch.equal(got.zeros, want.zeros)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_widened(dtype):
    w = weights(20, 172).to(dtype)
    a, b = quantize_rtn(w, 4, 64), quantize_rtn(w.float(), 4, 64)
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.scales, b.scales)


def test_strided_weights_and_no_change_to_them():
    w = weights(96, 172)
    before, want = w.clone(), quantize_rtn(w, 4, 64)
    assert torch.equal(quantize_rtn(w.T.contiguous().T, 4, 64).codes, want.codes)
    wide = torch.full((96, 200), float("nan"))
    wide[:, :172] = w
    assert torch.equal(quantize_rtn(wide[:, :172], 4, 64).codes, want.codes)
    assert torch.equal(w, before)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_matter(threads):
    w = weights(70, 300)
    want = quantize_rtn(w).codes
    torch.set_num_threads(threads)
    assert torch.equal(quantize_rtn(w).codes, want)


# ---- limits ---------------------------------------------------------------------------------------------------------


def test_weights_below_the_smallest_scale_become_zero():
    """Neither NaN nor noise: float16 scales end at 6e-8."""
    for size in (1e-9, 1e-20, 1e-38, 1e-44):
        for bits, sym in FORMS:
            for scale in (torch.float16, torch.bfloat16):
                w = torch.linspace(-size, size, 64)[None]
                got = dequantize(quantize_rtn(w, bits, sym=sym, scale_dtype=scale))
                assert bool(((got - w).abs() <= 2 * size).all())


def test_large_weights_within_the_scales_reach():
    """Up to 65,504 any form fits float16 scales; bfloat16 scales reach as far as float32."""
    for size, scale in ((65504.0, torch.float16), (1e20, torch.bfloat16), (1e37, torch.bfloat16)):
        for bits, sym in FORMS:
            w = torch.linspace(-size, size, 64)[None]
            got = dequantize(quantize_rtn(w, bits, sym=sym, scale_dtype=scale))
            assert bool(((got - w).abs() <= 0.15 * size).all()), (size, bits, sym)


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize(("bits", "sym"), FORMS)
def test_scale_overflow_is_an_error(bits, sym, search):
    w = torch.randn(3, 64, generator=generator(0))
    w[1, 40] = 1e9
    with pytest.raises(ValueError, match=r"weight is too large: a group's scale overflows torch\.float16"):
        quantize_rtn(w, bits, sym=sym, clip_search=search)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_inf_are_errors(bad, dtype):
    for place in ((0, 0), (2, 63), (1, 33)):
        w = torch.ones(3, 64, dtype=dtype)
        w[place] = bad
        with pytest.raises(ValueError, match="weight must be finite, but holds NaN or inf"):
            quantize_rtn(w)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"bits": 3}, "bits must be 4 or 8, got 3"),
        ({"bits": 2}, "bits must be 4 or 8, got 2"),
        ({"bits": None}, "bits must be 4 or 8, got None"),
        ({"group_size": 0}, "group_size must be -1 .*, got 0"),
        ({"group_size": 33}, "group_size must be -1 .* positive multiple of 32, got 33"),
        ({"group_size": -32}, "group_size must be -1 .*, got -32"),
        ({"group_size": "32"}, "group_size must be an integer, got '32'"),
        ({"scale_dtype": torch.float32}, "(?i)scale.* float16 or bfloat16, got torch.float32"),
        ({"weight": torch.ones(64)}, r"weight must be .* matrix \[n, k\].*, got torch.float32 \[64\]"),
        ({"weight": torch.ones(2, 3, 32)}, r"weight must be .*\[2, 3, 32\]"),
        ({"weight": torch.ones(0, 32)}, r"weight must be .*\[0, 32\]"),
        ({"weight": torch.ones(32, 0)}, r"weight must be .*\[32, 0\]"),
        ({"weight": torch.ones(2, 32, dtype=torch.int8)}, "weight must be .* got torch.int8"),
    ],
)
def test_wrong_arguments(arguments, text):
    with pytest.raises(ValueError, match=text):
        quantize_rtn(**{"weight": torch.ones(2, 32), **arguments})
