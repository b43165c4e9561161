"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

state = {"debug": False}


def _debug(value: bool) -> None:
    state["debug"] = state["debug"] or value


def _check_bits(value: int | None) -> int | None:
    if value not in (None, 4, 8):
        raise typer.BadParameter(f"must be 4 or 8, got {value}")
    return value


def _check_group_size(value: int | None) -> int | None:
    if value is not None and value != -1 and (value < 32 or value % 32):
        raise typer.BadParameter(f"must be a positive multiple of 32, or -1 for one group per row, got {value}")
    return value


BitsOption = Annotated[
    int | None,
    typer.Option(callback=_check_bits, metavar="N", help="Bits per weight, 4 (default) or 8; directories only."),
]
GroupOption = Annotated[
    int | None,
    typer.Option(
        callback=_check_group_size,
        metavar="N",
        help="Weights per scale: a multiple of 32 (default 32), or -1 for one per row; directories only.",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads", "-t", min=1, metavar="N", help="Threads. Default: what affinity, cgroup quota and cores allow."
    ),
]
DebugOption = Annotated[bool, typer.Option("--debug", callback=_debug, help="Show tracebacks and library warnings.")]
