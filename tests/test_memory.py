"""Huge pages that the layers of a cache share: where tensors stand, what is wasted, and when memory is freed."""

import copy
import gc
import itertools
import pickle
import weakref

import pytest
import torch

from torch_cpullm.kv_cache import CpuLlmCacheLayer
from torch_cpullm.memory import HUGE_PAGE, Slots

KEYS = ((1, 3, 1024, 64), torch.bfloat16)  # 384 KiB, as in SmolLM2-135M
INT8 = [((2, 3, 999, 65), torch.int8)] * 2 + [((2, 3, 999), torch.float32)] * 2


def places(layers):
    return [t.data_ptr() for layer in layers for t in layer]


def spans(layers):
    """Of all tensors, first and one behind last byte, in order of memory."""
    return sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for layer in layers for t in layer)


def test_layers_stand_one_after_the_other():
    slots = Slots(30)
    layers = [slots.empty([KEYS, KEYS]) for _ in range(30)]
    first, size = layers[0][0].data_ptr(), layers[0][0].nbytes
    assert first % HUGE_PAGE == 0
    assert places(layers) == [first + i * size for i in range(60)]
    assert all((tuple(t.shape), t.dtype) == KEYS for layer in layers for t in layer)
    assert all(t.untyped_storage().nbytes() == t.nbytes for layer in layers for t in layer)  # copied alone


def test_lines_of_their_own():
    slots = Slots(9)
    layers = [slots.empty(INT8) for _ in range(9)]
    assert [(tuple(t.shape), t.dtype) for t in layers[8]] == INT8
    assert all(place % 64 == 0 for place in places(layers))
    found = spans(layers)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(found))
    assert found[-1][1] - found[0][0] < sum(end - begin for begin, end in found) + 64 * len(found)


def test_layers_of_two_sizes():
    """Those of one size share pages, so that few of them are wasted; a mapping has no more than 32 MiB."""
    slots, small, large = Slots(12), [], []
    for _ in range(6):
        small.append(slots.empty([KEYS, KEYS]))
        large.append(slots.empty([((1, 8, 1024, 256), torch.bfloat16)] * 2))  # 8 MiB
    for layers, size in ((small, 6 * 768 << 10), (large[:4], 32 << 20), (large[4:], 16 << 20)):
        found = spans(layers)
        assert found[-1][1] - found[0][0] == size
        assert found[0][0] % HUGE_PAGE == 0


def test_a_large_layer_has_its_own():
    slots = Slots(4)
    layers = [slots.empty([((1, 8, 4096, 256), torch.float32)]) for _ in range(2)]
    assert all(layer[0].data_ptr() % HUGE_PAGE == 0 for layer in layers)


@pytest.mark.parametrize("shape", [(1, 3, 256, 8), (0, 3, 256, 8)])
def test_what_fills_no_page(shape):
    slots = Slots(2)
    made = slots.empty([(shape, torch.float32), KEYS] if 0 in shape else [(shape, torch.float32)])
    assert made[0].shape == shape


def test_memory_lives_with_its_tensors():
    gc.disable()
    try:
        slots = Slots(30)
        layers = [slots.empty([KEYS]) for _ in range(2)]
        (mapping, _, _) = next(iter(slots._begun.values()))
        kept = layers.pop()[0].fill_(3)
        del layers
        assert mapping() is not None
        assert bool(kept.eq(3).all())
        del kept
        assert mapping() is None
        slots.empty([INT8[0]] * 8)
        assert len(slots._begun) == 1, "only what is alive is remembered"
    finally:
        gc.enable()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_have_their_own(duplicate):
    slots = Slots(30)
    layers = [CpuLlmCacheLayer(slots=slots) for _ in range(2)]
    layers[0].update(torch.ones(1, 3, 1000, 64), torch.ones(1, 3, 1000, 64))
    copied = duplicate(layers)
    assert copied[0]._slots is copied[1]._slots is not slots
    for each, value in ((layers[1], 2.0), (copied[1], 3.0)):
        each.update(torch.full((1, 3, 1000, 64), value), torch.full((1, 3, 1000, 64), value))
    assert [float(each.keys.mean()) for each in (*layers, *copied)] == [1, 2, 1, 3]
    found = spans([(each.k, each.v) for each in (*layers, *copied)])
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(found))


def test_growing_layers_move_together():
    """Layers that grow leave their pages, which are freed with the last; tokens stay what they were."""
    slots = Slots(6)
    layers = [CpuLlmCacheLayer(torch.bfloat16, slots=slots) for _ in range(6)]
    x = torch.arange(6.0)
    old = []
    for tokens in (1000, 100, 300):
        for value, layer in zip(x, layers, strict=True):
            layer.update(value.expand(1, 3, tokens, 64), -value.expand(1, 3, tokens, 64))
        old.append(weakref.ref(layers[0].k))
    assert [ref() is None for ref in old] == [True, True, False]
    assert [mapping() is None for mapping, _, _ in slots._begun.values()] == [True, False]
    found = spans([(layer.k, layer.v) for layer in layers])
    assert found[-1][1] - found[0][0] == sum(end - begin for begin, end in found)
    for value, layer in zip(x, layers, strict=True):
        assert bool(layer.keys.eq(value).all())
        assert bool(layer.values.eq(-value).all())
