"""Options that several commands share."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

state = {"debug": False}


class Compute(str, Enum):
    """How the linear layers compute."""

    int8 = "int8"
    bf16 = "bf16"
    fp32 = "fp32"


def _debug(value: bool) -> None:
    state["debug"] = state["debug"] or value


def check_bits(value: int | None) -> int | None:
    """BadParameter unless 4, 8 or None."""
    if value not in (None, 4, 8):
        raise typer.BadParameter(f"must be 4 or 8, got {value}")
    return value


def check_group_size(value: int | None) -> int | None:
    """BadParameter unless a positive multiple of 32, -1 or None."""
    if value is not None and value != -1 and (value < 32 or value % 32):
        raise typer.BadParameter(f"must be a positive multiple of 32, or -1 for one group per row, got {value}")
    return value


ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="PATH",
        help="A .gguf file or a Hugging Face directory. Default: the SmolLM2-135M demo.",
    ),
]
BitsOption = Annotated[
    int | None,
    typer.Option(callback=check_bits, metavar="N", help="Bits per weight, 4 (default) or 8; directories only."),
]
GroupOption = Annotated[
    int | None,
    typer.Option(
        callback=check_group_size,
        metavar="N",
        help="Weights per scale: a multiple of 32 (default 32), or -1 for one per row; directories only.",
    ),
]
ComputeOption = Annotated[
    Compute, typer.Option(help="int8: activations in INT8, fast. fp32: exact activations, slower.")
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads", "-t", min=1, metavar="N", help="Threads. Default: what affinity, cgroup quota and cores allow."
    ),
]
DebugOption = Annotated[bool, typer.Option("--debug", callback=_debug, help="Show tracebacks and library warnings.")]
