"""The peers that `make peers` installs: where they are, and their own forms of the models.

Converted models are kept in .peers/models, so that a second run starts at once; remove the folder to free its space.

    .peers/bin/python -m benchmarks.peers llama.cpp SOURCE FORM TARGET THREADS      # run by `prepare`, as is
    .peers/bin/python -m benchmarks.peers openvino SOURCE GROUP TARGET THREADS
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from . import shapes

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / ".peers"
PYTHON = PEERS / "bin" / "python"
TORCHAO = PEERS / "torchao"
LLAMA_AVX2 = PEERS / "llama_avx2"  # llama.cpp for CPUs without AVX-512
CONVERTER = PEERS / "llama.cpp" / "convert_hf_to_gguf.py"
MODELS = PEERS / "models"
GIB = 1 << 30
EXPORT_BYTES = 2.5  # peak memory of OpenVINO's conversion per weight, measured
HINT = "not installed: make peers"
PACKAGES = {"llama.cpp": ("llama_cpp",), "openvino": ("openvino", "optimum/intel")}


class Missing(Exception):
    """An engine cannot run; the message is one line for the table."""


def missing(engine: str) -> str | None:
    """Why ``engine`` cannot run, in one line; None where it is installed."""
    if engine == "torchao":
        found = (TORCHAO / "torchao").is_dir() or importlib.util.find_spec("torchao") is not None
    else:
        site = next(iter(PEERS.glob("lib/python3*/site-packages")), PEERS)
        found = all((site / package).is_dir() for package in PACKAGES.get(engine, ()))
        found = found and (engine not in PACKAGES or PYTHON.exists())
    return None if found else HINT


def prepare(
    engine: str, model: str, *, form: str | None, group: int | None, threads: int, weights: float, available: int
) -> tuple[Path, int | None]:
    """The peer's own form of ``model`` and its group, made in processes of their own where it is not there yet.

    form: llama.cpp's Q4_0 or Q4_K_M; group: OpenVINO's, halved until it fits the model; weights: their number;
    available: bytes of memory.
    """
    MODELS.mkdir(parents=True, exist_ok=True)
    if engine == "llama.cpp":
        assert form
        return _gguf(model, form, threads), 32 if form == "Q4_0" else None
    assert group
    target = MODELS / f"{_slug(model)}-openvino-g{group}"
    if not target.exists():
        needed = EXPORT_BYTES * weights + GIB
        if needed > available:
            raise Missing(f"its conversion needs about {needed / GIB:.0f} GiB of memory")
        source = _hf_folder(model)
        _make(target, [_convert("openvino", source, str(group), threads)])
        if source.parent == MODELS:
            shutil.rmtree(source)
    return target, int((target / "group").read_text())


def _convert(engine: str, source: Path, kind: str, threads: int) -> list[str]:
    return [str(PYTHON), "-m", "benchmarks.peers", engine, str(source), kind, "{}", str(threads)]


def _gguf(model: str, form: str, threads: int) -> Path:
    target = MODELS / f"{_slug(model)}-{form}.gguf"
    if target.exists():
        return target
    if model in shapes.SHAPES:
        from . import gguf_shapes

        print(f"writing {target.relative_to(ROOT)}", file=sys.stderr)
        partial = target.with_suffix(".partial")
        try:
            gguf_shapes.write(model, form, partial)
        except ValueError as error:
            raise Missing(str(error)) from None
        partial.rename(target)
        return target
    source = shapes.find(model)
    if source.is_dir():
        converted = MODELS / f"{_slug(model)}.gguf"
        if not converted.exists():
            command = [str(PYTHON), str(CONVERTER), str(source), "--outfile", "{}", "--outtype", "bf16"]
            _make(converted, [command])
        source = converted
    _make(target, [_convert("llama.cpp", source, form, threads)])
    return target


def _hf_folder(model: str) -> Path:
    """A folder with the model as Hugging Face stores it, written where there is none."""
    if model not in shapes.SHAPES:
        found = shapes.find(model)
        if found.is_dir():
            return found
    target = MODELS / f"{_slug(model)}-hf"
    if not target.exists():
        _make(target, [[sys.executable, "-m", "benchmarks.shapes", model, "{}"]])
    return target


def _make(target: Path, commands: Sequence[Sequence[str]]) -> None:
    """Run ``commands`` that write ``{}``, which becomes ``target`` when all is well; Missing where one fails."""
    partial = target.with_name(target.name + ".partial")
    print(f"writing {target.relative_to(ROOT)}", file=sys.stderr)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
    for command in commands:
        filled = [str(partial) if part == "{}" else part for part in command]
        done = subprocess.run(filled, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
            raise Missing(f"cannot convert: {last[:160]}")
    partial.rename(target)


def _slug(model: str) -> str:
    """A file name for a model; of a user's own also from its place and date."""
    if model in shapes.SHAPES or model == shapes.REAL:
        return model
    path = shapes.find(model).resolve()
    mark = hashlib.sha256(f"{path} {path.stat().st_mtime_ns}".encode()).hexdigest()[:8]
    return f"{path.stem}-{mark}"


def main() -> None:
    engine, source, kind, target, threads = sys.argv[1:]
    if engine == "llama.cpp":
        from . import llamacpp

        llamacpp.quantize(source, kind, target, int(threads))
    else:
        from . import openvino_peer

        openvino_peer.export(Path(source), Path(target), int(kind))


if __name__ == "__main__":
    main()
