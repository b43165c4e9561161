"""compressed-tensors checkpoints, ``pack-quantized``, weights only: ``w = scale * (code - zero)``.

weight_packed      int32 [n, ceil(k / per)]     per = 32 / bits codes to a word; code = value + 8 (8 bits: + 128)
weight_scale       float [n, groups]
weight_zero_point  int32 [ceil(n / per), groups] packed in the same way along the output, or int8 [n, groups] as it
                   is; absent where the weights are symmetric
weight_shape       int64 [2]: n, k
weight_g_idx       int32 [k], the group of every input, or -1 throughout; absent without activation order

Source: the package compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..packing import QuantizedWeight
from .stored import FLOATS, INT32, Shapes, StoredWeight, Tensors, canonical, field, lanes, matches, order_of

MARK = "weight_packed"

_PACKED, _SCALE, _ZERO, _SHAPE, _GROUP = (
    f"weight_{name}" for name in ("packed", "scale", "zero_point", "shape", "g_idx")
)


@dataclass(frozen=True)
class PackQuantizedWeight(StoredWeight):
    """A weight in this form."""

    def expected(self, n: int, k: int) -> Shapes:
        """See :class:`StoredWeight`."""
        per, groups = 32 // self.bits, self.groups(k)
        shapes: Shapes = {
            _PACKED: ([n, -(-k // per)], INT32),
            _SCALE: ([n, groups], FLOATS),
            _SHAPE: ([2], (torch.int64, torch.int32)),
        }
        if not self.sym or _ZERO in self.names():
            plain = any(name == _ZERO and dtype == torch.int8 for name, _, dtype in self.stored)
            shapes[_ZERO] = ([n, groups], (torch.int8,)) if plain else ([-(-n // per), groups], INT32)
        if _GROUP in self.names():
            shapes[_GROUP] = ([k], INT32)
        return shapes

    def quantized(self, tensors: dict[str, Tensor], n: int, k: int) -> tuple[QuantizedWeight, Tensor | None]:
        """See :class:`StoredWeight`."""
        if tensors[_SHAPE].tolist() != [n, k]:
            raise ValueError(f"weight_shape must be {[n, k]}, got {tensors[_SHAPE].tolist()}")
        codes = lanes(tensors[_PACKED], self.bits)[:, :k]
        order = None
        if _GROUP in tensors and not bool((tensors[_GROUP] == -1).all()):
            order = order_of(tensors[_GROUP], k, self.group_size)
        if order is not None:
            codes = codes[:, order.long()]
        zeros = self._zeros(tensors[_ZERO], n) if _ZERO in tensors else None
        return canonical(codes, tensors[_SCALE], zeros, self.bits, self.group_size), order

    def _zeros(self, stored: Tensor, n: int) -> Tensor:
        """Zero points as codes have them, uint8 [n, groups]."""
        if stored.dtype != torch.int8:
            return lanes(stored.t(), self.bits).t()[:n]
        half = 1 << (self.bits - 1)
        low, high = (int(value) for value in torch.aminmax(stored))
        if low < -half or high >= half:
            raise ValueError(f"weight_zero_point must lie in {-half}..{half - 1}, got {low if low < -half else high}")
        return (stored.to(torch.int16) + half).to(torch.uint8)


def reader(settings: dict[str, Any]) -> Callable[[str, Tensors], StoredWeight]:
    """(module, its tensors) -> form, by a compressed-tensors quantization_config; ValueError for one not supported."""
    groups = field(settings, "config_groups", dict)
    for name in ("kv_cache_scheme", "transform_config"):
        if settings.get(name):
            raise ValueError(f"quantization_config: {name} is not supported")
    sparsity = settings.get("sparsity_config")
    if sparsity and not (isinstance(sparsity, dict) and sparsity.get("format") == "dense"):
        raise ValueError("quantization_config: sparse weights are not supported")
    schemes = [(_targets(group), _scheme(group, settings.get("format"))) for group in groups.values()]

    def form(module: str, tensors: Tensors) -> StoredWeight:
        bits, group_size, sym, ordered = _of(schemes, module)
        if ordered and all(name != _GROUP for name, _, _ in tensors):
            raise ValueError(f"{_GROUP} is missing, and quantization_config says actorder group")
        return PackQuantizedWeight(bits, group_size, sym, tensors)

    return form


Scheme = tuple[int, int, bool, bool]  # bits, group_size, sym, whether inputs have an order of their own


def _targets(group: Any) -> list[str]:
    targets = group.get("targets") if isinstance(group, dict) else None
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"quantization_config: config_groups: targets is {targets!r}")
    return targets


def _scheme(group: dict[str, Any], default: Any) -> Scheme | str:
    """How a group's weights are stored, or why they are not supported."""
    kind = group.get("format") or default
    if kind != "pack-quantized":
        return f"format {kind!r} is not supported: pack-quantized is"
    if group.get("input_activations") or group.get("output_activations"):
        return "quantised activations are not supported"
    weights = field(group, "weights", dict)
    if field(weights, "type", str, "int") != "int":
        return f"weights of type {weights['type']!r} are not supported: int is"
    strategy = field(weights, "strategy", str, "group" if weights.get("group_size") else "channel")
    if strategy not in ("group", "channel"):
        return f"strategy {strategy!r} is not supported: group and channel are"
    group_size = field(weights, "group_size", int) if strategy == "group" else -1
    ordered = weights.get("actorder") in (True, "group", "dynamic")
    return field(weights, "num_bits", int), group_size, field(weights, "symmetric", bool, True), ordered


def _of(schemes: list[tuple[list[str], Scheme | str]], module: str) -> Scheme:
    """The scheme of a module: that of a group that names it, by name or by pattern, or of one that names its class."""

    def named(target: str) -> bool:
        return matches(target.removeprefix("re:"), module) if target.startswith("re:") else target == module

    for test in (named, lambda target: target == "Linear"):
        for targets, scheme in schemes:
            if any(test(target) for target in targets):
                if isinstance(scheme, str):
                    raise ValueError(f"quantization_config: config_groups: {scheme}")
                return scheme
    raise ValueError("quantization_config: no group of config_groups has it as a target")
