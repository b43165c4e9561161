"""What the importers share: a weight as another program has stored it, and its codes out of 32-bit words."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..packing import PackedWeight, QuantizedWeight, check_bits, check_group_size, pack, resolve_group

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
INT32 = (torch.int32,)

Shapes = dict[str, tuple[list[int], tuple[torch.dtype, ...]]]
Tensors = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]  # (name, shape, dtype) of a module's tensors


@dataclass(frozen=True)
class StoredWeight(ABC):
    """A weight matrix in another program's form: its settings, and (name, shape, dtype) of its tensors in the files.

    bits: 4 or 8. group_size: inputs that share a scale, a multiple of 32, or -1 for one group. sym: whether the
    settings call it symmetric. Raises ValueError for settings that no canonical weight has.
    """

    bits: int
    group_size: int
    sym: bool
    stored: Tensors

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_group_size(self.group_size)

    def names(self, parameter: str = "weight") -> tuple[str, ...]:
        """The tensors, by the last part of their names. parameter: see :meth:`tensors`."""
        return tuple(name for name, _, _ in self.stored)

    def groups(self, k: int) -> int:
        """Groups of a row of k inputs."""
        return -(-k // resolve_group(self.group_size, k))

    @abstractmethod
    def expected(self, n: int, k: int) -> Shapes:
        """Name -> (shape, possible dtypes) of the tensors of a weight [n, k]; ValueError if there is none."""

    @abstractmethod
    def quantized(self, tensors: dict[str, Tensor], n: int, k: int) -> tuple[QuantizedWeight, Tensor | None]:
        """(weight [n, k], order int32 [k] or None): input j of the weight is input order[j] of the linear.

        tensors: by the names of :meth:`expected`, of its shapes and dtypes. ValueError for values that are wrong.
        """

    def tensors(self, shape: list[int], parameter: str = "weight") -> dict[str, tuple[list[int], torch.dtype]]:
        """Name -> (shape, dtype) of what is stored for a weight [n, k]; ValueError where the files have another.

        parameter: of the float module; ValueError for any but its ``weight``: none of these programs has others.
        """
        if parameter != "weight" or len(shape) != 2:
            raise ValueError(f"experts in one tensor {shape} are not supported in this format")
        n, k = shape
        found, expected = {name: (list(shape), dtype) for name, shape, dtype in self.stored}, self.expected(n, k)
        unknown = sorted(found.keys() - expected.keys())
        if unknown:
            raise ValueError(f"{unknown[0]} is no tensor of this format")
        for name, (shape, dtypes) in expected.items():
            if name not in found:
                raise ValueError(f"{name} is missing")
            if found[name][0] != shape or found[name][1] not in dtypes:
                kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
                got = f"{str(found[name][1]).removeprefix('torch.')} {found[name][0]}"
                raise ValueError(
                    f"{name} must be {kinds} {shape}, got {got} "
                    f"(weight [{n}, {k}], bits {self.bits}, group_size {self.group_size})"
                )
        return found

    def packed(
        self, tensors: dict[str, Tensor], shape: list[int], parameter: str = "weight"
    ) -> tuple[PackedWeight, Tensor | None]:
        """(packed weight [n, k], order) of :meth:`quantized`; ValueError says what is wrong with the values."""
        n, k = shape
        weight, order = self.quantized({name: value.detach() for name, value in tensors.items()}, n, k)
        return pack(weight), order


def canonical(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int) -> QuantizedWeight:
    """``w = scale * (code - zero)`` as a QuantizedWeight; zero points that all are the middle become none.

    codes: uint8 [n, k]. scales: float [n, groups], taken over as float16 or bfloat16 where that is exact. zeros: uint8
    [n, groups] or None, the middle. Raises ValueError where the canonical form cannot hold it.
    """
    middle = 1 << (bits - 1)
    if zeros is not None and bool((zeros == middle).all()):
        zeros = None
    if zeros is not None and bits == 8:
        raise ValueError("8-bit weights with zero points other than 128 are not supported, only symmetric ones")
    if scales.dtype == torch.float32:
        if not bool(torch.isfinite(scales).all()):
            raise ValueError("scales must be finite")
        exact = [x for x in (torch.float16, torch.bfloat16) if torch.equal(scales.to(x).float(), scales)]
        if not exact:
            raise ValueError("scales are float32 values that neither float16 nor bfloat16 holds exactly")
        scales = scales.to(exact[0])
    zeros = None if zeros is None else zeros.contiguous()
    return QuantizedWeight(codes.contiguous(), scales.contiguous(), zeros, bits, group_size)


def lanes(words: Tensor, bits: int) -> Tensor:
    """The codes of int32 words [r, c], lowest bits first: uint8 [r, c * 32 / bits]."""
    stored = words.contiguous().view(torch.uint8)
    if bits == 8:
        return stored
    return torch.stack([stored & 15, stored >> 4], dim=-1).view(stored.shape[0], -1)


def check_lanes(size: int, bits: int, what: str) -> int:
    """Words that ``size`` codes fill; ValueError if the last one would not be full."""
    per = 32 // bits
    if size % per:
        raise ValueError(f"{what} must be a multiple of {per}, got {size}")
    return size // per


def order_of(g_idx: Tensor, k: int, group_size: int) -> Tensor | None:
    """The inputs group by group, int32 [k], from the group of every input; None where they are in order already.

    ValueError for a group that does not exist, or one that has not as many inputs as it must have.
    """
    group = resolve_group(group_size, k)
    groups = -(-k // group)
    low, high = (int(value) for value in torch.aminmax(g_idx))
    if low < 0 or high >= groups:
        raise ValueError(f"g_idx must lie in 0..{groups - 1}, got {low if low < 0 else high}")
    natural = torch.arange(k) // group
    if torch.equal(g_idx.long(), natural):
        return None
    sizes = torch.bincount(g_idx.long(), minlength=groups)
    wanted = torch.bincount(natural, minlength=groups)
    if not torch.equal(sizes, wanted):
        wrong = int((sizes != wanted).nonzero()[0])
        raise ValueError(f"g_idx gives group {wrong} {int(sizes[wrong])} inputs, it must have {int(wanted[wrong])}")
    return torch.sort(g_idx.long(), stable=True).indices.to(torch.int32)


# ---- settings -------------------------------------------------------------------------------------------------------


def field(settings: dict[str, Any], name: str, kinds: type | tuple[type, ...], default: Any = None) -> Any:
    """A field of a quantization_config; ValueError if it is missing and has no default, or is of another type."""
    value = settings.get(name)
    if value is None:
        value = default
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is int):
        raise ValueError(f"quantization_config: {name} is {value!r}")
    return value


def matches(pattern: str, name: str) -> bool:
    """Whether the regular expression fits from the name's start; ValueError for one that is none."""
    try:
        return re.match(pattern, name) is not None
    except re.error as error:
        raise ValueError(f"quantization_config: {pattern!r} is no regular expression: {error}") from error
