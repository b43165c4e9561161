"""Makes transformers know ``quant_method: cpullm`` without an import by the user.

torch calls :func:`autoload` at the end of its own import (entry point group ``torch.backends``). It only leaves a note
for the import of transformers' list of quantisation methods. Nothing here may raise: ``import torch`` would fail.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_TABLES = "transformers.quantizers.auto"
_LATER = "transformers.modeling_utils"  # needs the tables, and is needed by every model


def autoload() -> None:
    """Register with transformers as soon as it is imported."""
    try:
        tables = sys.modules.get(_TABLES)
        under_way = getattr(getattr(tables, "__spec__", None), "_initializing", False)  # and it has imported torch
        if tables is not None and not under_way:
            _register()
        elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder(_LATER if under_way else _TABLES))
    except Exception as error:  # noqa: BLE001  `import torch` must succeed whatever is wrong with us
        _complain(error)


class _Finder(MetaPathFinder):
    """Finds the watched module as Python would, and registers once it has run."""

    def __init__(self, watched: str) -> None:
        self._watched = watched

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """None for every other module: the next finder looks for it."""
        if fullname != self._watched:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        # Not importlib.util.find_spec: it would import the parent package, and by that this very module.
        found = (finder.find_spec(fullname, path, target) for finder in list(sys.meta_path))
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """The module's own loader, and :func:`_register` behind it."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the module's own loader does it."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, then register."""
        self._loader.exec_module(module)
        try:
            _register()
        except Exception as error:  # noqa: BLE001  transformers must work for everything else
            _complain(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def _register() -> None:
    """Put stand-ins into transformers' tables: what they stand for imports much of transformers, which is under way."""
    tables: Any = sys.modules[_TABLES]
    tables.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault("cpullm", _Config)
    tables.AUTO_QUANTIZER_MAPPING.setdefault("cpullm", _quantizer)


class _Config:
    """Stands for :class:`torch_cpullm.hf.CpuLlmConfig`, which takes its place when it is imported."""

    @staticmethod
    def from_dict(*args: Any, **kwargs: Any) -> Any:
        """The config of a checkpoint."""
        from . import hf

        return hf.CpuLlmConfig.from_dict(*args, **kwargs)


def _quantizer(*args: Any, **kwargs: Any) -> Any:
    """Stands for :class:`torch_cpullm.hf.CpuLlmQuantizer`."""
    from . import hf

    return hf.CpuLlmQuantizer(*args, **kwargs)


def _complain(error: Exception) -> None:
    import logging

    logging.getLogger("torch_cpullm").warning("transformers will not know quant_method cpullm: %s", error)
