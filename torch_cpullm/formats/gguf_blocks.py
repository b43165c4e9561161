"""Blocks of a GGUF matrix -> codes and scales of a QuantizedWeight, without a float in between.

Formats that are taken over (d, m, D, M are fp16, q the stored code; 32 weights share a scale in all of them):

    Q4_0  18 bytes for 32 weights: d, codes                  w = d * (q - 8)         -> symmetric
    Q4_1  20 bytes for 32 weights: d, m, codes               w = d * q + m           -> float minimum m
    Q8_0  34 bytes for 32 weights: d, int8 codes             w = d * q               -> bits 8, code q + 128
    Q4_K  144 bytes for 256 weights: D, M, s[8] and t[8] of
          6 bits each in 12 bytes, codes                     w = D*s * q - M*t       -> float minimum -M*t

The first three are exact: `packing.dequantize` performs the same float32 operations in the same order as
`gguf.quants.dequantize` and gives the same bits. Q4_K keeps its codes; the products D*s and M*t have up to 17
significant bits and are rounded to fp16, which moves a weight by at most 2^-11 of D*s*q plus 2^-11 of M*t.
In 4-bit blocks byte i of a run holds weight i in its low and weight i + (16; Q4_K: 32) in its high nibble.
"""

from __future__ import annotations

import numpy as np
import torch

from ..packing import QuantizedWeight
from .gguf_reader import GgufFile, ggml_type_name

__all__ = ["EXACT_TYPES", "GROUP", "quantized_weight"]

_Q4_0, _Q4_1, _Q8_0, _Q4_K = 2, 3, 8, 12
EXACT_TYPES = (_Q4_0, _Q4_1, _Q8_0, _Q4_K)
"""ggml types that :func:`quantized_weight` reads."""
GROUP = 32
"""Weights that share a scale in every one of these types."""


def quantized_weight(file: GgufFile, name: str, rows: np.ndarray | None = None) -> QuantizedWeight:
    """The codes and scales of one Q4_0, Q4_1, Q8_0 or Q4_K matrix, as stored.

    file: an open GgufFile. name: a tensor [n, k] of it. rows: int [n] or None, row i of the result is stored row
    rows[i].

    Returns a QuantizedWeight with group_size 32 and fp16 scales (and fp16 minima for Q4_1 and Q4_K).
    Raises ValueError for another type or shape, and for scales or minima that are NaN or infinite.
    """
    tensor = file.tensors[name]
    kind = tensor.ggml_type
    if kind not in EXACT_TYPES or len(tensor.shape) != 2:
        raise ValueError(
            f"{file.path}: tensor {name!r} is {ggml_type_name(kind)} {list(tensor.shape)}, "
            "expected a Q4_0, Q4_1, Q8_0 or Q4_K matrix"
        )
    n, k = tensor.shape
    raw = file.raw(name) if rows is None else file.raw(name)[rows]
    minima: np.ndarray | None = None
    if kind == _Q4_K:
        codes, scales, minima = _q4_k(raw.reshape(n, k // 256, -1))
    else:
        blocks = raw.reshape(n, k // GROUP, -1)
        header_bytes = 4 if kind == _Q4_1 else 2
        halves = blocks[..., :header_bytes].copy().view(np.float16)  # [n, groups, 1 or 2]: d, m
        scales = np.ascontiguousarray(halves[..., 0])
        if kind == _Q4_1:
            minima = np.ascontiguousarray(halves[..., 1])
        stored = blocks[..., header_bytes:]
        codes = np.empty((n, k // GROUP, GROUP), dtype=np.uint8)
        if kind == _Q8_0:
            np.bitwise_xor(stored, 0x80, out=codes)  # int8 value + 128
        else:
            np.bitwise_and(stored, 15, out=codes[..., :16])
            np.right_shift(stored, 4, out=codes[..., 16:])
    try:
        return QuantizedWeight(
            torch.from_numpy(codes.reshape(n, k)),
            torch.from_numpy(scales.reshape(n, -1)),
            None if minima is None else torch.from_numpy(minima.reshape(n, -1)),
            8 if kind == _Q8_0 else 4,
            GROUP,
        )
    except ValueError as error:  # NaN or infinite scales
        raise ValueError(f"{file.path}: tensor {name!r}: {error} (corrupt file?)") from error


def _q4_k(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """uint8 [n, superblocks, 144] -> codes uint8 [n, superblocks, 256], scales and minima fp16 [n, superblocks, 8]."""
    factors = blocks[..., :4].copy().view(np.float16).astype(np.float32)  # [n, superblocks, 2]: D, M
    packed = blocks[..., 4:16]
    # Bytes 0-3 hold s[0..3] and 4-7 t[0..3], 6 bits each; their two top bits and the nibbles of 8-11 make s, t[4..7].
    first, second, low = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    s = np.concatenate([first & 63, (low & 15) | (first >> 2 & 48)], axis=-1)
    t = np.concatenate([second & 63, (low >> 4) | (second >> 2 & 48)], axis=-1)
    with np.errstate(over="ignore", invalid="ignore"):  # checked by QuantizedWeight
        scales = (factors[..., :1] * s).astype(np.float16)
        minima = (-(factors[..., 1:] * t)).astype(np.float16)
    stored = blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32)
    codes = np.empty((*blocks.shape[:2], 4, 2, 32), dtype=np.uint8)
    np.bitwise_and(stored, 15, out=codes[..., 0, :])
    np.right_shift(stored, 4, out=codes[..., 1, :])
    return codes.reshape(*blocks.shape[:2], 256), scales, minima
