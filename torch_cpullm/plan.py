"""Which modules of a model are replaced by packed ones, and what each of them becomes.

Works on a model whose weights are there and on one that is still on the meta device, as transformers' loader has it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .config import Recipe, Settings
from .coverage import ADAPTER, EXCLUDED, ROUTER, of_adapters, report_with
from .experts import WEIGHTS, PackedExperts, has_experts, read_experts
from .layer_parts import ROLE_OF
from .linear import Packed, PackedEmbedding, PackedLinear, PackedModule, entry
from .packing import PackedStack, PackedWeight, pack, stack
from .quant import quantize_rtn
from .share import Cut


@dataclass
class Target:
    """A module to replace. A weight is [n, k] whatever the module stores, those of experts are [experts, n, k]."""

    names: list[str]  # every place the module is registered at
    module: nn.Module
    kind: str  # linear, conv1d, embedding or experts
    recipe: Recipe | None = None  # None: a checkpoint has it in packed form
    head: bool = False  # the model's output head
    act: str = ""  # of experts
    cut: Cut | None = None  # of a linear: this rank's share of it

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

    def packed(self, stored: Tensor) -> Packed:
        """The packed form of a weight as the module stores it; ValueError, naming the module, if it has none."""
        weight = stored.detach()
        if self.kind == "experts":
            return self.packed_experts(len(weight), lambda i: weight[i])
        return self._matrix(weight)

    def packed_experts(self, count: int, expert: Callable[[int], Tensor]) -> PackedStack:
        """:meth:`packed` of experts' weights that come one after the other, each once."""
        return stack(count, lambda i: self._matrix(expert(i)))

    def _matrix(self, weight: Tensor) -> PackedWeight:
        check_weight(self.name, weight)
        weight = weight.T if self.kind == "conv1d" else weight
        if self.cut is not None:
            weight = weight[self.cut.rows, self.cut.inputs].contiguous()
        return pack(quantize_rtn(weight, *cast("Recipe", self.recipe)))

    def replacement(
        self, packed: list[Packed], dtype: torch.dtype, compute: str, order: Tensor | None = None
    ) -> PackedModule:
        """The module that takes this one's place. It remembers this one, without its weights, for restore().

        packed: of the weights, in the order of :attr:`parameters`. order: of a linear's inputs, see
        :class:`PackedLinear`; ValueError for one of an embedding.
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
            if order is not None:
                raise ValueError(f"{self.name} is an embedding, and cannot have its inputs in another order")
            plain = type(self.module).forward is nn.Embedding.forward
            multiplier = None if plain else embedding_multiplier(self.module)
            new = PackedEmbedding(matrix, dtype=dtype, padding_idx=self.module.padding_idx, multiplier=multiplier)
        else:
            compute = head_compute(compute) if self.head else compute
            bias = cast("Tensor | None", self.module.bias)
            if self.cut is not None:
                if order is not None:
                    raise ValueError(f"{self.name} has its inputs in another order (desc_act), and cannot be cut")
                bias = self.cut.bias(bias)
            linear = PackedLinear if self.cut is None else self.cut.kind
            new = linear(matrix, bias, dtype=dtype, compute=compute, order=order)
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
    mixtures: list[tuple[str, int, int]] = []  # experts packed, or left by the settings: name, how many, hidden
    adapters, text = of_adapters(model), _text_model(model, embedding)
    closed: list[str] = []  # prefixes of modules that read their children's weights themselves
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _READS_CHILDREN):
            closed.append(name + "." if name else "")
        kind = _kind(module, module is embedding)
        if isinstance(module, PackedExperts):
            mixtures.append((name, module.num_experts, module.hidden_dim))
        if kind is None:
            continue
        if module in targets:
            targets[module].names.append(name)
            continue
        recipe = settings.recipe(name.removesuffix(".base_layer"), module is head or module is embedding)
        if name in adapters:
            skipped[name] = ADAPTER
        elif recipe is None or not all(map(settings.converts, _names(name, kind))):
            skipped[name] = EXCLUDED
            if kind == "experts":
                count, hidden, _ = module.get_parameter(WEIGHTS[1]).shape
                mixtures.append((name, count, hidden))
        elif not name.startswith(text) and module is not head:
            skipped[name] = f"outside of the text model, {text.rstrip('.')}"
        elif any(name.startswith(prefix) for prefix in closed):
            skipped[name] = "its parent reads the weight without calling it"
        else:
            target = Target([name], module, kind, recipe, module is head)
            reason = _unsuitable(target)
            if reason:
                skipped[name] = reason
            else:
                targets[module] = target
    for target in targets.values():
        if target.kind == "experts":
            count, hidden, _ = target.parameters[WEIGHTS[1]].shape
            mixtures += [(name, count, hidden) for name in target.names]
    for name, count, hidden in mixtures:
        skipped.update(dict.fromkeys(_routers(model, name, (count, hidden), targets), ROUTER))
    return list(targets.values()), skipped


def _names(name: str, kind: str) -> tuple[str, ...]:
    """What the settings may exclude a module by: its name, or that of one of its experts' parameters."""
    return (name, *(f"{name}.{weight}" for weight in WEIGHTS)) if kind == "experts" else (name,)


def _routers(model: nn.Module, experts: str, shape: tuple[int, int], targets: Collection[nn.Module]) -> Iterator[str]:
    """Modules beside the experts of this name, still float, with a weight [experts, hidden]: they choose."""
    parent = experts.rpartition(".")[0]
    for child, module in model.get_submodule(parent).named_children():
        weight = module._parameters.get("weight")
        if weight is not None and weight.shape == shape and module not in targets:
            yield f"{parent}.{child}" if parent else child


_READS = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "up", "up": "up"}


def sharing_inputs(names: Iterable[str]) -> list[list[str]]:
    """Those of the dotted names of linears that read one input beside each other: q, k and v; gate and up."""
    together: dict[tuple[str, str], list[str]] = {}
    for name in names:
        parent, _, child = name.removesuffix(".base_layer").rpartition(".")
        reads = _READS.get(ROLE_OF.get(child, ""))
        if reads:
            together.setdefault((parent, reads), []).append(name)
    return [group for group in together.values() if len(group) > 1]


def check_recipes(recipes: dict[str, Recipe], groups: Iterable[list[str]], shared: str) -> None:
    """ValueError, naming two modules, where the recipes within a group differ. shared: what its modules share."""
    for group in groups:
        first = group[0]
        for name in group[1:]:
            if recipes[name] != recipes[first]:
                raise ValueError(
                    f"overrides: {first} ({recipes[first]}) and {name} ({recipes[name]}) share {shared} and must get "
                    "the same"
                )


def check_overrides(settings: Settings, targets: list[Target], skipped: Iterable[str], tied: dict[str, str]) -> None:
    """ValueError for overrides that match nothing, or differ where an input or a weight is shared.

    tied: names of weights, as transformers' ``all_tied_weights_keys`` has them.
    """
    recipes = {name: cast("Recipe", target.recipe) for target in targets for name in target.names}
    settings.check_overrides([*recipes, *skipped])
    check_recipes(recipes, sharing_inputs(recipes), "an input")
    weights: dict[int, list[str]] = {}
    for target in targets:
        for stored in target.parameters.values():
            weights.setdefault(id(stored), []).append(target.name)
    pairs = [[name.removesuffix(".weight") for name in pair] for pair in tied.items()]
    check_recipes(recipes, [*weights.values(), *(pair for pair in pairs if recipes.keys() >= set(pair))], "a weight")


def stored_targets(model: nn.Module, is_stored: Callable[[str], bool]) -> list[Target]:
    """What a checkpoint has in packed form. is_stored: whether it has the entry of this name so.

    ValueError for experts that it has in packed form and this version of transformers in one that has none.
    """
    head = _method_result(model, "get_output_embeddings")
    targets: dict[nn.Module, Target] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        kind = _kind(module, isinstance(module, nn.Embedding))
        if kind is None:
            continue
        target = Target([name], module, kind, head=module is head)
        if module in targets:
            targets[module].names.append(name)
        elif all(is_stored(entry(name, weight)) for weight in target.parameters):
            targets[module] = target
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


def _text_model(model: nn.Module, embedding: nn.Module | None) -> str:
    """What the names inside the text model of a model for several media start with; empty where all is text.

    It is the model with a config of its own that holds the input embedding.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or embedding is None:
        return ""
    try:
        if config.get_text_config(decoder=True) is config:
            return ""
    except ValueError:  # several
        return ""
    modules = dict(model.named_modules())
    name = next(name for name, module in modules.items() if module is embedding)
    while name and not hasattr(modules[name], "config"):
        name = name.rpartition(".")[0]
    return name and name + "."


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
    if probe.padding_idx is not None:
        probe.padding_idx = min(probe.padding_idx, 1)  # torch wants it among the two rows
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
