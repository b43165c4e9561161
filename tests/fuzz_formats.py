"""Loads mutated checkpoints of every format: ``python -m tests.fuzz_formats --cases 10000``.

Each case takes a tiny checkpoint (GPTQ, AWQ, AutoRound, compressed-tensors, our own, GGUF), changes some of its bytes,
tensors or settings, and loads it. What may happen is a ValueError or an OSError that names the file, or a model, which
computes a step; where transformers has taken a senseless setting over, the step may raise. Anything else, a crash above
all, ends the run with the case's number, which ``--first`` and ``--cases 1`` repeat.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from logging import getLogger
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from gguf_files import write_model
from packed_files import Recipe, write
from safetensors.torch import load_file, save_file
from transformers.utils import logging

import torch_cpullm

_AUTO_ROUND = (("quant_method", "auto-round"), ("packing_format", "auto_round:auto_awq"), ("sym", False))
SOURCES = {
    "gptq": Recipe("gptq", sym=False, order=True),
    "gptq_v2": Recipe("gptq_v2", bits=8, group_size=-1),
    "awq": Recipe("awq", sym=False, family="qwen2"),
    "auto_round": Recipe("awq", sym=False, settings=_AUTO_ROUND),
    "compressed": Recipe("pack-quantized", sym=False, order=True),
}


def write_sources(folder: Path) -> list[Path]:
    """The checkpoints to start from: directories, and one GGUF file."""
    for name, recipe in SOURCES.items():
        write(folder / name, recipe, 30 if name == "gptq" else None)
    torch_cpullm.load(folder / "gptq")[0].save_pretrained(folder / "ours")
    write_model(folder / "small.gguf", "llama")
    return [*(folder / name for name in SOURCES), folder / "ours", folder / "small.gguf"]


# ---- mutations ------------------------------------------------------------------------------------------------------


def _bytes(data: bytes, chance: random.Random, span: int) -> bytes:
    """Some bytes of the first ``span`` changed, or a piece cut out, doubled or cut off."""
    changed = bytearray(data)
    kind = chance.random()
    if kind < 0.7:
        for _ in range(chance.choice((1, 1, 2, 4, 16))):
            at = chance.randrange(min(span, len(changed)))
            changed[at] = chance.choice(
                (0, 1, 0x7F, 0xFF, chance.randrange(256), changed[at] ^ 1 << chance.randrange(8))
            )
    elif kind < 0.8:
        at = chance.randrange(len(changed))
        del changed[at : at + chance.randrange(1, 64)]
    elif kind < 0.9:
        at = chance.randrange(len(changed))
        changed[at:at] = changed[at : at + chance.randrange(1, 64)]
    else:
        del changed[chance.randrange(len(changed)) :]
    return bytes(changed)


_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    3,
    8,
    31,
    33,
    48,
    64,
    128,
    2**31,
    2**63,
    1e308,
    "",
    "x",
    "gptq_v2",
    [],
    {},
)


def _leaves(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths of all entries of nested JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, inner in items for found in ((*path, key), *_leaves(inner, (*path, key)))]


def _change_settings(path: Path, chance: random.Random) -> None:
    file = path / "config.json"
    config = json.loads(file.read_text())
    stored = config.get("quantization_config")
    place = stored if isinstance(stored, dict) and chance.random() < 0.75 else config
    *outer, last = chance.choice(_leaves(place) or [("quant_method",)])
    for key in outer:
        place = place[key]
    if chance.random() < 0.15:
        place.pop(last, None) if isinstance(place, dict) else place.clear()
    elif last != "num_hidden_layers":  # transformers makes as many as it is told
        place[last] = chance.choice(_VALUES)
    file.write_text(json.dumps(config))


def _change_tensor(path: Path, chance: random.Random) -> None:
    file = chance.choice(sorted(path.glob("*.safetensors")))
    state = load_file(file)
    name = chance.choice(sorted(state))
    value = state[name].clone()
    kind = chance.randrange(8)
    if kind == 0:
        del state[name]
    elif kind == 1:
        state[chance.choice(sorted(state)) + chance.choice(("", "x", ".weight"))] = value
    elif kind == 2 and value.dim():
        state[name] = value[: chance.randrange(value.shape[0] + 1)].contiguous()
    elif kind == 3 and value.dim() == 2:
        state[name] = value.T.contiguous()
    elif kind == 4:
        types = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8)
        state[name] = value.to(chance.choice(types))
    elif kind == 5:
        state[name] = value.view(-1)
    elif value.numel():
        at = chance.randrange(value.numel())
        whole = (0, 1, -1, 3, 2**31 - 1, -(2**31))
        extreme = (float("nan"), float("inf"), -1e30, 0.0, 65504.0)
        value.view(-1)[at] = chance.choice(extreme) if value.is_floating_point() else chance.choice(whole) & 0x7F
        state[name] = value
    save_file(state, file, {"format": "pt"})


def mutate(source: Path, target: Path, chance: random.Random) -> Path:
    """A changed copy of ``source`` in the folder ``target``, which is replaced."""
    shutil.rmtree(target, ignore_errors=True)
    if source.is_file():
        target.mkdir()
        copy = target / source.name
        copy.write_bytes(_bytes(source.read_bytes(), chance, chance.choice((64, 12_000, 1 << 30))))
        return copy
    shutil.copytree(source, target)
    for _ in range(chance.choice((1, 1, 1, 2))):
        kind = chance.random()
        files = sorted(file for file in target.iterdir() if file.suffix != ".md")
        if kind < 0.35:
            _change_settings(target, chance)
        elif kind < 0.65:
            _change_tensor(target, chance)
        elif kind < 0.97:
            file = chance.choice(files)
            file.write_bytes(_bytes(file.read_bytes(), chance, chance.choice((8, 4000, 1 << 30))))
            break  # what follows could not read it
        else:
            chance.choice(files).unlink()
            break
    return target


# ---- the run --------------------------------------------------------------------------------------------------------


def attempt(path: Path) -> str:
    """The class of the error that loading raises, "loaded" where the model computes a step, else "no step"."""
    try:
        model, _ = torch_cpullm.load(path)
    except (ValueError, OSError) as error:
        assert path.name in str(error), f"an error that does not name the file: {error}"  # noqa: PT017
        return type(error).__name__ if isinstance(error, ValueError) else "OSError"
    try:
        with torch.no_grad():
            model(torch.arange(3, 12).view(1, 9))
    except (ValueError, TypeError, RuntimeError, IndexError, KeyError, AttributeError):
        return "no step"
    return "loaded"


def run(cases: int, seed: int = 0, first: int = 0, folder: Path | None = None) -> Counter[str]:
    """Load ``cases`` mutated checkpoints from the number ``first`` on; how often each outcome was seen."""
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(dir=folder) as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sources = write_sources(Path(place) / "sources")
        for number in range(first, first + cases):
            chance = random.Random(seed * 1_000_003 + number)
            path = mutate(sources[number % len(sources)], Path(place) / "case", chance)
            try:
                outcomes[attempt(path)] += 1
            except BaseException:
                print(f"case {number} of seed {seed}: {sources[number % len(sources)].name}", file=sys.stderr)
                raise
    return outcomes


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    options = parser.parse_args()
    faulthandler.enable()
    getLogger("torch_cpullm").setLevel("ERROR")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    start = time.monotonic()
    outcomes = run(options.cases, options.seed, options.first)
    text = ", ".join(f"{count} {name}" for name, count in outcomes.most_common())
    print(f"{sum(outcomes.values())} cases in {time.monotonic() - start:.0f} s: {text}")


if __name__ == "__main__":
    main()
