"""AWQ checkpoints ("gemm"), also those of AutoRound: ``w = scale * (code - zero)``, groups along the input.

qweight  int32 [k, n / 8]        eight outputs to a word, in the order 0 2 4 6 1 3 5 7 from the lowest bits
qzeros   int32 [groups, n / 8]   the same
scales   float16 [groups, n]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..packing import QuantizedWeight
from .stored import FLOATS, INT32, Shapes, StoredWeight, Tensors, canonical, check_lanes, field, lanes

MARK = "qweight"

_LANE_OF = [0, 4, 1, 5, 2, 6, 3, 7]  # of output j of eight


@dataclass(frozen=True)
class AwqWeight(StoredWeight):
    """A weight in this form."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits != 4:
            raise ValueError(f"bits must be 4 in an AWQ checkpoint, got {self.bits}")

    def expected(self, n: int, k: int) -> Shapes:
        """See :class:`StoredWeight`."""
        words, groups = check_lanes(n, self.bits, "out_features"), self.groups(k)
        return {
            "qweight": ([k, words], INT32),
            "qzeros": ([groups, words], INT32),
            "scales": ([groups, n], FLOATS),
        }

    def quantized(self, tensors: dict[str, Tensor], n: int, k: int) -> tuple[QuantizedWeight, Tensor | None]:
        """See :class:`StoredWeight`."""
        codes, zeros = (_outputs(tensors[name]).t() for name in ("qweight", "qzeros"))
        return canonical(codes, tensors["scales"].t(), zeros, self.bits, self.group_size), None


def _outputs(words: Tensor) -> Tensor:
    """int32 [r, n / 8] -> uint8 [r, n], outputs in their order."""
    eights = lanes(words, 4).view(words.shape[0], -1, 8)
    return eights[:, :, _LANE_OF].reshape(words.shape[0], -1)


def reader(settings: dict[str, Any]) -> Callable[[str, Tensors], StoredWeight]:
    """(module, its tensors) -> form, by an AWQ quantization_config; ValueError for one that is not supported."""
    version = str(field(settings, "version", str, field(settings, "format", str, "gemm"))).lower()
    if version != "gemm":
        raise ValueError(f"quantization_config: version {version!r} of AWQ is not supported: gemm is")
    bits = field(settings, "bits", int, settings.get("w_bit"))
    group_size = field(settings, "group_size", int, settings.get("q_group_size"))
    whole = AwqWeight(bits, group_size, not field(settings, "zero_point", bool, True), ())
    return lambda module, tensors: replace(whole, stored=tensors)
