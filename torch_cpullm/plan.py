"""Which modules of a model are replaced by packed ones, and what each of them becomes.

Works on a model whose weights are there and on one that is still on the meta device, as transformers' loader has it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from .config import SCALE_DTYPES, Settings
from .coverage import EXCLUDED, ROUTER, report_with
from .experts import WEIGHTS, PackedExperts, has_experts, read_experts
from .linear import Packed, PackedEmbedding, PackedLinear, PackedModule, entry
from .packing import PackedStack, PackedWeight, pack, stack
from .quant import quantize_rtn


@dataclass
class Target:
    """A module to replace. A weight is [n, k] whatever the module stores, those of experts are [experts, n, k]."""

    names: list[str]  # every place the module is registered at
    module: nn.Module
    kind: str  # linear, conv1d, embedding or experts
    bits: int
    head: bool = False  # the model's output head
    act: str = ""  # of experts

    @property
    def name(self) -> str:
        """The first of the names."""
        return self.names[0]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Name -> weight as the module has it."""
        names = WEIGHTS if self.kind == "experts" else ("weight",)
        return {name: getattr(self.module, name) for name in names}

    def shape(self, stored: Tensor) -> list[int]:
        """The shape of a weight, from the one that the module stores."""
        return [*stored.shape[::-1]] if self.kind == "conv1d" else [*stored.shape]

    def group_size(self, settings: Settings) -> int:
        """Inputs per scale: as the settings say, 32 for what they leave in 8 bits."""
        return settings.group_size if self.bits == 4 or settings.bits == 8 else 32

    def packed(self, stored: Tensor, settings: Settings) -> Packed:
        """The packed form of a weight as the module stores it; ValueError, naming the module, if it has none."""
        weight = stored.detach()
        check_weight(self.name, weight)
        group_size = self.group_size(settings)
        scale_dtype = SCALE_DTYPES[settings.scale_dtype]

        def matrix(weight: Tensor) -> PackedWeight:
            return pack(quantize_rtn(weight, self.bits, group_size, settings.sym, scale_dtype))

        if self.kind == "experts":
            return stack(len(weight), lambda i: matrix(weight[i]))
        return matrix(weight.T if self.kind == "conv1d" else weight)

    def replacement(self, packed: list[Packed], dtype: torch.dtype, compute: str) -> PackedModule:
        """The module that takes this one's place. It remembers this one, without its weights, for restore().

        packed: of the weights, in the order of :attr:`parameters`.
        """
        if self.kind == "experts":
            gate_up, down = cast("list[PackedStack]", packed)
            experts = PackedExperts(gate_up, down, act=self.act, dtype=dtype, compute=compute)
            experts.train(self.module.training)
            keep_original(experts, self.module)
            return experts
        (matrix,) = cast("list[PackedWeight]", packed)
        new: PackedLinear | PackedEmbedding
        if isinstance(self.module, nn.Embedding):
            plain = type(self.module).forward is nn.Embedding.forward
            multiplier = None if plain else embedding_multiplier(self.module)
            new = PackedEmbedding(matrix, dtype=dtype, padding_idx=self.module.padding_idx, multiplier=multiplier)
        else:
            compute = head_compute(compute) if self.head else compute
            new = PackedLinear(matrix, cast("Tensor | None", self.module.bias), dtype=dtype, compute=compute)
        new.train(self.module.training)
        keep_original(new, self.module)
        return new


def head_compute(compute: str) -> str:
    """How the output head computes. Not in int8: rounding its activations cost as much as in all layers together
    (SmolLM2, KL 0.0021 nats against 0.0012), and one row is bound by memory either way.
    """
    return "fp32" if compute == "int8" else compute


def keep_original(packed: PackedModule, module: nn.Module) -> None:
    """Remember the module that ``packed`` replaces, without its weights: :func:`torch_cpullm.restore` puts it back."""
    module.__dict__.get("_parameters", {}).update(dict.fromkeys(packed.weights()))
    packed.__dict__["_original"] = module


def check_weight(name: str, weight: Tensor) -> None:
    """ValueError, naming the module, for a weight with NaN, inf or values too large for 16-bit scales."""
    low, high = torch.aminmax(weight.detach())
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise ValueError(f"the weight of {name} holds NaN or inf")
    if float(torch.maximum(-low, high)) > 65504:
        raise ValueError(f"the weight of {name} holds values beyond 65504, too large for 16-bit scales")


def check_strict(model: nn.Module, targets: list[Target], skipped: dict[str, str]) -> None:
    """ValueError, with the reasons, if replacing ``targets`` leaves any weight matrix in float."""
    planned = {entry(name, weight) for target in targets for name in target.names for weight in target.parameters}
    left = [row for row in report_with(model, skipped).left_in_float if row.name not in planned]
    if left:
        lines = "\n".join(f"  {row.name}: {row.reason}" for row in left[:8])
        more = f"\n  and {len(left) - 8} more" if len(left) > 8 else ""
        raise ValueError(f"strict=True, but these weights would stay in float:\n{lines}{more}")


def find_targets(model: nn.Module, settings: Settings) -> tuple[list[Target], dict[str, str]]:
    """Modules to replace, and name -> reason for those that stay."""
    head, embedding = (_method_result(model, name) for name in ("get_output_embeddings", "get_input_embeddings"))
    targets: dict[nn.Module, Target] = {}
    skipped: dict[str, str] = {}
    closed: list[str] = []  # prefixes of modules that read their children's weights themselves
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _READS_CHILDREN):
            closed.append(name + "." if name else "")
        kind = _kind(module, module is embedding)
        if kind is None:
            continue
        if module in targets:
            targets[module].names.append(name)
            continue
        bits = settings.head_bits if module is head or module is embedding else settings.bits
        if not all(map(settings.converts, _names(name, kind))) or bits is None:
            skipped[name] = EXCLUDED
        elif any(name.startswith(prefix) for prefix in closed):
            skipped[name] = "its parent reads the weight without calling it"
        else:
            target = Target([name], module, kind, bits, module is head)
            reason = _unsuitable(target)
            if reason:
                skipped[name] = reason
            else:
                targets[module] = target
    for target in targets.values():
        if target.kind == "experts":
            skipped.update(dict.fromkeys(_routers(model, target, targets), ROUTER))
    return list(targets.values()), skipped


def _names(name: str, kind: str) -> tuple[str, ...]:
    """What the settings may exclude a module by: its name, or that of one of its experts' parameters."""
    return (name, *(f"{name}.{weight}" for weight in WEIGHTS)) if kind == "experts" else (name,)


def _routers(model: nn.Module, target: Target, targets: Collection[nn.Module]) -> Iterator[str]:
    """Modules beside these experts, still float, with a weight [experts, hidden]: they choose the experts."""
    count, hidden, _ = target.parameters[WEIGHTS[1]].shape
    for name in target.names:
        parent = name.rpartition(".")[0]
        for child, module in model.get_submodule(parent).named_children():
            weight = module._parameters.get("weight")
            if weight is not None and weight.shape == (count, hidden) and module not in targets:
                yield f"{parent}.{child}" if parent else child


def stored_targets(model: nn.Module, bits: Callable[[str], int | None]) -> list[Target]:
    """What a checkpoint has in packed form. bits: of the entry of this name, None where the checkpoint has floats.

    ValueError for experts that it has in packed form and this version of transformers in one that has none.
    """
    head = _method_result(model, "get_output_embeddings")
    targets: dict[nn.Module, Target] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        kind = _kind(module, isinstance(module, nn.Embedding))
        if kind is None:
            continue
        stored = [bits(entry(name, weight)) for weight in Target([name], module, kind, 0).parameters]
        if module in targets:
            targets[module].names.append(name)
        elif None not in stored:
            targets[module] = target = Target([name], module, kind, cast("int", stored[0]), module is head)
            reason = _read_act(target)
            if reason:
                raise ValueError(f"this checkpoint has packed experts for {name}, but here {reason}")
    return list(targets.values())


def _read_act(target: Target) -> str:
    """Fill in the activation of experts; returns why that cannot be."""
    if target.kind != "experts":
        return ""
    target.act, reason = read_experts(target.module)
    return reason


_READS_CHILDREN = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def _method_result(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return getattr(model, name)()
    except (AttributeError, NotImplementedError):
        return None


def _kind(module: nn.Module, is_embedding: bool) -> str | None:
    if isinstance(module, PackedModule):
        return None
    if has_experts(module):
        return "experts"
    if isinstance(module, nn.Linear):
        return "linear"
    hf = sys.modules.get("transformers.pytorch_utils")
    if hf is not None and isinstance(module, hf.Conv1D):
        return "conv1d"
    return "embedding" if is_embedding and isinstance(module, nn.Embedding) else None


def _unsuitable(target: Target) -> str:
    """Why this module must stay in float, or an empty text. A forward that is not torch's own is tried out."""
    module = target.module
    if target.kind == "experts":
        return _read_act(target)
    weight = target.parameters["weight"]
    if not weight.is_floating_point() or weight.dim() != 2 or weight.dtype.itemsize not in (2, 4):
        return f"its weight is {str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}"
    if 0 in weight.shape:
        return f"its weight is empty: {list(weight.shape)}"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "its weight is parametrised"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks"
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            return "it renormalises its rows (max_norm)"
        if type(module).forward is nn.Embedding.forward:
            return ""
        if embedding_multiplier(module) is not None:
            return ""
        return f"{type(module).__name__} does not compute what nn.Embedding does"
    if target.kind == "conv1d" or type(module).forward is nn.Linear.forward:
        return ""
    if _is_linear_in_effect(cast("nn.Linear", module)):
        return ""
    return f"{type(module).__name__} does not compute what nn.Linear does"


def _is_linear_in_effect(module: nn.Linear) -> bool:
    """Whether a subclass gives x W^T + b in fp32 for small and for large x."""
    try:
        with torch.no_grad():
            probe = copy.deepcopy(module)
            if module.weight.is_meta:
                probe = probe.to_empty(device="cpu")
                for tensor in (*probe.parameters(), *probe.buffers()):
                    values = torch.linspace(-1, 1, tensor.numel(), dtype=torch.float32, device="cpu")
                    tensor.copy_(values.view(tensor.shape))
            probe = probe.float()
            seeded = torch.Generator().manual_seed(0)
            x = torch.randn(4, module.in_features, generator=seeded, dtype=torch.float32, device="cpu")
            x = torch.cat([x, 100 * x])
            want, got = nn.functional.linear(x, probe.weight, probe.bias), probe(x)
            return (
                isinstance(got, Tensor) and got.shape == want.shape and torch.allclose(got, want, rtol=1e-4, atol=1e-4)
            )
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return False


def embedding_multiplier(module: nn.Embedding) -> float | None:
    """The factor by which a subclass scales its rows, None if it does something else; tried on rows of 1 and 2.

    Buffers that are still on the meta device count as ones.
    """
    probe = copy.copy(module)
    probe.__dict__["_buffers"] = {
        name: torch.ones_like(buffer, device="cpu") if buffer is not None and buffer.is_meta else buffer
        for name, buffer in module._buffers.items()
    }
    rows = torch.ones(2, module.embedding_dim, dtype=torch.float32, device="cpu")
    rows[1] = 2
    probe.__dict__["_parameters"] = {"weight": nn.Parameter(rows, requires_grad=False)}
    try:
        with torch.no_grad():
            got = probe(torch.tensor([[0, 1]], device="cpu"))
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return None
    if not isinstance(got, Tensor) or got.shape != (1, 2, module.embedding_dim):
        return None
    factor = float(got[0, 0, 0])
    return factor if torch.equal(got[0].float(), rows * factor) else None
