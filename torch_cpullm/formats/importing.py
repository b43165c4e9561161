"""Which modules of another program's checkpoint are packed, and how: from its settings and its files' headers."""

from __future__ import annotations

from typing import Any

import torch

from . import auto_round, awq, compressed_tensors, gptq
from .stored import StoredWeight, Tensors

_FORMATS = {
    "gptq": gptq,
    "awq": awq,
    "auto-round": auto_round,
    "intel/auto-round": auto_round,
    "compressed-tensors": compressed_tensors,
}
METHODS = tuple(_FORMATS)
"""Values of ``quant_method`` that :func:`stored_weights` knows."""


def stored_weights(
    settings: dict[str, Any], headers: dict[str, tuple[tuple[int, ...], torch.dtype | None]]
) -> dict[str, StoredWeight]:
    """Module name -> how its weight is stored, for every module that the files have in packed form.

    settings: the checkpoint's quantization_config. headers: tensor name -> (shape, dtype), dtype None for one that no
    weight has. Raises ValueError, naming the field or the module, for what is not supported.
    """
    kind = _FORMATS[settings["quant_method"]]
    form = kind.reader(settings)
    modules: dict[str, list[tuple[str, tuple[int, ...], torch.dtype]]] = {}
    for name, (shape, dtype) in sorted(headers.items()):
        module, _, key = name.rpartition(".")
        if f"{module}.{kind.MARK}" in headers and key not in ("bias", "weight"):
            if dtype is None:
                raise ValueError(f"{name} has a dtype that is not supported")
            modules.setdefault(module, []).append((key, shape, dtype))
    if not modules:
        raise ValueError(f"quantization_config says {settings['quant_method']!r}, but no tensor is called {kind.MARK}")
    found = {}
    for module, tensors in modules.items():
        stored: Tensors = tuple(tensors)
        try:
            found[module] = form(module, stored)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{module}: {error}") from error
    return found
