"""Which decoder layers match, that programs compute what the layers do, and that no program outlives its layer."""

import copy
import dataclasses
import functools
import gc
import pickle
import re
import weakref

import pytest
import torch
from layer_models import ALL, WHY_NOT, GrowingCache, GrowingLayer, optimised, runs
from small_models import llama
from torch import nn
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import torch_cpullm
from torch_cpullm import layer_match, layer_probe
from torch_cpullm.layer import ONE_OP, PER_LINEAR, LayerProgram, install_programs, layer_levels, remove_programs
from torch_cpullm.layer_match import match_layers

IDS = torch.tensor([[5, 17, 3, 40, 22, 9, 31]])


def close(got, want, bound=1e-3):
    assert got.shape == want.shape
    assert float((got - want).abs().max()) <= bound * float(want.abs().max())


def small(**settings):
    """A Llama of two layers with packed linears and programs."""
    model = torch_cpullm.optimize(llama(), torch_cpullm.config.Settings(**{"compute": "fp32", **settings}))
    assert all(match.spec is not None for match in install_programs(model))
    return model


def layers(model):
    return model.model.layers


def levels(model):
    return [level for _, level, _ in layer_levels(model)]


def reasons(model):
    return [reason for _, _, reason in layer_levels(model)]


class Counted:
    """Counts the calls that programs serve."""

    def __init__(self, model):
        self.calls = 0
        for layer in layers(model):
            program = layer.forward
            program._run = self.counting(program._run)

    def counting(self, run):
        def counted(*args):
            self.calls += 1
            return run(*args)

        return counted


@torch.no_grad()
def forward(model, **options):
    return model(IDS, **options).logits


# ---- families -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(ALL) - set(WHY_NOT)))
def test_a_family_that_matches(name):
    """Every layer is one op, and the whole model computes what it did: prefill, decode, chunks, left padding."""
    model = optimised(name)
    want = runs(model, DynamicCache)
    matches = install_programs(model)
    assert [match.reason for match in matches] == [""] * model.config.num_hidden_layers
    assert set(levels(model)) == {ONE_OP}
    before = GrowingLayer.reserved
    got = runs(model, lambda: GrowingCache(len(matches)))
    assert GrowingLayer.reserved == before + 10 * len(matches), "a call did not go through a program"
    for mine, its in zip(got, want, strict=True):
        close(mine, its)
    for mine, its in zip(runs(model, DynamicCache), want, strict=True):
        assert torch.equal(mine, its), "a cache of another make goes through the layers themselves"


@pytest.mark.parametrize("name", sorted(WHY_NOT))
def test_a_family_that_does_not(name):
    model = optimised(name)
    matches = install_programs(model)
    assert len(matches) == model.config.num_hidden_layers
    bad = [match for match in matches if match.spec is None]
    assert bad
    assert all(re.search(WHY_NOT[name], match.reason) for match in bad)
    assert set(reasons(model)) >= {match.reason for match in bad}
    assert all("\n" not in match.reason and len(match.reason) < 100 for match in bad)


def test_what_specs_say():
    """A few numbers that no probe of the whole would show to be swapped."""
    specs = [match.spec for match in match_layers(optimised("gemma2"))]
    assert [spec.window for spec in specs] == [7, 0, 7]
    assert {(spec.softcap, spec.scale, spec.act) for spec in specs} == {(50.0, 24**-0.5, "gelu_tanh")}
    assert all(spec.post_attention_norm and spec.post_mlp_norm and not spec.parallel for spec in specs)
    neox = match_layers(optimised("gpt-neox"))[0].spec
    assert (neox.norm, neox.parallel, neox.rotary_dim, neox.head_dim) == ("layer", True, 6, 20), (
        "three frequencies of int(20 / 4)"
    )
    assert (neox.qkv_layout.group_stride, neox.qkv_layout.k_start, neox.qkv_layout.v_start) == (60, 20, 40)
    assert match_layers(optimised("phi3"))[0].spec.window == 11
    phi3 = match_layers(optimised("phi3-longrope"))[0].spec
    assert (phi3.window, phi3.gated, len(phi3.up), phi3.qkv_layout.group_stride) == (0, True, 1, 0)
    gptj = match_layers(optimised("gpt-j"))[0]
    assert (gptj.spec.rope_style, gptj.spec.rotary_dim, gptj.outputs, gptj.cache_name) == (
        "interleaved",
        8,
        2,
        "layer_past",
    )
    smollm = [match.spec.rotary_dim for match in match_layers(optimised("smollm3"))]
    assert smollm == [16, 0]
    granite = match_layers(optimised("granite"))[0].spec
    assert (granite.scale, granite.residual_scale) == (0.3, 0.7)
    assert match_layers(optimised("olmo2"))[0].spec.input_norm is None


@pytest.mark.parametrize(
    ("name", "field", "wrong"),
    [
        ("llama", "rope_style", "interleaved"),
        ("llama", "rotary_dim", 0),
        ("cohere", "rope_style", "half"),
        ("llama", "parallel", True),
        ("stablelm-parallel", "parallel", False),
        ("gpt-neox", "layout", "concat"),
        ("phi3-longrope", "layout", "grouped"),
        ("phi3", "window", False),
        ("gemma2", "softcap", False),
        ("granite", "scale", ""),
        ("granite", "residual", ""),
        ("gemma3", "norms", (("input", "input_layernorm"), ("mlp", "post_attention_layernorm"))),
    ],
)
def test_the_probe_tells_readings_apart(name, field, wrong, monkeypatch):
    """With one property read wrongly, nothing else being open, no layer matches."""
    found = layer_probe.choices

    def wrongly(*args):
        return [replaced for choice in found(*args) if (replaced := dataclasses.replace(choice, **{field: wrong}))]

    monkeypatch.setattr(layer_probe, "choices", wrongly)
    monkeypatch.setattr(layer_match, "_probes", {})
    reason = match_layers(optimised(name))[0].reason
    assert reason == "no arrangement of its parts computes what it does"


def test_one_probe_per_structure_and_no_model_kept():
    layer_match._probes.clear()
    model = optimised("llama")
    match_layers(model)
    assert len(layer_match._probes) == 1
    match_layers(optimised("llama"))
    assert len(layer_match._probes) == 1
    install_programs(model)
    forward(model)
    gone = weakref.ref(model)
    gc.disable()  # at once, without the collector
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


# ---- structures that must not match ---------------------------------------------------------------------------------


class Doubled(LlamaDecoderLayer):
    def forward(self, hidden_states, past_key_values=None, **kwargs):
        return super().forward(2 * hidden_states, past_key_values=past_key_values, **kwargs)


class WithArgument(LlamaDecoderLayer):
    def forward(self, hidden_states, past_key_values=None, strength=None, **kwargs):
        return super().forward(hidden_states, past_key_values=past_key_values, **kwargs)


def plain():
    return torch_cpullm.optimize(llama(), torch_cpullm.config.Settings(compute="fp32"))


def only_second_fails(model, words):
    found = match_layers(model)
    assert found[0].spec is not None
    assert found[1].spec is None
    assert words in found[1].reason, found[1].reason


@pytest.mark.parametrize(
    ("kind", "words"), [(Doubled, "not of the class that its model makes"), (WithArgument, "'strength'")]
)
def test_a_subclass_with_another_forward(kind, words):
    model = plain()
    layers(model)[1].__class__ = kind
    only_second_fails(model, words)


def test_a_forward_replaced():
    model = plain()
    remove_programs(model)
    first = layers(model)[0]
    first.forward = first.forward
    assert [match.reason for match in install_programs(model)] == ["its forward was replaced on the instance", ""]


def test_a_forward_replaced_inside():
    model = plain()
    attention = layers(model)[1].self_attn
    attention.forward = attention.forward  # the class's own, as transformers 5.0 leaves it behind
    assert all(match.spec is not None for match in match_layers(model))
    attention.forward = functools.partial(attention.forward)
    only_second_fails(model, "the forward of self_attn was replaced")


def test_an_extra_parameter():
    model = plain()
    layers(model)[1].gate = nn.Parameter(torch.ones(()))
    only_second_fails(model, "holds 'gate'")


def test_an_extra_module():
    model = plain()
    layers(model)[1].mlp.adapter = nn.Softplus()
    only_second_fails(model, "mlp.adapter has no known role")


def test_an_extra_number():
    model = plain()
    layers(model)[1].self_attn.temperature = 2.0
    only_second_fails(model, "'temperature'")


def test_a_linear_left_in_float():
    model = torch_cpullm.optimize(
        llama(), torch_cpullm.config.Settings(modules_to_not_convert=["layers.1.mlp.up_proj"])
    )
    only_second_fails(model, "mlp.up_proj is not packed")


def test_an_unknown_number_in_the_config():
    model = plain()
    model.config.attention_floor = 8192
    assert {match.reason for match in match_layers(model)} == {"the config's 'attention_floor' is not known"}


def test_a_scale_changed_on_the_instance_is_read():
    model = plain()
    for layer in layers(model):
        layer.self_attn.scaling = 0.5
    want = forward(model)
    assert {match.spec.scale for match in install_programs(model)} == {0.5}
    close(forward(model, use_cache=False), want)


def test_a_norm_of_another_kind():
    model = plain()
    layers(model)[1].input_layernorm = nn.LayerNorm(64)
    only_second_fails(model, "different kinds")


# ---- calls that programs leave to the layers ------------------------------------------------------------------------


def test_hidden_states_are_those_of_the_layers():
    model = small()
    counted = Counted(model)
    got = model(IDS, output_hidden_states=True, use_cache=False)
    assert counted.calls == 2
    remove_programs(model)
    want = model(IDS, output_hidden_states=True, use_cache=False)
    assert len(got.hidden_states) == 3
    for mine, its in zip(got.hidden_states, want.hidden_states, strict=True):
        close(mine, its)


def test_attentions_are_right_and_programs_come_back():
    model = small()
    model.set_attn_implementation("eager")
    assert levels(model) == [ONE_OP] * 2, "looked at again, since the config has changed"
    counted = Counted(model)
    mask = torch.ones_like(IDS)
    got = model(IDS, attention_mask=mask, output_attentions=True, use_cache=False)
    assert counted.calls == 0
    assert [tuple(each.shape) for each in got.attentions] == [(1, 4, 7, 7)] * 2
    assert levels(model) == [ONE_OP] * 2
    counted = Counted(model)  # transformers 5.0 replaces forwards to record, so that the layers are matched again
    model(IDS, attention_mask=mask, use_cache=False)
    assert counted.calls == 2, "the hooks that recorded stay, but wait for nothing"
    model(IDS, attention_mask=mask, output_hidden_states=True, use_cache=False)
    assert counted.calls == 4
    assert levels(model) == [ONE_OP] * 2


def test_a_hook_inside_is_called():
    model = small()
    counted, seen = Counted(model), []
    handle = layers(model)[0].mlp.down_proj.register_forward_hook(lambda *_: seen.append(1))
    forward(model, use_cache=False)
    assert (seen, counted.calls) == ([1], 1)
    assert reasons(model) == ["modules inside have forward hooks", ""]
    handle.remove()
    forward(model, use_cache=False)
    assert (seen, counted.calls) == ([1], 3)


def test_hooks_on_the_layer_itself_are_called():
    model = small()
    counted, seen = Counted(model), []
    layers(model)[0].register_forward_hook(lambda *_: seen.append(1))
    forward(model, use_cache=False)
    assert (seen, counted.calls) == ([1], 2)


def test_gradients_and_unknown_arguments():
    model = small()
    counted = Counted(model)
    layer = layers(model)[0]
    x, cos = torch.randn(1, 3, 64), torch.ones(1, 3, 16)
    with pytest.raises(RuntimeError, match="no gradient"):
        layer(x.clone().requires_grad_(), position_embeddings=(cos, cos))
    assert counted.calls == 0
    layer(x, position_embeddings=(cos, cos), something=None)
    assert counted.calls == 1
    layer(x, position_embeddings=(cos, cos), cu_seq_lens_q=torch.ones(2))
    assert counted.calls == 1
    assert layer(hidden_states=x, position_embeddings=(cos, cos)).shape == x.shape
    assert counted.calls == 1


def test_training_mode_is_the_layers_business():
    model = small()
    model.train()
    assert reasons(model) == ["it is in training mode"] * 2
    model.eval()
    assert levels(model) == [ONE_OP] * 2


def test_generate_with_the_stock_cache():
    model = small()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    got = model.generate(IDS, **options)
    remove_programs(model)
    assert torch.equal(got, model.generate(IDS, **options))


# ---- never stale ----------------------------------------------------------------------------------------------------


class Lora(nn.Module):
    """What an adapter does to a linear: wraps it and adds something."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


def check_against_plain(model):
    """The model computes what it would without programs."""
    got = forward(model, use_cache=False)
    level = levels(model)
    bare = copy.deepcopy(model)
    remove_programs(bare)
    close(got, forward(bare, use_cache=False))
    return level


def test_an_adapter_demotes_and_its_removal_brings_back():
    model = small()
    before = forward(model, use_cache=False)
    base = layers(model)[0].self_attn.q_proj
    layers(model)[0].self_attn.q_proj = Lora(base)
    assert check_against_plain(model) == [PER_LINEAR, ONE_OP]
    assert not torch.allclose(forward(model, use_cache=False), before)
    layers(model)[0].self_attn.q_proj = base
    assert check_against_plain(model) == [ONE_OP, ONE_OP]
    close(forward(model, use_cache=False), before)


@pytest.mark.parametrize("how", ["set_submodule", "packed", "bias"])
def test_another_weight_is_used(how):
    model, other = small(), small()
    before = forward(model, use_cache=False)
    name = "model.layers.0.mlp.up_proj"
    donor = layers(other)[1].mlp.up_proj
    if how == "set_submodule":
        model.set_submodule(name, donor)
    elif how == "packed":
        model.get_submodule(name).packed = donor.packed
    else:
        model.get_submodule(name).bias = nn.Parameter(torch.ones(112), requires_grad=False)
    assert check_against_plain(model) == [ONE_OP, ONE_OP]
    assert not torch.allclose(forward(model, use_cache=False), before)


def test_another_gain_is_used():
    model = small()
    norm = layers(model)[0].input_layernorm
    with torch.no_grad():
        norm.weight.mul_(3)
    assert check_against_plain(model) == [ONE_OP, ONE_OP]
    norm.weight = nn.Parameter(torch.full((64,), 0.5), requires_grad=False)
    assert check_against_plain(model) == [ONE_OP, ONE_OP]
    norm.variance_epsilon = 0.3
    check_against_plain(model)
    norm.forward = lambda x: 2 * x
    assert check_against_plain(model) == [PER_LINEAR, ONE_OP]
    model.to(torch.bfloat16)
    del norm.forward
    assert levels(model)[1] == ONE_OP


def test_a_changed_setting_is_used():
    model = small()
    watch = layers(model)[0].forward._watch
    model.config.pad_token_id = 3
    assert watch.same(), "no layer reads it"
    layers(model)[0].self_attn.scaling = 1.5
    assert check_against_plain(model) == [ONE_OP, ONE_OP]
    model.config.rms_norm_eps = 0.5
    assert check_against_plain(model) == [ONE_OP, ONE_OP]
    model.config.num_attention_heads = 7
    assert set(reasons(model)) == {"the sizes of its heads are not known"}


def test_a_layer_that_moves_and_one_that_goes():
    model = small()
    first, second = layers(model)
    model.model.layers = nn.ModuleList([second, first])
    check_against_plain(model)
    model.model.layers = nn.ModuleList([first])
    assert len(levels(model)) == 1


def test_restore_and_optimize_again():
    model = small()
    torch_cpullm.restore(model)
    assert not any("forward" in layer.__dict__ for layer in layers(model))
    assert list(layer_levels(model)) == []
    forward(model)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_has_programs_of_its_own(how):
    model = small()
    want = forward(model, use_cache=False)
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        layers(model)[0].input_layernorm.weight.zero_()
    assert torch.equal(forward(twin, use_cache=False), want)
    assert levels(twin) == [ONE_OP, ONE_OP]
    assert layers(twin)[0].forward._layer() is layers(twin)[0]
    alone = copy.deepcopy(layers(model)[0])
    assert isinstance(alone.forward, LayerProgram)
    x, cos = torch.randn(1, 3, 64), torch.ones(1, 3, 16)
    assert alone(x, position_embeddings=(cos, cos)).shape == x.shape


# ---- the report -----------------------------------------------------------------------------------------------------


def test_the_report_names_levels():
    model = plain()
    remove_programs(model)
    assert torch_cpullm.report(model).layers == []
    layers(model)[1].self_attn.a_setting_with_a_very_long_name_that_no_program_has_ever_heard_of_before = 2.0
    install_programs(model)
    report = torch_cpullm.report(model)
    assert [(row.name, row.level) for row in report.layers] == [
        ("model.layers.0", ONE_OP),
        ("model.layers.1", PER_LINEAR),
    ]
    text = str(report)
    assert "decoder layers model.layers.*: 1 of 2 as one op\n" in text
    assert "1 of 2 as per-linear ops: self_attn has the attribute" in text
    assert max(map(len, text.splitlines())) <= 100
