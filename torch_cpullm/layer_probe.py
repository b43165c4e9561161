"""Does a program compute what a decoder layer computes? Tried out on a small random replica of the layer."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from .layer_execute import Run, prepare
from .layer_parts import (
    ALIBI,
    K_NORMS,
    Q_NORMS,
    ROLE_OF,
    Choice,
    NoMatchError,
    Parts,
    biased_mask,
    build,
    choices,
    own_state,
    plain_modules,
    read_parts,
    rotary_from_table,
)
from .linear import PackedLinear
from .packing import QuantizedWeight, dequantize, pack

TOLERANCE = 2e-4  # of the layer's largest change of its input; rounding gives about 1e-5
VOCAB, POSITIONS, SWITCH, WINDOW = 64, 128, 32, 8
SCORES = 8.0  # standard deviation of the attention scores: where a softcap shows

# Attributes that are sizes: they differ between a layer and its replica.
SIZES = {
    "hidden_size",
    "embed_dim",
    "head_dim",
    "head_size",
    "intermediate_size",
    "num_heads",
    "num_attention_heads",
    "num_key_value_heads",
    "num_kv_heads",
    "num_key_value_groups",
    "layer_idx",
    "sliding_window",
    "max_positions",
    "max_position_embeddings",
    "rotary_ndims",
    "rotary_dim",
    "pos_embd_dim",
    "split_size",
    "normalized_shape",
}


@dataclass(frozen=True)
class Sizes:
    """Of a layer: what the replica's sizes follow from."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int

    @staticmethod
    def of(parts: Parts) -> Sizes:
        """The sizes of these parts."""
        return Sizes(parts.linears["o"].out_features, parts.heads, parts.kv_heads, parts.head_dim)

    def shrunk(self) -> Sizes:
        """Few heads of the same size and the same kind of sharing; hidden stays tied to the heads where it was."""
        if self.heads == self.kv_heads:
            heads = kv_heads = 3 if self.heads > 1 else 1
        elif self.kv_heads == 1:
            heads, kv_heads = 3, 1
        else:
            heads, kv_heads = 2 * min(3, self.heads // self.kv_heads), 2
        tied = self.hidden == self.heads * self.head_dim
        return Sizes(heads * self.head_dim if tied else 160, heads, kv_heads, self.head_dim)


@dataclass
class ProbeCache:
    """A cache of one layer with room for POSITIONS tokens."""

    k: Tensor | None = None
    v: Tensor | None = None
    length: int = 0

    def reserve(
        self, batch: int, tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int]:
        """See :class:`torch_cpullm.layer_reference.CacheLayer`."""
        if self.k is None or self.v is None:
            self.k, self.v = (torch.zeros(batch, kv_heads, POSITIONS, head_dim, dtype=dtype) for _ in range(2))
        return self.k, self.v, None, None, self.length

    def advance(self, tokens: int) -> None:
        """See :class:`torch_cpullm.layer_reference.CacheLayer`."""
        self.length += tokens


# ---- the replica ----------------------------------------------------------------------------------------------------


def representatives(config: Any) -> tuple[list[int], list[int]]:
    """Layers that differ by a list of the config with one value per layer, and each layer's place among them."""
    count = int(config.num_hidden_layers)
    lists = [v for v in vars(config).values() if isinstance(v, (list, tuple)) and len(v) == count]
    values = [tuple(repr(each[i]) for each in lists) for i in range(count)]
    first = sorted({value: i for i, value in reversed(list(enumerate(values)))}.values())
    return first, [[values[i] for i in first].index(value) for value in values]


def shrink(config: Any, sizes: Sizes) -> Any:
    """A copy of a model's config with small sizes, everything else as it is."""
    first, _ = representatives(config)
    count, small = int(config.num_hidden_layers), sizes.shrunk()
    new = copy.deepcopy(config)
    for name, value in list(vars(new).items()):
        if isinstance(value, (list, tuple)) and len(value) == count and count > 1:
            setattr(new, name, [value[i] for i in first])
    kv_heads = small.heads if getattr(config, "num_kv_heads", None) == sizes.heads else small.kv_heads
    known: dict[str, Any] = {
        "num_hidden_layers": len(first),
        "hidden_size": small.hidden,
        "word_embed_proj_dim": small.hidden,
        "num_attention_heads": small.heads,
        "num_key_value_heads": small.kv_heads,
        "num_kv_heads": kv_heads,
        "intermediate_size": 112,
        "ffn_dim": 112,
        "ffn_hidden_size": 112,
        "n_inner": 112,
        "vocab_size": VOCAB,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": POSITIONS,
        "original_max_position_embeddings": SWITCH,
        "sliding_window": WINDOW,
    }
    names = getattr(type(config), "attribute_map", {})
    for name, value in known.items():
        if vars(new).get(names.get(name, name)) is not None:
            setattr(new, name, value)
    if hasattr(new, "mlp_only_layers"):  # a layer with experts does not get here: the replica's are all dense
        new.mlp_only_layers = list(range(len(first)))
    _shrink_rope(getattr(new, "rope_parameters", None))
    for name in ("quantization_config", "_name_or_path", "transformers_version", "architectures", "dtype"):
        vars(new).pop(name, None)
    new._attn_implementation = "eager"
    return new


def _shrink_rope(rope: Any) -> None:
    """Let switches of the rotary embedding come early; a model may have one set of values per kind of layer."""
    for name, value in (rope or {}).items():
        if isinstance(value, dict):
            _shrink_rope(value)
        elif name == "original_max_position_embeddings":
            rope[name] = SWITCH


@dataclass
class Replica:
    """A small float model, its layers, and the same layers with packed linears, which compute the same."""

    owner: Any
    layers: list[nn.Module]
    packed: list[nn.Module]


def build_replica(owner: nn.Module, path: str, config: Any) -> Replica:
    """``type(owner)`` from a shrunken config; path: of the list of layers inside. NoMatchError if that fails."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            small: Any = type(owner)(copy.deepcopy(config))
    except Exception as error:  # any model's own code
        raise NoMatchError(f"no small replica of its model can be built: {_line(error)}") from error
    small = small.float().eval().requires_grad_(False)
    layers = list(small.get_submodule(path))
    return Replica(small, layers, [])


def fill(replica: Replica, scale: float, head_dim: int) -> None:
    """Random weights that let every part of a layer show, and the packed layers with the same ones."""
    generator = torch.Generator().manual_seed(1)
    large = math.sqrt(SCORES / (abs(scale) * math.sqrt(head_dim)))  # of queries and keys
    inside = {id(p) for layer in replica.layers for p in layer.parameters()}
    for parameter in replica.owner.parameters():
        if id(parameter) not in inside:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    for layer in replica.layers:
        packed = copy.deepcopy(layer)
        for name, module in list(layer.named_modules()):
            short = name.rpartition(".")[2]
            if isinstance(module, nn.Linear):
                size = large if ROLE_OF.get(short) in ("q", "k", "qkv") else 1.0
                packed.set_submodule(name, _fill_linear(module, size, generator))
                continue
            for key, parameter in module.named_parameters(recurse=False):
                values = 0.3 * torch.randn(parameter.shape, generator=generator)
                if key != "bias":
                    values += 1
                if short in (*Q_NORMS, *K_NORMS):
                    values *= math.sqrt(SCORES / (abs(scale) * head_dim))
                parameter.copy_(values)
                packed.get_parameter(f"{name}.{key}" if name else key).copy_(values)
        replica.packed.append(packed)


def _fill_linear(linear: nn.Linear, size: float, generator: torch.Generator) -> PackedLinear:
    """Random 4-bit weights that enlarge an input by about ``size``, in ``linear`` and in the packed one returned."""
    n, k = linear.weight.shape
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    scales = (0.5 + torch.rand(n, -(-k // 32), generator=generator)) * (size / (4.8 * math.sqrt(k)))
    weight = pack(QuantizedWeight(codes, scales.half(), None, 4, 32))
    linear.weight.copy_(dequantize(weight))
    if linear.bias is not None:
        linear.bias.copy_(0.3 * torch.randn(n, generator=generator))
    return PackedLinear(weight, linear.bias, dtype=torch.float32, compute="fp32")


# ---- what the replica computes --------------------------------------------------------------------------------------


@dataclass
class Call:
    """One call of a layer: its input and other arguments, its result, and which rows of it count [b, s]."""

    x: Tensor
    arguments: dict[str, Any]
    y: Tensor
    outputs: int  # 0: a tensor; otherwise the length of the tuple
    rows: Tensor


@dataclass
class Recording:
    """Calls of every layer, by scenario; the calls of one scenario share a cache."""

    layers: list[dict[str, list[Call]]] = field(default_factory=list)
    cached: list[tuple[int, int]] = field(default_factory=list)  # heads and head_dim of the model's own cache


def record(replica: Replica) -> Recording:
    """Run the replica's scenarios: prefill, decode, a chunk behind a cache, a left-padded batch, late positions."""
    from transformers import DynamicCache

    result = Recording([{} for _ in replica.layers])
    generator = torch.Generator().manual_seed(2)
    calls: list[list[tuple[Any, dict[str, Any], Any]]] = [[] for _ in replica.layers]
    hooks = [
        layer.register_forward_hook(lambda _, args, kwargs, y, to=to: to.append((args, kwargs, y)), with_kwargs=True)
        for layer, to in zip(replica.layers, calls, strict=True)
    ]
    known = inspect.signature(type(replica.owner).forward).parameters
    try:
        for name, batch, steps, start, padded in (
            ("prefill", 1, (21, 1, 1, 5, 1), 0, False),
            ("late", 1, (6, 1), SWITCH + 11, False),
            ("padded", 3, (14, 1, 3), 0, True),
        ):
            cache, length = DynamicCache(), 0
            mask = torch.ones(batch, sum(steps), dtype=torch.long)
            for i in range(batch if padded else 0):
                mask[i, : 4 * i] = 0
            for tokens in steps:
                end = length + tokens
                positions = (mask.cumsum(1) - 1).clamp(min=0)[:, length:end] + start
                options = {"position_ids": positions, "past_key_values": cache, "use_cache": True}
                if padded:
                    options["attention_mask"] = mask[:, :end]
                ids = torch.randint(0, VOCAB, (batch, tokens), generator=generator)
                for to in calls:
                    to.clear()
                with torch.no_grad():
                    replica.owner(ids, **{key: value for key, value in options.items() if key in known})
                for j, to in enumerate(calls):
                    result.layers[j].setdefault(name, []).append(_call(to, mask[:, length:end].bool()))
                length = end
            if name == "prefill":
                kept: list[Any] = cache.layers
                result.cached = [(layer.keys.shape[1], layer.keys.shape[3]) for layer in kept]
    except NoMatchError:
        raise
    except Exception as error:  # any model's own code
        raise NoMatchError(f"a small replica of its model does not run: {_line(error)}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return result


def _call(seen: list[tuple[Any, dict[str, Any], Any]], rows: Tensor) -> Call:
    if len(seen) != 1 or len(seen[0][0]) != 1 or not isinstance(seen[0][0][0], Tensor):
        raise NoMatchError("it is not called once per pass, with the hidden states alone in front")
    (x,), kwargs, y = seen[0]
    outputs = len(y) if isinstance(y, tuple) else 0
    first = y[0] if outputs else y
    if outputs > 2 or not isinstance(first, Tensor) or first.shape != x.shape:
        raise NoMatchError("it returns something else than its new hidden states")
    return Call(x.clone(), dict(kwargs), first.clone(), outputs, rows)


# ---- the comparison -------------------------------------------------------------------------------------------------


def try_out(layer: nn.Module, config: Any, calls: dict[str, list[Call]]) -> tuple[Choice, int]:
    """The first reading of the packed ``layer`` that computes what was recorded, and the length of the layer's tuple.

    NoMatchError if none does.
    """
    parts = read_parts(layer, config)
    first = calls["prefill"][0]
    biased = first.arguments.get(ALIBI) is not None
    given = first.arguments.get("position_embeddings")
    cos, _ = _rotary(parts, first)
    if given is not None and not _is_pair(given):
        raise NoMatchError("its position embeddings are not a pair of cosines and sines")
    best = math.inf
    if cos is not None and cos.dim() != 3:
        raise NoMatchError("its positions have several axes, which the layer mixes itself")
    for choice in choices(parts, config, 0 if cos is None else cos.shape[-1]):
        try:
            run = prepare(build(parts, config, choice))
        except (NoMatchError, ValueError):  # no such layer, or none that the operator runs
            continue
        with torch.no_grad():
            worst = 0.0
            for error in _errors(run, parts, calls):
                worst = max(worst, error)
                if not worst <= TOLERANCE:
                    break
        if worst <= TOLERANCE:
            return replace(choice, biased=biased), first.outputs
        best = min(best, worst)
    if biased:
        raise NoMatchError("its attention adds linear biases (alibi) in a way that no program knows")
    raise NoMatchError("no arrangement of its parts computes what it does")


def _errors(run: Run, parts: Parts, calls: dict[str, list[Call]]) -> Iterator[float]:
    """Largest error of every recorded call, of its largest change: with the masks given, as bool, and left out."""
    for name, kind in (
        ("prefill", "given"),
        ("prefill", "none"),
        ("late", "given"),
        ("padded", "given"),
        ("padded", "bool"),
    ):
        cache = ProbeCache()
        for call in calls[name]:
            mask = call.arguments.get("attention_mask")
            alibi = call.arguments.get(ALIBI)
            if alibi is not None:  # a program takes it with the mask only
                mask = None if mask is None else biased_mask(mask == 0 if kind == "bool" else mask, alibi, parts.heads)
            elif kind == "none" or mask is None:
                mask = None
            elif kind == "bool" and mask.dtype != torch.bool:
                mask = mask == 0
            got = run(call.x, *_rotary(parts, call), mask, cache)
            yield _error(got, call)
        first = calls[name][0]
        if kind == "none" and first.arguments.get(ALIBI) is None:
            yield _error(run(first.x, *_rotary(parts, first), None, None), first)


def _error(got: Tensor, call: Call) -> float:
    change = (call.y - call.x)[call.rows].abs().max()
    return float(((got - call.y)[call.rows].abs().max() / change).nan_to_num(math.inf))


def _rotary(parts: Parts, call: Call) -> tuple[Tensor | None, Tensor | None]:
    """cos and sin of a call: given by the model, read from the layer's table, or none."""
    given = call.arguments.get("position_embeddings")
    if _is_pair(given):
        return cast("tuple[Tensor, Tensor]", given)
    if parts.table is not None:
        return rotary_from_table(parts.table, call.arguments["position_ids"])
    return None, None


def _is_pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(t, Tensor) for t in value)


def _line(error: Exception) -> str:
    """An error in one short line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:80]


def adopt_scalars(real: nn.Module, layer: nn.Module) -> None:
    """Give ``layer`` the settings of ``real`` that may have been changed on the instance; sizes stay.

    NoMatchError where the two differ in their make: in classes, in attributes, in a number of unknown meaning.
    """
    theirs = dict(layer.named_modules())
    ours = dict(plain_modules(real))
    if {p for p, m in ours.items() if not _inside_linear(p, ours)} != {
        p for p in theirs if not _inside_linear(p, theirs)
    }:
        raise NoMatchError("its modules are not those that its class makes")
    for path, module in ours.items():
        other = theirs.get(path)
        if other is None or isinstance(module, PackedLinear) or isinstance(other, nn.Linear):
            continue
        if type(module) is not type(other):
            raise NoMatchError(f"{path or 'it'} is not of the class that its model makes")
        mine, its = own_state(module), own_state(other)
        if set(mine) - {"forward"} != set(its):
            name = sorted(set(mine) ^ set(its))[0]
            raise NoMatchError(f"{path or 'it'} has the attribute {name!r}, which no program knows")
        for name, value in its.items():
            _adopt(other, path, name, mine[name], value)


def _inside_linear(path: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a module lies inside a linear."""
    parent = path.rpartition(".")[0]
    return bool(parent) and isinstance(modules.get(parent), (nn.Linear, PackedLinear))


def _adopt(module: nn.Module, path: str, name: str, mine: Any, its: Any) -> None:
    if name in SIZES or mine is its:
        return
    if isinstance(mine, (bool, str, float, type(None))) and isinstance(its, (bool, str, float, type(None))):
        setattr(module, name, mine)
    elif (isinstance(mine, (int, tuple, list, dict, set)) and mine != its) or type(mine) is not type(its):
        raise NoMatchError(f"{name!r} of {path or 'it'} is not what its class makes it")
