"""Calibration tokens: from texts, token tensors, a data set, or, without any of these, from the model's own mouth.

The default needs no network and no file: the model continues random tokens, sampled at temperature 1 with a seed. The
text is the model's own output, so no licence but the model's applies, and it follows the distribution that the model
has learnt. Source: LLM-QAT, Liu et al. 2023 (data-free calibration).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .devices import device_of
from .quality import check_ids, logits_of

SEQUENCES, LENGTH = 128, 512
_TOGETHER = 16  # sequences that are generated at once on the CPU
_MOST, _BYTES = 1024, 8 << 30  # of them, and of their keys, values and logits, on other devices


def calibration_ids(
    source: Any,
    tokenizer: Any,
    model: nn.Module,
    *,
    sequences: int = SEQUENCES,
    length: int = LENGTH,
    seed: int = 0,
) -> Tensor:
    """int64 [sequences, length], tokens to calibrate ``model`` with; fewer sequences where the source ends.

    source: the path of a text file; a str or an iterable of str; a token tensor [tokens] or [sequences, tokens]; a
    data set whose rows are mappings with ``text`` or ``input_ids`` (such as ``datasets.Dataset``); or None for
    :func:`self_generated`. A str that names no file is taken as text. Texts are joined by blank lines, tokenised
    without special tokens, and cut into sequences that are spread evenly over all of it.

    Raises ValueError for sizes out of range, an empty source, one too short for a single sequence, and tokens out of
    range; TypeError for a source of another kind.
    """
    for name, value in (("sequences", sequences), ("length", length)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if source is None:
        return self_generated(model, sequences, length, seed)
    if isinstance(source, Tensor):
        ids = check_ids(source, model)
        return ids[:sequences, :length] if ids.dim() == 2 else _cut(ids, sequences, length)
    return _cut(check_ids(_tokens(source, tokenizer), model), sequences, length)


def text_ids(text: str, tokenizer: Any) -> Tensor:
    """int64 [tokens] of a text, without special tokens; ValueError for an empty one, or without a tokenizer."""
    if tokenizer is None:
        raise ValueError("a text needs the tokenizer, and none was given")
    if not text.strip():
        raise ValueError("the text is empty")
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)


def _tokens(source: Any, tokenizer: Any) -> Tensor:
    if isinstance(source, Path) or (isinstance(source, str) and len(source) < 4096 and Path(source).is_file()):
        return text_ids(Path(source).read_text(encoding="utf-8"), tokenizer)
    if isinstance(source, str):
        return text_ids(source, tokenizer)
    if not isinstance(source, Iterable):
        raise TypeError(f"calibration must be a file, texts, token ids or a data set, got {type(source).__name__}")
    rows = list(source)
    if not rows:
        raise ValueError("the calibration data is empty")
    if all(isinstance(row, Mapping) for row in rows):
        for key in ("input_ids", "text"):
            if all(key in row for row in rows):
                rows = [row[key] for row in rows]
                break
        else:
            raise ValueError(f"rows of a data set must have 'input_ids' or 'text', got {', '.join(map(str, rows[0]))}")
    if all(isinstance(row, str) for row in rows):
        return text_ids("\n\n".join(rows), tokenizer)
    if all(isinstance(row, (Tensor, list, tuple)) for row in rows):
        return torch.cat([torch.as_tensor(row, dtype=torch.int64).flatten() for row in rows])
    raise TypeError(
        f"calibration must be a file, texts, token ids or a data set, got a list of {type(rows[0]).__name__}"
    )


def _cut(ids: Tensor, sequences: int, length: int) -> Tensor:
    """Sequences spread evenly over ``ids`` [tokens], none overlapping."""
    if ids.dim() != 1:
        raise ValueError(f"token ids of one text must be [tokens], got {list(ids.shape)}")
    whole = len(ids) // length
    if whole == 0:
        raise ValueError(f"the calibration text has {len(ids)} tokens, fewer than one sequence of {length}")
    count = min(sequences, whole)
    starts = [length * (index * whole // count) for index in range(count)]
    return torch.stack([ids[start : start + length] for start in starts])


def self_generated(model: nn.Module, sequences: int = SEQUENCES, length: int = LENGTH, seed: int = 0) -> Tensor:
    """int64 [sequences, length], sampled from ``model`` itself: a random token, then temperature 1.

    model: of transformers, with ``generate()``; another one is sampled token by token without a cache, slowly. An end
    token does not end a sequence, it cannot be drawn. The same seed gives the same tokens on the same machine and
    device, which is the model's.
    """
    device = device_of(model)
    generator = torch.Generator().manual_seed(seed)
    get: Any = getattr(model, "get_input_embeddings", None)
    size = getattr(get(), "num_embeddings", None) if get is not None else None
    if size is None:
        raise ValueError("model has no get_input_embeddings() and cannot generate its own calibration text; pass one")
    found = []
    together = _together(model, device, length)
    for begin in range(0, sequences, together):
        count = min(together, sequences - begin)
        first = torch.randint(size, (count, 1), generator=generator)
        if hasattr(model, "generate"):
            elsewhere = [] if device.type == "cpu" else [device]
            with torch.random.fork_rng(elsewhere, device_type=device.type if elsewhere else "cuda"):
                torch.manual_seed(seed + 1 + begin)
                found.append(_generate(model, first.to(device), length).cpu())
        else:
            found.append(torch.stack([_sample(model, row, length, generator) for row in first]))
    return torch.cat(found)


def _together(model: Any, device: torch.device, length: int) -> int:
    """How many sequences of ``length`` tokens are generated at once on ``device``, by the bytes that one needs."""
    if device.type == "cpu" or not hasattr(model, "generate"):
        return _TOGETHER
    config = model.config.get_text_config()
    # A model without attention has no such heads: its state is at most as wide as its hidden states.
    heads = getattr(config, "num_attention_heads", None) or 1
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    heads = getattr(config, "num_key_value_heads", None) or heads
    cached = 2 * config.num_hidden_layers * heads * size * length * model.dtype.itemsize
    sampled = 4 * 4 * config.vocab_size  # float32 logits, their chances and what sampling makes of them
    return max(1, min(_MOST, _BYTES // (cached + sampled)))


def _generate(model: Any, first: Tensor, length: int) -> Tensor:
    """Sampled by ``generate()``, whole sequences: exactly ``length`` tokens each."""
    if length == 1:
        return first
    ids = model.generate(
        first,
        attention_mask=torch.ones_like(first),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=length - 1,
        max_new_tokens=length - 1,
        pad_token_id=0,
    )
    return ids[:, :length]


def _sample(model: nn.Module, ids: Tensor, length: int, generator: torch.Generator) -> Tensor:
    while len(ids) < length:
        chances = logits_of(model, ids)[-1].float().softmax(-1).cpu()
        ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)])
    return ids
