"""Tiny checkpoints as GPTQ, AWQ, AutoRound and compressed-tensors store them, and what their tensors mean.

The writers put codes into words by sums; the dequantisers take them out again one output or input at a time, by
shifts, in the words of each format's definition. Neither uses anything of the package.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from families import LLAMA_LIKE, Family
from safetensors.torch import save_file
from torch import Tensor, nn

SIZES = {**LLAMA_LIKE, "intermediate_size": 136}  # whole words of eight; one group and a half; 5 heads of 16
FAMILIES = {
    "llama": Family("llama", "LlamaConfig", SIZES),
    "qwen2": Family("qwen2", "Qwen2Config", SIZES, tied=True),
}
AWQ_LANES = (0, 2, 4, 6, 1, 3, 5, 7)  # outputs from a word's lowest bits up


@dataclass(frozen=True)
class Recipe:
    """What to write. kind: gptq, gptq_v2, awq or pack-quantized; order: groups by activation order; settings: what the
    quantization_config has besides, or instead.
    """

    kind: str
    bits: int = 4
    group_size: int = 32
    sym: bool = True
    order: bool = False
    family: str = "llama"
    scales: torch.dtype = torch.float16
    settings: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        marks = "sym" if self.sym else "asym", "order" if self.order else "", *(str(v) for _, v in self.settings)
        words = self.kind, f"{self.bits}bit", f"g{self.group_size}", *marks, self.family
        return "-".join(word for word in words if word and "{" not in word)


@dataclass
class Matrix:
    """w = scale * (value - zero): values [n, k], zeros and scales [n, groups], the group of every input [k]."""

    values: Tensor
    zeros: Tensor
    scales: Tensor
    g_idx: Tensor


def quantised(weight: Tensor, recipe: Recipe, generator: torch.Generator) -> Matrix:
    """Each group on its own, by its extremes."""
    n, k = weight.shape
    group = k if recipe.group_size == -1 else recipe.group_size
    g_idx = torch.arange(k) // group
    if recipe.order:
        g_idx = g_idx[torch.randperm(k, generator=torch.Generator().manual_seed(k))]  # linears of one input share it
    top, groups = (1 << recipe.bits) - 1, int(g_idx.max()) + 1
    values, zeros, scales = torch.empty(n, k, dtype=torch.int64), [], []
    for index in range(groups):
        columns = weight[:, g_idx == index]
        low, high = columns.amin(1).clamp(max=0), columns.amax(1).clamp(min=0)
        if recipe.sym:
            scale, zero = torch.maximum(-low, high) * 2 / top, torch.full((n,), (top + 1) // 2)
        else:
            scale = (high - low) / top
            zero = (-low / scale).round().clamp(1, top).long()  # v1 of GPTQ has no zero
        scale = scale.to(recipe.scales)
        values[:, g_idx == index] = (columns / scale.float()[:, None]).round().long().add(zero[:, None]).clamp(0, top)
        zeros.append(zero)
        scales.append(scale)
    return Matrix(values, torch.stack(zeros, 1), torch.stack(scales, 1), g_idx)


def words(values: Tensor, bits: int, lanes: tuple[int, ...] | None = None) -> Tensor:
    """[r, c] -> int32 [r, ceil(c / per)]: in each word the sum of value << (bits * lane)."""
    per = 32 // bits
    values = nn.functional.pad(values, (0, -values.shape[1] % per)).view(values.shape[0], -1, per)
    if lanes:
        values = values[:, :, list(lanes)]
    total = (values << (bits * torch.arange(per))).sum(2)
    return torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32)


def tensors_of(matrix: Matrix, recipe: Recipe) -> dict[str, Tensor]:
    """The tensors of one linear, by the last part of their names."""
    bits, half = recipe.bits, 1 << (recipe.bits - 1)
    if recipe.kind.startswith("gptq"):
        stored = matrix.zeros - int(recipe.kind == "gptq")
        found = {
            "qweight": words(matrix.values, bits).T,
            "qzeros": words(stored.T, bits),
            "scales": matrix.scales.T,
            "g_idx": matrix.g_idx.to(torch.int32),
        }
    elif recipe.kind == "awq":
        found = {
            "qweight": words(matrix.values.T, 4, AWQ_LANES),
            "qzeros": words(matrix.zeros.T, 4, AWQ_LANES),
            "scales": matrix.scales.T,
        }
    else:
        found = {
            "weight_packed": words(matrix.values, bits),
            "weight_scale": matrix.scales,
            "weight_shape": torch.tensor(matrix.values.shape),
        }
        if not recipe.sym:
            plain = dict(recipe.settings).get("zero points") == "int8"
            found["weight_zero_point"] = (
                (matrix.zeros - half).to(torch.int8) if plain else words(matrix.zeros.T, bits).T
            )
        if recipe.order:
            found["weight_g_idx"] = matrix.g_idx.to(torch.int32)
    return {name: value.contiguous() for name, value in found.items()}


def dequantised(tensors: dict[str, Tensor], recipe: Recipe) -> Tensor:
    """W float32 [n, k], one row or column at a time, as the format's definition reads."""
    bits, mask, per = recipe.bits, (1 << recipe.bits) - 1, 32 // recipe.bits
    wide = {name: value.long() if value.dtype == torch.int32 else value for name, value in tensors.items()}
    columns = []
    if recipe.kind.startswith("gptq"):
        k = wide["qweight"].shape[0] * per
        groups = wide.get("g_idx", torch.arange(k) // (k if recipe.group_size == -1 else recipe.group_size))
        n = wide["scales"].shape[1]
        shifts = bits * (torch.arange(n) % per)
        for i in range(k):
            value = wide["qweight"][i // per] >> bits * (i % per) & mask
            zero = wide["qzeros"][groups[i]][torch.arange(n) // per] >> shifts & mask
            zero = zero + int(recipe.kind == "gptq")
            columns.append(wide["scales"][groups[i]].float() * (value - zero).float())
        return torch.stack(columns, 1)
    if recipe.kind == "awq":
        lane_of = {output: lane for lane, output in enumerate(AWQ_LANES)}
        k, n = wide["qweight"].shape[0], wide["scales"].shape[1]
        group = torch.arange(k) // (k if recipe.group_size == -1 else recipe.group_size)
        rows = []
        for j in range(n):
            shift = 4 * lane_of[j % 8]
            value, zero = (wide[name][:, j // 8] >> shift & 15 for name in ("qweight", "qzeros"))
            rows.append(wide["scales"][:, j].float()[group] * (value - zero[group]).float())
        return torch.stack(rows)
    n, k = wide["weight_shape"].tolist()
    half = 1 << (bits - 1)
    groups = wide.get("weight_g_idx", torch.arange(k) // (k if recipe.group_size == -1 else recipe.group_size))
    for i in range(k):
        value = (wide["weight_packed"][:, i // per] >> bits * (i % per) & mask) - half
        zero = torch.zeros(n, dtype=torch.int64)
        points = wide.get("weight_zero_point")
        if points is not None and points.dtype == torch.int8:
            zero = points[:, groups[i]].long()
        elif points is not None:
            shifts = bits * (torch.arange(n) % per)
            zero = (points[:, groups[i]][torch.arange(n) // per] >> shifts & mask) - half
        columns.append(wide["weight_scale"][:, groups[i]].float() * (value - zero).float())
    return torch.stack(columns, 1)


def quantization_config(recipe: Recipe) -> dict[str, Any]:
    """As the programs write it."""
    if recipe.kind == "pack-quantized":
        weights = {
            "num_bits": recipe.bits,
            "type": "int",
            "symmetric": recipe.sym,
            "strategy": "channel" if recipe.group_size == -1 else "group",
            "group_size": None if recipe.group_size == -1 else recipe.group_size,
            "actorder": "group" if recipe.order else None,
        }
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
        found: dict[str, Any] = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": group},
        }
    else:
        found = {"bits": recipe.bits, "group_size": recipe.group_size}
        if recipe.kind == "awq":
            found |= {"quant_method": "awq", "version": "gemm", "zero_point": True, "modules_to_not_convert": None}
        else:
            found |= {"quant_method": "gptq", "sym": recipe.sym, "desc_act": recipe.order}
            found |= {"checkpoint_format": recipe.kind, "true_sequential": True, "lm_head": False}
    return {**found, **{name: value for name, value in recipe.settings if " " not in name}}


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Those of the layers, by name; such programs leave the head alone."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "layers." in name}


def write(path: Path, recipe: Recipe, shard_tensors: int | None = None) -> Any:
    """Write a checkpoint; the float model with the weights that its tensors mean.

    shard_tensors: how many to a file, None for all in one.
    """
    model = FAMILIES[recipe.family].build()
    generator = torch.Generator().manual_seed(5)
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    if recipe.family == "qwen2":
        del state["lm_head.weight"]
    with torch.no_grad():
        for name, linear in linears(model).items():
            tensors = tensors_of(quantised(linear.weight, recipe, generator), recipe)
            del state[f"{name}.weight"]
            state.update({f"{name}.{key}": value for key, value in tensors.items()})
            linear.weight.copy_(dequantised(tensors, recipe))
    path.mkdir(parents=True, exist_ok=True)
    save(path, state, shard_tensors)
    config = {**model.config.to_dict(), "quantization_config": quantization_config(recipe)}
    (path / "config.json").write_text(json.dumps(config))
    return model


def save(path: Path, state: dict[str, Tensor], shard_tensors: int | None = None) -> None:
    """Safetensors files as transformers names them."""
    if shard_tensors is None:
        save_file(state, path / "model.safetensors", {"format": "pt"})
        return
    names = sorted(state)
    shards = [names[first : first + shard_tensors] for first in range(0, len(names), shard_tensors)]
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        save_file({name: state[name] for name in shard}, path / file, {"format": "pt"})
    places = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    index = {"metadata": {}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
