"""``model.parameters()`` of an optimised model: those of its class's method, found sooner."""

import copy
import gc
import pickle
import weakref

import torch
from layer_models import ALL
from torch import nn

import torch_cpullm


def ids(parameters):
    return [id(parameter) for parameter in parameters]


def optimised():
    return torch_cpullm.optimize(ALL["llama"].build())


def check(model):
    for recurse in (True, False):
        assert ids(model.parameters(recurse)) == ids(type(model).parameters(model, recurse))
    assert model.device.type == "cpu"


def test_all_of_them_in_order():
    model = optimised()
    check(model)
    assert len(ids(model.parameters())) == 19
    check(copy.deepcopy(model))
    check(pickle.loads(pickle.dumps(model)))
    assert "parameters" not in torch_cpullm.restore(model).__dict__


def test_a_model_that_has_changed():
    model = optimised()
    model.model.layers[0].input_layernorm.weight = nn.Parameter(torch.ones(80), requires_grad=False)
    check(model)
    model.model.layers[0].input_layernorm.weight = None
    check(model)
    model.model.layers = model.model.layers[1:]
    check(model)
    model.model.embed_tokens = nn.Embedding(257, 80)
    assert set(ids(model.parameters())) == set(ids(type(model).parameters(model)))
    del model.model.layers
    check(model)
    model.lm_head = model.model = None
    assert list(model.parameters()) == []


def test_a_deleted_model_is_gone():
    model = optimised()
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(model)
        made = model.parameters()
        del model
        del made
        assert gone() is None
    finally:
        gc.enable()
