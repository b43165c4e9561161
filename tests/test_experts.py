"""cpullm::experts against its oracle: every form, compute and level, and what its results must not depend on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import FLOATS, UNIT_ROUNDOFF, at_offset, generator, one_thread
from expert_stacks import ROWS, SHAPES, Shape, call, stacks

from torch_cpullm import ops, reference
from torch_cpullm.packing import PackedWeight, pack, pack_stored_stack, stack, stored_stack, unpack

PLAIN = SHAPES[0]
EDGES = SHAPES[3]
# int8: a last bit of the first product may move a rounding to int8 before the second. fp32: order of additions.
TOLERANCE = {"int8": 2e-3, "fp32": 1e-5, "bf16": 6e-2}


def error_of(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest relative error of a row."""
    return float(((got.double() - want).norm(dim=1) / want.norm(dim=1)).max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_oracle(shape: Shape, isa: str) -> None:
    gate_up, down = stacks(shape)
    for tokens in ROWS:
        x, index, weights = call(shape, tokens)
        for compute, most in TOLERANCE.items():
            with one_thread():
                oracle = "int8" if compute == "int8" else "fp32"
                want = reference.experts(x, index, weights, gate_up, down, compute=oracle)
            got = ops.experts(x, index, weights, gate_up, down, compute=compute)
            assert got.shape == x.shape
            assert got.dtype == x.dtype
            assert error_of(got, want) <= most, (tokens, compute)


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "relu"])
def test_activations(act: str, isa: str) -> None:
    gate_up, down = stacks(PLAIN)
    x, index, weights = call(PLAIN, 7)
    want = reference.experts(x, index, weights, gate_up, down, act, "fp32")
    assert error_of(ops.experts(x, index, weights, gate_up, down, act, "fp32"), want) <= 1e-5


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes(dtype: torch.dtype, isa: str) -> None:
    """Of x and the result, of the weights, of the index: one rounding at the end."""
    gate_up, down = stacks(EDGES)
    x, index, weights = call(EDGES, 5)
    x = (x / x.abs().amax(1, keepdim=True)).to(dtype)
    want = reference.experts(x, index, weights.to(dtype), gate_up, down, compute="fp32")
    got = ops.experts(x, index.int(), weights.to(dtype), gate_up, down, compute="fp32")
    assert got.dtype == dtype
    assert error_of(got, want) <= 1e-5 + UNIT_ROUNDOFF[dtype]


def test_layouts_of_the_arguments() -> None:
    gate_up, down = stacks(PLAIN)
    x, index, weights = call(PLAIN, 4)
    want = ops.experts(x, index, weights, gate_up, down)
    for other in (at_offset(x, 8), x.T.contiguous().T, torch.cat([x, x], 1)[:, :64]):
        assert torch.equal(ops.experts(other, index, weights, gate_up, down), want)
    spread = torch.stack([index, index], -1)[..., 0], torch.stack([weights, weights], -1)[..., 0]
    assert torch.equal(ops.experts(x, *spread, gate_up, down), want)
    moved = [replace(s, whole=shifted(s.whole)) for s in (gate_up, down)]
    assert torch.equal(ops.experts(x, index, weights, *moved), want)


def shifted(weight: PackedWeight) -> PackedWeight:
    """The same weight in memory that begins 8 bytes past a cache line."""
    codes, scales, zeros = (None if t is None else at_offset(t, 8) for t in weight.tensors)
    return replace(weight, codes=codes, scales=scales, zeros=zeros)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_bits_depend_on_the_row_alone(shape: Shape, isa: str) -> None:
    """Not on the batch, nor on the threads, nor on the order of the tokens."""
    gate_up, down = stacks(shape)
    x, index, weights = call(shape, 33)
    want = ops.experts(x, index, weights, gate_up, down)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(ops.experts(x, index, weights, gate_up, down), want)
    alone = [ops.experts(x[t : t + 1], index[t : t + 1], weights[t : t + 1], gate_up, down) for t in range(33)]
    assert torch.equal(torch.cat(alone), want)
    order = torch.randperm(33, generator=generator(1))
    assert torch.equal(ops.experts(x[order], index[order], weights[order], gate_up, down), want[order])


def test_int8_is_made_of_the_linear_operator(isa: str) -> None:
    """Bit for bit: the same two products, the activation between them, the sum by ascending slot."""
    gate_up, down = stacks(EDGES)
    x, index, _ = call(EDGES, 9)
    weights = torch.ones(index.shape)
    want = torch.zeros_like(x)
    for t in range(9):
        for e in index[t].tolist():
            gate, up = ops.linear(x[t : t + 1], gate_up[e]).chunk(2, -1)
            want[t] += ops.linear(ops.activation(gate.contiguous(), up.contiguous(), "silu"), down[e])[0]
    assert torch.equal(ops.experts(x, index, weights, gate_up, down), want)


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_threads_do_not_change_other_computes(compute: str, isa: str) -> None:
    gate_up, down = stacks(EDGES)
    for tokens in (1, 33):
        x, index, weights = call(EDGES, tokens)
        want = ops.experts(x, index, weights, gate_up, down, compute=compute)
        torch.set_num_threads(5)
        assert torch.equal(ops.experts(x, index, weights, gate_up, down, compute=compute), want)
        torch.set_num_threads(2)


def test_all_tokens_to_one_expert_and_none_to_others(isa: str) -> None:
    """The others' weights are not read: they may be anything."""
    gate_up, down = stacks(PLAIN)
    x, _, weights = call(PLAIN, 33)
    index = torch.full((33, 2), 1)
    index[:, 1] = 3
    want = ops.experts(x, index, weights, gate_up, down)
    for e in (0, 2):
        gate_up[e].scales.fill_(torch.nan)
        down[e].scales.fill_(torch.nan)
    assert torch.equal(ops.experts(x, index, weights, gate_up, down), want)
    assert bool(torch.isfinite(want).all())


def test_an_expert_chosen_twice_counts_twice(isa: str) -> None:
    gate_up, down = stacks(PLAIN)
    x, index, weights = call(PLAIN, 1)
    twice = index[:, :1].expand(1, 2)
    got = ops.experts(x, twice, weights, gate_up, down, compute="fp32")
    want = reference.experts(x, twice, weights, gate_up, down, compute="fp32")
    assert error_of(got, want) <= 1e-5


def test_more_rows_than_are_computed_at_a_time(isa: str) -> None:
    """Tokens go in parts of 4096 rows."""
    shape = Shape("", 8, 8, 32, 32)
    gate_up, down = stacks(shape)
    x, index, weights = call(shape, 515)
    got = ops.experts(x, index, weights, gate_up, down)
    for part in (slice(0, 500), slice(500, 515)):
        assert torch.equal(got[part], ops.experts(x[part], index[part], weights[part], gate_up, down))


def test_no_tokens_and_values_that_are_no_numbers(isa: str) -> None:
    gate_up, down = stacks(PLAIN)
    x, index, weights = call(PLAIN, 5)
    assert ops.experts(x[:0], index[:0], weights[:0], gate_up, down).shape == (0, 64)
    for compute in ("int8", "fp32"):
        want = ops.experts(x, index, weights, gate_up, down, compute=compute)
        broken = x.clone()
        broken[2, 7] = torch.inf
        got = ops.experts(broken, index, weights, gate_up, down, compute=compute)
        assert bool(got[2].isnan().any())
        assert torch.equal(got[[0, 1, 3, 4]], want[[0, 1, 3, 4]])


# ---- stacks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stacks_are_their_matrices(shape: Shape) -> None:
    gate_up, down = stacks(shape)
    for weights in (gate_up, down):
        again = stack(weights.count, weights.__getitem__)
        assert weights.nbytes == sum(weights[e].nbytes for e in range(weights.count))
        stored = pack_stored_stack(
            *stored_stack(weights), weights.count, weights.n, weights.k, weights.whole.bits, weights.whole.group_size
        )
        for other in (again, stored):
            for a, b in zip(weights.whole.tensors, other.whole.tensors, strict=True):
                assert (a is None and b is None) or torch.equal(a, b)
        assert all(t is None or t.data_ptr() % 64 == 0 for t in weights.whole.tensors)
        assert unpack(pack(unpack(weights[0]))).codes.equal(unpack(weights[0]).codes)
    with pytest.raises(IndexError, match=f"matrix {shape.experts} of a stack of {shape.experts}"):
        gate_up[shape.experts]


def test_stacks_refuse_what_does_not_fit() -> None:
    gate_up, down = stacks(PLAIN)
    with pytest.raises(ValueError, match="matrix 1 of a stack has another form"):
        stack(2, lambda i: (gate_up, down)[i][0])
    symmetric, _ = stacks(Shape("", 4, 2, 64, 32, form="sym"))
    with pytest.raises(ValueError, match="matrix 1 of a stack has another form"):
        stack(2, lambda i: (gate_up, symmetric)[i][0])
    codes, scales, zeros = stored_stack(gate_up)
    with pytest.raises(ValueError, match="must be 4 matrices each"):
        pack_stored_stack(codes[:3], scales, zeros, 4, 64, 64, 4, 32)
    with pytest.raises(ValueError, match="weight_codes must be uint8"):
        pack_stored_stack(codes[:, :3], scales, zeros, 4, 64, 64, 4, 32)
