"""GGUF files of a named shape with random blocks: llama.cpp's types and layout, nothing is quantised.

The types follow llama-quantize: Q4_0 with a Q6_K head; Q4_K_M with Q6_K for the head, half of the value and down
projections, and Q5_K for a fused qkv. The vocabulary is of the kind "no_vocab".
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from .shapes import SHAPES, linears

Kind = gguf.GGMLQuantizationType
FORMS = ("Q4_0", "Q4_K_M")
SCALE = np.float16(0.002)


def blocks(kind: Kind, rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [rows, bytes of a row]: random codes, scales such that values stay small."""
    size, stored = gguf.GGML_QUANT_SIZES[kind]
    data = np.frombuffer(rng.bytes(rows * columns // size * stored), np.uint8).reshape(-1, stored).copy()
    scale = np.frombuffer(SCALE.tobytes(), np.uint8)
    if kind == Kind.Q6_K:
        data[:, 192:208] = 1  # a scale per 16 codes, before the block's own at the end
        data[:, 208:] = scale
    else:
        data[:, :2] = scale
    if kind in (Kind.Q4_K, Kind.Q5_K):
        data[:, 2:4] = 0  # minima
        data[:, 4:16] = 1
    return data.reshape(rows, -1)


def kind_of(form: str, what: str, layer: int = 0, layers: int = 1) -> Kind:
    """The type that llama-quantize gives a matrix."""
    if what == "output":
        return Kind.Q6_K
    if form == "Q4_0":
        return Kind.Q4_0
    eighth = layers // 8
    more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    if what in ("attn_v", "ffn_down") and more:
        return Kind.Q6_K
    return Kind.Q5_K if what == "attn_qkv" else Kind.Q4_K


def write(name: str, form: str, path: Path) -> None:
    """Write the shape ``name`` in ``form`` (one of FORMS) to ``path``; ValueError where llama.cpp cannot run it."""
    shape = SHAPES[name]
    llama = shape["model_type"] == "llama"
    if not llama and shape["model_type"] != "gpt_neox":
        raise ValueError(f"llama.cpp has no {shape['model_type']} models")
    writer = gguf.GGUFWriter(path, "llama" if llama else "gptneox")
    heads = shape["num_attention_heads"]
    head_size = shape["hidden_size"] // heads
    writer.add_context_length(shape["max_position_embeddings"])
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(shape.get("num_key_value_heads", heads))
    writer.add_rope_dimension_count(int(head_size * shape.get("rotary_pct", 1.0)))
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{form}"])
    if llama:
        writer.add_layer_norm_rms_eps(1e-5)
    else:
        writer.add_layer_norm_eps(1e-5)
        writer.add_parallel_residual(True)
    tensors = list(_tensors(shape, form, llama))
    for tensor, rows, columns, kind in tensors:
        if kind == Kind.F32:
            writer.add_tensor_info(tensor, (columns,), np.dtype(np.float32), columns * 4)
        else:
            size, stored = gguf.GGML_QUANT_SIZES[kind]
            row_bytes = columns // size * stored
            writer.add_tensor_info(tensor, (rows, row_bytes), np.dtype(np.uint8), rows * row_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    for _, rows, columns, kind in tensors:
        one = np.ones(columns, np.float32)
        writer.write_tensor_data(one if kind == Kind.F32 else blocks(kind, rows, columns, rng))
    writer.close()


def _tensors(shape: dict[str, Any], form: str, llama: bool) -> Iterator[tuple[str, int, int, Kind]]:
    """(name, rows, columns, type) of every tensor; of a vector rows is 1."""
    hidden, vocab, layers = shape["hidden_size"], shape["vocab_size"], shape["num_hidden_layers"]
    parts = ("weight",) if llama else ("weight", "bias")
    yield "token_embd.weight", vocab, hidden, kind_of(form, "token_embd")
    for layer in range(layers):
        for norm in ("attn_norm", "ffn_norm"):
            for part in parts:
                yield f"blk.{layer}.{norm}.{part}", 1, hidden, Kind.F32
        for what, rows, columns in linears(shape):
            yield f"blk.{layer}.{what}.weight", rows, columns, kind_of(form, what, layer, layers)
            if not llama:
                yield f"blk.{layer}.{what}.bias", 1, rows, Kind.F32
    for part in parts:
        yield f"output_norm.{part}", 1, hidden, Kind.F32
    yield "output.weight", vocab, hidden, kind_of(form, "output")
