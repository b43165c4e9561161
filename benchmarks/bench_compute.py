"""What int8 activations cost: perplexity of SmolLM2-135M under int8 compute against fp32 compute of the same weights.

    python -m benchmarks.bench_compute --text wikitext2_raw_test.txt --json benchmarks/results/compute.jsonl

TEXT as bench_quality has it; its first N windows of 2,048 tokens are scored, no begin token. The difference is paired.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch_cpullm
from torch_cpullm.config import Settings
from torch_cpullm.quality import evaluate
from torch_cpullm.runner import find_model

from . import rows
from .bench_quality import WINDOW, text_of

WEIGHTS = {
    "file": ("GGUF file as it is (float minima)", None),
    "zeros": ("INT4 g32, zero points", {}),
    "sym": ("INT4 g32, symmetric", {"sym": True}),
    "g64": ("INT4 g64, symmetric", {"group_size": 64, "sym": True}),
}


def model_of(weights: str, compute: str) -> Any:
    """SmolLM2 with weights of one of WEIGHTS."""
    settings = WEIGHTS[weights][1]
    model = torch_cpullm.load_gguf(find_model(None), compute=compute, progress=False)[0]
    if settings is None:
        return model
    return torch_cpullm.optimize(torch_cpullm.restore(model), Settings(compute=compute, **settings))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--weights", action="append", choices=list(WEIGHTS), help="may be repeated; default: all")
    parser.add_argument("--json", type=Path, help="append rows to this file")
    args = parser.parse_args(argv)
    tokenizer = torch_cpullm.load_gguf(find_model(None), progress=False)[1]
    ids = tokenizer(text_of(args.text), return_tensors="pt").input_ids[0][: args.windows * WINDOW]
    for weights in args.weights or WEIGHTS:
        found = evaluate(model_of(weights, "int8"), ids, window=WINDOW, reference=model_of(weights, "fp32"))
        assert found.loss_difference is not None
        assert found.difference_interval is not None
        change, spread = (100 * (math.exp(x) - 1) for x in (found.loss_difference, found.difference_interval))
        row: dict[str, Any] = {"bench": "compute", "weights": WEIGHTS[weights][0], "tokens scored": found.tokens}
        row["perplexity, fp32 compute"] = round(math.exp(found.loss - found.loss_difference), 3)
        row["perplexity, int8 compute"] = round(found.perplexity, 3)
        row["int8 against fp32"] = f"{change:+.2f} % ± {spread:.2f}"
        row["KL"] = round(found.kl or 0.0, 4)
        rows.write(row, args.json)


if __name__ == "__main__":
    main()
