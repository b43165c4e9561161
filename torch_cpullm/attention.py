"""The attention implementation "cpullm" of transformers: our kernel where it computes what was asked for, else SDPA.

SDPA repeats the kv heads in memory and takes 0.9 ms per layer for one token at a context of 512; the kernel reads the
cache as it is. It also knows softcap and sinks, which SDPA does not.
"""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from . import ops

NAME = "cpullm"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Switchable(Protocol):
    """What transformers' models have to choose their attention by."""

    def set_attn_implementation(self, name: str) -> None: ...

    def _can_set_attn_implementation(self) -> bool: ...


def use_attention(model: nn.Module) -> None:
    """Switch a transformers model from SDPA to "cpullm", where that cannot change its meaning.

    A model keeps what it has if any part of it uses another implementation than SDPA, or if its code compares the
    implementation's name with "sdpa": it would take another path under any other name.
    """
    parts = [part for part in model.modules() if hasattr(part, "_can_set_attn_implementation")]
    if not parts or not all(_is_plain_sdpa(part) for part in parts) or not _register():
        return
    cast("_Switchable", model).set_attn_implementation(NAME)
    model.__dict__["_cpullm_attention"] = True


def restore_attention(model: nn.Module) -> None:
    """Undo :func:`use_attention`."""
    if model.__dict__.pop("_cpullm_attention", False):
        cast("_Switchable", model).set_attn_implementation("sdpa")


_COMPARES_NAME = re.compile(r"_attn_implementation\s*(==|!=|in\b|not\s+in\b).{0,200}?sdpa", re.DOTALL)


def _is_plain_sdpa(part: nn.Module) -> bool:
    """Whether this transformers model uses SDPA through the attention interface and never asks for its name."""
    if getattr(getattr(part, "config", None), "_attn_implementation", None) != "sdpa":
        return False
    if not cast("_Switchable", part)._can_set_attn_implementation():
        return False
    try:
        return _COMPARES_NAME.search(inspect.getsource(sys.modules[type(part).__module__])) is None
    except (OSError, TypeError, KeyError):  # no source to look at
        return False


def _register() -> bool:
    """Make the name known to transformers, once; False where this version has no such interface."""
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError:
        return False
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return True


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [b, h, q, d], key and value [b, g, t, d] -> ([b, q, h, d], None)."""
    if not _is_ours(module, query, key, value, attention_mask, dropout, kwargs):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    tokens = query.shape[2]
    # A static cache on its first prompt comes without a mask and with keys beyond the prompt: they are not there yet.
    first = attention_mask is None and 1 < tokens < key.shape[2]
    sinks = kwargs.get("s_aux")
    return ops.attention(
        query,
        key,
        value,
        attention_mask,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=kwargs.get("softcap") or 0.0,
        window=0 if attention_mask is not None else kwargs.get("sliding_window") or 0,
        sinks=None if sinks is None else sinks.detach().float().contiguous(),
        length=tokens if first else None,
    ), None


# Arguments that say nothing about the result, or that the kernel knows. With any other one SDPA decides.
_HARMLESS = {"is_causal", "sliding_window", "softcap", "s_aux", "position_ids", "cache_position", "use_cache"}
_HARMLESS |= {"output_attentions", "output_hidden_states", "return_dict", "deterministic", "num_items_in_batch"}
_HARMLESS |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}  # of packed rows; SDPA leaves them, too


def _is_ours(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> bool:
    """Whether the kernel computes what was asked for."""
    if key.shape != value.shape or dropout or query.dtype not in _DTYPES:
        return False
    if query.device.type != "cpu" or not query.dtype == key.dtype == value.dtype:
        return False
    if any(value is not None and name not in _HARMLESS for name, value in kwargs.items()):
        return False
    sinks = kwargs.get("s_aux")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (query, key, value, mask)):
        return False
    if any(t.stride(-1) != 1 for t in (query, key, value)) or (sinks is not None and sinks.numel() != query.shape[1]):
        return False
    if mask is None:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        # One query sees every key either way.
        return query.shape[2] == 1 or (bool(causal) and query.shape[2] <= key.shape[2])
    return (
        mask.dim() == 4
        and mask.shape[0] in (1, query.shape[0])
        and mask.shape[1] in (1, query.shape[1])
        and mask.shape[2] in (1, query.shape[2])
        and mask.shape[3] == key.shape[2]
        and (mask.dtype == torch.bool or mask.dtype in _DTYPES)
    )
