"""The command line: ``cpullm generate``, ``bench``, ``quantize``, ``eval``, ``autotune``, ``plan``,
``doctor``, ``run``.

Exit codes: 0 done, 1 something failed (doctor: something is wrong), 2 wrong arguments or an unusable model,
130 interrupted. ``run`` ends as the program that it starts.
Errors are one line; ``--debug`` shows the traceback. torch and transformers are imported inside the commands only.
"""

from __future__ import annotations

import io
import json
import os
import sys
import textwrap
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from . import __version__
from .cli_options import (
    BitsOption,
    Compute,
    ComputeOption,
    DebugOption,
    GroupOption,
    ModelOption,
    ThreadsOption,
    state,
)
from .cli_plan import plan
from .cli_quality import autotune_command, eval_command
from .cli_quantize import quantize

if TYPE_CHECKING:
    from .launch import ThreadChoice
    from .runner import Loaded, Stopwatch

# typer may use click or a copy of its own: take the base class of its errors from what it exports.
_ClickException: type[Exception] = typer.BadParameter.__mro__[2]

_INTERRUPTED = 130  # 128 + SIGINT, as shells have it

app = typer.Typer(
    name="cpullm",
    help="INT4 inference of Hugging Face language models on CPUs.",
    epilog="Each command explains itself: cpullm generate --help",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


class Memory(str, Enum):
    """Where a program's memory comes from."""

    prefer = "prefer"
    bind = "bind"
    any = "any"


class OpenMP(str, Enum):
    """OpenMP runtime under torch."""

    default = "default"
    intel = "intel"


class Malloc(str, Enum):
    """Memory allocator."""

    default = "default"
    jemalloc = "jemalloc"
    tcmalloc = "tcmalloc"


def _version(value: bool) -> None:
    if value:
        typer.echo(f"torch_cpullm {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


# ---- generate -------------------------------------------------------------------------------------------------------


@app.command(short_help="Answer a prompt with a model in INT4.")
def generate(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help='What to say to the model; "-" reads standard input.')
    ] = None,
    model: ModelOption = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, metavar="N", help="Stop after this many tokens.")
    ] = 128,
    bits: BitsOption = None,
    group_size: GroupOption = None,
    compute: ComputeOption = Compute.int8,
    threads: ThreadsOption = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, metavar="X", help="0 always takes the likeliest token; above, it samples.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, metavar="X", help="Sample among the likeliest tokens of this share.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the sampling.")] = 0,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message for the chat template.")] = None,
    chat: Annotated[bool, typer.Option(help="Use the tokenizer's chat template, if it has one.")] = True,
    compare: Annotated[
        bool | None,
        typer.Option("--compare/--no-compare", help="Afterwards time the same model in bfloat16 (the demo does)."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the text only.")] = False,
    debug: DebugOption = False,
) -> None:
    """Answer a prompt with a model in INT4, and say how fast that went.

    \b
    Examples:
      cpullm generate                                    the SmolLM2 demo, compared with bfloat16
      cpullm generate "Name three rivers." -n 64
      cpullm generate "Hello" --model ./Qwen2.5-0.5B-Instruct --compare
      cpullm generate "Once upon a time" --model story.gguf --no-chat
      cpullm generate - --quiet < question.txt > answer.txt
    """  # noqa: D301 (a raw string would lose the mark that keeps these lines apart)
    from . import runner

    path = runner.find_model(model)  # wrong arguments are reported before torch is loaded
    runner.check_recipe(path, bits=bits, group_size=group_size)
    text = runner.DEMO_PROMPT if prompt is None else sys.stdin.read() if prompt == "-" else prompt
    isa, choice = _prepare(threads)
    loaded = runner.load_int4(path, bits=bits, group_size=group_size, compute=compute.value)
    inputs = runner.encode(loaded.tokenizer, text, system=system, chat=chat)
    if not quiet:
        shown = textwrap.shorten(text, 300, placeholder=" ...")
        typer.echo(textwrap.fill(shown, runner.WIDTH, initial_indent="> ", subsequent_indent="  "))
    out = runner.Wrapper(wrap=not quiet)
    watch = runner.Stopwatch(runner.text_streamer(loaded.tokenizer, out))
    try:
        runner.generate(
            loaded, inputs, max_new_tokens=max_new_tokens, watch=watch, temperature=temperature, top_p=top_p, seed=seed
        )
    except KeyboardInterrupt:
        out.end_line()
        if not quiet:
            _summary(loaded, watch, inputs["input_ids"].shape[-1], isa, choice, compute.value)
        raise
    out.end_line()
    if quiet:
        return
    _summary(loaded, watch, inputs["input_ids"].shape[-1], isa, choice, compute.value)
    if compare or (compare is None and model is None and prompt is None):
        before = (loaded.label, loaded.model_bytes, watch.token_s)
        plain = runner.load_bf16(path, loaded)
        again = runner.Stopwatch()
        tokens = min(max(len(watch.arrivals), 2), 24)
        runner.generate(plain, inputs, max_new_tokens=tokens, to_the_end=True, watch=again)
        typer.echo(_comparison(*before, plain, again.token_s))


def _prepare(threads: int | None) -> tuple[str, ThreadChoice]:
    """(ISA level, threads) in force; a bad CPULLM_ISA ends here, before a model is loaded."""
    from . import launch, runner
    from .doctor import first_line

    runner.quiet_libraries(debug=state["debug"])
    choice = launch.apply_default_threads() if threads is None else launch.set_threads(threads)
    from . import ops

    try:
        return ops.isa(), choice
    except RuntimeError as error:
        raise runner.InputError(first_line(error)) from error


def _summary(loaded: Loaded, watch: Stopwatch, prompt: int, isa: str, choice: ThreadChoice, compute: str) -> None:
    """The numbers under the text, one line each."""
    from . import runner
    from .doctor import cpu_model

    mb = runner.megabytes
    lines = [
        (
            "model",
            f"{loaded.name}, {runner.millions(loaded.parameters)} weights in {mb(loaded.model_bytes)} ({loaded.label})",
        )
    ]
    if watch.first_token_s is not None:
        start = f"; {watch.process_s:.1f} s after the program started" if watch.process_s is not None else ""
        speed = f"{watch.first_token_s * 1e3:.0f} ms ({prompt / watch.first_token_s:.0f} tok/s)"
        lines.append(("load", f"{loaded.load_s:.2f} s"))
        lines.append(("prompt", f"{prompt} tokens, first token after {speed}{start}"))
    if watch.token_s is not None:
        speed = f", {1 / watch.token_s:.1f} tok/s (median {watch.token_s * 1e3:.2f} ms per token)"
        lines.append(("decode", f"{len(watch.arrivals)} tokens{speed}"))
    resident, anonymous = runner.memory_bytes()
    lines.append(("memory", f"{mb(resident)} resident, {mb(anonymous)} of it anonymous (not file pages)"))
    lines.append(("cpu", f"{cpu_model()}, {isa} level, {compute} compute"))
    lines.append(("threads", f"{choice.count} ({choice.reason})"))
    typer.echo("")
    for label, text in lines:
        typer.echo(f"{label:<8} {text}")


def _comparison(label: str, size: int, token_s: float | None, plain: Loaded, plain_s: float | None) -> str:
    """The demo's last line: "INT4 172 tok/s vs bf16 30 tok/s: 5.7x faster, 98 MB vs 270 MB of weights"."""
    from .runner import megabytes as mb

    sizes = f"{mb(size)} vs {mb(plain.model_bytes)} of weights"
    if token_s is None or plain_s is None:
        return f"{label} vs {plain.label}: too few tokens to compare speeds, {sizes}"
    ratio = plain_s / token_s
    words = f"{ratio:.1f}x faster" if ratio >= 1 else f"{1 / ratio:.1f}x slower"
    return f"{label} {_rate(token_s)} tok/s vs {plain.label} {_rate(plain_s)} tok/s: {words}, {sizes}"


def _rate(token_s: float) -> str:
    return f"{1 / token_s:.0f}" if token_s < 0.1 else f"{1 / token_s:.1f}"


# ---- bench ----------------------------------------------------------------------------------------------------------


@app.command(short_help="Measure tokens/s as llama-bench does.")
def bench(
    model: ModelOption = None,
    pp: Annotated[
        int, typer.Option(min=0, metavar="N", help="Prompt tokens to process; 0 leaves this test out.")
    ] = 512,
    tg: Annotated[int, typer.Option(min=0, metavar="N", help="Tokens to generate; 0 leaves this test out.")] = 64,
    reps: Annotated[int, typer.Option("--reps", "-r", min=1, metavar="N", help="Repetitions of each test.")] = 5,
    bits: BitsOption = None,
    group_size: GroupOption = None,
    compute: ComputeOption = Compute.int8,
    threads: ThreadsOption = None,
    compare: Annotated[bool, typer.Option(help="Also measure the same model in bfloat16.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    debug: DebugOption = False,
) -> None:
    """Measure prompt processing (pp) and token generation (tg) in tokens/s, as llama-bench does.

    ppN is one forward pass over N random tokens; tgN is N tokens of greedy generate(). Mean and standard deviation.

    \b
    Examples:
      cpullm bench                                       pp512 and tg64 of the SmolLM2 demo
      cpullm bench --model ./Qwen2.5-0.5B --threads 4 --compare
      cpullm bench --pp 0 --tg 128 --reps 3 --json > rows.json
    """  # noqa: D301 (a raw string would lose the mark that keeps these lines apart)
    from . import bench as benchmark
    from . import runner

    if pp == 0 and tg == 0:
        raise runner.InputError("--pp and --tg are both 0: nothing to measure")
    path = runner.find_model(model)
    runner.check_recipe(path, bits=bits, group_size=group_size)
    isa, choice = _prepare(threads)
    loaded = runner.load_int4(path, bits=bits, group_size=group_size, compute=compute.value, tokenizer=False)
    settings = {"threads": choice.count, "pp": pp, "tg": tg, "reps": reps}
    rows = benchmark.run(loaded, backend=f"{isa} {compute.value}", **settings)
    if compare:
        rows += benchmark.run(runner.load_bf16(path, loaded), backend="hf bf16", **settings)
    if as_json:
        import torch

        from .doctor import cpu_model

        machine = {"cpu": cpu_model(), "isa": isa, "torch": str(torch.__version__)}
        typer.echo(json.dumps([{**row.as_dict(), **machine} for row in rows], indent=2))
    else:
        typer.echo(benchmark.table(rows))


# ---- quantize, eval, autotune ---------------------------------------------------------------------------------------

app.command(short_help="Convert a model to INT4 and save it.")(quantize)
app.command("eval", short_help="Measure perplexity, KL divergence and agreement on a text.")(eval_command)
app.command("autotune", short_help="Find the cheapest INT4 recipe within a loss.")(autotune_command)


# ---- doctor ---------------------------------------------------------------------------------------------------------


@app.command(short_help="Show what this machine offers and what is used.")
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    bandwidth: Annotated[bool, typer.Option(help="Measure memory bandwidth (about two seconds).")] = True,
    debug: DebugOption = False,
) -> None:
    """Show what this machine offers and what torch_cpullm uses of it: start here when it is slow.

    CPU and instruction sets, threads and why that many, container limits, OpenMP runtimes, memory bandwidth (which
    bounds tokens/s: a model of 1 GB at 40 GB/s gives at most 40 tok/s), versions. Exit code 1 if something is wrong.

    \b
    Examples:
      cpullm doctor
      CPULLM_ISA=avx2 cpullm doctor                      the same machine capped at AVX2
      cpullm doctor --json --no-bandwidth
    """  # noqa: D301 (a raw string would lose the mark that keeps these lines apart)
    from dataclasses import asdict

    from . import doctor as diagnosis

    found = diagnosis.collect(measure=bandwidth)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
    else:
        diagnosis.render(found)
    raise typer.Exit(found.exit_code)


# ---- run ------------------------------------------------------------------------------------------------------------


@app.command(
    short_help="Start a Python program bound to one NUMA node.", context_settings={"allow_interspersed_args": False}
)
def run(
    target: Annotated[str, typer.Argument(metavar="SCRIPT", help='The program; "-" reads it from standard input.')],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="ARGS", help="Its own arguments.")] = None,
    module: Annotated[bool, typer.Option("-m", help="SCRIPT is the name of a module, as in python -m.")] = False,
    threads: Annotated[
        int | None,
        typer.Option("--threads", "-t", min=1, metavar="N", help="Threads. Default: OMP_NUM_THREADS, or one per core."),
    ] = None,
    cores: Annotated[
        str | None, typer.Option(metavar="LIST", help="CPUs to run on, as taskset numbers them: 0-7,16.")
    ] = None,
    node: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="NUMA node. Default: the one with the most cores.")
    ] = None,
    memory: Annotated[
        Memory, typer.Option(help="prefer: of the same node while it has some; bind: only that; any: as it comes.")
    ] = Memory.prefer,
    openmp: Annotated[OpenMP, typer.Option(help="intel: libiomp5 in the place of torch's libgomp.")] = OpenMP.default,
    malloc: Annotated[Malloc, typer.Option(help="Memory allocator.")] = Malloc.default,
    nproc: Annotated[
        int | None, typer.Option(min=1, max=64, metavar="N", help="Ranks of torch.distributed, as torchrun has them.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Do not say what was done.")] = False,
    debug: DebugOption = False,
) -> None:
    """Start a Python program on the cores and the memory of one NUMA node, with one thread per core.

    Options go before SCRIPT; all that follows it is the program's. The program replaces this command: its exit status
    and signals are its own. With --nproc N there are N of it, each bound to a node, or to an even part of the cores.

    \b
    Examples:
      cpullm run serve.py --port 8000
      cpullm run --node 1 --threads 8 -m torch_cpullm bench
      cpullm run --cores 0-7 --openmp intel --malloc jemalloc chat.py
      cpullm run --nproc 2 tutorials/ranks.py ./my-model
    """  # noqa: D301 (a raw string would lose the mark that keeps these lines apart)
    from . import run as launcher

    words = launcher.command(target, arguments or [], module=module)
    rank = None if nproc is None else launcher.rank_of(nproc, os.environ)
    options = launcher.Options(threads, cores, node, memory.value, openmp.value, malloc.value, rank)
    if nproc is not None and rank is None:
        for number in range(nproc):  # what does not fit is said once
            launcher.decide(replace(options, rank=(number, nproc)))
        given = {"--threads": threads, "--cores": cores, "--node": node, "--memory": memory.value}
        given |= {"--openmp": openmp.value, "--malloc": malloc.value, "--nproc": nproc}
        own = [word for name, value in given.items() if value is not None for word in (name, str(value))]
        own += ["--quiet"] * quiet + ["-m"] * module
        words = launcher.command("torch_cpullm", ["run", *own, "--", target, *(arguments or [])], module=True)
        raise typer.Exit(launcher.ranks(words, nproc))
    plan = launcher.decide(options)
    line = launcher.bind(plan, options)
    if not quiet:
        typer.echo(line, err=True)
        for note in plan.notes:
            _warn(note)
    launcher.become(words, plan)


# ---- plan -----------------------------------------------------------------------------------------------------------

app.command(short_help="Predict what several sockets gain.")(plan)


# ---- entry point ----------------------------------------------------------------------------------------------------


def _say(text: str, color: str = typer.colors.RED) -> None:
    """One coloured line on standard error (plain in a pipe, or where NO_COLOR is set)."""
    typer.secho(" ".join(text.split()), err=True, fg=color, color=False if "NO_COLOR" in os.environ else None)


def _warn(message: Warning | str, *_: object) -> None:
    """Stands in for warnings.showwarning: one line, without the place in the code."""
    _say(f"warning: {message}", typer.colors.YELLOW)


def _fail(error: Exception, code: int, *, hint: str = "") -> int:
    """Say what went wrong (with ``--debug`` the traceback too); returns ``code``."""
    from .doctor import first_line

    if state["debug"]:
        traceback.print_exception(error)
    _say(f"error: {first_line(error)}{'' if state['debug'] else hint}")
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on ``arguments`` (default: the process's own); returns the exit code."""
    from .runner import InputError

    state["debug"] = False
    for stream in (sys.stdout, sys.stderr):  # a model may say what the terminal cannot show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn  # type: ignore[assignment]
            code = app(args=None if arguments is None else list(arguments), prog_name="cpullm", standalone_mode=False)
        sys.stdout.flush()
        if code == _INTERRUPTED:  # newer typers swallow KeyboardInterrupt and return this
            _say("interrupted")
        return code if isinstance(code, int) else 0
    except _ClickException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "cpullm"
        _say(f"{command}: {error.format_message()} (see {command} --help)")  # type: ignore[attr-defined]
        return 2
    except InputError as error:
        return _fail(error, 2)
    except (KeyboardInterrupt, typer.Abort):
        _say("interrupted")
        return _INTERRUPTED
    except BrokenPipeError:  # "| head": keep the interpreter's own flush at exit from failing as well
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # noqa: BLE001 (the last resort of a command line: one line, and --debug)
        return _fail(error, 1, hint=" (--debug shows where)")
