"""Perplexity of SmolLM2-135M: the GGUF file as it is, and optimize() of its dequantised weights, against float.

The file's weights are 4-bit already: with float minima INT4 reproduces them exactly, with zero points it is a second
rounding.

    python -m benchmarks.bench_quality --text wikitext2_raw_test.txt --json benchmarks/results/quality.jsonl

TEXT is WikiText-2 raw, one row per line; every non-empty row is followed by a newline, rows are joined by a blank line.
Scored: the first 4,096 tokens in two windows of 2,048 without overlap, no BOS.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torch_cpullm
from torch_cpullm.linear import PackedEmbedding, PackedLinear
from torch_cpullm.plan import head_compute
from torch_cpullm.runner import find_model

from .rows import write

WINDOWS, WINDOW = 2, 2048
RECIPES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("INT4 g32, zero points", {}),
    ("INT4 g32, symmetric", {"sym": True}),
    ("INT4 g64, zero points", {"group_size": 64}),
    ("INT4 g64, symmetric", {"group_size": 64, "sym": True}),
    ("INT4 per channel, zero points", {"group_size": -1}),
    ("INT4 per channel, symmetric", {"group_size": -1, "sym": True}),
    ("INT8 g32", {"bits": 8}),
)


def text_of(path: Path) -> str:
    """WikiText-2 raw from a file of one row per line."""
    rows = path.read_text(encoding="utf-8").split("\n")
    return "\n\n".join(row + "\n" if row.strip() else "" for row in rows)


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Logits of every window, float32 [windows, WINDOW, vocabulary]."""
    with torch.inference_mode():
        return torch.stack([model(window[None]).logits[0].float() for window in ids])


def perplexity(logits: Tensor, ids: Tensor) -> float:
    """exp of the mean negative log likelihood of the next token."""
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return math.exp(float(loss))


def divergence(logits: Tensor, reference: Tensor) -> float:
    """Mean KL(reference || logits) in nats per token."""
    total = 0.0
    for a, b in zip(logits, reference, strict=True):
        total += float(
            torch.nn.functional.kl_div(a.log_softmax(-1), b.log_softmax(-1), log_target=True, reduction="sum")
        )
    return total / (logits.shape[0] * logits.shape[1])


def bits_per_weight(model: Any) -> float:
    """Stored bits per weight of the decoder's linears, head and embedding left out."""
    head = model.get_output_embeddings()
    packed = [m.packed for m in model.modules() if isinstance(m, PackedLinear) and m is not head]
    return 8 * sum(p.nbytes for p in packed) / sum(p.n * p.k for p in packed)


def measure(name: str, model: Any, ids: Tensor, reference: Tensor) -> dict[str, Any]:
    """One row: perplexity under fp32 and int8 compute, and KL of int8 against the float model."""
    row: dict[str, Any] = {"bench": "quality", "weights": name, "bits per weight": round(bits_per_weight(model), 2)}
    head = model.get_output_embeddings()
    for compute in ("fp32", "int8"):
        for module in model.modules():
            if isinstance(module, PackedLinear):
                module.compute = head_compute(compute) if module is head else compute
        logits = logits_of(model, ids)
        row[f"perplexity, {compute} compute"] = round(perplexity(logits, ids), 3)
        row[f"KL, {compute} compute"] = round(max(0.0, divergence(logits, reference)), 4)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--json", type=Path, help="append rows to this file")
    args = parser.parse_args()
    path = find_model(None)
    model, tokenizer = torch_cpullm.load_gguf(path, progress=False)
    tokens = tokenizer(text_of(args.text)[:60000], return_tensors="pt").input_ids[0]
    ids = tokens[: WINDOWS * WINDOW].view(WINDOWS, WINDOW)
    dense = torch_cpullm.restore(torch_cpullm.load_gguf(path, progress=False)[0])
    reference = logits_of(dense, ids)
    results = [
        {
            "bench": "quality",
            "weights": "float, dequantised file",
            "perplexity, fp32 compute": round(perplexity(reference, ids), 3),
        }
    ]
    results.append(measure("GGUF file as it is (float minima)", model, ids, reference))
    for name, settings in RECIPES:
        model = torch_cpullm.restore(torch_cpullm.load_gguf(path, progress=False)[0])
        assert not any(isinstance(module, (PackedLinear, PackedEmbedding)) for module in model.modules())
        results.append(
            measure(name, torch_cpullm.optimize(model, torch_cpullm.CpuLlmConfig(**settings)), ids, reference)
        )
        print(results[-1], flush=True)
    for row in results:
        write(row, args.json)


if __name__ == "__main__":
    main()
