"""``model.parameters()`` of an optimised model: those of its class's method, found sooner."""

import copy
import gc
import pickle
import weakref
from pathlib import Path

import pytest
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


def mapped(path):
    """Whether this process has a file of the folder mapped."""
    return str(path) in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="/proc/self/maps is Linux's")
@pytest.mark.parametrize("inference", [False, True])
def test_what_stays_does_not_keep_a_checkpoint_mapped(inference, tmp_path):
    """transformers makes norms parts of the mapped file."""
    from transformers import AutoModelForCausalLM

    ALL["llama"].build().save_pretrained(tmp_path)
    with torch.inference_mode(inference):
        model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert mapped(tmp_path)
        want = {name: value.clone() for name, value in model.named_parameters() if "norm" in name}
        torch_cpullm.optimize(model)
    gc.collect()
    assert not mapped(tmp_path)
    assert len(want) == 5
    for name, value in want.items():
        assert torch.equal(model.get_parameter(name), value)
