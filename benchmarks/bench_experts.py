"""Decode speed of a mixture of experts with random weights: packed against transformers in bf16, interleaved.

    python -m benchmarks.bench_experts --json rows.jsonl

A step takes one hidden state (--tokens: several) through the mixtures of all layers, each with its router, which
chooses other experts for every state. Three rows per engine: ``experts`` (the experts alone, given choices),
``mixture`` (router and experts) and ``model`` (a token of the whole model, with 64 tokens in the cache). The share of
the memory bandwidth counts the bytes of the experts that were chosen, each once per layer and step.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torch_cpullm
from torch_cpullm.experts import PackedExperts
from torch_cpullm.launch import default_threads

from . import machine, rows, shapes

CONTEXT = 64  # tokens in the cache of ``model``
ROTATE_CACHES = 8  # as bench_ops reads memory


def build(args: argparse.Namespace) -> Any:
    """A Qwen3-MoE model in bf16 whose layers are all mixtures."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = AutoConfig.for_model(
        "qwen3_moe",
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        moe_intermediate_size=args.intermediate,
        num_attention_heads=max(args.hidden // 64, 1),
        num_key_value_heads=max(args.hidden // 512, 1),
        head_dim=64,
        vocab_size=32000,
        norm_topk_prob=True,
    )
    config.dtype = torch.bfloat16
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    return shapes.filled(model)


class Engine:
    """One model and what is timed of it."""

    def __init__(self, name: str, model: Any, args: argparse.Namespace) -> None:
        self.name, self.model, self.args = name, model, args
        self.mixtures = [layer.mlp for layer in model.model.layers]
        self.times: dict[str, list[float]] = {}
        self.bytes: dict[str, list[int]] = {}
        experts = self.mixtures[0].experts
        held = experts.weights().values() if isinstance(experts, PackedExperts) else experts.parameters()
        self.expert_bytes = sum(weight.nbytes for weight in held) // args.experts

    def step(self, what: str, seed: int) -> None:
        """Time one step and count the bytes of the experts that it reads; the same states for every engine."""
        generator = torch.Generator().manual_seed(seed)
        size = len(self.mixtures), 1, self.args.tokens, self.args.hidden
        states = torch.randn(size, generator=generator).to(torch.bfloat16)
        ids = torch.randint(3, 32000, (1, CONTEXT + self.args.tokens), generator=generator)
        with torch.inference_mode():
            routed = [mixture.gate(x[0]) for mixture, x in zip(self.mixtures, states, strict=True)]
            if what == "model":
                run = self._whole(ids)
            else:
                run = self._experts(states, routed) if what == "experts" else self._mixtures(states)
            start = time.perf_counter()
            run()
            spent = time.perf_counter() - start
        self.times.setdefault(what, []).append(spent)
        count = sum(len(index.unique()) for _, _, index in routed)  # of ``model``: as many, if not these
        self.bytes.setdefault(what, []).append(self.expert_bytes * count)

    def _experts(self, states: Tensor, routed: list[tuple[Tensor, Tensor, Tensor]]) -> Callable[[], None]:
        def run() -> None:
            for mixture, x, (_, weights, index) in zip(self.mixtures, states, routed, strict=True):
                mixture.experts(x[0], index, weights)

        return run

    def _mixtures(self, states: Tensor) -> Callable[[], None]:
        def run() -> None:
            for mixture, x in zip(self.mixtures, states, strict=True):
                mixture(x)

        return run

    def _whole(self, ids: Tensor) -> Callable[[], None]:
        cache = self.model(ids[:, :CONTEXT], use_cache=True, logits_to_keep=1).past_key_values

        def run() -> None:
            self.model(ids[:, CONTEXT:], past_key_values=cache, use_cache=True)

        return run

    def row(self, what: str, first: Engine, bandwidth: Sequence[float], foreign: float | None) -> dict[str, Any]:
        """Medians over the steps, the ratio to ``first`` step by step."""
        args, step = self.args, statistics.median(self.times[what])
        read = statistics.mean(self.bytes[what])
        ratios = [a / b for a, b in zip(first.times[what], self.times[what], strict=True)]
        return {
            "bench": "experts",
            "what": what,
            "engine": self.name,
            "hidden": args.hidden,
            "layers": args.layers,
            "experts": args.experts,
            "top_k": args.top_k,
            "intermediate": args.intermediate,
            "tokens": args.tokens,
            "group": args.group if self is not first else None,
            "form": ("sym" if args.sym else "zero point") if self is not first else None,
            "compute": args.compute if self is not first else None,
            "threads": args.threads,
            "ms_per_step": 1000 * step,
            "speedup": statistics.median(ratios),
            "expert_bytes": read,
            "gbps": read / step / 1e9,
            "pct_bw": 100 * read / step / 1e9 / max(bandwidth),
            "bw_before": bandwidth[0],
            "bw_after": bandwidth[-1],
            "foreign_cpu": foreign,
            "steps": len(self.times[what]),
        }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"hidden": 2048, "layers": 8, "experts": 64, "top-k": 8, "intermediate": 768, "tokens": 1, "steps": 60}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--sym", action="store_true", help="without zero points")
    parser.add_argument("--compute", choices=["int8", "bf16", "fp32"], default="int8")
    parser.add_argument("--json", type=Path, help="append rows to this file")
    args = parser.parse_args(argv)
    args.threads = default_threads().count if args.threads is None else args.threads
    least = min(getattr(args, name.replace("-", "_")) for name in sizes)
    if least < 1 or args.threads < 1 or args.top_k > args.experts or args.hidden % 64:
        parser.error("sizes must be at least 1, --top-k at most --experts, --hidden a multiple of 64")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    model = build(args)
    config = torch_cpullm.CpuLlmConfig(group_size=args.group, sym=args.sym, compute=args.compute)
    packed = torch_cpullm.optimize(copy.deepcopy(model), config, strict=True)
    engines = [Engine("hf-bf16", model, args), Engine("cpullm", packed, args)]
    memory = machine.Memory(ROTATE_CACHES * machine.l3_bytes())
    bandwidth, foreign = [memory.read_gbps(args.threads)], machine.ForeignCpu()
    for seed in range(args.steps + 2):
        for what in ("experts", "mixture", "model"):
            for engine in engines if seed % 2 else reversed(engines):
                with foreign:
                    engine.step(what, seed)
    bandwidth.append(memory.read_gbps(args.threads))
    for engine in engines:  # the first two steps warm up
        engine.times = {what: times[2:] for what, times in engine.times.items()}
    facts = {"machine": machine.machine_name(), "commit": machine.git_commit(), "date": machine.now()}
    shape = f"{args.layers} layers of {args.experts} experts, top {args.top_k}, {args.hidden} x {args.intermediate}"
    print(f"{shape}, {args.tokens} tokens, {args.threads} threads, {facts['machine']}")
    print(f"memory {bandwidth[0]:.1f} GB/s before, {bandwidth[1]:.1f} after")
    print(f"{'what':<9} {'engine':<9} {'ms/step':>9} {'speed-up':>9} {'GB/s':>7} {'% BW':>6}")
    found = [
        engine.row(what, engines[0], bandwidth, foreign.cores)
        for what in ("experts", "mixture", "model")
        for engine in engines
    ]
    for row in found:
        mark = "*" if (row["foreign_cpu"] or 0) > rows.FOREIGN_LIMIT else ""
        print(
            f"{row['what']:<9} {row['engine']:<9} {row['ms_per_step']:>9.3f} {row['speedup']:>9.2f} "
            f"{row['gbps']:>7.1f} {row['pct_bw']:>6.0f}{mark}"
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        with args.json.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row | facts) + "\n" for row in found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
