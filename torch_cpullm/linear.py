"""Modules with packed weights: what optimize() puts in the place of nn.Linear and nn.Embedding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from . import ops
from .packing import (
    PackedStack,
    PackedWeight,
    dequantize,
    gathered,
    pack_stored,
    pack_stored_stack,
    stored_form,
    stored_stack,
    unpack,
)

SUFFIXES = ("_codes", "_scales", "_zeros")  # of the three tensors of a packed parameter in a state dict
STORED = tuple("weight" + suffix for suffix in SUFFIXES)
ORDER = "weight_order"  # the name of a PackedLinear's order there

Packed = PackedWeight | PackedStack


def check_order(order: Tensor, k: int) -> Tensor:
    """``order`` as contiguous int32 [k]; ValueError unless it holds each of 0..k-1 once."""
    if order.dtype != torch.int32 or list(order.shape) != [k]:
        raise ValueError(f"{ORDER} must be int32 {[k]}, got {order.dtype} {list(order.shape)}")
    if not torch.equal(order.sort().values, torch.arange(k, dtype=torch.int32)):
        raise ValueError(f"{ORDER} must hold every input 0..{k - 1} once")
    return order.contiguous()


def entry(module: str, parameter: str) -> str:
    """How reports and checkpoints name a parameter: a module's ``weight`` by the module's name."""
    if parameter == "weight":
        return module
    return f"{module}.{parameter}" if module else parameter


class _NoValues(Tensor):
    """Shape, dtype and device of a packed weight; whoever asks for its data would go on with other values."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # results are plain tensors

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """RuntimeError: it has none. (Merging an adapter would add to it, resizing an embedding copy it.)"""
        raise RuntimeError(
            "this weight is packed: it cannot be merged with an adapter, resized or written. "
            "torch_cpullm.restore(model) gives a float model back; merge there and optimize() again, "
            "or leave the adapter unmerged"
        )


class PackedModule(nn.Module, ABC):
    """Holds packed weights outside the reach of ``.to(dtype)``; saves and loads them in canonical row-major form.

    changes: counts the attributes set on any packed module of the process, so that who has seen one need not look at
    all of them again.
    """

    changes = 0
    compute: str | None = None

    def __setattr__(self, name: str, value: object) -> None:
        PackedModule.changes += 1
        super().__setattr__(name, value)  # type: ignore[arg-type]  # torch names tensors and modules only

    def __init__(self, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
        self.dtype = dtype
        self.training = False  # until somebody calls train(), which check_inference() then refuses

    @abstractmethod
    def weights(self) -> Mapping[str, Packed]:
        """Name of the float module's parameter -> its packed form."""

    def check_movable(self, fn: Callable[[Tensor], Tensor]) -> Tensor:
        """``fn`` of a small tensor of this module's dtype; RuntimeError if that is no longer on the CPU."""
        probe = fn(torch.zeros(1, dtype=self.dtype))
        if probe.device.type != "cpu":
            raise RuntimeError(
                f"a model optimised by torch_cpullm stays on the CPU; it cannot be moved to {probe.device}. "
                "torch_cpullm.restore(model) gives a float model back, which can."
            )
        return probe

    def check_inference(self, x: Tensor) -> None:
        """RuntimeError where a gradient is asked for."""
        if (x.requires_grad or self.training) and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "torch_cpullm's packed linears are for inference and have no gradient; "
                "use torch.no_grad(), or torch_cpullm.restore(model) to train"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        probe = self.check_movable(fn)
        if probe.dtype in (torch.float32, torch.bfloat16, torch.float16):
            self.dtype = probe.dtype
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for parameter, packed in self.weights().items():
            stored = stored_stack(packed) if isinstance(packed, PackedStack) else stored_form(unpack(packed))
            for suffix, value in zip(SUFFIXES, stored, strict=True):
                if value is not None:
                    destination[prefix + parameter + suffix] = value

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        names = []
        for parameter, packed in self.weights().items():
            own = [prefix + parameter + suffix for suffix in SUFFIXES]
            names += own
            if prefix + parameter in state_dict:
                errors.append(
                    f"{prefix}{parameter} is a float weight, and the module is packed: name it in "
                    "modules_to_not_convert, or load into torch_cpullm.restore(model)"
                )
            codes, scales, zeros = (state_dict.get(name) for name in own)
            if codes is None or scales is None:
                missing.extend(name for name, value in zip(own, (codes, scales), strict=False) if value is None)
                continue
            try:
                _copy_into(packed, codes, scales, zeros)
            except ValueError as error:
                where = prefix.rstrip(".") if parameter == "weight" else prefix + parameter
                errors.append(f"{where}: {error}")
        rest = {name: value for name, value in state_dict.items() if name not in names}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected, errors)
        for name in names:
            if name in unexpected:
                unexpected.remove(name)

    def _form(self, packed: PackedWeight) -> str:
        zeros = "symmetric" if packed.zeros is None else "minimum"
        if packed.zeros is not None and packed.zeros.dtype == torch.uint8:
            zeros = "zero point"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"bits={packed.bits}, group_size={packed.group_size}, {zeros}, dtype={dtype}"


def _copy_into(packed: Packed, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> None:
    """Overwrite ``packed``, which a tied module may share, with stored weights of the same form."""
    if isinstance(packed, PackedStack):
        old, count = packed.whole, packed.count
        new = pack_stored_stack(codes, scales, zeros, count, packed.n, packed.k, old.bits, old.group_size).whole
    else:
        old = packed
        new = pack_stored(codes, scales, zeros, old.n, old.k, old.bits, old.group_size)
    types, new_types = ([getattr(t, "dtype", None) for t in (w.scales, w.zeros)] for w in (old, new))
    if types != new_types:
        raise ValueError("the saved scales or zeros have another type than the module's")
    for to, value in zip(old.tensors, new.tensors, strict=True):
        if to is not None and value is not None:
            to.copy_(value)


class PackedMatrix(PackedModule):
    """A module with one packed matrix, ``weight`` in the float module."""

    def __init__(self, packed: PackedWeight, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.packed = packed

    def weights(self) -> Mapping[str, PackedWeight]:
        """Name of the float module's parameter -> its packed form."""
        return {"weight": self.packed}

    @property
    def weight(self) -> Tensor:
        """A placeholder [n, k] for code that reads the weight's shape, dtype or device: every element is NaN.

        The values are in :attr:`packed`; :meth:`dequantize` gives them. ``weight.data`` is a RuntimeError.
        """
        empty = torch.full((), torch.nan, dtype=self.dtype).expand(self.packed.n, self.packed.k)
        return empty if torch.compiler.is_compiling() else empty.as_subclass(_NoValues)

    def dequantize(self) -> Tensor:
        """The weight the kernels use, float32 [n, k]."""
        return dequantize(self.packed)


def gather(model: nn.Module) -> None:
    """Move the small packed matrices of ``model`` together, in the order of its modules: see :func:`gathered`."""
    modules = [module for module in model.modules() if isinstance(module, PackedMatrix)]
    weights = list({id(module.packed): module.packed for module in modules}.values())  # tied ones once
    moved = {id(old): new for old, new in zip(weights, gathered(weights), strict=True)}
    for module in modules:
        module.packed = moved[id(module.packed)]


class PackedLinear(PackedMatrix, nn.Linear):  # type: ignore[override]  # weight is read only
    """``y = x W^T + bias`` with packed W [out_features, in_features]; x [.., in_features] fp32 | bf16 | fp16.

    An nn.Linear, so that adapters (PEFT) take it for a base layer: they call it and add what they have learnt.
    For inference only. compute: ``"int8"`` or ``"fp32"``, see :func:`torch_cpullm.ops.linear`. order: None, or int32
    [in_features]: input j of ``packed`` is input order[j] of x, so that the inputs of a group are neighbours (GPTQ's
    desc_act). ValueError where it is no permutation.
    """

    bias: nn.Parameter | None  # type: ignore[assignment]
    compute: str

    def __init__(
        self,
        packed: PackedWeight,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype,
        compute: str = "int8",
        order: Tensor | None = None,
    ) -> None:
        super().__init__(packed, dtype)
        ops.check_compute(compute)
        self.in_features, self.out_features = packed.k, packed.n
        self.compute = compute
        self.order = None if order is None else check_order(order, packed.k)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """x [.., in_features] -> [.., out_features] of x's dtype; RuntimeError where a gradient is asked for."""
        self.check_inference(x)
        return ops.linear(x, self.packed, self._parameters["bias"], self.order, self.compute)  # faster than self.bias

    def in_order(self, weight: Tensor) -> Tensor:
        """A weight [n, k] whose inputs are those of ``packed`` with its inputs as those of x."""
        if self.order is None:
            return weight
        return torch.empty_like(weight).index_copy_(1, self.order.long(), weight)

    def dequantize(self) -> Tensor:
        """The weight the kernels use, float32 [n, k], inputs as those of x."""
        return self.in_order(super().dequantize())

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.order is not None:
            destination[prefix + ORDER] = self.order

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        name = prefix + ORDER
        order = state_dict.get(name)
        if order is None or self.order is None:
            if order is not self.order:
                errors.append(f"{prefix.rstrip('.')}: {ORDER} is {'missing' if order is None else 'not expected'}")
        else:
            try:
                self.order = check_order(order, self.in_features).clone()  # another tensor: layer programs look at it
            except ValueError as error:
                errors.append(f"{prefix.rstrip('.')}: {error}")
        rest = {key: value for key, value in state_dict.items() if key != name}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected, errors)

    def extra_repr(self) -> str:
        """The text between the brackets of ``repr()``."""
        order = "" if self.order is None else ", inputs in an order of their own"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self._form(self.packed)}, compute={self.compute}{order}"
        )


def has_adapter(module: nn.Module) -> bool:
    """Whether ``module`` stands around another one, ``base_layer``, and adds to what that computes, as PEFT has it."""
    return isinstance(module._modules.get("base_layer"), nn.Module) and hasattr(module, "_disable_adapters")


class PackedEmbedding(PackedMatrix):
    """Rows of packed W [num_embeddings, embedding_dim]: ids [..] -> [.., embedding_dim] of ``dtype``.

    multiplier: rows are multiplied by it in ``dtype`` (models that scale their embeddings).
    """

    def __init__(
        self,
        packed: PackedWeight,
        *,
        dtype: torch.dtype,
        padding_idx: int | None = None,
        multiplier: float | None = None,
    ) -> None:
        super().__init__(packed, dtype)
        self.num_embeddings, self.embedding_dim = packed.n, packed.k
        self.padding_idx = padding_idx
        self.multiplier = multiplier

    def forward(self, ids: Tensor) -> Tensor:
        """Ids int64 | int32 [..] -> [.., embedding_dim] of ``dtype``; RuntimeError for an id out of range."""
        rows = ops.embedding(ids, self.packed, self.dtype)
        return rows if self.multiplier is None else rows * torch.tensor(self.multiplier, dtype=self.dtype)

    def extra_repr(self) -> str:
        """The text between the brackets of ``repr()``."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self._form(self.packed)}"
