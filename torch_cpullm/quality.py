"""How good a language model is on a text: perplexity in stated windows, KL divergence and agreement with another model.

Three conventions of cutting T tokens into windows of w; they give different numbers for the same model:

    plain     T // w windows side by side; every token of a window but its first is scored
    llama     the same windows; scored is the second half, tokens w/2 + 1 .. w - 1, as llama-perplexity has it
    sliding   a window every ``stride`` tokens; scored is what no window before has scored (HuggingFace's guide)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .devices import device_of

CONVENTIONS = ("plain", "llama", "sliding")
_ROWS = 256  # positions whose logits are compared at a time
_Z95 = 1.96  # of a normal distribution


@dataclass(frozen=True)
class Quality:
    """What :func:`evaluate` has measured. Intervals are of 95 %, over tokens as if they were independent.

    loss: mean negative log likelihood, nats per token, with its interval; perplexity: its exponential.
    tokens: how many were scored. Against a reference model, else None: kl, the mean KL(reference || model) in nats;
    top1, the share of positions where both find the same token likeliest; loss_difference, the mean of loss minus the
    reference's loss per token, paired, with its interval.
    """

    convention: str
    window: int
    stride: int | None
    tokens: int
    loss: float
    loss_interval: float
    perplexity: float
    kl: float | None = None
    top1: float | None = None
    loss_difference: float | None = None
    difference_interval: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields that were measured, for JSON."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        how = f"windows of {self.window}, {self.convention}" + (f", stride {self.stride}" if self.stride else "")
        half = (math.exp(self.loss_interval) - 1) * self.perplexity
        lines = [f"perplexity {self.perplexity:.3f} +- {half:.3f} ({self.tokens} tokens scored; {how})"]
        if self.kl is not None and self.loss_difference is not None and self.difference_interval is not None:
            change, spread = (100 * (math.exp(x) - 1) for x in (self.loss_difference, self.difference_interval))
            lines.append(f"against the reference: perplexity {change:+.2f} % +- {spread:.2f}")
            lines.append(f"KL {self.kl:.4f} nats per token, same likeliest token {100 * (self.top1 or 0):.1f} %")
        return "\n".join(lines)


def windows(
    tokens: int, window: int, convention: str = "plain", stride: int | None = None
) -> list[tuple[int, int, int]]:
    """(begin, end, first) of every window: of tokens [begin, end) those from the first-th on are scored.

    Raises ValueError for an unknown convention, sizes out of range, and where not one window fits.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
    if type(window) is not int or window < 4:
        raise ValueError(f"window must be an integer of at least 4 tokens, got {window!r}")
    if convention != "sliding":
        if stride is not None:
            raise ValueError(f"stride is for the sliding convention, not for {convention}")
        if tokens < window:
            raise ValueError(f"the text has {tokens} tokens, fewer than one window of {window}")
        first = window // 2 + 1 if convention == "llama" else 1
        return [(begin, begin + window, first) for begin in range(0, tokens - window + 1, window)]
    stride = window if stride is None else stride
    if type(stride) is not int or not 1 <= stride <= window:
        raise ValueError(f"stride must be an integer from 1 to the window, {window}, got {stride!r}")
    if tokens < 2:
        raise ValueError(f"the text has {tokens} tokens, and the first cannot be scored")
    found, scored = [], 1
    for begin in range(0, tokens, stride):
        end = min(begin + window, tokens)
        found.append((begin, end, max(scored - begin, 1)))
        scored = end
        if end == tokens:
            break
    return [cut for cut in found if cut[1] - cut[0] > cut[2]]


def check_ids(ids: Tensor, model: nn.Module) -> Tensor:
    """``ids`` as int64; ValueError unless they are tokens of ``model``'s vocabulary."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32) or ids.dim() not in (1, 2):
        kind = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"token ids must be an int64 or int32 tensor [tokens] or [sequences, tokens], got {kind}")
    if ids.numel() == 0:
        raise ValueError("token ids are empty")
    low, high = int(ids.min()), int(ids.max())
    size = _vocabulary(model)
    if low < 0 or (size is not None and high >= size):
        raise ValueError(f"token ids must lie in 0..{'' if size is None else size - 1}, got {low}..{high}")
    return ids.long()


def _vocabulary(model: nn.Module) -> int | None:
    get: Any = getattr(model, "get_input_embeddings", None)
    return getattr(get(), "num_embeddings", None) if get is not None else None


def evaluate(
    model: nn.Module,
    ids: Tensor,
    *,
    window: int = 2048,
    convention: str = "plain",
    stride: int | None = None,
    bos: int | None = None,
    reference: nn.Module | Sequence[Tensor] | None = None,
    progress: bool = False,
) -> Quality:
    """Loss and perplexity of ``model`` on a text and, against ``reference``, KL divergence and top-1 agreement.

    model: token ids [1, s] -> an object with ``logits`` [1, s, vocabulary], on any device. ids: int64 [T]. window,
    convention, stride: see :func:`windows`. bos: token that takes the place of every window's first (llama-perplexity
    does that where the model asks for one). reference: a model of the same vocabulary, or its :func:`window_logits`.

    Raises ValueError for ids out of range, no whole window, a reference of another vocabulary, and logits with NaN.
    """
    ids = check_ids(ids, model).to(device_of(model))
    if ids.dim() != 1:
        raise ValueError(f"evaluate takes the ids of one text, [tokens], got {list(ids.shape)}")
    cuts = windows(len(ids), window, convention, stride)
    losses, other_losses, kl, same = [], [], 0.0, 0
    for index, (begin, end, first) in enumerate(tqdm(cuts, desc="evaluate", unit="window", disable=not progress)):
        part = _with_bos(ids[begin:end], bos)
        logits = logits_of(model, part)[first - 1 : -1]
        other = None
        if isinstance(reference, nn.Module):
            other = logits_of(reference, part)[first - 1 : -1].to(logits.device)
        elif reference is not None:
            other = reference[index].to(logits.device)
        if other is not None and other.shape != logits.shape:
            raise ValueError(f"the reference has logits {list(other.shape)}, the model {list(logits.shape)}")
        for row in range(0, len(logits), _ROWS):
            labels = part[first + row : first + row + _ROWS, None]
            mine = logits[row : row + _ROWS].float().log_softmax(-1)
            losses.append(-mine.gather(1, labels)[:, 0])
            if other is not None:
                theirs = other[row : row + _ROWS].float().log_softmax(-1)
                other_losses.append(-theirs.gather(1, labels)[:, 0])
                kl += float(nn.functional.kl_div(mine, theirs, log_target=True, reduction="sum"))
                same += int((mine.argmax(-1) == theirs.argmax(-1)).sum())
        if not bool(torch.isfinite(losses[-1]).all()):
            raise ValueError(f"the model's logits hold NaN or inf in the window of tokens {begin}..{end - 1}")
    loss = torch.cat(losses).double()
    mean, half = _mean(loss)
    found = Quality(convention, window, stride, len(loss), mean, half, math.exp(min(mean, 700.0)))
    if reference is None:
        return found
    difference, spread = _mean(loss - torch.cat(other_losses).double())
    kl, top1 = max(0.0, kl / len(loss)), same / len(loss)
    return replace(found, kl=kl, top1=top1, loss_difference=difference, difference_interval=spread)


def _mean(values: Tensor) -> tuple[float, float]:
    """(mean, half of its 95 % interval)."""
    spread = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return float(values.mean()), _Z95 * spread


def _with_bos(ids: Tensor, bos: int | None) -> Tensor:
    return ids if bos is None else torch.cat([ids.new_tensor([bos]), ids[1:]])


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits [s, vocabulary] of the model for ids [s], where the model is; nothing is cached."""
    takes_cache, ids = hasattr(model, "config"), ids.to(device_of(model))  # a model of transformers
    with torch.inference_mode():
        out = model(ids[None], use_cache=False) if takes_cache else model(ids[None])
    logits = out.logits if hasattr(out, "logits") else out
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != (1, len(ids)):
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the model must return logits [1, {len(ids)}, vocabulary], got {shape}")
    return logits[0]


def window_logits(
    model: nn.Module, ids: Tensor, *, window: int = 2048, convention: str = "plain", dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """The logits of every window's scored positions, to compare several models with one that need not stay."""
    cuts = windows(len(ids), window, convention)
    return [logits_of(model, ids[begin:end])[first - 1 : -1].to(dtype) for begin, end, first in cuts]


# ---- tasks ----------------------------------------------------------------------------------------------------------


def harness(
    model: nn.Module, tokenizer: Any, tasks: Sequence[str], *, include_path: str | None = None, **options: Any
) -> Mapping[str, Any]:
    """lm-evaluation-harness's results of ``tasks`` for a loaded model, by the harness's own HFLM.

    include_path: a folder with task files of one's own, which may read local data. options: of
    ``lm_eval.simple_evaluate``, such as ``limit`` or ``num_fewshot``. Nothing is downloaded that the tasks do not ask
    for. Raises ImportError, saying what to install, without the package; ValueError for tasks that nobody knows.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(f"tasks need lm-evaluation-harness: pip install 'torch_cpullm[eval]' ({error})") from error
    manager = TaskManager(include_path=include_path)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown or not tasks:
        raise ValueError(f"lm-evaluation-harness knows no task {', '.join(unknown) or '(none was named)'}")
    batch = options.pop("batch_size", 1)
    model.__dict__["tie_weights"] = lambda *_, **__: None  # HFLM calls it, and packed weights are tied already
    try:
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    finally:
        del model.__dict__["tie_weights"]
    found: dict[str, Any] = simple_evaluate(model=wrapped, tasks=list(tasks), task_manager=manager, **options)
    return found["results"]


def score_lines(results: Mapping[str, Any]) -> Iterator[str]:
    """One line per task and metric of :func:`harness`."""
    for task, metrics in results.items():
        for name, value in metrics.items():
            if isinstance(value, float) and "stderr" not in name:
                error = metrics.get(name.replace(",", "_stderr,"))
                spread = f" +- {_Z95 * error:.4f}" if isinstance(error, float) else ""
                yield f"{task}: {name.partition(',')[0]} {value:.4f}{spread}"
