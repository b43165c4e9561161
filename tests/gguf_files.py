"""Small GGUF files of every architecture, written as llama.cpp's converter would, with the model they came from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

VOCABULARY = 288
LAYERS = 2
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 5000.0,
    "bos_token_id": 259,
    "eos_token_id": 258,
    "pad_token_id": 260,
}
KEYS: dict[str, Any] = {
    "context_length": 128,
    "block_count": LAYERS,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "rope.freq_base": 5000.0,
    "rope.dimension_count": 16,
    "vocab_size": VOCABULARY,
}
EPSILON = 2.0**-17
"""Of every norm: exact in float32, and no default of any class."""
LAYER_NORM = ("stablelm", "starcoder2", "nemotron", "gpt2", "bloom", "falcon")
"""Architectures whose files name attention.layer_norm_epsilon instead of attention.layer_norm_rms_epsilon."""


def unchanged(name: str, array: np.ndarray) -> np.ndarray:
    return array


def rope_interleaved(name: str, array: np.ndarray) -> np.ndarray:
    """llama.cpp's order of the q and k rows: the two halves of a head alternate."""
    heads = 4 if "attn_q." in name else 2 if "attn_k." in name else 0
    if not heads:
        return array
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def norms_plus_one(name: str, array: np.ndarray) -> np.ndarray:
    return array + 1 if name.endswith("norm.weight") else array


def qkv_apart(name: str, array: np.ndarray) -> np.ndarray:
    """BLOOM keeps q, k, v of each head together, the file keeps all q, all k, all v."""
    if "attn_qkv" not in name:
        return array
    parts = array.reshape(4, 3, -1, *array.shape[1:])
    return np.concatenate([parts[:, i].reshape(-1, *array.shape[1:]) for i in range(3)])


@dataclass
class Case:
    """One architecture: its transformers config, the file's metadata, and how the file stores tensors."""

    model_type: str
    config: dict[str, Any]
    keys: dict[str, Any]
    stored: Callable[[str, np.ndarray], np.ndarray] = unchanged
    float_modules: tuple[str, ...] = field(default=())


def sized(**more: Any) -> dict[str, Any]:
    return {**SIZES, **more}


def keyed(**more: Any) -> dict[str, Any]:
    return {**KEYS, **{key.replace("__", "."): value for key, value in more.items()}}


CASES = {
    "llama": Case("llama", sized(head_dim=16, rms_norm_eps=EPSILON), KEYS, rope_interleaved),
    "llama tied": Case(
        "llama", sized(head_dim=16, rms_norm_eps=EPSILON, tie_word_embeddings=True), KEYS, rope_interleaved
    ),
    "qwen2": Case("qwen2", sized(rms_norm_eps=EPSILON), KEYS),
    "qwen3": Case("qwen3", sized(head_dim=32, rms_norm_eps=EPSILON), keyed(attention__key_length=32)),
    "gemma2": Case(
        "gemma2",
        sized(head_dim=16, rms_norm_eps=EPSILON, sliding_window=8, tie_word_embeddings=True),
        keyed(attention__key_length=16, attention__sliding_window=8),
        norms_plus_one,
    ),
    "gemma3": Case(
        "gemma3_text",
        sized(head_dim=16, rms_norm_eps=EPSILON, sliding_window=8, tie_word_embeddings=True),
        keyed(attention__key_length=16, attention__sliding_window=8),
        norms_plus_one,
    ),
    "phi3": Case("phi3", sized(rms_norm_eps=EPSILON, sliding_window=8), keyed(attention__sliding_window=8)),
    "stablelm": Case("stablelm", sized(layer_norm_eps=EPSILON, use_qkv_bias=True), keyed(rope__dimension_count=4)),
    "starcoder2": Case("starcoder2", sized(norm_epsilon=EPSILON, tie_word_embeddings=True), KEYS),
    "nemotron": Case(
        "nemotron",
        sized(head_dim=16, norm_eps=EPSILON, partial_rotary_factor=0.5),
        keyed(rope__dimension_count=8),
        norms_plus_one,
    ),
    "gpt2": Case(
        "gpt2",
        {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": None}
        | {"layer_norm_epsilon": EPSILON, "bos_token_id": 259, "eos_token_id": 258},
        keyed(feed_forward_length=256),
    ),
    "bloom": Case(
        "bloom",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4, "layer_norm_epsilon": EPSILON},
        KEYS,
        qkv_apart,
    ),
    "falcon": Case(
        "falcon",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False}
        | {"bias": False, "rope_theta": 5000.0, "layer_norm_epsilon": EPSILON},
        keyed(attention__head_count_kv=1, feed_forward_length=256),
    ),
    "qwen3moe": Case(
        "qwen3_moe",
        sized(head_dim=16, rms_norm_eps=EPSILON, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
        | {"norm_topk_prob": True},
        keyed(attention__key_length=16, expert_count=4, expert_used_count=2, expert_feed_forward_length=32),
        float_modules=("experts", "gate"),
    ),
}


def kind_by_name(name: str, shape: tuple[int, ...]) -> Kind:
    """All three exact types in every file; what llama.cpp never quantises stays F32."""
    if len(shape) != 2 or "norm" in name or name.startswith("position_embd") or "ffn_gate_inp" in name:
        return Kind.F32
    if name.startswith(("token_embd", "output.")):
        return Kind.Q8_0
    return (Kind.Q4_0, Kind.Q4_1, Kind.Q8_0)[sum(map(ord, name)) % 3]


def add_metadata(writer: gguf.GGUFWriter, arch: str, keys: dict[str, Any]) -> None:
    for key, value in keys.items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32 if isinstance(value, float) else None
        (add or writer.add_string)(key if key.startswith("tokenizer.") else f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_{'' if arch in LAYER_NORM else 'rms_'}epsilon", EPSILON)
    spelled = [*bytes_to_unicode().values(), "he", "ll"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(spelled + [f"<|{i}|>" for i in range(len(spelled), VOCABULARY)])
    writer.add_token_types([1] * len(spelled) + [3] * (VOCABULARY - len(spelled)))
    writer.add_token_merges(["h e", "l l"])
    writer.add_eos_token_id(258)
    writer.add_bos_token_id(259)
    writer.add_pad_token_id(260)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def write_file(
    path: Path,
    arch: str,
    tensors: dict[str, tuple[np.ndarray, Kind]],
    keys: dict[str, Any],
) -> None:
    """tensors: name -> (values, type to store them in), or (uint8 blocks [rows, bytes], their type)."""
    writer = gguf.GGUFWriter(path, arch)
    add_metadata(writer, arch, keys)
    for name, (array, kind) in tensors.items():
        blocks = array if array.dtype == np.uint8 else gguf.quants.quantize(np.ascontiguousarray(array), kind)
        writer.add_tensor(name, blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_model(case: Case) -> Any:
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(case.model_type, **case.config)).eval()
    for name, parameter in model.named_parameters():
        centre = 1.0 if "norm" in name and name.endswith("weight") and case.stored is not norms_plus_one else 0.0
        parameter.data.normal_(centre, 0.08 if parameter.dim() > 1 else 0.3)
    return model


def file_tensors(model: Any, arch: str, case: Case, kinds: Callable[..., Kind]) -> dict[str, tuple[np.ndarray, Kind]]:
    """What llama.cpp's converter would write. Rounds the model's own weights to what the file holds on the way."""
    arch_id = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    names = gguf.get_tensor_name_map(arch_id, LAYERS)
    conv1d = {f"{name}.weight" for name, m in model.named_modules() if type(m).__name__ == "Conv1D"}
    tensors: dict[str, tuple[np.ndarray, Kind]] = {}
    for name, value in model.state_dict().items():
        if name in model.all_tied_weights_keys:
            continue
        if name.endswith("experts.gate_up_proj"):
            stem = names.get_name(name.replace("gate_up", "down"))
            for word, half in zip(("gate", "up"), value.chunk(2, dim=1), strict=True):
                tensors[stem.replace("down", word) + ".weight"] = (half.numpy(), Kind.F32)
            continue
        base, suffix = name.rsplit(".", 1) if name.endswith((".weight", ".bias")) else (name, "weight")
        stem = names.get_name(base) or names.get_name(base.removeprefix("transformer."))
        assert stem, name
        array = value.T.contiguous().numpy() if name in conv1d else value.numpy()
        kind = kinds(f"{stem}.{suffix}", array.shape)
        rounded = gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind).reshape(array.shape)
        tensors[f"{stem}.{suffix}"] = (case.stored(f"{stem}.{suffix}", array.copy()), kind)
        value.copy_(torch.from_numpy(rounded.T if name in conv1d else rounded))
    return tensors


def write_model(path: Path, name: str, kinds: Callable[..., Kind] = kind_by_name) -> Any:
    """Writes CASES[name] to `path`, returns the float model with exactly the values the file holds."""
    case = CASES[name]
    model = random_model(case)
    arch = name.split()[0]
    with torch.no_grad():
        write_file(path, arch, file_tensors(model, arch, case, kinds), case.keys)
    return model


IDS = torch.tensor([[5, 17, 220, 31, 99, 4, 8, 15, 16, 23, 42, 108], [7, 7, 1, 0, 250, 66, 3, 14, 15, 92, 65, 35]])
