"""Recipes on single weights: error of the layer's output, forms, agreement with plain references, bad inputs."""

import pytest
import torch

from torch_cpullm.packing import dequantize
from torch_cpullm.quant import (
    Statistics,
    awq_scales,
    output_error,
    quantize_clip,
    quantize_gptq,
    quantize_hqq,
    quantize_rtn,
    quantize_signround,
    refine,
    teq_scales,
)
from torch_cpullm.quant.gptq import inverse_factor, order_by_group
from torch_cpullm.quant.groups import fit_groups

FORMS = [("none", 32), ("point", 32), ("point", 64), ("minimum", 64), ("point", -1)]
every_form = pytest.mark.parametrize(("zeros", "group"), FORMS)


def layer(tails=False, n=40, k=144, rows=600, seed=0):
    """(W [n, k], x [rows, k]): correlated inputs of unequal size; tails: with a few very large ones."""
    torch.manual_seed(seed)
    mix = torch.eye(k) + 0.2 * torch.randn(k, k)
    x = torch.randn(rows, k) @ (mix * (0.2 + torch.rand(k)))
    if tails:
        x = x * torch.where(torch.rand(k) < 0.05, 20.0, 1.0)
        x = x + 0.1 * torch.distributions.StudentT(2.0).sample(x.shape).clamp(-1000, 1000)
    return 0.1 * torch.randn(n, k), x


def error_of(quantized, weight, statistics):
    return output_error(dequantize(quantized) - weight, statistics)


@pytest.mark.parametrize("tails", [False, True], ids=["random", "heavy tails"])
@every_form
def test_no_recipe_is_worse_than_round_to_nearest(tails, zeros, group):
    weight, x = layer(tails)
    statistics = Statistics.empty(weight.shape[1]).with_rows(x)
    # Of the minimum form RTN has none; zero points of the same group are its nearest kin.
    plain = error_of(quantize_rtn(weight, 4, group, zeros == "none"), weight, statistics)
    clip = error_of(quantize_clip(weight, statistics, 4, group, zeros), weight, statistics)
    found = quantize_gptq(weight, statistics, 4, group, zeros)
    gptq = error_of(found, weight, statistics)
    refined = error_of(refine(weight, found, statistics, 2), weight, statistics)
    assert clip <= plain
    assert error_of(quantize_signround(weight, statistics, 4, group, zeros), weight, statistics) < clip
    assert gptq < 0.9 * plain
    assert refined < gptq
    scales = awq_scales([weight], statistics, 4, group, zeros)
    awq = dequantize(quantize_rtn(weight * scales, 4, group, zeros == "none")) / scales - weight
    assert output_error(awq, statistics) <= plain * 1.0001


@every_form
def test_hqq_lowers_the_norm_that_it_minimises(zeros, group):
    weight, _ = layer()

    def norm(quantized):
        return float((dequantize(quantized) - weight).abs().pow(0.7).sum())

    assert norm(quantize_hqq(weight, 4, group, zeros)) <= 1.02 * norm(quantize_rtn(weight, 4, group, zeros == "none"))


def test_teq_is_no_worse_than_the_scales_it_starts_from():
    weight, x = layer(tails=True)
    statistics = Statistics.empty(weight.shape[1]).with_rows(x)

    def full_range(scales):
        q = quantize_rtn(weight * scales, 4, 32, False, clip_search=False)
        return output_error(dequantize(q) / scales - weight, statistics)

    assert full_range(teq_scales([weight], statistics)) <= 1.02 * full_range(awq_scales([weight], statistics))


def test_gptq_is_the_plain_algorithm():
    """Against the same in float64, one input after another, no blocks, H's inverse updated by elimination."""
    weight, x = layer(n=8, k=160)
    statistics = Statistics.empty(160).with_rows(x)
    got = quantize_gptq(weight, statistics, 4, 32, "point")
    order = order_by_group(statistics.second.diagonal(), 32)
    hessian = statistics.second.double()
    hessian = hessian + torch.eye(160) * 0.01 * hessian.diagonal().mean()
    w, codes = weight.double().clone(), torch.zeros(8, 160)
    left = order.tolist()
    while left:
        inverse = hessian[left][:, left].inverse()
        j, g = left[0], left[0] // 32
        s, z = (t[:, g].double() for t in (got.scales, got.zeros))
        codes[:, j] = (w[:, j] / s + z).round().clamp(0, 15)
        error = (w[:, j] - s * (codes[:, j] - z)) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    same = (got.codes == codes).float().mean()
    assert same > 0.99  # rounding of float32 decides a few ties, and what follows them


def test_a_group_is_finished_before_the_next_begins():
    order = order_by_group(torch.rand(144, generator=torch.Generator().manual_seed(0)), 32)
    assert sorted(order.tolist()) == list(range(144))
    groups = torch.unique_consecutive(order // 32)
    assert len(groups) == 5


def test_factor_is_of_the_inverse():
    _, x = layer(k=96)
    second = Statistics.empty(96).with_rows(x).second
    upper = inverse_factor(second, 0.01)
    damped = second + torch.eye(96) * 0.01 * second.diagonal().mean()
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(96), atol=2e-3, rtol=0)


@every_form
def test_a_dead_channel_and_a_singular_hessian(zeros, group):
    weight, x = layer()
    x = x[:20].clone()  # rank 20 of 144
    x[:, [3, 77]] = 0
    statistics = Statistics.empty(weight.shape[1]).with_rows(x)
    found = refine(weight, quantize_gptq(weight, statistics, 4, group, zeros), statistics)
    assert error_of(found, weight, statistics) < error_of(quantize_rtn(weight, 4, group), weight, statistics)
    assert torch.isfinite(dequantize(found)).all()
    assert torch.isfinite(awq_scales([weight], statistics, 4, group, zeros)).all()


@pytest.mark.parametrize("zeros", ["none", "point", "minimum"])
def test_levels_of_constant_and_zero_groups(zeros):
    w = torch.stack([torch.zeros(32), torch.full((32,), 0.37), torch.full((32,), -2.0)])
    scale, zero = fit_groups(w, torch.ones(()), 4, zeros, torch.float16)
    quantized = quantize_hqq(w, 4, 32, zeros)
    assert torch.isfinite(scale).all()
    assert torch.isfinite(zero).all()
    torch.testing.assert_close(dequantize(quantized), w, atol=2e-3, rtol=2e-3)


def test_statistics_add_up():
    _, x = layer(k=64)
    whole = Statistics.empty(64).with_rows(x)
    parts = Statistics.empty(64).with_rows(x[:100]).with_rows(x[100:350]).with_rows(x[350:]).with_rows(x[:0])
    assert parts.rows == whole.rows == len(x)
    torch.testing.assert_close(parts.second, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts.magnitude, whole.magnitude)
    scales = torch.rand(64) + 0.5
    torch.testing.assert_close(whole.divided(scales).second, Statistics.empty(64).with_rows(x / scales).second)


def test_bad_input():
    weight, x = layer(k=64)
    statistics = Statistics.empty(64).with_rows(x)
    with pytest.raises(ValueError, match="inputs hold NaN or inf"):
        statistics.with_rows(torch.full((2, 64), torch.nan))
    with pytest.raises(ValueError, match=r"statistics must be of 144 inputs, got \[64, 64\]"):
        quantize_gptq(torch.randn(4, 144), statistics)
    with pytest.raises(ValueError, match="at least one row"):
        quantize_clip(weight, Statistics.empty(64))
    with pytest.raises(ValueError, match="weight must be finite"):
        quantize_gptq(weight.index_fill(0, torch.tensor([1]), torch.inf), statistics)
    with pytest.raises(ValueError, match="zeros must be one of none, point, minimum, and none for 8 bits, got 'point'"):
        quantize_hqq(weight, 8, 32, "point")
    with pytest.raises(ValueError, match="damping must lie between 0 and 1, got 0"):
        quantize_gptq(weight, statistics, damping=0)
    with pytest.raises(ValueError, match="scale_dtype must be float16 or bfloat16"):
        quantize_clip(weight, statistics, scale_dtype=torch.float32)
    with pytest.raises(ValueError, match="scale overflows"):
        quantize_gptq(weight * 1e7, statistics)
    damaged = Statistics(-statistics.second, statistics.magnitude, 5)
    with pytest.raises(ValueError, match="statistics are damaged"):
        quantize_gptq(weight, damaged)
