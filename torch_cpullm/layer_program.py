"""Layer specs as programs of the C++ operators."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .layer_reference import CacheLayer
from .layer_spec import ACTIVATIONS, LayerSpec, Norm, QkvLayout
from .linear import PackedEmbedding, PackedLinear
from .ops import COMPUTE
from .packing import PackedWeight

_forward = torch.ops.cpullm.layer_forward.default
_group_forward = torch.ops.cpullm.layers_forward.default
_stack_forward = torch.ops.cpullm.stack_forward.default
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # numbers that embedding_create takes
MOST_MEMBERS = 8  # of a group: kMostMembers in csrc/layer.h
MOST_FEW_ROWS = 96  # of a kv head: kFewRows in csrc/kernels/block.h


# The barriers of a program need threads that all run at once.
_THREADS_CAN_WAIT = "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()


class Program:
    """One decoder layer, ready to run: ``program(x, cos, sin, mask, cache) -> y``.

    x [b, s, hidden] float32 | bfloat16 | float16, y of its shape and type; cos, sin [1 or b, s, rotary_dim]; mask
    [1 or b, 1 or h, s, length + s] bool or added, None: causal; cache: a layer of CpuLlmCache or None. Raises
    ValueError for a spec that the operator cannot run, RuntimeError for arguments that do not fit.
    """

    def __init__(self, spec: LayerSpec) -> None:
        if not _THREADS_CAN_WAIT:
            raise ValueError("torch was built without OpenMP, whose threads all run at once")
        try:
            self.handle = torch.ops.cpullm.layer_create.default(*encode(spec))
        except RuntimeError as error:
            text = str(error).split("\n")[0]
            raise ValueError(text.split("layer_create: ")[-1]) from None
        weakref.finalize(self, torch.ops.cpullm.layer_free.default, self.handle).atexit = False
        self._kv_heads, self._head_dim = spec.kv_heads, spec.head_dim
        # Tokens for last(): of fp32 products the order of additions depends on the rows.
        alone = spec.o.compute == "int8" and not spec.parallel and spec.ranks is None
        self._least = 1 + MOST_FEW_ROWS // (spec.heads // spec.kv_heads) if alone else sys.maxsize
        # Sums over the ranks that cut the layer, in a run; in one as a member of a group, whose own sum is another.
        self.ranks, self.sums = spec.ranks, 1 if spec.parallel else 2
        self.member_sums = 0 if spec.parallel else 1 + (spec.post_mlp_norm is not None)

    def __call__(
        self, x: Tensor, cos: Tensor | None, sin: Tensor | None, mask: Tensor | None, cache: CacheLayer | None
    ) -> Tensor:
        """Run the layer once; the cache takes the new tokens."""
        if cache is None:
            return _forward(self.handle, x, cos, sin, fitting(mask, x.shape[1]), None, None, None, None, 0)
        return self._with_cache(x, cos, sin, mask, cache, False)

    def last(
        self, x: Tensor, cos: Tensor | None, sin: Tensor | None, mask: Tensor | None, cache: CacheLayer | None
    ) -> Tensor | None:
        """The last token of what a call returns, [b, 1, hidden], with the same bits; None where that is not done, of
        few tokens or without a cache.
        """
        if cache is None or x.dim() != 3 or x.shape[1] < self._least:
            return None
        return self._with_cache(x, cos, sin, mask, cache, True)

    def _with_cache(
        self, x: Tensor, cos: Tensor | None, sin: Tensor | None, mask: Tensor | None, cache: CacheLayer, last: bool
    ) -> Tensor:
        k, v, k_scale, v_scale, length = self.reserve(cache, x)
        mask = fitting(mask, length + x.shape[1])
        y = _forward(self.handle, x, cos, sin, mask, k, v, k_scale, v_scale, length, last)
        cache.advance(x.shape[1])
        return y

    def reserve(self, cache: CacheLayer, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int]:
        """(k, v, k_scale, v_scale, length) of a cache that has room for x's tokens."""
        return cache.reserve(x.shape[0], x.shape[1], self._kv_heads, self._head_dim, x.dtype)


class Head:
    """The last norm and the output head of a model, for :class:`Stack`: ``logits = norm(x) W^T + bias``.

    kind, eps, norm: as :func:`layer_parts.read_norm` gives them. Raises ValueError where the sizes do not fit.
    """

    def __init__(self, kind: str, eps: float, norm: Norm, linear: PackedLinear) -> None:
        to = _Writer()
        to.ints += [linear.in_features, linear.out_features, COMPUTE[linear.compute], kind == "layer"]
        to.norm(norm)
        to.linear(linear)
        try:
            self.handle = torch.ops.cpullm.head_create.default(to.tensors, [int(v) for v in to.ints], [eps])
        except RuntimeError as error:
            raise ValueError(str(error).split("\n")[0].split("head_create: ")[-1]) from None
        weakref.finalize(self, torch.ops.cpullm.layer_free.default, self.handle).atexit = False


class Embedding:
    """The rows of a packed embedding, for :class:`Stack`. Raises ValueError where they are scaled."""

    def __init__(self, module: PackedEmbedding) -> None:
        if module.multiplier is not None:
            raise ValueError("the embedding multiplies its rows")
        self._packed, self.dtype = module.packed, module.dtype
        to = _Writer()
        to.ints += [self._packed.k, self._packed.n, _FLOATS.index(self.dtype)]
        to.packed(self._packed)
        self.handle = torch.ops.cpullm.embedding_create.default(to.tensors, to.ints)
        weakref.finalize(self, torch.ops.cpullm.layer_free.default, self.handle).atexit = False

    def is_all_of(self, module: nn.Module) -> bool:
        """Whether ``module(ids)`` is these rows and nothing else happens in the call."""
        own = module.__dict__
        return (
            module.__class__ is PackedEmbedding
            and own["packed"] is self._packed
            and own["dtype"] is self.dtype
            and own["multiplier"] is None
            and "forward" not in own
            and not (own["_forward_hooks"] or own["_forward_pre_hooks"])
        )


class Stack:
    """Layers in groups and the caches they write, checked once: ``stack(x, angles, mask, length) -> y``.

    programs, groups, bypass, caches, rotary: as of :func:`ops.layers_forward`, whose result it is; rotary's indices are
    those of angles. x [b, s, hidden], or with an embedding the ids [b, s] of its rows; mask [1 or b, 1 or h, s, length
    + s] of every layer; length: tokens that the caches hold. With a head its logits [b, s, n], of x's dtype. first: -1,
    or angles are of many positions and the tokens' are those from this place on. Raises RuntimeError for what does not
    fit.
    """

    def __init__(
        self, programs: Sequence[int], caches: list[Tensor], rotary: list[int], groups: list[int], bypass: int
    ) -> None:
        self._number = torch.ops.cpullm.stack_create.default(programs, caches, rotary, groups, bypass)
        weakref.finalize(self, torch.ops.cpullm.stack_free.default, self._number).atexit = False

    def __call__(
        self,
        x: Tensor,
        angles: list[Tensor],
        mask: Tensor | None,
        length: int,
        head: Head | None = None,
        embedding: Embedding | None = None,
        first: int = -1,
    ) -> Tensor:
        """Run all layers once; the caches take the new tokens."""
        before, after = 0 if embedding is None else embedding.handle, 0 if head is None else head.handle
        return _stack_forward(self._number, x, angles, mask, length, after, before, first)


def run_group(programs: Sequence[Program], bypass: int, calls: Sequence[tuple], ranks: Any = None) -> Tensor | None:
    """``y = x + sum_l (a_l + m_l)`` of layers that read one x, by one operator; see :func:`layer_group.combine`.

    calls: the arguments of each program, whose x are equal. ranks: whose sum it is, through shared memory; None: all l
    are here. None where the caches hold different numbers of tokens.
    """
    x = calls[-1][0]
    tensors: list[Tensor] = []

    def place(tensor: Tensor | None) -> int:
        if tensor is None:
            return -1
        found = next((i for i, other in enumerate(tensors) if other is tensor), len(tensors))
        if found == len(tensors):
            tensors.append(tensor)
        return found

    rotary = [place(tensor) for _, cos, sin, _, _ in calls for tensor in (cos, sin)]
    caches = [call[4] for call in calls]
    handles, groups, sums = [program.handle for program in programs], [len(programs)], sums_of([programs], [ranks])
    if all(cache is None for cache in caches):
        masks = [place(fitting(mask, x.shape[1])) for _, _, _, mask, _ in calls]
        return run_all((handles, x, tensors, rotary, masks, [], 0, groups, bypass), sums)
    if None in caches:
        return None
    held = [program.reserve(cache, x) for program, cache in zip(programs, caches, strict=True)]
    if len({each[4] for each in held}) > 1 or len({each[2] is None for each in held}) > 1:
        return None
    masks = [place(fitting(mask, held[0][4] + x.shape[1])) for _, _, _, mask, _ in calls]
    buffers = [tensor for each in held for tensor in each[:4] if tensor is not None]
    y = run_all((handles, x, tensors, rotary, masks, buffers, held[0][4], groups, bypass), sums)
    for cache in caches:
        cache.advance(x.shape[1])
    return y


class Sums(NamedTuple):
    """What groups of programs sum over ranks, in shared memory.

    summed: of each group, see :func:`ops.layers_forward`; counts: sums over all ranks, and over the team, of one run.
    """

    ranks: Any
    summed: list[int]
    counts: tuple[int, int]


def sums_of(groups: Sequence[Sequence[Program]], spread: Sequence[Any]) -> Sums | None:
    """The sums of programs in groups. spread: of each the ranks that have its members; None: they are all here."""
    ranks = next((each for each in (*spread, groups[0][0].ranks) if each is not None), None)
    if ranks is None:
        return None
    summed, over_all, over_team = [], 0, 0
    for programs, apart in zip(groups, spread, strict=True):
        cut = programs[0].ranks
        if apart is not None:
            inner = 0 if cut is None else sum(program.member_sums for program in programs)
            over_all, over_team = over_all + 1, over_team + inner
            summed.append(4 if inner else 2)
        elif cut is None:
            summed.append(0)
        elif cut is ranks:
            over_all += programs[0].sums
            summed.append(1)
        else:
            over_team += programs[0].sums
            summed.append(3)
    return Sums(ranks, summed, (over_all, over_team))


def run_all(arguments: tuple, sums: Sums | None = None) -> Tensor:
    """``layers_forward(*arguments)``, with the sums of its programs."""
    if sums is None:
        return _group_forward(*arguments)
    return sums.ranks.run(_group_forward, (*arguments, sums.summed), arguments[1], *sums.counts)


def fitting(mask: Tensor | None, keys: int) -> Tensor | None:
    """A mask for this many keys; some models of older transformers make it longer and cut it, as here, in the layer."""
    return mask if mask is None or mask.shape[-1] <= keys else mask[..., :keys]


class _Writer:
    """Collects a program's numbers and tensors in the order in which ops_program.cpp reads them."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.ints: list[int] = []

    def tensor(self, tensor: Tensor | None) -> None:
        self.ints.append(-1 if tensor is None else len(self.tensors))
        if tensor is not None:
            self.tensors.append(tensor)

    def vector(self, tensor: Tensor | None) -> None:
        self.tensor(None if tensor is None else tensor.detach().to(torch.float32).contiguous())

    def packed(self, packed: PackedWeight) -> None:
        for tensor in packed.tensors:
            self.tensor(tensor)
        self.ints.append(packed.group)

    def linear(self, linear: PackedLinear) -> None:
        self.packed(linear.packed)
        self.vector(linear.bias)
        self.tensor(None if linear.order is None else linear.order.clone())  # checked once: nobody else's

    def norm(self, norm: Norm | None) -> None:
        self.ints.append(norm is not None)
        self.vector(None if norm is None else norm.gain)
        self.vector(None if norm is None else norm.bias)


def encode(spec: LayerSpec) -> tuple[list[Tensor], list[int], list[float]]:
    """The arguments of ``cpullm::layer_create`` for this spec; ValueError where its linears differ in compute."""
    if len({linear.compute for linear in spec.linears()}) != 1:
        raise ValueError("the linears of a layer must share one compute")
    to = _Writer()
    to.ints += [spec.hidden, spec.heads, spec.kv_heads, spec.head_dim, spec.intermediate]
    to.ints += [COMPUTE[spec.o.compute], spec.parallel]
    layout = spec.qkv_layout or QkvLayout.concat(spec.heads, spec.kv_heads, spec.head_dim)
    to.ints += [layout.q_per_group, layout.group_stride, layout.k_start, layout.v_start, layout.kv_stride]
    to.ints.append(len(spec.qkv))
    for linear in (*spec.qkv, spec.o):
        to.linear(linear)
    to.ints += [spec.gated, len(spec.up)]
    for linear in (*spec.up, spec.down):
        to.linear(linear)
    to.ints.append(spec.norm == "layer")
    for norm in (spec.input_norm, spec.post_attention_norm, spec.mlp_norm, spec.post_mlp_norm):
        to.norm(norm)
    whole = any(norm is not None and norm.gain.shape[0] != spec.head_dim for norm in (spec.q_norm, spec.k_norm))
    to.ints.append(whole)
    to.norm(spec.q_norm)
    to.norm(spec.k_norm)
    to.ints += [spec.rotary_dim, spec.rope_style == "interleaved", ACTIVATIONS.index(spec.act), spec.window]
    to.vector(spec.sinks)
    return to.tensors, [int(v) for v in to.ints], [spec.eps, spec.scale, spec.softcap, spec.residual_scale]
