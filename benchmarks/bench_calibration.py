"""Perplexity of SmolLM2-135M after calibrated recipes, on text that the model itself has generated.

The GGUF file's dequantised weights are quantised once more, as in bench_quality, which has the text, the windows and
the columns. The calibration tokens are drawn from the packed file with a seed; WikiText is only ever scored.

    python -m benchmarks.bench_calibration --text wikitext2_raw_test.txt --recipe awq+gptq+2,none,32

A recipe is rounding (rtn, hqq, clip, gptq, signround; awq+ before it; +SWEEPS of refinement after it), zeros (none,
point, minimum), group size.
"""

from __future__ import annotations

import argparse
import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import torch_cpullm
from torch_cpullm.calibration import self_generated
from torch_cpullm.checkpoint import Form
from torch_cpullm.config import Settings
from torch_cpullm.layerwise import Method, calibrate
from torch_cpullm.runner import find_model
from torch_cpullm.trial import apply, forms_of

from . import machine
from .bench_quality import WINDOW, WINDOWS, logits_of, measure

FORMS = {"none": "symmetric", "point": "zero points", "minimum": "minima"}


def recipe_of(text: str) -> tuple[Method, Form]:
    """``awq+gptq+2,none,32`` as a recipe and a form; ValueError for anything else."""
    try:
        words, zeros, group = text.split(",")
        parts = words.split("+")
        scales = parts.pop(0) if parts[0] in ("awq", "teq") else ""
        sweeps = int(parts.pop()) if len(parts) > 1 else 0
        (rounding,) = parts
        return Method(rounding, scales, sweeps), Form(4, int(group), zeros, "float16")
    except ValueError as error:
        raise ValueError(f"--recipe must be like awq+gptq+2,none,32, got {text!r}: {error}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--json", type=Path, help="append rows to this file")
    parser.add_argument("--recipe", action="append", required=True, metavar="RECIPE,ZEROS,GROUP")
    parser.add_argument("--sequences", type=int, default=64, help="of 512 tokens (64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=Path, help="keep the drawn tokens in this file, or take them from it")
    args = parser.parse_args()
    recipes = [recipe_of(text) for text in args.recipe]
    path = find_model(None)
    model, tokenizer = torch_cpullm.load_gguf(path, progress=False)
    if args.tokens is not None and args.tokens.exists():
        drawn = torch.tensor(json.loads(args.tokens.read_text()))
    else:
        drawn = self_generated(model, args.sequences, 512, args.seed)
        if args.tokens is not None:
            args.tokens.write_text(json.dumps(drawn.tolist()))
    rows = args.text.read_text().split("\n")
    text = "\n\n".join(row + "\n" if row.strip() else "" for row in rows)
    ids = tokenizer(text[:60000], return_tensors="pt").input_ids[0][: WINDOWS * WINDOW].view(WINDOWS, WINDOW)
    reference = logits_of(torch_cpullm.restore(model), ids)
    for recipe, form in recipes:
        model = torch_cpullm.restore(torch_cpullm.load_gguf(path, progress=False)[0])
        settings = Settings(group_size=form.group_size, sym=form.zeros == "none")
        forms = {name: form if own.bits == 4 else own for name, own in forms_of(model, settings).items()}
        found = calibrate(model, drawn[: args.sequences], forms, recipe, progress=False)
        tokens = f"{args.sequences} x 512" if recipe.needs_data else "none"
        name = f"{recipe}; INT4 g{form.group_size}, {FORMS[form.zeros]}"
        row: dict[str, Any] = {"bench": "calibration", "recipe and weights": name, "calibration tokens": tokens}
        row |= {
            k: v
            for k, v in measure(name, apply(model, found, settings), ids, reference).items()
            if k not in ("bench", "weights")
        }
        row |= {"machine": machine.machine_name(), "commit": machine.git_commit()}
        row |= {"date": datetime.now(timezone.utc).strftime("%Y-%m-%d")}
        print(json.dumps(row), flush=True)
        if args.json:
            with args.json.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
