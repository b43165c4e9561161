"""GPTQ checkpoints (v1, v2), also those of AutoRound: ``w = scale * (code - zero)``, groups along the input.

    qweight  int32 [k / per, n]         per = 32 / bits codes to a word, along the input, lowest bits first
    qzeros   int32 [groups, n / per]    along the output; v1 ("gptq") stores zero - 1, v2 ("gptq_v2") zero
    scales   float16 [groups, n]
    g_idx    int32 [k], the group of every input; may be absent. With desc_act groups are not contiguous

A stored 15 of v1 (255 for 8 bits) is an error: the zero point would be 16, and the programs that read the format differ
on whether that is 16 or wraps to 0. Symmetric weights have the middle as zero point, so for them 7 and 8 (127 and 128)
both mean it: programs that write v2's values under v1's name exist. Source: AutoGPTQ and GPTQModel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..packing import QuantizedWeight
from .stored import (
    FLOATS,
    INT32,
    Shapes,
    StoredWeight,
    Tensors,
    canonical,
    check_lanes,
    field,
    lanes,
    matches,
    order_of,
)

MARK = "qweight"


@dataclass(frozen=True)
class GptqWeight(StoredWeight):
    """A weight in this form. offset: what has to be added to a stored zero point."""

    offset: int = 1

    def expected(self, n: int, k: int) -> Shapes:
        """See :class:`StoredWeight`."""
        groups = self.groups(k)
        shapes: Shapes = {
            "qweight": ([check_lanes(k, self.bits, "in_features"), n], INT32),
            "qzeros": ([groups, check_lanes(n, self.bits, "out_features")], INT32),
            "scales": ([groups, n], FLOATS),
        }
        if "g_idx" in self.names():
            shapes["g_idx"] = ([k], INT32)
        return shapes

    def quantized(self, tensors: dict[str, Tensor], n: int, k: int) -> tuple[QuantizedWeight, Tensor | None]:
        """See :class:`StoredWeight`."""
        codes = lanes(tensors["qweight"].t(), self.bits)
        order = order_of(tensors["g_idx"], k, self.group_size) if "g_idx" in tensors else None
        if order is not None:
            codes = codes[:, order.long()]
        zeros = self._zeros(tensors["qzeros"])
        zeros = None if zeros is None else zeros.t()
        return canonical(codes, tensors["scales"].t(), zeros, self.bits, self.group_size), order

    def _zeros(self, qzeros: Tensor) -> Tensor | None:
        zeros = lanes(qzeros, self.bits)
        middle = 1 << (self.bits - 1)
        if self.sym:
            if not bool(((zeros == middle) | (zeros == middle - 1)).all()):
                raise ValueError(f"symmetric, but qzeros hold other values than {middle - 1} and {middle}")
            return None
        top = (1 << self.bits) - 1
        if self.offset and bool((zeros == top).any()):
            raise ValueError(
                f"qzeros hold {top}, a zero point of {top + 1} in this version of the format, "
                "which some programs read as that and others as 0"
            )
        return zeros + self.offset


def reader(settings: dict[str, Any]) -> Callable[[str, Tensors], StoredWeight]:
    """(module, its tensors) -> form, by a GPTQ quantization_config; ValueError for one that is not supported."""
    version = str(field(settings, "checkpoint_format", str, field(settings, "format", str, "gptq"))).lower()
    if version not in ("gptq", "gptq_v2") or settings.get("is_marlin_format"):
        raise ValueError(f"quantization_config: checkpoint_format {version!r} is not supported: gptq and gptq_v2 are")
    if str(settings.get("pack_dtype") or "int32").removeprefix("torch.") != "int32":
        raise ValueError(f"quantization_config: pack_dtype {settings['pack_dtype']!r} is not supported: int32 is")
    whole = GptqWeight(
        field(settings, "bits", int),
        field(settings, "group_size", int),
        field(settings, "sym", bool, True),
        (),
        int(version == "gptq"),
    )
    dynamic = field(settings, "dynamic", dict, {})
    ordered = field(settings, "desc_act", bool, False)

    def form(module: str, tensors: Tensors) -> StoredWeight:
        if ordered and all(name != "g_idx" for name, _, _ in tensors):
            raise ValueError("g_idx is missing, and quantization_config says desc_act")
        return replace(whole, stored=tensors, **_own(dynamic, module))

    return form


def _own(dynamic: dict[str, Any], module: str) -> dict[str, Any]:
    """The settings that ``dynamic`` has for this module: the first pattern that fits; "-:" leaves modules in float."""
    for pattern, own in dynamic.items():
        if not pattern.startswith("-:") and matches(pattern.removeprefix("+:"), module):
            if not isinstance(own, dict):
                raise ValueError(f"quantization_config: dynamic: {pattern!r} is {own!r}")
            return {name: own[name] for name in ("bits", "group_size", "sym") if name in own}
    return {}
