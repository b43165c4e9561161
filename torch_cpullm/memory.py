"""Memory in huge pages: from small ones two Zen 4 cores read 31 GB/s and not 36."""

from __future__ import annotations

import contextlib
import math
import mmap
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

HUGE_PAGE = 1 << 21

_LINE = 64
_SLOTS = 32 << 20


def huge_pages(count: int) -> tuple[mmap.mmap, int]:
    """Memory of its own whose ``count`` bytes from the second value on begin a huge page; advised to use such pages.

    The advice is a hint; systems without huge pages ignore it.
    """
    mapping = mmap.mmap(-1, count + HUGE_PAGE - 1, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -torch.frombuffer(mapping, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    whole = count // HUGE_PAGE * HUGE_PAGE
    with contextlib.suppress(AttributeError, OSError):  # Linux only; page-aligned, as a mapping is
        mapping.madvise(mmap.MADV_HUGEPAGE, start, whole)
    return mapping, start


def aligned_empty(shape: tuple[int, ...]) -> Tensor:
    """Uninitialised uint8 tensor at a 64-byte boundary; from 2 MiB on at a huge page's, and advised to use huge pages.

    Large ones have a mapping of their own: malloc would take them from a heap that quantisation's temporary memory has
    torn, in pages that are small already. Small ones: see :func:`torch_cpullm.packing.gathered` and :class:`Slots`.
    """
    count = math.prod(shape)
    if count < HUGE_PAGE:
        raw = torch.empty(count + _LINE - 1, dtype=torch.uint8)
        start = -raw.data_ptr() % _LINE
        return raw[start : start + count].view(shape)
    mapping, start = huge_pages(count)
    return torch.frombuffer(mapping, dtype=torch.uint8, count=count, offset=start).view(shape)


class Slots:
    """Memory for ``layers`` layers of a cache, those of one size one after the other in the same huge pages.

    A mapping has room for as many layers as fit 32 MiB, one at least, and becomes memory where it is written; it is
    freed with the last tensor in it. So less than a huge page is wasted for every size, and what has outgrown its slot
    never keeps much. A copy has mappings of its own.
    """

    def __init__(self, layers: int = 1) -> None:
        self._layers = layers
        self._begun: dict[int, tuple[weakref.ref[mmap.mmap], int, int]] = {}  # by size: mapping, next slot, end

    def __reduce__(self) -> tuple:
        return Slots, (self._layers,)

    def empty(self, tensors: Sequence[tuple[Sequence[int], torch.dtype]]) -> list[Tensor]:
        """Uninitialised tensors of these shapes and dtypes for one layer, each with a storage of its own.

        At 64-byte boundaries in huge pages; anywhere if all layers together fill none.
        """
        counts = [math.prod(shape) for shape, _ in tensors]
        sizes = [-(-count * dtype.itemsize // _LINE) * _LINE for count, (_, dtype) in zip(counts, tensors, strict=True)]
        slot = sum(sizes)
        room = slot * min(self._layers, max(1, _SLOTS // max(1, slot)))
        if room < HUGE_PAGE:
            return [torch.empty(shape, dtype=dtype) for shape, dtype in tensors]
        self._begun = {size: each for size, each in self._begun.items() if each[0]() is not None}
        begun = self._begun.get(slot)
        mapping, at, end = (None, 0, 0) if begun is None else (begun[0](), *begun[1:])
        if mapping is None or at == end:
            mapping, at = huge_pages(room)
            end = at + room
        self._begun[slot] = weakref.ref(mapping), at + slot, end
        made = []
        for (shape, dtype), count, size in zip(tensors, counts, sizes, strict=True):
            # frombuffer() refuses to make an empty one.
            made.append(
                torch.frombuffer(mapping, dtype=dtype, count=count, offset=at).view(*shape)
                if count
                else torch.empty(shape, dtype=dtype)
            )
            at += size
        return made
