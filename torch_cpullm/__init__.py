"""INT4 inference of HuggingFace language models on x86 CPUs.

``torch_cpullm.optimize(model)``; the rest of HuggingFace stays as it is. Importing this package loads nothing heavy:
torch, the compiled operators and transformers come with the first use of a name.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

# What torch was set to when this package was imported, None before torch: see launch.
_torch_threads: int | None = getattr(sys.modules.get("torch"), "get_num_threads", lambda: None)()

if TYPE_CHECKING:
    from . import cqil
    from .coverage import Report, report
    from .formats.gguf import load_gguf
    from .hf import CpuLlmConfig
    from .loading import load
    from .quality import evaluate
    from .swap import optimize, restore
    from .tuning import autotune

__version__ = "0.1.0"
__all__ = [
    "CpuLlmConfig",
    "Report",
    "__version__",
    "autotune",
    "cqil",
    "evaluate",
    "load",
    "load_gguf",
    "optimize",
    "report",
    "restore",
]

_HOME = {
    "CpuLlmConfig": ".hf",
    "Report": ".coverage",
    "autotune": ".tuning",
    "evaluate": ".quality",
    "load": ".loading",
    "load_gguf": ".formats.gguf",
    "optimize": ".swap",
    "report": ".coverage",
    "restore": ".swap",
}


def __getattr__(name: str) -> Any:
    if name == "cqil":
        return import_module(".cqil", __name__)
    if name in _HOME:
        return getattr(import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
