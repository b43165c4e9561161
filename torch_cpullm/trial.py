"""Calibrated weights put into a model: for good, or into a second one that shares the first one's tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from . import ops
from .calibrated import Calibrated
from .checkpoint import Form
from .config import Recipe, Settings
from .experts import WEIGHTS
from .launch import apply_default_threads
from .linear import Packed
from .plan import check_overrides, find_targets
from .swap import finish, freeze, swap_module


def forms_of(model: nn.Module, settings: Settings) -> dict[str, Form]:
    """Name -> form of every matrix that optimize() would pack, as ``settings`` have it; not of experts.

    ValueError for overrides that optimize() refuses.
    """
    targets, skipped = find_targets(model, settings)
    check_overrides(settings, targets, skipped, {})
    return {
        target.name: _form(cast("Recipe", target.recipe), settings) for target in targets if target.kind != "experts"
    }


class Experts(NamedTuple):
    """Experts that :func:`apply` rounds to nearest. shapes: [experts, n, k] of each of their weights."""

    form: Form
    shapes: list[list[int]]


def experts_of(model: nn.Module, settings: Settings) -> dict[str, Experts]:
    """Name -> experts that optimize() would pack, as ``settings`` have them."""
    targets, _ = find_targets(model, settings)
    return {
        target.name: Experts(
            _form(cast("Recipe", target.recipe), settings),
            [list(target.module.get_parameter(name).shape) for name in WEIGHTS],
        )
        for target in targets
        if target.kind == "experts"
    }


def _form(recipe: Recipe, settings: Settings) -> Form:
    return Form(recipe.bits, recipe.group_size, "none" if recipe.sym else "point", settings.scale_dtype)


def settings_of(model: nn.Module, forms: Mapping[str, Form], settings: Settings) -> Settings:
    """``settings`` with overrides where ``forms``, of modules of ``model``, are not what they say."""
    said = forms_of(model, settings)
    own: dict[str, dict[str, Any]] = {
        name: {"bits": form.bits, "group_size": form.group_size, "sym": form.zeros == "none"}
        for name, form in forms.items()
        if form != said[name]
    }
    if not own:
        return settings
    result = copy.copy(settings)
    given = settings.overrides or {}
    result.overrides = own | {pattern: given[pattern] for pattern in given if pattern not in own}
    return result


def apply(model: nn.Module, found: Calibrated, settings: Settings) -> nn.Module:
    """:func:`torch_cpullm.optimize` in place, with the weights and parameters that calibration has found.

    Modules that ``found`` does not have, experts among them, are rounded to nearest as ``settings`` say. Returns
    ``model``. Raises ValueError, before anything is changed, for names that the model has not.
    """
    ops.isa()
    targets, skipped = find_targets(model, settings)
    names = {name for target in targets for name in target.names}
    parameters = dict(model.named_parameters())
    unknown = [name for name in found.packed if name not in names]
    unknown += [name for name in found.parameters if name not in parameters]
    if unknown:
        raise ValueError(f"the calibrated weights are of another model: {unknown[0]} is not there")
    apply_default_threads()
    model.eval()
    frozen = freeze(model)
    for name, value in found.parameters.items():
        parameters[name].data = value.to(parameters[name].dtype)
    packed: dict[int, Packed] = {
        id(target.module.weight): found.packed[name]
        for target in targets
        for name in target.names
        if name in found.packed
    }
    for target in targets:
        swap_module(model, target, settings, packed)
    finish(model, settings, skipped, frozen)
    return model


def twin(model: nn.Module) -> nn.Module:
    """A second model of the same modules whose parameters and buffers are the first one's memory.

    Replacing its modules, and giving a parameter new ``data``, leaves the first as it is; writing into a tensor does
    not. Its parameters are frozen.
    """
    memo: dict[int, torch.Tensor] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer
    return copy.deepcopy(model, memo)
