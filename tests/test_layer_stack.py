"""All layers of a decoder as one operator: the same bits as one by one, and only where nothing happens in between."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from layer_models import ALL
from torch import nn

import torch_cpullm
from torch_cpullm import ops
from torch_cpullm.kv_cache import CpuLlmCache
from torch_cpullm.layer import LayerProgram
from torch_cpullm.layer_program import Stack
from torch_cpullm.layer_stack import BUFFERS


def optimised(name="llama", **settings):
    return torch_cpullm.optimize(ALL[name].build(), torch_cpullm.CpuLlmConfig(**settings))


def ids_of(model, batch, tokens):
    return torch.randint(1, model.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


def programs(model):
    found = [module.__dict__.get("forward") for module in model.modules()]
    return [each for each in found if isinstance(each, LayerProgram)]


def stack_of(model):
    return programs(model)[0]._stack


def without(model):
    for program in programs(model):
        program._stack = None
    return model


def counted(monkeypatch):
    """The number of steps that ran as one operator, as a list of one."""
    count, real = [0], Stack.__call__

    def forward(*args):
        count[0] += 1
        return real(*args)

    monkeypatch.setattr(Stack, "__call__", forward)
    return count


def generate(model, ids, **kwargs):
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0} | kwargs
    return model.generate(ids, output_logits=True, return_dict_in_generate=True, **settings)


@pytest.mark.parametrize(
    "name", ["llama", "mistral", "qwen2", "qwen3", "phi3", "gpt-neox", "granite", "olmo2", "smollm3"]
)
@pytest.mark.parametrize("kv_cache", ["auto", "int8"])
def test_the_same_bits_as_one_by_one(name, kv_cache, monkeypatch):
    model = optimised(name, kv_cache=kv_cache)
    assert stack_of(model) is not None
    steps = counted(monkeypatch)
    ids = ids_of(model, 2, 9)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    together = generate(model, ids, attention_mask=mask)
    assert steps[0] == 10  # of 12 tokens the first is the prompt's, the second is looked at
    apart = generate(without(model), ids, attention_mask=mask)
    assert steps[0] == 10
    assert torch.equal(together.sequences, apart.sequences)
    assert all(map(torch.equal, together.logits, apart.logits))


@pytest.mark.parametrize(
    "kwargs",
    [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"do_sample": True}],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_generation_modes(kwargs):
    model = optimised()
    ids = ids_of(model, 1, 9)
    torch.manual_seed(3)
    together = generate(model, ids, **kwargs).sequences
    torch.manual_seed(3)
    assert torch.equal(together, generate(without(model), ids, **kwargs).sequences)


def test_layers_with_tables_of_their_own_run_one_by_one():
    assert all(program._stack is None for program in programs(optimised("gpt-j")))


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_layers_with_different_masks_do_not_run_from_the_first_ones_call(name):
    model = optimised(name)
    ids = ids_of(model, 2, 9)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    generate(model, ids, attention_mask=mask)
    assert not stack_of(model)._may_run


def step(model, cache, ids, **kwargs):
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True, **kwargs)


def warm(model):
    """A cache after a prompt and two steps: the stack may run."""
    cache = CpuLlmCache(model.config)
    for tokens in (5, 1, 1):
        step(model, cache, ids_of(model, 1, tokens))
    assert stack_of(model)._may_run
    return cache


def test_recorded_states_and_hooks_are_right(monkeypatch):
    model = optimised()
    cache, steps = warm(model), counted(monkeypatch)
    ids = ids_of(model, 1, 1)
    states = step(model, cache, ids, output_hidden_states=True).hidden_states
    assert steps[0] == 0
    assert len({t.data_ptr() for t in states}) == len(states)
    seen = []
    handle = model.model.layers[1].register_forward_hook(lambda module, args, y: seen.append(y))
    step(model, cache, ids)
    assert steps[0] == 0
    assert len(seen) == 1
    handle.remove()


def test_a_hook_inside_a_layer_is_called_whenever_it_comes(monkeypatch):
    """Hooks are looked for only where one has been registered since, on whatever module of the process."""
    model = optimised()
    cache, steps = warm(model), counted(monkeypatch)
    ids, inner = ids_of(model, 1, 1), model.model.layers[1].mlp
    for count in range(1, 4):
        for _ in range(3):
            step(model, cache, ids)
        nn.Linear(1, 1).register_forward_hook(print)  # elsewhere: one more number
        step(model, cache, ids)
        seen, before = [], steps[0]
        handle = inner.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        step(model, cache, ids)
        step(model, cache, ids)
        assert (len(seen), steps[0]) == (2, before)
        handle.remove()
        step(model, cache, ids)
        assert (len(seen), steps[0]) == (2, before + 1)
        assert steps[0] == 5 * count


def test_a_wrapped_forward_is_called(monkeypatch):
    """As transformers 5.0 wraps the layers whose outputs it records."""
    model = optimised()
    cache, steps = warm(model), counted(monkeypatch)
    layer, seen = model.model.layers[1], []
    program = layer.forward
    layer.forward = lambda *args, **kwargs: seen.append(program(*args, **kwargs)) or seen[-1]
    step(model, cache, ids_of(model, 1, 1))
    assert (steps[0], len(seen)) == (0, 1)
    layer.forward = program
    step(model, cache, ids_of(model, 1, 1))
    assert (steps[0], len(seen)) == (1, 1)


def test_a_layer_called_by_itself_is_only_itself(monkeypatch):
    model = optimised()
    cache, steps = warm(model), counted(monkeypatch)
    x = torch.randn(1, 1, model.config.hidden_size)
    rotary = model.model.rotary_emb(x, torch.tensor([[cache.get_seq_length()]]))
    with torch.no_grad():
        y = model.model.layers[0](x, attention_mask=None, position_embeddings=rotary, past_key_values=cache)
    assert steps[0] == 0
    assert (cache.layers[0].length, cache.layers[1].length) == (8, 7)
    assert y.shape == x.shape


def test_a_replaced_module_is_seen(monkeypatch):
    model = optimised()
    cache, steps = warm(model), counted(monkeypatch)
    model.model.layers[1].mlp.up_proj.packed.scales.zero_()  # in place: the program reads the same memory
    ids = ids_of(model, 1, 1)
    step(model, cache, ids)
    assert steps[0] == 1
    model.model.layers[1].set_submodule("mlp.act_fn", nn.Tanh())
    step(model, cache, ids)
    assert steps[0] == 1


def test_a_decoder_that_interferes_is_an_error_once(monkeypatch):
    """The model multiplies between its layers from some step on: no wrong result, and right ones afterwards."""
    model = optimised()
    ids = ids_of(model, 1, 1)
    cache = warm(model)

    real = type(model.model.layers[1]).__call__
    second = model.model.layers[1]
    monkeypatch.setattr(
        type(second), "__call__", lambda self, x, *a, **k: real(self, x * 2 if self is second else x, *a, **k)
    )
    with pytest.raises(RuntimeError, match="changed what it passes from layer to layer at layer 1"):
        step(model, cache, ids)
    assert not stack_of(model)._may_run
    fresh = CpuLlmCache(model.config)
    twice = step(model, fresh, ids).logits
    again = step(without(model), CpuLlmCache(model.config), ids).logits
    assert torch.equal(twice, again)


def test_a_deleted_model_is_gone_at_once():
    model = optimised()
    warm(model)
    layers = model.model.layers[0], model.model.layers[-1]
    parts = [part for each in layers for part in (each, each.input_layernorm.weight, each.mlp.up_proj.packed.codes)]
    gone = [weakref.ref(part) for part in (model, *parts)]
    del layers, parts
    gc.disable()
    try:
        del model
        assert [ref() for ref in gone] == [None] * len(gone)
    finally:
        gc.enable()


def test_bad_arguments_of_the_operator():
    model = optimised()
    handles = [program._run.handle for program in programs(model)]
    hidden, cache = model.config.hidden_size, warm(model)
    x = torch.randn(1, 1, hidden)
    cos, sin = model.model.rotary_emb(x, torch.tensor([[7]]))
    buffers = [t for layer in cache.layers for t in (layer.k, layer.v)]
    count = len(handles)
    rest = [[cos, sin], [0, 1] * count, [-1] * count, buffers, 7, [1] * count]
    assert ops.layers_forward(handles, x, *rest).shape == x.shape
    for place, value, text in (
        (0, [], "rotary must be 2 indices and masks 1 for each of the 0 programs"),
        (0, [*handles[:-1], 10**9], "there is no program"),
        (1, x[..., :-1], "x must be a CPU tensor"),
        (5, buffers[:-1], "caches must be none, or 2 or 4 tensors"),
        (5, [buffers[0][..., :-1], *buffers[1:]], "k_cache must be"),
        (3, [-1, 1] * count, "cos must be"),
        (6, 10**6, "has room for"),
    ):
        args = [handles, x, *rest]
        args[place] = value
        with pytest.raises(RuntimeError, match=text):
            ops.layers_forward(*args)


def test_a_stack_with_its_caches():
    """The bits of ops.layers_forward; again after the caches or weights have moved."""
    model = optimised()
    handles = [program._run.handle for program in programs(model)]
    cache, count = warm(model), len(handles)
    x = torch.randn(1, 1, model.config.hidden_size)
    cos, sin = model.model.rotary_emb(x, torch.tensor([[7]]))
    buffers = [t for layer in cache.layers for t in (layer.k, layer.v)]
    rest = [[1] * count, 0]
    stack = Stack(handles, buffers, [0, 1] * count, *rest)
    want = ops.layers_forward(handles, x, [cos, sin], [0, 1] * count, [-1] * count, buffers, 7, *rest)
    assert torch.equal(stack(x, [cos, sin], None, 7), want)
    mask = torch.ones(1, 1, 1, 8, dtype=torch.bool)
    assert torch.equal(stack(x, [cos, sin], mask, 7), want)
    for moved in (buffers[0], buffers[-1], next(m for m in model.modules() if hasattr(m, "packed")).packed.codes):
        before = moved.data_ptr()
        moved.share_memory_()
        assert moved.data_ptr() != before
        assert torch.equal(stack(x, [cos, sin], None, 7), want)
    for given, text in (
        ((x, [cos, sin], None, 10**6), "have room for"),
        ((x, [cos, sin], None, -1), "length must not be negative"),
        ((x.expand(2, 1, -1), [cos, sin], None, 7), "the caches are of 1 sequences, x has 2"),
        ((x, [cos], None, 7), "rotary must be -1 or an index below 1"),
        ((x, [cos, sin], mask[..., 1:], 7), "mask must be"),
        ((x[..., 1:], [cos, sin], None, 7), "x must be"),
    ):
        with pytest.raises(RuntimeError, match=text):
            stack(*given)
    for given, text in (
        (([], [], [], [], 0), "for each of the 0 programs"),
        ((handles, buffers[1:], [0, 1] * count, *rest), "caches must be none, or 2 or 4"),
        ((handles, buffers, [0, 1], *rest), "rotary must be 2 indices"),
        ((handles, [buffers[0][0], *buffers[1:]], [0, 1] * count, *rest), "k_cache must be"),
        ((handles, [buffers[0][..., 1:], *buffers[1:]], [0, 1] * count, *rest), "k_cache must be"),
        (([*handles[1:], 7], buffers, [0, 1] * count, *rest), "there is no program 7"),
    ):
        with pytest.raises(RuntimeError, match=text):
            Stack(*given)
    with pytest.raises(RuntimeError, match="groups must hold"):
        Stack(handles, buffers, [0, 1] * count, [1], 0)(x, [cos, sin], None, 7)
    with pytest.raises(RuntimeError, match="there is no stack 7"):
        ops.stack_forward(7, x, [cos, sin], None, 7)
    alone = Stack(handles, [], [0, 1] * count, *rest)
    with pytest.raises(RuntimeError, match="length must be 0 without caches"):
        alone(x, [cos, sin], None, 7)
    for shrunk, name in ((x, "x"), (sin, "sin"), (mask, "mask"), (buffers[1], "v_cache")):
        given = {"x": x, "sin": sin, "mask": mask} | {name: shrunk.clone()}
        changed = given[name] if name != "v_cache" else shrunk
        changed.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match=f"the storage of {name} must hold"):
            stack(given["x"], [cos, given["sin"]], given["mask"], 7)


def test_a_stack_that_is_gone_keeps_nothing():
    model = optimised()
    cache = warm(model)
    handles = [program._run.handle for program in programs(model)]
    x, (cos, sin) = torch.randn(1, 1, model.config.hidden_size), torch.ones(2, 1, 1, model.config.head_dim)
    caches = [t.clone() for layer in cache.layers for t in (layer.k, layer.v)]
    stack = Stack(handles, caches, [0, 1] * len(handles), [1] * len(handles), 0)
    number, storage = stack._number, weakref.ref(caches[0].untyped_storage())
    del caches
    ops.stack_forward(number, x, [cos, sin], None, 7)
    assert storage() is not None
    with pytest.raises(RuntimeError, match="trace layers_forward instead"):
        torch.compile(lambda t: ops.stack_forward(number, t, [cos, sin], None, 7), fullgraph=True, backend="eager")(x)
    del stack
    gc.collect()
    assert storage() is None
    with pytest.raises(RuntimeError, match="there is no stack"):
        ops.stack_forward(number, x, [cos, sin], None, 7)


def test_threads_share_a_stack_whose_memory_moves():
    model = optimised()
    cache = warm(model)
    handles = [program._run.handle for program in programs(model)]
    x, (cos, sin) = torch.randn(1, 1, model.config.hidden_size), torch.ones(2, 1, 1, model.config.head_dim)
    caches = [t for layer in cache.layers for t in (layer.k, layer.v)]
    stack = Stack(handles, caches, [0, 1] * len(handles), [1] * len(handles), 0)
    want = stack(x, [cos, sin], None, 7)
    for _ in range(5):
        for t in caches:  # to another place, with what it holds
            t.untyped_storage().resize_(t.untyped_storage().nbytes() + 4096)
        with ThreadPoolExecutor(4) as pool:
            for got in pool.map(lambda _: stack(x, [cos, sin], None, 7), range(8)):
                assert torch.equal(got, want)


def test_a_cache_that_outlives_its_model_keeps_no_weights():
    model = optimised()
    cache = warm(model)
    stack = cache.__dict__[BUFFERS].stack
    codes = weakref.ref(model.model.layers[0].self_attn.o_proj.packed.codes.untyped_storage())
    assert isinstance(stack, Stack)
    assert codes() is not None
    assert BUFFERS not in cache.__getstate__()
    size = model.config.hidden_size
    del model
    gc.collect()
    with pytest.raises(RuntimeError, match="there is no program"):
        stack(torch.zeros(1, 1, size), [], None, 7)
