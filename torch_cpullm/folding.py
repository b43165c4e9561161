"""Scales of channels moved from a linear's inputs into the operation before, without changing what a layer computes.

    norm -> linears     all linears that read a norm's output: gain (and bias) / s
    v -> o              a value head's rows / s; query heads that share it share s
    up -> down          the rows that reach down multiplied by something that does not depend on them / s

Found by which module reads what and by names of roles, never by class; a fold is kept only if the layer still computes
the same, to 1e-4 of its largest change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .layer_parts import ROLE_OF

_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Fold:
    """source: name of the norm or linear that computes x / s; readers: names of the linears that read it.

    spread: int64 [k], the source's channel of each input, None for the same order.
    """

    source: str
    readers: tuple[str, ...]
    spread: Tensor | None = None


def matrix(module: nn.Module) -> Tensor:
    """The weight [n, k] of a linear or an embedding, a view where it is stored the other way round (Conv1D)."""
    weight = cast("Tensor", module.weight).detach()
    return weight if isinstance(module, (nn.Linear, nn.Embedding)) else weight.T


def find_folds(layer: nn.Module, linears: Sequence[str], sources: Mapping[str, str]) -> list[Fold]:
    """Folds that the structure of ``layer`` suggests. sources: linear -> the module whose output it read, if known."""
    folds: dict[str, list[str]] = {}
    for name in linears:
        source = sources.get(name)
        if source is not None and _is_norm(layer.get_submodule(source), matrix(layer.get_submodule(name)).shape[1]):
            folds.setdefault(source, []).append(name)
    found = [Fold(source, tuple(readers)) for source, readers in folds.items()]
    roles = {ROLE_OF.get(name.rpartition(".")[2], ""): name for name in linears}
    for source, reader in (("v", "o"), ("up", "down")):
        if source in roles and reader in roles:
            fold = _pair(layer, roles[source], roles[reader])
            if fold is not None:
                found.append(fold)
    return found


def _is_norm(module: nn.Module, width: int) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and list(weight.shape) == [width]


def _pair(layer: nn.Module, source: str, reader: str) -> Fold | None:
    rows, inputs = matrix(layer.get_submodule(source)).shape[0], matrix(layer.get_submodule(reader)).shape[1]
    if rows == inputs:
        return Fold(source, (reader,))
    head = getattr(layer.get_submodule(source.rpartition(".")[0]), "head_dim", None)
    if type(head) is not int or head < 1 or rows % head or inputs % rows:
        return None
    channel = torch.arange(inputs)
    spread = channel // head // (inputs // rows) * head + channel % head
    return Fold(source, (reader,), spread)


def apply_fold(layer: nn.Module, fold: Fold, scales: Tensor, run: Callable[[], Tensor], width: Tensor) -> bool:
    """Divide the source by ``scales`` and multiply the readers' inputs; False, and no change, if the output changes.

    run: computes the layer's output. width: that output minus the layer's input, its change, before the fold.
    """
    if not bool(torch.isfinite(scales).all()) or not bool((scales > 0).all()):
        return False
    source = layer.get_submodule(fold.source)
    readers = [layer.get_submodule(name) for name in fold.readers]
    full = scales if fold.spread is None else scales[fold.spread]
    before = run()
    kept = [(p, p.detach().clone()) for module in (source, *readers) for p in module.parameters(recurse=False)]
    limit = _TOLERANCE * float(width.abs().max())
    for divide in (_divide, _divide_one_more):
        divide(source, scales)
        for reader in readers:
            matrix(reader).mul_(full)
        if float((run() - before).abs().max()) <= limit:
            return True
        for parameter, value in kept:
            parameter.data.copy_(value)
        if matrix_like(source):
            break
    return False


def matrix_like(module: nn.Module) -> bool:
    """Whether the module has a weight matrix; norms have vectors."""
    return cast("Tensor", module.weight).dim() == 2


def _divide(source: nn.Module, scales: Tensor) -> None:
    weight = cast("Tensor", source.weight).detach()
    if weight.dim() == 2:
        matrix(source).div_(scales[:, None])
    else:
        weight.div_(scales)
    _divide_bias(source, scales)


def _divide_one_more(source: nn.Module, scales: Tensor) -> None:
    """Norms that add one to their gain."""
    weight = cast("Tensor", source.weight).detach()
    weight.copy_((weight + 1) / scales - 1)
    _divide_bias(source, scales)


def _divide_bias(source: nn.Module, scales: Tensor) -> None:
    bias: Any = getattr(source, "bias", None)
    if isinstance(bias, Tensor):
        bias.detach().div_(scales)
