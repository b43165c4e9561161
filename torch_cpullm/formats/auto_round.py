"""AutoRound checkpoints: tensors as GPTQ or AWQ have them, and settings of single modules in ``extra_config``.

packing_format      tensors
*:auto_gptq, *:gptq     GPTQ v1
*:gptqmodel, auto_round GPTQ v2
*:auto_awq, *:awq       AWQ gemm
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from . import awq, gptq
from .stored import StoredWeight, Tensors, field, matches

MARK = "qweight"

_OFFSETS = {"auto_gptq": 1, "gptq": 1, "gptqmodel": 0, "auto_round": 0}
_AWQ = ("auto_awq", "awq")


def reader(settings: dict[str, Any]) -> Callable[[str, Tensors], StoredWeight]:
    """(module, its tensors) -> form, by an AutoRound quantization_config; ValueError for one that is not supported."""
    packing = field(settings, "packing_format", str, field(settings, "backend", str, "auto_round:auto_gptq"))
    kind = packing.rpartition(":")[2]
    if str(field(settings, "data_type", str, "int")) != "int" or (settings.get("act_bits") or 16) < 16:
        raise ValueError("quantization_config: only integer weights with float activations are supported")
    values = field(settings, "bits", int), field(settings, "group_size", int), field(settings, "sym", bool, True)
    whole: StoredWeight
    if kind in _OFFSETS:
        whole = gptq.GptqWeight(*values, (), _OFFSETS[kind])
    elif kind in _AWQ:
        whole = awq.AwqWeight(*values, ())
    else:
        known = ", ".join((*_OFFSETS, *_AWQ))
        raise ValueError(f"quantization_config: packing_format {packing!r} is not supported: {known} are")
    extra = field(settings, "extra_config", dict, {})
    return lambda module, tensors: replace(whole, stored=tensors, **_own(extra, module))


def _own(extra: dict[str, Any], module: str) -> dict[str, Any]:
    """The settings of this module, under its own name or else under a regular expression that fits the whole of it."""
    own = extra.get(module)
    if own is None:
        own = next((value for key, value in extra.items() if matches(f"(?:{key})$", module)), {})
    if not isinstance(own, dict):
        raise ValueError(f"quantization_config: extra_config: {module!r} is {own!r}")
    return {name: own[name] for name in ("bits", "group_size", "sym") if own.get(name) is not None}
