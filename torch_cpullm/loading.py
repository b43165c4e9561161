"""load: any checkpoint that the package can run, packed, by one call."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from .checkpoint import FORMAT_VERSION
from .config import Settings
from .distributed import asks_for_shares, failing_together
from .formats.gguf import load_gguf
from .formats.importing import METHODS
from .plan import check_strict


def load(
    path: str | os.PathLike[str],
    *,
    config: Settings | None = None,
    compute: str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """Load a checkpoint as (model, tokenizer), its linear layers packed, ready for `generate()` and pipelines.

    path: what is found there decides.

    ==========================  =====================================================================================
    a .gguf file                see :func:`load_gguf`
    saved by this package       as it is
    GPTQ, AWQ, AutoRound,       the files' own codes and scales. Linears that the checkpoint has in float stay so, but
    compressed-tensors          head and embedding follow ``head_bits`` of ``config``
    floats                      quantised by ``config`` while it is read
    ==========================  =====================================================================================

    config: CpuLlmConfig or Settings. ``bits``, ``group_size``, ``sym`` and ``modules_to_not_convert`` concern floats;
    a checkpoint of this package has all settings of its own. compute, if given, replaces that of the settings. dtype:
    of activations, norms and biases; default: the checkpoint's (a GGUF file: float32). options: for transformers'
    ``from_pretrained``, such as ``revision`` or ``trust_remote_code``, without which no code of a checkpoint runs.

    tokenizer is None where the directory has none. Memory holds the packed model and one module; files are mapped.
    Only safetensors and GGUF files are read. Raises OSError where a file is missing; ValueError, naming what is wrong,
    for a damaged, incomplete or unsupported checkpoint.
    """
    if Path(path).is_file():
        if options:
            raise TypeError(f"a GGUF file takes no option {min(options)!r}")
        return load_gguf(path, dtype=dtype or torch.float32, compute=compute, config=config)
    model = load_directory(path, config=config, compute=compute, dtype=dtype, **options)
    options.pop("distributed_config", None)  # the model's alone
    return model, _tokenizer(path, {"trust_remote_code": False, **options})


def load_directory(
    path: Any,
    *,
    config: Settings | None = None,
    compute: str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Any:
    """The model of :func:`load` for a directory, or for a name that transformers looks up."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = config if config is not None else Settings()
    if not isinstance(settings, Settings):
        raise TypeError(f"config must be a CpuLlmConfig, got {type(config).__name__}")
    options = {"trust_remote_code": False, **options}
    arguments: dict[str, Any] = {"dtype": dtype or "auto", "use_safetensors": True, "output_loading_info": True}
    try:
        with failing_together(asks_for_shares(options.get("distributed_config"))):
            described = AutoConfig.from_pretrained(path, **options)
            arguments |= _description(described, settings, config is not None, compute)
            loaded: Any = AutoModelForCausalLM.from_pretrained(path, config=described, **arguments, **options)
        model, info = loaded
        _check_complete(info)
        if getattr(settings, "strict", False):
            check_strict(model, [], model._cpullm_skipped)
    except (*_OF_DAMAGE, StrictDataclassError) as error:
        raise ValueError(f"{path}: {error}") from error
    except SafetensorError as error:
        raise ValueError(f"{path}: no whole safetensors file: {error}") from error
    return model


def _description(described: Any, settings: Settings, chosen: bool, compute: str | None) -> dict[str, Any]:
    """Let the config of the checkpoint say what hf.py has to do, or return the argument that says it.

    chosen: whether the settings are the caller's.
    """
    from .hf import CpuLlmConfig

    values = {**settings.plain(), "compute": compute or settings.compute}
    stored = getattr(described, "quantization_config", None)
    if stored is None:
        return {"quantization_config": CpuLlmConfig(**values)}
    method = stored.get("quant_method") if isinstance(stored, dict) else stored
    if method == "cpullm":
        if chosen:
            raise ValueError("it was saved with settings of its own, and takes no config")
        described.quantization_config = {**stored, **({"compute": compute} if compute else {})}
    elif method in METHODS:
        own = {"quant_method": "cpullm", "format_version": FORMAT_VERSION, "source": stored}
        described.quantization_config = {**values, **own}
    else:
        raise ValueError(f"it is quantised by {method!r}, and what can be read is {', '.join(METHODS)}")
    return {}


# What transformers raises, besides OSError, for settings and tensors that disagree with each other.
_OF_DAMAGE = (ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError, ArithmeticError)


def _check_complete(info: dict[str, Any]) -> None:
    """ValueError where a parameter has no tensor, or a tensor no place: transformers would go on."""
    for key, text in (("missing_keys", "it lacks {}"), ("unexpected_keys", "the model has no place for {}")):
        names = sorted(info[key])
        if names:
            raise ValueError(text.format(", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")))


def _tokenizer(path: Any, options: dict[str, Any]) -> Any:
    """The tokenizer, None for a local directory that holds none."""
    from transformers import AutoTokenizer

    if Path(path).is_dir() and not any(Path(path).glob("*token*.*")) and not any(Path(path).glob("vocab.*")):
        return None
    return AutoTokenizer.from_pretrained(path, **options)
