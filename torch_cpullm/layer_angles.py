"""Cosines and sines of a decode step, from a table of the positions to come instead of a call of the model's module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .layer_parts import own_state

CHUNK = 64  # positions at a time

# Forms of rotary embeddings whose cosines depend on the position alone, not on the longest one of the call.
_BY_POSITION = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class _Table:
    """first: position; state: of the module; made: cosines and sines; held: buffers, so that no other gets their id."""

    first: int
    dtype: torch.dtype
    state: list[Any]
    made: tuple[Tensor, ...]
    held: list[Tensor]


class Angles:
    """``module(x, positions, *extra)`` of a module of rotary embeddings, bit for bit, for one position per sequence.

    The module is called for ``CHUNK`` positions at a time while it is what it was, has no hooks, and its ``rope_type``
    says that the angles of a position do not depend on others; otherwise it is called for each.
    """

    def __init__(self, module: nn.Module, extra: tuple) -> None:
        self._module, self._extra = module, extra
        # Replaced as a whole: threads may share it.
        self._table: _Table | None = None

    def __call__(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Cosines and sines for positions int [1 or b, 1], of x's dtype; views of memory that is not written again."""
        module = self._module
        if module._forward_hooks or module._forward_pre_hooks or getattr(module, "rope_type", None) not in _BY_POSITION:
            return module(x, positions, *self._extra)
        first, *others = positions.flatten().tolist()
        if any(other != first for other in others):
            return module(x, positions, *self._extra)
        state, table = self._look(), self._table
        if table is None or not 0 <= first - table.first < CHUNK or table.dtype != x.dtype or table.state != state:
            return self._make(x, positions, first, state)
        at = first - table.first
        return tuple(each[:, at : at + 1] for each in table.made)

    def _look(self) -> list[Any]:
        """What the module's result depends on, beside its arguments."""
        buffers = [t for t in self._module._buffers.values() if t is not None]
        versions = [(id(t), None if t.is_inference() else t._version) for t in buffers]
        return [versions, own_state(self._module)]

    def _make(self, x: Tensor, positions: Tensor, first: int, state: list[Any]) -> tuple[Tensor, ...]:
        """The module's result, and the table from this position on."""
        result = self._module(x, positions, *self._extra)
        rows = torch.arange(first, first + CHUNK, dtype=positions.dtype)[None]
        try:
            made = self._module(x, rows, *self._extra)
        except (IndexError, RuntimeError, ValueError):  # its own table is shorter
            return result
        alike = all(each.dim() == 3 and each.shape[:2] == rows.shape for each in made)
        alike = alike and all(torch.equal(a[:1], b[:, :1]) for a, b in zip(result, made, strict=True))
        held = list(self._module.buffers())
        self._table = _Table(first, x.dtype, state, made, held) if alike and self._look() == state else None
        return result
