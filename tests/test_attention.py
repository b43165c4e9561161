"""decode_attention against a float64 softmax, on every level."""

import importlib
import inspect
import math

import pytest
import torch

import torch_cpullm
from torch_cpullm import attention, ops
from torch_cpullm.attention import attention_forward

# (batch, heads, kv heads, cache length, head dim): GQA, MQA, MHA; lengths and widths around the vectors' 8 and 16.
SHAPES = [
    (1, 4, 2, 1, 64),
    (2, 6, 3, 15, 64),
    (1, 8, 1, 16, 80),
    (2, 4, 4, 17, 40),
    (1, 2, 1, 300, 128),
    (3, 9, 3, 33, 7),
]


def expected(q, k, v, mask, scale):
    """The definition in float64, rounded once."""
    k, v = (t.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = q.double() @ k.transpose(2, 3) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    return (scores.softmax(-1) @ v).transpose(1, 2)


def inputs(shape, dtype, seed=0):
    b, h, g, t, d = shape
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(b, 1, h, d, generator=generator).transpose(1, 2).to(dtype)  # strided as transformers gives it
    k, v = (torch.randn(b, g, t + 3, d, generator=generator).to(dtype)[:, :, :t] for _ in range(2))
    return q, k, v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape, dtype, isa):
    q, k, v = inputs(shape, dtype)
    b, h, _, t, _ = shape
    keep = torch.rand(b, 1, 1, t, generator=torch.Generator().manual_seed(1)) < 0.7
    keep[..., -1] = True
    added = torch.randn(1, h, 1, t, generator=torch.Generator().manual_seed(2)).to(dtype)
    eps = torch.finfo(dtype).eps
    for mask in (None, keep, added, torch.where(keep, 0.0, -math.inf).expand(b, 1, 1, t)):
        for scale in (0.125, 3.0):
            got = ops.decode_attention(q, k, v, mask, scale)
            want = expected(q, k, v, mask, scale)
            assert (got.shape, got.dtype) == (want.shape, dtype)
            # the result is an average of v: its rounding, and scores of magnitude |q| |k| scale off by a few eps of
            # fp32
            off = 2.0**-20 * (1 + scale * 12 * shape[4] ** 0.5)
            assert bool(((got.double() - want).abs() <= (off + eps) * v.double().abs().max()).all())


def test_nan_stays_visible_and_masked_rows_are_zero(isa):
    q, k, v = inputs((2, 2, 1, 20, 32), torch.float32)
    k[1, 0, 3, 5] = math.nan
    got = ops.decode_attention(q, k, v, None, 1.0)
    assert not got[0].isnan().any()
    assert got[1].isnan().all()
    nothing = torch.zeros(2, 1, 1, 20, dtype=torch.bool)
    assert ops.decode_attention(*inputs((2, 2, 1, 20, 32), torch.float32), nothing, 1.0).eq(0).all()


def test_a_row_masked_by_the_least_number_is_finite(isa):
    """A float mask with finfo.min everywhere shifts all scores alike: an average, not nan."""
    q, k, v = inputs((1, 2, 1, 20, 32), torch.float32)
    least = torch.full((1, 1, 1, 20), torch.finfo(torch.float32).min)
    got = ops.decode_attention(q, k, v, least, 1.0)
    assert torch.allclose(got, v.mean(2).expand(1, 2, 32)[:, None], atol=1e-5)
    least[..., 7] = 0
    assert torch.allclose(ops.decode_attention(q, k, v, least, 1.0)[0, 0, 1], v[0, 0, 7], atol=1e-6)


def test_threads_do_not_change_a_bit(isa):
    q, k, v = inputs((4, 8, 2, 700, 64), torch.float32)
    two = ops.decode_attention(q, k, v, None, 0.1)
    torch.set_num_threads(1)
    assert torch.equal(two, ops.decode_attention(q, k, v, None, 0.1))


def test_wrong_arguments():
    q, k, v = inputs((2, 4, 2, 9, 16), torch.float32)
    with pytest.raises(RuntimeError, match="q must hold one token"):
        ops.decode_attention(q.expand(2, 4, 3, 16).contiguous(), k, v, None, 1.0)
    for bad in (k[:1], k[..., :8], k[:, :, :0]):
        with pytest.raises(RuntimeError, match="cpullm::decode_attention"):
            ops.decode_attention(q, bad, v, None, 1.0)
    with pytest.raises(RuntimeError, match="v must have k's shape"):
        ops.decode_attention(q, k, v[:, :, :8], None, 1.0)
    with pytest.raises(RuntimeError, match="one dtype"):
        ops.decode_attention(q, k, v.bfloat16(), None, 1.0)
    with pytest.raises(RuntimeError, match="heads must be a multiple"):
        ops.decode_attention(q[:, :3], k, v, None, 1.0)
    wrong = (
        torch.ones(2, 1, 1, 8, dtype=torch.bool),
        torch.ones(3, 1, 1, 9),
        torch.ones(2, 9),
        torch.ones(2, 1, 1, 9).int(),
    )
    for bad in wrong:
        with pytest.raises(RuntimeError, match="mask"):
            ops.decode_attention(q, k, v, bad, 1.0)
    with pytest.raises(RuntimeError, match="unit stride"):
        ops.decode_attention(q, k.transpose(2, 3).contiguous().transpose(2, 3), v, None, 1.0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_opcheck():
    q, k, v = inputs((2, 4, 2, 9, 16), torch.bfloat16)
    for mask in (None, torch.ones(2, 1, 1, 9, dtype=torch.bool)):
        torch.library.opcheck(torch.ops.cpullm.decode_attention.default, (q, k, v, mask, 0.25))


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


def test_anything_but_one_token_is_sdpa():
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, 2
    q, k, v = inputs((1, 4, 2, 5, 16), torch.float32)
    prompt = torch.randn(1, 4, 5, 16)
    got, _ = attention_forward(module, prompt, k, v, None, scaling=0.25)
    want = torch.nn.functional.scaled_dot_product_attention(prompt, k, v, is_causal=True, scale=0.25, enable_gqa=True)
    assert torch.allclose(got, want.transpose(1, 2), atol=1e-6)
    got, _ = attention_forward(module, q, k, v, None, scaling=0.25)
    assert torch.allclose(got.double(), expected(q, k, v, None, 0.25), atol=1e-6)


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
