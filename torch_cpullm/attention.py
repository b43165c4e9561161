"""The attention implementation "cpullm" of transformers: our kernel for one query token, SDPA for everything else.

SDPA repeats the kv heads in memory and takes 0.9 ms per layer for one token at a context of 512; the kernel reads the
cache as it is.
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
    if _one_token(query, key, value, attention_mask, dropout, kwargs):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return ops.decode_attention(query, key, value, attention_mask, scale), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def _one_token(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, kwargs: dict[str, Any]
) -> bool:
    """Whether the kernel computes what SDPA would."""
    if query.shape[2] != 1 or key.shape != value.shape or dropout or query.dtype not in _DTYPES:
        return False
    if query.device.type != "cpu" or not query.dtype == key.dtype == value.dtype:
        return False
    if any(kwargs.get(name) is not None for name in ("position_bias", "cache", "softcap", "s_aux")):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        return False
    if any(t.stride(-1) != 1 for t in (query, key, value)):
        return False
    return mask is None or (
        mask.dim() == 4
        and mask.shape[2] == 1
        and mask.shape[3] == key.shape[2]
        and (mask.dtype == torch.bool or mask.dtype in _DTYPES)
        and (mask.stride(3) == 1 or mask.shape[3] == 1)
        and mask.shape[0] in (1, query.shape[0])
        and mask.shape[1] in (1, query.shape[1])
    )
