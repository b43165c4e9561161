"""Where calibration computes: the CPU, or another device of torch. What is packed, and runs, is always on the CPU."""

from __future__ import annotations

import copy

import torch
from torch import nn


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter; the CPU for one that has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def usable(device: str | torch.device) -> torch.device:
    """``device`` as torch has it; ValueError for a name that torch does not know and for a device that is not there."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be a device of torch such as cpu, cuda or cuda:1, got {device!r}") from error
    if found.type == "meta":
        raise ValueError("device must be one that computes, got meta")
    try:
        return torch.empty(0, device=found).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {str(device)!r} is not available: {str(error).splitlines()[0]}") from error


def model_on(model: nn.Module, device: str | torch.device | None) -> nn.Module:
    """``model`` itself if it is on ``device``, or device is None; else a copy there. It stays where it is."""
    if device is None or usable(device) == device_of(model):
        return model
    return copy.deepcopy(model).to(device)
