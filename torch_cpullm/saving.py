"""save_pretrained of an optimised model: canonical tensors by transformers' own code, and all files or none."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from torch import nn

from .checkpoint import HINT, describe, saved_tensors


def teach_to_save(kind: type[nn.Module]) -> None:
    """Let ``save_pretrained`` of this class save packed models, too; others it saves as before.

    On the class: a function on an instance would have to hold the model, or lose it in ``load(...).save_pretrained()``.
    """
    original = cast("Any", kind).save_pretrained
    if getattr(original, "_cpullm", False):
        return

    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        if "_cpullm_settings" not in self.__dict__ or getattr(self, "_hf_peft_config_loaded", False):
            return original(self, save_directory, *args, **kwargs)  # of an adapter transformers saves that alone
        return _save(self, original, save_directory, *args, **kwargs)

    cast("Any", save_pretrained)._cpullm = True
    cast("Any", kind).save_pretrained = save_pretrained


def _save(
    model: Any, original: Any, save_directory: str | os.PathLike[str], is_main_process: bool = True, **kwargs: Any
) -> None:
    """Write config.json, the weights and a model card into ``save_directory``; arguments as transformers has them.

    What the directory holds is replaced when everything is written: an error, a full disk or a kill leaves it as it
    was, other files in it stay. Raises ValueError for a ``state_dict`` of the caller's, FileExistsError where
    ``save_directory`` is a file, and OSError or safetensors' error where writing fails.
    """
    if kwargs.pop("state_dict", None) is not None:
        raise ValueError("save_pretrained of an optimised model saves its own weights; it takes no state_dict")
    if not is_main_process:
        return
    target = Path(os.path.realpath(save_directory))
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"save_pretrained: {target} is a file, not a directory")
    if kwargs.get("push_to_hub"):
        kwargs.setdefault("repo_id", target.name)
    kwargs["save_original_format"] = False  # canonical tensors belong to the modules as they are
    with replaced(target, weights_of(kwargs.get("variant"))) as temporary:
        state = saved_tensors(model)
        with _described(model, len(state)):
            original(model, temporary, state_dict=state, **kwargs)
        if not (target / "README.md").exists() and not (temporary / "README.md").exists():
            (temporary / "README.md").write_text(_CARD)


_CARD = f"""---
library_name: transformers
tags:
- cpullm
- int4
- cpu
---

{HINT}

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this/directory")  # nothing else to import
```
"""


@contextlib.contextmanager
def _described(model: Any, tensors: int) -> Iterator[None]:
    """While transformers writes: the whole quantization_config in the config, and nothing that would change the state.

    A quantizer would replace the state dict, a device map make transformers take weights for offloaded ones.
    """
    config = vars(model.config)
    aside = {name: model.__dict__.pop(name) for name in ("hf_quantizer", "hf_device_map") if name in model.__dict__}
    had, before = "quantization_config" in config, config.get("quantization_config")
    config["quantization_config"] = describe(model, model._cpullm_settings, tensors)
    try:
        yield
    finally:
        if had:
            config["quantization_config"] = before
        else:
            del config["quantization_config"]
        model.__dict__.update(aside)


def weights_of(variant: str | None) -> re.Pattern[str]:
    """Names of weight files that a save makes stale."""
    part = "" if variant is None else rf"\.{re.escape(variant)}"
    return re.compile(rf"model(-\d+-of-\d+)?{part}(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index{part}\.json")


# ---- all files or none ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replaced(target: Path, stale: re.Pattern[str]) -> Iterator[Path]:
    """A new directory to write into, which becomes ``target`` when the block ends without an error.

    Other files of ``target`` stay, those that ``stale`` matches go. Where the directory itself cannot be replaced (a
    mount point, the current directory), its files are, one by one, config.json last.
    """
    whole = not _is_pinned(target)
    parent = target.parent if whole else target
    parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=parent))
    try:
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(target.stat().st_mode & 0o7777 if target.exists() else 0o777 & ~mask)
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)  # some file systems report a full disk only here
        if not whole:
            _move_files(temporary, target, stale)
        elif target.exists():
            _keep_others(target, temporary, stale)
            _exchange(temporary, target)
        else:
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_pinned(target: Path) -> bool:
    """Whether the directory cannot be exchanged for another one."""
    if not target.exists():
        return False
    here = Path.cwd()
    return os.path.ismount(target) or target == here or target in here.parents or not os.access(target.parent, os.W_OK)


def _sync(path: Path) -> None:
    if path.is_file():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _keep_others(old: Path, new: Path, stale: re.Pattern[str]) -> None:
    """Give ``new`` the files of ``old`` that it has not written itself, as hard links where the system allows."""
    for path in old.iterdir():
        copy = new / path.name
        if copy.exists() or stale.fullmatch(path.name) or (path.name[:1] == "." and path.name.endswith(".partial")):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, copy, symlinks=True, copy_function=_link)
        else:
            _link(path, copy)


def _link(old: str | Path, new: str | Path) -> None:
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError:
        shutil.copy2(old, new, follow_symlinks=False)


_RENAME_EXCHANGE = 2  # Linux
_AT_FDCWD = -100


def _exchange(new: Path, old: Path) -> None:
    """Let the two directories change places: in one step where the system can, else in two."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is not None and not rename(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE):
        return
    aside = new.with_name(new.name + ".old")
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    aside.rename(new)


def _move_files(new: Path, target: Path, stale: re.Pattern[str]) -> None:
    written = sorted(new.iterdir(), key=lambda path: path.name == "config.json")
    names = {path.name for path in written}
    for path in written:
        path.replace(target / path.name)
    for path in target.iterdir():
        if stale.fullmatch(path.name) and path.name not in names:
            path.unlink()
