"""Mixed precision: what each weight's rounding costs in KL, and bits spent where they save most.

    KL(unit, form)  ~  1/2 sum_i G_i  D_i H D_i^T      D = rounded - float, row i of n;  H = E[x x^T] of its inputs;
                                                       G_i = E[g_i^2], g the gradient of -log p(y) by output i

to second order, with y drawn from the model itself, gradients and inputs taken as independent. One backward pass gives
all G, a walk over the layers all H, one layer at a time. Source: the Kronecker-factored Fisher matrix, Martens and
Grosse 2015; as a measure of quantisation, HAWQ-V2, Dong et al. 2019.
"""

from __future__ import annotations

import copy
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .checkpoint import Form
from .devices import device_of, model_on
from .folding import matrix
from .layerwise import Method, capture, decoder_layers, look, quantize, run_layer
from .packing import dequantize, resolve_group
from .quant import Statistics


@dataclass(frozen=True)
class Unit:
    """Modules that read one input and so get one form. kl: estimated KL in nats per token for each form asked about."""

    names: tuple[str, ...]
    weights: int
    bits: tuple[float, ...]  # stored bits of all its weights, per form
    kl: tuple[float, ...]


def stored_bits(form: Form, n: int, k: int) -> int:
    """Bits of codes, scales and zeros of a weight [n, k], padded as the kernels read it."""
    rows, inputs = -(-n // 32) * 32, -(-k // 32) * 32
    groups = -(-k // resolve_group(form.group_size, k))
    per_group = 16 + {"none": 0, "point": 8, "minimum": 16}[form.zeros]
    return rows * (inputs * form.bits + groups * per_group)


def gradient_squares(model: nn.Module, names: Sequence[str], ids: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Name of a linear -> E[g^2], float32 [n]: squared gradients of -log p(y) by its outputs, y drawn from the model.

    Parameters get no gradients, and ``requires_grad`` is as before afterwards.
    """
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, Tensor] = {}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    outs: list[tuple[str, Tensor]] = []

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, out: Tensor) -> None:
            if out.requires_grad:
                out.retain_grad()
                outs.append((name, out))

        return hook

    def begin(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        return out.detach().requires_grad_()

    embedding = cast("Any", model).get_input_embeddings()
    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    handles.append(embedding.register_forward_hook(begin))
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            for row in ids.to(device_of(model)):
                outs.clear()
                logits = model(row[None], use_cache=False).logits[0].float()
                drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
                nn.functional.cross_entropy(logits, drawn.to(logits.device), reduction="sum").backward()
                for name, out in outs:
                    gradient = cast("Tensor", out.grad).detach().flatten(0, -2).float()
                    sums[name] = sums.get(name, torch.zeros(())) + gradient.square().sum(0)
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
    return {name: total / ids.numel() for name, total in sums.items()}


def sensitivities(
    model: nn.Module,
    ids: Tensor,
    names: Sequence[str],
    forms: Sequence[Form],
    *,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> list[Unit]:
    """What each form costs in KL for every unit among the linears ``names``, on tokens ids [sequences, s].

    Linears inside the decoder layers, and the output head if it is named. Weights are rounded with an
    activation-weighted clip search. device: where the float model computes; None: where it is, else a copy there.
    Raises ValueError as :func:`torch_cpullm.layerwise.calibrate`.
    """
    model = model_on(model, device)
    squares = gradient_squares(model, names, ids, seed)
    prefix, layers = decoder_layers(model)
    units = []
    inputs, calls = capture(model, layers, ids)
    with torch.no_grad():
        for index, original in enumerate(tqdm(layers, desc="sensitivity", unit="layer", disable=not progress)):
            where = f"{prefix}.{index}."
            own = [name.removeprefix(where) for name in names if name.startswith(where)]
            layer = copy.deepcopy(original).float().requires_grad_(False)
            seen = look(layer, own, inputs, calls[index], where)
            for first, statistics in seen.statistics.items():
                together = [name for name in own if seen.shared.get(name) == first]
                weights = {where + name: matrix(layer.get_submodule(name)) for name in together}
                units.append(_unit(weights, statistics, squares, forms))
            for k, x in enumerate(inputs):
                inputs[k] = run_layer(layer, x, calls[index])
        head = cast("Any", model).get_output_embeddings()
        outside = [name for name in names if model.get_submodule(name) is head]
        if outside:
            units.append(_unit({outside[0]: matrix(head)}, _head_inputs(model, head, ids), squares, forms))
    return units


def _head_inputs(model: nn.Module, head: nn.Module, ids: Tensor) -> Statistics:
    found = [Statistics.empty(matrix(head).shape[1], device_of(model))]

    def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        found[0] = found[0].with_rows(arguments[0])

    handle = head.register_forward_pre_hook(hook)
    try:
        for row in ids.to(device_of(model)):
            model(row[None], use_cache=False)
    finally:
        handle.remove()
    return found[0]


def _unit(
    weights: Mapping[str, Tensor], statistics: Statistics, squares: Mapping[str, Tensor], forms: Sequence[Form]
) -> Unit:
    kl, bits = [], []
    for form in forms:
        cost = 0.0
        for name, weight in weights.items():
            rounded = quantize(weight, statistics, form, Method("clip")).to(weight.device)
            change = dequantize(rounded) - weight.float()
            rows = ((change @ statistics.second) * change).sum(1)
            cost += 0.5 * float((squares[name] * rows).sum()) if name in squares else 0.0
        kl.append(cost)
        bits.append(float(sum(stored_bits(form, *weight.shape) for weight in weights.values())))
    return Unit(tuple(weights), sum(weight.numel() for weight in weights.values()), tuple(bits), tuple(kl))


def allocate(units: Sequence[Unit], forms: Sequence[Form], budget_bits: float) -> dict[str, Form]:
    """Module name -> form: the least sum of KL found within ``budget_bits`` stored bits per weight.

    Greedy: from the smallest form of each unit on, the step that saves most KL per bit is taken while it fits.
    Raises ValueError where the smallest forms do not fit. Deterministic: ties go to the first unit.
    """
    total = sum(unit.weights for unit in units)
    chosen = [min(range(len(forms)), key=lambda f, unit=unit: (unit.bits[f], unit.kl[f])) for unit in units]  # type: ignore[misc]
    spent = sum(unit.bits[f] for unit, f in zip(units, chosen, strict=True))
    limit = budget_bits * total
    if not units or spent > limit:
        smallest = spent / total if total else 0.0
        raise ValueError(f"budget_bits={budget_bits:g} cannot be met: the smallest forms need {smallest:.3f} bits")
    heap: list[tuple[float, int, int]] = []

    def offer(index: int) -> None:
        unit, now = units[index], chosen[index]
        for f in range(len(forms)):
            saved, more = unit.kl[now] - unit.kl[f], unit.bits[f] - unit.bits[now]
            if saved > 0 and more > 0:
                heapq.heappush(heap, (-saved / more, index, f))

    for index in range(len(units)):
        offer(index)
    while heap:
        rate, index, f = heapq.heappop(heap)
        unit, now = units[index], chosen[index]
        saved, more = unit.kl[now] - unit.kl[f], unit.bits[f] - unit.bits[now]
        if saved <= 0 or more <= 0 or -saved / more != rate:
            continue  # offered before the unit's last step
        if spent + more <= limit:
            chosen[index], spent = f, spent + more
            offer(index)
    return {name: forms[f] for unit, f in zip(units, chosen, strict=True) for name in unit.names}
