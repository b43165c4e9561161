"""CQIL: quasi-independent layers, found, grouped, bypassed and run as one.

Inputs of neighbouring layers in the middle of a model are nearly equal. A :class:`Plan` names groups of consecutive
layers that all read the input of the first: ``y = x + sum_l (a_l + m_l)``, see :func:`layer_group.combine`. It changes
what the model computes; :func:`search` finds where that costs least and refuses where it costs too much.

    plan = cqil.search(model, tokens, group=2, max_loss=0.03)
    cqil.apply(model, plan)       # before or after optimize(); saved with the model
    cqil.restore(model)           # the same bits as before

Source: CQIL (Zou et al., ACL 2024); Layer Parallelism (2502.02790) for mode "lp".
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor, nn

from .layer import LayerProgram, install_programs, remove_programs
from .layer_group import MODES, Halves, LayerGroup, install_groups, member_of, remove_groups, split
from .layer_match import Decoder, decoders
from .layer_parts import ROLE_OF, NoMatchError, read_norm
from .linear import PackedLinear

CONFIG = "cpullm_cqil"
"""The attribute of a model's config that holds its plan, and so the key in config.json."""


@dataclass(frozen=True)
class Plan:
    """Which layers run together. groups: (first layer, size) each, ascending, apart from each other.

    mode: ``"cqil"``: every MLP reads the input, its own attention and that of the ``bypass`` members before it;
    ``"lp"``: the attention of all members; baselines: ``"skip"`` drops these layers, ``"skip_attention"`` their
    attention. architecture, layers, hidden: of the model that it is for (``model_type``, layer count, width).

    Raises ValueError naming the field that is wrong.
    """

    groups: tuple[tuple[int, int], ...]
    architecture: str
    layers: int
    hidden: int
    mode: str = "cqil"
    bypass: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        for name in ("layers", "hidden"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)!r}")
        if not isinstance(self.architecture, str) or not self.architecture:
            raise ValueError(f"architecture must be a model_type, got {self.architecture!r}")
        groups, end = self.groups, 0
        if not isinstance(groups, (tuple, list)) or not groups:
            raise ValueError(f"groups must be pairs (first layer, size), got {groups!r}")
        for pair in groups:
            if not isinstance(pair, (tuple, list)) or len(pair) != 2 or any(type(v) is not int for v in pair):
                raise ValueError(f"groups must be pairs (first layer, size), got {pair!r}")
            first, size = pair
            if size < 1 or first < 0 or first + size > self.layers:
                raise ValueError(f"group {tuple(pair)} does not lie in layers 0 to {self.layers - 1}")
            if first < end:
                raise ValueError(f"groups must be ascending and must not overlap: layer {first} comes twice or late")
            end = first + size
        object.__setattr__(self, "groups", tuple((first, size) for first, size in groups))
        smallest = min(size for _, size in self.groups)
        if type(self.bypass) is not int or self.bypass < 0 or (self.bypass and self.mode != "cqil"):
            raise ValueError(f"bypass must be 0, or a positive distance in mode 'cqil', got {self.bypass!r}")
        if self.bypass >= smallest:
            raise ValueError(f"bypass must be less than the members of a group, {smallest}, got {self.bypass}")

    @staticmethod
    def of(model: nn.Module, groups: Any, mode: str = "cqil", bypass: int = 0) -> Plan:
        """A plan for ``model``. Raises ValueError: see :class:`Plan`, or the model has no known decoder."""
        decoder = _decoder(model)
        return Plan(groups, *_fingerprint(decoder), mode=mode, bypass=bypass)

    @property
    def reduction(self) -> float:
        """Share of the layers' time that is saved where members run at once, each on a device of its own."""
        saved = sum(size - (self.mode in ("cqil", "lp")) for _, size in self.groups)
        return saved / self.layers if self.mode != "skip_attention" else math.nan

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON has them."""
        return {**asdict(self), "groups": [list(pair) for pair in self.groups]}

    @staticmethod
    def from_dict(values: Any) -> Plan:
        """The plan of these fields. Raises ValueError for missing, unknown or wrong ones."""
        names = {field.name for field in fields(Plan)}
        if not isinstance(values, dict) or not {"groups", "architecture", "layers", "hidden"} <= set(values) <= names:
            raise ValueError(f"a CQIL plan has the fields {', '.join(sorted(names))}, got {_shown(values)}")
        return Plan(**values)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self.to_dict())

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read :meth:`to_json`. Raises ValueError: not JSON, or as :meth:`from_dict`."""
        return Plan.from_dict(json.loads(text))


def _shown(values: Any) -> str:
    return ", ".join(sorted(map(str, values))) if isinstance(values, dict) else repr(values)[:80]


# ---- apply and restore ----------------------------------------------------------------------------------------------


def apply(model: nn.Module, plan: Plan | None = None) -> nn.Module:
    """Let ``model`` compute as ``plan`` says, in place; None: the plan in its config, of a saved model.

    Works on float models and on optimised ones, where a group runs as one operator if all its members do; another plan
    on the model is replaced. Weights, state dict and cache stay as they are. The plan is noted in the config and is
    saved by ``save_pretrained``; loading an optimised model applies it. Returns ``model``.

    Raises TypeError or ValueError, and changes nothing: the plan is for another model (architecture, layer count,
    width), its layers do not split into attention and MLP, bypass or "lp" on layers whose MLP does not read their
    attention (parallel residual), a baseline that leaves a kind of layer without its first cache.
    """
    decoder = _decoder(model)
    if plan is None:
        plan = saved_plan(model)
        if plan is None:
            raise ValueError(f"the model's config holds no plan ({CONFIG}): pass one")
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a cqil.Plan, got {type(plan).__name__}")
    _check_fits(decoder, plan)
    with _taken_apart(model, decoder) as groups:
        groups[:] = _groups(decoder, plan)  # as they were where this raises
    setattr(decoder.owner.config, CONFIG, plan.to_dict())
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`apply`: the same modules, the same bits. Returns ``model``; one without groups stays as it is."""
    decoder = _decoder(model)
    with _taken_apart(model, decoder) as groups:
        groups.clear()
    vars(decoder.owner.config).pop(CONFIG, None)
    return model


def saved_plan(model: nn.Module) -> Plan | None:
    """The plan in the config of ``model``. Raises ValueError for one that is damaged."""
    found = [d for d in decoders(model) if getattr(d.owner.config, CONFIG, None) is not None]
    return Plan.from_dict(getattr(found[0].owner.config, CONFIG)) if found else None


@contextlib.contextmanager
def ungrouped(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` computes without its groups: the teacher of a repair, and the reference of a measurement."""
    decoder = _decoder(model)
    with _taken_apart(model, decoder):
        yield


@contextlib.contextmanager
def _taken_apart(model: nn.Module, decoder: Decoder) -> Iterator[list[LayerGroup]]:
    """Inside no layer is grouped and none is a program. Yields the groups that come back, for the caller to change."""
    members = [member for layer in decoder.layers if (member := member_of(layer)) is not None]
    groups = [member.group for member in members if member.index == 0]
    if any(group.ranks is not None for group in groups):
        raise ValueError("the model's groups are spread over ranks, for good: load it again")
    programs = "_cpullm_layers" in model.__dict__
    if programs:
        remove_programs(model)
    remove_groups(decoder.layers)
    try:
        yield groups
    finally:
        remove_groups(decoder.layers)
        install_groups(groups)
        if programs:
            install_programs(model)


def _decoder(model: nn.Module) -> Decoder:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = list(decoders(model))
    if len(found) != 1:
        raise ValueError(f"model must have one stack of decoder layers, {type(model).__name__} has {len(found)}")
    return found[0]


def _fingerprint(decoder: Decoder) -> tuple[str, int, int]:
    config = cast("Any", decoder.owner.config)
    return config.model_type, len(decoder.layers), int(config.hidden_size)


def _check_fits(decoder: Decoder, plan: Plan) -> None:
    want = (plan.architecture, plan.layers, plan.hidden)
    for name, planned, own in zip(("architecture", "layers", "hidden"), want, _fingerprint(decoder), strict=True):
        if planned != own:
            raise ValueError(f"the plan is for another model: {name} is {planned!r} there and {own!r} here")
    for index in _planned(plan):
        layer = decoder.layers[index]
        ours = isinstance(layer.__dict__.get("forward"), LayerProgram) or member_of(layer) is not None
        if "forward" in layer.__dict__ and not ours:
            raise ValueError(f"layer {index} cannot be grouped: its forward was replaced on the instance")
    if plan.mode.startswith("skip"):
        kinds = getattr(decoder.owner.config, "layer_types", None) or ["attention"] * plan.layers
        needed = {kinds.index(kind): kind for kind in kinds}
        for index in _planned(plan):
            if index in needed:
                raise ValueError(f"layer {index} cannot be skipped: the first of its kind counts the cache's tokens")


def _planned(plan: Plan) -> list[int]:
    """The layers of all groups."""
    return [index for first, size in plan.groups for index in range(first, first + size)]


def _groups(decoder: Decoder, plan: Plan) -> list[LayerGroup]:
    """The groups of a plan for layers that are not grouped; ValueError where a layer cannot be a member."""
    halves = _halves(decoder, _planned(plan))
    parallel = next((index for index, half in halves.items() if half.parallel), None)
    if parallel is not None and (plan.bypass or plan.mode == "lp"):
        raise ValueError(
            f"layer {parallel} computes attention and MLP from one input: its MLP reads no attention, "
            "so only mode 'cqil' with bypass 0 makes sense"
        )
    return [
        LayerGroup(decoder.layers, first, tuple(halves[i] for i in range(first, first + size)), plan.mode, plan.bypass)
        for first, size in plan.groups
    ]


def _halves(decoder: Decoder, indices: list[int]) -> dict[int, Halves]:
    """How these layers split, tried out on a few tokens."""
    owner, seen = cast("Any", decoder.owner), cast("dict[int, tuple]", {})
    handles = [
        decoder.layers[index].register_forward_hook(
            lambda _, args, kwargs, y, index=index: seen.update({index: (args, kwargs, y)}), with_kwargs=True
        )
        for index in indices
    ]
    training = [module for module in owner.modules() if module.training]
    owner.eval()
    try:
        with torch.no_grad():
            device = next((p.device for p in owner.parameters()), torch.device("cpu"))
            owner(torch.arange(1, 7, device=device)[None] % int(owner.config.vocab_size), use_cache=False)
            return {index: _split(decoder, index, *seen[index]) for index in indices}
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True


def _split(decoder: Decoder, index: int, args: tuple, kwargs: dict[str, Any], y: Any) -> Halves:
    layer = decoder.layers[index]
    names = tuple(inspect.signature(type(layer).forward).parameters)[1:]
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    x = named.pop(names[0])
    try:
        return split(layer, x, named, y)
    except NoMatchError as error:
        raise ValueError(f"layer {index} ({type(layer).__name__}) cannot be grouped: {error}") from None


# ---- what it costs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """perplexity of the grouped model, reference: of the model without groups, kl: mean KL(reference || grouped), nats
    per token.
    """

    perplexity: float
    reference: float
    kl: float

    @property
    def loss(self) -> float:
        """The larger of the relative rise of the perplexity and the KL."""
        return max(self.perplexity / self.reference - 1, self.kl)

    def __str__(self) -> str:
        return f"perplexity {self.perplexity / self.reference - 1:+.1%}, KL {self.kl:.4f}"


def measure(model: nn.Module, plans: list[Plan], tokens: Tensor) -> list[Cost]:
    """What each plan costs on ``tokens``, int64 [s] or [n, s]; the model is left as it was."""
    decoder, tokens = _decoder(model), _checked(tokens)
    for plan in plans:
        _check_fits(decoder, plan)
    with _taken_apart(model, decoder), torch.no_grad():
        reference = _log_probabilities(model, tokens)
        return [_measured(model, decoder, plan, tokens, reference) for plan in plans]


def _measured(model: nn.Module, decoder: Decoder, plan: Plan, tokens: Tensor, reference: list[Tensor]) -> Cost:
    install_groups(_groups(decoder, plan))
    try:
        nll = own = kl = 0.0
        for ids, theirs, mine in zip(tokens, reference, _log_probabilities(model, tokens), strict=True):
            own += float(nn.functional.nll_loss(mine[:-1], ids[1:]))
            nll += float(nn.functional.nll_loss(theirs[:-1], ids[1:]))
            kl += float(nn.functional.kl_div(mine, theirs, log_target=True, reduction="sum")) / len(ids)
    finally:
        remove_groups(decoder.layers)
    count = len(tokens)
    return Cost(math.exp(own / count), math.exp(nll / count), max(0.0, kl / count))


def _checked(tokens: Any) -> Tensor:
    """Tokens as [n, s]."""
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64 or tokens.dim() not in (1, 2):
        got = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"tokens must be int64 [s] or [n, s], got {got}")
    tokens = tokens[None] if tokens.dim() == 1 else tokens
    if not len(tokens) or tokens.shape[1] < 2:
        raise ValueError(f"tokens must hold sequences of at least two tokens, got {list(tokens.shape)}")
    return tokens


def _log_probabilities(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    return [model(ids[None], use_cache=False).logits[0].float().log_softmax(-1) for ids in tokens]


# ---- search ---------------------------------------------------------------------------------------------------------


def search(
    model: nn.Module,
    tokens: Tensor,
    group: int = 2,
    max_loss: float = 0.03,
    *,
    mode: str = "cqil",
    bypass: int = 0,
    groups: int | None = None,
    tries: int = 3,
) -> Plan:
    """The window of consecutive groups that saves most within ``max_loss``: a plan for :func:`apply`.

    Windows of ``group``-sized groups, first and last layer left out, are ranked by the cosine of the inputs of each
    group's first and last member (the least over its groups). The ``tries`` best of each length are measured:
    perplexity and KL of the grouped model on ``tokens`` (int64 [s] or [n, s]; text that is not used to judge the
    result later). Lengths grow until none of them stays within max_loss. groups: this number of groups, instead of as
    many as go. ``model`` is left as it was.

    Raises ValueError for wrong arguments, and where no window stays within max_loss.
    """
    decoder, tokens = _decoder(model), _checked(tokens)
    count = len(decoder.layers)
    for name, value, least in (("group", group, 2), ("groups", groups, 1), ("tries", tries, 1)):
        if value is not None and (type(value) is not int or value < least):
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    if not max_loss > 0:
        raise ValueError(f"max_loss must be positive, got {max_loss}")
    most = (count - 2) // group
    if most < (groups or 1):
        raise ValueError(f"{count} layers, the first and the last left out, hold no {groups or 1} groups of {group}")
    if mode not in ("cqil", "lp"):
        raise ValueError(f"mode must be 'cqil' or 'lp', got {mode!r}; baseline() makes the other plans")
    best: tuple[Cost, Plan] | None = None
    with _taken_apart(model, decoder), torch.no_grad():
        similar = _similarities(model, decoder, tokens, group)
        reference = _log_probabilities(model, tokens)
        for length in range(1, most + 1) if groups is None else (groups,):
            starts = range(1, count - group * length)
            ranked = sorted(starts, key=lambda s: -min(similar[s + group * i] for i in range(length)))
            plans = [Plan.of(model, [(s + group * i, group) for i in range(length)], mode, bypass) for s in ranked]
            made = [(_measured(model, decoder, plan, tokens, reference), plan) for plan in plans[:tries]]
            cost, plan = min(made, key=lambda each: each[0].loss)
            if cost.loss > max_loss:
                best = best or (cost, plan)
                break
            best = cost, plan
    assert best is not None
    if best[0].loss > max_loss:
        first, size = best[1].groups[0][0], group * len(best[1].groups)
        raise ValueError(
            f"no window of groups of {group} stays within max_loss {max_loss:g}: the best, layers {first} to "
            f"{first + size - 1}, has {best[0]}"
        )
    return best[1]


def _similarities(model: nn.Module, decoder: Decoder, tokens: Tensor, group: int) -> list[float]:
    """Mean cosine of the inputs of layers i and i + group - 1 for every i that has them."""
    inputs: list[Tensor] = []

    def note(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in decoder.layers]
    total = torch.zeros(len(decoder.layers) - group + 1, dtype=torch.float64)
    try:
        for ids in tokens:
            inputs.clear()
            model(ids[None], use_cache=False)
            for i in range(len(total)):
                first, last = inputs[i].float(), inputs[i + group - 1].float()
                total[i] += nn.functional.cosine_similarity(first, last, dim=-1).mean().item()
    finally:
        for handle in handles:
            handle.remove()
    return (total / len(tokens)).tolist()


def baseline(model: nn.Module, mode: str, layers: int) -> Plan:
    """A plan that skips ``layers`` layers evenly ("skip"), or the attention of the last ones ("skip_attention").

    What grouping is to be compared with. Raises ValueError for another mode or a number that does not fit.
    """
    count = len(_decoder(model).layers)
    if mode not in ("skip", "skip_attention"):
        raise ValueError(f"mode must be 'skip' or 'skip_attention', got {mode!r}")
    if type(layers) is not int or not 1 <= layers <= count - 2:
        raise ValueError(f"layers must be between 1 and {count - 2}, got {layers!r}")
    if mode == "skip_attention":
        return Plan.of(model, [(count - layers, layers)], mode)
    step = (count - 2) / layers
    return Plan.of(model, [(1 + int(step * i + step / 2), 1) for i in range(layers)], mode)


# ---- folding --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fold_norms(model: nn.Module, plan: Plan) -> int:
    """Multiply the gains of norms that members share a normalised input by into the linears behind, in place.

    After it the members of a group have equal norms, so that their program normalises and quantises their input once.
    To be done on the float model, before ``optimize()``: the same function within rounding, and quantised weights that
    differ a little. It stays when :func:`restore` takes the groups apart. Norms with a bias, and linears that are no
    nn.Linear, stay as they are. Returns how many norms were folded. Raises ValueError as :func:`apply`, and for packed
    weights.
    """
    decoder = _decoder(model)
    _check_fits(decoder, plan)
    if any(isinstance(module, PackedLinear) for module in decoder.layers.modules()):
        raise ValueError("norms can be folded into float weights only: fold before optimize()")
    with _taken_apart(model, decoder):
        halves = _halves(decoder, _planned(plan))
    return sum(_fold(decoder.layers[index], half, plan) for index, half in halves.items())


def _fold(layer: nn.Module, half: Halves, plan: Plan) -> int:
    norms, folded = dict(half.norms), 0
    attention, mlp = ("q", "k", "v", "qkv"), ("gate", "up", "gate_up")
    shared = half.parallel and "mlp" not in norms
    behind = {"input": attention + (mlp if shared else ())}
    if half.parallel or plan.mode == "lp":
        behind["mlp"] = mlp
    for role, kinds in behind.items():
        if role not in norms:
            continue
        norm = getattr(layer, norms[role])
        _, _, known = read_norm(norms[role], norm)
        linears = [module for path, module in layer.named_modules() if ROLE_OF.get(path.rpartition(".")[2]) in kinds]
        if known.bias is not None or not isinstance(norm.weight, Tensor):
            continue
        if not linears or any(type(linear) is not nn.Linear for linear in linears):
            continue
        for linear in linears:
            linear.weight.copy_((linear.weight.float() * known.gain).to(linear.weight.dtype))
        norm.weight.copy_(1 - (known.gain - norm.weight.float()).round())  # one, or zero where the norm adds one itself
        folded += 1
    return folded
