"""How a layer's spec is run: the one place that knows by what."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .layer_cut import CutProgram
from .layer_program import Program
from .layer_reference import CacheLayer
from .layer_spec import LayerSpec

Run = Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None, CacheLayer | None], Tensor]


def prepare(spec: LayerSpec) -> Run:
    """A function ``(x, cos, sin, mask, cache) -> y`` for this layer; see :class:`layer_program.Program`."""
    return Program(spec) if spec.ranks is None else CutProgram(spec)
