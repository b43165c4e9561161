"""How long loading takes and how much memory: a float checkpoint quantised while it loads, saved, and loaded again.

    python -m benchmarks.bench_load --model llama-2-7b --folder /path/with/20/GB
    python -m benchmarks.bench_load --model gpt-neox-20b --folder /path/with/42/GB --steps quantise --remove

Writes a checkpoint of random bf16 weights in shards, one tensor in memory at a time (kept for the next run; --remove
deletes it), then measures each step in a process of its own. Columns: s time from the call to the model; first s to
the first token of generate(), in that same process; start s the same from the start of the Python process, imports
included; tok/s of the --decode tokens after it; peak MiB the largest
anonymous memory above what the imports take, the file's mapped pages not counted; final MiB the same after loading;
packed MiB what the packed weights take; largest MiB the largest module's float weight.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import rows
from .shapes import SHAPES

MIB = 1 << 20
STEPS = ("quantise", "save", "reload")
BLOCK = 1 << 24  # random numbers that are drawn; tensors repeat them, each from a place of its own


def tensor_sizes(model: str, layers: int | None) -> tuple[Any, dict[str, torch.Size]]:
    """(config, name -> shape of every tensor) of one of SHAPES; layers: as many instead of its own."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = dict(SHAPES[model])
    if layers is not None:
        shape["num_hidden_layers" if "num_hidden_layers" in shape else "n_layer"] = layers
    config = AutoConfig.for_model(**shape, tie_word_embeddings=False, eos_token_id=None)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config)
    config.dtype, config.architectures = "bfloat16", [type(made).__name__]
    return config, {name: value.shape for name, value in made.state_dict().items()}


def write_checkpoint(folder: Path, config: Any, shapes: dict[str, torch.Size], shards: int) -> None:
    """The checkpoint of random bf16 weights, tensor by tensor."""
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    total, done = sum(sizes.values()), 0
    parts: list[list[str]] = [[] for _ in range(shards)]
    for name, size in sizes.items():
        parts[min(done * shards // total, shards - 1)].append(name)
        done += size
    parts = [part for part in parts if part]
    folder.mkdir(parents=True)
    names = {}
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(BLOCK, generator=generator)
    for index, part in enumerate(parts):
        file = f"model-{index + 1:05d}-of-{len(parts):05d}.safetensors"
        with (folder / file).open("wb") as out:
            out.write(_header({name: shapes[name] for name in part}))
            for name in part:
                shape = shapes[name]
                values = (block * shape[-1] ** -0.5 + (len(shape) == 1 and not name.endswith("bias"))).bfloat16()
                values = values.roll(int(torch.randint(BLOCK, (), generator=generator)))
                data = values.view(torch.uint8).numpy()
                for left in range(sizes[name], 0, -BLOCK):
                    out.write(data[: 2 * left])
        names.update(dict.fromkeys(part, file))
    index_file = {"metadata": {"total_size": 2 * total}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    config.save_pretrained(folder)


def _header(shapes: dict[str, torch.Size]) -> bytes:
    """What a safetensors file of these bf16 tensors begins with."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * shape.numel()
        entries[name] = {"dtype": "BF16", "shape": [*shape], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def check_space(folder: Path, needed_bytes: int) -> None:
    """ValueError where the disk of ``folder`` has less free than ``needed_bytes``."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise ValueError(f"{folder} needs {needed_bytes / 1e9:.1f} GB of disk, and {free / 1e9:.1f} GB are free")


class Peak:
    """The largest anonymous memory of this process above its start, looked at every few milliseconds."""

    def __init__(self) -> None:
        self.start, self.peak, self._on = anonymous_bytes(), 0, True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while self._on:
            self.peak = max(self.peak, anonymous_bytes() - self.start)
            time.sleep(0.002)

    def stop(self) -> tuple[int, int]:
        """(peak, now), bytes above the start."""
        self._on = False
        self._thread.join()
        now = anonymous_bytes() - self.start
        return max(self.peak, now), now


def anonymous_bytes() -> int:
    """Resident memory of this process that is no file's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/self/status has no RssAnon")


def seconds_of_process() -> float:
    """Seconds since this process was started."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # in ticks since the boot
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


def measure(step: str, float_folder: Path, folder: Path, decode: int) -> dict[str, Any]:
    """One step in this process; the row without what the parent knows."""
    from transformers import AutoModelForCausalLM

    import torch_cpullm
    from torch_cpullm.swap import packed_modules

    config = torch_cpullm.CpuLlmConfig()
    watch, start = Peak(), time.perf_counter()
    if step == "reload":
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(float_folder, quantization_config=config)
    loaded_s = time.perf_counter() - start
    if step == "save":
        (peak, final), watch, start = watch.stop(), Peak(), time.perf_counter()
        model.save_pretrained(folder)
        saved_s = time.perf_counter() - start
        return {"s": round(saved_s, 2), "peak_mib": (watch.stop()[0] + final) // MIB, "final_mib": final // MIB}
    peak, final = watch.stop()
    ids = torch.tensor([[1, 2, 3]])
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    model.generate(ids, max_new_tokens=1, **options)
    first_s, since_start = time.perf_counter() - start, seconds_of_process()
    took = []
    for tokens in (1, 1 + decode):
        begin = time.perf_counter()
        model.generate(ids, max_new_tokens=tokens, **options)  # no end token
        took.append(time.perf_counter() - begin)
    weights = {id(w): w for _, module in packed_modules(model) for w in module.weights().values()}
    return {
        "s": round(loaded_s, 2),
        "first_s": round(first_s, 2),
        "start_s": round(since_start, 2),
        "tok/s": round(decode / (took[1] - took[0]), 2),
        "peak_mib": peak // MIB,
        "final_mib": final // MIB,
        "packed_mib": sum(weight.nbytes for weight in weights.values()) // MIB,
        "largest_mib": max(2 * weight.n * weight.k for weight in weights.values()) // MIB,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns its exit status: 2 if the disk is too small."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_load", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=list(SHAPES), default="tinyllama-1.1b")
    parser.add_argument("--layers", type=int, help="decoder layers; default: the shape's")
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--folder", type=Path, required=True, help="for the checkpoints")
    parser.add_argument("--threads", type=int, help="default: what the package chooses")
    parser.add_argument("--decode", type=int, default=16, help="tokens after the first")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="default: all")
    parser.add_argument("--json", type=Path, help="append rows to this file")
    parser.add_argument("--remove", action="store_true", help="delete the checkpoints at the end, also after an error")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    name = args.model if args.layers is None else f"{args.model}-{args.layers}"
    float_folder, folder = (args.folder / f"{name}-{kind}" for kind in ("bf16", "cpullm"))
    if args.step:
        if args.threads:
            torch.set_num_threads(args.threads)
        print(json.dumps(measure(args.step, float_folder, folder, args.decode)))
        return 0
    partial = float_folder.with_suffix(".partial")
    try:
        config, shapes = tensor_sizes(args.model, args.layers)
        size = 2 * sum(shape.numel() for shape in shapes.values())
        missing = (0 if float_folder.exists() else size) + (size // 3 if "save" in args.steps else 0)
        check_space(args.folder, missing)
        if not float_folder.exists():
            print(f"writing {size / 1e9:.1f} GB to {float_folder}", file=sys.stderr)
            shutil.rmtree(partial, ignore_errors=True)
            write_checkpoint(partial, config, shapes, args.shards)
            partial.rename(float_folder)
        report(args, name)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if args.remove:
            for path in (partial, float_folder, folder):
                shutil.rmtree(path, ignore_errors=True)
    return 0


def report(args: argparse.Namespace, name: str) -> None:
    """Run and print every step."""
    columns = ("s", "first_s", "start_s", "tok/s", "peak_mib", "final_mib", "packed_mib", "largest_mib")
    print(f"{'model':<18}{'step':<10}" + "".join(f"{column.replace('_', ' '):>13}" for column in columns))
    for step in args.steps:
        command = [sys.executable, "-m", "benchmarks.bench_load", "--model", args.model, "--folder", str(args.folder)]
        command += ["--step", step, "--decode", str(args.decode)]
        command += ["--threads", str(args.threads)] if args.threads else []
        command += ["--layers", str(args.layers)] if args.layers is not None else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        facts = {"bench": "load", "model": name, "shards": args.shards, "step": step, "threads": args.threads}
        rows.write(facts | row, args.json)
        print(f"{name:<18}{step:<10}" + "".join(f"{row.get(column, '-'):>13}" for column in columns), flush=True)


if __name__ == "__main__":
    sys.exit(main())
