"""Every family of the tests: quantised while loading, saved, loaded again in a fresh process.

    python -m benchmarks.bench_families --json benchmarks/results/families.jsonl

The models are those of tests/families.py: tiny, with random weights. A row says how the decoder layers run, whether the
logits after the reload are the same bits, and what the weights take on disk. The fresh process imports transformers
and nothing of this package.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import torch_cpullm
from torch_cpullm.layer import layer_levels

from . import machine

ROOT = Path(__file__).resolve().parents[1]
RELOAD = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(int(sys.argv[1]))
for path in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        logits = model(load_file(path + ".ids")["ids"]).logits
    save_file({"logits": logits}, path + ".found")
"""


def families() -> list[Any]:
    """The families of the tests, which are no package."""
    sys.path.insert(0, str(ROOT / "tests"))
    from families import FAMILIES

    return list(FAMILIES)


def saved(family: Any, folder: Path) -> tuple[dict[str, Any], torch.Tensor]:
    """(row without the reload, logits) of one family, whose packed checkpoint is then ``folder``/name."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    plain, packed = folder / f"{family}.float", folder / str(family)
    family.build().save_pretrained(plain)
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=torch_cpullm.CpuLlmConfig())
    model.save_pretrained(packed)
    ids = torch.randint(2, model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))
    save_file({"ids": ids}, f"{packed}.ids")
    with torch.no_grad():
        logits = model(ids).logits
    ways = Counter(f"{level}: {reason}" if reason else level for _, level, reason in layer_levels(model))
    sizes = [sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in (plain, packed)]
    return {
        "bench": "families",
        "family": str(family),
        "class": type(model).__name__,
        "decoder layers": "; ".join(f"{count} {way}" for way, count in ways.items()),
        "float KB": round(sizes[0] / 1000),
        "saved KB": round(sizes[1] / 1000),
    }, logits


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status: 1 if some logits differ after the reload."""
    from safetensors.torch import load_file

    parser = argparse.ArgumentParser(
        "python -m benchmarks.bench_families", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--family", nargs="+", help="these alone")
    parser.add_argument("--json", type=Path, help="append rows to this file")
    args = parser.parse_args(argv)
    known = families()
    chosen = [each for each in known if not args.family or str(each) in args.family]
    if unknown := set(args.family or ()) - set(map(str, known)):
        parser.error(f"unknown family {min(unknown)!r}; there are: {', '.join(map(str, known))}")
    threads = torch.get_num_threads()
    same = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = [saved(each, folder) for each in chosen]
        paths = [str(folder / str(each)) for each in chosen]
        subprocess.run([sys.executable, "-c", RELOAD, str(threads), *paths], check=True)
        rows = []
        facts = {"machine": machine.machine_name(), "commit": machine.git_commit(), "date": machine.now()}
        for (row, logits), path in zip(made, paths, strict=True):
            equal = torch.equal(load_file(f"{path}.found")["logits"], logits)
            same = same and equal
            row["logits after reload"] = "the same bits" if equal else "DIFFERENT"
            print(", ".join(f"{key} {value}" for key, value in row.items() if key != "bench"), flush=True)
            rows.append({**row, **facts})
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        with args.json.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
