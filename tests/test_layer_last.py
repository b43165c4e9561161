"""A prompt's last layer for its last token alone (csrc/layer_last.h): the bits that the token has among all."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from layer_models import ALL, ids_of
from layer_programs import STRUCTURES, cache_of, call, padded_mask, spec

import torch_cpullm
from torch_cpullm import ops
from torch_cpullm.kv_cache import CpuLlmCache
from torch_cpullm.layer_program import Program
from torch_cpullm.layer_prompt import PromptStep

CACHES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize(
    ("batch", "tokens", "masked"), [(1, 300, False), (1, 101, False), (3, 110, True), (2, 140, False)]
)
@pytest.mark.parametrize("structure", ["llama", "gemma2", "phi3", "halves not at panels"])
def test_last_token_has_the_same_bits(structure, batch, tokens, masked, kind, isa):
    """One prompt after another in one cache, on one to three threads; what the cache holds is the same too."""
    given = {**STRUCTURES[structure]}
    layer = spec(**{**given, "linears": {**given.get("linears", {}), "compute": "int8"}})
    program = Program(layer)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        whole, short = cache_of(CACHES[kind]), cache_of(CACHES[kind])
        position = 0
        for step in (tokens, tokens + 3):
            x, cos, sin = call(layer, batch, step, position, torch.bfloat16)
            mask = padded_mask(layer, step, position, tuple(3 * i % 7 for i in range(batch))) if masked else None
            expected = program(x, cos, sin, mask, whole)
            got = program.last(x, cos, sin, mask, short)
            assert torch.equal(got, expected[:, -1:]), (threads, step)
            position += step
        assert torch.equal(short.keys, whole.keys)
        assert torch.equal(short.values, whole.values)


@pytest.mark.parametrize("batch", [127, 130])
def test_so_many_sequences_that_their_last_tokens_would_go_by_blocks(batch):
    layer = spec(**{**STRUCTURES["llama"], "linears": {"compute": "int8"}})
    program = Program(layer)
    torch.set_num_threads(1)
    whole, short = cache_of(torch.bfloat16), cache_of(torch.bfloat16)
    x, cos, sin = call(layer, batch, 60, 0, torch.bfloat16)
    expected = program(x, cos, sin, None, whole)
    assert torch.equal(program.last(x, cos, sin, None, short), expected[:, -1:])


def test_what_does_not_fit_is_an_error():
    layer = spec(linears={"compute": "int8"})
    program = Program(layer)
    k, v = torch.zeros(2, 1, layer.kv_heads, 400, layer.head_dim)
    rows = layer.heads // layer.kv_heads
    enough = 96 // rows + 1
    x, cos, sin = call(layer, 1, enough - 1)
    with pytest.raises(RuntimeError, match=r"the last token alone is of .* a prompt of more than 96 rows"):
        ops.layer_forward(program.handle, x, cos, sin, None, k, v, length=0, last=True)
    x, cos, sin = call(layer, 1, enough)
    for other in (spec(), spec(linears={"compute": "int8"}, parallel=True)):
        no = Program(other)
        assert no.last(x, cos, sin, None, cache_of(torch.float32)) is None
        with pytest.raises(RuntimeError, match=r"the last token alone is of a sequential layer in int8"):
            ops.layer_forward(no.handle, x, cos, sin, None, k, v, length=0, last=True)
    assert program.last(x, cos, sin, None, None) is None
    with pytest.raises(RuntimeError, match=r"the last token alone .* with a cache"):
        ops.layer_forward(program.handle, x, cos, sin, last=True)
    assert ops.layer_forward(program.handle, x, cos, sin, None, k, v, length=0, last=True).shape == (1, 1, 96)
    given = (program.handle, x, cos, sin, None, k, v, None, None, 0, True)
    torch.library.opcheck(torch.ops.cpullm.layer_forward.default, given)


# ---- models ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch):
    """How many last layers computed the last token alone, as a list of one."""
    count, real = [0], Program.last

    def last(self, *args):
        y = real(self, *args)
        count[0] += y is not None
        return y

    monkeypatch.setattr(Program, "last", last)
    return count


def prompt(model, ids, **kwargs):
    """(logits of the last token, cache)."""
    cache = CpuLlmCache(model.config)
    given = {"position_ids": torch.arange(ids.shape[1])[None], "logits_to_keep": 1} | kwargs
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True, **given).logits, cache


def same_as_first(model, ids, first, **kwargs):
    """A prompt's logits and cache are those of the first prompt, in which nothing was known yet."""
    logits, cache = prompt(model, ids, **kwargs)
    assert torch.equal(logits, first[0])
    for mine, other in zip(cache.layers, first[1].layers, strict=True):
        assert torch.equal(mine.keys, other.keys)
        assert torch.equal(mine.values, other.values)


@pytest.mark.parametrize("name", ["llama", "llama3", "qwen3", "phi3", "olmo2", "smollm3", "qwen3-window", "gemma3"])
def test_models(name, alone, monkeypatch):
    """The second prompt goes the short way, and gives the same."""
    model = torch_cpullm.optimize(ALL[name].build(), torch_cpullm.CpuLlmConfig())
    for batch in (1, 2):
        ids = ids_of(model, batch, 120)
        mask = torch.ones_like(ids)
        mask[0, :7] = 0
        for given in ({}, {"attention_mask": mask}):
            before = alone[0]
            with monkeypatch.context() as patch:
                patch.setattr(PromptStep, "__call__", lambda self, model, decoder, step, cache, forward: forward())
                whole = prompt(model, ids, **given)
            assert alone[0] == before
            same_as_first(model, ids, whole, **given)
            same_as_first(model, ids, whole, **given)
    assert alone[0] == 7  # all but the one that was learnt from
    tokens = model.generate(ids[:1], max_new_tokens=5, do_sample=False)
    assert alone[0] == 8
    assert tokens.shape[1] == 125


def optimised():
    model = torch_cpullm.optimize(ALL["llama"].build(), torch_cpullm.CpuLlmConfig())
    ids = ids_of(model, 1, 120)
    return model, ids, prompt(model, ids)


def hook_decoder(model):
    model.model.register_forward_hook(lambda *_: None)


def hook_norm(model):
    model.model.norm.register_forward_hook(lambda *_: None)


def hook_layer(model):
    model.model.layers[-1].register_forward_hook(lambda *_: None)


def hook_inside(model):
    model.model.layers[-1].mlp.register_forward_hook(lambda *_: None)


def train(model):
    model.train()


def hidden_states(model):
    model.config.output_hidden_states = True


@pytest.mark.parametrize(
    "change", [hook_decoder, hook_norm, hook_layer, hook_inside, train, hidden_states], ids=lambda c: c.__name__
)
def test_who_may_read_other_rows_gets_them(change, alone):
    model, ids, first = optimised()
    same_as_first(model, ids, first)
    assert alone[0] == 1
    change(model)
    logits, _ = prompt(model, ids)
    assert alone[0] == 1
    torch.testing.assert_close(logits, first[0], rtol=1e-2, atol=1e-2)


def test_arguments_that_ask_for_more(alone):
    model, ids, first = optimised()
    for keep in (0, 5):
        prompt(model, ids, logits_to_keep=keep)
    assert alone[0] == 0
    same_as_first(model, ids, first)
    assert alone[0] == 1
    prompt(model, ids, output_hidden_states=True)
    assert alone[0] == 1
    same_as_first(model, ids, first)


def test_a_layer_behind_the_last_one(alone):
    """Another layer reads all rows."""
    model, ids, first = optimised()
    same_as_first(model, ids, first)
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))
    model.config.num_hidden_layers += 1
    model.model.layers[-1].self_attn.layer_idx = len(model.model.layers) - 1
    logits, _ = prompt(model, ids)
    assert alone[0] == 1
    assert not torch.equal(logits, first[0])


def test_another_norm_is_learnt_again(alone):
    model, ids, first = optimised()
    model.model.norm = copy.deepcopy(model.model.norm)
    model.model.norm.weight.data = model.model.norm.weight.data * 2
    for _ in range(2):
        second = prompt(model, ids)
    assert alone[0] == 1
    assert not torch.equal(second[0], first[0])
    same_as_first(model, ids, second)


def test_a_class_that_keeps_hidden_states_is_not_learnt(alone, monkeypatch):
    model, ids, _ = optimised()
    real = type(model.model.norm).forward

    def keeping(self, x):
        model.kept = x
        return real(self, x)

    monkeypatch.setattr(type(model.model.norm), "forward", keeping)
    model = torch_cpullm.optimize(ALL["llama"].build(), torch_cpullm.CpuLlmConfig())
    for _ in range(3):
        prompt(model, ids)
    assert alone[0] == 0
    assert not torch.equal(model.kept[:, 0], model.kept[:, -1])


def test_a_class_that_writes_to_hidden_states(monkeypatch):
    model, ids, _ = optimised()
    real = type(model.model.norm).forward

    def writing(self, x):
        x += 1
        return real(self, x)

    monkeypatch.setattr(type(model.model.norm), "forward", writing)
    model = torch_cpullm.optimize(ALL["llama"].build(), torch_cpullm.CpuLlmConfig())
    first = prompt(model, ids)
    for _ in range(2):
        same_as_first(model, ids, first)


def test_two_threads_that_ask_for_different_things(alone):
    model, ids, first = optimised()
    whole = prompt(model, ids, logits_to_keep=0)[0]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(10):
            short, all_ = pool.submit(prompt, model, ids), pool.submit(prompt, model, ids, logits_to_keep=0)
            assert torch.equal(short.result()[0], first[0])
            assert torch.equal(all_.result()[0], whole)
    assert alone[0] == 10
