"""The HuggingFace side of a GGUF file: config, empty model, tensor names and tokenizer.

transformers already knows how each architecture's metadata and tensor names translate. Its loader is asked for
exactly that, and for nothing slow: the config comes from `load_gguf_checkpoint` on a header-only copy without the
vocabulary (0.01 s instead of 2.2 s for SmolLM2), the names from `get_gguf_hf_weights_map` on a two-level view of the
model (0.01 s instead of 5 s), the tokenizer from `convert_gguf_tokenizer` on strings that are already read.
On top come the facts of the file that transformers 5.23 leaves out: RoPE scaling, a partial rotary width, an explicit
head dimension, further end-of-turn tokens, and pre-tokenizers that split digits.
"""

from __future__ import annotations

import json
import math
import os
import struct
import tempfile
import warnings
from types import SimpleNamespace
from typing import Any

import torch

from .gguf_reader import GgufFile

__all__ = ["empty_model", "hf_config", "hf_tokenizer", "tensor_names", "tensor_processor", "transformers_gguf"]

_TESTED = "transformers 5.23 with gguf 0.19"
_MAX_CONTEXT = 1 << 27  # positions; some models hold buffers that grow with it

# Rules by `tokenizer.ggml.pre`, for byte-level BPE. Those in transformers' own table come first.
_PRE_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
_PRE_PLAIN = {
    "gpt-2",
    "phi-2",
    "mpt",
    "olmo",
    "jais",
    "trillion",
    "granite-docling",
    "roberta-bpe",
    "jina-en",
    "jina-es",
}


def transformers_gguf() -> SimpleNamespace:
    """The functions of transformers and gguf used here. They are not public: ImportError says what was tested."""
    try:
        import gguf  # noqa: F401
        from transformers import __version__ as version
    except ImportError as error:
        raise ImportError(
            f"reading GGUF files needs the packages transformers and gguf ({error.name} is missing): "
            "pip install transformers gguf"
        ) from error
    try:
        from transformers.integrations.gguf import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
        from transformers.modeling_gguf_pytorch_utils import (
            GGUF_SUPPORTED_ARCHITECTURES,
            TENSOR_PROCESSORS,
            TensorProcessor,
            get_gguf_hf_weights_map,
            load_gguf_checkpoint,
        )
    except ImportError as error:
        raise ImportError(
            f"load_gguf needs transformers 5.18 or later: it reads GGUF metadata through functions that version "
            f"{version} does not have ({error}); tested with {_TESTED}"
        ) from error
    return SimpleNamespace(
        tokenizer_keys=GGUF_TOKENIZER_MAPPING,
        convert_tokenizer=convert_gguf_tokenizer,
        pre_splits=GGUF_PRE_TOKENIZER_SPLITS,
        architectures=GGUF_SUPPORTED_ARCHITECTURES,
        processors=TENSOR_PROCESSORS,
        default_processor=TensorProcessor,
        weights_map=get_gguf_hf_weights_map,
        load_checkpoint=load_gguf_checkpoint,
    )


def _reject(file: GgufFile, message: str, cause: BaseException | None = None) -> ValueError:
    error = ValueError(f"{file.path}: {message}")
    error.__cause__ = cause
    return error


def architecture(file: GgufFile) -> str:
    """`general.architecture` of a file that holds one whole language model. Raises ValueError otherwise."""
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or not name:
        raise _reject(file, f"general.architecture is {name!r}, expected a name such as 'llama'")
    kind = file.metadata.get("general.type", "model")
    if kind != "model":
        raise _reject(file, f"general.type is {kind!r}; only a model can be loaded")
    parts = file.metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise _reject(
            file, f"this is one of {parts} parts of a split model; join them first (llama-gguf-split --merge)"
        )
    return name


def _number(file: GgufFile, key: str, low: float, high: float, default: Any = None, integer: bool = True) -> Any:
    """A numeric metadata value within [low, high], or the default where the key is absent."""
    value = file.metadata.get(key, default)
    if value is default:
        return default
    kinds = (int,) if integer else (int, float)
    if type(value) not in kinds or not low <= value <= high:
        raise _reject(
            file, f"{key} is {value!r}, expected {'an integer' if integer else 'a number'} from {low} to {high}"
        )
    return value


# ---------------------------------------------------------------------------------------------------- config


def _pack_value(value: Any) -> bytes:
    """A metadata value in file form: type number, then the value (numbers widened to 64 bits)."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<Iq", 11, value) if value < 1 << 63 else struct.pack("<IQ", 10, value)
    if isinstance(value, float):
        return struct.pack("<Id", 12, value)
    if isinstance(value, str):
        text = value.encode("utf-8")
        return struct.pack("<IQ", 8, len(text)) + text
    items = [_pack_value(item) for item in value]
    element_type = items[0][:4] if items else struct.pack("<I", 4)
    return struct.pack("<I", 9) + element_type + struct.pack("<Q", len(items)) + b"".join(item[4:] for item in items)


def _header_copy(file: GgufFile) -> bytes:
    """A GGUF file with the same metadata and tensor names but no vocabulary and no data."""

    def text(value: str) -> bytes:
        encoded = value.encode("utf-8")
        return struct.pack("<Q", len(encoded)) + encoded

    keys = {
        key: value
        for key, value in file.metadata.items()
        if key != "general.alignment" and not (isinstance(value, list) and key.startswith("tokenizer."))
    }
    keys["tokenizer.ggml.tokens"] = ["", ""]  # transformers warns where it cannot count the vocabulary
    head = b"GGUF" + struct.pack("<IQQ", 3, len(file.tensors), len(keys))
    head += b"".join(text(key) + _pack_value(value) for key, value in keys.items())
    head += b"".join(text(name) + struct.pack("<IQIQ", 1, 1, 0, 0) for name in file.tensors)  # one F32 each
    return head + bytes(64)


def _config_dict(file: GgufFile, api: SimpleNamespace) -> dict[str, Any]:
    handle, path = tempfile.mkstemp(suffix=".gguf")
    try:
        with os.fdopen(handle, "wb") as copy:
            copy.write(_header_copy(file))
        return dict(api.load_checkpoint(path, return_tensors=False)["config"])
    except (ImportError, MemoryError, OSError):
        raise
    except Exception as error:
        raise _reject(file, f"transformers cannot read a config from its metadata: {error}", error) from error
    finally:
        os.unlink(path)


def _check_sizes(file: GgufFile, arch: str) -> None:
    """Bounds for the counts that cost time or memory before any tensor shape can contradict them."""
    layers = len({name.split(".")[1] for name in file.tensors if name.startswith("blk.")})
    if layers == 0 or "token_embd.weight" not in file.tensors:
        raise _reject(file, "it holds no language model: token_embd.weight or the blk.* tensors are missing")
    if len(file.tensors["token_embd.weight"].shape) != 2:
        raise _reject(
            file, f"token_embd.weight has the shape {list(file.tensors['token_embd.weight'].shape)}, expected 2-D"
        )
    if _number(file, f"{arch}.block_count", 1, layers) is None:
        raise _reject(file, f"{arch}.block_count is missing")
    vocabulary, width = file.tensors["token_embd.weight"].shape
    if _number(file, f"{arch}.embedding_length", width, width) is None:
        raise _reject(file, f"{arch}.embedding_length is missing")
    _number(file, f"{arch}.vocab_size", vocabulary, vocabulary)
    _number(file, f"{arch}.context_length", 1, _MAX_CONTEXT)
    experts = _number(file, f"{arch}.expert_count", 0, 1 << 16, default=0)
    _number(file, f"{arch}.expert_used_count", 0, experts)
    _number(file, f"{arch}.rope.freq_base", 1e-6, 1e12, integer=False)
    for key in ("attention.key_length", "rope.dimension_count", "attention.sliding_window"):
        _number(file, f"{arch}.{key}", 0, _MAX_CONTEXT)
    for key in ("bos", "eos", "eot", "eom", "padding", "unknown"):
        _number(file, f"tokenizer.ggml.{key}_token_id", 0, vocabulary - 1)


def hf_config(file: GgufFile) -> Any:
    """The transformers config of the file's model (a PreTrainedConfig of its architecture's class).

    Raises ValueError where the architecture is not supported or the metadata is missing or contradicts itself.
    """
    api = transformers_gguf()
    from transformers import AutoConfig

    arch = architecture(file)
    _check_sizes(file, arch)
    config = _config_dict(file, api)
    config["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    _complete(file, arch, config)
    try:
        return AutoConfig.for_model(**config)
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        raise _reject(file, f"its metadata makes no valid {config.get('model_type')} config: {error}", error) from error


def _complete(file: GgufFile, arch: str, config: dict[str, Any]) -> None:
    """Adds what the file states and transformers' table drops. Changes `config` in place."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    metadata = file.metadata
    epsilon = _number(file, f"{arch}.attention.layer_norm_epsilon", 0, 1, integer=False)
    if epsilon is not None and config.get("model_type") in CONFIG_MAPPING:
        words = ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps")
        config.update({word: epsilon for word in words if hasattr(CONFIG_MAPPING[config["model_type"]], word)})
    if "rope_theta" not in config and f"{arch}.rope.freq_base" in metadata and "global_head_dim" not in config:
        config["rope_theta"] = metadata[f"{arch}.rope.freq_base"]
    key_length = metadata.get(f"{arch}.attention.key_length")
    if "head_dim" not in config and key_length and "global_head_dim" not in config:
        config["head_dim"] = key_length
    heads = metadata.get(f"{arch}.attention.head_count")
    head_dim = config.get("head_dim") or (
        isinstance(heads, int) and heads > 0 and metadata[f"{arch}.embedding_length"] // heads
    )
    rotary_dim = metadata.get(f"{arch}.rope.dimension_count")
    if rotary_dim and head_dim and rotary_dim < head_dim and "rotary_dim" not in config:
        config["partial_rotary_factor"] = rotary_dim / head_dim
    for key, word in (
        ("expert_feed_forward_length", "moe_intermediate_size"),
        ("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
        ("attention.sliding_window", "sliding_window"),
    ):
        if word not in config and f"{arch}.{key}" in metadata:
            config[word] = metadata[f"{arch}.{key}"]
    if "position_embd.weight" in file.tensors and "n_ctx" in config:  # GPT-2: the context is a table of its own
        config["n_positions"] = file.tensors["position_embd.weight"].shape[0]
    if "rope_scaling" not in config and (scaling := _rope_scaling(file, arch, config, rotary_dim or head_dim)):
        config["rope_scaling"] = scaling


def _rope_scaling(file: GgufFile, arch: str, config: dict[str, Any], rotary_dim: int | bool) -> dict[str, Any] | None:
    """RoPE scaling in transformers' words, or None. Raises ValueError for a rule it has no words for."""
    key = f"{arch}.rope.scaling."
    original = _number(file, key + "original_context_length", 1, _MAX_CONTEXT)
    factor = _number(file, key + "factor", 1e-6, 1e6, integer=False)
    if "rope_factors_long.weight" in file.tensors or "rope_factors_short.weight" in file.tensors:
        if not {"rope_factors_long.weight", "rope_factors_short.weight"} <= file.tensors.keys():
            raise _reject(file, "only one of rope_factors_long.weight and rope_factors_short.weight is present")
        if original is not None:
            config["original_max_position_embeddings"] = original
        return {
            "rope_type": "longrope",
            "long_factor": _rope_factors(file, "rope_factors_long.weight", rotary_dim),
            "short_factor": _rope_factors(file, "rope_factors_short.weight", rotary_dim),
        }
    if "rope_freqs.weight" in file.tensors:
        return _llama3_scaling(file, config, _rope_factors(file, "rope_freqs.weight", rotary_dim))
    kind = file.metadata.get(key + "type", "none")
    if kind == "none" or factor is None or (kind == "linear" and factor == 1):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(factor)}
    if kind == "yarn":
        scaling: dict[str, Any] = {"rope_type": "yarn", "factor": float(factor)}
        if original is not None:
            scaling["original_max_position_embeddings"] = original
        for name, word in (
            ("attn_factor", "attention_factor"),
            ("yarn_beta_fast", "beta_fast"),
            ("yarn_beta_slow", "beta_slow"),
        ):
            if (value := _number(file, key + name, 0, 1e6, integer=False)) is not None:
                scaling[word] = float(value)
        return scaling
    raise _reject(file, f"{key}type is {kind!r}, expected none, linear or yarn")


def _rope_factors(file: GgufFile, name: str, rotary_dim: int | bool) -> list[float]:
    """A vector of positive RoPE divisors, one per rotated pair."""
    values = file.dequantized(name)
    if values.shape != (int(rotary_dim) // 2,):
        raise _reject(file, f"tensor {name!r} has the shape {list(values.shape)}, expected [{int(rotary_dim) // 2}]")
    if not (values > 0).all() or not math.isfinite(float(values.sum())):
        raise _reject(file, f"tensor {name!r} holds values that are not finite and positive")
    return [float(value) for value in values]


def _llama3_scaling(file: GgufFile, config: dict[str, Any], factors: list[float]) -> dict[str, Any] | None:
    """Finds the Llama 3.1 rule behind stored divisors: the divisor is 1 above one wavelength, `factor` below another.

    The file keeps only the result, so the published parameters (1, 4, 8192) are put in and the outcome is compared.
    """
    if all(value == 1.0 for value in factors):
        return None
    factor, low, high, original = max(factors), 1.0, 4.0, 8192
    base = float(config.get("rope_theta", 10000.0))
    for index, stored in enumerate(factors):
        wavelength = 2 * math.pi * base ** (index / len(factors))
        smooth = min(max((original / wavelength - low) / (high - low), 0.0), 1.0)
        expected = 1 / ((1 - smooth) / factor + smooth)
        if abs(stored - expected) > 1e-4 * expected:
            raise _reject(file, "rope_freqs.weight follows a RoPE rule other than Llama 3.1's, which is not supported")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


# ---------------------------------------------------------------------------------------------------- model


def empty_model(file: GgufFile, config: Any, dtype: torch.dtype) -> torch.nn.Module:
    """The causal language model class of `config` with every parameter and buffer on the meta device."""
    from transformers.initialization import no_init_weights
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _reject(file, f"architecture {architecture(file)!r} is no causal language model")
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    try:
        with torch.device("meta"), no_init_weights():
            model = model_class._from_config(config, dtype=dtype)
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        raise _reject(file, f"its metadata makes no valid {model_class.__name__}: {error}", error) from error
    ends = [file.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    if ends:
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    return model.eval()


class _Names:
    """As much of a model as `get_gguf_hf_weights_map` looks at: its names on the top level and in the base model."""

    def __init__(self, model: torch.nn.Module, nested: bool) -> None:
        self.config, self._model, self._nested = model.config, model, nested

    def state_dict(self) -> dict[str, Any]:
        return self._model.state_dict()

    def named_children(self) -> list[tuple[str, _Names]]:
        prefix = getattr(self._model, "base_model_prefix", "")
        base = getattr(self._model, prefix, None) if self._nested and prefix else None
        return [] if base is None else [(prefix, _Names(base, False))]


def tensor_processor(file: GgufFile, config: Any) -> Any:
    """transformers' converter from this architecture's stored tensors to its own (row order, norm offsets, ...)."""
    api = transformers_gguf()
    return api.processors.get(architecture(file), api.default_processor)(config=config.to_dict())


def tensor_names(file: GgufFile, model: torch.nn.Module, processor: Any) -> dict[str, str]:
    """{GGUF tensor name: state dict name} for every tensor this model can have."""
    try:
        return transformers_gguf().weights_map(_Names(model, True), processor)
    except NotImplementedError as error:
        raise _reject(
            file, f"no tensor names are known for architecture {architecture(file)!r}: {error}", error
        ) from error


# ---------------------------------------------------------------------------------------------------- tokenizer


def hf_tokenizer(file: GgufFile) -> Any:
    """The file's tokenizer as a PreTrainedTokenizerFast, chat template included.

    Equal to `AutoTokenizer.from_pretrained(..., gguf_file=...)` except that digits are split where
    `tokenizer.ggml.pre` says so (SmolLM, StarCoder, Command-R, ...), which transformers 5.23 omits.
    Raises ValueError where the file has no tokenizer, or one that cannot be built.
    """
    api = transformers_gguf()
    from transformers import PreTrainedTokenizerFast

    groups = [
        {name: file.metadata[f"tokenizer.{key}"] for key, name in names.items() if f"tokenizer.{key}" in file.metadata}
        for names in (api.tokenizer_keys["tokenizer"], api.tokenizer_keys["tokenizer_config"])
    ]
    tokenizer, settings = groups
    tokens = tokenizer.get("tokens")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise _reject(file, "it holds no tokenizer (tokenizer.ggml.tokens is missing or not a list of strings)")
    model = tokenizer.get("tokenizer_type")
    if model == "llama":
        settings.setdefault("add_bos_token", True)  # llama.cpp's rule for files without the flag
    elif model == "gemma4":
        settings["add_bos_token"] = False  # its chat template writes <bos> itself
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None and not (type(index) is int and 0 <= index < len(tokens)):
            raise _reject(file, f"tokenizer.ggml.{key}_token_id is {index!r}, the vocabulary has {len(tokens)} tokens")
        settings[f"{name}_token"] = None if index is None else tokens[index]
    try:
        backend, extra = api.convert_tokenizer(architecture(file), tokenizer)
        backend = _without_foreign_tokens(backend, len(tokens))
        if model == "gpt2":
            _pre_tokenize(backend, tokenizer.get("pre_tokenizer_type"), api)
        return PreTrainedTokenizerFast(tokenizer_object=backend, **settings, **extra)
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        raise _reject(file, f"its tokenizer cannot be built: {error}", error) from error


def _without_foreign_tokens(backend: Any, count: int) -> Any:
    """Drops tokens with ids past the vocabulary: the defaults of the tokenizer class, for which no embedding exists."""
    if backend.get_vocab_size(with_added_tokens=True) <= count:
        return backend
    from tokenizers import Tokenizer

    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < count]
    return Tokenizer.from_str(json.dumps(state))


def _pre_tokenize(backend: Any, rule: Any, api: SimpleNamespace) -> None:
    """Sets the digit-splitting rule on a byte-level tokenizer; warns where the rule's name is unknown."""
    from tokenizers import pre_tokenizers

    if rule in _PRE_DIGITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    elif rule not in _PRE_PLAIN and rule not in api.pre_splits:
        warnings.warn(
            f"the GGUF tokenizer names the pre-tokenizer {rule!r}, for which no rule is known; GPT-2's is used, "
            "so some words may be cut differently",
            stacklevel=2,
        )
