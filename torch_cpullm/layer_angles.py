"""Cosines and sines of a decode step, from a table of the positions to come instead of a call of the model's module."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .layer_parts import own_state
from .layer_watch import unchanged, written

CHUNK = 64  # positions at a time

# Forms of rotary embeddings whose cosines depend on the position alone, not on the longest one of the call.
_BY_POSITION = ("default", "linear", "llama3", "yarn")


@dataclass
class _Table:
    """first: position; state: of the module, when it was written() to so often; made: cosines and sines; held: buffers,
    so that no other gets their id.
    """

    first: int
    dtype: torch.dtype
    state: list[Any]
    written: int
    made: tuple[Tensor, ...]
    held: list[Tensor]


def position_of(positions: Tensor) -> int | None:
    """The one position of all sequences, None where they differ; int [1 or b, 1]."""
    if positions.numel() == 1:
        found = positions.item()
        return found if isinstance(found, int) else None
    all_ = set(positions.flatten().tolist()) if not positions.is_floating_point() else ()
    return all_.pop() if len(all_) == 1 else None


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
        position = position_of(positions)
        if position is None or self._hooked() or getattr(self._module, "rope_type", None) not in _BY_POSITION:
            return self._module(x, positions, *self._extra)
        found = self.find(position, x.dtype)
        if found is None:
            return self._make(x, positions, position)
        made, at = found
        return tuple(each[:, at : at + 1] for each in made)

    def find(self, position: int, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], int] | None:
        """(cosines and sines [1, n, d] of many positions, place of this one), if they are there and still right."""
        table = self._table
        if table is None or not 0 <= position - table.first < CHUNK or table.dtype != dtype or self._hooked():
            return None
        at = self._written(table.held)
        if at != table.written:
            if not unchanged(self._look(), table.state):
                return None
            table.written = at
        return table.made, position - table.first

    def _hooked(self) -> bool:
        return bool(self._module._forward_hooks or self._module._forward_pre_hooks)

    def _written(self, buffers: list[Tensor]) -> int:
        versioned = (t for t in buffers if not t.is_inference())
        return written((self._module.__dict__, self._module._buffers), versioned)

    def _look(self) -> list[Any]:
        """What the module's result depends on, beside its arguments."""
        buffers = [t for t in self._module._buffers.values() if t is not None]
        versions = [None if t.is_inference() else t._version for t in buffers]
        return [*buffers, *versions, *chain.from_iterable(own_state(self._module).items())]

    def _make(self, x: Tensor, positions: Tensor, first: int) -> tuple[Tensor, ...]:
        """The module's result, and the table from this position on."""
        held = list(self._module.buffers())
        at, state = self._written(held), self._look()
        result = self._module(x, positions, *self._extra)
        rows = torch.arange(first, first + CHUNK, dtype=positions.dtype)[None]
        try:
            made = self._module(x, rows, *self._extra)
        except (IndexError, RuntimeError, ValueError):  # its own table is shorter
            return result
        alike = all(each.dim() == 3 and each.shape[:2] == rows.shape for each in made)
        alike = alike and all(torch.equal(a[:1], b[:, :1]) for a, b in zip(result, made, strict=True))
        self._table = (
            _Table(first, x.dtype, state, at, made, held) if alike and unchanged(self._look(), state) else None
        )
        return result
