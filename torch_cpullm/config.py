"""What to quantise and how: settings that need nothing but torch. ``hf.CpuLlmConfig`` is the HuggingFace form."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from .packing import check_bits, check_group_size

SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
KV_CACHES = {
    "auto": None,  # as the model computes them
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
}


@dataclass
class Settings:
    """Settings of :func:`torch_cpullm.optimize`. Raises ValueError naming the field that is wrong.

    bits: 4 or 8, of the linears. group_size: weights that share a scale along the input: a positive multiple of 32, or
    -1 for one group per output. sym: symmetric levels; otherwise an integer zero point per group (8 bits: always
    symmetric). compute: ``"int8"`` quantises activations per row and 128 inputs (not those of the output
    head, which computes in fp32 then); ``"fp32"`` leaves them exact; ``"bf16"`` rounds them and the weights to bf16
    where the CPU multiplies that, and is ``"fp32"`` elsewhere and for few rows.
    head_bits: 8 or 4 for the output head and the input embedding, None leaves both as they are. scale_dtype:
    ``"float16"`` or ``"bfloat16"``. modules_to_not_convert: names, suffixes after a dot, or regular expressions
    (matched from the start) of modules that stay as they are. kv_cache: how keys and values are stored: ``"auto"`` in
    the model's dtype, or ``"fp32"``, ``"bf16"``, ``"fp16"``, ``"int8"`` (a scale per token and head).
    """

    bits: int = 4
    group_size: int = 32
    sym: bool = False
    compute: str = "int8"
    head_bits: int | None = 8
    scale_dtype: str = "float16"
    modules_to_not_convert: list[str] | None = None
    kv_cache: str = "auto"

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raise ValueError for the first field that is out of range."""
        check_bits(self.bits)
        check_group_size(self.group_size)
        if not isinstance(self.sym, bool):
            raise ValueError(f"sym must be True or False, got {self.sym!r}")
        if self.compute not in ("int8", "fp32", "bf16"):
            raise ValueError(f"compute must be 'int8', 'bf16' or 'fp32', got {self.compute!r}")
        if self.head_bits is not None and (type(self.head_bits) is not int or self.head_bits not in (4, 8)):
            raise ValueError(f"head_bits must be 4, 8 or None, got {self.head_bits!r}")
        if self.scale_dtype not in SCALE_DTYPES:
            raise ValueError(f"scale_dtype must be one of {', '.join(SCALE_DTYPES)}, got {self.scale_dtype!r}")
        names = self.modules_to_not_convert
        if names is not None and not (
            isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
        ):
            raise ValueError(f"modules_to_not_convert must be a list of strings, got {names!r}")
        if not isinstance(self.kv_cache, str) or self.kv_cache not in KV_CACHES:
            raise ValueError(f"kv_cache must be one of {', '.join(KV_CACHES)}, got {self.kv_cache!r}")

    def converts(self, name: str) -> bool:
        """Whether the module of this dotted name is to be converted."""
        return not any(
            name == item or name.endswith("." + item) or _matches(item, name)
            for item in self.modules_to_not_convert or ()
        )

    def same_as(self, other: Settings) -> bool:
        """Whether both settings ask for the same model."""
        names = [set(settings.modules_to_not_convert or ()) for settings in (self, other)]
        values = ("bits", "group_size", "sym", "compute", "head_bits", "scale_dtype", "kv_cache")
        return names[0] == names[1] and all(getattr(self, value) == getattr(other, value) for value in values)


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.match(pattern, name) is not None
    except re.error:
        return False
