"""Calibrated weights put into a model: for good, or into a second one that shares the first one's tensors."""

from __future__ import annotations

import copy

import torch
from torch import nn

from . import ops
from .calibrated import Calibrated
from .checkpoint import Form
from .config import Settings
from .launch import apply_default_threads
from .packing import PackedWeight
from .plan import Target, find_targets
from .swap import finish, freeze, swap_module


def forms_of(model: nn.Module, settings: Settings) -> dict[str, Form]:
    """Name -> form of every module that optimize() would replace, as ``settings`` have it."""
    targets, _ = find_targets(model, settings)
    return {target.name: _form(target, settings) for target in targets}


def _form(target: Target, settings: Settings) -> Form:
    group_size = settings.group_size if target.bits == 4 or settings.bits == 8 else 32
    zeros = "none" if settings.sym or target.bits == 8 else "point"
    return Form(target.bits, group_size, zeros, settings.scale_dtype)


def apply(model: nn.Module, found: Calibrated, settings: Settings) -> nn.Module:
    """:func:`torch_cpullm.optimize` in place, with the weights and parameters that calibration has found.

    Modules that ``found`` does not have are rounded to nearest as ``settings`` say. Returns ``model``. Raises
    ValueError, before anything is changed, for names that the model has not.
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
    packed: dict[int, PackedWeight] = {
        id(target.stored): found.packed[name] for target in targets for name in target.names if name in found.packed
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
