"""Distillation of scales: nearer to the float model at the same size, in every form, and what is refused."""

import pytest
import torch
from families import FAMILIES
from small_models import llama
from test_layerwise import same, snapshot, tokens
from torch import nn

from torch_cpullm.checkpoint import Form
from torch_cpullm.config import Settings
from torch_cpullm.distil import _Linear, _Product, distil, quantize_model
from torch_cpullm.layerwise import Method, calibrate
from torch_cpullm.packing import dequantize, unpack
from torch_cpullm.quality import evaluate
from torch_cpullm.quant import quantize_hqq, quantize_rtn
from torch_cpullm.trial import apply, forms_of, settings_of, twin

FP32 = Settings(compute="fp32")
BY_NAME = {family.name: family for family in FAMILIES}


def kl(model, found, ids, settings=FP32):
    return evaluate(apply(twin(model), found, settings), ids.flatten(), window=ids.shape[1], reference=model).kl


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen2"])
def test_scales_learn_and_codes_stay(name):
    model = BY_NAME[name].build().eval()
    ids = tokens(model, 8, 24)
    forms = forms_of(model, FP32)
    before = snapshot(model)
    first = calibrate(model, ids, forms, Method("gptq"), progress=False)
    learnt = distil(model, first, ids, epochs=6, progress=False)
    # On what it learns from: random weights have nothing to say about other random tokens.
    assert kl(model, learnt, ids) < kl(model, first, ids)
    assert same(model, before)
    assert not any(parameter.grad is not None for parameter in model.parameters())
    for key, packed in first.packed.items():
        assert torch.equal(packed.codes, learnt.packed[key].codes)
        assert packed.nbytes == learnt.packed[key].nbytes
    again = quantize_model(model, ids, forms, Method("gptq", epochs=6), progress=False)
    assert all(torch.equal(again.packed[key].scales, value.scales) for key, value in learnt.packed.items())
    assert str(Method("gptq", epochs=6)) == "GPTQ + distilled x6"


@pytest.mark.parametrize(
    "quantized",
    [
        quantize_rtn(torch.randn(5, 72, generator=torch.Generator().manual_seed(0)), 4, 32),
        quantize_rtn(torch.randn(5, 72, generator=torch.Generator().manual_seed(1)), 4, 64, True),
        quantize_rtn(torch.randn(5, 72, generator=torch.Generator().manual_seed(2)), 8, -1, True),
        quantize_hqq(torch.randn(5, 72, generator=torch.Generator().manual_seed(3)), 4, 32, "minimum"),
    ],
    ids=["points", "symmetric", "eight", "minima"],
)
def test_the_product_and_its_gradients(quantized):
    """Against the dequantised weight, with a last group that is not whole, and autograd's own numbers."""
    generator = torch.Generator().manual_seed(9)
    linear = _Linear(quantized, torch.randn(5, generator=generator))
    x = torch.randn(2, 3, 72, generator=generator, requires_grad=True)
    torch.testing.assert_close(linear(x), nn.functional.linear(x, dequantize(quantized), linear.bias))
    assert torch.equal(linear.quantized().scales, quantized.scales)
    doubles = x.detach().double().requires_grad_()
    pad = nn.functional.pad(doubles, (0, linear.pad))
    scale = linear.scale().detach().double().requires_grad_()

    def product(a, s):
        return _Product.apply(a, linear.levels, s, None if linear.base is None else linear.base.double())

    y = product(pad, scale)
    y.square().sum().backward()
    by_scale, by_x = scale.grad.clone(), doubles.grad.clone()
    scale.grad = doubles.grad = None
    base = 0 if linear.base is None else linear.base.double()[..., None]
    weight = (linear.levels * scale[..., None] + base).flatten(1)
    (nn.functional.pad(doubles, (0, linear.pad)) @ weight.T).square().sum().backward()
    torch.testing.assert_close(by_scale, scale.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(by_x, doubles.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("zeros", ["none", "point", "minimum"])
def test_codes_learn_too(zeros):
    model = llama().eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # logits that differ, so that there is something to learn
    ids = tokens(model, 8, 24)
    forms = {
        name: Form(4, 32, zeros, "float16") if "layers" in name else form
        for name, form in forms_of(model, FP32).items()
    }
    forms["model.layers.0.mlp.down_proj"] = Form(8, 32, "none", "float16")
    first = calibrate(model, ids, forms, Method("gptq"), progress=False)
    settings = settings_of(model, forms, FP32)
    both = distil(model, first, ids, epochs=16, codes=True, code_rate=0.05, progress=False)
    assert kl(model, both, ids, settings) < 0.5 * kl(model, first, ids, settings)
    moved = set()
    for name, packed in first.packed.items():
        before, learnt = unpack(packed), unpack(both.packed[name])
        assert both.packed[name].nbytes == packed.nbytes
        if not torch.equal(learnt.codes, before.codes):
            moved.add(name)
        if learnt.zeros is not None:
            assert torch.equal(learnt.zeros, before.zeros)
    assert moved
    assert all("layers" in name for name in moved)


def test_rounding_counts_as_one_in_gradients():
    """Of levels that learn: what autograd says of scale * levels, where levels lie between codes and beyond them."""
    generator = torch.Generator().manual_seed(2)
    quantized = quantize_rtn(torch.randn(5, 72, generator=generator), 4, 32)
    linear = _Linear(quantized, None, codes=True)
    with torch.no_grad():
        linear.levels.add_(torch.rand(linear.levels.shape, generator=generator) - 0.5).mul_(2)
    x = torch.randn(3, 72, generator=generator)
    linear(x).square().sum().backward()
    weight = linear.levels.detach().round().requires_grad_()
    padded = nn.functional.pad(x, (0, linear.pad))
    (padded @ (weight * linear.scale().detach()[..., None]).flatten(1).T).square().sum().backward()
    torch.testing.assert_close(linear.levels.grad, weight.grad)
    linear.keep_in_range()
    found = linear.quantized()
    assert int(found.codes.max()) == 15
    assert int(found.codes.min()) == 0
    with torch.no_grad():
        torch.testing.assert_close(linear(x), x @ dequantize(found).T)


def test_folds_and_mixed_forms_stay():
    model = llama().eval()
    ids = tokens(model, 4, 16)
    forms = forms_of(model, FP32)
    forms["model.layers.0.mlp.down_proj"] = Form(8, 32, "none", "float16")
    first = calibrate(model, ids, forms, Method("gptq", "awq"), progress=False)
    learnt = distil(model, first, ids, epochs=2, progress=False)
    assert set(first.parameters) <= set(learnt.parameters)
    assert unpack(learnt.packed["model.layers.0.mlp.down_proj"]).bits == 8
    for name, value in first.parameters.items():
        assert (learnt.parameters[name] - value).abs().max() < 0.1 * value.abs().max()


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_mean_over_the_last_steps_is_kept(monkeypatch, share):
    """Values are seen after each step, where levels are put back into range."""
    model = llama().eval()
    ids = tokens(model, 8, 16)
    first = calibrate(model, ids, forms_of(model, FP32), Method("gptq"), progress=False)
    seen = {}
    keep = _Linear.keep_in_range

    def record(self):
        keep(self)
        seen.setdefault(self, []).append(self.change.detach().clone())

    monkeypatch.setattr(_Linear, "keep_in_range", record)
    distil(model, first, ids, codes=True, average=share, progress=False)
    for linear, values in seen.items():
        assert len(values) == 4
        mean = torch.stack(values[-round(4 * share) :]).mean(0)
        torch.testing.assert_close(linear.change.detach(), mean)
        assert not torch.equal(mean, values[-1])


def test_what_is_refused():
    model = llama().eval()
    ids = tokens(model, 2, 8)
    found = calibrate(model, ids, forms_of(model, FP32), Method("rtn"), progress=False)
    for given, options, text in (
        (ids[0], {}, r"ids must be \[sequences, tokens\], got \[8\]"),
        (torch.tensor([[0, 96]]), {}, r"must lie in 0\.\.95"),
        (ids, {"epochs": 0}, "epochs must be a positive integer"),
        (ids, {"batch": 0}, "batch must be a positive integer"),
        (ids, {"rate": 1.0}, "rate must lie between 0 and 1"),
        (ids, {"code_rate": 0.0}, "code_rate must lie between 0 and 1"),
        (ids, {"average": 1.5}, r"average must lie in 0\.\.1, got 1.5"),
    ):
        with pytest.raises(ValueError, match=text):
            distil(model, found, given, progress=False, **options)
    with pytest.raises(ValueError, match="epochs must be an integer of at least 0"):
        Method(epochs=-1)
    model.model.layers[0].mlp.up_proj.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="distilling: the loss is nan"):
        distil(model, found, ids, progress=False)


@pytest.mark.parametrize("codes", [False, True])
def test_products_in_bfloat16_learn_the_same(codes):
    """By autocast, with biases: the loss falls as in float32, and nothing global is left changed."""
    model = BY_NAME["qwen2"].build().eval()
    ids = tokens(model, 8, 24)
    first = calibrate(model, ids, forms_of(model, FP32), Method("gptq"), progress=False)
    switches = torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled(), torch.get_float32_matmul_precision()
    options = {"epochs": 6, "codes": codes, "progress": False}
    exact, fast = (distil(model, first, ids, dtype=d, **options) for d in (torch.float32, torch.bfloat16))
    assert switches == (
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.get_float32_matmul_precision(),
    )
    assert all(value.dtype == torch.float32 for value in fast.parameters.values())
    before, by_exact, by_fast = (kl(model, found, ids) for found in (first, exact, fast))
    assert by_fast < before
    assert by_fast == pytest.approx(by_exact, rel=0.2)
    changed = unpack(fast.packed["model.layers.0.mlp.down_proj"]).scales
    assert not torch.equal(changed, unpack(first.packed["model.layers.0.mlp.down_proj"]).scales)
    with pytest.raises(ValueError, match=r"dtype must be torch.bfloat16 or torch.float32, got torch.float16"):
        distil(model, first, ids, dtype=torch.float16, progress=False)
