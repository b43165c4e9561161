"""Layers that are cut among ranks: sums inside the operator against the whole layer, and the two parts of a layer."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from layer_programs import STRUCTURES, call, spec

from torch_cpullm import ops
from torch_cpullm.layer_program import Program
from torch_cpullm.linear import PackedLinear
from torch_cpullm.packing import pack, unpack

ROOM = 2 * 4 * 128  # two rows at a time: three rounds for five rows


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def silent(linear):
    """A linear of the same form whose outputs are 0."""
    weight = unpack(linear.packed)
    zeros = weight.zeros if weight.zeros is None or weight.zeros.dtype == torch.uint8 else weight.zeros * 0
    weight = replace(weight, scales=weight.scales * 0, zeros=zeros)
    return PackedLinear(pack(weight), None, dtype=linear.dtype, compute=linear.compute)


def all_layers(programs, x, cos, sin, *shared):
    """The programs one after the other, as one operator; with ``shared``, of layers that are cut."""
    tensors, places = ([], [-1, -1]) if cos is None else ([cos, sin], [0, 1])
    handles, count = [program.handle for program in programs], len(programs)
    return ops.layers_forward(
        handles,
        x,
        tensors,
        places * count,
        [-1] * count,
        [],
        0,
        [1] * count,
        0,
        [bool(shared)] * count if shared else [],
        *shared,
    )


@pytest.mark.parametrize("name", STRUCTURES)
def test_sums_over_ranks_inside_the_operator(name):
    """Rank 1 adds nothing, so that both must get what rank 0 alone computes, bit for bit."""
    layer = spec(**STRUCTURES[name])
    if layer.parallel:  # one sum of attention and MLP: added in another order
        tolerance = {"rtol": 1e-5, "atol": 1e-5}
    else:
        tolerance = {"rtol": 0, "atol": 0}
    own = [Program(layer), Program(replace(layer, o=silent(layer.o), down=silent(layer.down)))]
    given = call(layer, 1, 5)
    want = all_layers([own[0]] * 3, *given)
    shared = torch.zeros(2 * (64 + 2 * ROOM), dtype=torch.uint8)

    def rank(i):
        torch.set_num_threads(2)
        with torch.no_grad():
            return all_layers([own[i]] * 3, *given, shared, i, 2, 60.0)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(rank, range(2)))
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], want, **tolerance)


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("size", [1, 2])
def test_groups_that_are_spread_over_ranks(name, size):
    """A layer on every rank, a group of ``size`` members on each, a layer again: as in one operator of all."""
    layers = [spec(**STRUCTURES[name]) for _ in range(2 + 2 * size)]
    programs = [Program(layer) for layer in layers]
    x, cos, sin = call(layers[0], 1, 5)
    tensors, places = ([], [-1, -1]) if cos is None else ([cos, sin], [0, 1])

    def run(own, groups, *rest):
        handles, count = [program.handle for program in own], len(own)
        return ops.layers_forward(handles, x, tensors, places * count, [-1] * count, [], 0, groups, 0, *rest)

    want = run(programs, [1, 2 * size, 1])
    shared = torch.zeros(2 * (64 + 2 * ROOM), dtype=torch.uint8)

    def rank(i):
        torch.set_num_threads(2)
        own = [programs[0], *programs[1 + i * size : 1 + (i + 1) * size], programs[-1]]
        with torch.no_grad():
            return run(own, [1, size, 1], [0, 2, 0], shared, i, 2, 60.0)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(rank, range(2)))
    assert torch.equal(found[0], found[1])
    tolerance = 2e-2 if layers[0].o.compute == "int8" else 1e-4
    assert float((found[0] - want).abs().max()) <= tolerance * float(want.abs().max())


def test_layers_are_left_when_a_rank_is_lost():
    """Not computed to the end: a long prompt would go on for long."""
    layer = spec()
    program, given = Program(layer), call(layer, 1, 5)
    shared = torch.zeros(2 * (64 + 2 * ROOM), dtype=torch.uint8)
    torch.set_num_threads(2)
    all_layers([program] * 8, *given)
    usual = torch.ops.cpullm.layer_barriers.default()
    for timeout_s in (0.05, 60.0):  # the second time it is known
        assert "no answer in shared memory" in message(
            lambda t=timeout_s: all_layers([program] * 8, *given, shared, 0, 2, t)
        )
        assert torch.ops.cpullm.layer_barriers.default() < usual / 4
    assert "no answer" in message(lambda: all_layers([program] * 8, *given, shared, 1, 2, 60.0))


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_parts_of_a_layer(name):
    layer = spec(**STRUCTURES[name])
    if layer.post_attention_norm is not None or layer.post_mlp_norm is not None:
        layer = replace(layer, post_attention_norm=None, post_mlp_norm=None)
    program, given = Program(layer), call(layer, 2, 3)
    x, scale = given[0], layer.residual_scale
    a = ops.layer_attention(program.handle, *given)
    r = x + scale * a
    y = x + a + ops.layer_mlp(program.handle, x) if layer.parallel else r + scale * ops.layer_mlp(program.handle, r)
    torch.testing.assert_close(y, ops.layer_forward(program.handle, *given), rtol=1e-4, atol=1e-4)
    assert ops.layer_mlp(program.handle, x.bfloat16()).dtype == torch.float32


def message(run):
    with pytest.raises(RuntimeError) as caught:
        run()
    return str(caught.value)


def test_what_does_not_fit_is_an_error():
    layer = spec()
    program, (x, cos, sin) = Program(layer), call(layer, 1, 2)
    shared = torch.zeros(2 * (64 + 2 * ROOM), dtype=torch.uint8)
    assert "no answer in shared memory" in message(lambda: all_layers([program], x, cos, sin, shared, 0, 2, 0.05))
    assert "has room for 64 bytes per rank" in message(
        lambda: all_layers([program], x, cos, sin, shared[:384], 0, 2, 1.0)
    )
    assert "rank must lie in" in message(lambda: all_layers([program], x, cos, sin, shared, 2, 2, 1.0))
    pair = ([program.handle] * 2, x, [cos, sin], [0, 1] * 2, [-1] * 2, [], 0)
    for groups, bypass, summed, text in (
        ([2], 0, [1], "cut among ranks are in no groups"),
        ([2], 1, [2], "spread over ranks have no bypass, got 1"),
        ([2], 0, [3], "cut among ranks are in no groups"),
        ([2], 1, [4], "spread over ranks have no bypass, got 1"),
        ([1, 1], 0, [1, 5], "summed must lie in [0, 4], got 5"),
        ([1, 1], 0, [1, 3], "sums over a team need its memory"),
        ([1, 1], 0, [1], "one for each of 2 groups, got 1"),
        ([1, 1], 0, [], "summed and shared come together"),
    ):
        assert text in message(
            lambda g=groups, b=bypass, s=summed: ops.layers_forward(*pair, g, b, s, shared, 0, 2, 1.0)
        )
    assert "summed and shared come together" in message(lambda: ops.layers_forward(*pair, [2], 0, [2]))
    assert "there is no program" in message(lambda: ops.layer_mlp(10**9, x))
    assert "x must be a CPU tensor" in message(lambda: ops.layer_mlp(program.handle, x[..., 1:]))
    assert "cos must be" in message(lambda: ops.layer_attention(program.handle, x))


def test_fakes():
    program, (x, cos, sin) = Program(spec()), call(spec(), 1, 2)
    torch.library.opcheck(torch.ops.cpullm.layer_mlp.default, (program.handle, x))
    given = (program.handle, x, cos, sin, None, None, None, None, None, 0)
    torch.library.opcheck(torch.ops.cpullm.layer_attention.default, given)
