"""How long loading takes and how much memory: a float checkpoint quantised while it loads, saved, and loaded again.

    python -m benchmarks.bench_load --model llama-7b --folder /path/with/20/GB

Writes a checkpoint of random bf16 weights in shards (kept for the next run; --remove deletes it), then measures each
step in a process of its own. Columns: s time from the call to the model; first s to the first token of generate(), in
that same process; peak MiB the largest anonymous memory above what the imports take, the file's mapped pages not
counted; final MiB the same after loading; packed MiB what the packed weights take; largest MiB the largest module's
float weight.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

MIB = 1 << 20
# hidden, intermediate, layers, heads, heads of keys and values, vocabulary, tied
SHAPES = {
    "llama-7b": (4096, 11008, 32, 32, 32, 32000, False),
    "tinyllama-1.1b": (2048, 5632, 22, 32, 4, 32000, False),
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152, True),
}
STEPS = ("quantise", "save", "reload")


def write_checkpoint(folder: Path, model: str, shards: int) -> None:
    """A Llama of random bf16 weights, shard by shard, without ever holding more than one of them."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, layers, heads, kv_heads, vocabulary, tied = SHAPES[model]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        eos_token_id=None,
    )
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlamaForCausalLM(config).state_dict().items()}
    if tied:
        del shapes["lm_head.weight"]
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    total, done = sum(sizes.values()), 0
    parts: list[list[str]] = [[] for _ in range(shards)]
    for name, size in sizes.items():
        parts[min(done * shards // total, shards - 1)].append(name)
        done += size
    folder.mkdir(parents=True)
    names = {}
    generator = torch.Generator().manual_seed(0)
    for index, part in enumerate(parts):
        tensors = {}
        for name in part:
            shape = shapes[name]
            scale = shape[-1] ** -0.5 if len(shape) > 1 else 1.0
            tensors[name] = (torch.randn(shape, generator=generator) * scale).bfloat16()
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        names.update(dict.fromkeys(part, file))
    index_file = {"metadata": {"total_size": 2 * total}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    config.save_pretrained(folder)


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


def measure(step: str, float_folder: Path, folder: Path) -> dict[str, Any]:
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
    model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=1, do_sample=False)
    weights = {id(w): w for _, module in packed_modules(model) for w in module.weights().values()}
    return {
        "s": round(loaded_s, 2),
        "first_s": round(time.perf_counter() - start, 2),
        "peak_mib": peak // MIB,
        "final_mib": final // MIB,
        "packed_mib": sum(weight.nbytes for weight in weights.values()) // MIB,
        "largest_mib": max(2 * weight.n * weight.k for weight in weights.values()) // MIB,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_load", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=list(SHAPES), default="tinyllama-1.1b")
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--folder", type=Path, required=True, help="for the checkpoints")
    parser.add_argument("--threads", type=int, help="default: what the package chooses")
    parser.add_argument("--remove", action="store_true", help="delete the checkpoints at the end")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    float_folder, folder = (args.folder / f"{args.model}-{kind}" for kind in ("bf16", "cpullm"))
    if args.step:
        if args.threads:
            torch.set_num_threads(args.threads)
        print(json.dumps(measure(args.step, float_folder, folder)))
        return 0
    if not float_folder.exists():
        print(f"writing {float_folder}", file=sys.stderr)
        partial = float_folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        write_checkpoint(partial, args.model, args.shards)
        partial.rename(float_folder)
    names = ("s", "first_s", "peak_mib", "final_mib", "packed_mib", "largest_mib")
    print(f"{'model':<16}{'step':<10}" + "".join(f"{name.replace('_', ' '):>13}" for name in names))
    for step in STEPS:
        command = [sys.executable, "-m", "benchmarks.bench_load", "--model", args.model, "--folder", str(args.folder)]
        command += ["--step", step, *(["--threads", str(args.threads)] if args.threads else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        print(f"{args.model:<16}{step:<10}" + "".join(f"{row.get(name, '-'):>13}" for name in names), flush=True)
    if args.remove:
        for path in (float_folder, folder):
            shutil.rmtree(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
