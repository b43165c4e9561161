"""Mixtures of experts: which modules are one, and the module with packed weights that takes their place.

transformers keeps the experts of a layer in two parameters: gate_up_proj [experts, 2 intermediate, hidden], the gate's
rows above those of up, and down_proj [experts, hidden, intermediate]. Experts in another layout, or that compute
something else, stay as they are; :func:`read_experts` says why.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from . import ops
from .layer_spec import ACTIVATIONS
from .linear import PackedModule
from .packing import PackedStack
from .reference import activate

WEIGHTS = ("gate_up_proj", "down_proj")


class PackedExperts(PackedModule):
    """``y[t] = sum_s weights[t, s] down_e (act(gate_e x[t]) * (up_e x[t]))``, e = index[t, s], with packed weights.

    gate_up [experts, 2 intermediate, hidden], down [experts, hidden, intermediate]. For inference only. act, compute:
    see :func:`torch_cpullm.ops.experts`. Raises ValueError where the shapes do not fit each other.
    """

    compute: str

    def __init__(
        self, gate_up: PackedStack, down: PackedStack, *, act: str, dtype: torch.dtype, compute: str = "int8"
    ) -> None:
        super().__init__(dtype)
        ops.check_compute(compute)
        if act not in ACTIVATIONS:
            raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
        if (gate_up.count, gate_up.n, gate_up.k) != (down.count, 2 * down.k, down.n):
            shapes = [[each.count, each.n, each.k] for each in (gate_up, down)]
            raise ValueError(f"gate_up must be [e, 2 i, h] and down [e, h, i], got {shapes[0]} and {shapes[1]}")
        self.gate_up, self.down, self.act, self.compute = gate_up, down, act, compute
        self.num_experts, self.hidden_dim, self.intermediate_dim = down.count, down.n, down.k

    def weights(self) -> Mapping[str, PackedStack]:
        """Name of the float module's parameter -> its packed form."""
        return dict(zip(WEIGHTS, (self.gate_up, self.down), strict=True))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, hidden], top_k_index and top_k_weights [tokens, top_k] -> [tokens, hidden].

        RuntimeError for an index that is no expert, and where a gradient is asked for.
        """
        self.check_inference(hidden_states)
        return ops.experts(hidden_states, top_k_index, top_k_weights, self.gate_up, self.down, self.act, self.compute)

    def extra_repr(self) -> str:
        """The text between the brackets of ``repr()``."""
        return (
            f"{self.num_experts} experts, hidden={self.hidden_dim}, intermediate={self.intermediate_dim}, "
            f"act={self.act}, {self._form(self.gate_up.whole)}, compute={self.compute}"
        )


def has_experts(module: nn.Module) -> bool:
    """Whether ``module`` holds two 3-D parameters by the names of :data:`WEIGHTS`."""
    found = (module._parameters.get(name) for name in WEIGHTS)
    return all(parameter is not None and parameter.dim() == 3 for parameter in found)


def read_experts(module: nn.Module) -> tuple[str, str]:
    """(activation, "") of a module for which :func:`has_experts` holds, or ("", why it must stay in float)."""
    gate_up, down = (module.get_parameter(name) for name in WEIGHTS)
    held = [name for held in (module._parameters, module._buffers) for name in held if name not in WEIGHTS]
    held += [name for child in module.children() for name, _ in (*child.named_parameters(), *child.named_buffers())]
    count, hidden, width = down.shape
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "", "its experts are parametrised"
    if "forward" in module.__dict__:
        return "", "its forward was replaced on the instance"
    if module._forward_hooks or module._forward_pre_hooks:
        return "", "it has forward hooks"
    if gate_up.dtype != down.dtype or not gate_up.is_floating_point() or gate_up.dtype.itemsize not in (2, 4):
        return "", f"its experts are {gate_up.dtype} and {down.dtype}".replace("torch.", "")
    if held:
        return "", f"its experts have {held[0]!r}, which the operator for experts does not know"
    if 0 in down.shape or gate_up.shape != (count, 2 * width, hidden):
        turned = gate_up.shape == (count, width, 2 * hidden)
        shapes = f"{list(gate_up.shape)} and {list(down.shape)}"
        return "", f"its experts are stored transposed: {shapes}" if turned else f"its experts are {shapes}"
    act = _activation(module)
    return (act, "") if act else ("", f"{type(module).__name__} does not compute what gated experts do")


def _activation(module: nn.Module) -> str:
    """The activation with which ``module`` computes what :class:`PackedExperts` does, found by trying; else "".

    A copy with tiny random weights is called with small values and with large ones, which show a clamp.
    """
    count, hidden, width, tokens = len(module.get_parameter(WEIGHTS[0])), 16, 8, 6
    seeded = torch.Generator().manual_seed(0)
    gate_up = torch.randn(count, 2 * width, hidden, generator=seeded, dtype=torch.float32, device="cpu")
    down = torch.randn(count, hidden, width, generator=seeded, dtype=torch.float32, device="cpu")
    x = torch.randn(tokens, hidden, generator=seeded, dtype=torch.float32, device="cpu")
    x[tokens // 2 :] *= 30
    slots = torch.arange(tokens * min(2, count), device="cpu").view(tokens, -1)
    index = slots * (count // 2 + 1) % count if count > 1 else slots * 0
    weights = torch.rand(index.shape, generator=seeded, dtype=torch.float32, device="cpu") + 0.1
    probe = copy.copy(module)
    parameters = zip(WEIGHTS, (gate_up, down), strict=True)
    probe.__dict__["_parameters"] = {name: nn.Parameter(value, requires_grad=False) for name, value in parameters}
    try:
        with torch.no_grad():
            got = probe(x.clone(), index.clone(), weights.clone())
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, KeyError):
        return ""
    if not isinstance(got, Tensor) or got.shape != x.shape:
        return ""
    gate, up = torch.einsum("th,tsnh->tsn", x, gate_up[index]).chunk(2, -1)
    for act in ACTIVATIONS:
        inner = weights[..., None] * activate(act, gate) * up
        want = torch.einsum("tsi,tshi->th", inner, down[index])
        error = (got.float() - want).norm(dim=-1) / want.norm(dim=-1)
        if float(error.max()) <= 1e-4:
            return act
    return ""
