"""KL divergence of quantised files of SmolLM2-135M from its float logits: llama.cpp's GGUF files and saved models.

    python -m benchmarks.bench_kld --text wikitext2_raw_test.txt --ids ids.json FILE.gguf DIRECTORY ...

"Float" is the demo model's file, dequantised, from which the others are made too. All get the same token ids at the
same positions, llama.cpp's own tokens of TEXT with its begin token (none for SmolLM2), 4 chunks of 2,048. As in
`llama-perplexity --kl-divergence` the second half of each chunk is scored. A .gguf file is run by llama.cpp (`make
peers`), a directory that save_pretrained() has written by this package with int8 compute. Sizes are of the whole files.
--ids: where llama.cpp's tokens are kept, or taken from if the file is there.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torch_cpullm
from torch_cpullm.runner import find_model

from . import peers
from .bench_quality import text_of
from .rows import write

CHUNKS, WINDOW = 4, 2048
SCORED = slice(WINDOW // 2, WINDOW - 1)  # positions whose next token is scored


def ask_llamacpp(*arguments: str) -> None:
    """Run benchmarks.llamacpp by the peers' interpreter."""
    missing = peers.missing("llama.cpp")
    if missing:
        raise SystemExit(f"llama.cpp: {missing}")
    subprocess.run([str(peers.PYTHON), "-m", "benchmarks.llamacpp", *arguments], check=True, cwd=peers.ROOT)


def token_ids(text: Path, kept: Path) -> Tensor:
    """int64 [CHUNKS, WINDOW], llama.cpp's tokens of the text."""
    if not kept.exists():
        with tempfile.TemporaryDirectory() as folder:
            joined = Path(folder) / "text"
            joined.write_text(text_of(text)[: 8 * CHUNKS * WINDOW], encoding="utf-8")
            ask_llamacpp("tokens", str(find_model(None)), str(joined), str(kept), str(WINDOW))
    ids = torch.tensor(json.loads(kept.read_text()))
    return ids[: CHUNKS * WINDOW].view(CHUNKS, WINDOW)


def logits_of(model: Any, ids: Tensor) -> Iterator[Tensor]:
    """Logits of the scored positions, float32 [scored, vocabulary], chunk by chunk."""
    for window in ids:
        with torch.inference_mode():
            logits = model(window[None]).logits[0, SCORED].float()
        yield logits  # outside of the mode, which would otherwise stay on in the caller


def logits_of_gguf(path: Path, ids: Tensor) -> Iterator[Tensor]:
    """The same of llama.cpp."""
    for window in ids:
        with tempfile.TemporaryDirectory() as folder:
            asked, answer = Path(folder) / "ids", Path(folder) / "logits"
            asked.write_text(json.dumps(window.tolist()))
            ask_llamacpp("logits", str(path), str(asked), str(answer), str(SCORED.start), str(SCORED.stop))
            size = SCORED.stop - SCORED.start
            yield torch.from_file(str(answer), size=answer.stat().st_size // 4).view(size, -1).clone()


def compare(found: Iterator[Tensor], reference: Any, ids: Tensor) -> dict[str, float]:
    """Perplexity, KL(reference || found), and how often both find the same token likeliest."""
    loss = kl = same = base = 0.0
    for logits, wanted, window in zip(found, logits_of(reference, ids), ids, strict=True):
        a, b = logits.log_softmax(-1), wanted.log_softmax(-1)
        following = window[SCORED.start + 1 : SCORED.stop + 1]
        loss += float(torch.nn.functional.nll_loss(a, following, reduction="sum"))
        base += float(torch.nn.functional.nll_loss(b, following, reduction="sum"))
        kl += float(torch.nn.functional.kl_div(a, b, log_target=True, reduction="sum"))
        same += float((a.argmax(-1) == b.argmax(-1)).sum())
    count = len(ids) * (SCORED.stop - SCORED.start)
    return {
        "KLD": round(kl / count, 4),
        "perplexity": round(math.exp(loss / count), 3),
        "perplexity / float": round(math.exp((loss - base) / count), 4),
        "same top token, %": round(100 * same / count, 1),
    }


def size_of(path: Path) -> int:
    """Bytes of a GGUF file, or of the weights in a directory."""
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--json", type=Path, help="append rows to this file")
    args = parser.parse_args()
    ids = token_ids(args.text, args.ids)
    reference = torch_cpullm.restore(torch_cpullm.load_gguf(find_model(None), progress=False)[0])
    for path in args.files:
        if path.is_dir():
            found, engine = logits_of(torch_cpullm.load(path)[0], ids), "torch_cpullm"
        else:
            found, engine = logits_of_gguf(path, ids), "llama.cpp"
        row: dict[str, Any] = {"bench": "kld", "engine": engine, "file": path.stem if path.is_file() else path.name}
        row |= {"MB": round(size_of(path) / 1e6, 1), **compare(found, reference, ids)}
        write(row, args.json)


if __name__ == "__main__":
    main()
