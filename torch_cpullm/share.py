"""One rank's share of decoder layers: which rows, or inputs, of their linears, and the linears of those.

A share of the heads is rows of q, k and v and inputs of o; one of the MLP is rows of gate and up and inputs of down,
cut between groups of weights. So every rank has the codes and scales that the whole model has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from .layer_match import decoders
from .layer_parts import ROLE_OF
from .linear import PackedLinear
from .packing import PackedWeight, pack, resolve_group, unpack

_HEAD_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "num_kv_heads")
_EVERYTHING = slice(None)


class Share(NamedTuple):
    """Share ``rank`` of ``size``."""

    rank: int
    size: int

    def even(self, count: int) -> slice:
        """This share of ``count`` things."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)


class SummedLinear(PackedLinear):
    """``y = sum over ranks of x W^T + bias``; W, x: this rank's inputs. What a layer without a program calls.

    partial: y is this rank's summand; the sum of a CQIL group has it.
    """

    ranks: Any
    partial = False

    def forward(self, x: Tensor) -> Tensor:
        """x [.., in_features] -> [.., out_features] of x's dtype, the same bits on all ranks."""
        y = super().forward(x)
        return y if self.partial else self.ranks.sum(y.float()).to(x.dtype)


class Cut(NamedTuple):
    """Rows or inputs of a linear that a rank keeps, which begin and end a group of ``group`` inputs."""

    rows: slice = _EVERYTHING
    inputs: slice = _EVERYTHING
    group: int = 1
    has_bias: bool = True

    @property
    def kind(self) -> type[PackedLinear]:
        """The class of the linear."""
        return PackedLinear if self.inputs == _EVERYTHING else SummedLinear

    def of(self, weight: PackedWeight) -> PackedWeight:
        """This part of a packed weight."""
        whole, groups = unpack(weight), self.inputs
        if self.inputs != _EVERYTHING:
            groups = slice(self.inputs.start // self.group, -(-self.inputs.stop // self.group))
        zeros = None if whole.zeros is None else whole.zeros[self.rows, groups]
        codes, scales = whole.codes[self.rows, self.inputs], whole.scales[self.rows, groups]
        return pack(replace(whole, codes=codes, scales=scales, zeros=zeros))

    def bias(self, bias: Tensor | None) -> Tensor | None:
        """This part of a bias; one that is added to a sum is on one rank."""
        return None if bias is None or not self.has_bias else bias[self.rows]


class Linear(NamedTuple):
    """What cutting asks of a linear. group: inputs of a group of weights."""

    outputs: int
    inputs: int
    group: int


def cut_layer(linears: Mapping[str, Linear], heads: int, kv_heads: int, share: Share) -> dict[str, Cut]:
    """Role (see :data:`layer_parts.ROLE_OF`) -> cut of the linears of one layer. ValueError: it cannot be cut."""
    roles = set(linears)
    if roles - {"gate"} != {"q", "k", "v", "o", "up", "down"}:
        fused = roles & {"qkv", "gate_up"} or ("up" in roles and "gate" not in roles and "q" not in roles)
        raise ValueError("its linears are fused (qkv, gate_up)" if fused else "its linears have other roles")
    if heads % share.size or kv_heads % share.size:
        raise ValueError(f"its {heads} heads, {kv_heads} of keys and values, do not divide")
    o, down = linears["o"], linears["down"]
    if o.inputs % (share.size * o.group):
        raise ValueError(f"{o.inputs} inputs of its attention's output, in groups of {o.group}, do not divide")
    groups = -(-down.inputs // down.group)
    if groups < share.size:
        raise ValueError(f"{down.inputs} inputs of its MLP's output are fewer than {share.size} groups of {down.group}")
    own = share.even(groups)  # the last one may be short
    inner = slice(own.start * down.group, min(own.stop * down.group, down.inputs))
    first = share.rank == 0
    cuts = {role: Cut(rows=share.even(linears[role].outputs)) for role in ("q", "k", "v")}
    cuts |= {role: Cut(rows=inner) for role in roles & {"gate", "up"}}
    cuts["o"] = Cut(inputs=share.even(o.inputs), group=o.group, has_bias=first)
    return cuts | {"down": Cut(inputs=inner, group=down.group, has_bias=first)}


def share_heads(layer: nn.Module, heads: int, kv_heads: int, share: Share) -> None:
    """Let the modules of a layer count this share's heads."""
    for module in layer.modules():
        for name in _HEAD_COUNTS:
            if module.__dict__.get(name) in (heads, kv_heads):
                setattr(module, name, module.__dict__[name] // share.size)


def cut_targets(model: nn.Module, targets: Sequence[Any], forms: Mapping[str, Any], share: Share) -> None:
    """Let every linear in the decoder layers of a model, which may be on meta, become its share when it is packed.

    targets: :class:`plan.Target`, which get a ``cut``; forms: how a checkpoint has weights, by name, where it has them
    packed. The layers count this share's heads from here on. ValueError names the layer that cannot be cut.
    """
    linears: dict[str, Linear] = {}
    for target in targets:
        if target.kind == "linear":
            n, k = target.shape(target.parameters["weight"])
            form = forms.get(f"{target.name}.weight", target.recipe)
            linears[target.name] = Linear(n, k, resolve_group(form.group_size, k))
    cuts: dict[str, Cut] = {}
    for decoder in decoders(model):
        for index, layer in enumerate(decoder.layers):
            name = f"{decoder.name}.{index}"
            inside = [path for path, module in layer.named_modules() if _is_linear(module)]
            roles = {ROLE_OF.get(path.rpartition(".")[2], path): f"{name}.{path}" for path in inside}
            heads, kv_heads = _heads(decoder.owner.config)
            try:
                missing = [path for path in roles.values() if path not in linears]
                if missing or len(roles) < len(inside):
                    raise ValueError(f"its linear {min(missing or inside)} is not packed, or has no role of its own")
                own = cut_layer({role: linears[path] for role, path in roles.items()}, heads, kv_heads, share)
            except ValueError as error:
                raise ValueError(f"{name} cannot be cut among {share.size} ranks: {error}") from None
            cuts.update({roles[role]: cut for role, cut in own.items()})
            share_heads(layer, heads, kv_heads, share)
    if not cuts:
        raise ValueError(f"{type(model).__name__} has no decoder layers to cut")
    for target in targets:
        target.cut = cuts.get(target.name)


def summed_linears(model: nn.Module) -> Iterable[SummedLinear]:
    """The linears of a model whose outputs are sums over ranks."""
    return (module for module in model.modules() if isinstance(module, SummedLinear))


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is a matrix that a token is multiplied by: also transformers' Conv1D, or an expert's."""
    weights = [parameter for parameter in module.parameters(recurse=False) if parameter.dim() > 1]
    return bool(weights) or isinstance(module, nn.Linear) or "weight" in module.__dict__


def _heads(config: Any) -> tuple[int, int]:
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    return heads, int(getattr(config, "num_key_value_heads", None) or heads)
