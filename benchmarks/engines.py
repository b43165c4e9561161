"""One engine in a process of its own: loads the model, then generates on request in turns.

Run by bench_models: ``python -m benchmarks.engines ENGINE MODEL --threads N ...``, peers by their own interpreter. The
first line on stdout says what was loaded, and in how many ways the engine generates. A line of JSON on stdin ({"pp":
512, "tg": 64, "depth": 0, "batch": 1, "seed": 0, "room": 576}) asks for a sequence; the answer is the time of its
prompt. Then the process waits, with the sequence's cache: each {"go": N} is answered by the times of N more tokens,
{"go": 0} after tg tokens ends the sequence. batch and room, the tokens that the longest sequence will have, stay what
they are in the first request, which warms up what later ones reuse. An engine with several ways takes a prompt and then
a turn in each, one after the other. {"error": ...} in place of an answer is the last line.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class Clock:
    """Seconds of tokens: ``tick`` after each. At the end of a turn it reports them and waits; that is not counted."""

    def __init__(self, turn: Callable[[list[float], str], int] | None = None) -> None:
        """turn(times, way): reports a turn, says how many tokens the next has; without it all are one, in ``times``."""
        self.times: list[float] = []
        self.done = False
        self._turn = turn
        self._left = 1
        self._then = 0.0
        self.start()

    def start(self) -> None:
        """What comes is counted from now."""
        self._then = time.perf_counter()

    def tick(self, way: str = "") -> bool:
        """A token, or a prompt, is computed; whether the next begins a new turn. After the last, ``done`` is set."""
        self.times.append(time.perf_counter() - self._then)
        self._left -= 1
        ended = self._turn is not None and self._left == 0
        if self._turn and ended:
            self._left, self.times = self._turn(self.times, way), []
            self.done = self._left == 0
        self.start()
        return ended


class HuggingFace:
    """A model that is driven through generate()."""

    def __init__(self, model: Any, weight_bytes: int, weights: int) -> None:
        """weight_bytes, weights: size and number of the weights that every token reads."""
        import transformers

        self.model = model
        self.weight_bytes, self.weights = weight_bytes, weights
        self.version = f"transformers {transformers.__version__}"

    def run(self, request: dict[str, Any], clock: Clock) -> None:
        """generate() on pp random ids for exactly tg greedy tokens, the first of which ends the prompt's turn."""
        import torch

        class Streamer:
            """Called by generate() with the prompt and then with every token: where it waits, generation waits."""

            def __init__(self) -> None:
                self.begun = False

            def put(self, value: Any) -> None:
                if self.begun:
                    clock.tick()
                self.begun = True

            def end(self) -> None:
                pass

        depth, pp, tg, batch = (request[key] for key in ("depth", "pp", "tg", "batch"))
        vocab = self.model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(request["seed"])
        ids = torch.randint(3, vocab, (batch, depth + pp), generator=generator)
        # No token ends the text. min_new_tokens would: by a search of the whole vocabulary in every step.
        settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": tg, "pad_token_id": 0, "eos_token_id": vocab}
        if depth:
            earlier = self.model(ids[:, :depth], use_cache=True, logits_to_keep=1)
            settings["past_key_values"] = earlier.past_key_values
        clock.start()
        self.model.generate(ids, attention_mask=torch.ones_like(ids), streamer=Streamer(), **settings)


def float_weights(model: Any) -> int:
    """Number of weights that every token reads: matrices without an embedding that is not the head too."""
    matrices = {id(p): p.numel() for p in model.parameters() if p.dim() > 1}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is not embedding.weight:
        matrices.pop(id(embedding.weight), None)
    return sum(matrices.values())


def load_cpullm(args: argparse.Namespace) -> HuggingFace:
    import torch

    import torch_cpullm

    from . import shapes

    config = torch_cpullm.CpuLlmConfig(group_size=args.group, sym=args.sym, compute=args.compute)
    if shapes.made_packed(args.model):
        model = shapes.packed_model(args.model, config)
        weights = shapes.parameters(args.model) - model.get_input_embeddings().packed.n * model.config.hidden_size
    else:
        model = shapes.float_model(args.model, torch.bfloat16)
        weights = float_weights(model)
        model = torch_cpullm.optimize(model, config)
    tied = model.config.get_text_config().tie_word_embeddings
    rows = torch_cpullm.report(model).rows
    read = sum(row.bytes_after for row in rows if tied or row.kind != "embedding")
    return HuggingFace(model, read, weights)


def load_hf_bf16(args: argparse.Namespace) -> HuggingFace:
    import torch

    from . import shapes

    model = shapes.float_model(args.model, torch.bfloat16)
    weights = float_weights(model)
    return HuggingFace(model, 2 * weights, weights)


def load_torchao(args: argparse.Namespace) -> HuggingFace:
    import torch
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    from . import shapes

    model = shapes.float_model(args.model, torch.bfloat16)
    weights = float_weights(model)
    head = model.get_output_embeddings().weight
    kept = head.numel() if head is model.get_input_embeddings().weight else 0  # a tied head stays bf16
    quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=args.group))
    bits = 4 + 32 / args.group  # bf16 scale and zero point
    return HuggingFace(model, int((weights - kept) * bits / 8) + 2 * kept, weights)


def load_llamacpp(args: argparse.Namespace) -> Any:
    from . import llamacpp

    return llamacpp.Engine(args.file, args.threads)


def load_openvino(args: argparse.Namespace) -> Any:
    from . import openvino_peer

    return openvino_peer.Engine(args.file, args.threads)


ENGINES: dict[str, Callable[[argparse.Namespace], Any]] = {
    "cpullm": load_cpullm,
    "llama.cpp": load_llamacpp,
    "openvino": load_openvino,
    "hf-bf16": load_hf_bf16,
    "torchao": load_torchao,
}


def peak_rss_gib() -> float:
    """Peak resident memory of this process; getrusage's would count the parent's until exec."""
    match = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(match[1]) / 2**20 if match else 0.0


def serve(args: argparse.Namespace, lines: Iterator[str], say: Callable[[dict[str, Any]], None]) -> None:
    """Load, then answer requests until ``lines`` end, even within one."""
    start = time.perf_counter()
    engine = ENGINES[args.engine](args)
    gc.collect()
    loaded = {"load_s": time.perf_counter() - start, "ways": getattr(engine, "ways", 1), "version": engine.version}
    say({**loaded, "weight_bytes": engine.weight_bytes, "weights": engine.weights})
    used = 0.0

    def hear() -> dict[str, Any]:
        nonlocal used
        line = next(lines, None)
        if line is None:
            sys.exit(0)
        used = time.process_time()
        return json.loads(line)

    def turn(times: list[float], way: str) -> int:
        spent = time.process_time() - used
        say({"times": times, "way": way, "own_cpu_s": spent, "rss_peak_gib": peak_rss_gib()})
        return hear()["go"]

    while True:
        engine.run(hear(), Clock(turn))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--sym", action="store_true")
    parser.add_argument("--compute", default="int8")
    parser.add_argument("--file", type=Path, help="a peer's own form of the model")
    args = parser.parse_args()
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not look like an answer

    lines = iter(sys.stdin.readline, "")

    def say(message: dict[str, Any]) -> None:
        answer.write(json.dumps(message) + "\n")
        answer.flush()

    try:
        if args.file:
            serve(args, lines, say)
        else:
            import torch

            torch.set_num_threads(args.threads)
            with torch.inference_mode():
                serve(args, lines, say)
    except (ImportError, OSError, RuntimeError, ValueError, TypeError, AttributeError, KeyError, MemoryError) as error:
        say({"error": f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"})
        sys.exit(1)


if __name__ == "__main__":
    main()
