"""Canonical and packed weights: layout, lossless round trip, checks; dequantised rows by the operators."""

import pytest
import torch
from cases import CASES, FLOATS, at_offset, generator, quantized, replaced

from torch_cpullm import ops, packing
from torch_cpullm.packing import PackedWeight, QuantizedWeight, dequantize, gathered, pack, unpack

FORMS = [("sym", 4), ("zero", 4), ("minimum", 4), ("sym", 8)]
SIZES = [
    (1, 1, 32),
    (1, 64, 32),
    (33, 31, 32),
    (31, 33, 64),
    (45, 172, 64),
    (64, 576, 128),
    (96, 160, 96),
    (40, 300, -1),
]


def same(a, b):
    """Equal codes, scales, zeros, dtypes, bits and group size."""
    if (a.bits, a.group_size, a.zeros is None) != (b.bits, b.group_size, b.zeros is None):
        return False
    pairs = [(a.codes, b.codes), (a.scales, b.scales)] + ([] if a.zeros is None else [(a.zeros, b.zeros)])
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


# ---- pack and unpack ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "bits"), FORMS)
@pytest.mark.parametrize("scale", [torch.float16, torch.bfloat16])
def test_unpack_gives_back_what_was_packed(form, bits, scale):
    for n, k, group in SIZES:
        weight = quantized(n, k, group, form, bits, scale)
        packed = pack(weight)
        assert (packed.n, packed.k, packed.bits, packed.group_size) == (n, k, bits, group)
        assert same(unpack(packed), weight)
        assert unpack(packed).codes.is_contiguous()


@pytest.mark.parametrize(("form", "bits"), FORMS)
def test_layout(form, bits):
    """The documented layout, spelled out: blocks of 32 columns x 4 inputs; scales and zeros [panel, group, column]."""
    n, k, group = 45, 77, 64
    weight = quantized(n, k, group, form, bits)
    packed = pack(weight)
    assert packed.codes.shape == (2, 96 // 4, 16 * bits)
    assert packed.scales.shape == (2, 2, 32)
    assert packed.codes.is_contiguous()
    assert packed.scales.is_contiguous()
    for column in range(64):
        for j in range(96):
            c = column % 32
            block = packed.codes[column // 32, j // 4]
            if bits == 8:
                code = int(block[4 * c + j % 4])
            else:
                byte = int(block[4 * (c % 16) + j % 4])
                code = byte & 15 if c < 16 else byte >> 4
            assert code == (int(weight.codes[column, j]) if column < n and j < k else 0)
    for column in range(64):
        for g in range(2):
            at = (column // 32, g, column % 32)
            assert packed.scales[at] == (weight.scales[column, g] if column < n else 0)
            if packed.zeros is not None:
                assert packed.zeros[at] == (weight.zeros[column, g] if column < n else 0)


def test_packed_codes_start_at_a_cache_line():
    for n, k, group in SIZES:
        assert pack(quantized(n, k, group)).codes.data_ptr() % 64 == 0


def test_rows_too_long_to_pack_at_once():
    """Panels are packed some at a time to bound memory; 300,000 inputs are one panel at a time."""
    codes = torch.randint(0, 16, (70, 300_000), dtype=torch.uint8, generator=generator(3))
    weight = QuantizedWeight(codes, torch.ones(70, 1).half(), None, 4, -1)
    assert torch.equal(unpack(pack(weight)).codes, codes)


def test_canonical_tensors_may_be_strided():
    want = quantized(64, 96, 32, "zero")
    views = [t.T.contiguous().T for t in (want.codes, want.scales, want.zeros)]
    assert not views[0].is_contiguous()
    strided = QuantizedWeight(*views, 4, 32)
    assert same(unpack(pack(strided)), want)
    assert torch.equal(dequantize(strided), dequantize(want))


@pytest.mark.parametrize("k", [1, 33, 129, 515, 1056])
@pytest.mark.parametrize("n", [1, 33, 100])
def test_blocks_by_definition(n, k):
    """Byte 4c + i of a block: column c, for 4 bits column c + 16 in the high half; from both ways to store codes."""
    gen = generator(n + k)
    for bits in (4, 8):
        codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=gen)
        scales = torch.rand(n, -(-k // 32), generator=gen).half()
        weight = QuantizedWeight(codes, scales, None, bits, 32)
        padded = torch.zeros(packing.round_up(n, 32), packing.round_up(k, 32), dtype=torch.uint8)
        padded[:n, :k] = codes
        want = padded.view(-1, 32, padded.shape[1] // 4, 4).transpose(1, 2)
        want = (want[:, :, :16] | want[:, :, 16:] << 4) if bits == 4 else want
        for packed in (pack(weight), packing.pack_stored(*packing.stored_form(weight), n, k, bits, 32)):
            assert torch.equal(packed.codes, want.flatten(2))
            assert torch.equal(packed.scales.transpose(1, 2).flatten(0, 1)[:n], scales)
            assert not packed.scales.transpose(1, 2).flatten(0, 1)[n:].any()


CODES = torch.zeros(32, 16, dtype=torch.uint8)
OUT = torch.zeros(1, 8, 64, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((OUT, CODES, 32, 5, 8), "bits must be 4 or 8"),
        ((OUT, CODES, 32, 8, 4), "stored 8 or the same"),
        ((OUT, CODES, 0, 4, 4), "k must lie in"),
        ((OUT, CODES, 1 << 41, 4, 4), "k must lie in"),
        ((OUT, CODES, 34, 4, 4), "codes must be a contiguous"),
        ((OUT, CODES.view(torch.int8), 32, 4, 4), "codes must be a contiguous"),
        ((OUT, CODES[:0], 32, 4, 4), "codes must be a contiguous"),
        ((OUT, CODES.T.contiguous().T, 32, 4, 4), "codes must be a contiguous"),
        ((OUT[:, :4], CODES, 32, 4, 4), "out must be a contiguous"),
        ((OUT, torch.zeros(33, 16, dtype=torch.uint8), 32, 4, 4), "out must be a contiguous"),
    ],
)
def test_pack_codes_checks(arguments, text):
    with pytest.raises(RuntimeError, match=text):
        torch.ops.cpullm.pack_codes(*arguments)


def test_pack_columns_checks():
    with pytest.raises(RuntimeError, match="x must be uint8, float16 or bfloat16"):
        torch.ops.cpullm.pack_columns(OUT, torch.zeros(2, 2))
    for wrong in (torch.zeros(2).half(), torch.zeros(0, 2).half(), torch.zeros(2, 3).half().T):
        with pytest.raises(RuntimeError, match="contiguous non-empty CPU matrix"):
            torch.ops.cpullm.pack_columns(OUT, wrong)
    with pytest.raises(RuntimeError, match="out must be a contiguous CPU tensor of x's type"):
        torch.ops.cpullm.pack_columns(OUT, CODES)


def test_stored_size():
    packed = pack(quantized(64, 128, 32))
    assert packed.nbytes == 64 * 128 // 2 + 64 * 4 * 2
    assert packed.bits_per_weight == 4.5
    assert pack(quantized(64, 128, 32, "zero")).bits_per_weight == 4.75
    assert pack(quantized(64, 128, 32, "minimum")).bits_per_weight == 5.0
    assert pack(quantized(64, 128, 32, bits=8)).bits_per_weight == 8.5
    assert pack(quantized(1, 1, 32)).bits_per_weight == 8 * (32 * 32 // 2 + 32 * 2)


def test_properties():
    weight = quantized(45, 172, 64)
    assert (weight.n, weight.k, weight.groups) == (45, 172, 3)
    assert quantized(45, 172, -1).groups == 1
    assert pack(weight).group == 64
    assert pack(quantized(45, 172, -1)).group == 192
    assert [packing.round_up(v, 32) for v in (0, 1, 32, 33)] == [0, 32, 32, 64]


# ---- checks ---------------------------------------------------------------------------------------------------------


def u8(*shape):
    return torch.zeros(shape, dtype=torch.uint8)


def half(*shape):
    return torch.zeros(shape, dtype=torch.float16)


@pytest.mark.parametrize(
    ("codes", "scales", "zeros", "bits", "group", "text"),
    [
        (u8(2, 32), half(2, 1), None, 3, 32, "bits must be 4 or 8, got 3"),
        (u8(2, 32), half(2, 1), None, True, 32, "bits must be 4 or 8, got True"),
        (u8(2, 32), half(2, 1), None, "4", 32, "bits must be 4 or 8, got '4'"),
        (u8(2, 32), half(2, 1), None, 4, 0, "group_size must be -1 .* or a positive multiple of 32, got 0"),
        (u8(2, 32), half(2, 1), None, 4, -2, "group_size must be -1 .*, got -2"),
        (u8(2, 32), half(2, 1), None, 4, 48, "group_size must be -1 .*, got 48"),
        (u8(2, 32), half(2, 1), None, 4, 32.0, "group_size must be an integer, got 32.0"),
        (u8(2, 32), half(2, 1), None, 4, None, "group_size must be an integer, got None"),
        (u8(0, 32), half(0, 1), None, 4, 32, r"codes must be uint8 \[n, k\], got torch.uint8 \[0, 32\]"),
        (u8(2, 0), half(2, 0), None, 4, 32, r"codes must be .* \[2, 0\]"),
        (u8(2, 4, 8), half(2, 1), None, 4, 32, r"codes must be .* \[2, 4, 8\]"),
        (u8(2, 32).char(), half(2, 1), None, 4, 32, "codes must be uint8 .* got torch.int8"),
        (u8(2, 32) + 16, half(2, 1), None, 4, 32, r"codes must lie in 0..15 for bits=4, got 16"),
        (u8(2, 33), half(2, 1), None, 4, 32, r"scales must be .* \[2, 2\], got torch.float16 \[2, 1\]"),
        (u8(2, 32), half(2, 2), None, 4, -1, r"scales must be .* \[2, 1\], got torch.float16 \[2, 2\]"),
        (u8(2, 32), half(2, 1).float(), None, 4, 32, "scales must be float16 or bfloat16 .*, got torch.float32"),
        (u8(2, 32), half(2, 1) + float("inf"), None, 4, 32, "scales must be finite"),
        (u8(2, 32), half(2, 1) + float("nan"), None, 4, 32, "scales must be finite"),
        (u8(2, 32), half(2, 1), u8(2, 2), 4, 32, r"zeros must be .* \[2, 1\], got torch.uint8 \[2, 2\]"),
        (u8(2, 32), half(2, 1), half(2, 1).bfloat16(), 4, 32, "zeros must be uint8 or torch.float16"),
        (u8(2, 32), half(2, 1), u8(2, 1).char(), 4, 32, "zeros must be uint8"),
        (u8(2, 32), half(2, 1), u8(2, 1) + 16, 4, 32, r"zero points must lie in 0..15, got 16"),
        (u8(2, 32), half(2, 1), half(2, 1) + float("inf"), 4, 32, "minima must be finite"),
        (u8(2, 32), half(2, 1), u8(2, 1), 8, 32, "zeros are supported for bits=4 only"),
    ],
)
def test_quantized_weight_checks(codes, scales, zeros, bits, group, text):
    with pytest.raises(ValueError, match=text):
        QuantizedWeight(codes, scales, zeros, bits, group)


def test_bits_is_an_integer():
    """4.0 == 4, but the operators take no float: better said here than by them."""
    with pytest.raises(ValueError, match=r"bits must be 4 or 8, got 4\.0"):
        packing.check_bits(4.0)


@pytest.mark.parametrize("group", [4096, 2**40, 2**62, 2**63 - 32])
def test_group_far_longer_than_the_row(group):
    """Either refused when the weight is made, or the same as one group per row, in memory of the weight's size."""
    one = quantized(33, 172, -1, "zero")
    try:
        weight = QuantizedWeight(one.codes, one.scales, one.zeros, 4, group)
    except ValueError as error:
        assert "group_size" in str(error)  # noqa: PT017
        return
    want = dequantize(one)
    assert torch.equal(dequantize(weight), want)
    assert torch.equal(ops.dequantize(pack(weight)), want)
    x = torch.ones(2, 172)
    assert torch.equal(ops.linear(x, pack(weight)), ops.linear(x, pack(one)))


# ---- values ---------------------------------------------------------------------------------------------------------


def test_dequantize_by_hand():
    codes = torch.tensor([[0, 8, 15] + [7] * 30], dtype=torch.uint8)
    scales = torch.tensor([[0.5, 2.0]], dtype=torch.float16)
    symmetric = dequantize(QuantizedWeight(codes, scales, None, 4, 32))
    assert symmetric[0, :4].tolist() == [-4.0, 0.0, 3.5, -0.5]
    assert symmetric[0, 32] == -2.0
    zero = dequantize(QuantizedWeight(codes, scales, torch.tensor([[3, 9]], dtype=torch.uint8), 4, 32))
    assert zero[0, :4].tolist() == [-1.5, 2.5, 6.0, 2.0]
    assert zero[0, 32] == -4.0
    minimum = dequantize(QuantizedWeight(codes, scales, torch.tensor([[-1.0, 0.25]]).half(), 4, 32))
    assert minimum[0, :4].tolist() == [-1.0, 3.0, 6.5, 2.5]
    assert minimum[0, 32] == 14.25
    eight = dequantize(QuantizedWeight(codes + 120, scales, None, 8, 32))
    assert eight[0, :4].tolist() == [-4.0, 0.0, 3.5, -0.5]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operator_dequantizes_bit_for_bit(case, isa):
    """scale * (code - zero) is exact in float32, so there is one right answer; a float minimum adds one rounding."""
    weight = quantized(case.n, case.k, case.group, case.form, case.bits, case.scale)
    packed = pack(weight)
    want, got = dequantize(weight), ops.dequantize(packed)
    assert got.dtype == torch.float32
    assert torch.equal(dequantize(packed), want)
    if case.form == "minimum":
        exact = exact_minimum(weight)
        assert bool(((got - exact).abs() <= 2.0**-24 * exact.abs()).all())
    else:
        assert torch.equal(got, want)


def exact_minimum(weight):
    """scale * code + minimum in float64, group by group."""
    group = packing.resolve_group(weight.group_size, weight.k)
    of_group = torch.arange(weight.k) // group
    return weight.codes.double() * weight.scales.double()[:, of_group] + weight.zeros.double()[:, of_group]


def test_dequantize_subnormal_scales(isa):
    """fp16 scales below 2^-14, which GGUF files hold, are not flushed to zero."""
    codes = torch.randint(0, 16, (32, 64), dtype=torch.uint8, generator=generator(1))
    scales = torch.arange(1, 65).view(32, 2).to(torch.float16) * 2.0**-24
    weight = QuantizedWeight(codes, scales, None, 4, 32)
    assert torch.equal(ops.dequantize(pack(weight)), dequantize(weight))
    want = (codes.double() - 8) * scales.double().repeat_interleave(32, 1)
    assert torch.equal(dequantize(weight).double(), want)
    x = torch.eye(64)
    assert torch.equal(ops.linear(x, pack(weight), compute="fp32").double(), want.T)


# ---- together in huge pages -----------------------------------------------------------------------------------------


def test_small_weights_are_gathered():
    """In order, at 64 bytes, each with a storage of its own; a large tensor stays where it is."""
    small = [pack(quantized(96, 2080, 32, form, bits)) for form, bits in FORMS * 6]
    large = pack(quantized(64, 1 << 16, 64))
    weights = [*small, large]
    found = gathered(weights)
    assert all(same(new, old) for new, old in zip(found, weights, strict=True))
    assert found[-1].codes is large.codes
    assert found[-1].scales.data_ptr() != large.scales.data_ptr()
    moved = [t for w in found[:-1] for t in w.tensors if t is not None]
    places = [t.data_ptr() for t in moved]
    assert places == sorted(places)
    assert places[0] % (1 << 21) == 0
    assert all(place % 64 == 0 for place in places)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in moved)  # a copy of one copies no other
    last = moved[-1].clone()
    kept = moved.pop()
    del found, moved
    assert torch.equal(kept, last)  # the memory lives as long as one of them


def test_few_small_weights_stay():
    weights = [pack(quantized(64, 576, 128)) for _ in range(3)]
    assert gathered(weights) is weights
    assert gathered([]) == []


# ---- embedding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("form", "bits"), FORMS)
def test_embedding_rows(form, bits, dtype, isa):
    for n, k, group in ((45, 172, 64), (33, 31, 32), (64, 300, -1)):
        packed = pack(quantized(n, k, group, form, bits))
        want = dequantize(packed).to(dtype)
        ids = torch.randint(0, n, (4, 5), generator=generator(n))
        ids[0, :2] = torch.tensor([0, n - 1])
        strided = ids.repeat_interleave(2, 1)[:, ::2]
        for given in (ids, ids.int(), ids.T.contiguous().T, strided):
            rows = ops.embedding(given, packed, dtype)
            assert rows.dtype == dtype
            assert torch.equal(rows, want[ids])
        assert torch.equal(ops.embedding(torch.tensor(n - 1), packed, dtype), want[n - 1])
        assert torch.equal(ops.embedding(torch.arange(n), packed, dtype), want)
        assert ops.embedding(torch.zeros(2, 0, dtype=torch.int64), packed, dtype).shape == (2, 0, k)


def test_embedding_on_unaligned_memory(isa):
    packed = pack(quantized(45, 172, 64, "zero"))
    moved = replaced(
        packed, codes=at_offset(packed.codes, 3), scales=at_offset(packed.scales, 2), zeros=at_offset(packed.zeros, 1)
    )
    ids = torch.tensor([44, 0, 31, 32])
    assert torch.equal(ops.embedding(at_offset(ids, 8), moved, torch.float32), dequantize(packed)[ids])


@pytest.mark.parametrize("bad", [-1, 45, 63, 64, 2**31 - 1, -(2**31), 2**40, 2**63 - 1, -(2**63)])
def test_ids_outside(bad, isa):
    """Padding columns up to 64 exist in memory, but are no rows of the matrix."""
    packed = pack(quantized(45, 172, 64))
    kinds = [torch.int64] if not -(2**31) <= bad < 2**31 else [torch.int64, torch.int32]
    for dtype in kinds:
        with pytest.raises(RuntimeError, match=rf"cpullm::embedding: id {bad} is outside \[0, 45\)"):
            ops.embedding(torch.tensor([0, 3, bad], dtype=dtype), packed, torch.float32)


def test_other_ids_and_dtypes():
    packed = pack(quantized(45, 172, 64))
    for dtype in (torch.int16, torch.uint8, torch.float32, torch.bool):
        with pytest.raises(RuntimeError, match="cpullm::embedding: ids must be an int64 or int32 CPU tensor"):
            ops.embedding(torch.zeros(2, dtype=dtype), packed, torch.float32)
    for dtype in (torch.float64, torch.int8):
        with pytest.raises(RuntimeError, match="cpullm::embedding: dtype must be float32, bfloat16 or float16"):
            ops.embedding(torch.zeros(2, dtype=torch.int64), packed, dtype)


def test_packed_weight_that_lies_about_itself():
    """Fields that disagree with the tensors reach the operator's checks, never its loops."""
    packed = pack(quantized(45, 172, 64))
    for changes in ({"n": 65}, {"n": 32}, {"k": 193}, {"k": 160}, {"group_size": 32}, {"group_size": -1}, {"n": 2**40}):
        lying = PackedWeight(**{**vars(packed), **changes})
        for call in (
            lambda w=lying: ops.dequantize(w),
            lambda w=lying: ops.embedding(torch.zeros(1, dtype=torch.int64), w, torch.float32),
            lambda w=lying: ops.linear(torch.zeros(1, w.k), w),
        ):
            with pytest.raises(RuntimeError, match=r"cpullm::.* (codes|scales|n) must"):
                call()
