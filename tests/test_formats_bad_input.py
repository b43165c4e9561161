"""Damaged and unsupported checkpoints of other programs: one clear error, no crash, nothing read out of bounds."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_formats
import pytest
import torch
from families import llama_like
from packed_files import Recipe, write
from safetensors.torch import load_file, save_file
from saved_models import copied
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig

import torch_cpullm

UP = "model.layers.1.mlp.up_proj"
RECIPES = {
    "gptq": Recipe("gptq", sym=False, order=True),
    "awq": Recipe("awq", sym=False),
    "pack-quantized": Recipe("pack-quantized", sym=False, settings=(("zero points", "int8"),)),
    "eight": Recipe("gptq_v2", bits=8),
    "shards": Recipe("gptq"),
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A checkpoint of each recipe, by name; not to be changed."""
    root = tmp_path_factory.mktemp("written")
    for name, recipe in RECIPES.items():
        write(root / name, recipe, 20 if name == "shards" else None)
    return root


def refuses(path: Path, text: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=text) as caught:
        torch_cpullm.load(path)
    assert str(path) in str(caught.value)


# ---- tensors --------------------------------------------------------------------------------------------------------


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    def apply(state: dict[str, torch.Tensor]) -> None:
        state[f"{UP}.{name}"] = change(state[f"{UP}.{name}"].clone()).contiguous()

    return apply


def first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


TENSORS: list[tuple[str, Callable[[dict[str, torch.Tensor]], Any], str]] = [
    ("gptq", put("scales", first(float("nan"))), f"damaged: {UP}: scales must be finite"),
    ("gptq", put("scales", first(float("inf"))), f"damaged: {UP}: scales must be finite"),
    ("gptq", put("scales", lambda t: t.float() * float("inf")), f"damaged: {UP}: scales must be finite"),
    ("gptq", put("scales", lambda t: t.double()), f"{UP}.scales has a dtype that is not supported"),
    ("gptq", put("scales", lambda t: t[:-1]), rf"{UP}: scales must be .* \[3, 136\], got float16 \[2, 136\]"),
    ("gptq", put("qweight", lambda t: t.long()), rf"{UP}: qweight must be int32 \[10, 136\], got int64 \[10, 136\]"),
    ("gptq", put("qweight", lambda t: t[:, :-8]), rf"{UP}: qweight must be int32 \[10, 136\], got int32 \[10, 128\]"),
    ("gptq", put("qweight", lambda t: t.T), rf"{UP}: qweight must be int32 \[10, 136\], got int32 \[136, 10\]"),
    ("gptq", put("qweight", lambda t: t.view(-1)), rf"{UP}: qweight must be int32 \[10, 136\], got int32 \[1360\]"),
    ("gptq", put("qzeros", lambda t: t[:, :1]), rf"{UP}: qzeros must be int32 \[3, 17\], got int32 \[3, 1\]"),
    ("gptq", put("g_idx", first(3)), f"damaged: {UP}: g_idx must lie in 0..2, got 3"),
    ("gptq", put("g_idx", first(-1)), f"damaged: {UP}: g_idx must lie in 0..2, got -1"),
    ("gptq", put("g_idx", first(2**31 - 1)), f"damaged: {UP}: g_idx must lie in 0..2, got 2147483647"),
    ("gptq", put("g_idx", lambda t: t * 0), f"damaged: {UP}: g_idx gives group 0 80 inputs, it must have 32"),
    ("gptq", put("g_idx", lambda t: t[:-1]), rf"{UP}: g_idx must be int32 \[80\], got int32 \[79\]"),
    ("gptq", put("g_idx", lambda t: t.float()), rf"{UP}: g_idx must be int32 \[80\], got float32 \[80\]"),
    ("gptq", put("qzeros", first(-1)), f"damaged: {UP}: qzeros hold 15, a zero point of 16"),
    ("gptq", lambda state: state.pop(f"{UP}.scales"), f"{UP}: scales is missing"),
    ("gptq", lambda state: state.pop(f"{UP}.g_idx"), f"{UP}: g_idx is missing, and quantization_config says desc_act"),
    ("gptq", lambda state: state.pop(f"{UP}.qweight"), f"it lacks {UP}.weight"),
    ("gptq", lambda state: state.update({f"{UP}.perm": torch.zeros(80)}), f"{UP}: perm is no tensor of this format"),
    ("gptq", lambda state: state.update({f"{UP}.weight": torch.zeros(136, 80)}), f"no place for {UP}.weight"),
    ("gptq", lambda state: state.update({"model.more": torch.zeros(1)}), "the model has no place for model.more"),
    ("gptq", lambda state: state.pop("model.norm.weight"), "it lacks model.norm.weight"),
    ("gptq", lambda state: state.update({"model.norm.weight": torch.zeros(79)}), "model.norm.weight|mismatch"),
    ("gptq", lambda state: state.update({f"{UP}.bias": torch.zeros(9)}), f"{UP}.bias|mismatch"),
    (
        "eight",
        lambda state: state.update({"model.more.qweight": torch.zeros(1, 8, dtype=torch.int32)}),
        "has no linear model.more, and the checkpoint has a weight for it",
    ),
    ("awq", put("qweight", lambda t: t.T), rf"{UP}: qweight must be int32 \[80, 17\], got int32 \[17, 80\]"),
    ("awq", put("scales", first(float("-inf"))), f"damaged: {UP}: scales must be finite"),
    ("awq", lambda state: state.pop(f"{UP}.qzeros"), f"{UP}: qzeros is missing"),
    (
        "pack-quantized",
        put("weight_shape", first(80)),
        rf"damaged: {UP}: weight_shape must be \[136, 80\], got \[80, 80\]",
    ),
    (
        "pack-quantized",
        put("weight_zero_point", first(8)),
        f"damaged: {UP}: weight_zero_point must lie in -8..7, got 8",
    ),
    ("pack-quantized", put("weight_zero_point", first(-9)), "weight_zero_point must lie in -8..7, got -9"),
    ("pack-quantized", put("weight_packed", lambda t: t[:, 1:]), f"{UP}: weight_packed must be int32"),
    ("pack-quantized", lambda state: state.pop(f"{UP}.weight_shape"), f"{UP}: weight_shape is missing"),
    ("pack-quantized", lambda state: state.pop(f"{UP}.weight_zero_point"), f"{UP}: weight_zero_point is missing"),
    (
        "eight",
        lambda state: state.update({f"{UP}.qzeros": torch.zeros(3, 34, dtype=torch.int32)}),
        f"damaged: {UP}: symmetric, but qzeros hold other values than 127 and 128",
    ),
]


@pytest.mark.parametrize(("name", "change", "text"), TENSORS, ids=[f"{name}-{text}" for name, _, text in TENSORS])
def test_tampered_tensors(name, change, text, written, tmp_path):
    path = copied(written / name, tmp_path / "m")
    state = load_file(path / "model.safetensors")
    change(state)
    save_file(state, path / "model.safetensors", {"format": "pt"})
    refuses(path, text)


def test_damaged_and_missing_files(written, tmp_path):
    path = copied(written / "shards", tmp_path / "m")
    shard = sorted(path.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    for data in (whole[:-1], whole[: len(whole) // 2], whole[:7], b"", b"\xff" * 64, whole + b"x"):
        shard.write_bytes(data)
        refuses(path, "no whole safetensors file")
    other = sorted(path.glob("*.safetensors"))[0]
    shard.write_bytes(other.read_bytes())
    refuses(path, "is in another file, too")
    shard.unlink()
    refuses(path, shard.name, OSError)


def test_no_pickle_is_loaded_and_no_code_run(written, tmp_path):
    """Neither a pickle beside a missing safetensors file nor code that config.json names."""
    path = copied(written / "gptq", tmp_path / "m")
    (path / "model.safetensors").unlink()

    class Bomb:
        def __reduce__(self):
            return Path.touch, (path / "exploded",)

    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    refuses(path, "model.safetensors", OSError)
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "code.py").write_text(f"open({str(path / 'exploded')!r}, 'w')\nclass C: pass\nclass M: pass\n")
    refuses(path, "trust_remote_code")
    assert not (path / "exploded").exists()


# ---- settings -------------------------------------------------------------------------------------------------------


def group(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda settings: settings["config_groups"]["group_0"].update(changes)


def weights(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda settings: settings["config_groups"]["group_0"]["weights"].update(changes)


def setting(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda settings: settings.update(changes)


def auto_round(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return setting(**{"quant_method": "auto-round", "packing_format": "auto_round:awq", **changes})


SETTINGS: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("gptq", setting(bits=3), "bits must be 4 or 8, got 3"),
    ("gptq", setting(bits="4"), "quantization_config: bits is '4'"),
    ("gptq", setting(bits=True), "quantization_config: bits is True"),
    ("gptq", setting(bits=8), r"qweight must be int32 \[20, "),
    ("gptq", lambda s: s.pop("bits"), "quantization_config: bits is None"),
    ("gptq", setting(group_size=48), "group_size must be -1 .* or a positive multiple of 32, got 48"),
    ("gptq", setting(group_size=0), "group_size must be -1 .* or a positive multiple of 32, got 0"),
    ("gptq", setting(group_size=2**40), r"group_size must be below 2\*\*31"),
    ("gptq", setting(group_size=64), r"qzeros must be .* \[2, "),
    ("gptq", setting(group_size=32.0), "quantization_config: group_size is 32.0"),
    ("gptq", setting(sym="yes"), "quantization_config: sym is 'yes'"),
    ("gptq", setting(checkpoint_format="marlin"), "checkpoint_format 'marlin' is not supported"),
    ("gptq", setting(checkpoint_format=1), "quantization_config: checkpoint_format is 1"),
    ("gptq", setting(is_marlin_format=True), "checkpoint_format 'gptq' is not supported"),
    ("gptq", setting(pack_dtype="int8"), "pack_dtype 'int8' is not supported"),
    ("gptq", setting(dynamic={"[": {}}), r"'\[' is no regular expression"),
    ("gptq", setting(dynamic={".*": 3}), r"dynamic: '\.\*' is 3"),
    ("gptq", setting(dynamic={".*up": {"bits": 2}}), "up_proj: bits must be 4 or 8, got 2"),
    ("gptq", setting(dynamic={".*up": {"group_size": {}}}), "up_proj: group_size must be an integer, got {}"),
    ("gptq", setting(quant_method="awq", version="gemm"), "qweight must be int32|desc_act|g_idx"),
    ("awq", setting(version="gemv"), "version 'gemv' of AWQ is not supported"),
    ("awq", setting(bits=8), "bits must be 4 in an AWQ checkpoint, got 8"),
    ("awq", setting(quant_method="gptq"), "qweight must be int32"),
    (
        "awq",
        setting(quant_method="auto-round", packing_format="auto_round:marlin"),
        "packing_format 'auto_round:marlin'",
    ),
    ("awq", setting(quant_method="auto-round", packing_format="awq", act_bits=8), "only integer weights with float"),
    (
        "awq",
        setting(quant_method="auto-round", packing_format="awq", extra_config={f"{UP}": 1}),
        "extra_config: .* is 1",
    ),
    ("awq", setting(quant_method="compressed-tensors"), "quantization_config: config_groups is None"),
    (
        "pack-quantized",
        setting(quant_method="gptq", bits=4, group_size=32, format="gptq"),
        "no tensor is called qweight",
    ),
    ("pack-quantized", setting(config_groups=[]), r"quantization_config: config_groups is \[\]"),
    ("pack-quantized", setting(config_groups={}), "no group of config_groups has it as a target"),
    ("pack-quantized", setting(config_groups={"a": 1}), "config_groups: targets is None"),
    ("pack-quantized", setting(format="int-quantized"), "format 'int-quantized' is not supported"),
    ("pack-quantized", setting(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is not supported"),
    ("pack-quantized", setting(transform_config={"a": 1}), "transform_config is not supported"),
    ("pack-quantized", setting(sparsity_config={"format": "sparse-24-bitmask"}), "sparse weights are not supported"),
    ("pack-quantized", group(targets="Linear"), "config_groups: targets is 'Linear'"),
    ("pack-quantized", group(targets=["re:("]), "is no regular expression"),
    ("pack-quantized", group(input_activations={"num_bits": 8}), "quantised activations are not supported"),
    ("pack-quantized", group(format="nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized' is not supported"),
    ("pack-quantized", group(weights=None), "quantization_config: weights is None"),
    ("pack-quantized", weights(type="float"), "weights of type 'float' are not supported"),
    ("pack-quantized", weights(strategy="block"), "strategy 'block' is not supported"),
    ("pack-quantized", weights(actorder="group"), "weight_g_idx is missing"),
    ("pack-quantized", weights(num_bits=8), "weight_packed must be int32"),
]


@pytest.mark.parametrize(("name", "change", "text"), SETTINGS, ids=[f"{name}-{text}" for name, _, text in SETTINGS])
def test_settings_that_are_not_supported(name, change, text, written, tmp_path):
    path = copied(written / name, tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    change(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))
    refuses(path, text)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"hidden_size": 120}, r"qweight must be int32 \[15, "),
        ({"intermediate_size": 139}, "out_features must be a multiple of 8, got 139"),
        ({"num_hidden_layers": 3}, "it lacks model.layers.2"),
        ({"num_hidden_layers": 1}, "LlamaForCausalLM has no linear model.layers.1"),
        ({"vocab_size": 300}, "mismatch"),
        ({"model_type": "nothing"}, "nothing"),
        ({"hidden_act": "nothing"}, "nothing"),
        ({"num_attention_heads": 7}, "not a multiple of the number of attention heads"),
    ],
    ids=str,
)
def test_a_config_that_the_tensors_disagree_with(change, text, written, tmp_path):
    path = copied(written / "gptq", tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **change}))
    refuses(path, text)


def test_experts_have_no_packed_form(tmp_path):
    """The experts of a mixture are one parameter in transformers, and single linears in such files."""
    path = tmp_path / "m"
    write(path, Recipe("gptq"))
    options = llama_like(intermediate_size=136, num_local_experts=2, num_experts_per_tok=1, vocab_size=257)
    config = MixtralConfig(**options).to_dict()
    config["quantization_config"] = json.loads((path / "config.json").read_text())["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    refuses(path, "MixtralForCausalLM has no linear model.layers.0.mlp.down_proj")


def test_floats_that_lack_a_tensor_are_an_error(tmp_path):
    """transformers would draw it at random and go on."""
    LlamaForCausalLM(LlamaConfig(**llama_like(vocab_size=257))).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.0.mlp.up_proj.weight"], state["model.norm.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    refuses(tmp_path, "it lacks model.layers.0.mlp.up_proj.weight, model.norm.weight")


def test_mutated_files(tmp_path):
    """A few of the cases of ``python -m tests.fuzz_formats``: an error of the known kinds, or a model."""
    outcomes = fuzz_formats.run(150, seed=1, folder=tmp_path)
    assert sum(outcomes.values()) == 150
    assert outcomes["loaded"]
    assert outcomes["ValueError"] + outcomes["OSError"]
