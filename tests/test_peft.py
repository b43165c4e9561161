"""PEFT adapters on packed linears: unmerged, with the logits of the float model that has the same weights."""

import copy

import pytest
import torch
from families import Family, llama_like
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import torch_cpullm
from torch_cpullm import CpuLlmConfig
from torch_cpullm.linear import PackedLinear

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft

LLAMA = Family("llama", "LlamaConfig", llama_like(attention_bias=True))
FP32 = CpuLlmConfig(compute="fp32")
TARGETS = {
    "attention": ["q_proj", "v_proj"],
    "second layer": r"model\.layers\.1\.mlp\..*_proj",
    "all linears": "all-linear",
}
IDS = torch.arange(3, 15).view(2, 6)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def generate(model):
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 5, "do_sample": False}
    return model.generate(input_ids=IDS, **options)


def levels(model):
    return [row.level for row in torch_cpullm.report(model).layers]


def adapter(model, folder, targets, seed=0, **options):
    """A saved adapter of random weights, large enough to show."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False, **options)
        made = get_peft_model(copy.deepcopy(model), config)
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models():
    """(packed model, float model with the same weights)."""
    packed = torch_cpullm.optimize(LLAMA.build(), FP32)
    return packed, torch_cpullm.restore(copy.deepcopy(packed))


@pytest.mark.parametrize("targets", TARGETS)
def test_a_saved_adapter(targets, models, tmp_path):
    packed, plain = (copy.deepcopy(model) for model in models)
    path, before = adapter(plain, tmp_path, TARGETS[targets]), logits(packed)
    model, want = (PeftModel.from_pretrained(m, path) for m in (packed, plain))
    assert not torch.allclose(logits(model), before, atol=0.1)
    assert torch.allclose(logits(model), logits(want), atol=1e-4)
    assert torch.equal(generate(model), generate(want))
    adapted = {"second layer": [1]}.get(targets, [0, 1])
    rows = torch_cpullm.report(model).layers
    assert [row.level == "per-linear ops" for row in rows] == [i in adapted for i in range(2)]
    assert all("has an adapter" in rows[i].reason for i in adapted)
    with model.disable_adapter():
        assert levels(model) == ["one op"] * 2
        assert torch.allclose(logits(model), before, atol=1e-5)
    assert torch.allclose(logits(model), logits(want), atol=1e-4)
    base = model.unload()
    assert levels(base) == ["one op"] * 2
    assert torch.equal(logits(base), before)


def test_two_adapters_on_a_checkpoint_that_was_saved_packed(models, tmp_path):
    packed, plain = models[0], copy.deepcopy(models[1])
    paths = [adapter(plain, tmp_path / str(seed), ["q_proj", "down_proj"], seed) for seed in range(2)]
    packed.save_pretrained(tmp_path / "packed")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), paths[0])
    want = PeftModel.from_pretrained(plain, paths[0])
    for each in (model, want):
        each.load_adapter(paths[1], "second")
    for name in ("second", "default"):
        for each in (model, want):
            each.set_adapter(name)
        assert torch.allclose(logits(model), logits(want), atol=1e-4)
    assert isinstance(model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.base_layer"), PackedLinear)
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "packed"), tmp_path / "again")
    assert torch.equal(logits(again), logits(model))


def test_adapters_of_transformers_itself(models, tmp_path):
    packed, plain = (copy.deepcopy(model) for model in models)
    path = adapter(plain, tmp_path, ["q_proj", "o_proj"])
    for model in (packed, plain):
        model.load_adapter(str(path))
    assert torch.allclose(logits(packed), logits(plain), atol=1e-4)
    assert levels(packed) == ["per-linear ops"] * 2
    packed.disable_adapters()
    assert levels(packed) == ["one op"] * 2


def test_a_model_that_has_an_adapter_when_it_is_optimised(tmp_path):
    """Base layers are packed, in the wrapper's place or not; what the adapter has learnt stays as it is."""
    path = adapter(LLAMA.build(), tmp_path, ["q_proj", "up_proj"])
    settings = CpuLlmConfig(compute="fp32", modules_to_not_convert=["0.self_attn.q_proj"])
    model = torch_cpullm.optimize(PeftModel.from_pretrained(LLAMA.build(), path), settings, strict=True)
    assert isinstance(model, PeftModel)
    first, second = (layer.self_attn.q_proj for layer in model.base_model.model.model.layers)
    assert type(first.base_layer) is nn.Linear
    assert type(second.base_layer) is PackedLinear
    assert type(second.lora_A["default"]) is nn.Linear
    assert torch_cpullm.report(model).left_in_float == []
    want, got = torch_cpullm.restore(copy.deepcopy(model)), logits(model)
    assert isinstance(want, PeftModel)
    assert not any(isinstance(module, PackedLinear) for module in want.modules())
    assert torch.allclose(got, logits(want), atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    assert sorted(path.name for path in (tmp_path / "again").glob("*.safetensors")) == ["adapter_model.safetensors"]


def test_int8_and_16_bit_models(tmp_path):
    for dtype in (torch.bfloat16, torch.float16):
        packed = torch_cpullm.optimize(LLAMA.build(dtype))
        plain = torch_cpullm.restore(copy.deepcopy(packed))
        path = adapter(plain, tmp_path / str(dtype), ["q_proj", "down_proj"])
        model, want = (PeftModel.from_pretrained(m, path) for m in (packed, plain))
        got, want = logits(model), logits(want)
        assert got.dtype == dtype
        assert (got - want).float().norm() < 0.05 * want.float().norm()


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_merging_is_an_error_and_changes_nothing(call, safe, models, tmp_path):
    packed, plain = (copy.deepcopy(model) for model in models)
    path = adapter(plain, tmp_path, ["q_proj"])
    model = PeftModel.from_pretrained(packed, path)
    want = logits(model)
    with pytest.raises(RuntimeError, match=r"packed: it cannot be merged .*; merge there and optimize\(\) again"):
        getattr(model, call)(safe_merge=safe)
    assert torch.equal(logits(model), want)
    merged = torch_cpullm.restore(model).merge_and_unload()
    assert torch.allclose(logits(merged), want, atol=1e-4)
    assert levels(torch_cpullm.optimize(merged, FP32)) == ["one op"] * 2


def test_a_whole_float_module_in_an_adapter(models, tmp_path):
    """modules_to_save of a packed head: peft looks for its codes in the adapter."""
    packed, plain = (copy.deepcopy(model) for model in models)
    path = adapter(plain, tmp_path, ["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(KeyError, match=r"lm_head\.weight_codes"):
        PeftModel.from_pretrained(packed, path)
    settings = CpuLlmConfig(compute="fp32", modules_to_not_convert=["lm_head"])
    model = PeftModel.from_pretrained(torch_cpullm.optimize(LLAMA.build(), settings), path)
    assert torch.allclose(logits(model), logits(PeftModel.from_pretrained(plain, path)), atol=1e-4)


def test_training_an_adapter_is_an_error(models):
    model = get_peft_model(copy.deepcopy(models[0]), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(RuntimeError, match="for inference and have no gradient"):
        model(input_ids=IDS, labels=IDS)
