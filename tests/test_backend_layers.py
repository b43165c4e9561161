"""The compile backend on optimised models: each decoder layer is one operator, and a graph holds for every cache."""

import copy
import gc
import os
import pickle
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from layer_models import ALL, GrowingCache, logits
from torch import nn
from transformers import DynamicCache

import torch_cpullm
from torch_cpullm import backend
from torch_cpullm.config import Settings
from torch_cpullm.kv_cache import CpuLlmCache
from torch_cpullm.layer import ONE_OP, layer_levels

FAMILIES = ["llama", "qwen3", "gemma2", "phi3", "gpt-neox", "gpt-j", "opt-norm-first"]
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(autouse=True)
def _no_silent_fallback():
    """No compiled code from before; one thread, since the tensors are tiny."""
    torch._dynamo.reset()
    torch.set_num_threads(1)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch):
    """For each graph of the backend that is made: how often it calls an operator of ours, by the operator's name."""
    made, runner = [], backend._runner

    def note(forward, *others):
        nodes = forward.__self__.graph.nodes
        names = [str(node.target).split(".")[1] for node in nodes if str(node.target).startswith("cpullm.")]
        made.append({name: names.count(name) for name in names})
        return runner(forward, *others)

    monkeypatch.setattr(backend, "_runner", note)
    return made


def optimised(name="llama", **settings):
    model = ALL[name].build()
    return torch_cpullm.optimize(model, Settings(**{"compute": "fp32", **settings}))


def prompt(batch=1, length=7, seed=0):
    return torch.randint(3, 250, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FAMILIES)
def test_generate(name, graphs):
    """Same tokens, one operator per layer and no attention beside it, two graphs: one for prompts, one for tokens."""
    model = optimised(name)
    assert {level for _, level, _ in layer_levels(model)} == {ONE_OP}
    want = model.generate(prompt(), max_new_tokens=12, **GREEDY)
    model.compile(backend="cpullm")
    assert torch.equal(model.generate(prompt(), max_new_tokens=12, **GREEDY), want)
    assert len(graphs) <= 3
    for graph in graphs:
        assert graph["decoder_layer"] == len(list(layer_levels(model)))
        assert not graph.keys() & {"attention", "layer_forward"}
        assert graph["linear"] == 1  # the head


def test_no_graph_after_the_third_token(graphs):
    """300 tokens: the cache grows, twice; then prompts of other lengths, a batch, beams, sampling, chat turns."""
    model = optimised(kv_cache="int8")
    model.compile(backend="cpullm")
    model.generate(prompt(), max_new_tokens=3, **GREEDY)
    count = len(graphs)
    assert count <= 3
    out = model.generate(prompt(), max_new_tokens=300, **GREEDY, return_dict_in_generate=True)
    assert len(graphs) == count
    cache = out.past_key_values
    assert isinstance(cache, CpuLlmCache)
    assert cache.layers[0].k.dtype == torch.int8
    assert cache.layers[0].capacity > 256
    model.generate(torch.cat([out.sequences, prompt()], 1), past_key_values=cache, max_new_tokens=3, **GREEDY)
    model.generate(prompt(1, 19), max_new_tokens=3, **GREEDY)
    model.generate(prompt(3, 9), max_new_tokens=3, **GREEDY, num_beams=2)
    count = len(graphs)
    for batch, length in ((1, 12), (1, 31), (2, 8), (4, 21)):
        model.generate(prompt(batch, length), max_new_tokens=5, **GREEDY)
    assert len(graphs) == count
    assert count <= 8


def test_left_padding_and_chunks():
    model = optimised("gemma2")
    ids, mask = prompt(3, 18), torch.ones(3, 18, dtype=torch.long)
    mask[1, :5] = mask[2, :9] = 0
    want = logits(model, ids, mask, CpuLlmCache(model.config), (13, 1, 1, 3))
    model.compile(backend="cpullm")
    got = logits(model, ids, mask, CpuLlmCache(model.config), (13, 1, 1, 3))
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=1e-4, atol=1e-4)


def test_without_a_cache(graphs):
    model = optimised()
    want = model(prompt(2), use_cache=False).logits
    model.compile(backend="cpullm")
    torch.testing.assert_close(model(prompt(2), use_cache=False).logits, want, rtol=1e-5, atol=1e-5)
    assert graphs[-1]["decoder_layer"] == 2


@pytest.mark.parametrize("make", [lambda model: DynamicCache(config=model.config), lambda model: GrowingCache(2)])
def test_caches_of_others(make, graphs):
    """Dynamo traces the layers' own forward, as it does where a call makes its cache itself."""
    model = optimised()
    want = logits(model, prompt(1, 9), torch.ones(1, 9, dtype=torch.long), make(model), (6, 1, 1, 1))
    alone = model(prompt()).logits
    model.compile(backend="cpullm")
    got = logits(model, prompt(1, 9), torch.ones(1, 9, dtype=torch.long), make(model), (6, 1, 1, 1))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(prompt()).logits, alone, rtol=1e-4, atol=1e-4)
    assert not any("decoder_layer" in graph for graph in graphs)


class Adapted(nn.Module):
    """A linear and something more, as adapters wrap them."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 1.5 * self.inner(x)


def test_never_a_stale_layer(graphs):
    """What is inside of a layer is looked at when the operator runs: guards see none of it."""
    model, eager = optimised(), optimised()
    model.compile(backend="cpullm")

    def same():
        cache, other = CpuLlmCache(model.config), CpuLlmCache(model.config)
        got, want = model(prompt(), past_key_values=cache).logits, eager(prompt(), past_key_values=other).logits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        return got

    def adapt(layers):
        layers[1].mlp.up_proj = Adapted(layers[1].mlp.up_proj)

    def hook(layers):
        layers[0].mlp.register_forward_hook(lambda module, args, output: 2 * output)

    def shrink(layers):
        layers[0].input_layernorm.weight.mul_(0.5)

    def exchange(layers):
        layers[0].mlp, layers[1].mlp = layers[1].mlp, layers[0].mlp

    last = same()
    for change in (shrink, adapt, hook, exchange):
        change(model.model.layers)
        change(eager.model.layers)
        now = same()
        assert not torch.equal(now, last)
        last = now
    assert graphs[0]["decoder_layer"] == 2


@pytest.mark.parametrize("option", ["output_attentions", "output_hidden_states"])
def test_recorded_outputs(option):
    model = optimised()
    model.set_attn_implementation("eager")
    want = model(prompt(), **{option: True}, use_cache=False)
    model.compile(backend="cpullm")
    got = model(prompt(), **{option: True}, use_cache=False)
    name = option.removeprefix("output_")
    assert len(got[name]) == len(want[name]) > 0
    for a, b in zip((*got[name], got.logits), (*want[name], want.logits), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_two_models_do_not_mix():
    models = [optimised() for _ in range(2)]
    with torch.no_grad():
        models[1].model.layers[0].input_layernorm.weight.mul_(2)
    wants = [model.generate(prompt(), max_new_tokens=5, **GREEDY) for model in models]
    assert not torch.equal(*wants)
    for model in models:
        model.compile(backend="cpullm")
    for i in (0, 1, 0, 1):
        assert torch.equal(models[i].generate(prompt(), max_new_tokens=5, **GREEDY), wants[i])


def test_two_threads():
    model = optimised()
    want = [model.generate(prompt(seed=seed), max_new_tokens=20, **GREEDY) for seed in range(4)]
    model.compile(backend="cpullm")

    def run(seed):
        with torch.no_grad():
            return model.generate(prompt(seed=seed), max_new_tokens=20, **GREEDY)

    run(0)
    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(run, range(4)))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_module_from_torch_compile_and_layers_one_by_one(graphs):
    model = optimised()
    want = model.generate(prompt(), max_new_tokens=5, **GREEDY)
    compiled = torch.compile(model, backend="cpullm")
    assert torch.equal(compiled.generate(prompt(), max_new_tokens=5, **GREEDY), want)
    assert len(graphs) == 2
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(backend="cpullm")
    assert torch.equal(model.generate(prompt(), max_new_tokens=5, **GREEDY), want)
    assert all(graph == {"decoder_layer": 1} for graph in graphs[2:])


def test_copies_of_caches_are_their_own():
    """A copy is written by its own name, not by that of the cache it came from."""
    model = optimised()
    model.compile(backend="cpullm")
    cache = CpuLlmCache(model.config)
    model(prompt(), past_key_values=cache)
    for copied in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert int(copied.number) != int(cache.number)
        model(prompt(1, 1), past_key_values=copied)
        assert (cache.get_seq_length(), copied.get_seq_length()) == (7, 8)


def test_copies_of_models(graphs):
    """Their programs are matched when they are first looked at: outside of what Dynamo traces."""
    model = copy.deepcopy(optimised())
    want = copy.deepcopy(model).generate(prompt(), max_new_tokens=5, **GREEDY)
    model.compile(backend="cpullm")
    assert torch.equal(model.generate(prompt(), max_new_tokens=5, **GREEDY), want)
    assert graphs[0]["decoder_layer"] == 2


def test_memory_goes_with_the_model_and_the_cache():
    model = optimised()
    model.compile(backend="cpullm")
    out = model.generate(prompt(), max_new_tokens=3, **GREEDY, return_dict_in_generate=True)
    layer, cache = weakref.ref(model.model.layers[0]), weakref.ref(out.past_key_values)
    del out
    gc.collect()
    assert cache() is None
    del model
    torch._dynamo.reset()
    gc.collect()
    assert layer() is None


def test_numbers_that_nobody_has():
    x = torch.zeros(1, 1, 8)
    for arguments in ((None, -3), (torch.tensor(-4), -3)):
        with pytest.raises(RuntimeError, match="cpullm::decoder_layer: layer -3 or its cache is gone"):
            torch.ops.cpullm.decoder_layer(x, None, None, None, None, None, arguments[0], None, arguments[1])


def test_a_stock_cache_where_a_layer_is_no_program(graphs):
    """Dynamo would compile again each time ours grows."""
    model = optimised()
    model.model.layers[0].mlp.act_fn = nn.Softsign()
    want = model.generate(prompt(), max_new_tokens=5, **GREEDY)
    model.compile(backend="cpullm")
    out = model.generate(prompt(), max_new_tokens=5, **GREEDY, return_dict_in_generate=True)
    assert torch.equal(out.sequences, want)
    assert type(out.past_key_values) is DynamicCache


SCRIPT = """
import sys, time
sys.path.insert(0, sys.argv[1])
import torch, transformers, torch_cpullm
torch.set_num_threads(1)
sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=22, num_attention_heads=4, num_key_value_heads=2)
config = transformers.LlamaConfig(vocab_size=96, **sizes, pad_token_id=0, eos_token_id=None)
model = torch_cpullm.optimize(transformers.LlamaForCausalLM(config).eval())
begin = time.thread_time()
model.compile(backend="cpullm")
model.generate(torch.ones(1, 5, dtype=torch.long), max_new_tokens=3, do_sample=False)
took = time.thread_time() - begin
assert took < 10, took
assert "torch._inductor.compile_fx" not in sys.modules
"""


def test_ready_soon_and_without_a_compiler(tmp_path):
    """22 layers within 10 s, in a process that can start no program."""
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent)]
    done = subprocess.run(
        command, env={**os.environ, "PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.* is deprecated:DeprecationWarning")  # torch's own
def test_other_backends():
    """AOTAutograd keeps the operators, in their order."""
    model = optimised()
    want = model.generate(prompt(), max_new_tokens=6, **GREEDY)
    model.compile(backend="aot_eager")
    assert torch.equal(model.generate(prompt(), max_new_tokens=6, **GREEDY), want)
