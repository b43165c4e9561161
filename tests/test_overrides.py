"""Settings of single modules by pattern: which pattern decides, what must agree, and that every way in takes them."""

import copy
import json

import pytest
import torch
from families import VERSION, Family, llama_like
from gguf import GGMLQuantizationType as Kind
from gguf_files import kind_by_name, write_model
from saved_models import IDS, logits
from small_models import Tiny, refuses
from transformers import AutoModelForCausalLM

import torch_cpullm
from torch_cpullm import CpuLlmConfig
from torch_cpullm.config import Settings
from torch_cpullm.plan import sharing_inputs

LLAMA = Family("llama", "LlamaConfig", llama_like(num_hidden_layers=3))
MIXED = {
    "down_proj": {"bits": 8},
    r"model\.layers\.(0|2)\.self_attn\.[qkv]_proj": {"bits": 8, "group_size": 64},
    "lm_head": {"bits": 4, "sym": True},
    r"model\.layers\.2\.": {"group_size": 64, "sym": True},
}


def recipes(model):
    """Name -> (bits, group size, symmetric) of every packed module."""
    found = {row.name: row for row in torch_cpullm.report(model).rows if row.state != "float"}
    zeros = {name: model.get_submodule(name).packed.zeros is None for name in found}
    return {name: (row.bits, row.group_size, zeros[name]) for name, row in found.items()}


def check_mixed(model):
    got = recipes(model)
    eight, four = (8, 64, True), (4, 32, False)
    for i, attention in enumerate((eight, four, eight)):
        for name in "qkv":
            assert got[f"model.layers.{i}.self_attn.{name}_proj"] == attention
        assert got[f"model.layers.{i}.mlp.down_proj"] == (8, 32, True)
        rest = (4, 64, True) if i == 2 else four
        assert got[f"model.layers.{i}.self_attn.o_proj"] == got[f"model.layers.{i}.mlp.up_proj"] == rest
    assert got["lm_head"] == (4, 32, True)
    assert got["model.embed_tokens"] == (8, 32, True)


def test_the_first_pattern_that_matches_decides():
    settings = Settings(overrides={"up": {"bits": 8}, r"blocks\.1": {"group_size": 64}}, group_size=-1)
    assert settings.recipe("blocks.1.up")[:3] == (8, -1, True)
    assert settings.recipe("blocks.1.down")[:3] == (4, 64, False)
    assert settings.recipe("blocks.0.down")[:3] == (4, -1, False)
    turned = Settings(overrides=dict(reversed(settings.overrides.items())), group_size=-1)
    assert turned.recipe("blocks.1.up")[:3] == (4, 64, False)
    assert not settings.same_as(turned)
    assert settings.same_as(Settings(overrides=[list(pair) for pair in settings.overrides.items()], group_size=-1))


def test_ends_and_excluded_modules():
    settings = Settings(overrides={"head": {"bits": 8}, "up": {"bits": 8}}, head_bits=None, group_size=64)
    assert settings.recipe("head", end=True)[:3] == (8, 32, True)
    assert settings.recipe("embed", end=True) is None
    assert settings.recipe("up")[:3] == (8, 64, True)
    settings.modules_to_not_convert = ["up"]
    assert settings.recipe("up") is None


def test_optimize_and_its_layer_programs():
    model = torch_cpullm.optimize(LLAMA.build(), Settings(overrides=MIXED, compute="fp32"))
    check_mixed(model)
    assert {row.level for row in torch_cpullm.report(model).layers} == {"one op"}
    want = torch_cpullm.restore(copy.deepcopy(model))
    assert torch.allclose(logits(model), logits(want), atol=1e-4)
    assert torch_cpullm.optimize(model, Settings(overrides=MIXED, compute="fp32")) is model
    text = r"already optimised with other settings"
    refuses(model, ValueError, text, Settings(compute="fp32"))


def test_groups_that_differ_between_attention_and_mlp_of_a_parallel_layer():
    """Both read one input there, which has one quantisation: such a layer goes linear by linear, and says why."""
    model = Family("falcon", "FalconConfig", {"hidden_size": 96, "num_hidden_layers": 1, "num_attention_heads": 6})
    settings = Settings(overrides={"dense_h_to_4h": {"group_size": 64}}, compute="fp32")
    model = torch_cpullm.optimize(model.build(), settings)
    (layer,) = torch_cpullm.report(model).layers
    assert layer.reason == "products that share an input must have their inputs in one order and group size"
    assert torch.allclose(logits(model), logits(torch_cpullm.restore(copy.deepcopy(model))), atol=1e-4)


def test_from_pretrained_save_and_reload(tmp_path):
    LLAMA.build().save_pretrained(tmp_path / "float")
    config = CpuLlmConfig(overrides=MIXED)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    check_mixed(model)
    model.save_pretrained(tmp_path / "packed")
    stored = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert stored["overrides"] == [[pattern, own] for pattern, own in MIXED.items()]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    check_mixed(again)
    assert torch.equal(logits(again), logits(model))
    assert list(again._cpullm_settings.overrides) == list(MIXED)
    assert torch_cpullm.optimize(again, CpuLlmConfig(overrides=MIXED)) is again
    assert CpuLlmConfig.from_dict(config.to_dict()).overrides == MIXED


def test_compile_backend():
    overrides = {name: own for name, own in MIXED.items() if name != "lm_head"}
    model, settings = LLAMA.build(), {"compute": "fp32", "head_bits": 8, "overrides": overrides}
    want = torch_cpullm.optimize(copy.deepcopy(model), Settings(modules_to_not_convert=["embed_tokens"], **settings))
    model.compile(backend="cpullm", options=settings)
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, logits(want), atol=1e-4)
    text = "q_proj .bits=8, group_size=32, sym=True. and .*k_proj .bits=4, .* share an input"
    model = LLAMA.build()
    model.compile(backend="cpullm", options={"overrides": {"q_proj": {"bits": 8}}})
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=text):
        model(IDS)


@pytest.mark.skipif(VERSION < (5, 18), reason="GGUF files need transformers 5.18")
def test_gguf(tmp_path):
    """Exact types keep the file's codes; what is float in the file follows the overrides."""
    kinds = {"attn_output.": Kind.F16, "attn_v.": Kind.F16, "ffn_": Kind.F32}
    write_model(
        tmp_path / "a.gguf",
        "llama",
        lambda name, shape: next((kind for part, kind in kinds.items() if part in name), kind_by_name(name, shape)),
    )
    config = CpuLlmConfig(overrides={"o_proj": {"bits": 8}, "down_proj": {"group_size": 64, "sym": True}})
    with pytest.warns(UserWarning, match=r"F16 \(2\) quantised to 8 bits"):
        got = recipes(torch_cpullm.load_gguf(tmp_path / "a.gguf", config=config)[0])
    assert got["model.layers.0.self_attn.o_proj"] == (8, 32, True)
    assert got["model.layers.0.self_attn.v_proj"] == (4, 32, False)
    assert got["model.layers.0.mlp.down_proj"] == (4, 64, True)
    assert got["model.layers.0.mlp.up_proj"] == (4, 32, False)
    with pytest.raises(ValueError, match=r"up_proj .* share an input"):
        torch_cpullm.load_gguf(tmp_path / "a.gguf", config=CpuLlmConfig(overrides={"up_proj": {"bits": 8}}))


# ---- what does not fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ("up", "overrides must be a dict of pattern -> .*, got 'up'"),
        ({"up": 8}, "overrides must be .*, got 'up': 8"),
        ({"up": {}}, "overrides must be .*, got 'up': {}"),
        ({5: {"bits": 8}}, "overrides must be .*, got 5: "),
        ([["up", {"bits": 8}, 1]], "overrides must be .*, got "),
        ({"up": {"bit": 8}}, "overrides must be .*, got 'up': {'bit': 8}"),
        ({"up": {"compute": "fp32"}}, "overrides must be .*, got 'up': {'compute': 'fp32'}"),
        ({"up": {"bits": None}}, "overrides: 'up': bits must be 4 or 8, got None"),
        ({"up": {"group_size": 48}}, "overrides: 'up': group_size must be .*, got 48"),
        ({"up": {"sym": "yes"}}, "overrides: 'up': sym must be True or False, got 'yes'"),
    ],
)
def test_wrong_overrides(overrides, text):
    for config in (Settings, CpuLlmConfig):
        with pytest.raises(ValueError, match=text):
            config(overrides=overrides)
    settings = Settings()
    settings.overrides = overrides
    refuses(Tiny(), ValueError, text, settings)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ({"upp": {"bits": 8}}, "overrides: 'upp' matches no module that could be quantised"),
        ({"norm": {"bits": 8}}, "overrides: 'norm' matches no module"),
        ({"(": {"bits": 8}}, r"overrides: '\(' matches no module"),
        ({"head": {"bits": 4}}, r"overrides: embed \(bits=8, .*\) and head \(bits=4, .*\) share a weight and must get"),
    ],
)
def test_overrides_that_do_not_fit_the_model(overrides, text):
    refuses(Tiny(), ValueError, text, Settings(overrides=overrides))


@pytest.mark.parametrize("name", ["q_proj", r"model\.layers\.1\.mlp\.gate_proj", "embed_tokens"])
def test_modules_that_share_an_input_or_a_weight(name, tmp_path):
    """The same error before anything is changed and before a checkpoint's weights are read."""
    family = Family("tied", "LlamaConfig", llama_like(), tied=True)
    settings = CpuLlmConfig(overrides={name: {"bits": 8, "group_size": 64}})
    text = rf"overrides: .*{name[-9:]} .*share (an input|a weight) and must get the same"
    refuses(family.build(), ValueError, text, settings)
    family.build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=text):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings)


def test_an_excluded_neighbour_does_not_count():
    settings = Settings(overrides={"q_proj": {"bits": 8}}, modules_to_not_convert=["k_proj", "v_proj"])
    got = recipes(torch_cpullm.optimize(LLAMA.build(), settings))
    assert got["model.layers.0.self_attn.q_proj"] == (8, 32, True)


def test_sharing_inputs():
    names = ["a.q_proj", "a.o_proj", "a.v_proj", "b.q_proj", "m.gate_proj", "m.up_proj", "m.down_proj", "n.fc1", "w1"]
    assert sharing_inputs(names) == [["a.q_proj", "a.v_proj"], ["m.gate_proj", "m.up_proj"]]
