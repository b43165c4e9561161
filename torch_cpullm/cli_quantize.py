"""The command ``cpullm quantize``; cli.py lists it."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import Compute, ComputeOption, DebugOption, check_group_size, state
from .cli_quality import CalibrationOption, DeviceOption, EvalOption, LossOption, tune

_FLOATS = "Float sources only"


def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A directory in float, GPTQ, AWQ, ... or a .gguf file.")],
    target: Annotated[
        Path, typer.Argument(metavar="DST", help="The directory to write; replaced when all is written.")
    ],
    bits: Annotated[
        int | None, typer.Option(metavar="N", help=f"Bits per weight, 4 (default) or 8. {_FLOATS}.")
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            callback=check_group_size,
            metavar="N",
            help=f"Weights per scale: a multiple of 32 (default 32), or -1 for one per row. {_FLOATS}.",
        ),
    ] = None,
    sym: Annotated[
        bool | None, typer.Option("--sym/--no-sym", help=f"Symmetric weights (default: zero points). {_FLOATS}.")
    ] = None,
    head_bits: Annotated[
        str | None,
        typer.Option(metavar="N", help="Bits of a float head and embedding: 8 (default), 4, or none to leave them."),
    ] = None,
    compute: ComputeOption = Compute.int8,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Leave modules of this name or regular expression in float; may be repeated."
        ),
    ] = None,
    auto: Annotated[
        bool, typer.Option("--auto", help="Measure recipes, RTN to GPTQ, and take the cheapest within --target.")
    ] = False,
    loss: LossOption = 0.01,
    eval_text: EvalOption = None,
    calibration: CalibrationOption = None,
    device: DeviceOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing.")] = False,
    debug: DebugOption = False,
) -> None:
    """Convert a model to INT4 (or INT8) and save it, with its tokenizer, for from_pretrained and cpullm.

    Weights that are quantised already (GPTQ, AWQ, AutoRound, compressed-tensors, GGUF) keep their codes and scales;
    with --auto they are float weights like any others. `cpullm autotune` has all options of --auto.

    \b
    Examples:
      cpullm quantize ./Qwen2.5-0.5B-Instruct ./qwen-int4 --group-size 128 --sym
      cpullm quantize ./Llama-3.2-1B-GPTQ ./llama-int4
      cpullm quantize model.gguf ./model-int4
      cpullm quantize ./my-model ./my-model-int4 --auto --target 0.02
    """  # noqa: D301 (a raw string would lose the mark that keeps these lines apart)
    from . import runner

    start = time.perf_counter()
    path = runner.find_model(source, "SRC")
    given: dict[str, Any] = {"bits": bits, "group_size": group_size, "sym": sym, "head_bits": head_bits}
    given["exclude"] = exclude or None
    if not auto:
        runner.check_recipe(path, **given)
        if (loss, eval_text, calibration, device) != (0.01, None, None, None):
            raise runner.InputError("--target, --eval, --calibration and --device are for --auto")
    recipe = {name: value for name, value in given.items() if value is not None}
    if head_bits is not None:
        if head_bits not in ("8", "4", "none"):
            raise runner.InputError(f"--head-bits must be 8, 4 or none, got {head_bits!r}")
        recipe["head_bits"] = None if head_bits == "none" else int(head_bits)
    if exclude:
        recipe["modules_to_not_convert"] = recipe.pop("exclude")
    if auto:
        shown = sys.stderr.isatty() and not quiet
        found = tune(
            source,
            target,
            {"compute": compute.value, **recipe},
            loss,
            eval_text,
            calibration,
            argument="SRC",
            device=device,
            progress=shown,
        )
        if not quiet:
            typer.echo(found)
        return
    runner.quiet_libraries(debug=state["debug"])
    done = runner.convert_model(path, target, compute.value, recipe)
    if not quiet:
        before, after = (runner.megabytes(size) for size in (done.bytes_before, done.bytes_after))
        typer.echo(f"{target}: {before} of weights as {after}, in {time.perf_counter() - start:.1f} s")
