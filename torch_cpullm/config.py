"""What to quantise and how: settings that need nothing but torch. ``hf.CpuLlmConfig`` is the HuggingFace form."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

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


class Recipe(NamedTuple):
    """How one weight is quantised; fields as in :class:`Settings`, in the order of ``quantize_rtn``'s arguments."""

    bits: int
    group_size: int
    sym: bool  # always, with 8 bits
    scale_dtype: torch.dtype

    def __str__(self) -> str:
        return f"bits={self.bits}, group_size={self.group_size}, sym={self.sym}"


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
    overrides: pattern -> some of bits, group_size and sym, for modules that the pattern matches as it would in
    modules_to_not_convert. The first pattern that matches a module decides; fields that it lacks are those of all
    others. Modules that share an input (q, k, v; gate, up) or a weight must get the same. As JSON, a list of pairs.
    """

    bits: int = 4
    group_size: int = 32
    sym: bool = False
    compute: str = "int8"
    head_bits: int | None = 8
    scale_dtype: str = "float16"
    modules_to_not_convert: list[str] | None = None
    kv_cache: str = "auto"
    overrides: dict[str, dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raise ValueError for the first field that is out of range."""
        check_bits(self.bits)
        check_group_size(self.group_size)
        _check_sym(self.sym)
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
        if self.overrides is not None:
            self.overrides = _checked_overrides(self.overrides)

    def converts(self, name: str) -> bool:
        """Whether the module of this dotted name is to be converted."""
        return not any(matches(pattern, name) for pattern in self.modules_to_not_convert or ())

    def recipe(self, name: str, end: bool = False) -> Recipe | None:
        """How the weight of the module of this dotted name is quantised; None: it stays as it is.

        end: the module is the output head or the input embedding.
        """
        if not self.converts(name):
            return None
        own = next((own for pattern, own in (self.overrides or {}).items() if matches(pattern, name)), {})
        bits = own.get("bits", self.head_bits if end else self.bits)
        if bits is None:
            return None
        group_size = 32 if end and bits == 8 and self.bits == 4 else self.group_size
        sym = bits == 8 or own.get("sym", self.sym)
        return Recipe(bits, own.get("group_size", group_size), sym, SCALE_DTYPES[self.scale_dtype])

    def check_overrides(self, names: Iterable[str]) -> None:
        """ValueError for a pattern of the overrides that matches none of these modules."""
        names = list(names)
        for pattern in self.overrides or ():
            if not any(matches(pattern, name) for name in names):
                raise ValueError(f"overrides: {pattern!r} matches no module that could be quantised")

    def plain(self) -> dict[str, Any]:
        """The fields as JSON has them; the overrides as a list of pairs, since JSON objects have no order."""
        values = {field.name: getattr(self, field.name) for field in fields(Settings)}
        if self.overrides is not None:
            values["overrides"] = [[pattern, dict(own)] for pattern, own in self.overrides.items()]
        return values

    def same_as(self, other: Settings) -> bool:
        """Whether both settings ask for the same model."""
        mine, others = self.plain(), other.plain()
        for values in (mine, others):
            values["modules_to_not_convert"] = set(values["modules_to_not_convert"] or ())
            values["overrides"] = values["overrides"] or []
        return mine == others


def _checked_overrides(given: Any) -> dict[str, dict[str, Any]]:
    """Overrides as a dict, from one or from a list of pairs; ValueError names the entry that is wrong."""
    text = "overrides must be a dict of pattern -> {'bits': .., 'group_size': .., 'sym': ..}"
    pairs = list(given.items()) if isinstance(given, dict) else given
    if not isinstance(pairs, (list, tuple)) or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs):
        raise ValueError(f"{text}, got {given!r}")
    checks = {"bits": check_bits, "group_size": check_group_size, "sym": _check_sym}
    for pattern, own in pairs:
        if not isinstance(pattern, str) or not isinstance(own, dict) or not own or not own.keys() <= checks.keys():
            raise ValueError(f"{text}, got {pattern!r}: {own!r}")
        for name, value in own.items():
            try:
                checks[name](value)
            except ValueError as error:
                raise ValueError(f"overrides: {pattern!r}: {error}") from None
    return {pattern: dict(own) for pattern, own in pairs}


def _check_sym(sym: Any) -> None:
    if not isinstance(sym, bool):
        raise ValueError(f"sym must be True or False, got {sym!r}")


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` is this dotted name, its end after a dot, or a regular expression that matches its start."""
    if name == pattern or name.endswith("." + pattern):
        return True
    try:
        return re.match(pattern, name) is not None
    except re.error:
        return False
