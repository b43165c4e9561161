"""Decoder layers inside graphs of torch.compile: one opaque operator each, ``cpullm::decoder_layer``.

If Dynamo traced a layer, its guards would hold every part of it and the capacity of its cache, which grows. So a graph
has this operator, which knows layer and cache by number, finds them when it runs and calls the layer as eager code
does: with every look whether the program may still run, and through the class's own forward where it may not.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

_numbers = itertools.count(1)
_layers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_caches: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

_library = torch.library.Library("cpullm", "FRAGMENT")
# cache: the tensor of `number_cache`. It stands for the keys and values that are written.
_library.define(
    "decoder_layer(Tensor x, Tensor? mask, Tensor? cos, Tensor? sin, Tensor? position_ids, Tensor? cache_position, "
    "Tensor(a!)? cache, bool? use_cache, int layer) -> Tensor"
)


def number_layer(program: Any) -> int:
    """The number by which graphs call ``program``: see :meth:`layer.LayerProgram.run_in_graph`."""
    number = next(_numbers)
    _layers[number] = program
    return number


def number_cache(cache: Any) -> Tensor:
    """The int64 scalar by which graphs name ``cache``: a tensor, so that no graph is made for one number."""
    number = next(_numbers)
    _caches[number] = cache
    with torch.inference_mode(False):
        return torch.tensor(number)


def decoder_layer(
    x: Tensor,
    mask: Tensor | None,
    rotary: tuple[Tensor, Tensor] | None,
    position_ids: Tensor | None,
    cache_position: Tensor | None,
    cache: Tensor | None,
    use_cache: bool | None,
    layer: int,
) -> Tensor:
    """x [b, s, hidden] -> the same shape and type, by the layer of this number; see :class:`layer.LayerProgram`."""
    cos, sin = rotary or (None, None)
    return torch.ops.cpullm.decoder_layer.default(
        x, mask, cos, sin, position_ids, cache_position, cache, use_cache, layer
    )


@torch.library.impl(_library, "decoder_layer", "CPU")
def _decoder_layer(x, mask, cos, sin, position_ids, cache_position, cache, use_cache, layer):
    program = _layers.get(layer)
    held = None if cache is None else _caches.get(int(cache))
    if program is None or (cache is not None and held is None):
        raise RuntimeError(f"cpullm::decoder_layer: layer {layer} or its cache is gone")
    rotary = None if cos is None else (cos, sin)
    return program.run_in_graph(x, mask, rotary, position_ids, cache_position, held, use_cache)


@torch.library.register_fake("cpullm::decoder_layer", lib=_library)
def _decoder_layer_fake(x, mask, cos, sin, position_ids, cache_position, cache, use_cache, layer):
    return x.new_empty(x.shape)
