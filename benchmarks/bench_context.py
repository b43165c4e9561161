"""What a long context costs with bf16 and with INT8 keys and values: attention, whole tokens, perplexity.

``python -m benchmarks.bench_context --model llama-2-7b --depth 8192``: a shape with random weights whose caches are
filled with random keys and values, so that nobody waits for a prefill. attention: the operator on every layer's cache
in turn, µs per layer. Both caches are measured in turns; medians. ``--text FILE`` instead: perplexity of SmolLM2 (a
GGUF file of 4 bits) over two windows of 2,048 tokens with both kinds of cache, as bench_quality cuts the text.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from torch_cpullm import CpuLlmConfig, launch, ops
from torch_cpullm.kv_cache import CpuLlmCache

from . import bench_quality, machine, rows, shapes

KINDS = {"bf16": "auto", "int8": "int8"}
"""Name -> setting of CpuLlmConfig.kv_cache; the models compute in bf16."""


def filled_cache(config: Any, kind: str, depth: int) -> CpuLlmCache:
    """A cache of random keys and values of ``depth`` tokens, with room for more."""
    cache = CpuLlmCache(config, KINDS[kind])
    heads = config.num_key_value_heads
    states = torch.randn(2, 1, heads, depth, config.hidden_size // config.num_attention_heads).bfloat16()
    for layer in range(config.num_hidden_layers):
        cache.update(states[0], states[1], layer)
    return cache


def attention_s(config: Any, cache: Any, depth: int) -> float:
    """Seconds of one layer's attention of one query over ``depth`` tokens: all layers' caches, one after the other."""
    d = config.hidden_size // config.num_attention_heads
    q = torch.randn(1, config.num_attention_heads, 1, d)
    start = time.perf_counter()
    for layer in cache.layers:
        ops.attention(q, layer.k, layer.v, scale=d**-0.5, k_scale=layer.k_scale, v_scale=layer.v_scale, length=depth)
    return (time.perf_counter() - start) / len(cache.layers)


def speed(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per kind of cache."""
    settings = CpuLlmConfig(group_size=args.group, sym=True)
    model = shapes.packed_model(args.model, settings, changes={"max_position_embeddings": args.depth + 4 * args.tg})
    caches = {kind: filled_cache(model.config, kind, args.depth) for kind in KINDS}
    attention: dict[str, list[float]] = {kind: [] for kind in KINDS}
    tokens: dict[str, list[float]] = {kind: [] for kind in KINDS}
    token = torch.tensor([[5]])
    with torch.inference_mode():
        for step in range(args.tg + 2):  # the first two warm up
            for kind, cache in caches.items():
                spent = attention_s(model.config, cache, args.depth)
                start = time.perf_counter()
                model(token, past_key_values=cache, use_cache=True)
                if step > 1:
                    tokens[kind].append(time.perf_counter() - start)
                    attention[kind].append(spent)
    facts = {"bench": "context", "model": args.model, "depth": args.depth, "group": args.group, "threads": args.threads}
    return [
        facts
        | {
            "kv": kind,
            "attention_us": round(1e6 * statistics.median(attention[kind]), 1),
            "ms_per_token": round(1e3 * statistics.median(tokens[kind]), 3),
        }
        for kind in KINDS
    ]


def quality(text: Path) -> list[dict[str, Any]]:
    """A row per kind of cache: perplexity of SmolLM2."""
    import torch_cpullm
    from torch_cpullm.runner import find_model

    model, tokenizer = torch_cpullm.load_gguf(find_model(None), progress=False)
    model.to(torch.bfloat16)
    size = bench_quality.WINDOWS * bench_quality.WINDOW
    ids = tokenizer(bench_quality.text_of(text)[:60000], return_tensors="pt").input_ids[0][:size]
    ids = ids.view(bench_quality.WINDOWS, bench_quality.WINDOW)
    found = []
    for kind, setting in KINDS.items():
        with torch.inference_mode():
            logits = [
                model(window[None], past_key_values=CpuLlmCache(model.config, setting), use_cache=True).logits[0]
                for window in ids
            ]
        value = bench_quality.perplexity(torch.stack(logits).float(), ids)
        found.append({"bench": "context", "model": shapes.REAL, "kv": kind, "perplexity": round(value, 4)})
    return found


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tinyllama-1.1b", help="a shape of benchmarks/shapes.py of Llama's kind")
    parser.add_argument("--depth", type=int, default=8192, help="tokens in the cache")
    parser.add_argument("--tg", type=int, default=20, help="tokens timed")
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--text", type=Path, help="perplexity on this text instead of speed")
    parser.add_argument("--json", type=Path, help="append rows to this file")
    args = parser.parse_args(argv)
    if args.depth < 1 or args.tg < 1:
        parser.error("--depth and --tg are at least 1")
    if shapes.SHAPES.get(args.model, {}).get("model_type") != "llama":
        parser.error(f"--model must be a shape of Llama's kind, got {args.model!r}")
    args.threads = args.threads or launch.default_threads().count
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with machine.Threads(args.threads):
        found = quality(args.text) if args.text else speed(args)
    for key in ("attention_us", "ms_per_token", "perplexity"):
        if key in found[0]:
            print(f"{key}: {found[0][key]} bf16, {found[1][key]} int8, ratio {found[0][key] / found[1][key]:.3f}")
    for row in found:
        rows.write(row, args.json)


if __name__ == "__main__":
    main()
