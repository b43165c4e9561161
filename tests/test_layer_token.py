"""A decode step of a whole model: layers, last norm and head in one operator, and only where that is all there is."""

import copy
import gc
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
from layer_models import ALL, counted, ids_of
from layer_programs import linear, spec
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_cpullm
from torch_cpullm import ops
from torch_cpullm.kv_cache import CpuLlmCache
from torch_cpullm.layer_program import Head, Program, Stack, encode
from torch_cpullm.layer_spec import Norm
from torch_cpullm.layer_token import TokenStep

create = torch.ops.cpullm.head_create.default


# ---- the operator ---------------------------------------------------------------------------------------------------


def head_of(compute="fp32", *, n=70, k=96, kind="rms", bits=8, bias=False, ordered=False):
    """(head, norm, linear)."""
    gen = torch.Generator().manual_seed(0)
    norm = Norm(torch.rand(k, generator=gen) + 0.5, torch.randn(k, generator=gen) if kind == "layer" else None)
    matrix = linear(n, k, gen, bias=bias, compute=compute, bits=bits, ordered=ordered)
    return Head(kind, 1e-5, norm, matrix), norm, matrix


def layers_of(count=2, **kwargs):
    """Programs and the arguments of ops.layers_forward after x for ``tokens`` tokens."""
    programs = [Program(spec(seed=i, **kwargs)) for i in range(count)]
    handles = [program.handle for program in programs]

    def rest(tokens):
        angle = torch.rand(1, tokens, 32, generator=torch.Generator().manual_seed(1))
        return [angle.cos(), angle.sin()], [0, 1] * count, [-1] * count, [], 0, [1] * count

    return programs, handles, rest


def logits(handles, x, rest, head=None):
    """What ``head`` makes of ``ops.layers_forward(handles, x, *rest)``."""
    angles, rotary, _, caches, length, groups = rest
    return Stack(handles, caches, rotary, groups, 0)(x, angles, None, length, head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compute", ["int8", "fp32"])
def test_the_same_bits_as_norm_and_linear(compute, dtype, isa):
    """On few rows, which every thread loads for itself, and on many."""
    programs, handles, rest = layers_of(linears={"compute": "int8"})
    torch.set_num_threads(2)
    for case in ({}, {"kind": "layer", "bias": True}, {"bits": 4, "n": 64}, {"ordered": True}):
        head, norm, matrix = head_of(compute, **case)
        for tokens in (1, 5, 8, 130):
            x = torch.randn(1, tokens, 96, generator=torch.Generator().manual_seed(tokens)).to(dtype)
            y = ops.layers_forward(handles, x, *rest(tokens))
            normed = (
                ops.rms_norm(y, norm.gain, 1e-5) if norm.bias is None else ops.layer_norm(y, norm.gain, norm.bias, 1e-5)
            )
            want = ops.linear(normed, matrix.packed, matrix.bias, matrix.order, compute).to(dtype)
            got = logits(handles, x, rest(tokens), head)
            assert got.dtype == dtype
            assert torch.equal(got, want), (case, tokens)
    assert len(programs) == 2


def test_one_layer_and_one_thread():
    programs, handles, rest = layers_of(1)
    head, norm, matrix = head_of()
    x = torch.randn(3, 1, 96, generator=torch.Generator().manual_seed(0))
    want = matrix(ops.rms_norm(ops.layers_forward(handles, x, *rest(1)), norm.gain, 1e-5))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert torch.equal(logits(handles, x, rest(1), head), want)
    assert logits(handles, x[:0], rest(1), head).shape == (0, 1, 70)
    assert len(programs) == 1


def test_what_does_not_fit_is_an_error():
    programs, handles, rest = layers_of()
    head, _, matrix = head_of()
    x = torch.zeros(1, 1, 96)
    for handle, text in ((10**9, "there is no program"), (handles[0], "is no head"), (-1, "there is no program")):
        with pytest.raises(RuntimeError, match=text):
            logits(handles, x, rest(1), SimpleNamespace(handle=handle))
    with pytest.raises(RuntimeError, match="is no layer"):
        ops.layers_forward([handles[0], head.handle], x, *rest(1))
    with pytest.raises(RuntimeError, match="is no layer"):
        ops.layer_mlp(head.handle, x)
    wide, _, _ = head_of(k=128)
    with pytest.raises(RuntimeError, match="the head reads rows of 128"):
        logits(handles, x, rest(1), wide)
    with pytest.raises(ValueError, match="norm must be a contiguous float32 CPU tensor"):
        Head("rms", 1e-5, Norm(torch.ones(95)), matrix)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match="trace layers_forward instead"):
        logits(handles, x, rest(1), head)
    assert len(programs) == 2


def test_numbers_of_heads():
    gain, packed = torch.ones(96), head_of()[2].packed
    tensors, ints = [gain, packed.codes, packed.scales], [96, 70, 1, 0, 1, 0, -1, 1, 2, -1, packed.group, -1, -1]
    torch.ops.cpullm.layer_free.default(create(tensors, ints, [1e-5]))
    for count in range(len(ints)):
        with pytest.raises(RuntimeError, match="head_create: ints ends before"):
            create(tensors, ints[:count], [1e-5])
    changes = ((0, 0, "hidden must lie"), (1, 2**40, "logits must lie"), (1, 200, "codes must have shape"))
    changes += ((2, 3, "compute must lie"), (3, 2, "kind of norm"), (5, -2, "norm must lie"), (7, -1, "no codes"))
    for place, value, text in (*changes, (10, 31, "multiple of 32"), (11, 0, "head must be"), (12, 0, "perm must be")):
        bad = list(ints)
        bad[place] = value
        with pytest.raises(RuntimeError, match=f"head_create: .*{text}"):
            create(tensors, bad, [1e-5])
    with pytest.raises(RuntimeError, match="head_create: floats ends before eps"):
        create(tensors, ints, [])
    with pytest.raises(RuntimeError, match="head_create: too many numbers"):
        create(tensors, [*ints, 0], [1e-5])
    with pytest.raises(RuntimeError):
        create(*encode(spec()))


# ---- models ---------------------------------------------------------------------------------------------------------


def optimised(name="llama", **settings):
    return torch_cpullm.optimize(ALL[name].build(), torch_cpullm.CpuLlmConfig(**settings))


def without(model):
    model.__dict__.pop("forward", None)
    return model


def generate(model, ids, tokens=12, **kwargs):
    settings = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": 10**6} | kwargs
    return model.generate(ids, output_logits=True, return_dict_in_generate=True, **settings)


def call(model, cache, ids, **kwargs):
    length = cache.get_seq_length()
    positions = torch.arange(length, length + ids.shape[1])[None]
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True, position_ids=positions, **kwargs)


def warm(model):
    """A cache after a prompt and the steps that are learnt from."""
    cache = CpuLlmCache(model.config)
    for count in (5, 1, 1, 1, 1):
        call(model, cache, ids_of(model, 1, count))
    assert model.__dict__["forward"]._learnt is not None
    return cache


def check_next(model, cache, steps, short):
    """The next step is right, and went the short way or not; short: None, either."""
    twin, before = copy.deepcopy(cache), steps[0]
    got = call(model, cache, ids_of(model, 1, 1)).logits
    assert short is None or steps[0] == before + short
    close(got, call(without(model), twin, ids_of(model, 1, 1)).logits)


def close(got, want):
    """Equal but for the order in which the norm adds and, in bfloat16, what the class's norm rounds more often."""
    assert got.dtype == want.dtype
    bound = 2e-6 if got.dtype == torch.float32 else 0.01
    assert (got.float() - want.float()).abs().max() <= bound * want.float().abs().max()


NAMES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gpt-neox", "olmo2", "smollm3", "gemma3", "qwen3-window"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_logits_of_the_classs_forward(name, dtype, monkeypatch):
    model = torch_cpullm.optimize(ALL[name].build().to(dtype))
    steps = counted(monkeypatch, "logits")
    cache, forward = warm(model), model.__dict__["forward"]
    for position in range(10):  # past the window
        twin, ids = copy.deepcopy(cache), torch.tensor([[7 * position]])
        got = call(model, cache, ids).logits
        want = call(without(model), twin, ids).logits
        model.__dict__["forward"] = forward
        close(got, want)
    assert steps[0] == 10 + 2


@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere"])
def test_logits_that_are_capped_or_scaled_are_the_classs(name, monkeypatch):
    model = optimised(name)
    steps = counted(monkeypatch, "logits")
    ids = ids_of(model, 1, 9)
    got = generate(model, ids)
    assert steps[0] == 0
    assert all(map(torch.equal, got.logits, generate(without(model), ids).logits))


def test_generate_asks_for_one_position_and_others_may():
    model = optimised()
    cache = warm(model)
    assert model._supports_logits_to_keep()
    for keep in (0, 1, 3):
        assert call(model, cache, ids_of(model, 1, 1), logits_to_keep=keep).logits.shape[1] == 1
    assert call(model, cache, ids_of(model, 1, 1), logits_to_keep=torch.tensor([0])).logits.shape[1] == 1
    assert call(model, cache, ids_of(model, 1, 4), logits_to_keep=2).logits.shape[1] == 2
    assert isinstance(call(model, cache, ids_of(model, 1, 1), return_dict=False), tuple)
    assert call(model, cache, ids_of(model, 1, 1), labels=ids_of(model, 1, 1)).loss is not None


def changed_head(model):
    model.lm_head = copy.deepcopy(model.lm_head)


def changed_norm(model):
    with torch.no_grad():
        model.model.norm.weight.mul_(2)


def other_norm(model):
    model.model.norm = copy.deepcopy(model.model.norm)
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.linspace(-3, 3, model.config.hidden_size))


def other_order_of_layers(model):
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]


def other_list_of_layers(model):
    model.kept = [model.model.layers]  # the list is alive, and holds them in the order before
    model.model.layers = nn.ModuleList(reversed(model.model.layers))


def eps_of_norm(model):
    model.model.norm.variance_epsilon = 0.1


def bias_of_head(model):
    model.lm_head.bias = nn.Parameter(torch.ones(model.config.vocab_size), requires_grad=False)


def compute_of_head(model):
    model.lm_head.compute = "int8"


def weight_of_layer(model):
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.mul_(2)


def wrapped_head(model):
    model.lm_head = nn.Sequential(model.lm_head, nn.Tanh())


CHANGES = [
    changed_head, changed_norm, other_norm, eps_of_norm, bias_of_head, compute_of_head, weight_of_layer, wrapped_head,
    other_order_of_layers, other_list_of_layers,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_has_changed_goes_the_long_way(change, monkeypatch):
    model = optimised()
    cache, steps = warm(model), counted(monkeypatch, "logits")
    check_next(copy.copy(model), cache, steps, 1)
    change(model)
    check_next(model, cache, steps, 0)
    for _ in range(8):  # long enough to learn again what can be
        check_next(model, cache, steps, None)


def test_hooks_are_called(monkeypatch):
    model = optimised()
    cache, steps = warm(model), counted(monkeypatch, "logits")
    for module in (model.lm_head, model.model.norm, model.model, model.model.layers[1], model.model.embed_tokens):
        seen = []
        handle = module.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        before = steps[0]
        call(model, cache, ids_of(model, 1, 1))
        assert seen == [1]
        assert steps[0] == before + (module is model.model.embed_tokens)
        handle.remove()
    seen = []
    model.model.register_forward_pre_hook(lambda *_: seen.append(1))
    call(model, cache, ids_of(model, 1, 1))
    assert seen == [1]


def test_hooks_that_transformers_leaves_behind_wait_for_nobody(monkeypatch):
    model = optimised()
    cache, steps = warm(model), counted(monkeypatch, "logits")
    out = call(model, cache, ids_of(model, 1, 1), output_hidden_states=True)
    assert steps[0] == 0
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    for _ in range(8):  # long enough to learn again
        call(model, cache, ids_of(model, 1, 1))
    before = steps[0]
    assert before > 0
    again = call(model, cache, ids_of(model, 1, 1), output_hidden_states=True)
    assert steps[0] == before
    assert not torch.equal(again.hidden_states[1], again.hidden_states[2])
    check_next(model, cache, steps, 1)


def test_a_changed_config_is_looked_at_again(monkeypatch):
    model = optimised("gemma3")
    cache, steps = warm(model), counted(monkeypatch, "logits")
    model.config.final_logit_softcapping = 0.01
    for _ in range(3):
        twin = copy.deepcopy(cache)
        got = call(model, cache, ids_of(model, 1, 1)).logits
        saved = model.__dict__.pop("forward")
        assert torch.equal(got, call(model, twin, ids_of(model, 1, 1)).logits)
        model.__dict__["forward"] = saved
    assert steps[0] == 0
    assert got.abs().max() <= 0.01


def test_loaded_weights_are_used(monkeypatch):
    """A state dict goes into the packed weights in place; layers whose norms were written to run one by one."""
    model, other = optimised(), optimised()
    state = other.state_dict()
    state["lm_head.weight_scales"] = state["lm_head.weight_scales"] * 2
    cache, steps = warm(model), counted(monkeypatch, "logits")
    model.load_state_dict(state)
    check_next(model, cache, steps, 0)


def test_copies_pickles_and_deleted_models(monkeypatch):
    model = optimised()
    warm(model)
    steps = counted(monkeypatch, "logits")
    ids = ids_of(model, 1, 9)
    want = generate(model, ids).sequences
    assert steps[0] == 11
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(generate(twin, ids).sequences, want)
        assert steps[0] == 11
        assert isinstance(twin.__dict__["forward"], TokenStep)
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


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_cache_that_nobody_has_is_gone(name):
    model = optimised(name)
    cache = CpuLlmCache(model.config)
    for count in (5, 1, 1, 1, 1, 1):
        call(model, cache, ids_of(model, 1, count))
    gone = weakref.ref(cache)
    del cache
    assert gone() is None


def test_a_forward_that_was_replaced_stays():
    model = optimised()
    torch_cpullm.restore(model)
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    mine = model.__dict__["forward"]
    torch_cpullm.optimize(model)
    assert model.__dict__["forward"] is mine


def test_a_norm_that_returns_another_dtype_keeps_its_own():
    """The operator's logits have the dtype of the layers' output."""
    model = torch_cpullm.optimize(ALL["llama"].build().to(torch.bfloat16))
    model.model.norm.float()
    cache = CpuLlmCache(model.config)
    logits = [call(model, cache, ids_of(model, 1, count)).logits for count in (5, 1, 1, 1, 1)]
    assert {each.dtype for each in logits} == {without(model)(ids_of(model, 1, 1)).logits.dtype}
    assert model.__dict__.get("forward") is None or model.__dict__["forward"]._learnt is None


def test_an_argument_given_twice_is_an_error():
    model = torch_cpullm.optimize(ALL["llama"].build())
    cache, ids = warm(model), ids_of(model, 1, 1)
    with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
        call(model, cache, ids, input_ids=ids)


def test_another_generation_config_changes_nothing():
    model = torch_cpullm.optimize(ALL["llama"].build())
    cache, learnt = warm(model), model.__dict__["forward"]._learnt
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.temperature = 0.5
    call(model, cache, ids_of(model, 1, 1))
    assert model.__dict__["forward"]._learnt is learnt
