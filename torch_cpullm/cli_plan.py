"""``cpullm plan``: what tensor parallel and CQIL would gain on several sockets, predicted before there are any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_options import BitsOption, DebugOption, GroupOption, ThreadsOption, state

if TYPE_CHECKING:
    from .latency import Constants, Footprint

_SPLITS = ("one process", "tensor parallel", "CQIL", "CQIL of TP groups")


def plan(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A .gguf file or a Hugging Face directory. Default: the demo."),
    ] = None,
    plan_file: Annotated[
        str | None, typer.Option("--plan", metavar="FILE", help="A CQIL plan (JSON). Default: the middle layers.")
    ] = None,
    sockets: Annotated[str, typer.Option(metavar="LIST", help="Numbers of sockets.")] = "1,2,4,8",
    network: Annotated[
        bool, typer.Option("--network", help="Measure an all-reduce of two local processes (some seconds).")
    ] = False,
    bits: BitsOption = None,
    group_size: GroupOption = None,
    threads: ThreadsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    debug: DebugOption = False,
) -> None:
    """Predict the decode latency on several sockets: one process, tensor parallel, CQIL, and both.

    A prediction from the bytes of the model and micro-benchmarks of this machine, which stands for one socket; no
    weights are read from a directory, and no model is run.

    \b
    Examples:
      cpullm plan ./Llama-2-7b --network
      cpullm plan ./Llama-2-7b --plan groups.json --sockets 2,4,8,16,32,64 --json
    """  # noqa: D301 (a raw string would lose the mark that keeps these lines apart)
    from . import runner

    counts = _counts(sockets)
    path = runner.find_model(model, "MODEL")
    runner.check_recipe(path, bits=bits, group_size=group_size)
    runner.quiet_libraries(debug=state["debug"])
    from . import launch

    launch.apply_default_threads() if threads is None else launch.set_threads(threads)
    from . import latency

    of = _footprint(path, bits, group_size)
    groups = None if plan_file is None else _groups(Path(plan_file), of)
    net = None
    if network:
        from .collective import all_reduce_seconds

        net = all_reduce_seconds(of.hidden)
    constants = latency.measure(of, net)
    rows = latency.predict(of, constants, counts, groups)
    if as_json:
        typer.echo(json.dumps({"prediction": rows, "constants": _constants(constants)}, indent=2))
    else:
        typer.echo("\n".join(_lines(path.name, of, constants, rows, groups is not None)))


def _counts(text: str) -> list[int]:
    """The numbers of ``--sockets``."""
    words = text.split(",")
    if not all(word.strip().isascii() and word.strip().isdecimal() and 1 <= int(word) <= 1024 for word in words):
        raise typer.BadParameter(f"--sockets must be numbers from 1 to 1024 with commas between, got {text!r}")
    return [int(word) for word in words]


def _footprint(path: Path, bits: int | None, group_size: int | None) -> Footprint:
    """Bytes of the model at ``path``, of a directory from its config alone."""
    from . import latency, runner
    from .config import Settings

    if path.is_file():
        return latency.footprint(runner.load_int4(path, tokenizer=False).model)
    model = runner.load_meta(path)
    try:
        chosen = None if bits is None and group_size is None else Settings(bits=bits or 4, group_size=group_size or 32)
        return latency.footprint(model, chosen)
    except ValueError as error:
        raise runner.InputError(f"{path}: {error}") from error


def _groups(file: Path, of: Footprint) -> tuple[tuple[int, int], ...]:
    from .cqil import Plan
    from .runner import InputError

    try:
        found = Plan.from_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--plan {file}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"--plan {file}: {error}") from error
    if (found.layers, found.hidden) != (len(of.layers), of.hidden):
        raise InputError(
            f"--plan {file}: it is for another model, of {found.layers} layers of width {found.hidden}; this one has "
            f"{len(of.layers)} of {of.hidden}"
        )
    if found.mode != "cqil" or found.bypass:
        raise InputError(f"--plan {file}: only mode 'cqil' with bypass 0 is modelled, got {found.mode}, {found.bypass}")
    return found.groups


def _constants(constants: Constants) -> dict[str, Any]:
    """As JSON has them."""
    gbps = {_form(kind): round(value, 1) for kind, value in constants.gbps.items()}
    names = ("steps_s", "token_s", "barrier_s", "barriers", "dispatch_s", "all_reduce_s", "threads", "transport")
    return {"gbps": gbps, **{name: getattr(constants, name) for name in names}}


def _form(kind: Any) -> str:
    if kind.form is None:
        return "float"
    zeros = {"none": "symmetric", "point": "zero points", "minimum": "minima"}[kind.form.zeros]
    return f"INT{kind.form.bits} g{kind.form.group_size} {zeros}, {kind.compute}"


def _lines(name: str, of: Footprint, c: Constants, rows: list[dict[str, Any]], planned: bool) -> list[str]:
    """The report, at most 100 columns wide."""
    inside, rest = (sum(sum(each.values()) for each in many) / 1e6 for many in (of.layers, [of.rest]))
    net = f"measured, {c.transport}" if c.transport else "assumed; --network measures it"
    window = "those of the plan" if planned else "in the middle: pairs on 2 sockets, fours on more; pairs of TP groups"
    lines = [
        "Prediction, not a measurement: this process stands for one socket, and no model was run.",
        f"model       {name}: {len(of.layers)} layers, {inside:.1f} MB per token; head and the rest {rest:.1f} MB",
        *(f"bandwidth   {gbps:.1f} GB/s: {_form(kind)}" for kind, gbps in c.gbps.items() if kind.form is not None),
        f"layer       {c.steps_s * 1e6:.0f} us beside its weights; {c.barriers} barriers of {c.barrier_s * 1e6:.2f} us",
        f"token       {c.token_s * 1e6:.0f} us beside the layers; {c.threads} threads",
        f"operator    {c.dispatch_s * 1e6:.1f} us",
        f"all-reduce  {c.all_reduce_s * 1e6:.0f} us for two ranks ({net}), times log2 of the ranks",
        f"CQIL        groups {window}",
        "            (what they cost in quality: torch_cpullm.cqil.measure)",
        "",
        f"{'sockets':>7}" + "".join(f"{split:>19}" for split in _SPLITS) + "  ms per token",
    ]
    for row in rows:
        base = row[_SPLITS[0]]
        cells = ["-" if row[s] is None else f"{row[s] * 1e3:.2f} ({base / row[s]:.2f}x)" for s in _SPLITS]
        lines.append(f"{row['sockets']:>7}" + "".join(f"{cell:>19}" for cell in cells))
    return lines
