"""from_pretrained(quantization_config=CpuLlmConfig()): the same model as optimize() makes, without the float one."""

from __future__ import annotations

import copy
import gc
import json
import threading
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from families import FAMILIES, VERSION, VOCAB, Family
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import torch_cpullm
from torch_cpullm import CpuLlmConfig, hf
from torch_cpullm.linear import PackedEmbedding, PackedLinear
from torch_cpullm.swap import packed_modules

BY_NAME = {family.name: family for family in FAMILIES}
IDS = torch.randint(2, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
every_family = pytest.mark.parametrize("family", FAMILIES, ids=str)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """family name -> a float checkpoint of it."""
    root = tmp_path_factory.mktemp("float")

    @cache
    def path(name: str, dtype: torch.dtype = torch.float32) -> Path:
        target = root / f"{name}-{dtype}".replace("torch.", "")
        BY_NAME[name].build(dtype).save_pretrained(target)
        return target

    return path


def load(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=CpuLlmConfig(**options))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def generate(model):
    mask = torch.ones_like(IDS)
    return model.generate(IDS, attention_mask=mask, max_new_tokens=6, do_sample=False)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_state(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype, name
        assert torch.equal(value, b[name]), name


@every_family
def test_the_same_as_optimize(family: Family, folder):
    path = folder(family.name)
    want = torch_cpullm.optimize(AutoModelForCausalLM.from_pretrained(path))
    got = load(path)
    same_state(state(got), state(want))
    assert torch.equal(logits(got), logits(want))
    assert torch.equal(generate(got), generate(want))
    assert str(torch_cpullm.report(got)) == str(torch_cpullm.report(want))
    assert not got.training
    assert not any(parameter.is_meta for parameter in got.parameters())
    head, embedding = got.get_output_embeddings(), got.get_input_embeddings()
    assert isinstance(head, PackedLinear)
    assert (head.packed is embedding.packed) == family.tied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama-tied", "gemma3", "gpt2"])
def test_dtypes(name, dtype, folder):
    path = folder(name, torch.bfloat16)
    want = torch_cpullm.optimize(AutoModelForCausalLM.from_pretrained(path, dtype=dtype))
    got = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=CpuLlmConfig())
    assert got.dtype == dtype
    same_state(state(got), state(want))
    assert torch.equal(logits(got), logits(want))


@pytest.mark.parametrize(
    "options",
    [
        {"sym": True, "group_size": 64, "compute": "fp32"},
        {"bits": 8, "group_size": -1, "scale_dtype": "bfloat16"},
        {"head_bits": None},
        {"head_bits": 4, "kv_cache": "int8"},
        {"modules_to_not_convert": ["lm_head", "q_proj", r"model\.layers\.1\.mlp\..*"]},
        {"modules_to_not_convert": ["embed_tokens"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_settings(name, options, folder):
    path = folder(name)
    want = torch_cpullm.optimize(AutoModelForCausalLM.from_pretrained(path), CpuLlmConfig(**options))
    got = load(path, **options)
    same_state(state(got), state(want))
    assert torch.equal(generate(got), generate(want))
    assert str(torch_cpullm.report(got)) == str(torch_cpullm.report(want))


def test_strict(folder):
    load(folder("llama"), strict=True)
    load(folder("mixtral"), strict=True)
    assert "strict" not in load(folder("llama"), strict=True).config.to_dict()["quantization_config"]


def test_what_the_model_says_of_itself(folder):
    model = load(folder("llama"))
    assert model.is_quantized
    assert model.quantization_method == "cpullm"
    assert isinstance(model.hf_quantizer, hf.CpuLlmQuantizer)
    assert not model.hf_quantizer.is_trainable
    assert json.loads(model.config.to_json_string())["quantization_config"]["quant_method"] == "cpullm"
    assert torch_cpullm.optimize(model) is model
    with pytest.raises(ValueError, match="already optimised with other settings"):
        torch_cpullm.optimize(model, CpuLlmConfig(bits=8))


def test_a_model_without_its_head(folder):
    path = folder("llama")
    want = torch_cpullm.optimize(AutoModelForCausalLM.from_pretrained(path)).model
    got = AutoModel.from_pretrained(path, quantization_config=CpuLlmConfig())
    with torch.no_grad():
        assert torch.equal(got(IDS).last_hidden_state, want(IDS).last_hidden_state)


def test_a_tied_head_saved_under_its_own_name(folder, tmp_path):
    """A checkpoint may hold the head instead of the embedding, or both: the same weights or not."""
    path = folder("llama-tied")
    tensors = load_file(path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    for name, change in {
        "head": {"lm_head.weight": embedding, "model.embed_tokens.weight": None},
        "both": {"lm_head.weight": embedding.clone()},
        "different": {"lm_head.weight": embedding + 1},
    }.items():
        new = {key: value for key, value in {**tensors, **change}.items() if value is not None}
        target = tmp_path / name
        target.mkdir()
        (target / "config.json").write_text((path / "config.json").read_text())
        save_file(new, target / "model.safetensors", metadata={"format": "pt"})
        want = torch_cpullm.optimize(AutoModelForCausalLM.from_pretrained(target))
        got = load(target)
        # transformers 5.0 does not tie what a checkpoint has twice, later versions if the weights are equal.
        tied = want.lm_head.packed is want.model.embed_tokens.packed
        assert (got.lm_head.packed is got.model.embed_tokens.packed) == tied, name
        assert tied == (name == "head" or (name == "both" and VERSION > (5, 0))), name
        assert torch.equal(logits(got), logits(want)), name


def test_two_models_at_once(folder):
    """Nothing is shared between loads."""
    paths = [folder("llama"), folder("qwen3"), folder("llama")]
    want = [logits(load(path)) for path in paths]
    models = [load(path) for path in paths]
    assert all(torch.equal(logits(model), each) for model, each in zip(models, want, strict=True))
    del models[0]
    assert torch.equal(logits(models[1]), want[2])


def test_copies_state_dict_and_the_way_back(folder):
    model = load(folder("llama-tied"))
    want = logits(model)
    twin = copy.deepcopy(model)
    assert twin.lm_head.packed is twin.model.embed_tokens.packed
    assert torch.equal(logits(twin), want)
    other = load(folder("llama-tied"))
    for _, module in packed_modules(other):
        module.packed.codes.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), want)
    weights = {name: module.dequantize() for name, module in packed_modules(model)}
    back = model.dequantize()
    assert back is model
    assert type(model.lm_head) is torch.nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.equal(model.get_submodule(name).weight, value) for name, value in weights.items())
    assert not model.is_quantized
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config")
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.train()
    model(IDS, labels=IDS).loss.backward()
    assert torch.equal(logits(torch_cpullm.restore(twin)), logits(model.eval()))
    assert not twin.is_quantized


def test_a_dequantised_model_is_saved_as_a_float_one(folder, tmp_path):
    model = load(folder("gpt2")).dequantize()
    model.save_pretrained(tmp_path / "m")
    assert "quantization_config" not in json.loads((tmp_path / "m/config.json").read_text())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m")), logits(model))


# ---- devices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device_map", [None, "auto", "cpu", {"": "cpu"}, {"": torch.device("cpu")}])
def test_everything_is_on_the_cpu(device_map, folder):
    model = AutoModelForCausalLM.from_pretrained(
        folder("llama"), quantization_config=CpuLlmConfig(), device_map=device_map
    )
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}
    assert generate(model).shape == (2, 15)


def test_a_visible_gpu_changes_nothing(folder, monkeypatch):
    """What transformers asks to find one; nothing may be put there."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    quantizer = hf.CpuLlmQuantizer(CpuLlmConfig(), pre_quantized=False)
    for device_map in (None, "auto", {"": 0}):
        assert quantizer.update_device_map(device_map) == {"": torch.device("cpu")}
    model = load(folder("llama"))
    assert model.hf_device_map == {"": torch.device("cpu")}
    assert generate(model).shape == (2, 15)


@pytest.mark.parametrize("device_map", ["cuda", {"": 0}, {"": "cpu", "lm_head": "disk"}, torch.device("cuda")])
def test_other_devices_are_an_error(device_map):
    quantizer = hf.CpuLlmQuantizer(CpuLlmConfig(), pre_quantized=False)
    with pytest.raises(ValueError, match="torch_cpullm computes on the CPU: device_map must not name"):
        quantizer.validate_environment(device_map=device_map)


# ---- bad input ------------------------------------------------------------------------------------------------------


def changed(path: Path, target: Path, change) -> Path:
    """A copy of a checkpoint whose tensors ``change`` has worked on."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    target.mkdir()
    (target / "config.json").write_text((path / "config.json").read_text())
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("value", "text"),
    [(float("nan"), "holds NaN or inf"), (float("inf"), "holds NaN or inf"), (1e6, "holds values beyond 65504")],
)
def test_weights_that_cannot_be_quantised_are_named(value, text, folder, tmp_path):
    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value

    with pytest.raises(ValueError, match=rf"model\.layers\.1\.mlp\.up_proj {text}"):
        load(changed(folder("llama"), tmp_path / "m", change))


def test_a_weight_of_another_shape_is_named(folder, tmp_path):
    def change(tensors):
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name] = tensors[name][:-1].clone()

    with pytest.raises(
        ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is \[138, 80\] .* must be \[139, 80\]"
    ):
        load(changed(folder("llama"), tmp_path / "m", change))


def test_a_missing_weight_is_drawn_as_transformers_does(folder, tmp_path):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]

    path = changed(folder("llama"), tmp_path / "m", change)
    torch.manual_seed(0)
    want = torch_cpullm.optimize(AutoModelForCausalLM.from_pretrained(path))
    torch.manual_seed(0)
    same_state(state(load(path)), state(want))


def test_wrong_settings(folder):
    config = CpuLlmConfig()
    config.group_size = 33
    with pytest.raises(ValueError, match=r"group_size must be -1 .*, got 33"):
        AutoModelForCausalLM.from_pretrained(folder("llama"), quantization_config=config)


def test_another_methods_config(folder, tmp_path):
    path = tmp_path / "m"
    load(folder("llama")).save_pretrained(path)
    with pytest.raises(ValueError, match="quantized with CpuLlmConfig but you are passing a EetqConfig"):
        AutoModelForCausalLM.from_pretrained(path, quantization_config=transformers.EetqConfig())


# ---- memory ---------------------------------------------------------------------------------------------------------


def anonymous_mib():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon:"))
    return int(line.split()[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_peak_memory(tmp_path):
    """Packed size + the largest module + 300 MiB: less than half of the float weights."""
    config = LlamaConfig(
        hidden_size=1536, intermediate_size=6144, num_hidden_layers=14, num_attention_heads=12, vocab_size=24000
    )
    with torch.device("meta"):
        names = {name: value.shape for name, value in LlamaForCausalLM(config).state_dict().items()}
    block = (torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    float_mib, index = 0.0, {}
    config.save_pretrained(tmp_path)
    for number, (name, shape) in enumerate(names.items()):
        file = f"model-{number + 1:05d}-of-{len(names):05d}.safetensors"
        value = block.repeat(-(-shape.numel() // len(block)))[: shape.numel()].view(shape)
        save_file({name: value}, tmp_path / file, metadata={"format": "pt"})
        index[name] = file
        float_mib += value.nbytes / 2**20
    del value
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    gc.collect()
    start, peak, running = anonymous_mib(), [0.0], SimpleNamespace(on=True)

    def watch():
        while running.on:
            peak[0] = max(peak[0], anonymous_mib() - start)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=CpuLlmConfig())
    finally:
        running.on = False
        thread.join()
    packed = [module.packed for _, module in packed_modules(model)]
    packed_mib = sum(weight.nbytes for weight in packed) / 2**20
    largest_mib = max(2 * weight.n * weight.k for weight in packed) / 2**20
    assert isinstance(model.model.embed_tokens, PackedEmbedding)
    assert float_mib > 1000
    assert peak[0] <= packed_mib + largest_mib + 300
    assert anonymous_mib() - start <= packed_mib + 100
