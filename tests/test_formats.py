"""Checkpoints of other programs, packed: their own codes and scales, bit for bit, and the model that they mean."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from packed_files import FAMILIES, Recipe, dequantised, linears, quantised, tensors_of, words, write
from safetensors.torch import load_file, save_file
from saved_models import IDS, logits
from torch import nn
from transformers import AutoModelForCausalLM

import torch_cpullm
from torch_cpullm import CpuLlmConfig
from torch_cpullm.formats.importing import stored_weights
from torch_cpullm.linear import PackedLinear
from torch_cpullm.packing import dequantize, unpack

BF16, F32 = torch.bfloat16, torch.float32
AUTO_ROUND = (("quant_method", "auto-round"), ("checkpoint_format", None), ("desc_act", None))
RECIPES = [
    Recipe("gptq"),
    Recipe("gptq", sym=False, group_size=64, family="qwen2"),
    Recipe("gptq", order=True),
    Recipe("gptq", bits=8, group_size=-1, scales=BF16),
    Recipe("gptq_v2", sym=False, order=True, family="qwen2"),
    Recipe("gptq_v2", group_size=128),
    Recipe("awq", sym=False),
    Recipe("awq", sym=False, group_size=64, family="qwen2"),
    Recipe("gptq", settings=(*AUTO_ROUND, ("packing_format", "auto_round:auto_gptq"))),
    Recipe("gptq_v2", sym=False, settings=(*AUTO_ROUND, ("packing_format", "auto_round:gptqmodel"))),
    Recipe("awq", sym=False, settings=(*AUTO_ROUND, ("sym", False), ("packing_format", "auto_round:auto_awq"))),
    Recipe("pack-quantized"),
    Recipe("pack-quantized", sym=False, order=True, scales=BF16, family="qwen2"),
    Recipe("pack-quantized", sym=False, group_size=64, settings=(("zero points", "int8"),)),
    Recipe("pack-quantized", bits=8, group_size=-1),
]
EXACT = CpuLlmConfig(head_bits=None)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_loads_with_its_own_codes_and_scales(recipe, tmp_path):
    """Every weight, and by them the logits, are what another reader of the format makes of the files."""
    plain = write(tmp_path, recipe)
    model, tokenizer = torch_cpullm.load(tmp_path, config=EXACT, compute="fp32")
    assert tokenizer is None
    found = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert found.keys() == linears(plain).keys()
    for name, linear in linears(plain).items():
        packed = found[name].packed
        assert packed.bits == recipe.bits
        assert (packed.zeros is None) == (recipe.sym or recipe.bits == 8)
        assert packed.scales.dtype == recipe.scales
        assert torch.equal(found[name].dequantize(), linear.weight)
    assert (logits(model) - logits(plain)).abs().max() < 1e-4
    assert {row.level for row in torch_cpullm.report(model).layers} == {"one op"}
    assert model.config.quantization_config.quant_method == "cpullm"
    assert "qweight" not in str(model.config)
    back = torch_cpullm.restore(model)
    assert torch.equal(back.model.layers[1].mlp.down_proj.weight, plain.model.layers[1].mlp.down_proj.weight)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_codes_are_the_stored_ones(recipe):
    """The canonical form holds the very values, zero points and scales that were written."""
    generator = torch.Generator().manual_seed(0)
    matrix = quantised(torch.randn(48, 136, generator=generator), recipe, generator)
    tensors = tensors_of(matrix, recipe)
    mark = "weight_packed" if recipe.kind == "pack-quantized" else "qweight"
    assert mark in tensors
    form = form_of(recipe, tensors)
    assert {name: (list(t.shape), t.dtype) for name, t in tensors.items()} == form.tensors([48, 136])
    weight, order = form.quantized(tensors, 48, 136)
    by_group = torch.sort(matrix.g_idx, stable=True).indices
    assert (order is None) == (not recipe.order)
    assert order is None or torch.equal(order.long(), by_group)
    assert torch.equal(weight.codes.long(), matrix.values[:, by_group])
    assert torch.equal(weight.scales, matrix.scales)
    assert weight.zeros is None or torch.equal(weight.zeros.long(), matrix.zeros)
    packed, _ = form.packed(tensors, [48, 136])
    assert torch.equal(unpack(packed).codes, weight.codes)
    assert torch.equal(dequantize(weight), dequantised(tensors, recipe)[:, by_group])


def form_of(recipe, tensors, name="model.layers.0.mlp.up_proj"):
    from packed_files import quantization_config

    headers = {f"{name}.{key}": (tuple(t.shape), t.dtype) for key, t in tensors.items()}
    return stored_weights(quantization_config(recipe), headers)[name]


def test_all_codes_and_zero_points_of_every_format():
    """Each of the 16 codes meets each zero point that the format can say, in each lane of a word."""
    values = (torch.arange(16)[:, None] + torch.arange(64)) % 16
    for kind, zeros in (
        ("gptq", range(1, 16)),
        ("gptq_v2", range(16)),
        ("awq", range(16)),
        ("pack-quantized", range(16)),
    ):
        recipe = Recipe(kind, sym=False, group_size=32)
        points = torch.tensor([[zeros[i % len(zeros)], zeros[-1 - i % len(zeros)]] for i in range(16)])
        matrix = replace_values(values, points)
        tensors = tensors_of(matrix, recipe)
        weight, _ = form_of(recipe, tensors).quantized(tensors, 16, 64)
        assert torch.equal(weight.codes.long(), values)
        assert torch.equal(weight.zeros.long(), points)
        assert torch.equal(dequantize(weight), dequantised(tensors, recipe))


def replace_values(values, zeros):
    from packed_files import Matrix

    scales = torch.linspace(-1, 1, 32).view(16, 2).half()
    return Matrix(values, zeros, scales, torch.arange(64) // 32)


@pytest.mark.parametrize("shard_tensors", [None, 9])
def test_head_and_embedding_follow_head_bits(shard_tensors, tmp_path):
    """As optimize() quantises those of the float model; all else is as stored, from one file or from many."""
    plain = write(tmp_path, Recipe("awq", sym=False, family="qwen2"), shard_tensors)
    model, _ = torch_cpullm.load(tmp_path)
    assert model.lm_head.packed is model.model.embed_tokens.packed
    assert {row.state for row in torch_cpullm.report(model).rows} == {"int4", "int8"}
    optimised = torch_cpullm.optimize(plain)
    assert torch.equal(unpack(model.lm_head.packed).codes, unpack(optimised.lm_head.packed).codes)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    tokens = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False)
    assert tokens.shape == (2, 13)


def test_linears_in_float_stay_so(tmp_path):
    """What the other program has left in float was left so on purpose."""
    write(tmp_path, Recipe("gptq", settings=(("dynamic", {r"-:.*layers\.0\.mlp.*": {}}),)))
    state = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    for key in ("qweight", "qzeros", "scales", "g_idx"):
        del state[f"{name}.{key}"]
    state[f"{name}.weight"] = torch.randn(136, 80)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    model, _ = torch_cpullm.load(tmp_path)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    rows = {row.name: row for row in torch_cpullm.report(model).rows}
    assert (rows[name].state, rows[name].reason) == ("float", "float in the checkpoint")
    assert len(rows) == 16
    with pytest.raises(ValueError, match=f"strict=True, but .*\\n  {name}: float in the checkpoint"):
        torch_cpullm.load(tmp_path, config=CpuLlmConfig(strict=True))


def test_settings_of_single_modules(tmp_path):
    """dynamic of GPTQModel, extra_config of AutoRound, config_groups of compressed-tensors."""
    down = Recipe("gptq", bits=8, group_size=-1)
    tensors = {kind: {} for kind in ("gptq", "pack-quantized")}
    for kind, found in tensors.items():
        for name, recipe in (("a.up_proj", Recipe(kind)), ("a.down_proj", replace(down, kind=kind))):
            generator = torch.Generator().manual_seed(0)
            matrix = quantised(torch.randn(64, 96, generator=generator), recipe, generator)
            found |= {f"{name}.{key}": (tuple(t.shape), t.dtype) for key, t in tensors_of(matrix, recipe).items()}
    own = {"bits": 8, "group_size": -1}
    general = {"bits": 4, "group_size": 32, "sym": True}
    weights = {"num_bits": 4, "group_size": 32, "symmetric": True, "strategy": "group", "type": "int"}
    eight = {"num_bits": 8, "symmetric": True, "strategy": "channel", "type": "int"}
    groups = {"a": {"targets": ["Linear"], "weights": weights}, "b": {"targets": ["re:.*down_proj"], "weights": eight}}
    for settings, kind in (
        ({"quant_method": "gptq", "dynamic": {r"+:.*down": own}, **general}, "gptq"),
        ({"quant_method": "auto-round", "extra_config": {"a.down_proj": own}, **general}, "gptq"),
        ({"quant_method": "intel/auto-round", "extra_config": {r".*\.down_.*": own}, **general}, "gptq"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}, "pack-quantized"),
    ):
        forms = stored_weights(settings, tensors[kind])
        assert (forms["a.up_proj"].bits, forms["a.up_proj"].group_size) == (4, 32)
        assert (forms["a.down_proj"].bits, forms["a.down_proj"].group_size) == (8, -1)
        for form in forms.values():
            assert form.tensors([64, 96])


def test_biases_that_only_the_files_have(tmp_path):
    """AutoGPTQ gives every linear a bias: zeros are none, others are kept."""
    plain = write(tmp_path, Recipe("gptq"))
    state = load_file(tmp_path / "model.safetensors")
    for name, linear in linears(plain).items():
        state[f"{name}.bias"] = torch.zeros(linear.out_features)
    state["model.layers.1.mlp.up_proj.bias"][3] = 2.0
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    plain.model.layers[1].mlp.up_proj.bias = nn.Parameter(state["model.layers.1.mlp.up_proj.bias"])
    model, _ = torch_cpullm.load(tmp_path, config=EXACT, compute="fp32")
    assert model.model.layers[0].mlp.up_proj.bias is None
    assert model.model.layers[1].mlp.up_proj.bias[3] == 2
    assert (logits(model) - logits(plain)).abs().max() < 1e-4


def test_zero_points_of_symmetric_gptq():
    """8 under the name of v1 is still the middle, since a symmetric grid has no other; a mixture with 9 is not."""
    recipe = Recipe("gptq")
    generator = torch.Generator().manual_seed(0)
    tensors = tensors_of(quantised(torch.randn(32, 64, generator=generator), recipe, generator), recipe)
    for stored in (7, 8):
        tensors["qzeros"] = words(torch.full((2, 32), stored), 4)
        assert form_of(recipe, tensors).quantized(tensors, 32, 64)[0].zeros is None
    tensors["qzeros"] = words(torch.full((2, 32), 9), 4)
    with pytest.raises(ValueError, match="symmetric, but qzeros hold other values than 7 and 8"):
        form_of(recipe, tensors).quantized(tensors, 32, 64)


def test_a_zero_point_of_sixteen_is_an_error():
    recipe = Recipe("gptq", sym=False)
    generator = torch.Generator().manual_seed(0)
    tensors = tensors_of(quantised(torch.randn(32, 64, generator=generator), recipe, generator), recipe)
    tensors["qzeros"] = words(torch.full((2, 32), 15), 4)
    with pytest.raises(ValueError, match="qzeros hold 15, a zero point of 16 in this version"):
        form_of(recipe, tensors).quantized(tensors, 32, 64)
    other = replace(recipe, kind="gptq_v2")
    assert int(form_of(other, tensors).quantized(tensors, 32, 64)[0].zeros.min()) == 15


def test_float32_scales_where_that_is_exact():
    recipe = Recipe("pack-quantized")
    generator = torch.Generator().manual_seed(0)
    tensors = tensors_of(quantised(torch.randn(32, 64, generator=generator), recipe, generator), recipe)
    half = tensors["weight_scale"]
    for scales, kind in ((half.float(), torch.float16), (half.float().bfloat16().float() * 2.0**40, BF16)):
        tensors["weight_scale"] = scales
        weight, _ = form_of(recipe, tensors).quantized(tensors, 32, 64)
        assert weight.scales.dtype == kind
        assert torch.equal(weight.scales.float(), scales)
    tensors["weight_scale"] = half.float() * (1 + 2.0**-20)
    with pytest.raises(ValueError, match="neither float16 nor bfloat16 holds exactly"):
        form_of(recipe, tensors).quantized(tensors, 32, 64)


# ---- load() ---------------------------------------------------------------------------------------------------------


def test_load_reads_floats_and_our_own_as_from_pretrained_does(tmp_path):
    FAMILIES["llama"].build().save_pretrained(tmp_path / "float")
    config = CpuLlmConfig(group_size=64, sym=True)
    want = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    model, _ = torch_cpullm.load(tmp_path / "float", config=config)
    assert torch.equal(logits(model), logits(want))
    model.save_pretrained(tmp_path / "ours")
    again, _ = torch_cpullm.load(tmp_path / "ours")
    assert torch.equal(logits(again), logits(want))
    exact, _ = torch_cpullm.load(tmp_path / "ours", compute="fp32", dtype=torch.bfloat16)
    assert {row.compute for row in torch_cpullm.report(exact).rows} == {"fp32", None}
    assert exact.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="saved with settings of its own"):
        torch_cpullm.load(tmp_path / "ours", config=config)


def test_what_load_does_not_take(tmp_path):
    model = FAMILIES["llama"].build()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for stored, text in (
        ({"quant_method": "bitsandbytes"}, "quantised by 'bitsandbytes', and what can be read is gptq, awq"),
        ({"bits": 4}, "quantised by None"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
        with pytest.raises(ValueError, match=text):
            torch_cpullm.load(tmp_path)
    with pytest.raises(TypeError, match="config must be a CpuLlmConfig, got dict"):
        torch_cpullm.load(tmp_path, config={})
    with pytest.raises(OSError, match="nowhere"):
        torch_cpullm.load(tmp_path / "nowhere", local_files_only=True)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(TypeError, match="a GGUF file takes no option 'revision'"):
        torch_cpullm.load(tmp_path / "x.gguf", revision="main")
    with pytest.raises(ValueError, match="not a GGUF file"):
        torch_cpullm.load(tmp_path / "x.gguf")
