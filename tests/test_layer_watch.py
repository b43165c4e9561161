"""Whether layers are what they were: every change is seen, by a number of writes or, without one, by values."""

import copy
import gc
import itertools
import weakref

import pytest
import torch
from layer_models import optimised
from torch import nn

from torch_cpullm import layer_watch
from torch_cpullm.layer_watch import Glance, Watch, written


@pytest.fixture(params=["numbers", "values"], autouse=True)
def way(request, monkeypatch):
    """values: a torch without dict_version."""
    if request.param == "values":
        counted = itertools.count()
        monkeypatch.setattr(layer_watch, "_version_of_dict", lambda _: next(counted))
    return request.param


def watched():
    model = optimised("llama")
    return model, Watch(list(model.model.layers), model.config)


CHANGES = {
    "a submodule": lambda layer, model: layer.set_submodule("mlp.act_fn", nn.Tanh()),
    "a linear, as adapters do": lambda layer, model: setattr(layer.mlp, "up_proj", nn.Sequential(layer.mlp.up_proj)),
    "a linear, behind setattr": lambda layer, model: layer.mlp._modules.update(up_proj=copy.copy(layer.mlp.up_proj)),
    "codes of a linear": lambda layer, model: setattr(layer.mlp.up_proj, "packed", copy.copy(layer.mlp.up_proj.packed)),
    "compute of a linear": lambda layer, model: setattr(layer.mlp.up_proj, "compute", "int8"),
    "a module more": lambda layer, model: layer.self_attn.add_module("more", nn.Identity()),
    "a module less": lambda layer, model: delattr(layer, "mlp"),
    "a weight": lambda layer, model: setattr(layer.input_layernorm, "weight", nn.Parameter(torch.ones(80))),
    "a weight in place": lambda layer, model: layer.input_layernorm.weight.detach().mul_(2),
    "a setting": lambda layer, model: setattr(layer.self_attn, "scaling", 0.5),
    "a setting of the layer": lambda layer, model: setattr(layer, "hidden_size", 5),
    "a setting more": lambda layer, model: setattr(layer.mlp, "more", 1),
    "a setting less": lambda layer, model: delattr(layer.self_attn, "scaling"),
    "a forward": lambda layer, model: setattr(layer.mlp, "forward", lambda x: x),
    "training": lambda layer, model: layer.train(),
    "the config": lambda layer, model: setattr(model.config, "rms_norm_eps", 0.5),
}


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_seen(name, place):
    model, watch = watched()
    assert watch.same()
    CHANGES[name](model.model.layers[place], model)
    assert not watch.same()
    assert not watch.same()


def test_what_changes_nothing_is_forgiven(way):
    model, watch = watched()
    before = watch.written()
    attention = model.model.layers[1].self_attn
    for write in (
        lambda: setattr(attention, "scaling", attention.scaling * 1.0),
        lambda: setattr(model.config, "pad_token_id", 3),
        lambda: setattr(optimised("qwen2").model.layers[0].mlp.up_proj, "compute", "fp32"),
    ):
        write()
        assert watch.written() > before
        assert watch.same()
        before = watch.written()
        assert (watch.written() == before) == (way == "numbers")
    attention.scaling = 0.5
    assert not watch.same()


def test_a_look_where_nothing_was_written_compares_nothing(way, monkeypatch):
    _, watch = watched()
    looks, real = [], Watch._look
    monkeypatch.setattr(Watch, "_look", lambda self: looks.append(1) or real(self))
    assert all(watch.same() for _ in range(3))
    assert len(looks) == (0 if way == "numbers" else 3)


def test_tensors_without_versions():
    """Of inference_mode; writing to those is not seen, putting others in their place is."""
    with torch.inference_mode():
        model, watch = watched()
        assert watch.same()
        norm = model.model.layers[1].input_layernorm
        norm.weight = nn.Parameter(norm.weight * 2, requires_grad=False)
        assert not watch.same()


def test_numbers_grow_with_every_write(way):
    first, second, tensor = {"a": 1}, {}, torch.zeros(2)
    found = [written((first, second), (tensor,))]
    for write in (
        lambda: first.update(a=2),
        lambda: second.setdefault("b"),
        lambda: tensor.add_(1),
        lambda: first.pop("a"),
        second.clear,
    ):
        write()
        found.append(written((first, second), (tensor,)))
    assert found == sorted(set(found))
    if way == "numbers":
        assert written((first, second), (tensor,)) == found[-1]


def test_layers_that_are_gone():
    model, watch = watched()
    gone = [weakref.ref(layer) for layer in model.model.layers]
    gc.collect()
    gc.disable()
    try:
        del model
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()
    assert not watch.same()
    with pytest.raises(AttributeError):
        watch.written()


def test_another_object_of_equal_value_is_a_change():
    """It may be written to later, and its writes are not counted."""
    model, watch = watched()
    model.model.layers[1].self_attn.config = copy.deepcopy(model.config)
    assert not watch.same()
    model, watch = watched()
    model.config.rope_parameters = copy.deepcopy(model.config.rope_parameters)
    assert not watch.same()


GLANCES = {
    "a setting": lambda m: setattr(m.config, "use_cache", not m.config.use_cache),
    "the config": lambda m: setattr(m, "config", copy.deepcopy(m.config)),
    "a child": lambda m: setattr(m, "norm", nn.Identity()),
    "an attribute more": lambda m: setattr(m, "note", 1),
    "an attribute less": lambda m: delattr(m, "padding_idx"),
    "an attribute": lambda m: setattr(m, "padding_idx", 7),
    "the dict of children": lambda m: m.__dict__.update(_modules=dict(m._modules)),
    "training": lambda m: m.train(),
}


@pytest.mark.parametrize("name", GLANCES)
def test_a_glance_sees_every_change(name):
    model = optimised("llama").model
    glance = Glance(model, ["use_cache"])
    model.config.rms_norm_eps = 0.5  # not one of its settings
    model.__dict__["forward"] = None
    assert glance.same(model)
    GLANCES[name](model)
    assert not glance.same(model)
    assert not glance.same(model)
