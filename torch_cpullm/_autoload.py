"""Makes transformers know ``quant_method: cpullm`` without an import by the user.

torch calls :func:`autoload` at the end of its own import (entry point group ``torch.backends``). It only leaves a note
for the import of transformers' list of quantisation methods. Nothing here may raise: ``import torch`` would fail.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_WATCHED = "transformers.quantizers.auto"


def autoload() -> None:
    """Register with transformers as soon as it is imported."""
    try:
        if _WATCHED in sys.modules:
            _register()
        elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
    except Exception as error:  # noqa: BLE001  `import torch` must succeed whatever is wrong with us
        _complain(error)


class _Finder(MetaPathFinder):
    """Finds the watched module as Python would, and registers once it has run."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """None for every other module: the next finder looks for it."""
        if fullname != _WATCHED:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
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
    from . import hf  # noqa: F401  (registers when it is imported)


def _complain(error: Exception) -> None:
    import logging

    logging.getLogger("torch_cpullm").warning("transformers will not know quant_method cpullm: %s", error)
