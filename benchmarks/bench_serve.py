"""Latency of ``transformers serve`` over HTTP beside generate() in this process: the same saved model, prompt, tokens.

    python -m benchmarks.bench_serve --json benchmarks/results/serve.jsonl    # SmolLM2
    python -m benchmarks.bench_serve --model ./my-model-int4 --tokens 128

The server is a process of its own, asked by the openai client, streamed; the two take turns in every round. First
token: from the request, or the call of generate() with the prompt's ids, to the first text or token. Per token: from
there to the last, by the number of tokens between. Both are greedy; a round whose two texts differ is an error.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torch_cpullm
from torch_cpullm.launch import apply_default_threads

from . import machine, shapes
from .bench_cqil import write

QUESTION = "Explain in a few sentences why the sky is blue at noon and red in the evening. "
READY_S = 180  # a server that is not ready by then is given up
_MAIN = "from transformers.cli.transformers import main; main()"


class Clock:
    """A streamer of generate(): when each token came, and which."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.tokens: list[int] = []
        self._prompt = True

    def put(self, value: Tensor) -> None:
        if not self._prompt:
            self.times.append(time.perf_counter())
            self.tokens += value.flatten().tolist()
        self._prompt = False

    def end(self) -> None:
        """Nothing is left to do."""


def in_process(model: Any, ids: Tensor, tokens: int) -> tuple[float, float, list[int]]:
    """(s to the first token, s per further token, new tokens) of generate() on a prompt [1, s]."""
    clock, start = Clock(), time.perf_counter()
    mask = torch.ones_like(ids)
    model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, streamer=clock)
    count = len(clock.times)
    return clock.times[0] - start, (clock.times[-1] - clock.times[0]) / max(count - 1, 1), clock.tokens


def over_http(client: Any, model: str, messages: list[Any], tokens: int) -> tuple[float, float, str]:
    """(s to the first text, s from there to the last, text) of a streamed chat completion."""
    start, times, text = time.perf_counter(), [], ""
    options = {"max_tokens": tokens, "temperature": 0, "stream": True}
    for chunk in client.chat.completions.create(model=model, messages=messages, **options):
        piece = (chunk.choices[0].delta.content or "") if chunk.choices else ""
        if piece:
            times.append(time.perf_counter())
            text += piece
    if not times:
        raise RuntimeError("the server sent no text")
    return times[0] - start, times[-1] - times[0], text


@contextmanager
def server(path: Path, threads: int) -> Iterator[str]:
    """The address of a server of this model, which is ready. RuntimeError with its last lines if it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-c", _MAIN, "serve", str(path), "--device", "cpu"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdout=log,
            stderr=log,
        )
        try:
            until = time.monotonic() + READY_S
            while True:
                try:
                    with urllib.request.urlopen(f"{address}/health", timeout=5):
                        break
                except OSError:
                    if process.poll() is not None or time.monotonic() > until:
                        log.seek(0)
                        raise RuntimeError(f"transformers serve did not start: {log.read()[-2000:]}") from None
                    time.sleep(0.2)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def saved_model(name: str, folder: Path) -> Path:
    """A directory with a packed model and its tokenizer: ``name`` itself if it is one, else made in ``folder``."""
    path = shapes.find(name)
    if path.is_dir():
        if not (path / "config.json").is_file() or "cpullm" not in (path / "config.json").read_text():
            raise ValueError(f"{path} is no saved model of this package: cpullm quantize makes one")
        return path
    model, tokenizer = torch_cpullm.load(path)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=shapes.REAL, help=f"{shapes.REAL}, a GGUF file or a saved model")
    parser.add_argument("--repeat", type=int, default=8, help="how often the prompt holds its sentence")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens, at most")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="append rows to this file")
    args = parser.parse_args(argv)
    if min(args.repeat, args.rounds) < 1 or args.tokens < 2:
        parser.error("--repeat and --rounds must be at least 1, --tokens at least 2")
    if args.threads:
        torch.set_num_threads(args.threads)
    apply_default_threads()
    with tempfile.TemporaryDirectory() as name:
        run(args, saved_model(args.model, Path(name)))
    return 0


def run(args: argparse.Namespace, path: Path) -> None:
    """Measure, print and write the rows. RuntimeError where the two ways give different texts."""
    from openai import OpenAI
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    messages = [{"role": "user", "content": QUESTION * args.repeat}]
    given = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids, threads = given["input_ids"], torch.get_num_threads()
    found: dict[str, list[tuple[float, float]]] = {"in process": [], "http": []}
    memory, foreign = machine.Memory(8 * machine.l3_bytes()), machine.ForeignCpu()
    with server(path, threads) as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="none")
        bandwidth = [memory.read_gbps(threads)]
        for round_ in range(args.rounds + 1):  # the first one warms up
            with foreign:  # not around the other way: the server's time would count
                first, each, tokens = in_process(model, ids, args.tokens)
            served_first, rest, text = over_http(client, str(path), messages, args.tokens)
            want = tokenizer.decode(tokens, skip_special_tokens=True)
            if "".join(text.split()) != "".join(want.split()):  # pieces of text lose blanks between them
                raise RuntimeError(f"the server wrote {text!r}, generate() {want!r}")
            if round_:
                found["in process"].append((first, each))
                found["http"].append((served_first, rest / max(len(tokens) - 1, 1)))
        bandwidth.append(memory.read_gbps(threads))
    base = found["in process"]
    for way, samples in found.items():
        first, each = (1000 * statistics.median(sample[i] for sample in samples) for i in (0, 1))
        more = [1000 * statistics.median(a[i] - b[i] for a, b in zip(samples, base, strict=True)) for i in (0, 1)]
        write(
            {
                "bench": "serve",
                "model": args.model if args.model == shapes.REAL else path.name,
                "way": way,
                "threads": threads,
                "prompt tokens": ids.shape[1],
                "tokens": len(tokens),
                "first token, ms": round(first, 2),
                "ms per token": round(each, 3),
                "first token, ms more": round(more[0], 2),
                "ms more per token": round(more[1], 3),
                "bw_before": round(bandwidth[0], 1),
                "bw_after": round(bandwidth[1], 1),
                "foreign_cpu": foreign.cores and round(foreign.cores, 2),
            },
            args.json,
        )


if __name__ == "__main__":
    sys.exit(main())
