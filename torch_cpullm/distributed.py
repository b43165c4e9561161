"""One model on several ranks of torch.distributed: members of CQIL groups on a rank each, or every layer cut.

    torchrun --nproc-per-node 2 tutorials/ranks.py ./model

Every rank runs the same program on the same inputs: ``generate()`` gives every rank the same tokens. The transport is
the process group's, gloo on CPUs.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import math
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import __version__
from .layer import install_programs, remove_programs
from .layer_group import LayerGroup, member_of, remove_groups
from .layer_match import Decoder, Match, decoders, match_layers
from .layer_parts import own_state
from .layer_spec import LayerSpec
from .linear import PackedLinear
from .packing import QuantizedWeight, pack, unpack

TIMEOUT_S = 8.0
"""Seconds that a rank waits for the others before it gives up."""

_RANKS = "_cpullm_ranks"  # attribute of a model: its Ranks


class Ranks:
    """The ranks that share a model. all_reduces, bytes: counts of what this rank has put into sums so far."""

    def __init__(self, group: dist.ProcessGroup | None, timeout_s: float) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError('torch.distributed is not initialised: torch.distributed.init_process_group("gloo")')
        members = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
        if dist.get_rank() not in members:
            raise ValueError(f"rank {dist.get_rank()} is not in the process group, whose ranks are {members}")
        if len(members) < 2:
            raise ValueError("a process group of one rank has nothing to share: start several, as torchrun does")
        if not 0 < timeout_s < math.inf:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        # Of its own, so that no rank waits longer than this whatever the timeout of the caller's group.
        self.group = dist.new_group(
            members, timeout=timedelta(seconds=timeout_s), backend="gloo", use_local_synchronization=True
        )
        self.rank, self.size, self.timeout_s = members.index(dist.get_rank()), len(members), timeout_s
        self.all_reduces = self.bytes = 0

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x over all ranks, in place; RuntimeError where a rank is dead or hangs."""
        self.all_reduces += 1
        self.bytes += x.nbytes
        try:
            dist.all_reduce(x, group=self.group)
        except RuntimeError as error:
            raise self._lost(error) from error
        return x

    def gather(self, text: str) -> list[str]:
        """``text`` of every rank."""
        own = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        try:
            dist.all_gather(sizes, torch.tensor([len(own)]), group=self.group)
            room = torch.zeros(int(max(sizes)), dtype=torch.uint8)
            room[: len(own)] = own
            found = [torch.empty_like(room) for _ in range(self.size)]
            dist.all_gather(found, room, group=self.group)
        except RuntimeError as error:
            raise self._lost(error) from error
        return [bytes(each[: int(size)].tolist()).decode() for each, size in zip(found, sizes, strict=True)]

    def check_alike(self, what: str, text: str) -> None:
        """ValueError, on every rank, where ``text`` is not the same on all of them."""
        found = self.gather(text)
        other = next((rank for rank, each in enumerate(found) if each != found[0]), None)
        if other is not None:
            raise ValueError(f"{what} must be the same on all ranks: {found[0]} on rank 0, {found[other]} on {other}")

    def _lost(self, error: RuntimeError) -> RuntimeError:
        return RuntimeError(
            f"rank {self.rank} of {self.size}: another rank has ended, or has not answered for {self.timeout_s:g} s; "
            f"this model cannot go on ({str(error).splitlines()[0]})"
        )


def traffic(model: nn.Module) -> tuple[int, int]:
    """(all-reduces, bytes put into them) of this rank since ``model`` was sharded; ValueError for one that is not."""
    return _ranks(model).all_reduces, _ranks(model).bytes


def _ranks(model: nn.Module) -> Ranks:
    found = model.__dict__.get(_RANKS)
    if not isinstance(found, Ranks):
        raise ValueError("the model is not sharded: shard_groups() or shard_tensors()")
    return found


def _join(model: nn.Module, group: dist.ProcessGroup | None, timeout_s: float) -> Ranks:
    """The ranks, after they have seen that they run the same packages and have the same model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if _RANKS in model.__dict__:
        raise ValueError("the model is sharded already")
    ranks = Ranks(group, timeout_s)
    transformers = importlib.metadata.version("transformers")
    versions = f"torch_cpullm {__version__}, torch {torch.__version__}, transformers {transformers}"
    ranks.check_alike("the packages", versions)
    ranks.check_alike("the model", f"{type(model).__name__} {_fingerprint(model)}")
    return ranks


def _fingerprint(model: nn.Module) -> str:
    """Digest of the config, the plan in it, and the names and shapes of all parameters."""
    config = getattr(model, "config", None)
    texts = ["" if config is None else config.to_json_string(use_diff=False), str(vars(model).get("_cpullm_settings"))]
    texts += [f"{name} {list(p.shape)} {p.dtype}" for name, p in model.named_parameters()]
    texts += [f"{name} {type(module).__name__}" for name, module in model.named_modules()]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


# ---- CQIL groups ----------------------------------------------------------------------------------------------------


def shard_groups(
    model: nn.Module, process_group: dist.ProcessGroup | None = None, *, timeout_s: float = TIMEOUT_S
) -> nn.Module:
    """``y = x + sum over ranks of sum over own l of (layer_l(x) - x)`` for every CQIL group, one all-reduce each.

    Of p ranks, rank r keeps members r, r + p, ... of every group, their weights and their slots in the cache; layers
    outside the groups run on every rank. To be called on every rank, on the same model, float or optimised, after
    :func:`torch_cpullm.cqil.apply`; in place, and for good. Returns ``model``. process_group: None: the default one.
    timeout_s: how long a rank waits for the others before every call of the model ends in a RuntimeError.

    Sums are in float32. Ranks that sample must do so from equal seeds.

    Raises ValueError, on all ranks alike: no groups, a mode that exchanges attention between members ("lp", or a
    bypass), members that do not divide among the ranks, a group with the first layer of its kind (its slot in the cache
    counts the tokens), different models, plans or package versions on the ranks. Raises RuntimeError where
    torch.distributed is not initialised, or a rank is missing.

    Source: CQIL (Zou et al., ACL 2024), which spreads layers over GPUs in this way.
    """
    ranks = _join(model, process_group, timeout_s)
    decoder, groups = _groups(model)
    _check(decoder, groups, ranks.size)
    programs = "_cpullm_layers" in model.__dict__
    remove_programs(model)
    remove_groups(decoder.layers)
    for group in groups:
        meeting = _Meeting(ranks, group.size)
        for index in range(group.size):
            if index % ranks.size != ranks.rank:
                outputs = group.halves[index].outputs
                decoder.layers[group.first + index] = Elsewhere(decoder.layers[group.first + index], outputs)
            layer = decoder.layers[group.first + index]
            layer.register_forward_hook(meeting.hook(index, layer), with_kwargs=True)
    if programs:
        install_programs(model)
    model.__dict__[_RANKS] = ranks
    model.__dict__["save_pretrained"] = _refuse_to_save
    return model


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise RuntimeError("a sharded model holds only this rank's share of the weights: save it before")


def _groups(model: nn.Module) -> tuple[Decoder, list[LayerGroup]]:
    for decoder in decoders(model):
        members = [member for layer in decoder.layers if (member := member_of(layer)) is not None]
        if members:
            return decoder, [member.group for member in members if member.index == 0]
    raise ValueError("the model has no CQIL groups to spread over ranks: torch_cpullm.cqil.apply(model, plan) first")


def _check(decoder: Decoder, groups: list[LayerGroup], ranks: int) -> None:
    kinds = getattr(decoder.owner.config, "layer_types", None) or ["attention"] * len(decoder.layers)
    counting = {kinds.index(kind) for kind in kinds}
    for group in groups:
        text = f"layers {group.first} to {group.first + group.size - 1}"
        if group.mode != "cqil" or group.bypass:
            got = f"mode {group.mode!r}" + (f", bypass {group.bypass}" if group.mode == "cqil" else "")
            raise ValueError(f"only groups of mode 'cqil' with bypass 0 spread over ranks: {text} have {got}")
        if group.size % ranks:
            raise ValueError(f"{text} are {group.size} members, which {ranks} ranks do not divide")
        first = counting & set(range(group.first, group.first + group.size))
        if first:
            raise ValueError(f"layer {min(first)} must be on every rank: it counts the tokens in the cache")


class Elsewhere(nn.Module):
    """In the place of a layer that another rank computes: hands its input on. It has the layer's plain attributes."""

    why_no_program = "another rank computes it"

    def __init__(self, layer: nn.Module, outputs: int) -> None:
        super().__init__()
        self.__dict__.update({name: value for name, value in own_state(layer).items() if name != "forward"})
        self.train(layer.training)
        self._outputs = outputs

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        """hidden_states, as the layer returns its own."""
        return (hidden_states, *[None] * (self._outputs - 1)) if self._outputs else hidden_states


class _Meeting:
    """Collects what this rank's members of one group add to their input; the last member's call sums over the ranks."""

    def __init__(self, ranks: Ranks, size: int) -> None:
        self._ranks, self._size = ranks, size
        self._added: Tensor | None = None

    def hook(self, index: int, layer: nn.Module) -> Any:
        """A forward hook for member ``index``: the others' input, or the group's output."""
        name = list(inspect.signature(type(layer).forward).parameters)[1]

        def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> Any:
            x = args[0] if args else kwargs[name]
            y = self.after(index, x, out[0] if isinstance(out, tuple) else out, isinstance(module, Elsewhere))
            return (y, *out[1:]) if isinstance(out, tuple) else y

        return after

    def after(self, index: int, x: Tensor, y: Tensor, elsewhere: bool) -> Tensor:
        """x for all members but the last, then the group's output; y: what member ``index`` gave for x."""
        if index == 0:
            self._added = torch.zeros(x.shape, dtype=torch.float32)
        added = cast("Tensor", self._added)
        if not elsewhere:
            added += y.float() - x.float()
        if index + 1 < self._size:
            return x
        self._added = None
        return (x.float() + self._ranks.sum(added)).to(x.dtype)


# ---- tensor parallel ------------------------------------------------------------------------------------------------

_HEAD_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "num_kv_heads")


def shard_tensors(
    model: nn.Module, process_group: dist.ProcessGroup | None = None, *, timeout_s: float = TIMEOUT_S
) -> nn.Module:
    """``y = sum over ranks of W[:, own] f(W'[own] x)`` in attention and MLP, one all-reduce after each.

    Of an optimised model, every rank keeps its share of the heads (rows of q, k, v, inputs of o) and of the MLP (rows
    of gate and up, inputs of down, cut between groups of weights): the same codes and scales as before. Embedding,
    norms and head stay whole. Layers then run as an operator per linear. Arguments, seeds and errors as in
    :func:`shard_groups`; a few tokens are computed before and after, to see that the model is still the same.

    Raises ValueError, on all ranks alike: the model is not optimised, a layer is of unknown structure or has fused
    linears, its heads or the groups of its weights do not divide among the ranks. Raises RuntimeError where the cut
    model computes something else.

    Source: Megatron-LM (Shoeybi et al., 2019).
    """
    ranks = _join(model, process_group, timeout_s)
    matches = match_layers(model)
    if not matches or not any(isinstance(module, PackedLinear) for module in model.modules()):
        raise ValueError("the model has no packed decoder layers to cut: torch_cpullm.optimize(model) first")
    for match in matches:
        reason = "it is in a CQIL group" if member_of(model.get_submodule(match.name)) else _uncut(match, ranks.size)
        if reason:
            raise ValueError(f"{match.name} cannot be cut among {ranks.size} ranks: {reason}")
    with torch.no_grad():
        want = _probe(model)
        remove_programs(model)
        for match in matches:
            _cut_layer(model.get_submodule(match.name), cast("LayerSpec", match.spec), ranks)
        got = _probe(model)
    model.__dict__["_cpullm_layers"] = {match.name: "it is cut among ranks" for match in matches}
    model.__dict__[_RANKS] = ranks
    model.__dict__["save_pretrained"] = _refuse_to_save
    if not float((got - want).abs().max()) <= 0.1 * float(want.abs().max()):  # INT8 activations round elsewhere
        raise RuntimeError(f"{type(model).__name__} computes something else when its layers are cut among ranks")
    return model


def _probe(model: nn.Module) -> Tensor:
    """The decoder's output for a few tokens."""
    owner = cast("Any", next(decoders(model)).owner)
    ids = torch.arange(1, 7)[None] % int(owner.config.vocab_size)
    return owner(ids, use_cache=False).last_hidden_state.float()


def _uncut(match: Match, ranks: int) -> str:
    """Why a layer cannot be cut; empty if it can."""
    spec = match.spec
    if spec is None:
        return match.reason
    norms = [norm for norm in (spec.q_norm, spec.k_norm) if norm is not None]
    if len(spec.qkv) != 3 or len(spec.up) != (2 if spec.gated else 1):
        return "its linears are fused (qkv, gate_up)"
    if spec.heads % ranks or spec.kv_heads % ranks:
        return f"its {spec.heads} heads, {spec.kv_heads} of keys and values, do not divide"
    if spec.sinks is not None or any(norm.gain.shape[0] != spec.head_dim for norm in norms):
        return "it has other parameters for each head"
    for name, linear in (("attention", spec.o), ("MLP", spec.down)):
        if linear.in_features % (ranks * linear.packed.group):
            return (
                f"{linear.in_features} inputs of its {name}'s output, in groups of {linear.packed.group}, do not divide"
            )
    return ""


def _cut_layer(layer: nn.Module, spec: LayerSpec, ranks: Ranks) -> None:
    """Keep this rank's share of a layer, in place."""

    def meet(_: nn.Module, __: tuple, out: Tensor) -> Tensor:
        return ranks.sum(out.float()).to(out.dtype)

    places = {module: path for path, module in layer.named_modules()}
    for linear in spec.linears():
        inward = linear is spec.o or linear is spec.down
        new = _part(linear, ranks, columns=inward)
        if inward:
            new.register_forward_hook(meet)
        path, _, name = places[linear].rpartition(".")
        setattr(layer.get_submodule(path), name, new)
    for module in layer.modules():
        for name in _HEAD_COUNTS:
            if module.__dict__.get(name) in (spec.heads, spec.kv_heads):
                setattr(module, name, module.__dict__[name] // ranks.size)


def _part(linear: PackedLinear, ranks: Ranks, *, columns: bool) -> PackedLinear:
    """This rank's rows or columns of a linear; a bias that is added to a sum is on rank 0."""
    whole = unpack(linear.packed)

    def cut(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.chunk(ranks.size, 1 if columns else 0)[ranks.rank].contiguous()

    codes, scales = cast("Tensor", cut(whole.codes)), cast("Tensor", cut(whole.scales))
    packed = pack(QuantizedWeight(codes, scales, cut(whole.zeros), whole.bits, whole.group_size))
    bias: Tensor | None = linear.bias
    if bias is not None and columns:
        bias = bias if ranks.rank == 0 else None
    elif bias is not None:
        bias = bias.chunk(ranks.size)[ranks.rank]
    new = PackedLinear(packed, bias, dtype=linear.dtype, compute=linear.compute)
    new.train(linear.training)
    return new


# ---- what an all-reduce costs ---------------------------------------------------------------------------------------


def all_reduce_seconds(width: int, *, rounds: int = 300) -> float:
    """Median seconds of an all-reduce of float32 [width] by two local processes over gloo, one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (folder, width, rounds)
        torch.multiprocessing.spawn(_time_all_reduce, arguments, nprocs=2)
        return float(json.loads(Path(folder, "seconds").read_text(encoding="ascii")))


def _time_all_reduce(rank: int, folder: str, width: int, rounds: int) -> None:
    torch.set_num_threads(1)
    where = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2, timeout=timedelta(seconds=30))
    x, spent = torch.zeros(width), []
    for _ in range(rounds):
        start = time.perf_counter()
        dist.all_reduce(x)
        spent.append(time.perf_counter() - start)
    if rank == 0:
        Path(folder, "seconds").write_text(json.dumps(sorted(spent)[rounds // 2]), encoding="ascii")
    dist.destroy_process_group()
