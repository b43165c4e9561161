"""What calibration leaves behind: packed weights and rescaled parameters by name, on disk and in a model."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .checkpoint import Form
from .linear import STORED
from .packing import PackedWeight, stored_form, unpack


@dataclass
class Calibrated:
    """packed: module name -> its weight; parameters: name -> value of floats that scales were folded into."""

    packed: dict[str, PackedWeight] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)

    def merge(self, prefix: str, other: Calibrated) -> None:
        """Take over what belongs to the layer of this prefix."""
        self.packed.update({prefix + name: value for name, value in other.packed.items()})
        self.parameters.update({prefix + name: value for name, value in other.parameters.items()})


_PARAMETER = "parameter:"


def write_layer(path: Path, key: str, layer: Calibrated) -> None:
    """Write one finished layer, whole or not at all. key: what the run depends on."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {_PARAMETER + name: value.contiguous() for name, value in layer.parameters.items()}
    for name, packed in layer.packed.items():
        for part, value in zip(STORED, stored_form(unpack(packed)), strict=True):
            if value is not None:
                tensors[f"{name}.{part}"] = value.contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, {"run": key})
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def read_layer(path: Path, key: str, layer: nn.Module, forms: dict[str, Form]) -> Calibrated:
    """One finished layer of the run ``key``; ValueError for a damaged file and for one of another run."""
    from safetensors import SafetensorError, safe_open

    from .folding import matrix

    try:
        with safe_open(path, framework="pt") as file:
            run = (file.metadata() or {}).get("run")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: no whole safetensors file: {error}; remove it to calibrate its layer anew"
        ) from error
    if run != key:
        raise ValueError(f"{path} is of another model, recipe or calibration text; choose another folder or empty it")
    found = Calibrated()
    for name, form in forms.items():
        n, k = matrix(layer.get_submodule(name)).shape
        parts: dict[str, Any] = {part: tensors.get(f"{name}.{part}") for part in form.names()}
        if any(value is None for value in parts.values()):
            raise ValueError(f"{path} has no {name}; remove it to calibrate its layer anew")
        packed, _ = form.packed(parts, [n, k])
        found.packed[name] = cast("PackedWeight", packed)
    for name, value in tensors.items():
        if name.startswith(_PARAMETER):
            own = layer.get_parameter(name.removeprefix(_PARAMETER))
            if own.shape != value.shape or value.dtype != torch.float32:
                raise ValueError(
                    f"{path}: {name} must be float32 {list(own.shape)}, got {value.dtype} {list(value.shape)}"
                )
            found.parameters[name.removeprefix(_PARAMETER)] = value
    return found


def describe_forms(forms: dict[str, Form]) -> dict[str, dict[str, Any]]:
    """Forms as JSON has them."""
    return {name: asdict(form) for name, form in forms.items()}
