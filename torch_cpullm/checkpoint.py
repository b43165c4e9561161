"""What a saved model consists of: tensors in canonical form, and the quantization_config that describes them.

    X.weight_codes    uint8 [n, ceil(k/2)] (4 bits: even input low) or [n, k] (8 bits: int8 value + 128)
    X.weight_scales   float16 | bfloat16 [n, groups]
    X.weight_zeros    uint8 or the scales' dtype [n, groups], or absent: see packing.QuantizedWeight
    X.weight_order    int32 [k], or absent: input j of the weight is input order[j] of the linear
    X.gate_up_proj_codes, X.down_proj_codes, ..    the same of experts, each with a first dimension [experts]

    quantization_config   quant_method "cpullm", format_version, the settings, and
        modules   pattern -> form {bits, group_size, zeros, scales, and ordered where it is true}; "*" in a pattern
                  stands for any layer number; experts have one for each parameter
        tensors   how many tensors the files hold in all
        hint      for people who do not have this package

Reading checks everything that a kernel relies on. Two tensors are markers, see :data:`MARKER`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .config import SCALE_DTYPES, Settings
from .experts import WEIGHTS
from .linear import ORDER, STORED, SUFFIXES, Packed, PackedLinear, PackedModule, check_order, entry
from .packing import (
    PackedStack,
    check_bits,
    check_group_size,
    pack_stored,
    pack_stored_stack,
    resolve_group,
    stored_width,
)

FORMAT_VERSION = 1
INSTALL = "pip install torch_cpullm"
HINT = f"INT4 weights for x86 CPUs. Loading them needs the Python package torch_cpullm: {INSTALL}"
# Without this package transformers finds no weights, draws random ones and goes on. So the files hold an empty tensor
# under the name of a real weight, which is an error there, and one whose name says in that error's table what to do.
MARKER = INSTALL

_ZEROS = ("none", "point", "minimum")


@dataclass(frozen=True)
class Form:
    """How one weight is stored. zeros: "none", "point" (integers) or "minimum" (floats). scales: a dtype's name.
    ordered: whether inputs are in an order of their own.

    Raises ValueError naming the field that is wrong.
    """

    bits: int
    group_size: int
    zeros: str
    scales: str
    ordered: bool = False

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_group_size(self.group_size)
        if self.zeros not in _ZEROS or (self.bits == 8 and self.zeros != "none"):
            raise ValueError(f"zeros must be one of {', '.join(_ZEROS)}, and none for bits=8, got {self.zeros!r}")
        if not isinstance(self.scales, str) or self.scales not in SCALE_DTYPES:
            raise ValueError(f"scales must be one of {', '.join(SCALE_DTYPES)}, got {self.scales!r}")
        if not isinstance(self.ordered, bool):
            raise ValueError(f"ordered must be True or False, got {self.ordered!r}")

    @staticmethod
    def of(weight: Packed, *, ordered: bool = False) -> Form:
        """The form of a packed weight."""
        packed = weight.whole if isinstance(weight, PackedStack) else weight
        zeros = "none" if packed.zeros is None else "point" if packed.zeros.dtype == torch.uint8 else "minimum"
        scales = str(packed.scales.dtype).removeprefix("torch.")
        return Form(packed.bits, packed.group_size, zeros, scales, ordered)

    def names(self, parameter: str = "weight") -> tuple[str, ...]:
        """The tensors of a weight of this name, by the last part of their names."""
        return tuple(self.tensors([1, 1], parameter))

    def tensors(self, shape: list[int], parameter: str = "weight") -> dict[str, tuple[list[int], torch.dtype]]:
        """Name -> (shape, dtype) of what is stored for a weight [n, k] or for experts [experts, n, k]."""
        *rows, k = shape
        scales = SCALE_DTYPES[self.scales]
        groups = [*rows, -(-k // resolve_group(self.group_size, k))]
        codes = [*rows, stored_width(k, self.bits)]
        found = {parameter + SUFFIXES[0]: (codes, torch.uint8), parameter + SUFFIXES[1]: (groups, scales)}
        if self.zeros != "none":
            found[parameter + SUFFIXES[2]] = (groups, torch.uint8 if self.zeros == "point" else scales)
        if self.ordered:
            if len(shape) != 2:
                raise ValueError(f"ordered must be False for a weight {shape}")
            found[ORDER] = ([k], torch.int32)
        return found

    def packed(
        self, tensors: dict[str, Tensor], shape: list[int], parameter: str = "weight"
    ) -> tuple[Packed, Tensor | None]:
        """(packed weight of this shape, order or None) of stored tensors; ValueError says which does not fit."""
        for name, (size, dtype) in self.tensors(shape, parameter).items():
            got = tensors[name]
            if list(got.shape) != size or got.dtype != dtype:
                raise ValueError(f"{name} must be {dtype} {size}, got {got.dtype} {list(got.shape)}")
        values = (tensors.get(parameter + suffix) for suffix in SUFFIXES)
        codes, scales, zeros = (None if value is None else value.detach() for value in values)
        assert codes is not None
        assert scales is not None
        if len(shape) == 3:
            count, n, k = shape
            return pack_stored_stack(codes, scales, zeros, count, n, k, self.bits, self.group_size), None
        n, k = shape
        order = check_order(tensors[ORDER].detach(), k) if self.ordered else None
        return pack_stored(codes, scales, zeros, n, k, self.bits, self.group_size), order


# ---- the description ------------------------------------------------------------------------------------------------


def describe(model: nn.Module, settings: Settings, tensors: int) -> dict[str, Any]:
    """The quantization_config of ``model`` as JSON has it. tensors: how many the files hold."""
    return {
        "quant_method": "cpullm",
        "format_version": FORMAT_VERSION,
        **settings.plain(),
        "modules": _patterns(model),
        "tensors": tensors,
        "hint": HINT,
    }


def _starred(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _patterns(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Name -> form of every packed module; names that differ in layer numbers alone are one where all are alike."""
    groups: dict[str, dict[str, Form | None]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        own: dict[str, Form | None] = {entry(name, key): None for key in ("weight", *module._parameters)}
        if isinstance(module, PackedModule):
            ordered = isinstance(module, PackedLinear) and module.order is not None
            own.update({entry(name, key): Form.of(packed, ordered=ordered) for key, packed in module.weights().items()})
        for each, form in own.items():
            groups.setdefault(_starred(each), {})[each] = form
    found: dict[str, dict[str, Any]] = {}
    for pattern, names in groups.items():
        forms = set(names.values())
        alike = {pattern: next(iter(forms))} if len(forms) == 1 else names
        for name, form in alike.items():
            if form is not None:
                found[name] = {key: value for key, value in asdict(form).items() if key != "ordered" or value}
    return found


def read_forms(description: Any) -> dict[str, Form]:
    """The ``modules`` of a quantization_config; ValueError names the entry that is wrong."""
    if not isinstance(description, dict) or not description:
        raise ValueError("quantization_config of this checkpoint has no `modules`: it does not say what is packed")
    forms = {}
    for name, value in description.items():
        try:
            forms[name] = Form(**value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"quantization_config: modules: {name!r}: {error}") from error
    return forms


def form_of(name: str, forms: dict[str, Form], prefix: str) -> Form | None:
    """The form of the module of this name; a model may be loaded without its head, and then lacks ``prefix``."""
    names = [name, f"{prefix}.{name}", name.removeprefix(prefix + ".")] if prefix else [name]
    return next((forms[key] for each in names for key in (each, _starred(each)) if key in forms), None)


def check_version(version: Any) -> None:
    """ValueError for a format that this version of the package cannot read."""
    if type(version) is not int or version < 1:
        raise ValueError(f"format_version must be a positive integer, got {version!r}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"this checkpoint has format_version {version}, and this torch_cpullm reads versions up to "
            f"{FORMAT_VERSION}: upgrade it with `{INSTALL} --upgrade`"
        )


# ---- the files ------------------------------------------------------------------------------------------------------

Headers = dict[str, tuple[tuple[int, ...], "torch.dtype | None"]]

_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_HALVES = (torch.float16, torch.bfloat16)
_STORED_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    parameter + suffix: dtypes
    for parameter in ("weight", *WEIGHTS)
    for suffix, dtypes in zip(SUFFIXES, ((torch.uint8,), _HALVES, (torch.uint8, *_HALVES)), strict=True)
}
_STORED_DTYPES[ORDER] = (torch.int32,)


def read_headers(files: Iterable[str | os.PathLike[str]]) -> Headers:
    """Tensor name -> (shape, dtype; None for one that no weight has) of these files.

    ValueError for a file that is no whole safetensors, and for a tensor that two of them have; FileNotFoundError.
    """
    from safetensors import SafetensorError, safe_open

    found: Headers = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no dict)
                    if name in found:
                        raise ValueError(f"{file}: {name} is in another file, too")
                    view = opened.get_slice(name)
                    found[name] = tuple(view.get_shape()), _DTYPES.get(view.get_dtype())
        except FileNotFoundError:
            raise
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: no whole safetensors file: {error}") from error
    return found


def check_headers(headers: Headers, tensors: Any) -> None:
    """ValueError for files that hold another number of tensors than ``tensors``, or codes of a wrong dtype."""
    for name, (_, dtype) in headers.items():
        dtypes = _STORED_DTYPES.get(name.rpartition(".")[2], (dtype,))
        if dtype not in dtypes:
            got, *allowed = (str(kind).removeprefix("torch.") for kind in (dtype, *dtypes))
            raise ValueError(f"{name} is {got}, and must be {' or '.join(allowed)}")
    if type(tensors) is not int or len(headers) != tensors:
        raise ValueError(
            f"this checkpoint is not whole: config.json speaks of {tensors!r} tensors, and its files hold "
            f"{len(headers)}"
        )


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict to save: weights that transformers ties once, and the markers."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    again = {
        target.removesuffix(".weight") + "."
        for target, source in tied.items()
        if target.endswith(".weight") and source.endswith(".weight") and _share(model, target, source)
    }
    state = {
        name: value
        for name, value in model.state_dict().items()
        if not (name.rpartition(".")[2] in (*STORED, ORDER) and name[: name.rindex(".") + 1] in again)
    }
    for target, source in tied.items():  # of those that stay in float transformers would drop one, too
        if target in state and source in state and state[target].data_ptr() == state[source].data_ptr():
            del state[target]
    real = next((name.removesuffix("_codes") for name in state if name.endswith(".weight_codes")), None)
    for name in (MARKER, real):
        if name is not None:
            state[name] = torch.empty(0, dtype=torch.uint8)
    return state


def _share(model: nn.Module, target: str, source: str) -> bool:
    """Whether the modules of two weights share one packed weight."""
    try:
        modules = [model.get_submodule(name.rpartition(".")[0]) for name in (target, source)]
    except AttributeError:
        return False
    first, second = (getattr(module, "packed", None) for module in modules)
    return first is not None and first is second
