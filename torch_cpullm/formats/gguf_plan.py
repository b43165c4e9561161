"""Plan: which tensor of a GGUF file goes where in the model, from names and shapes alone, before a weight is read."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from .gguf_hf import tensor_names, tensor_processor
from .gguf_reader import GgufFile, GgufTensor

__all__ = ["Matrix", "Plan", "embedding_multiplier", "make_plan"]


@dataclass(frozen=True)
class Matrix:
    """A 2-D tensor and the linear or embedding it belongs to."""

    tensor: GgufTensor
    module: str
    rows: np.ndarray | None  # row order, see quantized_weight


@dataclass(frozen=True)
class Plan:
    """Which tensor of the file goes where. Made from names and shapes alone, before any weight is read."""

    names: dict[str, str]  # GGUF name -> state dict name
    processor: Any
    matrices: list[Matrix]
    plain: list[tuple[GgufTensor, str]]  # read as floats, with the state dict name
    tied: dict[str, str]  # state dict name -> the one whose data it shares


def _row_order(processor: Any, names: dict[str, str], tensor: GgufTensor, conv1d: bool) -> np.ndarray | str | None:
    """What transformers' converter does to this matrix: None (nothing), int [n] (moves rows), or "other".

    Asked by sending numbered elements through it. A Conv1D (GPT-2) wants the transpose of what the file stores and
    what a packed weight holds, so for that class transposing counts as nothing.
    """
    n, k = tensor.shape
    probe = np.broadcast_to(np.int32(0), (n, k))  # no memory: vocabularies are large and never reordered
    if not conv1d and _converted(processor, names, tensor, probe) is probe:
        return None
    numbered = np.arange(n * k, dtype=np.int64).reshape(n, k)
    moved = _converted(processor, names, tensor, numbered)
    if moved is None:
        return "other"
    if conv1d:
        moved = moved.T
    if moved.shape != (n, k) or moved.dtype != numbered.dtype:
        return "other"
    rows = moved[:, 0] // k
    if not np.array_equal(np.sort(rows), np.arange(n)) or not np.array_equal(moved, numbered[rows]):
        return "other"
    return None if np.array_equal(rows, np.arange(n)) else rows


def _converted(processor: Any, names: dict[str, str], tensor: GgufTensor, array: np.ndarray) -> np.ndarray | None:
    """What the converter makes of this array in the tensor's place, None where it makes no one array of it."""
    stored: dict[str, Any] = {"tensors": {}}
    try:
        with np.errstate(all="ignore"):
            result = processor.process(
                weights=array, name=tensor.name, tensor_key_mapping=names, parsed_parameters=stored
            )
    except (ValueError, TypeError, KeyError, IndexError):
        return None  # the same call on the real values decides
    if result.name is not None:
        return result.weights
    return stored["tensors"][names[tensor.name]].numpy() if set(stored["tensors"]) == {names[tensor.name]} else None


def make_plan(file: GgufFile, model: Any) -> Plan:
    """Matches tensors with modules. Raises ValueError for missing, superfluous or misshapen tensors."""
    from transformers.pytorch_utils import Conv1D

    processor = tensor_processor(file, model.config)
    names = tensor_names(file, model, processor)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tied = {name: source for name, source in model.all_tied_weights_keys.items() if name in wanted}
    embedding = model.get_input_embeddings()
    matrices: list[Matrix] = []
    plain: list[tuple[GgufTensor, str]] = []
    orders: dict[tuple, Any] = {}
    for tensor in file.tensors.values():
        target = names.get(tensor.name) or names.get(tensor.name.removesuffix(".weight"))
        if target is None:
            continue
        path, _, attribute = target.rpartition(".")
        module = model.get_submodule(path)
        conv1d = isinstance(module, Conv1D)
        known = conv1d or _is_linear(module) or module is embedding
        if attribute != "weight" or len(tensor.shape) != 2 or not known:
            plain.append((tensor, target))
            continue
        expected = wanted[target][::-1] if conv1d else wanted[target]
        if tensor.shape != expected:
            raise ValueError(
                f"{file.path}: tensor {tensor.name!r} has the shape {list(tensor.shape)}, "
                f"the metadata says {list(expected)}"
            )
        kind = (re.sub(r"\d+", "N", tensor.name), tensor.shape)
        if kind not in orders:
            orders[kind] = _row_order(processor, names, tensor, conv1d)
        if isinstance(orders[kind], str):
            plain.append((tensor, target))
        else:
            matrices.append(Matrix(tensor, path, orders[kind]))
    _check_complete(file, model, names, {f"{m.module}.weight" for m in matrices} | {target for _, target in plain})
    return Plan(names, processor, matrices, plain, tied)


# Tensors that are no weights of the model: RoPE divisors have gone into the config.
_NOT_WEIGHTS = re.compile(
    r"rope_freqs\.weight|rope_factors_(long|short)\.weight|.*\.attn_rot_embd\.weight|.*\.rope_freqs\.weight"
)


def _check_complete(file: GgufFile, model: Any, names: dict[str, str], covered: set[str]) -> None:
    """Every parameter needs a tensor and every tensor of a layer a place."""
    tied = model.all_tied_weights_keys
    stored_as = {target: name for name, target in names.items()}
    missing = [
        stored_as.get(name, name)
        for name, _ in model.named_parameters(remove_duplicate=False)
        if name not in covered and tied.get(name) not in covered
    ]
    if missing:
        raise ValueError(f"{file.path}: {_count(missing)} missing: {_some(missing)}")
    layers = model.config.num_hidden_layers
    unknown = [
        name
        for name in file.tensors
        if name not in names and name.removesuffix(".weight") not in names and not _NOT_WEIGHTS.fullmatch(name)
    ]
    in_layers = [name for name in unknown if (m := re.match(r"blk\.(\d+)\.", name)) and int(m[1]) < layers]
    if in_layers:
        raise ValueError(
            f"{file.path}: {type(model).__name__} has no place for {_count(in_layers)} of the file: {_some(in_layers)}"
        )
    if unknown:
        warnings.warn(
            f"{file.path}: {_count(unknown)} of the file unused by {type(model).__name__}: {_some(unknown)}",
            stacklevel=5,
        )


def _count(names: list[str]) -> str:
    return f"{len(names)} tensor" + ("s" if len(names) > 1 else "")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _is_linear(module: Any) -> bool:
    """Whether a module computes what nn.Linear does. Subclasses (FalconLinear) are tried on two rank-one weights."""
    if not isinstance(module, nn.Linear) or type(module) is nn.Linear:
        return isinstance(module, nn.Linear)
    weight, bias = module.weight, module.bias
    n, k = weight.shape
    x = torch.linspace(-1, 1, 3 * k, dtype=weight.dtype).view(3, k)
    try:
        module.bias = None if bias is None else nn.Parameter(torch.linspace(-1, 1, n, dtype=bias.dtype), False)
        for vector in (
            torch.linspace(-1, 1, n, dtype=weight.dtype)[:, None],
            torch.linspace(1, 2, k, dtype=weight.dtype),
        ):
            module.weight = nn.Parameter(vector.expand(n, k), False)
            want = nn.functional.linear(x, module.weight, module.bias)
            got = module(x)
            if got.shape != want.shape or not torch.allclose(got, want, rtol=2e-2, atol=1e-5):
                return False
        return True
    finally:
        module.weight, module.bias = weight, bias


def embedding_multiplier(module: Any) -> float | None:
    """What an embedding class multiplies its rows by; 1 for other modules; None where it does anything else."""
    if not isinstance(module, nn.Embedding) or type(module) is nn.Embedding:
        return 1.0
    weight = module.weight
    try:
        found = []
        for value in (1.0, 2.0):
            constant = torch.full((), value, dtype=weight.dtype).expand(weight.shape)
            module.weight = nn.Parameter(constant, requires_grad=False)
            rows = module(torch.zeros(1, dtype=torch.int64)).float() / value
            found += [float(rows.min()), float(rows.max())]
        return found[0] if len(set(found)) == 1 else None
    finally:
        module.weight = weight
