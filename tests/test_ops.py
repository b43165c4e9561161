"""The linear operator against its oracle on a grid, and what its int8 compute promises, bit for bit."""

import functools
import platform

import pytest
import torch
from cases import (
    CASES,
    FLOATS,
    ROWS,
    Case,
    activations,
    allowed,
    at_offset,
    layouts,
    one_thread,
    quantized,
    replaced,
    tensors,
)
from conftest import LEVELS

from torch_cpullm import ops, reference
from torch_cpullm.packing import QuantizedWeight, dequantize, pack
from torch_cpullm.quant import quantize_rtn

MOST = max(ROWS)


@functools.cache
def expected(case, compute, m=MOST):
    """(exact result [m, n] in float64, bound on a float32 result, int8 result of the ref level or None)."""
    with one_thread(), ops.use_isa("ref"):
        weight, x, bias, perm = tensors(case, m)
        exact = reference.linear(x.double(), weight, bias, perm, compute)
        bound = reference.error_bound(x if perm is None else x[:, perm.long()], weight, compute, bias)
        ref = ops.linear(x, weight, bias, perm, compute) if compute == "int8" else None
    return exact, bound, ref


def check_within(y, exact, bound):
    """y, of any float type, is ``exact`` within ``bound`` and one rounding; NaN is not."""
    share = ((y.double() - exact).abs() / allowed(exact, bound, y.dtype)).nan_to_num(torch.inf)
    assert bool((share <= 1).all()), f"{len(y)} rows: {float(share.max()):.3g} times the bound"


# ---- grid -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", ["int8", "fp32"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_linear(case, compute, isa):
    weight, x, bias, perm = tensors(case, MOST)
    exact, bound, ref = expected(case, compute)
    before = [t.clone() for t in (x, weight.codes, weight.scales, weight.zeros, bias, perm) if t is not None]
    for m in (0, 1, 3) if isa == "ref" else ROWS:  # slow, and made for one row at a time
        y = ops.linear(x[:m], weight, bias, perm, compute)
        assert y.dtype == case.x
        assert y.shape == (m, case.n)
        assert y.is_contiguous()
        check_within(y, exact[:m], bound[:m])
        if ref is not None:
            assert torch.equal(y, ref[:m]), f"m={m}: not the bits of the ref level"
    if ref is not None and isa == "ref":
        check_within(ref, exact, bound)
    after = [t for t in (x, weight.codes, weight.scales, weight.zeros, bias, perm) if t is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "an input was written to"


@pytest.mark.parametrize(("form", "bits"), [("sym", 4), ("zero", 4), ("minimum", 4), ("sym", 8)])
@pytest.mark.parametrize("group", [32, 64, 96, 128, 192, -1])
def test_many_rows_have_the_bits_of_one(form, bits, group, isa):
    """Tiles of every number of rows, full and short ones, one and more blocks of rows: a row has the bits it has alone,
    from another kernel. Blocks where one input outgrows the others, more inputs than in a run.
    """
    case = Case("many rows", n=72, k=672, group=group, form=form, bits=bits)
    weight, x, bias, perm = tensors(case, 519)
    x[::3, 5] *= 40
    x[1::5, 200:204] *= -30
    alone = torch.cat([ops.linear(row, weight, bias, perm) for row in x.split(1)])
    for m in (*range(2, 65), 97, 512, 519):
        assert torch.equal(ops.linear(x[:m], weight, bias, perm), alone[:m]), f"m={m}"


def test_the_grid_holds_what_it_promises():
    """All 16 codes in both nibbles at each of the 4 places of a block; each form, dtype and tail at least once."""
    for form in ("sym", "zero", "minimum"):
        bytes_ = torch.cat([tensors(c, 1)[0].codes.view(-1, 16, 4) for c in CASES if c.form == form and c.bits == 4])
        for place in range(4):
            assert sorted(set((bytes_[..., place] & 15).flatten().tolist())) == list(range(16))
            assert sorted(set((bytes_[..., place] >> 4).flatten().tolist())) == list(range(16))
    for bits, forms in ((4, {"sym", "zero", "minimum"}), (8, {"sym"})):
        chosen = [c for c in CASES if c.bits == bits]
        assert {c.form for c in chosen} == forms
        assert {c.x for c in chosen} == set(FLOATS)
        assert {c.scale for c in chosen} == {torch.float16, torch.bfloat16}
        assert {c.group for c in chosen} >= {32, 64, 96, -1}
        assert any(c.perm for c in chosen)
    assert {c.bias for c in CASES} == {None, *FLOATS}
    assert any(c.group == 128 for c in CASES)


@pytest.mark.parametrize("k", [160, 544])
@pytest.mark.parametrize("compute", ["int8", "bf16", "fp32"])
def test_more_rows_than_a_row_block(compute, k, isa):
    """Partial sums of at most 512 rows are kept at a time; 1,030 rows need three such blocks, none of them full. Of 544
    inputs 512 are unpacked at a time.
    """
    case = Case("three row blocks", 33, k, 32, "zero")
    weight, x, _, _ = tensors(case, 1030)
    exact, bound, ref = expected(case, compute, 1030)
    y = ops.linear(x, weight, compute=compute)
    check_within(y, exact, bound)
    assert ref is None or torch.equal(y, ref)
    pieces = torch.cat([ops.linear(part, weight, compute=compute) for part in x.split(103)])
    assert torch.equal(y, pieces)


@pytest.mark.parametrize("nibble", ["low", "high"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("compute", ["int8", "fp32"])
def test_a_flipped_bit_must_fail(compute, bits, nibble, isa):
    """The smallest damage to one code out of 3,072 is outside of the bound the grid allows."""
    weight = quantized(32, 96, 32, bits=bits)
    # Scales of one size: no weight is too small to matter.
    weight = pack(QuantizedWeight(weight.codes, torch.full_like(weight.scales, 0.01), None, bits, 32))
    column, j = (20 if nibble == "high" else 3), 77
    damaged = weight.codes.clone()
    byte = (column % 16 if bits == 4 else column) * 4 + j % 4
    damaged[0, j // 4, byte] ^= 16 if bits == 4 and nibble == "high" else 1
    for m in (1, 4, 17):
        x = activations(m, 96).sign() + 0.25
        exact = reference.linear(x.double(), weight, compute=compute)
        limit = allowed(exact, reference.error_bound(x, weight, compute), x.dtype)
        y = ops.linear(x, replaced(weight, codes=damaged), compute=compute)
        wrong = (y - exact).abs() > limit
        assert bool(wrong[:, column].all())
        assert int(wrong.sum()) == m


# ---- layouts of the input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("compute", ["int8", "fp32"])
def test_layout_of_x_does_not_matter(compute, dtype, isa):
    for m, n, k in ((6, 33, 172), (18, 64, 160)):
        weight, x = pack(quantized(n, k, 64, "zero")), activations(m, k, dtype)
        want = ops.linear(x, weight, compute=compute)
        for name, (view, leading) in layouts(x).items():
            y = ops.linear(view, weight, compute=compute)
            assert y.shape == (*leading, n), name
            assert y.is_contiguous(), name
            assert torch.equal(y.view(m, n), want), name


@pytest.mark.parametrize("compute", ["int8", "fp32"])
def test_few_and_no_leading_dimensions(compute, isa):
    weight, x = pack(quantized(45, 172, 64)), activations(1, 172)
    want = ops.linear(x, weight, compute=compute)
    assert torch.equal(ops.linear(x[0], weight, compute=compute), want[0])
    column = torch.full((172, 2), float("nan"))
    column[:, 0] = x[0]
    assert torch.equal(ops.linear(column[:, 0], weight, compute=compute), want[0])
    repeated = x.expand(5, -1)
    assert torch.equal(
        ops.linear(repeated, weight, compute=compute), ops.linear(repeated.clone(), weight, compute=compute)
    )
    for shape in ((0, 172), (2, 0, 172), (0, 3, 172)):
        assert ops.linear(torch.empty(shape), weight, compute=compute).shape == (*shape[:-1], 45)


@pytest.mark.parametrize("compute", ["int8", "fp32"])
def test_lazy_views_of_x(compute, isa):
    """Views whose negation is pending, and zeros that were never written."""
    weight = pack(quantized(32, 64, 32))
    lazy = torch.complex(activations(3, 64), activations(3, 64, seed=1)).conj().imag
    assert lazy.is_neg()
    assert torch.equal(
        ops.linear(lazy, weight, compute=compute), ops.linear(lazy.resolve_neg(), weight, compute=compute)
    )
    nothing = ops.linear(torch._efficientzerotensor(3, 64), weight, compute=compute)
    assert torch.equal(nothing, torch.zeros(3, 32))


@pytest.mark.parametrize("compute", ["int8", "fp32"])
def test_weights_need_no_alignment(compute, isa):
    """A checkpoint that is mapped into memory is aligned to 8 bytes, or less."""
    for case in CASES[5:12]:
        weight, x, bias, perm = tensors(case, 9)
        moved = replaced(
            weight,
            codes=at_offset(weight.codes, 1),
            scales=at_offset(weight.scales, 2),
            zeros=None if weight.zeros is None else at_offset(weight.zeros, 8),
        )
        bias_moved = None if bias is None else at_offset(bias, bias.element_size())
        perm_moved = None if perm is None else at_offset(perm, 4)
        want = ops.linear(x, weight, bias, perm, compute)
        assert torch.equal(ops.linear(x, moved, bias_moved, perm_moved, compute), want)


def test_perm_gathers_the_input(isa):
    """perm[j] is the place in x of input j of W; places may repeat, and quantisation follows the gathered order."""
    weight, x = pack(quantized(33, 172, 64, "zero")), activations(5, 172)
    for perm in (torch.arange(171, -1, -1), torch.arange(172) // 2):
        for compute in ("int8", "fp32"):
            y = ops.linear(x, weight, perm=perm.int(), compute=compute)
            assert torch.equal(y, ops.linear(x[:, perm].contiguous(), weight, compute=compute))


# ---- int8: bit for bit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["sym", "zero", "minimum", "8 bits"])
def test_int8_row_does_not_depend_on_its_batch(form, isa):
    """Same bits for every m, position, neighbours and thread count."""
    bits = 8 if form == "8 bits" else 4
    weight = pack(quantized(333, 1100, 96, "sym" if bits == 8 else form, bits))
    x = activations(40, 1100)
    alone = torch.cat([ops.linear(row[None], weight) for row in x])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(ops.linear(x, weight), alone)
        assert torch.equal(ops.linear(x[:1], weight), alone[:1])
        order = torch.randperm(40, generator=torch.Generator().manual_seed(threads))
        assert torch.equal(ops.linear(x[order], weight), alone[order])
        assert torch.equal(ops.linear(x[order[:11]], weight), alone[order[:11]])
    mixed = x.clone()
    mixed[1::2] *= 1e4
    assert torch.equal(ops.linear(mixed, weight)[::2], alone[::2])


@pytest.mark.parametrize("compute", ["int8", "fp32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_only_round_the_result(dtype, compute, isa):
    """x is widened without loss: the result is the float32 one, rounded once to nearest even."""
    weight, bias = pack(quantized(45, 300, 64, "zero")), activations(1, 45)[0]
    for m in (1, 2, 5, 17):
        x = activations(m, 300, dtype)
        want = ops.linear(x.float(), weight, bias, compute=compute).to(dtype)
        assert torch.equal(ops.linear(x, weight, bias, compute=compute), want)


@pytest.mark.parametrize("bits", [4, 8])
def test_int8_products_do_not_saturate(bits, isa):
    """Largest codes times largest activations: pairs of such products exceed int16 if added carelessly."""
    high = 2**bits - 1
    alternating = torch.tensor([127.0, -127.0]).repeat(128)
    for code in (0, high):
        for row in (torch.full((256,), 127.0), torch.full((256,), -127.0), alternating):
            for m in (1, 5, 17):
                some = quantized(32, 256, 128, bits=bits)
                weight = pack(QuantizedWeight(torch.full_like(some.codes, code), some.scales, None, bits, 128))
                x = row.repeat(m, 1)
                exact = reference.linear(x.double(), weight)
                check_within(ops.linear(x, weight), exact, reference.error_bound(x, weight))


def test_fp32_reads_single_weights_exactly(isa):
    """A row with one 1 picks one input's weights: code, scale and zero point of every column without rounding."""
    for form, bits in (("sym", 4), ("zero", 4), ("sym", 8)):
        weight = pack(quantized(45, 172, 64, form, bits))
        want = dequantize(weight).T
        picked = torch.cat([ops.linear(row[None], weight, compute="fp32") for row in torch.eye(172)[::7]])
        assert torch.equal(picked, want[::7])
        assert torch.equal(ops.linear(torch.eye(172), weight, compute="fp32"), want)


# ---- special values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("compute", ["int8", "fp32"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_stay_visible_in_their_row(value, compute, dtype, isa):
    for form, m in (("sym", 3), ("zero", 17), ("minimum", 9)):
        weight, x = pack(quantized(45, 300, 64, form)), activations(m, 300, dtype)
        clean = ops.linear(x, weight, compute=compute)
        for place in (0, 150, 299):  # first, middle and last activation block, the last one padded
            bad = x.clone()
            bad[1, place] = value
            y = ops.linear(bad, weight, compute=compute)
            assert not bool(torch.isfinite(y[1]).any())
            assert torch.equal(y[0], clean[0])
            assert torch.equal(y[2:], clean[2:])


@pytest.mark.parametrize("compute", ["int8", "fp32"])
def test_nan_seen_from_one_row_alone(compute, isa):
    weight, x = pack(quantized(33, 64, 32)), activations(1, 64)
    x[0, 40] = float("nan")
    assert bool(ops.linear(x, weight, compute=compute).isnan().all())


@pytest.mark.parametrize("compute", ["int8", "fp32"])
@pytest.mark.parametrize("form", ["sym", "zero", "minimum"])
def test_zero_rows_give_the_bias(form, compute, isa):
    weight, bias = pack(quantized(45, 172, 64, form)), activations(1, 45)[0]
    for zero in (0.0, -0.0):
        x = activations(9, 172)
        x[4] = zero
        y = ops.linear(x, weight, bias, compute=compute)
        assert torch.equal(y[4], bias)
        assert torch.equal(ops.linear(x[4:5], weight, bias, compute=compute)[0], bias)
        assert torch.equal(ops.linear(x, weight, compute=compute)[4], torch.zeros(45))


@pytest.mark.parametrize("compute", ["int8", "fp32"])
def test_sign_of_zero_does_not_matter(compute, isa):
    weight, x = pack(quantized(33, 172, 64, "zero")), activations(5, 172)
    x[:, ::3] = 0.0
    minus = torch.where(x == 0, torch.tensor(-0.0), x)
    assert torch.equal(ops.linear(x, weight, compute=compute), ops.linear(minus, weight, compute=compute))


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize(("form", "bits"), [("minimum", 4), ("sym", 4), ("sym", 8)])
@pytest.mark.parametrize("compute", ["int8", "fp32"])
@pytest.mark.parametrize("size", [1e-44, 1e-39, 1e-31, 1e-28, 1e-27, 1e-20, 1e19, 1e20, 1e30, 1e36])
def test_very_small_and_very_large_rows(size, compute, form, bits, rows, isa):
    """Within the bound from float32's subnormals up to results near its largest; int8 flushes steps below 2^-100."""
    weight = pack(quantized(33, 172, 64, form, bits=bits))
    x = activations(rows, 172)
    x = x / x.abs().amax(1, keepdim=True) * size
    exact = reference.linear(x.double(), weight, compute=compute)
    limit = allowed(exact, reference.error_bound(x, weight, compute), x.dtype) + 172 * 2.0**-149
    assert bool(((ops.linear(x, weight, compute=compute) - exact).abs() <= limit).all())
    if compute == "int8" and size < 2**-100:
        assert torch.equal(ops.linear(x, weight), torch.zeros(rows, 33))


def test_half_type_subnormals_and_overflow(isa):
    weight = pack(quantized(33, 172, 64))
    gen = torch.Generator().manual_seed(5)
    x = (torch.randint(-1023, 1024, (5, 172), generator=gen) * 2.0**-24).to(torch.float16)
    for compute in ("int8", "fp32"):
        y = ops.linear(x, weight, compute=compute)
        exact = reference.linear(x.double(), weight, compute=compute)
        check_within(y, exact, reference.error_bound(x, weight, compute))
        big = ops.linear(torch.full((1, 172), 65504.0, dtype=torch.float16), weight, compute=compute)
        wide = ops.linear(torch.full((1, 172), 65504.0), weight, compute=compute)
        assert torch.equal(big, wide.to(torch.float16))
        assert bool(big.isinf().any()), "the test wants results beyond float16"


# ---- activations as int8 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize_activations(dtype, isa):
    for k in (1, 31, 32, 33, 127, 128, 129, 172, 256, 300, 576):
        for m in (1, 5, 17):
            x = activations(m, k, dtype)
            if m == 17:
                most = torch.finfo(dtype).max
                x[1, 0], x[2, -1], x[3, k // 2] = float("nan"), float("inf"), float("-inf")
                x[4], x[5], x[6, k // 3] = 0, -0.0, 65504.0
                x[7] = x[7] * 1e-30 if dtype != torch.float16 else 2.0**-24
                x[8], x[9] = x[8].abs(), -x[9].abs()
                x[10, 0], x[10, -1], x[11, 0] = most, -most, -most
                x[12] *= 1e-3
                x[12, k // 2], x[13, -1], x[14, 0], x[14, -1] = 100.0, 30.0, 5.0, 5.0
            got, want = ops.quantize_activations(x), reference.quantize_activations(x)
            for name, a, b in zip(("q", "scale"), got, want, strict=True):
                assert a.dtype == b.dtype, name
                assert a.shape == b.shape, name
                assert torch.equal(a.isnan(), b.isnan()), name
                assert torch.equal(a.nan_to_num(), b.nan_to_num()), name


def test_quantize_activations_of_no_rows(isa):
    for function in (ops.quantize_activations, reference.quantize_activations):
        assert [list(t.shape) for t in function(torch.empty(2, 0, 172))] == [[0, 192], [0, 2]]


def test_quantize_activations_by_hand(isa):
    """The largest of a block's 128 is 127, unless it outgrows the others; on numbers that a person can follow."""
    x = torch.zeros(3, 200)
    x[0, :7] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5])  # scale 1, ties to even
    x[0, 128:131] = torch.tensor([2.54, 0.01, -1.9])  # scale 0.02: 1.9 needs more than 0.7 of the range
    x[1, :3] = torch.tensor([0.5, -100.0, 1.27])  # 100 apart: the others have scale 0.01
    x[1, 128:131] = torch.tensor([-12.7, 1.0, 8.89])  # 0.7 but for rounding
    x[2, 5] = 3.0  # alone: apart, at the end of its range
    x[2, 128:130] = torch.tensor([1e-3, 1e3])  # so far apart that the range of the one apart decides
    q, scale = ops.quantize_activations(x)
    assert q.shape == (3, 224)
    apart = torch.tensor(8.89) <= torch.tensor(12.7) * torch.tensor(0.7)
    second = 0.07 if apart else 0.1
    wanted = torch.tensor([[1.0, 0.02], [0.01, second], [3.0 / 16256, 1e3 / 16256]])
    assert torch.allclose(scale, wanted)
    assert q[0, :7].tolist() == [127, 0, 2, 2, 0, -2, -126]
    assert q[0, 128:131].tolist() == [127, 0, -95]
    assert q[1, :3].tolist() == [50, -10000, 127]
    assert q[1, 128:131].tolist() == ([-181, 14, 127] if apart else [-127, 10, 89])
    assert q[2, 5] == 16256
    assert q[2, 128:130].tolist() == [0, 16256]
    assert not q[:, :200][x == 0].any()
    assert not q[:, 200:].any()


def test_quantize_activations_error_is_half_a_step(isa):
    """Independent of the oracle: q * scale is within half a step of x (and a rounding), on the whole range."""
    x = activations(50, 300)
    x[10:20] = x[10:20].abs()
    x[20:25, 7], x[20:25, 299] = 40.0, -90.0
    q, scale = ops.quantize_activations(x)
    step = scale.repeat_interleave(128, 1)[:, :300]
    assert bool(((q[:, :300] * step - x).abs() <= step * 0.5001).all())
    for first in range(0, 300, 128):
        largest, second = q[:, first : min(first + 128, 300)].abs().topk(2, 1).values.unbind(1)
        assert bool((largest >= 127).all())
        assert bool(((largest == 127) | (second == 127) | (largest == 16256)).all())
    assert bool((q[20:25, 299].abs() > 127).any())


# ---- bf16 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "sym"), [(4, True), (4, False), (8, True)])
@pytest.mark.parametrize("group", [32, 128, -1])
def test_bf16_compute(bits, sym, group, isa):
    """Within the bound of two roundings to bf16; few rows are as in fp32; a row that is nan stays one."""
    for n, k in ((32, 32), (70, 300), (160, 1100)):
        weight = pack(quantize_rtn(torch.randn(n, k), bits=bits, group_size=group, sym=sym))
        for m in (1, 3, 7, 8, 14, 15, 16, 17, 31, 32, 33, 50):
            for dtype in (torch.float32, torch.bfloat16):
                x = activations(m, k, dtype)
                got, want = ops.linear(x, weight, compute="bf16"), reference.linear(x, weight, compute="fp32")
                bound = reference.error_bound(x, weight, "bf16") + want.double().abs() * torch.finfo(dtype).eps
                assert bool(((got.double() - want.double()).abs() <= bound + 1e-30).all()), (n, k, m)
                if m < 8:
                    assert torch.equal(got, ops.linear(x, weight, compute="fp32"))
        x = activations(33, k)
        x[5, k // 2] = float("nan")
        y = ops.linear(x, weight, compute="bf16")
        assert bool(y[5].isnan().all())
        assert not bool(y[[0, 4, 6, 32]].isnan().any())


# ---- instruction sets -----------------------------------------------------------------------------------------------


def test_levels_are_listed_in_order():
    names = list(ops.isa_levels())
    assert names == (["ref", "avx2", "avx_vnni", "avx512", "amx"] if platform.machine() == "x86_64" else ["ref"])
    assert ops.isa_levels()["ref"]


@pytest.mark.parametrize("name", ["avx1024", "AVX2", " ref", "none"])
def test_unknown_level(name):
    before = ops.isa()
    text = f"CPULLM_ISA: '{name}' is not a known level; reachable here: ref"
    with pytest.raises(RuntimeError, match=text), ops.use_isa(name):
        pytest.fail("must not get here")
    assert ops.isa() == before


def test_unreachable_level():
    for name in [name for name, reachable in ops.isa_levels().items() if not reachable]:
        with pytest.raises(RuntimeError, match=f"'{name}' is not reachable .*; reachable here: ref"), ops.use_isa(name):
            pytest.fail("must not get here")


def test_use_isa_nests_and_comes_back():
    before = ops.isa()
    with ops.use_isa(LEVELS[-1]):
        with ops.use_isa("ref"):
            assert ops.isa() == "ref"
        assert ops.isa() == LEVELS[-1]
        with pytest.raises(KeyError), ops.use_isa("ref"):
            raise KeyError
        assert ops.isa() == LEVELS[-1]
    assert ops.isa() == before
