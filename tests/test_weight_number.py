"""Weights that C++ knows by a number: whose they are, how long they last, where they must not be used."""

import copy
import gc
import pickle
import threading
import warnings

import pytest
import torch
from cases import activations, quantized
from layer_models import ALL, ids_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import torch_cpullm
from torch_cpullm import ops
from torch_cpullm.linear import PackedLinear
from torch_cpullm.packing import pack

N, K, GROUP = 45, 172, 64


def a_weight(seed=0, form="zero"):
    return pack(quantized(N, K, GROUP, form, 4, seed=seed))


def plain(x, w, bias=None, perm=None, compute="int8"):
    return torch.ops.cpullm.linear.default(
        x, w.codes, w.scales, w.zeros, bias, perm, w.n, w.k, w.group, ops.COMPUTE[compute]
    )


def number_of(weight):
    ops.linear(activations(1, K), weight)
    return weight.__dict__["number"]


@pytest.mark.parametrize("compute", ["int8", "fp32", "bf16"])
@pytest.mark.parametrize("form", ["sym", "zero", "minimum"])
def test_the_bits_of_the_operator_with_tensors(form, compute):
    weight, bias, perm = a_weight(form=form), activations(1, N)[0], torch.randperm(K).int()
    for m in (1, 3):
        x = activations(m, K, torch.bfloat16)
        for rest in ((None, None), (bias, None), (None, perm), (bias, perm)):
            assert torch.equal(ops.linear(x, weight, *rest, compute), plain(x, weight, *rest, compute))


def test_a_number_is_made_once_and_ends_with_its_weight():
    weight, x = a_weight(), activations(1, K)
    number, want = number_of(weight), plain(x, weight)
    assert number_of(weight) == number
    assert number_of(a_weight()) != number
    assert torch.equal(ops.weight_linear(x, number), want)
    codes = weight.codes
    del weight
    gc.collect()
    with pytest.raises(RuntimeError, match=f"weight_linear: there is no weight {number}"):
        ops.weight_linear(x, number)
    assert codes.sum() > 0, "who holds a tensor keeps it"


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w))])
def test_copies_have_no_number(duplicate):
    weight, x = a_weight(), activations(1, K)
    number = number_of(weight)
    twin = duplicate(weight)
    assert "number" not in twin.__dict__
    assert torch.equal(ops.linear(x, twin), ops.linear(x, weight))
    assert twin.__dict__["number"] != number


def test_a_copied_module_computes_with_its_own_weight():
    module, x = PackedLinear(a_weight(), dtype=torch.float32), activations(2, K)
    before = module(x)
    twin = copy.deepcopy(module)
    twin.load_state_dict(PackedLinear(a_weight(seed=1), dtype=torch.float32).state_dict())
    assert torch.equal(module(x), before)
    assert torch.equal(twin(x), plain(x, a_weight(seed=1)))


def test_memory_that_moves_or_shrinks_is_seen():
    weight, x = a_weight(), activations(1, K)
    number_of(weight)
    want = plain(x, weight)
    weight.codes.share_memory_()
    assert torch.equal(ops.linear(x, weight), want)
    weight.scales.resize_(1, 1, 32)
    with pytest.raises(RuntimeError, match=r"cpullm::linear: scales must have shape \[2, 3, 32\], got \[1, 1, 32\]"):
        ops.linear(x, weight)


def test_bad_input():
    number = number_of(w := a_weight())
    with pytest.raises(RuntimeError, match=r"cpullm::linear: the last dimension of x must be k = 172, got \[1, 171\]"):
        ops.weight_linear(activations(1, 171), number)
    with pytest.raises(ValueError, match="compute must be one of"):
        ops.linear(activations(1, K), w, compute="int2")
    with pytest.raises(RuntimeError, match=r"weight_create: scales must have shape"):
        torch.ops.cpullm.weight_create.default(w.codes, w.scales[:1], w.zeros, w.n, w.k, w.group)
    with pytest.raises(RuntimeError, match="there is no weight"):
        ops.weight_linear(activations(1, K), 0)
    with pytest.raises(RuntimeError, match=r"no weight .* on meta"):
        ops.weight_linear(activations(1, K).to("meta"), number)


def test_opcheck():
    weight, x = a_weight(), activations(3, K)
    arguments = (x, number_of(weight), activations(1, N)[0], torch.arange(K).int(), 1)
    torch.library.opcheck(torch.ops.cpullm.weight_linear.default, arguments)


def test_graphs_and_fake_tensors_have_tensors_and_no_number():
    module, x = PackedLinear(a_weight(), dtype=torch.float32), activations(2, K)
    want, seen = module(x), []

    def keep(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    assert torch.equal(torch.compile(module, backend=keep, fullgraph=True)(x), want)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert ops.linear(mode.from_tensor(x), module.packed).shape == (2, N)
    seen += [
        str(node.target) for node in make_fx(module, tracing_mode="fake", _allow_non_fake_inputs=True)(x).graph.nodes
    ]
    assert [name for name in seen if "cpullm" in name] == ["cpullm.linear.default"] * 2
    program = torch.export.export(module, (x,), strict=False)
    assert "weight_linear" not in str(program)


def test_what_is_recorded_holds_tensors():
    """A number is of this process: a saved trace must not hold it."""
    module, x = PackedLinear(a_weight(), dtype=torch.float32), activations(2, K)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit says that it is old
        traced = torch.jit.trace(module, (x,), check_trace=False)
        assert "weight_linear" not in str(traced.inlined_graph)
    assert torch.equal(traced(x), module(x))
    recorded = make_fx(module, tracing_mode="real")(x)
    assert "weight_linear" not in recorded.code
    assert torch.equal(recorded(x), module(x))


def test_a_recorded_model_has_no_programs():
    model = torch_cpullm.optimize(ALL["llama"].build(), torch_cpullm.CpuLlmConfig(compute="fp32"))
    ids = ids_of(model, 1, 6)

    def logits(ids):
        return model(ids, use_cache=False, return_dict=True).logits

    def layers(x, cos, sin):
        for layer in model.model.layers:
            x = layer(x, position_embeddings=(cos, sin))
        return x

    with torch.no_grad():
        want = logits(ids)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit says that it is old
            traced = torch.jit.trace(logits, (ids,), check_trace=False)
        assert "cpullm::linear" in str(traced.inlined_graph)
        assert "cpullm::layer" not in str(traced.inlined_graph)
        assert (traced(ids) - want).abs().max() < 1e-4 * want.abs().max()
        x = model.model.embed_tokens(ids)
        given = (x, *model.model.rotary_emb(x, torch.arange(6)[None]))
        recorded = make_fx(layers, tracing_mode="real")(*given)
        assert "cpullm.linear" in recorded.code
        assert "cpullm.layer" not in recorded.code
        y = layers(*given)
        assert (recorded(*given) - y).abs().max() < 1e-4 * y.abs().max()


def test_weights_come_and_go_in_several_threads():
    x, shared = activations(1, K), a_weight()
    want, wrong = plain(x, shared), []

    def work(seed):
        for i in range(20):
            own = a_weight(seed=seed + i % 2)
            if not torch.equal(ops.linear(x, own), plain(x, own)) or not torch.equal(ops.linear(x, shared), want):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(0, 8, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
