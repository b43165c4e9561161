"""One model on several ranks of torch.distributed: members of CQIL groups on a rank each, every layer cut, or both.

    cpullm run --nproc 2 tutorials/ranks.py ./model

Every rank runs the same program on the same inputs, and gets the same tokens; or after :func:`follow` rank 0 runs it
alone. Sums go through gloo, or on one host through shared memory.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import __version__
from .collective import TIMEOUT_S, TRANSPORTS, LostRankError, Ranks, meet
from .layer import install_programs, remove_programs
from .layer_group import Elsewhere, LayerGroup, install_groups, member_of, remove_groups
from .layer_match import Decoder, Match, decoders, match_layer, match_layers
from .layer_spec import LayerSpec
from .linear import PackedLinear, gather
from .share import Cut, Linear, Share, SummedLinear, cut_layer, share_heads, summed_linears

logger = logging.getLogger("torch_cpullm")

_TOLD = "_cpullm_told"  # attribute of an error that the other ranks know
_RANKS = "_cpullm_ranks"  # attribute of a model: its Ranks
_LEADER = "_cpullm_leader"  # attribute of a model on rank 0: what sends its calls to the others


def transport(model: nn.Module) -> str:
    """What the sums of a sharded model's decode steps go through: "gloo" or "shared memory"."""
    return ranks_of(model).transport


def traffic(model: nn.Module) -> tuple[int, int]:
    """(all-reduces, bytes put into them) of this rank since ``model`` was sharded; ValueError for one that is not."""
    ranks = ranks_of(model)
    own = [ranks] if ranks.team is None else [ranks, ranks.team]
    return sum(each.all_reduces for each in own), sum(each.bytes for each in own)


def all_reduce_seconds(model: nn.Module, width: int) -> float:
    """Median seconds of a sum of float32 [width] over the ranks of a sharded model, which all ask for it."""
    ranks = ranks_of(model)
    before = ranks.all_reduces, ranks.bytes
    seconds = ranks.seconds_of(torch.zeros(width), 300)
    ranks.all_reduces, ranks.bytes = before
    return seconds


def ranks_of(model: nn.Module) -> Ranks:
    """The ranks that share a model; ValueError for one that is not sharded."""
    found = model.__dict__.get(_RANKS)
    if not isinstance(found, Ranks):
        raise ValueError("the model is not sharded: shard_groups() or shard_tensors()")
    return found


def _join(
    model: nn.Module, group: dist.ProcessGroup | None, timeout_s: float, transport: str, *, whole: bool = True
) -> Ranks:
    """The ranks, after they have seen that they run the same packages and have (a share of) the same model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if _RANKS in model.__dict__:
        raise ValueError("the model is sharded already")
    if transport not in TRANSPORTS:
        raise ValueError(f"transport must be one of {', '.join(TRANSPORTS)}, got {transport!r}")
    ranks = Ranks(group, timeout_s)
    transformers = importlib.metadata.version("transformers")
    versions = f"torch_cpullm {__version__}, torch {torch.__version__}, transformers {transformers}"
    ranks.check_alike("the packages", versions)
    ranks.check_alike("the model", f"{type(model).__name__} {_fingerprint(model, whole)}")
    ranks.use(transport, int(getattr(getattr(model, "config", None), "hidden_size", 1)))
    return ranks


def _fingerprint(model: nn.Module, whole: bool) -> str:
    """Digest of the config, the plan in it, and of a whole model the names and shapes of all parameters."""
    config = getattr(model, "config", None)
    texts = ["" if config is None else config.to_json_string(use_diff=False), str(vars(model).get("_cpullm_settings"))]
    texts += [f"{name} {list(p.shape)} {p.dtype}" for name, p in model.named_parameters() if whole]
    texts += [f"{name} {type(module).__name__}" for name, module in model.named_modules()]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def follow(model: nn.Module) -> None:
    """Let rank 0 alone run the program: on the other ranks this returns when rank 0 leaves, on rank 0 at once.

    From here on every call of a sharded ``model``'s decoder on rank 0, by ``generate()``, a pipeline or by hand, is
    repeated by the other ranks, which so need no input, tokenizer or seed. They leave after :func:`leave`, or when the
    program of rank 0 ends, by an exception too::

        distributed.shard_tensors(model)
        distributed.follow(model)
        if dist.get_rank() == 0:
            print(pipeline("text-generation", model=model, tokenizer=tokenizer)("Hello"))

    Raises ValueError for a model that is not sharded or leads already, and on all ranks
    :class:`collective.LostRankError` within the timeout that it was sharded with when another rank is killed or stops.
    """
    from .following import Leader, repeat_calls

    ranks = ranks_of(model)
    decoder = next(decoders(model)).owner
    if _LEADER in model.__dict__:
        raise ValueError("the other ranks follow this model already")
    if ranks.rank == 0:
        model.__dict__[_LEADER] = Leader(decoder, ranks)
    else:
        repeat_calls(decoder, ranks)


def leave(model: nn.Module) -> None:
    """Let the ranks that follow this model on rank 0 go; it cannot be called any more."""
    leader = model.__dict__.get(_LEADER)
    if leader is None:
        raise ValueError("nobody follows this model: torch_cpullm.distributed.follow(model), on all ranks")
    leader.end()


# ---- CQIL groups ----------------------------------------------------------------------------------------------------


def shard_groups(
    model: nn.Module,
    process_group: dist.ProcessGroup | None = None,
    *,
    timeout_s: float = TIMEOUT_S,
    transport: str = "auto",
    tp_size: int = 1,
) -> nn.Module:
    """``y = x + sum over ranks of sum over own l of (layer_l(x) - x)`` for every CQIL group, one all-reduce each.

    Of p ranks, rank r keeps members r, r + p, ... of every group, their weights and their slots in the cache; layers
    outside the groups run on every rank. To be called on every rank, on the same model, float or optimised, after
    :func:`torch_cpullm.cqil.apply`; in place, and for good. Returns ``model``. process_group: None: the default one.
    timeout_s: how long a rank waits for the others before every call of the model ends in a RuntimeError. transport:
    "gloo", "shared memory" (ranks of one host; sums of up to 256 KiB), or "auto": whichever was faster when tried out.

    tp_size: t neighbouring ranks are a team, p / t teams share the members, and a team cuts its own as
    :func:`shard_tensors` does; of an optimised model. Every member costs one all-reduce over its team more, of
    attention's output (two with a norm behind the MLP, none if attention and MLP read the same). Layers outside the
    groups are cut among all ranks, or where heads or groups of weights do not divide, among each team.

    Sums are in float32. Ranks that sample must do so from equal seeds.

    Raises ValueError, on all ranks alike: no groups, a mode that exchanges attention between members ("lp", or a
    bypass), members that do not divide among the ranks or teams, layers that do not divide among a team, a group with
    the first layer of its kind (its slot in the cache counts the tokens), different models, plans or package versions
    on the ranks. Raises RuntimeError where torch.distributed is not initialised, or a rank is missing.

    Source: CQIL (Zou et al., ACL 2024), which spreads layers over GPUs in this way.
    """
    ranks = _join(model, process_group, timeout_s, transport)
    decoder, groups = _groups(model)
    if type(tp_size) is not int or tp_size < 1 or ranks.size % tp_size:
        raise ValueError(f"tp_size must be a number of ranks that divides all {ranks.size}, got {tp_size!r}")
    _check(decoder, groups, ranks.size, ranks.size // tp_size)
    if tp_size == 1:
        return _spread(model, decoder, groups, ranks)
    cuts = _cuts_of_teams(model, decoder, groups, ranks.size, tp_size)
    ranks.divide(tp_size).use(transport, int(cast("Any", decoder.owner.config).hidden_size))
    with _computing_the_same(model):
        return _spread(model, decoder, groups, ranks, cuts)


def _spread(
    model: nn.Module,
    decoder: Decoder,
    groups: list[LayerGroup],
    ranks: Ranks,
    cuts: list[tuple[LayerSpec, int]] | None = None,
) -> nn.Module:
    """Keep this rank's members of the groups. cuts: of every layer (spec, among how many ranks), None: whole."""
    layers, programs = decoder.layers, "_cpullm_layers" in model.__dict__
    remove_programs(model)
    remove_groups(layers)
    spread = [LayerGroup(layers, g.first, g.halves, g.mode, g.bypass, ranks) for g in groups]
    for group in spread:
        for index in set(range(group.size)) - set(group.here):
            layers[group.first + index] = Elsewhere(layers[group.first + index])
    members = {group.first + i for group in spread for i in group.here}
    for index, (spec, size) in enumerate(cuts or ()):
        if not isinstance(layers[index], Elsewhere):
            among = ranks if size == ranks.size and index not in members else cast("Ranks", ranks.team)
            _cut_layer(layers[index], spec, among, member=index in members)
    install_groups(spread)
    gather(model)  # or one small weight that is left would keep the memory of all
    if programs:
        install_programs(model)
    _mark(model, ranks)
    return model


def _cuts_of_teams(
    model: nn.Module, decoder: Decoder, groups: list[LayerGroup], ranks: int, tp_size: int
) -> list[tuple[LayerSpec, int]]:
    """(spec, among how many ranks it is cut) of every layer: of members the team, of others all if that is possible."""
    members = {group.first + i for group in groups for i in range(group.size)}
    found: list[tuple[LayerSpec, int]] = []
    _check_packed(model)
    for index in range(len(decoder.layers)):
        match = match_layer(decoder, index)
        reasons = {size: _uncut(match, size) for size in ([tp_size] if index in members else [ranks, tp_size])}
        size = next((size for size, reason in reasons.items() if not reason), None)
        if size is None:
            raise ValueError(f"{match.name} cannot be cut among {tp_size} ranks: {reasons[tp_size]}")
        found.append((cast("LayerSpec", match.spec), size))
    return found


def _mark(model: nn.Module, ranks: Ranks) -> None:
    """Let everybody see that a model has only this rank's share."""
    model.__dict__[_RANKS] = ranks
    model.__dict__["save_pretrained"] = _refuse_to_save
    for decoder in decoders(model):
        decoder.owner.register_forward_pre_hook(_check_cache, with_kwargs=True)


def _check_cache(decoder: nn.Module, _: Any, kwargs: dict[str, Any]) -> None:
    """ValueError for a cache that was made for all heads of a model whose layers are cut."""
    held = getattr(kwargs.get("past_key_values"), "layers", None) or ()
    if not held or hasattr(held[0], "reserve"):  # none, or a CpuLlmCache
        return
    keys = next((each.keys for each in held if isinstance(getattr(each, "keys", None), Tensor)), None)
    summed, config = next(iter(summed_linears(decoder)), None), cast("Any", decoder.config)
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    if summed is not None and keys is not None and keys.shape[1] == heads:
        raise ValueError(
            f"{type(kwargs['past_key_values']).__name__} has room for {heads} heads of keys, and this rank has a share "
            "of them: leave the cache to the model (no past_key_values, no cache_implementation)"
        )


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise RuntimeError("a sharded model holds only this rank's share of the weights: save it before")


def _groups(model: nn.Module) -> tuple[Decoder, list[LayerGroup]]:
    for decoder in decoders(model):
        members = [member for layer in decoder.layers if (member := member_of(layer)) is not None]
        if members:
            return decoder, [member.group for member in members if member.index == 0]
    raise ValueError("the model has no CQIL groups to spread over ranks: torch_cpullm.cqil.apply(model, plan) first")


def _check(decoder: Decoder, groups: list[LayerGroup], ranks: int, owners: int) -> None:
    kinds = getattr(decoder.owner.config, "layer_types", None) or ["attention"] * len(decoder.layers)
    counting = {kinds.index(kind) for kind in kinds}
    for group in groups:
        text = f"layers {group.first} to {group.first + group.size - 1}"
        if group.mode != "cqil" or group.bypass:
            got = f"mode {group.mode!r}" + (f", bypass {group.bypass}" if group.mode == "cqil" else "")
            raise ValueError(f"only groups of mode 'cqil' with bypass 0 spread over ranks: {text} have {got}")
        if group.size % owners:
            what = "ranks" if owners == ranks else f"teams of {ranks // owners} ranks"
            hint = (
                f"; tp_size={ranks // group.size} cuts each member among {ranks // group.size}"
                if ranks % group.size == 0
                else ""
            )
            raise ValueError(f"{text} are {group.size} members, which {owners} {what} do not divide{hint}")
        first = counting & set(range(group.first, group.first + group.size))
        if first:
            raise ValueError(f"layer {min(first)} must be on every rank: it counts the tokens in the cache")


# ---- tensor parallel ------------------------------------------------------------------------------------------------


def shard_tensors(
    model: nn.Module,
    process_group: dist.ProcessGroup | None = None,
    *,
    timeout_s: float = TIMEOUT_S,
    transport: str = "auto",
) -> nn.Module:
    """``y = sum over ranks of W[:, own] f(W'[own] x)`` in attention and MLP, one all-reduce after each.

    Of an optimised model, every rank keeps its share of the heads (rows of q, k, v, inputs of o) and of the MLP (rows
    of gate and up, inputs of down, cut between groups of weights): the same codes and scales as before. Embedding,
    norms and head stay whole. In shared memory a layer, or a decode step of all layers, is one operator that makes the
    sums itself; through gloo it is two, attention and MLP. Arguments, seeds and errors as in :func:`shard_groups`; a
    few tokens are computed before and after, to see that the model is still the same.

    Raises ValueError, on all ranks alike: the model is not optimised, a layer is of unknown structure or has fused
    linears, its heads or the groups of its weights do not divide among the ranks. Raises RuntimeError where the cut
    model computes something else.

    Source: Megatron-LM (Shoeybi et al., 2019).
    """
    ranks = _join(model, process_group, timeout_s, transport)
    matches = match_layers(model)
    _check_packed(model)
    for match in matches:
        reason = "it is in a CQIL group" if member_of(model.get_submodule(match.name)) else _uncut(match, ranks.size)
        if reason:
            raise ValueError(f"{match.name} cannot be cut among {ranks.size} ranks: {reason}")
    with _computing_the_same(model):
        remove_programs(model)
        for match in matches:
            _cut_layer(model.get_submodule(match.name), cast("LayerSpec", match.spec), ranks)
        gather(model)  # or one small weight that is left would keep the memory of all
        install_programs(model)
        _mark(model, ranks)
    return model


def _check_packed(model: nn.Module) -> None:
    if not list(decoders(model)) or not any(isinstance(module, PackedLinear) for module in model.modules()):
        raise ValueError("the model has no packed decoder layers to cut: torch_cpullm.optimize(model) first")


@contextmanager
def _computing_the_same(model: nn.Module) -> Iterator[None]:
    """RuntimeError where the model computes something else after what is done inside, which has no gradients."""
    with torch.no_grad():
        want = _probe(model)
        yield
        got = _probe(model)
    if not float((got - want).abs().max()) <= 0.1 * float(want.abs().max()):  # INT8 activations round elsewhere
        raise RuntimeError(f"{type(model).__name__} computes something else when its layers are cut among ranks")


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
    if any(linear.order is not None for linear in spec.linears()):
        return "the inputs of its linears are in an order of their own (desc_act)"
    if spec.sinks is not None or any(norm.gain.shape[0] != spec.head_dim for norm in norms):
        return "it has other parameters for each head"
    try:
        _cuts(spec, Share(0, ranks))
    except ValueError as error:
        return str(error)
    return ""


def _by_role(spec: LayerSpec) -> dict[str, PackedLinear]:
    """The linears of a layer whose linears are not fused."""
    return dict(zip(("q", "k", "v", "o", *("gate", "up")[-len(spec.up) :], "down"), spec.linears(), strict=True))


def _cuts(spec: LayerSpec, share: Share) -> dict[str, Cut]:
    linears = {r: Linear(each.out_features, each.in_features, each.packed.group) for r, each in _by_role(spec).items()}
    return cut_layer(linears, spec.heads, spec.kv_heads, share)


def _cut_layer(layer: nn.Module, spec: LayerSpec, ranks: Ranks, *, member: bool = False) -> None:
    """Keep this rank's share of a layer, in place. member: of a group, whose sum has what nobody reads before."""
    share, linears = Share(ranks.rank, ranks.size), _by_role(spec)
    places = {module: path for path, module in layer.named_modules()}
    for role, cut in _cuts(spec, share).items():
        linear = linears[role]
        new = cut.kind(cut.of(linear.packed), cut.bias(linear.bias), dtype=linear.dtype, compute=linear.compute)
        new.train(linear.training)
        if isinstance(new, SummedLinear):
            new.ranks = ranks
            new.partial = member and (spec.parallel if role == "o" else spec.post_mlp_norm is None)
        path, _, name = places[linear].rpartition(".")
        setattr(layer.get_submodule(path), name, new)
    share_heads(layer, spec.heads, spec.kv_heads, share)


# ---- loading --------------------------------------------------------------------------------------------------------


def expected_share(model_config: Any, *, grouped: bool, supported: bool) -> Share | None:
    """The share that the ``distributed_config`` of transformers asks this rank to load; None: the whole model.

    grouped: whether it has a CQIL plan; supported: whether this version of transformers lets a quantizer change its
    plan. Raises ValueError for anything but tensor parallel over all ranks by the model's own plan.
    """
    config = getattr(model_config, "distributed_config", None)
    sizes = ("tp_size", "pp_size", "fsdp_size", "dp_replicate_size", "ep_size")
    if config is None or all((getattr(config, name, None) or 1) == 1 for name in sizes):
        return None
    if not supported or not getattr(config, "tp_size", None):
        raise ValueError(
            "this version of transformers cuts models in a way of its own: load without distributed_config, then "
            "torch_cpullm.distributed.shard_tensors(model)"
        )
    if grouped:
        raise ValueError("a model with a CQIL plan is not cut while it loads: load it without distributed_config")
    for name in sizes[1:]:
        if (getattr(config, name, None) or 1) != 1:
            raise ValueError(f"packed weights are only cut for tensor parallel: {name} must be 1")
    if isinstance(getattr(config, "tp_plan", None), dict):
        raise ValueError("packed layers are cut by their structure: tp_plan must be None or 'auto', not rules")
    if not dist.is_initialized():
        raise ValueError(
            f"distributed_config asks for {config.tp_size} ranks, and torch.distributed is not initialised: cpullm run "
            "--nproc, or torchrun, starts them"
        )
    if dist.get_world_size() != config.tp_size:
        raise ValueError(f"tp_size must be the number of ranks, {dist.get_world_size()}, got {config.tp_size}")
    return Share(dist.get_rank(), config.tp_size)


def asks_for_shares(config: Any) -> bool:
    """Whether a ``distributed_config`` of transformers asks all ranks of torch.distributed to load shares."""
    size = getattr(config, "tp_size", None) or 1
    return size > 1 and dist.is_available() and dist.is_initialized() and dist.get_world_size() == size


@contextmanager
def failing_together(share: bool) -> Iterator[None]:
    """An error inside also ends the other ranks, which load their shares. share: whether there are any."""
    try:
        yield
    except Exception as error:
        causes = [error]
        while causes[-1].__cause__ is not None:
            causes.append(cast("Exception", causes[-1].__cause__))
        if share and not any(_TOLD in vars(each) or isinstance(each, LostRankError) for each in causes):
            vars(error)[_TOLD] = True
            try:
                meet(None, f"{type(error).__name__}: {error}")
            except (LostRankError, ValueError) as late:  # ValueError: a group that cannot be told
                logger.warning("%s", late)
        raise


def join_shares(model: nn.Module, *, timeout_s: float = TIMEOUT_S, transport: str = "auto") -> None:
    """Let a model of which every rank has loaded its share make its sums, before its programs are installed.

    Arguments and errors as of :func:`shard_groups`.
    """
    ranks = _join(model, None, timeout_s, transport, whole=False)
    for summed in summed_linears(model):
        summed.ranks = ranks
    _mark(model, ranks)


def check_shares(model: nn.Module) -> None:
    """ValueError where a layer that was cut when it was loaded is none that a program knows how to compute."""
    for name, reason in model.__dict__.get("_cpullm_layers", {}).items():
        if reason:
            raise ValueError(f"{name} cannot be cut among {ranks_of(model).size} ranks: {reason}")
