"""The commands ``cpullm eval`` and ``cpullm autotune``; cli.py lists them."""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_options import Compute, ComputeOption, DebugOption, check_group_size, state

if TYPE_CHECKING:
    import torch


class Convention(str, Enum):
    """How a text is cut into windows."""

    plain = "plain"
    llama = "llama"
    sliding = "sliding"


def _read(path: Path, tokenizer: Any) -> torch.Tensor:
    """The tokens of a text file; InputError where it cannot be read."""
    from . import runner
    from .calibration import text_ids

    try:
        return text_ids(path.read_text(encoding="utf-8"), tokenizer)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise runner.InputError(f"{path}: {error}") from error


def eval_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face directory or a .gguf file.")],
    text: Annotated[Path | None, typer.Argument(metavar="[TEXT]", help="A text file.")] = None,
    window: Annotated[int, typer.Option(min=4, metavar="N", help="Tokens per window.")] = 2048,
    convention: Annotated[
        Convention,
        typer.Option(
            help="plain: all of every window; llama: the second half, as llama-perplexity; sliding: what is new."
        ),
    ] = Convention.plain,
    stride: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens from window to window, sliding only.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="Only the text's first N tokens. Default: all.")
    ] = None,
    bos: Annotated[bool, typer.Option(help="Every window's first token is replaced by the begin token.")] = False,
    floating: Annotated[
        bool, typer.Option("--float", help="The float model itself instead of what optimize() makes of it.")
    ] = False,
    reference: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Compare with this model in float: KL, likeliest token, paired loss."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Instead of a text a task of lm-evaluation-harness; may be repeated."),
    ] = None,
    task_path: Annotated[Path | None, typer.Option(metavar="DIR", help="A folder with task files of your own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Only N examples of each task.")] = None,
    bits: Annotated[int | None, typer.Option(metavar="N", help="Bits per weight, 4 or 8; directories only.")] = None,
    group_size: Annotated[
        int | None, typer.Option(callback=check_group_size, metavar="N", help="Weights per scale; directories only.")
    ] = None,
    compute: ComputeOption = Compute.int8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    debug: DebugOption = False,
) -> None:
    """Measure a model on a text: perplexity with its interval and, against another model, KL divergence.

    \b
    Examples:
      cpullm eval model.gguf wiki.txt --reference model.gguf
      cpullm eval ./my-model wiki.txt --window 512 --convention llama --tokens 8192
      cpullm eval ./my-model wiki.txt --convention sliding --stride 256 --float
      cpullm eval ./my-model --task hellaswag --limit 1000
    """  # noqa: D301 (a raw string would lose the mark that keeps these lines apart)
    from . import quality, runner

    if (text is None) == (not task):
        raise runner.InputError("give a text file, or tasks with --task, and not both")
    if stride is not None and convention is not Convention.sliding:
        raise runner.InputError("--stride is for --convention sliding")
    path = runner.find_model(model)
    runner.check_recipe(path, bits=bits, group_size=group_size)
    other = None if reference is None else runner.find_model(reference)
    runner.quiet_libraries(debug=state["debug"])
    if floating:
        tested, tokenizer = runner.load_float(path)
        tested = tested.float()
    else:
        loaded = runner.load_int4(path, bits=bits, group_size=group_size, compute=compute.value)
        tested, tokenizer = loaded.model, loaded.tokenizer
    if task:
        include = None if task_path is None else str(task_path)
        results = quality.harness(tested, tokenizer, task, include_path=include, limit=limit)
        typer.echo(json.dumps(results, indent=2, default=str) if as_json else "\n".join(quality.score_lines(results)))
        return
    assert text is not None
    ids = _read(text, tokenizer)[:tokens]
    if bos and tokenizer.bos_token_id is None:
        raise runner.InputError("--bos: the model's tokenizer has no begin token")
    try:
        found = quality.evaluate(
            tested,
            ids,
            window=window,
            convention=convention.value,
            stride=stride,
            bos=tokenizer.bos_token_id if bos else None,
            reference=None if other is None else runner.load_float(other)[0].float(),
            progress=sys.stderr.isatty(),
        )
    except ValueError as error:
        raise runner.InputError(str(error)) from error
    typer.echo(json.dumps(found.as_dict(), indent=2) if as_json else str(found))


LossOption = Annotated[
    float, typer.Option("--target", min=0.0, metavar="X", help="Allowed rise of the perplexity: 0.01 is 1 %.")
]
EvalOption = Annotated[
    Path | None, typer.Option("--eval", metavar="TEXT", help="Text to measure on. Default: the model's own.")
]
CalibrationOption = Annotated[
    Path | None, typer.Option(metavar="TEXT", help="Text to calibrate with. Default: the model's own.")
]

DeviceOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Where the float model computes, such as cuda. Default: the CPU."),
]


def autotune_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A float directory or a .gguf file.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Where the quantised model and the report go.")],
    loss: LossOption = 0.01,
    eval_text: EvalOption = None,
    calibration: CalibrationOption = None,
    budget_bits: Annotated[
        float,
        typer.Option(min=0.0, metavar="X", help="Most bits per weight of the decoder; 8.5: no limit."),
    ] = 5.0,
    sequences: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Calibration sequences. Default: 64, on a --device 2048.")
    ] = None,
    length: Annotated[int, typer.Option(min=4, metavar="N", help="Tokens per sequence.")] = 512,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of all that is drawn.")] = 0,
    device: DeviceOption = None,
    work: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep finished layers here, so that a stopped run can go on.")
    ] = None,
    compute: ComputeOption = Compute.int8,
    debug: DebugOption = False,
) -> None:
    """Find the cheapest INT4 recipe whose loss is within a target, and save the model and a report.

    From rounding to nearest to AWQ with GPTQ, then in mixed precision with more and more bits, up to --budget-bits;
    each is measured. If none is good enough, the best one is saved, and the report says so.

    \b
    Examples:
      cpullm autotune ./my-model ./my-model-int4
      cpullm autotune ./my-model ./my-model-int4 --budget-bits 8.5
      cpullm autotune ./my-model ./out --target 0.02 --eval held-out.txt --calibration texts.txt --work ./layers
    """  # noqa: D301 (a raw string would lose the mark that keeps these lines apart)
    options: dict[str, Any] = {"budget_bits": budget_bits, "sequences": sequences, "length": length}
    options |= {"seed": seed, "folder": work, "device": device, "progress": sys.stderr.isatty()}
    typer.echo(tune(model, target, {"compute": compute.value}, loss, eval_text, calibration, **options))


def tune(
    source: str,
    target: Path,
    settings: dict[str, Any],
    loss: float,
    eval_text: Path | None,
    calibration: Path | None,
    argument: str = "MODEL",
    **options: Any,
) -> str:
    """Run :func:`torch_cpullm.autotune`, save model, tokenizer and report; returns the report's text, or InputError.

    settings: fields of :class:`torch_cpullm.config.Settings`. argument: what errors call ``source``. options: of
    autotune.
    """
    from . import runner
    from .config import Settings
    from .convert import check_target
    from .tuning import autotune

    path = runner.find_model(source, argument)
    for name, file in (("--eval", eval_text), ("--calibration", calibration)):
        if file is not None and not file.is_file():
            raise runner.InputError(f"{name} {file}: no such file")
    runner.quiet_libraries(debug=state["debug"])
    try:
        config, target = Settings(**settings), check_target(path, target)
        model, tokenizer = runner.load_float(path)
        tuned = autotune(model, tokenizer, loss, eval_text, calibration, config=config, **options)
    except (ValueError, FileExistsError) as error:
        raise runner.InputError(str(error)) from error
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    tuned.save(target)
    return str(tuned)
