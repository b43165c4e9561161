"""The parts of a decoder layer, found by structure and by the names that models give to roles, never by class."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .layer_reference import apply_norm
from .layer_spec import ACTIVATIONS, NORMS, LayerSpec, Norm, QkvLayout
from .linear import PackedLinear, has_adapter
from .reference import activate


class NoMatchError(Exception):
    """Why a layer is none that a program can compute, in words for the user."""


ROLES = {
    "q": ("q_proj", "wq", "query"),
    "k": ("k_proj", "wk", "key"),
    "v": ("v_proj", "wv", "value"),
    "qkv": ("qkv_proj", "query_key_value", "Wqkv", "wqkv", "qkv"),
    "o": ("o_proj", "out_proj", "dense", "wo"),
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "w3", "fc1", "c_fc", "fc_in", "dense_h_to_4h"),
    "gate_up": ("gate_up_proj",),
    "down": ("down_proj", "w2", "fc2", "c_proj", "fc_out", "dense_4h_to_h"),
}
ROLE_OF = {name: role for role, names in ROLES.items() for name in names}

# Arguments of a layer's forward that a program computes with, or that do not change what a layer computes.
CACHES = ("past_key_values", "past_key_value", "layer_past")
ARGUMENTS = {
    "hidden_states",
    "attention_mask",
    "position_embeddings",
    "position_ids",
    "use_cache",
    "cache_position",
    "output_attentions",
    "alibi",
    *CACHES,
}

ALIBI = "alibi"  # the argument that is added to the scores: linear biases
Q_NORMS, K_NORMS = ("q_norm", "q_layernorm"), ("k_norm", "k_layernorm")
_SCALES = ("scaling", "scale", "softmax_scale", "inv_norm_factor")
_INVERSE_SCALES = ("scale_attn", "norm_factor")
RESIDUAL_SCALES = ("residual_multiplier", "residual_scale")
_HEAD_DIMS = ("head_dim", "head_size", "attention_head_size")
TABLE = "embed_positions"  # sines, then cosines, of every position: the only buffer that a layer may hold
# Not settings of a layer: torch's own, and what transformers and a program put on an instance.
_PLAIN = {*nn.Module().__dict__, "_compiled_call_impl", "_is_hf_initialized"}
_PLAIN |= {"_gradient_checkpointing_func", "gradient_checkpointing"}


@dataclass
class Parts:
    """What a layer consists of. norms: hidden-wide ones by name, in the order of definition; table: see TABLE.

    ranks: see :class:`layer_spec.LayerSpec`; heads and kv_heads are this rank's.
    """

    layer: nn.Module
    attention: nn.Module
    linears: dict[str, PackedLinear]
    norms: dict[str, Norm]
    q_norm: Norm | None
    k_norm: Norm | None
    norm_kind: str
    eps: float
    act: str
    heads: int
    kv_heads: int
    head_dim: int
    table: Tensor | None = None
    sinks: Tensor | None = None
    cache_name: str = CACHES[0]
    ranks: Any = None


@dataclass(frozen=True)
class Choice:
    """One reading of the parts: what structure alone leaves open. Sources are named, so that it fits any sizes."""

    norms: tuple[tuple[str, str], ...]  # role -> name of a norm
    parallel: bool
    layout: str  # "", "concat" or "grouped"
    scale: str  # attribute of the attention, "1/attribute", or "" for head_dim ** -0.5
    residual: str  # attribute of the layer, or ""
    softcap: bool
    window: bool
    rope_style: str
    rotary_dim: int
    biased: bool = False  # the argument ALIBI is added to the scores


def own_state(module: nn.Module) -> dict[str, Any]:
    """Attributes of the instance that are not torch's."""
    return {name: value for name, value in module.__dict__.items() if name not in _PLAIN}


def forward_replaced(module: nn.Module) -> bool:
    """Whether the instance computes by another function than its class's. transformers 5.0 leaves the class's own on
    the instance once it has recorded outputs.
    """
    forward = module.__dict__.get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def check_forward(layer: nn.Module) -> str:
    """The name of the cache among the arguments of the layer's forward; NoMatchError for an unknown argument."""
    parameters = inspect.signature(type(layer).forward).parameters.values()
    names = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD][1:]
    if "position_bias" in names:
        raise NoMatchError("its attention adds linear biases (alibi) of a form that no program knows")
    unknown = [name for name in names if name not in ARGUMENTS]
    if unknown:
        raise NoMatchError(f"its forward takes {unknown[0]!r}, which no program knows")
    found = [name for name in names if name in CACHES]
    if len(found) != 1:
        raise NoMatchError("its forward takes no key-value cache")
    return found[0]


def plain_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, module) as named_modules() has them; an adapter that is switched off is its base layer."""
    while _is_off(module):
        module = module.base_layer  # type: ignore[assignment]
    yield path, module
    for name, child in module.named_children():
        yield from plain_modules(child, f"{path}.{name}" if path else name)


def _is_off(module: nn.Module) -> bool:
    """Whether this is an adapter as PEFT makes them, disabled and not merged."""
    state = module.__dict__
    return has_adapter(module) and state.get("_disable_adapters") is True and not state.get("merged_adapters")


def read_parts(layer: nn.Module, config: Any) -> Parts:
    """Find every part of ``layer``; NoMatchError names the first that has no known role."""
    cache_name = check_forward(layer)
    linears: dict[str, tuple[str, PackedLinear]] = {}
    norms: dict[str, tuple[str, float, Norm]] = {}
    acts: list[Any] = []
    table = sinks = None
    inside = ""  # a norm whose parts are its own business
    for path, module in plain_modules(layer):
        if has_adapter(module):
            raise NoMatchError(f"{path} has an adapter")
        if forward_replaced(module) and module is not layer:
            raise NoMatchError(f"the forward of {path} was replaced on the instance")
        if inside and path.startswith(inside):
            continue
        name = path.rpartition(".")[2]
        own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        if isinstance(module, PackedLinear):
            role = ROLE_OF.get(name)
            if role is None or role in linears:
                raise NoMatchError(f"the linear {path} has no known role")
            linears[role] = path, module
        elif isinstance(module, nn.Linear):
            raise NoMatchError(f"the linear {path} is not packed")
        elif "norm" in name or name.startswith("ln_"):
            norms[path] = read_norm(path, module)
            inside = path + "."
        elif own:
            if set(own) == {TABLE}:
                table = own[TABLE]
            elif set(own) == {"sinks"}:
                sinks = own["sinks"].detach().float()
            else:
                raise NoMatchError(f"{path or 'the layer'} holds {next(iter(own))!r}, which no program knows")
        elif ("act" in name or "gelu" in name) and not isinstance(module, nn.Dropout):
            acts.append(module)
        elif path and not isinstance(module, (nn.Dropout, nn.Identity)) and not list(module.children()):
            raise NoMatchError(f"the module {path} has no known role")
    return _assemble(layer, config, linears, norms, acts, table, sinks, cache_name)


def _assemble(
    layer: nn.Module,
    config: Any,
    linears: dict[str, tuple[str, PackedLinear]],
    norms: dict[str, tuple[str, float, Norm]],
    acts: list[Any],
    table: Tensor | None,
    sinks: Tensor | None,
    cache_name: str,
) -> Parts:
    roles = set(linears)
    if roles & {"q", "k", "v", "qkv"} not in ({"q", "k", "v"}, {"qkv"}) or not roles >= {"o", "down"}:
        raise NoMatchError("its linears are not those of one attention and one MLP")
    if roles & {"gate", "up", "gate_up"} not in ({"gate", "up"}, {"up"}, {"gate_up"}):
        raise NoMatchError("its linears are not those of one attention and one MLP")
    if len({linear.compute for _, linear in linears.values()}) > 1:
        raise NoMatchError("its linears compute in different ways")
    inner = linears["q" if "q" in linears else "qkv"][0].rpartition(".")[0]
    attention = layer.get_submodule(inner)
    if getattr(attention, "is_causal", True) is not True:
        raise NoMatchError("its attention is not causal")
    head_norms = {path: norm for path, norm in norms.items() if path.startswith(inner + ".") and inner}
    wide = {path: norm for path, norm in norms.items() if path not in head_norms}
    per_role: list[Norm | None] = []
    for names in (Q_NORMS, K_NORMS):
        found = [path for path in head_norms if path.rpartition(".")[2] in names]
        if found and head_norms[found[0]][0] != "rms":
            raise NoMatchError(f"{found[0]} is a LayerNorm of single heads")
        per_role.append(head_norms.pop(found[0])[2] if found else None)
    if head_norms:
        raise NoMatchError(f"the norm {next(iter(head_norms))} has no known role")
    kept = [*wide.values(), *(norm for path, norm in norms.items() if path not in wide)]
    kinds, sizes = {kind for kind, _, _ in wide.values()}, {eps for _, eps, _ in kept}
    if len(kinds) != 1 or len(sizes) != 1:
        raise NoMatchError("its norms are of different kinds, or it has none")
    ranks = getattr(linears["o"][1], "ranks", None)
    count = 1 if ranks is None else ranks.size
    plain = {role: linear for role, (_, linear) in linears.items()}
    heads, kv_heads, head_dim = _heads(attention, config, plain, count)
    return Parts(
        layer,
        attention,
        plain,
        {path: norm for path, (_, _, norm) in wide.items()},
        per_role[0],
        per_role[1],
        kinds.pop(),
        sizes.pop(),
        _activation(layer, linears["down"][0], acts),
        heads,
        kv_heads,
        head_dim,
        table,
        sinks,
        cache_name,
        ranks,
    )


def read_norm(path: str, module: nn.Module) -> tuple[str, float, Norm]:
    """(kind, eps, gain and bias) of a norm, found by what it computes; NoMatchError if that is something else."""
    state = own_state(module)
    eps = next((state[name] for name in ("eps", "variance_epsilon", "epsilon", "norm_eps") if name in state), None)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    names = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    shape = tuple(weight.shape) if isinstance(weight, Tensor) else tuple(state.get("normalized_shape", ()))
    if not isinstance(eps, float) or len(shape) != 1 or not names <= {"weight", "bias"}:
        raise NoMatchError(f"{path} is a norm of an unknown form")
    plain = torch.ones(shape, dtype=torch.float32) if weight is None else weight.detach().float()
    shift = None if bias is None else bias.detach().float()
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32) + 0.5
    x[2:] *= eps**0.5  # where eps shows
    try:
        with torch.no_grad():
            want = copy.deepcopy(module).float()(x)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise NoMatchError(f"{path} is a norm of an unknown form") from error
    for kind, offset in itertools.product(NORMS, (0.0, 1.0)):
        norm = Norm(plain + offset, shift)
        if torch.allclose(apply_norm(kind, eps, norm, x), want, rtol=1e-4, atol=1e-5):
            return kind, eps, norm
    raise NoMatchError(f"{path} computes another norm than RMS and LayerNorm")


def _heads(attention: nn.Module, config: Any, linears: dict[str, PackedLinear], ranks: int) -> tuple[int, int, int]:
    """(heads, kv_heads, head_dim) of one of ``ranks`` equal shares, from the shapes of the linears and what attention
    and config say.
    """
    heads = int(getattr(config, "num_attention_heads", 0) or 0) // ranks
    sizes = (*(getattr(attention, name, None) for name in _HEAD_DIMS), getattr(config, "head_dim", None))
    head_dim = next((size for size in sizes if isinstance(size, int)), 0)
    width = linears["o"].in_features
    if not heads or not head_dim or heads * head_dim != width:
        raise NoMatchError("the sizes of its heads are not known")
    total = linears["k"].out_features if "k" in linears else (linears["qkv"].out_features - width) // 2
    if ("q" in linears and linears["q"].out_features != width) or total % head_dim or heads % (total // head_dim):
        raise NoMatchError("the sizes of its heads are not known")
    return heads, total // head_dim, head_dim


def _activation(layer: nn.Module, down: str, acts: list[Any]) -> str:
    """The name of the activation, found by what it computes."""
    mlp = layer.get_submodule(down.rpartition(".")[0])
    found = acts or [f for name, f in own_state(mlp).items() if "act" in name and callable(f)]
    if len(found) != 1:
        raise NoMatchError("its activation is not known")
    x = torch.linspace(-8, 8, 4001, dtype=torch.float32)
    try:
        with torch.no_grad():
            got = found[0](x.clone())
    except (TypeError, ValueError, RuntimeError) as error:
        raise NoMatchError("its activation is not known") from error
    for name in ACTIVATIONS:
        if isinstance(got, Tensor) and got.shape == x.shape and torch.allclose(activate(name, x), got, atol=1e-5):
            return name
    raise NoMatchError(f"its activation is none of {', '.join(ACTIVATIONS)}")


# ---- readings -------------------------------------------------------------------------------------------------------

_NORM_ROLES = (  # part of a norm's name -> what it may be; the first that fits
    ("post_feedforward", ("post_mlp",)),
    ("post_mlp", ("post_mlp",)),
    ("pre_", ("mlp",)),
    ("post_self_attn", ("post_attention",)),
    ("post_attention", ("mlp", "post_attention")),
    ("input", ("input",)),
    ("ln_1", ("input",)),
    ("ln_2", ("mlp",)),
    ("ln_attn", ("input",)),
    ("ln_mlp", ("mlp",)),
    ("self_attn_layer_norm", ("input", "post_attention")),
    ("final_layer_norm", ("mlp", "post_mlp")),
    ("attention_norm", ("input",)),
    ("ffn_norm", ("mlp",)),
)


def norm_readings(names: Sequence[str]) -> list[tuple[tuple[str, str], ...]]:
    """Every way to give the norms of these names their roles, as (role, name) each, the likeliest first."""
    roles = [next((roles for word, roles in _NORM_ROLES if word in name), ()) for name in names]
    if () in roles:
        raise NoMatchError(f"the norm {names[roles.index(())]} has no known role")
    return [
        tuple(zip(picked, names, strict=True))
        for picked in itertools.product(*roles)
        if len(set(picked)) == len(picked)
    ]


def choices(parts: Parts, config: Any, rotary_dim: int) -> list[Choice]:
    """Every reading of the parts that their names allow, the likeliest first."""
    norms = norm_readings(list(parts.norms))
    attention, layer = (own_state(module) for module in (parts.attention, parts.layer))
    scales = [name for name in _SCALES if isinstance(attention.get(name), (int, float))]
    scales += ["1/" + name for name in _INVERSE_SCALES if isinstance(attention.get(name), (int, float))]
    residual = [name for name in RESIDUAL_SCALES if isinstance(layer.get(name), (int, float))]
    first = bool(layer.get("use_parallel_residual", "mlp" not in dict(norms[0]) if norms else False))
    return [
        Choice(*values)
        for values in itertools.product(
            norms,
            (first, not first),
            ["grouped", "concat"] if "qkv" in parts.linears else [""],
            [*scales, ""],
            [*residual, ""],
            [True, False] if softcap_of(parts, config) else [False],
            [True, False] if window_of(parts, config) else [False],
            ("half", "interleaved") if rotary_dim else ("half",),
            (rotary_dim, 0) if rotary_dim else (0,),
        )
        if not (values[1] and (values[4] or {"post_mlp"} & set(dict(values[0]))))
        and not (values[7] == "interleaved" and not values[8])
    ]


def softcap_of(parts: Parts, config: Any) -> float:
    """The bound of the attention scores, 0 for none."""
    value = getattr(parts.attention, "attn_logit_softcapping", getattr(config, "attn_logit_softcapping", None))
    return float(value or 0.0)


def window_of(parts: Parts, config: Any) -> int:
    """Keys that a query sees, itself included; 0 for all."""
    return int(getattr(parts.attention, "sliding_window", getattr(config, "sliding_window", None)) or 0)


def build(parts: Parts, config: Any, choice: Choice) -> LayerSpec:
    """The spec of ``parts`` read by ``choice``; NoMatchError where sizes do not fit."""
    state = own_state(parts.attention)
    name = choice.scale
    scale = 1.0 / float(state[name[2:]]) if name.startswith("1/") else float(state.get(name, parts.head_dim**-0.5))
    linears, norms = parts.linears, {role: parts.norms[name] for role, name in choice.norms}
    sizes = (parts.heads, parts.kv_heads, parts.head_dim)
    layout = {"": None, "concat": QkvLayout.concat(*sizes), "grouped": QkvLayout.grouped(*sizes)}[choice.layout]
    try:
        return LayerSpec(
            linears["o"].out_features,
            *sizes,
            linears["down"].in_features,
            parts.norm_kind,
            parts.eps,
            tuple(linears[role] for role in ("q", "k", "v", "qkv") if role in linears),
            linears["o"],
            tuple(linears[role] for role in ("gate", "up", "gate_up") if role in linears),
            linears["down"],
            scale,
            parts.act,
            "up" not in linears or "gate" in linears,
            qkv_layout=layout,
            input_norm=norms.get("input"),
            post_attention_norm=norms.get("post_attention"),
            mlp_norm=norms.get("mlp"),
            post_mlp_norm=norms.get("post_mlp"),
            q_norm=parts.q_norm,
            k_norm=parts.k_norm,
            rotary_dim=choice.rotary_dim,
            rope_style=choice.rope_style,
            softcap=softcap_of(parts, config) if choice.softcap else 0.0,
            window=window_of(parts, config) if choice.window else 0,
            sinks=parts.sinks,
            parallel=choice.parallel,
            residual_scale=float(cast("float", own_state(parts.layer).get(choice.residual, 1.0))),
            ranks=parts.ranks,
        )
    except ValueError as error:
        raise NoMatchError(f"its sizes do not fit each other: {error}") from error


def biased_mask(mask: Tensor, alibi: Tensor, heads: int) -> Tensor:
    """What is added to scores, [b, heads, s, keys], by a mask [1 or b, 1, s, keys] and alibi [b * heads, 1, keys]."""
    if mask.dtype == torch.bool:  # no infinity: padding sees nothing, and its softmax must stay finite
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    return mask.float() + alibi.float().view(-1, heads, 1, alibi.shape[-1])


def rotary_from_table(table: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [b, s, rotary_dim], each value twice, of position_ids [b, s] from a table of TABLE's form."""
    sin, cos = table[position_ids].chunk(2, -1)
    return cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)


class RotaryTable:
    """cos and sin by position, from a layer's own table; one for all layers with equal tables."""

    def __init__(self, table: Tensor) -> None:
        self._table = table
        self._last: tuple[Tensor | None, int, tuple[Tensor, Tensor] | None] = (None, 0, None)

    @staticmethod
    def of(table: Tensor, known: list[RotaryTable]) -> RotaryTable:
        """The one of ``known`` that has this table, or a new one that joins them."""
        for rotary in known:
            if torch.equal(rotary._table, table):
                return rotary
        known.append(RotaryTable(table))
        return known[-1]

    def __call__(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [b, s, rotary_dim] of position_ids [b, s]; layers of one pass ask with the same tensor."""
        last, seen, pair = self._last  # read at once: another thread may be replacing it
        version = 0 if position_ids.is_inference() else position_ids._version
        if pair is None or position_ids is not last or version != seen:
            pair = rotary_from_table(self._table, position_ids)
            self._last = position_ids, version, pair
        return pair
