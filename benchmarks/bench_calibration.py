"""Perplexity of SmolLM2-135M after calibrated recipes, on text that the model itself has generated.

The GGUF file's dequantised weights are quantised once more, as in bench_quality, which has the text, the windows and
the columns. The calibration tokens are drawn from the packed file with a seed; WikiText is only ever scored.

    python -m benchmarks.bench_calibration --text wikitext2_raw_test.txt --recipe awq+gptq+2,none,32

A recipe is a method, zeros (none, point, minimum) and a group size. The method: rounding (rtn, hqq, clip, gptq,
signround; awq+ before it; +SWEEPS of refinement after it; then +EPOCHSe of distillation, or +EPOCHSc where codes learn
too). In place of the group size, mixBITS spends that many bits per weight on groups of 32 and 64 of 4 and 8 bits, by
sensitivity. A recipe is to be chosen by its KL on --held-out, a text that is neither calibrated on nor reported.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torch_cpullm
from torch_cpullm.calibration import self_generated
from torch_cpullm.checkpoint import Form
from torch_cpullm.config import Settings
from torch_cpullm.devices import model_on
from torch_cpullm.distil import quantize_model
from torch_cpullm.layerwise import Method
from torch_cpullm.runner import find_model
from torch_cpullm.sensitivity import allocate, sensitivities
from torch_cpullm.trial import apply, forms_of, settings_of, twin

from .bench_quality import WINDOW, WINDOWS, divergence, logits_of, measure, text_of
from .rows import write

SENSITIVITY = 8  # sequences that the mixture is chosen on
FORMS = {"none": "symmetric", "point": "zero points", "minimum": "minima"}


def recipe_of(text: str) -> tuple[Method, Form, float | None]:
    """``awq+gptq+2+1e,none,32`` as a method, a form, and the bits of a mixture; ValueError for anything else."""
    try:
        words, zeros, group = text.split(",")
        parts = words.split("+")
        scales = parts.pop(0) if parts[0] in ("awq", "teq") else ""
        codes = parts[-1].endswith("c")
        epochs = int(parts.pop()[:-1]) if parts[-1].endswith(("e", "c")) else 0
        sweeps = int(parts.pop()) if len(parts) > 1 else 0
        (rounding,) = parts
        bits = float(group[3:]) if group.startswith("mix") else None
        form = Form(4, 32 if bits is not None else int(group), zeros, "float16")
        return Method(rounding, scales, sweeps, epochs=epochs, codes=codes), form, bits
    except ValueError as error:
        raise ValueError(f"--recipe must be like awq+gptq+2,none,32, got {text!r}: {error}") from None


def label_of(method: Method, form: Form, bits: float | None) -> str:
    """A recipe in words."""
    kind = f"INT4 g{form.group_size}" if bits is None else "INT4 and INT8, g32 and g64"
    return f"{method}; {kind}, {FORMS[form.zeros]}"


def mixed_forms(model: Any, ids: Tensor, forms: dict[str, Form], form: Form, bits: float) -> dict[str, Form]:
    """``forms`` with those of the decoder's 4-bit linears chosen by sensitivity for ``bits`` per weight."""
    choices = [Form(4, 64, form.zeros, form.scales), Form(4, 32, form.zeros, form.scales)]
    choices += [Form(8, 64, "none", form.scales), Form(8, 32, "none", form.scales)]
    names = [name for name, own in forms.items() if own.bits == 4]
    return {**forms, **allocate(sensitivities(model, ids, names, choices, progress=False), choices, bits)}


def windows_of(path: Path, tokenizer: Any) -> Tensor:
    """The first WINDOWS windows of a text, joined as bench_quality says."""
    ids: Tensor = tokenizer(text_of(path)[:60000], return_tensors="pt").input_ids[0]
    return ids[: WINDOWS * WINDOW].view(WINDOWS, WINDOW)


def resident(field: str) -> int:
    """Bytes of this process's memory: VmRSS now, VmHWM at most since :func:`forget_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def forget_peak() -> None:
    """Begin VmHWM anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--json", type=Path, help="append rows to this file")
    parser.add_argument("--recipe", action="append", required=True, metavar="RECIPE,ZEROS,GROUP")
    parser.add_argument("--sequences", type=int, default=64, help="of 512 tokens (64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=Path, help="keep the drawn tokens in this file, or take them from it")
    parser.add_argument("--source", default="own", help="what the rows call the tokens (own: the model's)")
    parser.add_argument("--held-out", type=Path, metavar="TEXT", help="a text to choose by: adds its KL")
    parser.add_argument("--layers", type=Path, metavar="DIR", help="keep finished layers here, or take them from here")
    parser.add_argument("--save", type=Path, metavar="DIR", help="save the models below this directory")
    parser.add_argument("--device", default="cpu", help="where the float model computes; INT4 runs on the CPU")
    args = parser.parse_args()
    recipes = [recipe_of(text) for text in args.recipe]
    path = find_model(None)
    model, tokenizer = torch_cpullm.load_gguf(path, progress=False)
    float_model = torch_cpullm.restore(torch_cpullm.load_gguf(path, progress=False)[0])
    fast = model_on(float_model, args.device)
    if args.tokens is not None and args.tokens.exists():
        drawn = torch.tensor(json.loads(args.tokens.read_text()))
    else:
        drawn = self_generated(model if fast is float_model else fast, args.sequences, 512, args.seed)
        if args.tokens is not None:
            args.tokens.write_text(json.dumps(drawn.tolist()))
    ids = windows_of(args.text, tokenizer)
    reference = logits_of(float_model, ids)
    held_out = None if args.held_out is None else windows_of(args.held_out, tokenizer)
    for method, form, bits in recipes:
        settings = Settings(group_size=form.group_size, sym=form.zeros == "none")
        forms = {name: form if own.bits == 4 else own for name, own in forms_of(float_model, settings).items()}
        key = f"{replace(method, epochs=0, codes=False)}{form.zeros}{form.group_size}{bits}".replace(" ", "")
        layers = None if args.layers is None else args.layers / key
        forget_peak()
        start, before = time.perf_counter(), resident("VmRSS")
        if bits is not None:
            forms = mixed_forms(fast, drawn[:SENSITIVITY], forms, form, bits)
        found = quantize_model(fast, drawn[: args.sequences], forms, method, folder=layers, progress=False)
        seconds, more = time.perf_counter() - start, resident("VmHWM") - before
        print(f"{method}: {seconds:.0f} s, {more / 2**30:.2f} GiB", file=sys.stderr, flush=True)
        model = apply(twin(float_model), found, settings_of(float_model, forms, settings))
        tokens = f"{args.sequences} x {drawn.shape[1]} {args.source}" if method.needs_data else "none"
        name = label_of(method, form, bits)
        row: dict[str, Any] = {"bench": "calibration", "recipe and weights": name, "calibration tokens": tokens}
        row |= {k: v for k, v in measure(name, model, ids, reference).items() if k not in ("bench", "weights")}
        row |= {"calibration, s": round(seconds), "memory beside the float model, GiB": round(more / 2**30, 2)}
        if held_out is not None:  # int8 compute, in which measure() leaves the model
            other = divergence(logits_of(model, held_out), logits_of(float_model, held_out))
            row["KL, held-out text"] = round(max(0.0, other), 4)
        if args.save is not None:
            model.save_pretrained(args.save / name.replace(";", ",").replace(" ", ""))
        write(row, args.json)


if __name__ == "__main__":
    main()
