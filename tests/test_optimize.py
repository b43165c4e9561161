"""optimize and restore on a small language model: what is swapped, freed and shared, a second call, the way back."""

import copy
import gc
import weakref

import pytest
import torch
from cases import FLOATS
from small_models import IDS, Tiny, assert_unchanged, llama, refuses, state_of
from torch import nn

import torch_cpullm
from torch_cpullm import launch, ops, swap
from torch_cpullm.config import Settings
from torch_cpullm.linear import PackedEmbedding, PackedLinear
from torch_cpullm.packing import dequantize
from torch_cpullm.quant import quantize_rtn


def kinds(model):
    return {name: type(module).__name__ for name, module in model.named_modules() if not list(module.children())}


# ---- what it does ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tied", [True, False])
def test_swaps_linears_head_and_embedding(tied, dtype):
    model = Tiny(tied, dtype)
    want = model(IDS)
    assert torch_cpullm.optimize(model) is model
    assert isinstance(model.embed, PackedEmbedding)
    assert isinstance(model.head, PackedLinear)
    assert {type(block[name]) for block in model.blocks for name in ("up", "down")} == {PackedLinear}
    assert {type(block["norm"]) for block in model.blocks} == {nn.LayerNorm}
    assert (model.embed.packed.bits, model.head.packed.bits, model.blocks[0]["up"].packed.bits) == (8, 8, 4)
    assert (model.embed.packed is model.head.packed) == tied
    assert model.embed.padding_idx == 1
    assert not model.training
    got = model(IDS)
    assert got.dtype == dtype
    assert bool(((got - want).float().norm() / want.float().norm() < 0.12).all())


def test_default_recipe_and_settings_reach_the_weights():
    model = Tiny(tied=False)
    float_weight = model.blocks[1]["up"].weight.detach().clone()
    head = model.head.weight.detach().clone()
    torch_cpullm.optimize(model)
    packed = model.blocks[1]["up"].packed
    assert (packed.bits, packed.group_size, packed.scales.dtype) == (4, 32, torch.float16)
    assert torch.equal(dequantize(packed), dequantize(quantize_rtn(float_weight)))
    assert torch.equal(dequantize(model.head.packed), dequantize(quantize_rtn(head, 8)))
    model = torch_cpullm.optimize(
        Tiny(False), Settings(group_size=64, sym=True, compute="fp32", head_bits=4, scale_dtype="bfloat16")
    )
    up = model.blocks[1]["up"]
    assert torch.equal(dequantize(up.packed), dequantize(quantize_rtn(float_weight, 4, 64, True, torch.bfloat16)))
    assert (up.compute, model.head.packed.bits, model.head.compute) == ("fp32", 4, "fp32")
    eight = torch_cpullm.optimize(Tiny(False), Settings(bits=8, group_size=-1))
    assert torch.equal(dequantize(eight.blocks[1]["up"].packed), dequantize(quantize_rtn(float_weight, 8, -1)))


def test_head_bits_none_leaves_both_ends_in_float():
    model = torch_cpullm.optimize(Tiny(), Settings(head_bits=None))
    assert type(model.embed) is nn.Embedding
    assert type(model.head) is nn.Linear
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("tied", [True, False])
def test_llama(tied):
    """A real transformers model: exact against its own dequantised weights, generate() as before."""
    model = torch_cpullm.optimize(llama(tied), torch_cpullm.CpuLlmConfig(compute="fp32"))
    assert isinstance(model.lm_head, PackedLinear)
    assert isinstance(model.model.embed_tokens, PackedEmbedding)
    assert (model.lm_head.packed is model.model.embed_tokens.packed) == tied
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 2 * 7 + 1
    assert not any(type(module) is nn.Linear for module in model.modules())
    ids = IDS + 3
    with torch.no_grad():
        got = model(ids).logits
    tokens = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert tokens.shape == (2, 8)
    torch_cpullm.restore(model)
    with torch.no_grad():
        want = model(ids).logits
    assert float((got - want).abs().max()) <= 1e-3 * float(want.abs().max())
    assert torch.equal(model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False), tokens)


@pytest.mark.parametrize("tied", [True, False])
def test_float_weights_are_freed(tied):
    model = Tiny(tied)
    weights = [weakref.ref(parameter) for parameter in model.parameters() if parameter.dim() == 2]
    assert len(weights) == (5 if tied else 6)
    torch_cpullm.optimize(model)
    gc.collect()
    assert [w() for w in weights] == [None] * len(weights)
    assert [name for name, p in model.named_parameters() if p.dim() > 1] == []


def test_one_copy_of_tied_weights_lasts():
    model = torch_cpullm.optimize(Tiny())
    twin = copy.deepcopy(model)
    assert twin.embed.packed is twin.head.packed is not model.embed.packed
    model.half()
    assert model.embed.packed is model.head.packed


def test_one_copy_of_tied_weights_lasts_through_load_state_dict():
    model, other = torch_cpullm.optimize(Tiny()), torch_cpullm.optimize(Tiny())
    model.load_state_dict(other.state_dict())
    assert model.embed.packed is model.head.packed


def test_works_within_no_grad_inference_mode_and_after_training_mode():
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            model = torch_cpullm.optimize(Tiny().train())
        assert not any(module.training for module in model.modules())
        assert torch.equal(model(IDS), torch_cpullm.optimize(Tiny())(IDS))


# ---- a second time, and back ----------------------------------------------------------------------------------------


def test_second_call_does_nothing():
    model = torch_cpullm.optimize(Tiny())
    modules, report, want = [id(m) for m in model.modules()], str(torch_cpullm.report(model)), model(IDS)
    assert torch_cpullm.optimize(model) is model
    assert torch_cpullm.optimize(model, Settings(), strict=True) is model
    assert [id(m) for m in model.modules()] == modules
    assert str(torch_cpullm.report(model)) == report
    assert torch.equal(model(IDS), want)


def test_second_call_leaves_the_memory_of_the_weights():
    """Those below 2 MiB were moved together by the first."""
    model = torch_cpullm.optimize(nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(6))))
    packed = [linear.packed for linear in model]
    torch_cpullm.optimize(model)
    assert all(linear.packed is kept for linear, kept in zip(model, packed, strict=True))


OTHER = {
    "bits": 8,
    "group_size": 64,
    "sym": True,
    "compute": "fp32",
    "head_bits": 4,
    "scale_dtype": "bfloat16",
    "modules_to_not_convert": ["head"],
    "kv_cache": "int8",
    "overrides": {"up": {"bits": 8}},
}


@pytest.mark.parametrize("field", OTHER)
def test_second_call_with_other_settings(field):
    model = torch_cpullm.optimize(Tiny())
    text = r"already optimised with other settings; call torch_cpullm.restore\(model\) first"
    refuses(model, ValueError, text, Settings(**{field: OTHER[field]}))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tied", [True, False])
def test_restore(tied, dtype):
    model = Tiny(tied, dtype)
    originals, attributes = kinds(model), sorted(vars(model))
    bias = model.blocks[0]["up"].bias.detach().clone()
    torch_cpullm.optimize(model, Settings(compute="fp32"))
    want = {name: dequantize(m.packed).to(dtype) for name, m in swap.packed_modules(model)}
    y = model(IDS)
    assert torch_cpullm.restore(model) is model
    assert kinds(model) == originals
    assert sorted(vars(model)) == attributes
    for name, weight in want.items():
        module = model.get_submodule(name)
        assert type(module.weight) is nn.Parameter
        assert torch.equal(module.weight, weight)
    assert (model.head.weight is model.embed.weight) == tied
    assert model.embed.padding_idx == 1
    assert torch.equal(model.blocks[0]["up"].bias, bias)
    error = (model(IDS) - y).float().norm() / y.float().norm()
    assert float(error) < (1e-5 if dtype == torch.float32 else 0.02)
    assert torch_cpullm.report(model).bytes_after == torch_cpullm.report(model).bytes_before
    torch_cpullm.optimize(model, Settings(bits=8))
    assert isinstance(model.head, PackedLinear)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_dequantize_of_transformers(dtype):
    """The same as restore(); of a copy it reaches the copy."""
    model = torch_cpullm.optimize(llama())
    want = copy.deepcopy(model).dequantize(dtype)
    assert type(model.lm_head) is PackedLinear
    restored = torch_cpullm.restore(model)
    with pytest.raises(ValueError, match="You need to first quantize your model"):
        restored.dequantize()
    assert type(want.lm_head) is nn.Linear
    assert want.dtype == (dtype or torch.float32)
    assert want.model.rotary_emb.inv_freq.dtype == torch.float32
    for name, value in restored.state_dict().items():
        assert torch.equal(want.state_dict()[name], value.to(dtype)), name


def test_restore_of_a_model_that_was_never_optimised():
    model = Tiny()
    before = state_of(model)
    assert torch_cpullm.restore(model) is model
    assert_unchanged(model, before)


def test_restored_model_can_be_trained():
    """The error of a packed linear in training says that restore() is the way."""
    model = Tiny(tied=False)
    torch_cpullm.restore(torch_cpullm.optimize(model))
    block = model.blocks[0]
    block["down"](block["up"](torch.ones(1, 64))).sum().backward()
    assert block["up"].weight.grad is not None
    assert block["up"].bias.grad is not None


def test_frozen_weights_stay_frozen_through_restore():
    model = Tiny(tied=False).requires_grad_(False)
    torch_cpullm.restore(torch_cpullm.optimize(model))
    assert not any(parameter.requires_grad for parameter in model.parameters())


# ---- what is not converted, and how to say so -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "left"),
    [
        (["head"], {"head"}),
        (["blocks.0.up"], {"blocks.0.up"}),
        (["up"], {"blocks.0.up", "blocks.1.up"}),
        (["0.down"], {"blocks.0.down"}),
        (["blocks.0"], {"blocks.0.up", "blocks.0.down"}),
        ([r"blocks\.\d+\.(up|gate)"], {"blocks.0.up", "blocks.1.up"}),
        ([r".*\.1\."], {"blocks.1.up", "blocks.1.down"}),
        (["embed", "head"], {"embed", "head"}),
        (["p", "own", "lm_head", "(", "*"], set()),
        ([], set()),
    ],
)
def test_modules_to_not_convert(names, left):
    """Whole names, suffixes after a dot, regular expressions from the start; a broken expression matches nothing."""
    model = torch_cpullm.optimize(Tiny(tied=False), Settings(modules_to_not_convert=names))
    floats = {name for name, m in model.named_modules() if type(m) in (nn.Linear, nn.Embedding)}
    assert floats == left
    rows = {row.name: row for row in torch_cpullm.report(model).rows}
    for name in left:
        assert rows[name].state == "float"
        assert "modules_to_not_convert" in rows[name].reason
    assert torch_cpullm.optimize(model, Settings(modules_to_not_convert=names), strict=True) is model


def test_cpu_llm_config_follows_transformers():
    from transformers.utils.quantization_config import QuantizationConfigMixin

    config = torch_cpullm.CpuLlmConfig(bits=4, group_size=64, modules_to_not_convert=["head"], of_a_later_version=1)
    assert isinstance(config, QuantizationConfigMixin)
    fields = config.to_dict()
    assert fields["quant_method"] == "cpullm"
    assert (fields["bits"], fields["group_size"], fields["modules_to_not_convert"]) == (4, 64, ["head"])
    again = torch_cpullm.CpuLlmConfig.from_dict(fields)
    assert again.to_dict() == fields
    assert '"group_size": 64' in config.to_json_string()
    model = torch_cpullm.optimize(Tiny(False), config)
    assert model.blocks[0]["up"].packed.group_size == 64
    assert type(model.head) is nn.Linear


# ---- quietly ------------------------------------------------------------------------------------------------------


def test_progress_bar_respects_the_switches_of_huggingface(monkeypatch, capsys):
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    seen = []
    real = swap.tqdm
    monkeypatch.setattr(
        swap, "tqdm", lambda items, **options: seen.append(options["disable"]) or real(items, **options)
    )
    torch_cpullm.optimize(Tiny())
    assert seen == [None]  # tqdm looks for a terminal
    disable_progress_bars()
    try:
        torch_cpullm.optimize(Tiny())
    finally:
        enable_progress_bars()
    logging.disable_progress_bar()
    try:
        torch_cpullm.optimize(Tiny())
    finally:
        logging.enable_progress_bar()
    assert seen == [None, True, True]
    assert capsys.readouterr() == ("", "")


def test_thread_count_of_the_user_stays(monkeypatch):
    monkeypatch.setattr(launch, "_applied", None)
    torch.set_num_threads(1)
    torch_cpullm.optimize(Tiny())
    assert torch.get_num_threads() == 1


def test_same_codes_on_every_level(isa):
    model = torch_cpullm.optimize(Tiny())
    assert torch_cpullm.report(model).isa == isa
    with ops.use_isa("ref"):
        other = torch_cpullm.optimize(Tiny())
        want = other(IDS)
    for (_, a), (_, b) in zip(swap.packed_modules(model), swap.packed_modules(other), strict=True):
        assert torch.equal(a.packed.codes, b.packed.codes)
        assert torch.equal(a.packed.scales, b.packed.scales)
    assert torch.allclose(model(IDS), want, atol=1e-4)


def test_parameters_in_shared_memory_stay_there():
    model = llama().eval()
    model.share_memory()
    torch_cpullm.optimize(model)
    assert all(parameter.is_shared() for parameter in model.parameters())
