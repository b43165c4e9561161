"""How a layer's spec is run: the one place that knows by what."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .layer_reference import CacheLayer, run_layer
from .layer_spec import LayerSpec

Run = Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None, CacheLayer | None], Tensor]


def prepare(spec: LayerSpec) -> Run:
    """A function ``(x, cos, sin, mask, cache) -> y`` for this layer; see :func:`layer_reference.run_layer`."""

    def run(x: Tensor, cos: Tensor | None, sin: Tensor | None, mask: Tensor | None, cache: CacheLayer | None) -> Tensor:
        return run_layer(spec, x, cos, sin, mask, cache)

    return run


def execute(
    spec: LayerSpec,
    x: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    mask: Tensor | None,
    cache: CacheLayer | None,
) -> Tensor:
    """Run a layer once; see :func:`prepare`."""
    return prepare(spec)(x, cos, sin, mask, cache)
