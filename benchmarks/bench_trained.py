"""Loss of models that were never 4-bit, in float and in INT4.

    python -m benchmarks.bench_trained train --json benchmarks/results/trained.jsonl
    python -m benchmarks.bench_trained directory stories260K-hf --text tinystories_sample.txt --json ...

train: a small GPT-NeoX, GPT-J, OPT and Falcon learn the language of language.py (seeded, about two minutes each on one
core); scored is text of the same language that no model has seen, in windows of 128. directory: a float checkpoint on a
text of one's own, cut at <|endoftext|>, each piece after a begin token. Calibration tokens are the model's own,
so nothing that is scored is calibrated on. Losses are nats per token; the difference from float is paired, in per cent
of the float loss with its 95 % interval.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import torch_cpullm
from torch_cpullm.calibration import self_generated, text_ids
from torch_cpullm.checkpoint import Form
from torch_cpullm.config import Settings
from torch_cpullm.devices import model_on
from torch_cpullm.distil import quantize_model
from torch_cpullm.quality import logits_of
from torch_cpullm.sensitivity import stored_bits
from torch_cpullm.trial import apply, forms_of, settings_of, twin

from . import language, rows
from .bench_calibration import SENSITIVITY, label_of, mixed_forms, recipe_of

WINDOW, HIDDEN, LAYERS, HEADS = 128, 128, 3, 4
LLAMA_NAMES = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": WINDOW,
}
NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "GPTNeoX": {**LLAMA_NAMES, **NO_DROPOUT, "intermediate_size": 4 * HIDDEN},
    "GPTJ": {
        "n_embd": HIDDEN,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_positions": WINDOW,
        "rotary_dim": 16,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    },
    "OPT": {**LLAMA_NAMES, "ffn_dim": 4 * HIDDEN, "word_embed_proj_dim": HIDDEN, "dropout": 0.0},
    "Falcon": {**LLAMA_NAMES, **NO_DROPOUT, "ffn_hidden_size": 4 * HIDDEN},
}
RECIPES = ("rtn,none,32", "rtn,point,32", "rtn,none,128", "awq+gptq+2,none,32", "awq+gptq+2,point,32")


# ---- training -------------------------------------------------------------------------------------------------------


def build(family: str) -> Any:
    """An untrained model of one of FAMILIES, the same one every time."""
    tokens = {"vocab_size": len(language.WORDS), "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    config = getattr(transformers, f"{family}Config")(**tokens, **FAMILIES[family])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def train(model: Any, ids: Tensor, steps: int, batch: int = 16, rate: float = 3e-3) -> None:
    """Adam on random windows of ids [tokens]; the rate rises over a tenth of the steps and falls to zero."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        starts = torch.randint(len(ids) - WINDOW, (batch, 1), generator=generator)
        windows = ids[starts + torch.arange(WINDOW)]
        logits = model(windows).logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def trained(family: str, steps: int, folder: Path | None) -> Any:
    """A trained model of ``family``; kept in ``folder``, or taken from there."""
    path = None if folder is None else folder / f"{family}-{steps}"
    if path is not None and path.exists():
        return AutoModelForCausalLM.from_pretrained(path).eval()
    start, model = time.perf_counter(), build(family)
    train(model, language.text(1_000_000, 0), steps)
    print(f"{family}: {steps} steps in {time.perf_counter() - start:.0f} s", flush=True)
    if path is not None:
        model.save_pretrained(path)
    return model


def unigram_loss(ids: Tensor) -> float:
    """Nats per token of ids [tokens] for a model that knows nothing but how frequent each token is in them."""
    shares = torch.bincount(ids).double() / len(ids)
    return float(-(shares * shares.clamp_min(1e-300).log()).sum())


# ---- INT4 -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """texts: what is scored, each [tokens] but its first token; logits, losses [all tokens]: the float model's, for
    the scored tokens; drawn [sequences, s]: to calibrate on.
    """

    texts: Sequence[Tensor]
    logits: Tensor
    losses: Tensor
    drawn: Tensor


def case_of(model: Any, texts: Sequence[Tensor], sequences: int, length: int, device: str = "cpu") -> Case:
    return Case(texts, *scores(model, texts), self_generated(model_on(model, device), sequences, length, seed=0))


def scores(model: Any, texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(log probabilities [all tokens, vocabulary], losses [all tokens]) of every token that has one before it."""
    logits = torch.cat([logits_of(model, text)[:-1] for text in texts]).log_softmax(-1)
    labels = torch.cat([text[1:] for text in texts])
    return logits, -logits.gather(1, labels[:, None])[:, 0]


def measure(model: Any, case: Case, text: str, device: str = "cpu") -> dict[str, Any]:
    """One row: ``text`` is a recipe as bench_calibration has it. device: where the float model computes."""
    method, form, bits = recipe_of(text)
    settings = Settings(group_size=form.group_size, sym=form.zeros == "none")
    forms = {name: form if own.bits == 4 else own for name, own in forms_of(model, settings).items()}
    inside = [name for name, own in forms.items() if own.bits == 4]
    if bits is not None:
        forms = mixed_forms(model_on(model, device), case.drawn[:SENSITIVITY], forms, form, bits)
        settings = settings_of(model, forms, settings)
    label = label_of(method, form, bits)
    found = quantize_model(model, case.drawn, forms, method, device=device, progress=False)
    row: dict[str, Any] = {"recipe and weights": label, "bits per weight": round(bits_of(model, forms, inside), 2)}
    for compute in ("fp32", "int8"):
        packed = apply(twin(model), found, replace(settings, compute=compute))
        row["layers as one op"] = one_op(packed)
        row |= compared(packed, case, compute)
    return row


def bits_of(model: Any, forms: dict[str, Form], names: list[str]) -> float:
    """Stored bits per weight of these linears, their padding included."""
    shapes = {name: model.get_submodule(name).weight.shape for name in names}
    return sum(stored_bits(forms[name], *shape) for name, shape in shapes.items()) / sum(
        shape.numel() for shape in shapes.values()
    )


def one_op(model: Any) -> str:
    """``3 of 3``: decoder layers that run as one operator."""
    levels = [layer.level for layer in torch_cpullm.report(model).layers]
    return f"{levels.count('one op')} of {len(levels)}"


def compared(model: Any, case: Case, compute: str) -> dict[str, Any]:
    """Loss of ``model``, its difference from float in per cent of float's, and the KL divergence."""
    logits, losses = scores(model, case.texts)
    difference = 100 * (losses - case.losses).double() / case.losses.double().mean()
    spread = 1.96 * float(difference.std()) / len(difference) ** 0.5
    kl = F.kl_div(logits, case.logits, log_target=True, reduction="sum") / len(losses)
    return {
        f"loss, {compute} compute": round(float(losses.mean()), 4),
        f"against float, {compute} compute": f"{float(difference.mean()):+.2f} % ± {spread:.2f}",
        f"KL, {compute} compute": round(max(0.0, float(kl)), 4),
    }


# ---- the command ----------------------------------------------------------------------------------------------------


def texts_of(path: Path, tokenizer: Any) -> list[Tensor]:
    """The pieces of a text file, each with the tokenizer's begin token."""
    pieces = [piece.strip() for piece in path.read_text(encoding="utf-8").split("<|endoftext|>")]
    begin = torch.tensor([tokenizer.bos_token_id])
    return [torch.cat([begin, text_ids(piece, tokenizer)]) for piece in pieces if piece]


def run(name: str, model: Any, case: Case, args: argparse.Namespace, kind: str, extra: dict[str, Any]) -> None:
    start = {"bench": kind, "model": name}
    first = {"recipe and weights": "float", "loss, fp32 compute": round(float(case.losses.mean()), 4), **extra}
    rows.write({**start, **first}, args.json)
    for text in args.recipe or RECIPES:
        rows.write({**start, **measure(model, case, text, args.device)}, args.json)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    one = kinds.add_parser("train", help="train one small model of each family")
    one.add_argument("--family", action="append", choices=list(FAMILIES), help="may be repeated; default: all")
    one.add_argument("--steps", type=int, default=900)
    one.add_argument("--models", type=Path, metavar="DIR", help="keep trained models there, or take them from there")
    one.add_argument(
        "--held-out", type=int, default=256, metavar="N", help=f"windows of {WINDOW} tokens that are scored"
    )
    two = kinds.add_parser("directory", help="a float checkpoint and a text")
    two.add_argument("path", type=Path)
    two.add_argument("--text", type=Path, required=True)
    two.add_argument("--length", type=int, default=256, help="tokens of a sequence to calibrate with")
    for each in (one, two):
        each.add_argument("--recipe", action="append", metavar="RECIPE,ZEROS,GROUP", help="as bench_calibration's")
        each.add_argument("--sequences", type=int, default=128, help="to calibrate with")
        each.add_argument("--device", default="cpu", help="where the float model computes; INT4 runs on the CPU")
        each.add_argument("--json", type=Path, help="append rows to this file")
    args = parser.parse_args(argv)
    if args.kind == "train":
        ids = language.text(args.held_out * WINDOW, 1)
        for family in args.family or FAMILIES:
            model = trained(family, args.steps, args.models)
            case = case_of(model, ids.view(-1, WINDOW).unbind(), args.sequences, WINDOW, args.device)
            run(family, model, case, args, "trained", {"loss by frequency alone": round(unigram_loss(ids), 4)})
        return
    model = AutoModelForCausalLM.from_pretrained(args.path, dtype=torch.float32).eval()
    case = case_of(
        model, texts_of(args.text, AutoTokenizer.from_pretrained(args.path)), args.sequences, args.length, args.device
    )
    run(args.path.name, model, case, args, "stories", {})


if __name__ == "__main__":
    main()
