"""attention against a float64 softmax, on every level, and the attention implementation of transformers."""

import functools
import importlib
import inspect
import math
from pathlib import Path

import pytest
import torch
from layer_models import ALL

import torch_cpullm
from torch_cpullm import attention, ops
from torch_cpullm.attention import attention_forward

# (batch, heads, kv heads, queries, keys, head dim). Rows of a kv head: 1 to 4 (avx512: 8) are read directly, up to 24
# make one block, up to 96 several, more make blocks of 96 over the whole length. Keys: a block is 64, a split 256.
SHAPES = [
    (1, 4, 2, 1, 1, 64),
    (2, 6, 3, 1, 15, 64),  # 2 rows
    (1, 8, 1, 1, 65, 80),  # MQA, 8 rows
    (2, 4, 4, 1, 257, 40),  # MHA, 2 splits
    (1, 71, 1, 1, 300, 64),  # 3 blocks of rows, 2 splits
    (1, 3, 1, 1, 700, 128),  # 3 rows
    (2, 10, 2, 1, 70, 52),  # 5 rows: 3 and 2; parts of vectors on every level
    (1, 7, 1, 1, 300, 112),  # 7 rows: 4 and 3
    (1, 4, 1, 1, 513, 256),  # 4 rows, a split of one key
    (2, 7, 1, 1, 299, 32),  # 7 rows of one pair of vectors, an odd number of keys
    (3, 9, 3, 2, 33, 7),  # no multiple of a vector or of 4
    (1, 2, 1, 13, 13, 16),  # 26 rows: no multiple of a tile
    (1, 2, 2, 5, 300, 96),  # earlier cache
    (1, 9, 3, 40, 40, 64),  # 120 rows
    (1, 4, 4, 130, 130, 80),
    (2, 2, 1, 130, 200, 128),
]
OPTIONS = ["plain", "window", "softcap", "sinks", "bool", "rows", "float", "both"]


def options(name, shape, dtype, seed=3):
    """Keyword arguments of a case."""
    b, h, _, s, t, _ = shape
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(b, 1, s, t, generator=generator) < 0.6
    keep[..., 0] = True
    sinks = torch.randn(h, generator=generator)
    return {
        "plain": {},
        "window": {"window": 9},
        "softcap": {"softcap": 2.0},
        "sinks": {"sinks": sinks},
        "bool": {"mask": keep},
        "rows": {"mask": keep[:, :, :1]},  # one for all queries
        "float": {"mask": torch.randn(1, h, s, t, generator=generator).to(dtype)},
        "both": {"mask": torch.where(keep, 0.0, -math.inf).expand(b, h, s, t), "sinks": sinks, "softcap": 5.0},
    }[name]


def expected(q, k, v, mask=None, *, scale, softcap=0.0, window=0, sinks=None):
    """The definition in float64, rounded once."""
    b, h, s, _ = q.shape
    t = k.shape[2]
    k, v = (x.double().repeat_interleave(h // k.shape[1], 1) for x in (k, v))
    scores = q.double() @ k.transpose(2, 3) * scale
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    if mask is None:
        at, key = torch.arange(t - s, t)[:, None], torch.arange(t)
        mask = (key <= at) & ((key > at - window) if window else True)
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(1, h, 1, 1).expand(b, h, s, 1)], -1)
    return (scores.softmax(-1).nan_to_num(0.0)[..., :t] @ v).transpose(1, 2)


def inputs(shape, dtype, seed=0):
    b, h, g, s, t, d = shape
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(b, s, h, d, generator=generator).transpose(1, 2).to(dtype)  # strided as transformers gives it
    k, v = (torch.randn(b, g, t + 3, d, generator=generator).to(dtype)[:, :, :t] for _ in range(2))
    return q, k, v


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, option, isa):
    q, k, v = inputs(shape, torch.float32)
    given = options(option, shape, torch.float32)
    for scale in (0.125, 1.0):
        got = ops.attention(q, k, v, scale=scale, **given)
        want = expected(q, k, v, scale=scale, **given)
        assert (got.shape, got.dtype) == (want.shape, torch.float32)
        # An average of v; scores of magnitude |q| |k| scale are off by a few eps of float32.
        off = 2.0**-21 * (1 + scale * 6 * shape[5] ** 0.5)
        assert bool(((got - want).abs() <= off * v.abs().max()).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES[1:12], ids=str)
def test_16_bit_tensors(shape, dtype, isa):
    """Queries, caches and masks are read exactly; only the result is rounded."""
    q, k, v = inputs(shape, dtype)
    for option in ("plain", "float"):
        given = options(option, shape, dtype)
        got = ops.attention(q, k, v, scale=0.25, **given)
        want = expected(q, k, v, scale=0.25, **given)
        assert got.dtype == dtype
        bound = (torch.finfo(dtype).eps / 2 + 1e-5) * v.abs().max().double()
        assert bool(((got.double() - want).abs() <= bound).all())
    mixed = ops.attention(q.float(), k, v, scale=0.25)
    assert torch.allclose(mixed.double(), expected(q, k, v, scale=0.25), atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_cache(shape, isa):
    """Attention over the codes and scales is attention over their products."""
    q, k, v = inputs(shape, torch.float32)
    b, _, g, _, t, d = shape
    codes = [torch.full((b, g, t + 5, d), 77, dtype=torch.int8) for _ in range(2)]
    scales = [torch.full((b, g, t + 5), math.nan) for _ in range(2)]  # nothing beyond the length is read
    for x, code, scale in zip((k, v), codes, scales, strict=True):
        ops.cache_append(x.transpose(1, 2).contiguous(), code, scale, 0)
    exact = [code[:, :, :t].double() * scale[:, :, :t, None] for code, scale in zip(codes, scales, strict=True)]
    for x, value in zip((k, v), exact, strict=True):
        assert bool(((x - value).abs() <= x.abs().amax(-1, keepdim=True) / 253).all())
    for option in ("plain", "window", "bool", "both"):
        given = options(option, shape, torch.float32)
        got = ops.attention(q, *codes, scale=0.3, k_scale=scales[0], v_scale=scales[1], length=t, **given)
        assert torch.allclose(got.double(), expected(q, *exact, scale=0.3, **given), atol=4e-5)


@pytest.mark.parametrize("cache", ["bf16", "i8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_queries_and_probabilities_may_be_rounded(shape, cache, isa):
    """Not exact: scaled queries, then probabilities, are rounded to bf16; one or two rows and other levels are exact.

    With such queries, what probabilities' rounding by 2^-9 can do: 2^-9 sum p |v|; as much again for the rest. Three to
    eight rows over codes are rounded less: see test_attention_codes.
    """
    rounds = isa in ("avx512", "amx") and "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    q, k, v = inputs(shape, torch.float32)
    b, h, g, s, t, d = shape
    dtype, scales = torch.bfloat16, [None, None]
    if cache == "i8":
        dtype, scales = torch.int8, [torch.full((b, g, t + 1), math.nan) for _ in range(2)]
    caches = [torch.full((b, g, t + 1, d), 77, dtype=dtype) for _ in range(2)]
    for x, into, into_scale in zip((k, v), caches, scales, strict=True):
        ops.cache_append(x.transpose(1, 2).contiguous(), into, into_scale, 0)
    k, v = (x[:, :, :t].double() for x in caches)
    if cache == "i8":
        k, v = (x * scale[:, :, :t, None] for x, scale in zip((k, v), scales, strict=True))
    for option in OPTIONS:
        given = options(option, shape, torch.float32)
        call = functools.partial(ops.attention, q, *caches, scale=0.3, length=t, **given)
        got, exact = (call(k_scale=scales[0], v_scale=scales[1], exact=exact) for exact in (False, True))
        rows = h // g * s
        if not rounds or rows <= 2 or (rows <= 8 and d % (64 if cache == "i8" else 32)):
            assert torch.equal(got, exact)
            continue
        if cache == "i8" and rows <= 8:
            assert not torch.equal(got, exact)
            continue
        rounded = functools.partial(expected, (q * 0.3).to(torch.bfloat16), k, scale=1.0, **given)
        assert bool(((got - rounded(v)).abs() <= 2.0**-8 * rounded(v.abs()) + 1e-6).all())
        assert not torch.equal(got, exact)


def test_rounded_rows_do_not_depend_on_their_neighbours(isa):
    """A row of a tile, of another tile and of another batch: the same bits."""
    q, k, v = (x.to(torch.bfloat16) for x in inputs((1, 3, 1, 40, 90, 64), torch.float32))
    one = functools.partial(ops.attention, scale=0.125, exact=False)
    whole = one(q.float(), k, v)
    both = one(*(torch.cat([x, x]) for x in (q.float(), k, v)))
    assert torch.equal(both, torch.cat([whole, whole]))
    for first in (7, 25):  # the queries from here on
        assert torch.equal(one(q[:, :, first:].float(), k, v), whole[:, first:])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rounded_rows_show_what_is_not_finite(bad, isa):
    """A query that is not finite gives nan in its row and nowhere else; so does a value, to the rows that see it."""
    q, k, v = inputs((1, 2, 1, 64, 64, 32), torch.float32)
    k, v = k.to(torch.bfloat16), v.to(torch.bfloat16)
    q = q.contiguous()
    q[0, 1, 20, 3] = bad
    got = ops.attention(q, k, v, scale=0.2, exact=False)
    assert bool(got[0, 20, 1].isnan().all())
    got[0, 20, 1] = 0.0
    assert bool(got.isfinite().all())
    v[0, 0, 30, 5] = bad
    got = ops.attention(q, k, v, scale=0.2, exact=False)
    assert not bool(got[0, 40:, :, 5].isfinite().any())
    assert bool(got[0, 40:, :, 6].isfinite().all())


@pytest.mark.parametrize("rows", [3, 4, 8])
def test_few_rounded_rows_read_no_key_that_none_sees(rows, isa):
    """Pairs of keys begin before the window and end behind the length, in what is not a number."""
    q, k, v = inputs((1, rows, 1, 1, 300, 96), torch.float32)
    k, v = (x.to(torch.bfloat16) for x in (k, v))
    for x in (k, v):
        x[:, :, 291:] = math.nan
        x[:, :, :286] = math.nan
    one = functools.partial(ops.attention, q, scale=0.2, exact=False)
    got = one(k, v, length=291, window=5)
    assert bool(got.isfinite().all())
    assert torch.allclose(got.double(), expected(q, k[:, :, 286:291], v[:, :, 286:291], scale=0.2), atol=2e-2)
    v[0, 0, 288, 5] = math.inf
    got = one(k, v, length=291, window=5)
    assert not bool(got[..., 5].isfinite().any())
    assert bool(got[..., 6].isfinite().all())


@pytest.mark.parametrize("layout", ["[b, t, g, d]", "expanded", "capacity"])
def test_strides(layout, isa):
    for shape in ((2, 6, 2, 1, 70, 64), (2, 6, 2, 40, 70, 24)):
        b, _, g, _, t, d = shape
        q, k, v = inputs(shape, torch.float32)
        length = None
        if layout == "[b, t, g, d]":
            k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
        elif layout == "expanded":
            k, v = (x[:1, :1].expand(b, g, t, d) for x in (k, v))
            q = q[:, :, :1].expand_as(q)
        else:
            k, v = (torch.cat([x, torch.full((b, g, 60, d), math.nan)], 2) for x in (k, v))
            length = t
        want = expected(q, k[:, :, :t], v[:, :, :t], scale=0.2)
        assert torch.allclose(ops.attention(q, k, v, scale=0.2, length=length).double(), want, atol=1e-5)
        mask = torch.rand(b, 1, t, shape[3]).transpose(2, 3)  # its last stride is not one
        got = ops.attention(q, k[:, :, :t], v[:, :, :t], mask, scale=0.2)
        assert torch.allclose(got.double(), expected(q, k[:, :, :t], v[:, :, :t], mask, scale=0.2), atol=1e-5)


def test_left_padding_equals_no_padding(isa):
    q, k, v = inputs((1, 6, 2, 20, 20, 64), torch.float32)
    pad = 11
    padded = [torch.cat([torch.randn(1, x.shape[1], pad, 64), x], 2) for x in (q, k, v)]
    mask = torch.ones(pad + 20, pad + 20, dtype=torch.bool).tril()
    mask[:, :pad] = False
    got = ops.attention(*padded, mask[None, None], scale=0.125)
    assert torch.allclose(got[:, pad:], ops.attention(q, k, v, scale=0.125), atol=1e-6)
    assert got[:, :pad].eq(0).all()  # queries that see nothing


@pytest.mark.parametrize("queries", [1, 40])
def test_rows_without_keys_are_as_in_sdpa(queries, isa):
    q, k, v = inputs((2, 4, 2, queries, 300, 32), torch.float32)
    nothing = torch.zeros(2, 1, queries, 300, dtype=torch.bool)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    for mask in (nothing, torch.full((1, 1, queries, 300), -math.inf)):
        assert sdpa(q, k, v, mask, enable_gqa=True).eq(0).all()
        assert ops.attention(q, k, v, mask, scale=1.0).eq(0).all()
        assert ops.attention(q, k, v, mask, scale=1.0, sinks=torch.zeros(4)).eq(0).all()


@pytest.mark.parametrize("queries", [1, 40])
def test_nan_and_inf_stay_visible(queries, isa):
    q, k, v = inputs((2, 4, 2, queries, 300, 32), torch.float32)
    k[1, 0, 3, 5] = math.nan
    got = ops.attention(q, k, v, scale=1.0)
    assert not got[0].isnan().any()
    assert got[1, :, :2].isnan().all()
    assert not got[1, :, 2:].isnan().any()
    assert not ops.attention(q, k, v, scale=1.0, window=9)[:, -1:].isnan().any()
    k[1, 0, 3, 5] = 0.0
    v[1, 0, 3, 5] = math.inf
    got = ops.attention(q, k, v, scale=1.0)
    assert not got[..., 5][1, :, :2].isfinite().any()
    assert got[..., :5].isfinite().all()


@pytest.mark.parametrize("queries", [1, 40])
def test_a_row_masked_by_the_least_number_is_finite(queries, isa):
    """A float mask with finfo.min everywhere shifts all scores alike: an average, not nan."""
    q, k, v = inputs((1, 2, 1, queries, 300, 32), torch.float32)
    least = torch.full((1, 1, queries, 300), torch.finfo(torch.float32).min)
    got = ops.attention(q, k, v, least, scale=1.0)
    assert torch.allclose(got, v.mean(2)[:, :, None].expand_as(got), atol=1e-5)
    least[..., 7] = 0
    assert torch.allclose(ops.attention(q, k, v, least, scale=1.0)[0, 0, 1], v[0, 0, 7], atol=1e-6)


def test_large_scores(isa):
    """The softmax is one of differences: scores of 1e4 are no trouble."""
    q, k, v = inputs((1, 2, 1, 40, 300, 64), torch.float32)
    got = ops.attention(q * 100, k, v, scale=2.0)
    want = expected(q * 100, k, v, scale=2.0)
    assert bool(((got - want).abs().amax((0, 2, 3)) < 0.05).all())
    assert torch.allclose(
        ops.attention(q * 100, k, v, scale=2.0, softcap=30.0).double(),
        expected(q * 100, k, v, scale=2.0, softcap=30.0),
        atol=1e-3,
    )


@pytest.mark.parametrize("shape", [(4, 8, 2, 1, 700, 64), (1, 3, 1, 200, 300, 64), (1, 8, 2, 9, 1000, 32)], ids=str)
def test_threads_do_not_change_a_bit(shape, isa):
    q, k, v = inputs(shape, torch.float32)
    two = ops.attention(q, k, v, scale=0.1)
    torch.set_num_threads(1)
    assert torch.equal(two, ops.attention(q, k, v, scale=0.1))


def test_a_sequence_does_not_depend_on_its_batch(isa):
    for queries in (1, 40):
        q, k, v = inputs((3, 4, 2, queries, 300, 64), torch.float32)
        together = ops.attention(q, k, v, scale=0.1)
        for i in range(3):
            one = slice(i, i + 1)
            assert torch.equal(together[one], ops.attention(q[one], k[one], v[one], scale=0.1))


def test_wrong_arguments():
    q, k, v = inputs((2, 4, 2, 1, 9, 16), torch.float32)
    attend = functools.partial(ops.attention, scale=1.0)
    for bad in (k[:1], k[..., :8], k[:, :, :0]):
        with pytest.raises(RuntimeError, match="cpullm::attention"):
            attend(q, bad, v)
    with pytest.raises(RuntimeError, match="v must have k's shape"):
        attend(q, k, v[:, :, :8])
    with pytest.raises(RuntimeError, match="one dtype"):
        attend(q, k, v.bfloat16())
    with pytest.raises(RuntimeError, match="q must be float32, bfloat16 or float16"):
        attend(q.double(), k, v)
    with pytest.raises(RuntimeError, match="heads must be a multiple"):
        attend(q[:, :3], k, v)
    with pytest.raises(RuntimeError, match="at most length = 9 tokens"):
        attend(torch.randn(2, 4, 10, 16), k, v)
    for length in (0, 10, -1):
        with pytest.raises(RuntimeError, match=r"length must be in \[1, 9\]"):
            attend(q, k, v, length=length)
    with pytest.raises(RuntimeError, match="window must not be negative"):
        attend(q, k, v, window=-1)
    with pytest.raises(RuntimeError, match="softcap must not be negative"):
        attend(q, k, v, softcap=-1.0)
    for sinks in (torch.zeros(3), torch.zeros(4, dtype=torch.bfloat16), torch.zeros(8)[::2]):
        with pytest.raises(RuntimeError, match="sinks must be a contiguous float32"):
            attend(q, k, v, sinks=sinks)
    wrong = (
        torch.ones(2, 1, 1, 8, dtype=torch.bool),
        torch.ones(3, 1, 1, 9),
        torch.ones(2, 1, 2, 9),
        torch.ones(2, 9),
        torch.ones(2, 1, 1, 9).int(),
    )
    for bad in wrong:
        with pytest.raises(RuntimeError, match="mask"):
            attend(q, k, v, bad)
    with pytest.raises(RuntimeError, match="unit stride"):
        attend(q, k.transpose(2, 3).contiguous().transpose(2, 3), v)
    with pytest.raises(RuntimeError, match="are for an int8 cache"):
        attend(q, k, v, k_scale=torch.ones(2, 2, 9))
    codes = k.to(torch.int8)
    with pytest.raises(RuntimeError, match="an int8 cache needs k_scale"):
        attend(q, codes, codes)
    for scale in (torch.ones(2, 2, 8), torch.ones(2, 2, 9, dtype=torch.float16), torch.ones(2, 2, 9, 1)):
        with pytest.raises(RuntimeError, match="v_scale must be a float32 CPU tensor of shape"):
            attend(q, codes, codes, k_scale=torch.ones(2, 2, 9), v_scale=scale)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_opcheck():
    q, k, v = inputs((2, 4, 2, 3, 9, 16), torch.bfloat16)
    for mask in (None, torch.ones(2, 1, 3, 9, dtype=torch.bool)):
        arguments = (q, k, v, mask, 0.25, 0.0, 0, torch.zeros(4), None, None, None)
        torch.library.opcheck(torch.ops.cpullm.attention.default, arguments)


def tiny_llama(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 99,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, **options))


def test_models_switch_from_sdpa_and_back():
    model = tiny_llama()
    before = model.config._attn_implementation
    torch_cpullm.optimize(model)
    assert (before, model.config._attn_implementation) == ("sdpa", "cpullm")
    torch_cpullm.restore(model)
    assert model.config._attn_implementation == "sdpa"


def causal_module(is_causal=True):
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = is_causal, 2
    return module


@pytest.fixture
def count(monkeypatch):
    """Calls of the operator."""
    calls = []
    real = ops.attention
    monkeypatch.setattr(ops, "attention", lambda *a, **kw: calls.append(kw) or real(*a, **kw))
    return calls


@pytest.mark.parametrize("queries", [1, 5])
def test_the_interface_is_sdpa_where_both_can(queries, count):
    q, k, v = inputs((2, 4, 2, queries, 9, 16), torch.float32)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    keep = torch.rand(2, 1, queries, 9) < 0.7
    keep[..., 0] = True
    for mask in (keep, torch.randn(1, 1, queries, 9)):
        got, _ = attention_forward(causal_module(), q, k, v, mask, scaling=0.25, sliding_window=3)
        want = sdpa(q, k, v, mask, scale=0.25, enable_gqa=True).transpose(1, 2)
        assert torch.allclose(got, want, atol=1e-6)
    got, _ = attention_forward(causal_module(), q, k[:, :, :queries], v[:, :, :queries], None, is_causal=None)
    want = sdpa(q, k[:, :, :queries], v[:, :, :queries], is_causal=True, enable_gqa=True).transpose(1, 2)
    assert torch.allclose(got, want, atol=1e-6)
    assert len(count) == 3


def test_first_prompt_of_a_static_cache(count):
    """No mask and more keys than queries: what follows the prompt is not there yet."""
    q, k, v = inputs((1, 4, 2, 5, 9, 16), torch.float32)
    got, _ = attention_forward(causal_module(), q, k, v, None)
    assert torch.allclose(got.double(), expected(q, k[:, :, :5], v[:, :, :5], scale=0.25), atol=1e-6)
    one, _ = attention_forward(causal_module(), q[:, :, :1], k, v, None)
    assert torch.allclose(one.double(), expected(q[:, :, :1], k, v, scale=0.25), atol=1e-6)
    assert len(count) == 2


def test_softcap_window_and_sinks_of_the_interface(count):
    q, k, v = inputs((1, 4, 2, 9, 9, 16), torch.bfloat16)
    given = {"softcap": 2.0, "sliding_window": 4, "s_aux": torch.randn(4, dtype=torch.bfloat16)}
    got, _ = attention_forward(causal_module(), q, k, v, None, scaling=0.5, **given)
    want = expected(q, k, v, scale=0.5, softcap=2.0, window=4, sinks=given["s_aux"])
    assert torch.allclose(got.double(), want, atol=2e-2)
    assert len(count) == 1


def test_what_the_kernel_does_not_know_is_sdpa(count):
    q, k, v = inputs((1, 4, 2, 5, 5, 16), torch.float32)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    got, _ = attention_forward(causal_module(is_causal=False), q, k, v, None, scaling=0.25)
    assert torch.allclose(got, sdpa(q, k, v, scale=0.25, enable_gqa=True).transpose(1, 2), atol=1e-6)
    bias = torch.randn(1, 4, 5, 5)
    attention_forward(causal_module(), q, k, v, None, position_bias=bias)
    attention_forward(causal_module(), q, k, v, None, dropout=0.5)
    attention_forward(causal_module(), q, k, v, None, alibi=bias)
    attention_forward(causal_module(), q.requires_grad_(), k, v, None)
    attention_forward(causal_module(), *(x.detach().double() for x in (q, k, v)), None)
    assert count == []


def test_models_that_ask_for_the_name_keep_sdpa():
    """DeepSeek V3.2 builds its index mask only under the names "eager" and "sdpa"."""

    def asks(name):
        return attention._COMPARES_NAME.search(
            inspect.getsource(importlib.import_module(f"transformers.models.{name}"))
        )

    assert asks("deepseek_v32.modeling_deepseek_v32")
    assert asks("gemma4.modeling_gemma4")
    for name in ("llama", "qwen3", "gemma2", "gpt2", "mixtral", "gpt_neox"):
        assert not asks(f"{name}.modeling_{name}"), name


def test_a_part_with_eager_attention_keeps_the_whole_model_as_it_is():
    model = tiny_llama()
    model.tower = tiny_llama(attn_implementation="eager")
    torch_cpullm.optimize(model)
    assert (model.config._attn_implementation, model.tower.config._attn_implementation) == ("sdpa", "eager")
    torch_cpullm.restore(model)
    assert (model.config._attn_implementation, model.tower.config._attn_implementation) == ("sdpa", "eager")


def test_gpt2_runs_at_block_ops(count):
    """Its layers are no programs (cross-attention): attention is our kernel, every Conv1D a packed linear."""
    model = torch_cpullm.optimize(ALL["gpt2"].build())
    assert torch_cpullm.report(model).left_in_float == []
    with torch.no_grad():
        model.generate(torch.tensor([[5, 17, 3, 40]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert len(count) == 3 * model.config.n_layer
