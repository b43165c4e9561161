"""Which decoder layers of a model a program can compute, and by which spec."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import layer_probe
from .layer_execute import Run, prepare
from .layer_parts import CACHES, Choice, NoMatchError, Parts, build, own_state, plain_modules, read_parts
from .layer_spec import LayerSpec
from .linear import PackedLinear


@dataclass(frozen=True, eq=False)
class Match:
    """What became of one layer. spec None: no program can compute it, and ``reason`` says why in one line.

    outputs: 0 where the layer returns a tensor, otherwise the length of its tuple, all but the first None.
    cache_name: the argument that takes the cache; layer_idx: the layer's place in it. table: sines and cosines by
    position where the layer keeps its own (see :func:`layer_parts.rotary_from_table`). config: the model's. run: what
    runs the spec. biased: linear biases (alibi) of the call are added to its mask.
    """

    name: str
    spec: LayerSpec | None
    reason: str = ""
    outputs: int = 0
    cache_name: str = CACHES[0]
    layer_idx: int = 0
    table: Tensor | None = None
    config: Any = None
    run: Run | None = None
    biased: bool = False


@dataclass(frozen=True)
class Decoder:
    """A model's stack of decoder layers. owner: the module that has the config; path: of the list inside owner."""

    owner: nn.Module
    path: str
    name: str  # of the list inside the whole model
    layers: nn.ModuleList


def decoders(model: nn.Module) -> Iterator[Decoder]:
    """Lists of layers that take a key-value cache."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        try:
            check_cache(module[0])
        except NoMatchError:
            continue
        above = name
        while above:
            above = above.rpartition(".")[0]
            owner = modules[above]
            if getattr(getattr(owner, "config", None), "num_hidden_layers", None) == len(module):
                yield Decoder(owner, name[len(above) :].lstrip("."), name, module)
                break


def check_cache(layer: nn.Module) -> None:
    """NoMatchError if ``layer``'s forward takes no cache."""
    if not set(inspect.signature(type(layer).forward).parameters) & set(CACHES):
        raise NoMatchError("its forward takes no key-value cache")


def match_layers(model: nn.Module) -> list[Match]:
    """One match per decoder layer of ``model``, in order; see :class:`Match`."""
    return [match_layer(decoder, i) for decoder in decoders(model) for i in range(len(decoder.layers))]


def match_layer(decoder: Decoder, index: int) -> Match:
    """Match the layer at ``index`` of a decoder. Costs a probe where no layer of this structure was seen before."""
    layer, config = decoder.layers[index], decoder.owner.config
    name = f"{decoder.name}.{index}"
    try:
        if hasattr(layer, "why_no_program"):
            raise NoMatchError(layer.why_no_program)
        parts = read_parts(layer, config)
        check_config(config)
        choice, outputs = _probed(decoder, index, parts)
        spec = build(parts, config, choice)
        run = prepare(spec)
    except (NoMatchError, ValueError) as error:
        return Match(name, None, str(error), config=config)
    layer_idx = getattr(parts.attention, "layer_idx", index)
    return Match(name, spec, "", outputs, parts.cache_name, layer_idx, parts.table, config, run, choice.biased)


# ---- the config -----------------------------------------------------------------------------------------------------

# Numbers and lists of a config whose meaning is known: sizes, names of tokens, rates of dropout, and what the probe
# shows. An unknown one may be a threshold that a probe of few tokens never reaches.
# fmt: off
KNOWN_NUMBERS = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "original_max_position_embeddings",
    "initializer_range", "init_std", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon",
    "norm_eps", "pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id",
    "pretraining_tp", "rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "rotary_pct",
    "rotary_emb_base", "rotary_dim", "ignore_keys_at_rope_validation", "attention_dropout", "hidden_dropout",
    "classifier_dropout", "residual_dropout", "embedding_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop",
    "dropout", "layerdrop", "summary_first_dropout", "max_window_layers", "sliding_window",
    "_sliding_window_pattern", "sliding_window_pattern", "layer_types", "query_pre_attn_scalar",
    "final_logit_softcapping", "attn_logit_softcapping", "embedding_multiplier", "logits_scaling",
    "residual_multiplier", "attention_multiplier", "logit_scale", "n_positions", "n_embd", "n_layer", "n_head",
    "n_inner", "n_ctx", "num_ln_in_parallel_attn", "num_kv_heads", "ffn_hidden_size", "ffn_dim",
    "word_embed_proj_dim", "no_rope_layers", "no_rope_layer_interval", "id2label", "label2id", "num_labels",
    "architectures", "task_specific_params", "auto_map", "quantization_config", "chunk_size_feed_forward",
    "keys_to_ignore_at_inference", "base_model_tp_plan", "base_model_pp_plan", "cpullm_cqil",
    # Of a mixture of experts, whose dense layers match: which layers are dense their modules show, and the rest is of
    # the others.
    "decoder_sparse_step", "mlp_only_layers", "num_experts", "num_experts_per_tok", "moe_intermediate_size",
    "num_local_experts", "shared_expert_intermediate_size", "router_aux_loss_coef",
}
# fmt: on


# What no layer reads: a change of it leaves a match as it is.
IRRELEVANT = {
    *("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id"),
    *("use_cache", "output_hidden_states", "_output_attentions", "return_dict", "_name_or_path", "dtype"),
    *("architectures", "transformers_version", "initializer_range", "init_std", "id2label", "label2id", "num_labels"),
    *("problem_type", "tie_word_embeddings", "quantization_config", "final_logit_softcapping", "task_specific_params"),
    "cpullm_cqil",
}


def check_config(config: Any) -> None:
    """NoMatchError for a number or a list whose meaning is unknown."""
    for name, value in vars(config).items():
        if value is None or isinstance(value, (bool, str)) or name in KNOWN_NUMBERS:
            continue
        if isinstance(value, (int, float, list, tuple, dict, set)) and value not in (0, [], (), {}):
            raise NoMatchError(f"the config's {name!r} is not known")
    if getattr(config, "_attn_implementation", None) not in ("eager", "sdpa", "cpullm"):
        raise NoMatchError(f"its attention is computed by {config._attn_implementation!r}")


# ---- one probe per structure ----------------------------------------------------------------------------------------

_probes: dict[tuple, tuple[Choice, int] | str] = {}
"""Structure -> what the probe found, or why it failed. Holds classes and numbers, no model."""


def _probed(decoder: Decoder, index: int, parts: Parts) -> tuple[Choice, int]:
    if parts.ranks is not None:  # a share computes as the whole does
        count = parts.ranks.size
        parts = replace(parts, heads=count * parts.heads, kv_heads=count * parts.kv_heads)
    key = _structure(decoder, index, parts)
    if key not in _probes:
        try:
            _probes[key] = _probe(decoder, index, parts)
        except NoMatchError as error:
            _probes[key] = str(error)
    found = _probes[key]
    if isinstance(found, str):
        raise NoMatchError(found)
    return found


def _structure(decoder: Decoder, index: int, parts: Parts) -> tuple:
    """All that decides what a layer computes, sizes aside."""
    small = layer_probe.shrink(decoder.owner.config, layer_probe.Sizes.of(parts))
    settings = sorted((name, repr(value)) for name, value in vars(small).items() if name not in IRRELEVANT)
    tree: list[tuple] = []
    for path, module in plain_modules(parts.layer):
        if isinstance(module, PackedLinear):
            tree.append((path, PackedLinear, module.bias is None, ()))
            continue
        state = own_state(module).items()
        plain = [
            (name, value if isinstance(value, (bool, int, float, str, type(None))) else type(value))
            for name, value in state
            if name not in layer_probe.SIZES and name != "forward"
        ]
        tree.append((path, type(module), type(module).forward, tuple(plain)))
    kind = layer_probe.representatives(decoder.owner.config)[1][index]
    return type(decoder.owner), decoder.path, kind, parts.heads, parts.kv_heads, tuple(settings), tuple(tree)


def _probe(decoder: Decoder, index: int, parts: Parts) -> tuple[Choice, int]:
    """Try the layer's structure out on a replica."""
    sizes = layer_probe.Sizes.of(parts)
    config = layer_probe.shrink(decoder.owner.config, sizes)
    replica = layer_probe.build_replica(decoder.owner, decoder.path, config)
    kind = layer_probe.representatives(decoder.owner.config)[1][index]
    layer = replica.layers[kind]
    layer_probe.adopt_scalars(parts.layer, layer)
    with torch.no_grad():
        layer_probe.fill(replica, _scale(parts), sizes.head_dim)
    recording = layer_probe.record(replica)
    result = layer_probe.try_out(replica.packed[kind], replica.owner.config, recording.layers[kind])
    small = sizes.shrunk()
    if recording.cached[kind] != (small.kv_heads, small.head_dim):
        raise NoMatchError("it keeps its keys in another form than one per key head in the cache")
    return result


def _scale(parts: Parts) -> float:
    """About what the scores are multiplied by."""
    value = own_state(parts.attention).get("scaling")
    return float(value) if isinstance(value, (int, float)) and value else parts.head_dim**-0.5
