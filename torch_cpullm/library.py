"""Loads the compiled operators, ``torch.ops.cpullm``, when it is imported."""

from pathlib import Path

import torch

_LIBRARY = Path(__file__).with_name("_C.abi3.so")
if not _LIBRARY.exists():
    raise ImportError(
        f"torch_cpullm: the compiled library {_LIBRARY.name} is missing in {_LIBRARY.parent.name}; "
        "install the package with `pip install --no-build-isolation .` (or `make build` in a checkout)"
    )
torch.ops.load_library(str(_LIBRARY))
