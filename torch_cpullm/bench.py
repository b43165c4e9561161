"""``cpullm bench``: prompt processing (pp) and token generation (tg) in llama-bench's words, through Hugging Face.

ppN: one forward pass over N random tokens with an empty cache, logits of the last one only.
tgN: N tokens of greedy ``generate()`` after a prompt of one token; the first token is not counted.
Each figure is mean and standard deviation, in tokens/s, over the repetitions; one unmeasured run precedes them.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .runner import Loaded, Stopwatch, generate

if TYPE_CHECKING:
    import torch


@dataclass
class Row:
    """One line of the table. size in bytes, samples and t/s in tokens per second."""

    model: str
    size_bytes: int
    parameters: int
    backend: str
    threads: int
    test: str
    tokens_per_s: float
    stddev: float
    samples: list[float]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def run(loaded: Loaded, *, backend: str, threads: int, pp: int, tg: int, reps: int, seed: int = 0) -> list[Row]:
    """Measure ``loaded``: ppN with N = pp and tgN with N = tg tokens (0 leaves the test out), ``reps`` times each."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    vocabulary = loaded.model.config.get_text_config().vocab_size
    rows = []
    for kind, length, measure in (("pp", pp, _prompt_s), ("tg", tg, _tokens_s)):
        if length == 0:
            continue
        ids = torch.randint(0, vocabulary, (1, length if kind == "pp" else 1), generator=generator)
        measure(loaded, ids, min(length, 32))  # first-use costs: allocations, oneDNN's kernels, page faults
        samples = [length / measure(loaded, ids, length) for _ in range(reps)]
        deviation = statistics.stdev(samples) if reps > 1 else 0.0
        rows.append(
            Row(
                loaded.name,
                loaded.model_bytes,
                loaded.parameters,
                backend,
                threads,
                f"{kind}{length}",
                statistics.mean(samples),
                deviation,
                samples,
            )
        )
    return rows


def _prompt_s(loaded: Loaded, ids: torch.Tensor, length: int) -> float:
    """Seconds of one forward pass over the first ``length`` of ids [1, s]."""
    import torch

    with torch.inference_mode():
        start = time.perf_counter()
        loaded.model(input_ids=ids[:, :length], use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start


def _tokens_s(loaded: Loaded, ids: torch.Tensor, length: int) -> float:
    """Seconds that ``length`` tokens take after the first one."""
    import torch

    watch = Stopwatch()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    generate(loaded, inputs, max_new_tokens=length + 1, to_the_end=True, watch=watch)
    return watch.arrivals[-1] - watch.arrivals[0]


def table(rows: list[Row]) -> str:
    """The rows as llama-bench's markdown table."""
    header = ("model", "size", "params", "backend", "threads", "test", "t/s")
    lines = [
        (
            row.model if len(row.model) <= 24 else row.model[:21] + "...",
            f"{row.size_bytes / 2**30:.2f} GiB" if row.size_bytes >= 2**30 else f"{row.size_bytes / 2**20:.2f} MiB",
            f"{row.parameters / 1e9:.2f} B" if row.parameters >= 1e9 else f"{row.parameters / 1e6:.2f} M",
            row.backend,
            str(row.threads),
            row.test,
            f"{row.tokens_per_s:.2f} ± {row.stddev:.2f}",
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    right = (False, True, True, False, True, True, True)

    def write(cells: tuple[str, ...]) -> str:
        filled = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True)]
        return "| " + " | ".join(filled) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)) + "|"
    return "\n".join([write(header), rule, *(write(line) for line in lines)])
