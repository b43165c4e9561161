"""The key-value cache of optimised models: preallocated, written in place, in the model's dtype or smaller.

transformers' DynamicCache joins old and new keys by ``torch.cat``: it copies the whole cache for every token.

    CpuLlmCache                one per generation: what transformers calls past_key_values
      CpuLlmCacheLayer         k, v [b, g, capacity, d], of which ``length`` tokens are in use
    use_cache_class(model)     from now on the model makes this cache where it would make a DynamicCache

b batch, g heads of keys and values, d head dim. Nothing here is global: each model is told for itself.
"""

from __future__ import annotations

import inspect
import re
import sys
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from .config import KV_CACHES
from .layer import all_in_programs
from .layer_graph import number_cache
from .layer_stack import BUFFERS, forget_buffers
from .memory import Slots

CHUNK = 256

Reserved = tuple[Tensor, Tensor, Tensor | None, Tensor | None, int]


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(q, scale) with x ~ q * scale: q int8 [..., d], scale = absmax / 127 float32 [...]; inf and NaN become NaN."""
    x = x.float()
    scale = x.abs().amax(-1) / 127
    q = (x / scale.unsqueeze(-1)).round_().clamp_(-127, 127).nan_to_num_(0)
    return q.to(torch.int8), torch.where(scale.isfinite(), scale, torch.nan)


class CpuLlmCacheLayer(CacheLayerMixin):
    """Keys and values of one layer: float32, bfloat16, float16, or int8 with one float32 scale per token and head.

    k, v [b, g, capacity, d] (v may have a head dim of its own), k_scale, v_scale [b, g, capacity] or None; None, all of
    them, before the first token. What lies behind ``length`` is undefined. A layer with a sliding window keeps every
    token: mask and kernel apply the window, and a crop can always go back. slots: the memory of the cache's layers.
    """

    is_compileable = False
    is_croppable = True

    def __init__(
        self, dtype: torch.dtype | None = None, sliding_window: int | None = None, slots: Slots | None = None
    ) -> None:
        # Not the base's __init__: it assigns keys and values, which are computed here.
        self.stored_dtype = dtype
        self._slots = Slots() if slots is None else slots
        self.dtype = torch.float32  # what keys and values are given as: the model's
        self.is_sliding = sliding_window is not None
        if sliding_window is not None:
            self.sliding_window = sliding_window
        self.length = 0
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.k_scale: Tensor | None = None
        self.v_scale: Tensor | None = None

    # ---- for programs that write the cache themselves ----

    @property
    def capacity(self) -> int:
        """Tokens that fit before the next copy."""
        return 0 if self.k is None else self.k.shape[2]

    def reserve(
        self,
        batch: int,
        tokens: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        value_dim: int | None = None,
        device: torch.device | str = "cpu",
    ) -> Reserved:
        """(k, v, k_scale, v_scale, length) with room for ``tokens`` more at [length, length + tokens).

        dtype: the model's. Write, then call :meth:`advance`. The tensors are good until the next call that changes the
        cache. Raises ValueError if the cache holds tokens of another shape: they are another model's or batch's.
        """
        shape = (batch, kv_heads, head_dim, head_dim if value_dim is None else value_dim)
        stored = dtype if self.stored_dtype is None else self.stored_dtype
        have = None if self.k is None or self.v is None else (*self.k.shape[:2], self.k.shape[3], self.v.shape[3])
        self.dtype = dtype
        if have is None or (not self.length and (have != shape or self.k.dtype != stored)):  # type: ignore[union-attr]
            self._allocate(shape, _round_up(tokens + 1), stored, device)
        elif have != shape:
            raise ValueError(
                f"this cache holds {self.length} tokens with batch, heads, head dim {_text(have)}, but the model "
                f"brings {_text(shape)}: it was filled by another model or with another batch"
            )
        need = self.length + tokens
        if need > self.capacity:
            # A copy per eighth costs less than a hundredth of the reads in between, and huge pages are all memory.
            self._resize(_round_up(max(need + 1, self.capacity + self.capacity // 8)))
        return cast("Tensor", self.k), cast("Tensor", self.v), self.k_scale, self.v_scale, self.length

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` that were written behind the last one. Raises ValueError if they were never reserved."""
        if not 0 <= tokens <= self.capacity - self.length:
            raise ValueError(f"advance({tokens}): the cache has {self.length} tokens and room for {self.capacity}")
        self.length += tokens

    # ---- transformers' protocol ----

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [b, g, s, d] and return all keys and values [b, g, length, d] in the given type.

        Views of the cache where it stores that type, else copies. Raises ValueError as :meth:`reserve` does.
        """
        batch, heads, tokens, head_dim = key_states.shape
        if value_states.shape[:3] != key_states.shape[:3]:
            raise ValueError(f"keys are {list(key_states.shape)}, but values {list(value_states.shape)}")
        k, v, k_scale, v_scale, start = self.reserve(
            batch, tokens, heads, head_dim, key_states.dtype, value_states.shape[3], key_states.device
        )
        _write(k, k_scale, start, key_states)
        _write(v, v_scale, start, value_states)
        self.advance(tokens)
        return cast("Tensor", self.keys), cast("Tensor", self.values)

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """All keys [b, g, length, d] in the model's dtype, None before the first."""
        return self._read(self.k, self.k_scale)

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """All values [b, g, length, d] in the model's dtype, None before the first."""
        return self._read(self.v, self.v_scale)

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether there is memory for tokens, and so their shape is known."""
        return self.k is not None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for keys and values like these [b, g, any, d]."""
        batch, heads, _, head_dim = key_states.shape
        self.reserve(batch, 0, heads, head_dim, key_states.dtype, value_states.shape[3], key_states.device)

    def get_seq_length(self) -> int:
        """Tokens in the cache."""
        return self.length

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """(keys, position of the first) that attention will see after ``query_length`` new tokens: all of them."""
        # transformers 5.0 passes the new tokens' positions.
        new = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self.length + new, 0

    def get_max_length(self) -> int:
        """-1: it grows."""
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers 5.0

    def reset(self) -> None:
        """Forget all tokens and free their memory."""
        self.k = self.v = self.k_scale = self.v_scale = None
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens; a positive number is the length to keep (transformers 5.0)."""
        keep = self.length + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        self.length = max(0, min(self.length, keep))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was. Copies the tokens in use, of the rows that change, and no others."""
        batch = 0 if self.k is None else self.k.shape[0]
        if beam_idx.shape[0] != batch:
            self._select(beam_idx)
            return
        moves = _moves(beam_idx.tolist())
        for buffer in (self.k, self.v, self.k_scale, self.v_scale):
            if buffer is not None:
                _move(buffer[:, :, : self.length], moves)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times, one after the other."""
        if self.k is not None:
            self._select(torch.arange(self.k.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows: their indices, or one bool per row."""
        self._select(indices)

    def offload(self) -> None:
        """Nothing: the cache is in main memory."""

    prefetch = offload

    @property
    def _sliding_window_tensor(self) -> Tensor | None:
        """What iterating over a DynamicCache gives as the third item."""
        return torch.tensor(self.sliding_window) if self.is_sliding else None

    # ---- memory ----

    def _read(self, buffer: Tensor | None, scale: Tensor | None) -> Tensor | None:
        if buffer is None:
            return None
        used = buffer[:, :, : self.length]
        return (used * scale[:, :, : self.length, None] if scale is not None else used).to(self.dtype)

    def _allocate(self, shape: tuple[int, ...], capacity: int, dtype: torch.dtype, device: torch.device | str) -> None:
        batch, heads, *dims = shape
        wanted: list[tuple[tuple[int, ...], torch.dtype]] = [((batch, heads, capacity, d), dtype) for d in dims]
        if dtype == torch.int8:
            wanted += [((batch, heads, capacity), torch.float32)] * 2
        # Never inference tensors: a chat begun under torch.inference_mode() may go on without it.
        with torch.inference_mode(False):
            if torch.device(device).type == "cpu":
                made = self._slots.empty(wanted)
            else:
                made = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in wanted]
        self.k, self.v, self.k_scale, self.v_scale = (*made, None, None)[:4]

    def _renew(self, batch: int, capacity: int, used: Callable[[Tensor], Tensor]) -> None:
        """New memory that begins with ``used(buffer)`` [batch, g, length, ..] of every buffer."""
        k, v = cast("Tensor", self.k), cast("Tensor", self.v)
        old = [k, v] if self.k_scale is None or self.v_scale is None else [k, v, self.k_scale, self.v_scale]
        self._allocate((batch, k.shape[1], k.shape[3], v.shape[3]), capacity, k.dtype, k.device)
        with torch.inference_mode(False):
            for new, buffer in zip((self.k, self.v, self.k_scale, self.v_scale), old, strict=False):
                cast("Tensor", new)[:, :, : self.length] = used(buffer)

    def _resize(self, capacity: int) -> None:
        self._renew(cast("Tensor", self.k).shape[0], capacity, lambda buffer: buffer[:, :, : self.length])

    def _select(self, indices: Tensor) -> None:
        """Rows of the batch by index or by mask, into new memory."""
        if self.k is not None:
            rows = torch.arange(self.k.shape[0])[indices.cpu()]
            self._renew(rows.shape[0], self.capacity, lambda buffer: buffer[rows, :, : self.length])


def _write(buffer: Tensor, scale: Tensor | None, start: int, states: Tensor) -> None:
    """buffer[:, :, start:] = states [b, g, s, d], quantised if there are scales."""
    end = start + states.shape[2]
    if scale is None:
        buffer[:, :, start:end] = states
    else:
        buffer[:, :, start:end], scale[:, :, start:end] = quantize_rows(states)


_ASIDE = -1


def _moves(sources: list[int]) -> list[tuple[int, int]]:
    """(to, from) of single rows that make row i what row sources[i] was; at most one row is put aside at a time."""
    left = {to: source for to, source in enumerate(sources) if to != source}
    moves = []
    while left:
        to = next((row for row in left if row not in left.values()), None)
        if to is None:  # only cycles
            to = next(iter(left))
            moves.append((_ASIDE, to))
            left = {row: _ASIDE if source == to else source for row, source in left.items()}
        moves.append((to, left.pop(to)))
    return moves


def _move(rows: Tensor, moves: list[tuple[int, int]]) -> None:
    """Row by row, in place: whole new buffers would cost more for their pages than for their bytes."""
    aside = rows[:0]
    for to, source in moves:
        if to == _ASIDE:
            aside = rows[source].clone()
        else:
            rows[to] = aside if source == _ASIDE else rows[source]


def _round_up(tokens: int) -> int:
    return -(-tokens // CHUNK) * CHUNK


def _text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape[:3] if shape[2] == shape[3] else shape))


class CpuLlmCache(DynamicCache):
    """The cache of a whole model, usable wherever transformers takes ``past_key_values``.

    A DynamicCache by type, since code asks for that. config: the model's; dtype: how keys and values are stored, a name
    in :data:`torch_cpullm.config.KV_CACHES` ("auto": as the model computes them). Raises ValueError for a model whose
    cache has layers that are no attention (Mamba, shared and compressed caches), and for another dtype.
    """

    def __init__(self, config: Any, dtype: str = "auto") -> None:
        if dtype not in KV_CACHES:
            raise ValueError(f"dtype must be one of {', '.join(KV_CACHES)}, got {dtype!r}")
        layers = _own_layers(DynamicCache(config=config), dtype)
        if layers is None:
            raise ValueError(f"{type(config).__name__} has layers whose cache is not plain keys and values")
        Cache.__init__(self, layers=cast("list", layers))
        self.number = number_cache(self)

    def reset(self) -> None:
        """Forget all tokens and free their memory."""
        super().reset()
        forget_buffers(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("number", BUFFERS)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is a cache of its own."""
        self.__dict__.update(state)
        self.number = number_cache(self)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append to one layer; see :meth:`CpuLlmCacheLayer.update`. Raises ValueError: no such layer."""
        if layer_idx >= len(self.layers):
            raise ValueError(f"this cache has {len(self.layers)} layers, no layer {layer_idx}: it is another model's")
        return cast("CpuLlmCacheLayer", self.layers[layer_idx]).update(key_states, value_states, *args, **kwargs)


def _own_layers(cache: Cache, dtype: str) -> list[CpuLlmCacheLayer] | None:
    """Empty layers for those of ``cache``, None if any of them is more than keys and values of attention."""
    if not cache.layers or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return None
    windows = [getattr(layer, "sliding_window", None) for layer in cache.layers]
    slots = Slots(len(windows))
    return [CpuLlmCacheLayer(KV_CACHES[dtype], window, slots) for window in windows]


# ---- injection ------------------------------------------------------------------------------------------------------


def use_cache_class(model: nn.Module, dtype: str = "auto") -> None:
    """Let ``generate()`` and plain calls of ``model`` make a CpuLlmCache where they would make a DynamicCache.

    dtype: see :class:`CpuLlmCache`. Caches that the caller passes, other ``cache_implementation`` settings,
    encoder-decoder models and layers that are no attention stay as they are; so do compiled forwards, see
    :func:`_is_compiled`. :func:`restore_cache_class` undoes it.
    """
    restore_cache_class(model)
    makers = {kind for kind in {type(part) for part in model.modules()} if _makes_a_cache(kind)}
    for part in model.modules():
        if hasattr(part, "_prepare_cache_for_generation"):
            part.__dict__["_prepare_cache_for_generation"] = _PreparesCache(part, dtype, _masks_windows(part))
        if type(part) in makers:
            part.register_forward_pre_hook(_GivesCache(part, dtype, _masks_windows(part)), with_kwargs=True)


def restore_cache_class(model: nn.Module) -> None:
    """Undo :func:`use_cache_class`."""
    for part in model.modules():
        part.__dict__.pop("_prepare_cache_for_generation", None)
        for key, hook in list(part._forward_pre_hooks.items()):
            if isinstance(hook, _GivesCache):
                del part._forward_pre_hooks[key], part._forward_pre_hooks_with_kwargs[key]


_MAKES_CACHE = re.compile(r"past_key_values is None:\s+past_key_values = DynamicCache\(config=self\.config\)")
_MASKS_WINDOWS = re.compile(r"sliding_window_causal_mask|chunked_causal_mask|create_masks_for_generate")


def _makes_a_cache(kind: type[nn.Module]) -> bool:
    """Whether this module's forward makes a DynamicCache of its config, as transformers' decoders do."""
    try:
        return _MAKES_CACHE.search(inspect.getsource(kind.forward)) is not None
    except (OSError, TypeError):  # no source to look at
        return False


def _masks_windows(model: nn.Module) -> bool:
    """Whether the code of ``model`` masks what is beyond a window, and does not leave that to a short cache."""
    for name in {type(part).__module__ for part in model.modules()}:
        try:
            if name.startswith("torch.") or not _MASKS_WINDOWS.search(inspect.getsource(sys.modules[name])):
                continue
        except (OSError, TypeError, KeyError):
            continue
        return True
    return False


def _is_compiled(model: nn.Module) -> bool:
    """Whether any of ``model`` runs compiled: there the cache stays transformers' own, unless all layers are programs.

    Dynamo guards on the capacity, so that all of the model would be compiled again, twice, each time the cache grows.
    A program is one operator to Dynamo, which sees nothing of the cache.
    """
    return torch.compiler.is_compiling() or any(part._compiled_call_impl is not None for part in model.modules())


def _left_to_forward(model: Any, generation_config: Any) -> bool:
    """Whether ``generate()`` makes no cache, since the decoder's forward will: the default of transformers 5.0.

    It is made here all the same, since a compiled forward would make transformers' own. Prompts in chunks stay the
    error that they are there: with a cache its masks are wrong.
    """
    if generation_config.use_cache is False or getattr(model.config, "is_encoder_decoder", False):
        return False
    if generation_config.prefill_chunk_size is not None:
        return False
    return any(isinstance(hook, _GivesCache) for part in model.modules() for hook in part._forward_pre_hooks.values())


class _Maker:
    """Makes the cache of one model, or leaves it to transformers. masked: see :func:`_masks_windows`."""

    def __init__(self, dtype: str, masked: bool) -> None:
        self.dtype = dtype
        self.masked = masked

    def instead_of(self, cache: Cache, config: Any) -> CpuLlmCache | None:
        """Ours in the place of an empty ``cache`` that transformers made from ``config``."""
        if type(cache) is not DynamicCache or cache.offloading or (True in cache.is_sliding and not self.masked):
            return None
        return None if _own_layers(cache, self.dtype) is None else CpuLlmCache(config, self.dtype)


class _PreparesCache(_Maker):
    """``_prepare_cache_for_generation`` of one model.

    It holds no reference to its model, so that a deleted one is gone at once, and is copied and pickled with it.
    """

    def __init__(self, model: nn.Module, dtype: str, masked: bool) -> None:
        super().__init__(dtype, masked)
        self._model = weakref.ref(model)

    def __call__(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        model: Any = self._model()
        given, asked = model_kwargs.get("past_key_values"), generation_config.cache_implementation
        result = type(model)._prepare_cache_for_generation(model, generation_config, model_kwargs, *args, **kwargs)
        made: Any = model_kwargs.get("past_key_values")
        if made is None and _left_to_forward(model, generation_config):
            made = DynamicCache(config=model.config)
        by_default = made is not None and made is not given and asked is None
        if by_default and (not _is_compiled(model) or all_in_programs(model)):
            if type(made) is DynamicCache and not made.layers:  # without the config, so that none of it slides
                made = DynamicCache(config=model.config)
            ours = self.instead_of(made, model.config)
            if ours is not None:
                model_kwargs["past_key_values"] = ours
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> _PreparesCache:
        model = cast("nn.Module", self._model())
        return _PreparesCache(memo.get(id(model), model), self.dtype, self.masked)

    def __reduce__(self) -> tuple:
        return _PreparesCache, (self._model(), self.dtype, self.masked)


class _GivesCache(_Maker):
    """Forward pre-hook of a decoder that is called with use_cache and no cache."""

    changes_nothing = True  # of a call with a cache, see layer_token.py

    def __init__(self, decoder: nn.Module, dtype: str, masked: bool) -> None:
        super().__init__(dtype, masked)
        self.names = list(inspect.signature(type(decoder).forward).parameters)[1:]

    def __call__(self, decoder: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs} if args else kwargs
        config = decoder.config
        past = given.get("past_key_values")
        if isinstance(past, CpuLlmCache) and len(past.layers) != config.num_hidden_layers:
            raise ValueError(
                f"past_key_values has {len(past.layers)} layers and the model {config.num_hidden_layers}: "
                "it is another model's"
            )
        use_cache = given.get("use_cache")
        use_cache = getattr(config, "use_cache", False) if use_cache is None else use_cache
        if past is not None or not use_cache or decoder.training or _is_compiled(decoder):
            return None
        if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
            return None
        cache = self.instead_of(DynamicCache(config=config), config)
        if cache is None:
            return None
        place = self.names.index("past_key_values")
        if place < len(args):
            return (*args[:place], cache, *args[place + 1 :]), kwargs
        return args, {**kwargs, "past_key_values": cache}
