"""What CQIL costs and what it saves: quality of SmolLM2-135M under plans of equal ideal saving, and speed in INT4.

    python -m benchmarks.bench_cqil quality --text wikitext2_raw_test.txt --json benchmarks/results/cqil_quality.jsonl
    python -m benchmarks.bench_cqil latency --model smollm2-135m --json benchmarks/results/cqil_speed.jsonl

quality: float32 weights dequantised from the GGUF file. TEXT is WikiText-2 raw. Scored on the first 4,096 tokens in two
windows of 2,048; windows of layers are chosen on 1,024 tokens and repaired on others, both from the second half of the
file. "saved" is the share of layer times that running members at once would save (of weights, where attention is
skipped). copying: of 40 random words said twice, how many of the second time are predicted, over 40 lists; order
matters there, and parallel layers are known to hurt it first.

latency: tokens/s of a prompt and of decoding after it, median over interleaved rounds of the same packed model with and
without groups in its middle layers, one memory domain.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torch_cpullm
from torch_cpullm import cqil
from torch_cpullm.cqil_repair import repair
from torch_cpullm.launch import apply_default_threads

from . import machine, shapes
from .bench_quality import WINDOW, WINDOWS, divergence, logits_of, perplexity

SAVINGS = (0.1, 0.2)  # of the layers' time
LISTS, WORDS = 40, 40


def facts() -> dict[str, str]:
    """What every row says of the run."""
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    return {"machine": machine.machine_name(), "commit": machine.git_commit(), "date": date}


def write(row: dict[str, Any], path: Path | None) -> None:
    """Print a row and append it to ``path``."""
    row = {**row, **facts()}
    print(json.dumps(row), flush=True)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


# ---- quality --------------------------------------------------------------------------------------------------------


def copying(model: Any, words: Tensor) -> float:
    """Per cent of the words of a list that are predicted when it is said again. words: int64 [lists, words]."""
    with torch.inference_mode():
        said = model(torch.cat([words, words], 1)).logits[:, words.shape[1] : -1].argmax(-1)
    return 100 * float((said == words[:, 1:]).float().mean())


def lists_of(ids: Tensor) -> Tensor:
    """Lists of different frequent tokens of a text [LISTS, WORDS]."""
    frequent = torch.tensor([i for i, _ in sorted(_counts(ids).items(), key=lambda each: -each[1])[:1000]])
    generator = torch.Generator().manual_seed(0)
    return torch.stack([frequent[torch.randperm(len(frequent), generator=generator)[:WORDS]] for _ in range(LISTS)])


def _counts(ids: Tensor) -> dict[int, int]:
    values, counts = ids.unique(return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def layers_text(plan: cqil.Plan) -> str:
    """The layers of a plan, in few characters."""
    spans: list[list[int]] = []
    for first, size in plan.groups:
        if spans and spans[-1][1] == first:
            spans[-1][1] = first + size
        else:
            spans.append([first, first + size])
    return ", ".join(f"{a}-{b - 1}" if b - a > 1 else str(a) for a, b in spans)


def attention_share(model: Any) -> float:
    """Share of the weights of a decoder layer that are its attention's."""
    layer = model.model.layers[0]
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in layer.named_children()}
    return sizes["self_attn"] / sum(sizes.values())


def plans_of(model: Any, calibration: Tensor, saving: float, only: str = "") -> list[tuple[str, cqil.Plan]]:
    """(name, plan) of every way to save this share of the layers' time, windows chosen on ``calibration``.

    only: what a name must contain.
    """
    count = model.config.num_hidden_layers
    found = []
    for size, title in ((2, "pairs"), (4, "groups of 4")):
        ways = {f"{title}, D = 0": ("cqil", 0), f"{title}, D = 1": ("cqil", 1), f"{title}, lp": ("lp", 0)}
        ways = {name: way for name, way in ways.items() if only in name}
        if ways:
            groups = max(1, round(saving * count / (size - 1)))
            best = cqil.search(model, calibration, size, 1e9, groups=groups, tries=5)
            found += [(name, cqil.Plan.of(model, best.groups, *way)) for name, way in ways.items()]
    skipped = round(saving * count)
    attentions = min(count - 2, round(skipped / attention_share(model)))
    for name, mode, layers in (
        ("layers skipped evenly", "skip", skipped),
        ("late attention skipped", "skip_attention", attentions),
    ):
        if only in name:
            found.append((name, cqil.baseline(model, mode, layers)))
    return found


def quality(args: argparse.Namespace) -> None:
    """Rows of every plan, without and with repair."""
    apply_default_threads()
    model = shapes.float_model(shapes.REAL, torch.float32)
    _, tokenizer = torch_cpullm.load_gguf(shapes.find(shapes.REAL), progress=False)
    lines = args.text.read_text().split("\n")
    text = "\n\n".join(line + "\n" if line.strip() else "" for line in lines)
    ids = tokenizer(text[:60000], return_tensors="pt").input_ids[0][: WINDOWS * WINDOW].view(WINDOWS, WINDOW)
    other = tokenizer(text[len(text) // 2 :][:400000], return_tensors="pt").input_ids[0]
    calibration, training = other[:1024].view(2, 512), other[2048 : 2048 + 256 * 300].view(-1, 256)
    words = lists_of(other)
    reference = logits_of(model, ids)

    def row(name: str, plan: cqil.Plan | None, saved: float, steps: int | None = None) -> dict[str, Any]:
        logits = logits_of(model, ids) if plan is not None else reference
        return {
            "bench": "cqil_quality",
            "plan": name,
            "layers": "" if plan is None else layers_text(plan),
            "saved, %": round(100 * saved, 1),
            "repair steps": steps,
            "perplexity": round(perplexity(logits, ids), 2),
            "KL": round(max(0.0, divergence(logits, reference)), 4),
            "copying, %": round(copying(model, words), 1),
        }

    if not args.repair and not args.only:
        write(row("none", None, 0.0), args.json)
    share = attention_share(model)
    for saving in args.saving:
        for name, plan in plans_of(model, calibration, saving, args.only):
            dropped = sum(size for _, size in plan.groups) / plan.layers * share
            saved = dropped if plan.mode == "skip_attention" else plan.reduction
            cqil.apply(model, plan)
            if not args.repair:
                write(row(name, plan, saved), args.json)
            else:
                before = {key: value.clone() for key, value in model.state_dict().items()}
                repair(model, training, steps=args.repair, learning_rate=1e-3)
                write(row(name, plan, saved, args.repair), args.json)
                model.load_state_dict(before)
            cqil.restore(model)


# ---- latency --------------------------------------------------------------------------------------------------------


def plans_for_speed(model: Any) -> list[tuple[str, cqil.Plan | None]]:
    """Groups over the same middle layers: as many as fit between the first 40 % and the last two."""
    count = model.config.num_hidden_layers
    first = -(-2 * count // 5)
    found: list[tuple[str, cqil.Plan | None]] = [("none", None)]
    for size in (2, 4):
        groups = [(first + size * i, size) for i in range((count - 2 - first) // size)]
        found += [(f"{size} at once, D = {d}", cqil.Plan.of(model, groups, "cqil", d)) for d in (0, 1)]
        found.append((f"{size} at once, lp", cqil.Plan.of(model, groups, "lp")))
    return found


def timed(model: Any, ids: Tensor, tokens: int) -> tuple[float, float]:
    """(prompt tokens/s, decoded tokens/s by the median step) of a prompt [1, s] and ``tokens`` greedy steps."""
    with torch.inference_mode():
        start = time.perf_counter()
        out = model(ids, use_cache=True, logits_to_keep=1)
        prompt_s, steps = time.perf_counter() - start, []
        for i in range(tokens):
            start = time.perf_counter()
            at = {"position_ids": torch.tensor([[ids.shape[1] + i]])}  # as generate() has it
            out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True, **at)
            steps.append(time.perf_counter() - start)
    return ids.shape[1] / prompt_s, 1 / statistics.median(steps)


def latency(args: argparse.Namespace) -> None:
    """Rows of one packed model, its plans in turn in every round."""
    if args.threads:
        torch.set_num_threads(args.threads)
    apply_default_threads()
    model = shapes.float_model(args.model, torch.float32 if args.model == shapes.REAL else torch.bfloat16)
    plans = plans_for_speed(model)
    if args.fold and plans[1][1] is not None:
        cqil.fold_norms(model, plans[1][1])
    model = torch_cpullm.optimize(model, torch_cpullm.CpuLlmConfig(group_size=args.group, sym=True))
    ids = torch.randint(0, model.config.vocab_size, (1, args.pp), generator=torch.Generator().manual_seed(0))
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name, _ in plans}
    foreign = machine.ForeignCpu()
    for round_ in range(args.rounds + 1):  # the first one warms up
        for name, plan in plans:
            cqil.restore(model) if plan is None else cqil.apply(model, plan)
            timed(model, ids[:, :8], 3)
            if round_:
                with foreign:
                    samples[name].append(timed(model, ids, args.tg))
    base = samples["none"]
    for name, plan in plans:
        pp, tg = (statistics.median(each[i] for each in samples[name]) for i in (0, 1))
        ratios = [
            statistics.median(own[i] / its[i] for own, its in zip(samples[name], base, strict=True)) for i in (0, 1)
        ]
        write(
            {
                "bench": "cqil_speed",
                "model": args.model,
                "threads": torch.get_num_threads(),
                "test": f"pp{args.pp}, tg{args.tg}",
                "plan": name + (", folded" if args.fold and plan is not None else ""),
                "grouped layers": sum(size for _, size in plan.groups) if plan else 0,
                "pp tok/s": round(pp, 1),
                "tg tok/s": round(tg, 2),
                "pp, times": round(ratios[0], 3),
                "tg, times": round(ratios[1], 3),
                "foreign_cpu": foreign.cores and round(foreign.cores, 2),
            },
            args.json,
        )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    one = kinds.add_parser("quality", help="perplexity, KL and copying of SmolLM2 under every plan")
    one.add_argument("--text", type=Path, required=True)
    one.add_argument("--saving", type=float, nargs="+", default=SAVINGS, help="shares of the layers' time to save")
    one.add_argument("--repair", type=int, default=0, metavar="STEPS", help="rows after this much LoRA repair")
    one.add_argument("--only", default="", metavar="TEXT", help="plans whose name contains this, as 'pairs' or 'lp'")
    two = kinds.add_parser("latency", help="tokens per second in INT4")
    two.add_argument("--model", default=shapes.REAL, help=f"{', '.join(shapes.SHAPES)}, {shapes.REAL} or a path")
    two.add_argument("--pp", type=int, default=512, help="prompt tokens")
    two.add_argument("--tg", type=int, default=64, help="decoded tokens")
    two.add_argument("--rounds", type=int, default=7)
    two.add_argument("--threads", type=int)
    two.add_argument("--group", type=int, default=32, help="weights that share a scale")
    two.add_argument("--fold", action="store_true", help="fold the norms of the groups' inputs into the weights")
    for each in (one, two):
        each.add_argument("--json", type=Path, help="append rows to this file")
    args = parser.parse_args(argv)
    (quality if args.kind == "quality" else latency)(args)


if __name__ == "__main__":
    main()
