"""The KV cache by itself: operations against transformers' DynamicCache, memory, rounding."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Gemma2Config, LlamaConfig

from torch_cpullm.config import KV_CACHES
from torch_cpullm.kv_cache import CHUNK, CpuLlmCache, CpuLlmCacheLayer

FULL = LlamaConfig(num_hidden_layers=2)
WINDOWS = Gemma2Config(num_hidden_layers=3, sliding_window=7)
# Before transformers 5.14 crop() takes the length to keep, and needs no recording.
OLD = not hasattr(DynamicCache, "activate_past_recording")

# ---- operations on a cache, against DynamicCache --------------------------------------------------------------------


def filled(tokens: int = 9, batch: int = 4, config: Any = FULL) -> tuple[CpuLlmCache, DynamicCache]:
    """The same random keys and values in both kinds of cache."""
    pair = (CpuLlmCache(config), DynamicCache(config=config))
    if not OLD:
        pair[1].activate_past_recording()
    for made in pair:
        append(made, tokens, batch)
    return pair


def append(made: Any, tokens: int, batch: int = 4, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(len(made.layers), 2, batch, 2, tokens, 8, generator=generator)
    return [made.update(k, v, layer) for layer, (k, v) in enumerate(states)]


def check(pair: tuple[CpuLlmCache, DynamicCache]) -> None:
    """Equal length and content, now and after three more tokens."""
    assert pair[0].get_seq_length() == pair[1].get_seq_length()
    for mine, theirs in zip(*pair, strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])
    batch = pair[1].layers[0].keys.shape[0]
    for mine, theirs in zip(append(pair[0], 3, batch, 1), append(pair[1], 3, batch, 1), strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert torch.equal(mine[1], theirs[1])


OPERATIONS = {
    "nothing": lambda made: None,
    "reorder": lambda made: made.reorder_cache(torch.tensor([2, 0, 0, 3])),
    "reorder to the same": lambda made: made.reorder_cache(torch.arange(4)),
    "reorder to fewer": lambda made: made.reorder_cache(torch.tensor([3, 1])),
    "repeat": lambda made: made.batch_repeat_interleave(3),
    "select": lambda made: made.batch_select_indices(torch.tensor([3, 1])),
    "select by mask": lambda made: made.batch_select_indices(torch.tensor([True, False, True, True])),
    "crop": lambda made: made.crop(-4),
    "crop nothing": lambda made: made.crop(made.get_seq_length() if OLD else 0),
    "iterate": lambda made: list(made),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations(operation):
    pair = filled()
    for made in pair:
        OPERATIONS[operation](made)
    check(pair)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_move_codes_and_scales(operation):
    """INT8: exactly what the operation makes of the rounded values."""
    mine, theirs = CpuLlmCache(FULL, "int8"), DynamicCache(config=FULL)
    append(mine, 9)
    for index, layer in enumerate(mine.layers):
        theirs.update(layer.keys, layer.values, index)
    for made in (mine, theirs):
        OPERATIONS[operation](made)
    for ours, reference in zip(mine.layers, theirs.layers, strict=True):
        assert torch.equal(ours.keys, reference.keys)
        assert torch.equal(ours.values, reference.values)


def test_every_order_of_four_beams():
    for order in itertools.product(range(4), repeat=4):
        layer = CpuLlmCacheLayer()
        layer.update(torch.arange(4.0).view(4, 1, 1, 1), -torch.arange(4.0).view(4, 1, 1, 1))
        memory = layer.k
        layer.reorder_cache(torch.tensor(order))
        assert layer.keys.flatten().tolist() == list(order)
        assert (-layer.values).flatten().tolist() == list(order)
        assert layer.k is memory


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_cache_begun_in_inference_mode_goes_on_outside(mode):
    with torch.inference_mode():
        pair = filled(tokens=CHUNK - 2)
        for made in pair:
            made.reorder_cache(torch.tensor([1, 1, 2, 0]))
            made.batch_select_indices(torch.tensor([0, 2, 3]))
    with mode():
        check(pair)


def test_crop_in_both_manners():
    for amount, left in ((-4, 5), (-9, 0), (-50, 0), (4, 4), (20, 9), (0, 9)):  # positive: transformers 5.0
        made, _ = filled()
        made.crop(amount)
        assert made.get_seq_length() == left
        assert made.layers[1].keys.shape == (4, 2, left, 8)


def test_reset_and_another_batch():
    made, _ = filled()
    made.reset()
    assert made.get_seq_length() == 0
    assert made.layers[0].keys is None
    other = DynamicCache(config=FULL)
    for each in (made, other):
        append(each, 5, batch=2)
    check((made, other))
    made.crop(-8)
    append(made, 2, batch=1)
    assert made.layers[0].keys.shape == (1, 2, 2, 8)


def test_deepcopy_is_independent():
    pair = filled()
    twin = copy.deepcopy(pair[0])
    append(twin, 4, seed=9)
    check(pair)
    assert twin.get_seq_length() == 13


def test_masks_and_limits_are_those_of_a_full_cache():
    made, theirs = filled(config=WINDOWS)
    assert made.is_sliding == theirs.is_sliding == [True, False, True]
    for layer in range(3):
        assert made.get_mask_sizes(2, layer) == (11, 0)
        assert made.layers[layer].get_mask_sizes(torch.arange(2)) == (11, 0)  # as transformers 5.0 asks
        assert made.layers[layer].get_max_cache_shape() == made.layers[layer].get_max_length() == -1
        assert made.layers[layer].keys.shape[2] == 9
    assert (made.is_compileable, made.is_initialized) == (False, True)
    assert OLD or (made.get_max_length(), made.is_croppable) == (-1, True)
    items = list(made)
    assert [item[2] is not None for item in items] == [True, False, True]
    taken_over = DynamicCache([(k, v, w.view(1)) if w is not None else (k, v) for k, v, w in items])
    assert taken_over.get_seq_length() == 9


def test_early_initialization():
    made = CpuLlmCache(FULL, "int8")
    assert not made.is_initialized
    made.early_initialization(batch_size=4, num_heads=2, head_dim=8, dtype=torch.float32, device="cpu")
    assert made.is_initialized
    assert (made.get_seq_length(), made.layers[0].capacity) == (0, CHUNK)
    append(made, 3)
    assert made.layers[1].keys.shape == (4, 2, 3, 8)


# ---- one layer ------------------------------------------------------------------------------------------------------


def test_a_program_writes_in_place():
    layer = CpuLlmCacheLayer()
    k, v, k_scale, v_scale, length = layer.reserve(2, 5, 3, 8, torch.bfloat16)
    assert k.shape == v.shape == (2, 3, CHUNK, 8)
    assert (k.dtype, k_scale, v_scale, length) == (torch.bfloat16, None, None, 0)
    k[:, :, :5], v[:, :, :5] = 1, 2
    layer.advance(5)
    again = layer.reserve(2, 1, 3, 8, torch.bfloat16)
    assert again[0] is k
    assert again[4] == 5
    k[:, :, 5], v[:, :, 5] = 3, 4
    layer.advance(1)
    assert layer.keys[1, 2, :, 0].tolist() == [1, 1, 1, 1, 1, 3]
    assert layer.values[1, 2, :, 7].tolist() == [2, 2, 2, 2, 2, 4]
    assert layer.keys.data_ptr() == k.data_ptr()
    for tokens in (CHUNK, -1):
        with pytest.raises(ValueError, match="the cache has 6 tokens and room for 256"):
            layer.advance(tokens)


def test_capacity():
    """Chunks of 256 with room for one token more, and an eighth more if that is larger."""
    layer = CpuLlmCacheLayer()
    seen = []
    for tokens in (10, 245, 1, 3839, 1, 4000):
        layer.update(torch.ones(1, 1, tokens, 1), torch.zeros(1, 1, tokens, 1))
        seen.append((layer.length, layer.capacity))
    assert seen == [(10, 256), (255, 256), (256, 256), (4095, 4096), (4096, 4096), (8096, 8192)]
    assert bool(layer.keys.eq(1).all())
    assert not layer.values.any()
    layer.reserve(1, 97, 1, 1, torch.float32)
    assert layer.capacity == 8192 + 1024
    prefilled = CpuLlmCacheLayer()
    prefilled.update(torch.ones(1, 1, 512, 1), torch.ones(1, 1, 512, 1))
    assert prefilled.capacity == 768


def test_keys_and_values_of_different_width():
    layer = CpuLlmCacheLayer(torch.int8)
    keys, values = layer.update(torch.randn(2, 3, 4, 24), torch.randn(2, 3, 4, 16))
    assert (keys.shape, values.shape) == ((2, 3, 4, 24), (2, 3, 4, 16))


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", KV_CACHES)
def test_rounding(stored, model_dtype):
    """int8: half a step of absmax / 127 per token and head; floats: what a cast does."""
    x = torch.randn(2, 3, 50, 16, generator=torch.Generator().manual_seed(1)).mul_(
        torch.logspace(-3, 3, 50).view(1, 1, 50, 1)
    )
    x[0, 0, 7] = 0
    x = x.to(model_dtype)
    layer = CpuLlmCacheLayer(KV_CACHES[stored])
    keys, values = layer.update(x, -x)
    assert keys.dtype == values.dtype == model_dtype
    if stored == "int8":
        assert layer.k.dtype == torch.int8
        assert (layer.k_scale.shape, layer.k_scale.dtype) == ((2, 3, CHUNK), torch.float32)
        bound = x.float().abs().amax(-1, keepdim=True) * (0.5 / 127 * 1.0001 + torch.finfo(model_dtype).eps / 2)
        assert bool(((keys.float() - x.float()).abs() <= bound).all())
        assert not keys[0, 0, 7].any()
        assert int(layer.k[:, :, :50].abs().max()) == 127
    else:
        assert layer.k.dtype == (KV_CACHES[stored] or model_dtype)
        assert torch.equal(keys, x.to(layer.k.dtype).to(model_dtype))
    assert torch.equal(values, -keys)


def test_what_is_not_finite_stays_visible():
    x = torch.ones(1, 1, 4, 8)
    x[0, 0, 1, 3], x[0, 0, 2, 3] = torch.nan, torch.inf
    keys, _ = CpuLlmCacheLayer(torch.int8).update(x, x)
    assert keys.isfinite().all(-1).flatten().tolist() == [True, False, False, True]
