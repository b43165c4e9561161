"""What a token costs outside of kernels: a straight line through models that differ in their number of layers alone.

Llama models of the smallest sizes, 32 hidden units and 32 words, whose kernels have next to nothing to do, decode
greedily through generate(). Of two numbers of layers, with the medians of their steps, interleaved over rounds:

    us_per_layer = (step_b - step_a) / (layers_b - layers_a)        us_per_token = step_a - layers_a us_per_layer

So both hold the kernels' own calls, barriers among them, and us_per_token transformers' loop, embedding, last norm,
head and sampling. Engines: cpullm, and transformers with float32 weights.

    python -m benchmarks.bench_overhead --threads 2 --json benchmarks/results/overhead.jsonl
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

from . import engines, rows

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 1, "num_key_value_heads": 1}
ENGINES = ("cpullm", "transformers")
PROMPT = 8


def make(engine: str, layers: int, tokens: int) -> Any:
    """The model of an engine, as bench_models drives it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import torch_cpullm

    from . import shapes

    sizes = SIZES | {"num_hidden_layers": layers, "vocab_size": 32, "max_position_embeddings": PROMPT + tokens}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes), dtype=torch.float32)
    model = shapes.filled(model)
    return engines.HuggingFace(torch_cpullm.optimize(model) if engine == "cpullm" else model, 0, 0)


def measure(layers: Sequence[int], tokens: int, rounds: int) -> dict[str, list[float]]:
    """Engine -> the median step in µs of each number of layers."""
    made = {(engine, count): make(engine, count, tokens) for engine in ENGINES for count in layers}
    steps: dict[tuple[str, int], list[float]] = {key: [] for key in made}
    for round_ in range(rounds + 1):
        for key, model in made.items():
            clock = engines.Clock()
            model.run({"pp": PROMPT, "tg": tokens, "depth": 0, "batch": 1, "seed": round_}, clock)
            steps[key] += clock.times[1:] if round_ else []  # the first round warms up
    return {engine: [1e6 * statistics.median(steps[engine, count]) for count in layers] for engine in ENGINES}


def line(layers: Sequence[int], us: Sequence[float]) -> tuple[float, float]:
    """(µs per layer, µs per token without layers) of two steps."""
    slope = (us[1] - us[0]) / (layers[1] - layers[0])
    return slope, us[0] - layers[0] * slope


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs=2, default=[4, 36], metavar="N", help="two numbers of layers")
    parser.add_argument("--tg", type=int, default=256, help="generated tokens of a run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", help="append rows to this file")
    args = parser.parse_args(argv)
    if not 1 <= args.layers[0] < args.layers[1]:
        parser.error(f"--layers must be two ascending numbers, got {args.layers[0]} {args.layers[1]}")
    for name, least in (("tg", 8), ("rounds", 1), ("threads", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name} must be at least {least}, got {value}")
    import torch
    import transformers

    from torch_cpullm.launch import default_threads

    args.threads = args.threads or default_threads().count
    torch.set_num_threads(args.threads)
    with torch.inference_mode():
        found = measure(args.layers, args.tg, args.rounds)
    for engine, us in found.items():
        slope, rest = line(args.layers, us)
        row = {
            "engine": engine,
            "threads": args.threads,
            "layers": " and ".join(map(str, args.layers)),
            "us_per_step": " and ".join(f"{each:.0f}" for each in us),
            "us_per_layer": round(slope, 2),
            "us_per_token": round(rest, 1),
            "version": f"transformers {transformers.__version__}",
        }
        rows.write(row, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
