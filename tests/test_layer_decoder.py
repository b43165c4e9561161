"""A decode step of a whole decoder: the same bits as its class's forward, and only where nothing else happens."""

import copy
import gc
import weakref

import pytest
import torch
from layer_models import ALL, counted, ids_of

import torch_cpullm
from torch_cpullm.kv_cache import CpuLlmCache
from torch_cpullm.layer_decoder import DecoderStep


def optimised(name="llama", **settings):
    """Its last norm and head are their modules', see test_layer_token.py."""
    model = torch_cpullm.optimize(ALL[name].build(), torch_cpullm.CpuLlmConfig(**settings))
    model.__dict__.pop("forward", None)
    return model


def step_of(model):
    return next(m.__dict__["forward"] for m in model.modules() if isinstance(m.__dict__.get("forward"), DecoderStep))


def without(model):
    step_of(model)._stack = None
    return model


def generate(model, ids, tokens=12, **kwargs):
    settings = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": 10**6} | kwargs
    return model.generate(ids, output_logits=True, return_dict_in_generate=True, **settings)


def call(model, cache, ids, **kwargs):
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True, **kwargs)


def warm(model, tokens=5):
    """A cache after a prompt and three steps, the last of which was looked at."""
    cache = CpuLlmCache(model.config)
    for position, count in ((0, tokens), (tokens, 1), (tokens + 1, 1), (tokens + 2, 1)):
        call(model, cache, ids_of(model, 1, count), position_ids=torch.arange(position, position + count)[None])
    assert step_of(model)._learnt is not None
    return cache


def position_of(cache):
    return torch.tensor([[cache.get_seq_length()]])


def test_a_tokenizer_that_generate_hands_on_changes_nothing(monkeypatch):
    """generate(tokenizer=..), as `transformers serve` calls it, passes it to every forward."""
    model = optimised()
    ids = ids_of(model, 1, 7)
    want = generate(model, ids)
    steps = counted(monkeypatch, "_layers")
    got = generate(model, ids, tokenizer=object())
    assert steps == [11]
    for a, b in zip(want.logits, got.logits, strict=True):
        assert torch.equal(a, b)


NAMES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "gpt-neox",
    "olmo2",
    "smollm3",
    "gemma2",
    "gemma3",
    "qwen3-window",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kv_cache", ["auto", "int8"])
def test_the_same_as_the_classs_forward(name, kv_cache, monkeypatch):
    """The same bits, but for rounding where a window leaves keys out."""
    model = optimised(name, kv_cache=kv_cache)
    steps = counted(monkeypatch, "_layers")
    window = getattr(model.config, "sliding_window", None) or 100
    ids = ids_of(model, 2, 9)
    short = generate(model, ids, attention_mask=torch.ones_like(ids), tokens=16)
    assert steps[0] == 14  # not the prompt's, and not the one that is learnt from
    plain = generate(without(model), ids, attention_mask=torch.ones_like(ids), tokens=16)
    assert steps[0] == 14
    assert torch.equal(short.sequences, plain.sequences)
    for position, (mine, its) in enumerate(zip(short.logits, plain.logits, strict=True), start=9):
        assert torch.equal(mine, its) or (position > window and torch.allclose(mine, its, rtol=1e-3, atol=1e-4))


def test_left_padding_goes_the_long_way(monkeypatch):
    model = optimised()
    generate(model, ids_of(model, 2, 9))
    steps = counted(monkeypatch, "_layers")
    ids = ids_of(model, 2, 9)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    padded = generate(model, ids, attention_mask=mask)
    assert steps[0] == 0
    assert all(map(torch.equal, padded.logits, generate(without(model), ids, attention_mask=mask).logits))


@pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"do_sample": True}], ids=str)
def test_generation_modes(kwargs):
    model = optimised()
    generate(model, ids_of(model, 1, 9))
    ids = ids_of(model, 1, 9)
    torch.manual_seed(3)
    short = generate(model, ids, **kwargs).sequences
    torch.manual_seed(3)
    assert torch.equal(short, generate(without(model), ids, **kwargs).sequences)


def test_recorded_outputs_go_the_long_way(monkeypatch):
    model = optimised()
    cache, steps = warm(model), counted(monkeypatch, "_layers")
    ids = ids_of(model, 1, 1)
    out = call(model, cache, ids, output_hidden_states=True, position_ids=position_of(cache))
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    model.config.output_hidden_states = True
    assert call(model, cache, ids, position_ids=position_of(cache)).hidden_states is not None
    assert steps[0] == 0


def test_results_of_another_form_go_the_long_way(monkeypatch):
    model = optimised()
    cache, steps = warm(model), counted(monkeypatch, "_layers")
    ids = ids_of(model, 1, 1)
    assert isinstance(call(model.model, cache, ids, position_ids=position_of(cache), return_dict=False), tuple)
    with torch.no_grad():
        model.model(ids, past_key_values=cache, use_cache=False, position_ids=position_of(cache))
    assert steps[0] == 0


@pytest.mark.parametrize("part", ["norm", "embed_tokens", "rotary_emb"])
def test_another_module_goes_the_long_way(part, monkeypatch):
    model = optimised()
    cache, steps = warm(model), counted(monkeypatch, "_layers")
    setattr(model.model, part, copy.deepcopy(getattr(model.model, part)))
    call(model, cache, ids_of(model, 1, 1), position_ids=position_of(cache))
    assert steps[0] == 0


def test_the_short_way_comes_back_when_the_decoder_has_settled(monkeypatch):
    model = optimised()
    cache, steps = warm(model), counted(monkeypatch, "_layers")
    for note in range(12):  # more often than it is looked at in vain
        model.model.note = note
        before = steps[0]
        for _ in range(4):
            call(model, cache, ids_of(model, 1, 1), position_ids=position_of(cache))
        assert steps[0] > before, note


def test_hooks_of_embedding_and_norm_are_called(monkeypatch):
    model = optimised()
    cache, steps = warm(model), counted(monkeypatch, "_layers")
    seen = []
    model.model.norm.register_forward_hook(lambda module, args, y: seen.append("norm"))
    model.model.embed_tokens.register_forward_hook(lambda module, args, y: seen.append("embedding"))
    call(model, cache, ids_of(model, 1, 1), position_ids=position_of(cache))
    assert steps[0] == 1
    assert seen == ["embedding", "norm"]


def test_a_hook_on_a_layer_and_a_changed_weight_are_noticed(monkeypatch):
    model = optimised()
    cache, steps = warm(model), counted(monkeypatch, "_layers")
    seen = []
    handle = model.model.layers[1].register_forward_hook(lambda module, args, y: seen.append(y))
    call(model, cache, ids_of(model, 1, 1), position_ids=position_of(cache))
    assert len(seen) == 1
    handle.remove()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.mul_(2)
    ids = ids_of(model, 1, 1)
    twin = copy.deepcopy(cache)
    changed = call(model, cache, ids, position_ids=position_of(cache)).logits
    assert steps[0] == 0
    assert torch.equal(changed, call(without(model), twin, ids, position_ids=position_of(twin)).logits)


def test_a_cache_of_another_make_goes_the_long_way(monkeypatch):
    from transformers import DynamicCache

    model = optimised()
    warm(model)
    steps = counted(monkeypatch, "_layers")
    cache = DynamicCache(config=model.config)
    for position in range(3):
        call(model, cache, ids_of(model, 1, 1), position_ids=torch.tensor([[position]]))
    assert steps[0] == 0
    assert cache.get_seq_length() == 3


def test_copies_and_deleted_models():
    model = optimised()
    warm(model)
    twin = copy.deepcopy(model)
    assert step_of(twin)._stack is None
    ids = ids_of(model, 1, 9)
    assert torch.equal(generate(model, ids).sequences, generate(twin, ids).sequences)
    torch_cpullm.restore(twin)
    assert not any("forward" in m.__dict__ for m in twin.modules())
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(model)
        del model
        assert gone() is None
    finally:
        gc.enable()
