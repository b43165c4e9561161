"""Typed wrappers of the compiled operators, their fake kernels, and the choice of instruction set."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from . import library  # noqa: F401  it loads them
from .packing import ACT_BLOCK, CHUNK, PANEL, STEP, PackedStack, PackedWeight, round_up

COMPUTE = {"int8": 0, "fp32": 1, "bf16": 2}
"""Names of the compute types and the numbers the operator takes."""


def check_compute(compute: str) -> None:
    """Raise ValueError unless ``compute`` names a compute type."""
    if compute not in COMPUTE:
        raise ValueError(f"compute must be one of {', '.join(map(repr, COMPUTE))}, got {compute!r}")


# ---- instruction set ------------------------------------------------------------------------------------------------


def isa() -> str:
    """Name of the level in use: ref, avx2, avx_vnni, avx512 or amx.

    The environment variable ``CPULLM_ISA`` caps it. Raises RuntimeError, listing the reachable levels, when that names
    an unknown or unreachable one.
    """
    return torch.ops.cpullm.isa.default()


def isa_levels() -> dict[str, bool]:
    """Every level, lowest first, and whether this machine can run it."""
    pairs = (item.split(":") for item in torch.ops.cpullm.isa_levels.default().split(","))
    return {name: flag == "1" for name, flag in pairs}


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Cap the instruction set inside a ``with`` block, for the whole process. Raises RuntimeError as :func:`isa`."""
    before = isa()
    torch.ops.cpullm.set_isa.default(name)
    try:
        yield
    finally:
        torch.ops.cpullm.set_isa.default(before)


# ---- operators ------------------------------------------------------------------------------------------------------


def linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None = None, perm: Tensor | None = None, compute: str = "int8"
) -> Tensor:
    """``y = x W^T + bias``.

    x: float32 | bfloat16 | float16 [.., k], any strides. weight: W [n, k]. bias: [n], any of these dtypes.
    perm: int32 [k], input j of W is ``x[.., perm[j]]``. compute: ``"int8"`` quantises x to int8 per row and 128 inputs;
    ``"fp32"`` is exact up to rounding; ``"bf16"`` rounds x and the weights to bfloat16 where the level multiplies that
    and x has many rows, and is ``"fp32"`` otherwise. Returns [.., n] of x's dtype. Raises RuntimeError naming the
    argument that is wrong.
    """
    # No fake: it has no memory.
    if type(x) is Tensor and not recording():
        number = weight.__dict__.get("number") or _number(weight)
        if number:
            if bias is None and perm is None and compute == "int8":
                return _weight_linear(x, number)
            return weight_linear(x, number, bias, perm, compute)
    check_compute(compute)
    return torch.ops.cpullm.linear.default(
        x, weight.codes, weight.scales, weight.zeros, bias, perm, weight.n, weight.k, weight.group, COMPUTE[compute]
    )


def recording() -> bool:
    """Whether Dynamo, ``torch.jit.trace`` or a dispatch mode such as make_fx's sees the operators that are called.

    Then none may have a number of a weight or a program: it is of this process, and what is recorded lasts longer.
    """
    return _is_compiling() or _modes() > 0 or _is_tracing()


_modes, _is_tracing = torch._C._len_torch_dispatch_stack, torch._C._is_tracing
_is_compiling, _weight_linear = torch.compiler.is_compiling, torch.ops.cpullm.weight_linear.default
_sizes: dict[int, tuple[int, int]] = {}  # n and k of the weights that have a number


def weight_linear(
    x: Tensor, number: int, bias: Tensor | None = None, perm: Tensor | None = None, compute: str = "int8"
) -> Tensor:
    """:func:`linear` with the weight that has this number, for 1 us less: each argument costs 0.2 us.

    A number is of one process and lasts as long as the PackedWeight; RuntimeError where no weight has it.
    """
    check_compute(compute)
    return _weight_linear(x, number, bias, perm, COMPUTE[compute])


def _number(weight: PackedWeight) -> int:
    """The number under which C++ knows ``weight`` from now on; 0 if it is not in this machine's memory."""
    if not all(t is None or (type(t) is Tensor and t.is_cpu) for t in weight.tensors):
        return 0
    number = torch.ops.cpullm.weight_create.default(*weight.tensors, weight.n, weight.k, weight.group)
    _sizes[number] = weight.n, weight.k
    weight.__dict__["number"] = number  # of this very object: PackedWeight leaves it out of its copies
    weakref.finalize(weight, _free, number).atexit = False
    return number


def _free(number: int) -> None:
    del _sizes[number]
    torch.ops.cpullm.weight_free.default(number)


def embedding(ids: Tensor, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Rows of W [n, k]: ids int64 | int32 [..] -> [.., k] of ``dtype``. RuntimeError for an id outside [0, n)."""
    return torch.ops.cpullm.embedding.default(
        ids, weight.codes, weight.scales, weight.zeros, weight.n, weight.k, weight.group, dtype
    )


def experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: PackedStack,
    down: PackedStack,
    act: str = "silu",
    compute: str = "int8",
) -> Tensor:
    """``y[t] = sum_s weights[t, s] down_e (act(gate_e x[t]) * (up_e x[t]))``, e = index[t, s]; slots ascending.

    x: float32 | bfloat16 | float16 [tokens, hidden]. index: int64 | int32 [tokens, top_k]. weights: of a float type,
    of index's shape. gate_up: [experts, 2 intermediate, hidden], the gate's rows first. down: [experts, hidden,
    intermediate]. act: as in :func:`activation`. compute: as in :func:`linear`. Only the weights of experts that are
    chosen are read. Returns [tokens, hidden] of x's dtype. Raises RuntimeError naming the argument that is wrong; an
    index outside of [0, experts) is one.
    """
    check_compute(compute)
    return torch.ops.cpullm.experts.default(
        x,
        index,
        weights,
        *gate_up.whole.tensors,
        *down.whole.tensors,
        down.count,
        down.n,
        down.k,
        gate_up.whole.group,
        down.whole.group,
        act,
        COMPUTE[compute],
    )


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    length: int | None = None,
    exact: bool = True,
) -> Tensor:
    """``softmax(mask(cap(q K^T scale))) V``; query head h reads kv head ``h g // heads``.

    q: [b, h, s, d] float32 | bfloat16 | float16, its last token the last of the ``length`` keys. k, v: [b, g, capacity,
    d], of one of these types, or int8 with ``k_scale`` and ``v_scale`` float32 [b, g, capacity] (value = code * scale);
    ``length`` tokens of them are read (default: all). Any strides but a unit last one. mask: bool (true: attend) or
    float (added), [b | 1, h | 1, s | 1, length]; without one attention is causal, and limited to the last ``window``
    keys if that is not 0. softcap, if not 0: ``cap(x) = softcap tanh(x / softcap)``. sinks: float32 [h], a logit more
    in each denominator. A row without any key gives zeros. Computed in float32; not ``exact``: over bfloat16 and int8
    caches the scaled q and the probabilities may be rounded to bfloat16 first, where that is faster. Returns [b, s, h,
    d] of q's dtype. Raises RuntimeError naming the argument that is wrong.
    """
    return torch.ops.cpullm.attention.default(
        q, k, v, mask, scale, softcap, window, sinks, k_scale, v_scale, length, exact
    )


def rms_norm(x: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * gain`` over the last dimension.

    x: float32 | bfloat16 | float16 [.., n]. gain: float32 [n] or None (1). Returns float32 [.., n]. Raises RuntimeError
    naming the argument that is wrong.
    """
    return torch.ops.cpullm.rms_norm.default(x, gain, eps)


def layer_norm(x: Tensor, gain: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``(x - mean(x)) / sqrt(var(x) + eps) * gain + bias`` over the last dimension; arguments as :func:`rms_norm`."""
    return torch.ops.cpullm.layer_norm.default(x, gain, bias, eps)


def rope(x: Tensor, cos: Tensor, sin: Tensor, style: str = "half") -> None:
    """Rotate the first ``width`` elements of each head of x, in place: ``x cos + x' sin``.

    x: contiguous float32 [b, s, h, d]. cos, sin: contiguous, of one float dtype [1 | b, s, width]. style: ``"half"``
    pairs elements j and ``j + width / 2``, x' is (-second, first); ``"interleaved"`` pairs neighbours;
    ``"interleaved_once"`` also, with one cos and sin for each pair [1 | b, s, width / 2]. Raises RuntimeError naming
    the argument that is wrong.
    """
    torch.ops.cpullm.rope.default(x, cos, sin, style)


def activation(gate: Tensor, up: Tensor | None, act: str) -> Tensor:
    """``act(gate) * up`` of float32 tensors of one shape; up None: ``act(gate)``.

    act: ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"relu"``, each within 1e-6, absolute or relative. Raises
    RuntimeError naming the argument that is wrong.
    """
    return torch.ops.cpullm.activation.default(gate, up, act)


def cache_append(x: Tensor, cache: Tensor, scale: Tensor | None, position: int) -> None:
    """``cache[:, :, position : position + s] = x``, in place.

    x: contiguous float32 [b, s, g, d]. cache: [b, g, capacity, d] of a float type, or int8 with scale float32 [b, g,
    capacity]: value = code * scale, scale = absmax / 127 of the vector. Raises RuntimeError naming the argument that is
    wrong.
    """
    torch.ops.cpullm.cache_append.default(x, cache, scale, position)


def dequantize(weight: PackedWeight) -> Tensor:
    """W as float32 [n, k], bit-equal to :func:`torch_cpullm.packing.dequantize` without the float-minimum form and
    within one rounding of it with.
    """
    return torch.ops.cpullm.dequantize.default(
        weight.codes, weight.scales, weight.zeros, weight.n, weight.k, weight.group
    )


def quantize_weights(
    weight: Tensor, bits: int, group: int, sym: bool, search: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Round to nearest of a finite contiguous matrix [n, k], see :func:`torch_cpullm.quant.quantize_rtn`.

    Returns codes uint8 [n, k], scales [n, groups] of ``scale_dtype``, zero points uint8 [n, groups] (undefined if
    symmetric).
    """
    return torch.ops.cpullm.quantize_weights.default(weight, bits, group, sym, search, scale_dtype)


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """What int8 compute sees of x [.., k]: ``x ~ q * scale``, per row and block of 128 inputs.

    Returns q int32 [m, k'], at most one input of a block beyond -127..127, and scale float32 [m, ceil(k'/128)];
    k' = k rounded up to 32.
    """
    return torch.ops.cpullm.quantize_activations.default(x)


def layer_forward(
    program: int,
    x: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    mask: Tensor | None = None,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    length: int = 0,
    last: bool = False,
) -> Tensor:
    """Run a decoder layer's program: x [b, s, hidden] float32 | bfloat16 | float16 -> the same shape and type.

    cos, sin [1 or b, s, rotary_dim]; mask [1 or b, 1 or h, s, length + s] bool (true: attend) or added, None: causal;
    caches [b, g, capacity, d] of any float type, or int8 with float32 scales [b, g, capacity], which hold ``length``
    tokens and take the new ones. last: y of the last token alone, [b, 1, hidden], with the same bits; for prompts of a
    sequential layer. RuntimeError for arguments that do not fit the program.
    """
    given = program, x, cos, sin, mask, k_cache, v_cache, k_scale, v_scale, length
    return torch.ops.cpullm.layer_forward.default(*given, last)


def layers_forward(
    programs: list[int],
    x: Tensor,
    tensors: list[Tensor],
    rotary: list[int],
    masks: list[int],
    caches: list[Tensor],
    length: int,
    groups: list[int],
    bypass: int = 0,
    summed: Sequence[int] = (),
    shared: Tensor | None = None,
    rank: int = 0,
    ranks: int = 1,
    timeout_s: float = 0.0,
    team_shared: Tensor | None = None,
    team_rank: int = 0,
    team_ranks: int = 1,
) -> Tensor:
    """The programs of several layers, in groups of these sizes, each on the output of the one before.

    A group of up to 8 layers reads one x: ``y = x + sum_l (a_l + m_l)``; m_l reads x + a_l + the a_j of the ``bypass``
    layers before l in the group, -1: of all. x [b, s, hidden] -> y alike. tensors: cos, sin and masks as
    :func:`layer_forward` takes them; rotary: indices of cos and sin of every layer, masks: of every layer's mask, -1
    for none. caches: none, or k and v of every layer, or k, v and their scales; all hold ``length`` tokens. summed:
    what of each group is summed over ranks: 0 nothing, 1 attention's output and the MLP's of a layer that is cut (of a
    parallel layer, their sum), 2 the sum_l above, of whose members this rank has some, 3 as 1, over a team of the
    ranks, 4 as 2, where a team cuts each member among its ranks and so sums attention's output too; shared, rank,
    ranks, timeout_s: as of :func:`shared_sum`; team_shared, team_rank, team_ranks: the same of this rank's team. Raises
    RuntimeError for what does not fit, and where a rank did not come.
    """
    given = programs, x, tensors, rotary, masks, caches, length, groups, bypass, summed, shared, rank, ranks, timeout_s
    return torch.ops.cpullm.layers_forward.default(*given, team_shared, team_rank, team_ranks)


def stack_forward(stack: int, x: Tensor, angles: list[Tensor], mask: Tensor | None, length: int, *rest: int) -> Tensor:
    """What a :class:`layer_program.Stack` calls, which says what the arguments are. Raises RuntimeError as it does."""
    return torch.ops.cpullm.stack_forward.default(stack, x, angles, mask, length, *rest)


def layer_attention(
    program: int,
    x: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    mask: Tensor | None = None,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    length: int = 0,
) -> Tensor:
    """``attention(norm(x)) Wo`` of a layer's program, float32 [b, s, hidden]; arguments as of :func:`layer_forward`."""
    return torch.ops.cpullm.layer_attention.default(
        program, x, cos, sin, mask, k_cache, v_cache, k_scale, v_scale, length
    )


def layer_mlp(program: int, x: Tensor) -> Tensor:
    """``mlp(norm(x))`` of a layer's program, x [b, s, hidden] of any float type -> float32; no residual is added."""
    return torch.ops.cpullm.layer_mlp.default(program, x)


def shared_sum(x: Tensor, shared: Tensor, rank: int, ranks: int, timeout_s: float) -> bool:
    """x <- sum of every rank's x, in place, the same bits on all ranks; float32 [.., n]. False: a rank did not come.

    shared: uint8, memory that all ranks map, zeroed before the first sum: 64 bytes and two buffers of a row of x or
    more per rank. RuntimeError for arguments that do not fit.
    """
    return torch.ops.cpullm.shared_sum.default(x, shared, rank, ranks, timeout_s)


def _check_one_device(op: str, **tensors: Tensor | None) -> None:
    """The dispatcher takes a fake kernel as soon as one tensor is on meta: refuse to invent a result for the others."""
    devices = {name: tensor.device.type for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        found = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise RuntimeError(f"cpullm::{op}: all tensors must be CPU tensors, got {found}")


@torch.library.register_fake("cpullm::linear")
def _linear_fake(x, codes, scales, zeros, bias, perm, n, k, group_size, compute):
    _check_one_device("linear", x=x, codes=codes, scales=scales, zeros=zeros, bias=bias, perm=perm)
    return _product("linear", x, n, k)


def _product(op: str, x: Tensor, n: int, k: int) -> Tensor:
    if x.dim() == 0 or x.shape[-1] != k:
        raise RuntimeError(f"cpullm::{op}: the last dimension of x must be k = {k}, got {list(x.shape)}")
    return x.new_empty((*x.shape[:-1], n))


@torch.library.register_fake("cpullm::weight_linear")
def _weight_linear_fake(x, weight, bias=None, perm=None, compute=0):
    if weight not in _sizes or x.device.type != "cpu":
        raise RuntimeError(f"cpullm::weight_linear: there is no weight {weight} on {x.device.type}")
    return _product("weight_linear", x, *_sizes[weight])


@torch.library.register_fake("cpullm::embedding")
def _embedding_fake(ids, codes, scales, zeros, n, k, group_size, dtype):
    _check_one_device("embedding", ids=ids, codes=codes, scales=scales, zeros=zeros)
    return ids.new_empty((*ids.shape, k), dtype=dtype)


@torch.library.register_fake("cpullm::experts")
def _experts_fake(
    x, index, weights, gate_up_codes, gate_up_scales, gate_up_zeros, down_codes, down_scales, down_zeros,
    experts, hidden, intermediate, gate_up_group, down_group, act, compute,
):  # fmt: skip
    gate_up = {"gate_up_codes": gate_up_codes, "gate_up_scales": gate_up_scales, "gate_up_zeros": gate_up_zeros}
    down = {"down_codes": down_codes, "down_scales": down_scales, "down_zeros": down_zeros}
    _check_one_device("experts", x=x, index=index, weights=weights, **gate_up, **down)
    if x.dim() != 2 or x.shape[1] != hidden:
        raise RuntimeError(f"cpullm::experts: x must be [tokens, hidden = {hidden}], got {list(x.shape)}")
    return x.new_empty(x.shape)


@torch.library.register_fake("cpullm::attention")
def _attention_fake(q, k, v, mask, scale, softcap, window, sinks, k_scale, v_scale, length, exact=True):
    _check_one_device("attention", q=q, k=k, v=v, mask=mask, sinks=sinks, k_scale=k_scale, v_scale=v_scale)
    b, h, s, d = q.shape
    return q.new_empty((b, s, h, d))


@torch.library.register_fake("cpullm::rms_norm")
def _rms_norm_fake(x, gain, eps):
    _check_one_device("rms_norm", x=x, gain=gain)
    return x.new_empty(x.shape, dtype=torch.float32)


@torch.library.register_fake("cpullm::layer_norm")
def _layer_norm_fake(x, gain, bias, eps):
    _check_one_device("layer_norm", x=x, gain=gain, bias=bias)
    return x.new_empty(x.shape, dtype=torch.float32)


@torch.library.register_fake("cpullm::rope")
def _rope_fake(x, cos, sin, style):
    _check_one_device("rope", x=x, cos=cos, sin=sin)


@torch.library.register_fake("cpullm::activation")
def _activation_fake(gate, up, act):
    _check_one_device("activation", gate=gate, up=up)
    return gate.new_empty(gate.shape)


@torch.library.register_fake("cpullm::cache_append")
def _cache_append_fake(x, cache, scale, position):
    _check_one_device("cache_append", x=x, cache=cache, scale=scale)


@torch.library.register_fake("cpullm::dequantize")
def _dequantize_fake(codes, scales, zeros, n, k, group_size):
    _check_one_device("dequantize", codes=codes, scales=scales, zeros=zeros)
    return codes.new_empty((n, k), dtype=torch.float32)


@torch.library.register_fake("cpullm::quantize_weights")
def _quantize_weights_fake(weight, bits, group_size, sym, search, scale_dtype):
    n, k = weight.shape
    groups = -(-k // group_size)
    return (
        weight.new_empty((n, k), dtype=torch.uint8),
        weight.new_empty((n, groups), dtype=scale_dtype),
        weight.new_empty((n, groups), dtype=torch.uint8),
    )


@torch.library.register_fake("cpullm::quantize_activations")
def _quantize_activations_fake(x):
    m, kp = x.numel() // x.shape[-1], round_up(x.shape[-1], CHUNK)
    return x.new_empty((m, kp), dtype=torch.int32), x.new_empty((m, -(-kp // ACT_BLOCK)), dtype=torch.float32)


@torch.library.register_fake("cpullm::layer_forward")
def _layer_forward_fake(program, x, cos, sin, mask, k_cache, v_cache, k_scale, v_scale, length, last=False):
    caches = {"k_cache": k_cache, "v_cache": v_cache, "k_scale": k_scale, "v_scale": v_scale}
    _check_one_device("layer_forward", x=x, cos=cos, sin=sin, mask=mask, **caches)
    return x.new_empty((x.shape[0], 1, x.shape[2]) if last else x.shape)


@torch.library.register_fake("cpullm::layers_forward")
def _layers_forward_fake(
    programs, x, tensors, rotary, masks, caches, length, groups, bypass, summed=(),
    shared=None, rank=0, ranks=1, timeout_s=0.0, team_shared=None, team_rank=0, team_ranks=1,
):  # fmt: skip
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("cpullm::stack_forward")
def _stack_forward_fake(stack, x, angles, mask, length, head=0, embedding=0, first=-1):
    raise RuntimeError("cpullm::stack_forward writes caches that a trace does not see: trace layers_forward instead")


@torch.library.register_fake("cpullm::layer_attention")
@torch.library.register_fake("cpullm::layer_mlp")
def _layer_part_fake(program, x, *rest):
    return x.new_empty(x.shape, dtype=torch.float32)


__all__ = [
    "COMPUTE", "PANEL", "STEP", "activation", "attention", "cache_append", "check_compute", "dequantize", "embedding",
    "experts", "isa", "isa_levels", "layer_attention", "layer_forward", "layer_mlp", "layer_norm", "layers_forward",
    "linear", "quantize_activations", "quantize_weights", "rms_norm", "rope", "stack_forward", "use_isa",
    "weight_linear",
]  # fmt: skip
