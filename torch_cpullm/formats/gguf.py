"""load_gguf: a GGUF file as a plain HuggingFace model whose linears keep the file's own codes and scales.

Q4_0, Q4_1, Q8_0 and Q4_K matrices are taken over as they are stored (gguf_blocks.py says how). Rows that the file keeps
in another order than transformers (the q and k projections of llama) are put back by moving whole rows of blocks. Every
other storage type of a matrix is dequantised and quantised again, with a warning; norms, biases and other small tensors
become plain floats.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..config import SCALE_DTYPES, Recipe, Settings
from ..linear import PackedEmbedding, PackedLinear
from ..packing import PackedWeight, pack
from ..plan import check_recipes, find_targets, head_compute, keep_original, sharing_inputs
from ..quant import quantize_rtn
from ..swap import optimize, swap_module
from .gguf_blocks import EXACT_TYPES, GROUP, quantized_weight
from .gguf_hf import empty_model, hf_config, hf_tokenizer
from .gguf_plan import Matrix, Plan, embedding_multiplier, make_plan
from .gguf_reader import GgufFile, GgufTensor, ggml_type_name

__all__ = ["load_gguf", "quantized_weight"]

_FLOAT_TYPES = (0, 1, 30)  # F32, F16, BF16
_MAX_BUFFER_BYTES = 1 << 30  # RoPE frequencies, factors and masks; they are kilobytes in any real model


def load_gguf(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    compute: str | None = None,
    config: Settings | None = None,
    progress: bool = True,
) -> tuple[Any, Any]:
    """Loads a GGUF file as (model, tokenizer), ready for `generate()` and pipelines.

    path      a .gguf file (version 2 or 3, little-endian, one language model, not split)
    dtype     of activations, norms and biases: float32, bfloat16 or float16
    compute   "int8" (activations quantised per row) or "fp32" (exact activations); None takes it from `config`
    config    CpuLlmConfig or Settings: how to quantise what is not Q4_0, Q4_1, Q8_0 or Q4_K. Those keep the file's own
              codes and scales whatever it says, unless modules_to_not_convert names them. None: float matrices
              (F32, F16, BF16) by the default recipe of `optimize`, all other types to INT8 with group 32, since a
              second rounding to 4 bits would cost far more than the first.
    progress  False shows no progress bar

    The model is the architecture's plain transformers class in eval mode. Its linears are PackedLinear, its input
    embedding is PackedEmbedding; a tied head shares the embedding's one packed copy. A warning counts the matrices that
    were quantised here; everything that is no matrix is float of `dtype`.

    Raises FileNotFoundError; ValueError, naming the file and the defect, for a damaged, contradictory, incomplete or
    unsupported file and for wrong arguments; ImportError where transformers or gguf is missing or too different.
    """
    settings = config if config is not None else Settings()
    if not isinstance(settings, Settings):
        raise TypeError(f"config must be a CpuLlmConfig, got {type(config).__name__}")
    if compute is not None:
        settings = replace(settings, compute=compute)
    settings.validate()
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    file = GgufFile(path)
    model: Any = empty_model(file, hf_config(file), dtype)
    plan = make_plan(file, model)
    tokenizer = hf_tokenizer(file)
    rows = file.tensors["token_embd.weight"].shape[0]
    if len(tokenizer) > rows:
        raise ValueError(f"{file.path}: its tokenizer has {len(tokenizer)} tokens, its embedding only {rows} rows")
    with torch.no_grad():
        _fill_buffers(file, model)
        _fill(file, model, plan, settings, config is not None, dtype, progress)
    model.config._name_or_path = tokenizer.name_or_path = file.path
    return optimize(model, settings), tokenizer


def _fill(
    file: GgufFile, model: Any, plan: Plan, settings: Settings, asked: bool, dtype: torch.dtype, progress: bool
) -> None:
    """Puts every tensor into the model: floats first, since a PackedLinear is made with its bias.

    asked: whether the settings are the caller's, and so also hold for quantised types that are not taken over.
    """
    from transformers.utils import logging

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    partners = {source.removesuffix(".weight"): name.removesuffix(".weight") for name, source in plan.tied.items()}
    chosen: list[tuple[Matrix, Recipe]] = []
    recipes: dict[str, Recipe] = {}
    tied: list[list[str]] = []
    eight_bits = Recipe(8, GROUP, True, SCALE_DTYPES[settings.scale_dtype])
    plain = list(plan.plain)
    for matrix in plan.matrices:
        module = model.get_submodule(matrix.module)
        kind, end = matrix.tensor.ggml_type, module is head or module is embedding
        users = [matrix.module, *([partners[matrix.module]] if matrix.module in partners else [])]
        recipe = settings.recipe(matrix.module, end)
        if kind in EXACT_TYPES or not (asked or kind in _FLOAT_TYPES):
            recipe = eight_bits  # for exact types a placeholder: the file decides
        elif recipe is not None:
            recipes.update({user: settings.recipe(user, end) or recipe for user in users})
            tied.append(users)
        if recipe is None or not all(map(settings.converts, users)) or embedding_multiplier(module) is None:
            plain.append((matrix.tensor, f"{matrix.module}.weight"))
        else:
            chosen.append((matrix, recipe))
    if asked:
        check_recipes(recipes, sharing_inputs(recipes), "an input")
        check_recipes(recipes, tied, "a weight")
    _fill_plain(file, model, plan, plain, dtype)
    packed: dict[str, PackedWeight] = {}
    with (
        _workers() as pool,
        logging.tqdm(total=len(chosen), desc="gguf", unit="tensor", disable=None if progress else True) as bar,
    ):
        jobs = pool.map(lambda job: _packed(file, *job), chosen)
        for (matrix, _), weight in zip(chosen, jobs, strict=True):
            packed[matrix.module] = weight
            _swap(model, matrix.module, weight, settings, dtype)
            bar.update()
    for name, source in plan.tied.items():
        target, origin = name.removesuffix(".weight"), source.removesuffix(".weight")
        if origin in packed:
            _swap(model, target, packed[origin], settings, dtype)
        else:
            model.get_submodule(target).weight = model.get_submodule(origin).weight
    _warn(file, chosen, plain, _pack_experts(model, plain, settings, None if asked else eight_bits))


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """A few threads that work tensor by tensor, torch itself using one thread in each.

    The other way round, torch splitting each small step, costs ten times as much where a core is busy elsewhere.
    """
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(max_workers=min(4, count))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(count)
        _release_freed_memory()


def _release_freed_memory() -> None:
    """Hands freed memory back to the system; glibc keeps it otherwise (300 MB after loading a 1.1B model)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not in musl
        if trim is not None:
            trim(0)


def _pack_experts(
    model: Any, plain: list[tuple[GgufTensor, str]], settings: Settings, eight_bits: Recipe | None
) -> dict[str, int]:
    """Packs the experts, which transformers' processor has joined as floats; name -> bits of their parameters.

    eight_bits: the recipe of those that the file has in a quantised type; None: that of the settings.
    """
    bits_of: dict[str, int] = {}
    for experts in find_targets(model, settings)[0]:
        if experts.kind != "experts" or experts.recipe is None:
            continue
        names = [f"{experts.name}.{parameter}" for parameter in experts.parameters]
        if eight_bits and any(name in names and tensor.ggml_type not in _FLOAT_TYPES for tensor, name in plain):
            experts.recipe = eight_bits
        bits_of.update(dict.fromkeys(names, experts.recipe.bits))
        swap_module(model, experts, settings, {})
    return bits_of


def _warn(
    file: GgufFile, matrices: list[tuple[Matrix, Recipe]], plain: list[tuple[GgufTensor, str]], bits_of: dict[str, int]
) -> None:
    """One warning that says which storage types could not be taken over. bits_of: those of experts, see above."""
    changes = [
        (ggml_type_name(matrix.tensor.ggml_type), f"quantised to {recipe.bits} bits")
        for matrix, recipe in matrices
        if matrix.tensor.ggml_type not in EXACT_TYPES
    ]
    changes += [
        (f"{ggml_type_name(tensor.ggml_type)} experts", f"quantised to {bits_of[name]} bits")
        for tensor, name in plain
        if name in bits_of
    ]
    changes += [
        (ggml_type_name(tensor.ggml_type), "dequantised to float")
        for tensor, name in plain
        if name not in bits_of and tensor.ggml_type not in _FLOAT_TYPES
    ]
    if changes:
        counts = sorted(Counter(changes).items())
        text = ", ".join(f"{kind} ({count}) {change}" for (kind, change), count in counts)
        warnings.warn(
            f"{file.path}: Q4_0, Q4_1, Q8_0 and Q4_K matrices are taken over as they are, other types are not: {text}",
            stacklevel=4,
        )


def _fill_plain(
    file: GgufFile, model: Any, plan: Plan, tensors: list[tuple[GgufTensor, str]], dtype: torch.dtype
) -> None:
    """Float parameters, converted by transformers' processor (which may join several tensors into one parameter)."""
    stored: dict[str, Any] = {"tensors": {}}
    for tensor, target in tensors:
        try:
            with np.errstate(all="ignore"):  # what comes out is checked below
                result = plan.processor.process(
                    weights=file.dequantized(tensor.name),
                    name=tensor.name,
                    tensor_key_mapping=plan.names,
                    parsed_parameters=stored,
                )
        except (TypeError, KeyError, IndexError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{file.path}: tensor {tensor.name!r} {list(tensor.shape)} does not fit: {error}"
            ) from error
        if result.name is not None:
            stored["tensors"][target] = torch.from_numpy(np.array(result.weights, dtype=np.float32))
    for target, value in stored["tensors"].items():
        path, _, attribute = target.rpartition(".")
        module = model.get_submodule(path)
        expected = getattr(module, attribute)
        if value.shape != expected.shape:
            raise ValueError(
                f"{file.path}: the tensor for {target} has the shape {list(value.shape)}, "
                f"the metadata says {list(expected.shape)}"
            )
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{file.path}: the tensor for {target} holds NaN or inf")
        if isinstance(expected, nn.Parameter):
            setattr(module, attribute, nn.Parameter(value.to(dtype), requires_grad=False))
        else:
            module._buffers[attribute] = value.to(expected.dtype)


def _packed(file: GgufFile, matrix: Matrix, recipe: Recipe) -> PackedWeight:
    """One matrix in packed form: the file's own codes where its type allows, else the recipe of `optimize`."""
    tensor = matrix.tensor
    if tensor.ggml_type in EXACT_TYPES:
        return pack(quantized_weight(file, tensor.name, matrix.rows))
    weight = torch.from_numpy(np.array(file.dequantized(tensor.name)))
    if matrix.rows is not None:
        weight = weight[torch.from_numpy(matrix.rows)]
    try:
        return pack(quantize_rtn(weight, *recipe))
    except ValueError as error:  # NaN, inf or too large
        raise ValueError(f"{file.path}: tensor {tensor.name!r}: {error}") from error


def _swap(model: Any, name: str, packed: PackedWeight, settings: Settings, dtype: torch.dtype) -> None:
    """Replaces the float module of this name by one with packed weights."""
    module = model.get_submodule(name)
    new: PackedLinear | PackedEmbedding
    if isinstance(module, nn.Embedding):
        factor = None if type(module) is nn.Embedding else embedding_multiplier(module)
        new = PackedEmbedding(packed, dtype=dtype, padding_idx=module.padding_idx, multiplier=factor)
    else:
        head = module is model.get_output_embeddings()
        compute = head_compute(settings.compute) if head else settings.compute
        new = PackedLinear(packed, module.bias, dtype=dtype, compute=compute)
    keep_original(new, module)
    model.set_submodule(name, new.eval())


def _fill_buffers(file: GgufFile, model: Any) -> None:
    """Computes the buffers that no file holds (RoPE frequencies, embedding factors, masks) on the CPU.

    transformers' `_init_weights` sets all of them, since its own loader starts from meta tensors too. It runs once on
    zeros and once on ones; a buffer that then differs was not set. Parameters are marked as done, so it skips them.
    """
    size_bytes = sum(buffer.nbytes for buffer in model.buffers())
    if size_bytes > _MAX_BUFFER_BYTES:
        raise ValueError(f"{file.path}: its metadata asks for {size_bytes} bytes of buffers")
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    for name, module in model.named_modules():
        empty = {key: value for key, value in module._buffers.items() if value is not None and value.is_meta}
        results = []
        for fill in (torch.zeros_like, torch.ones_like):
            for key, value in empty.items():
                module._buffers[key] = fill(value, device="cpu")
            if empty:
                model._init_weights(module)
            results.append([module._buffers[key] for key in empty])
        for key, first, second in zip(empty, *results, strict=True):
            if not torch.equal(first, second):
                raise ValueError(
                    f"{file.path}: {type(model).__name__} has a buffer without a known value: {name}.{key}"
                )
