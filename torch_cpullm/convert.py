"""convert: any checkpoint that load() reads, saved in the package's own form."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from .config import Settings
from .coverage import Report, report
from .formats.gguf import load_gguf
from .layer import remove_programs
from .linear import PackedModule
from .loading import load_directory
from .packing import PackedStack, PackedWeight
from .saving import replaced, weights_of
from .swap import packed_modules

# Files that belong to a model besides its weights and config; code does not.
_COMPANIONS = (
    "*token*.*",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "LICENSE*",
    "preprocessor_config.json",
)


def convert(
    source: str | os.PathLike[str], target: str | os.PathLike[str], config: Settings | None = None, **options: Any
) -> Report:
    """Save the checkpoint ``source`` into the directory ``target`` in the package's own form; returns a report of it.

    source, config, options: as :func:`torch_cpullm.load` has them. Tokenizer files come along. Memory holds the packed
    model and one module: a packed weight is given up when the tensors to be saved are taken from it. What ``target``
    holds is replaced when everything is written; an error, a full disk or a kill leaves it as it was. Raises ValueError
    where ``target`` is ``source`` or holds it, and what load() and save_pretrained() raise.
    """
    source, target = Path(source), check_target(source, target)
    tokenizer = None
    if source.is_file():
        model, tokenizer = load_gguf(source, config=config, **options)
    else:
        model = load_directory(source, config=config, **options)
    result = report(model)
    remove_programs(model)  # they hold the weights, too
    for _, module in packed_modules(model):
        module._register_state_dict_hook(_give_up)
    with replaced(target, weights_of(None)) as temporary:
        model.save_pretrained(temporary, max_shard_size="2GB")
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        for file in _companions(source):
            shutil.copyfile(file, temporary / file.name)
    return result


def check_target(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """Where ``target`` really is; ValueError where it is ``source`` or holds it, FileExistsError for a file."""
    real, place = Path(os.path.realpath(target)), Path(os.path.realpath(source))
    if real in (place, *place.parents):
        raise ValueError(f"{real} is where the source is: it would be replaced")
    if real.exists() and not real.is_dir():
        raise FileExistsError(f"{real} is a file, not a directory")
    return real


def _give_up(module: PackedModule, *_: Any) -> None:
    """Free the packed weights of a module once the state dict has them, and keep what describes them."""
    for name, value in list(vars(module).items()):
        if isinstance(value, PackedWeight):
            setattr(module, name, _described(value))
        elif isinstance(value, PackedStack):
            setattr(module, name, replace(value, whole=_described(value.whole)))


def _described(packed: PackedWeight) -> PackedWeight:
    """The same weight without its data."""
    zeros = None if packed.zeros is None else packed.zeros.to("meta")
    return replace(packed, codes=packed.codes.to("meta"), scales=packed.scales.to("meta"), zeros=zeros)


def _companions(source: Path) -> list[Path]:
    if not source.is_dir():
        return []
    found = {file for pattern in _COMPANIONS for file in source.glob(pattern)}
    return sorted(file for file in found if file.is_file() and file.suffix != ".py")
