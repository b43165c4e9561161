"""The peer llama.cpp through llama-cpp-python's bindings of its C interface, run by the peers' interpreter.

At its best: weights repacked and in huge pages (no file mapping; glibc's tunable is set by bench_models), and prompt
and generation each with flash attention on and off, of which bench_models takes the faster. Tokens are random and
nothing is sampled, as in llama-bench. For bench_kld, in a process of its own:

    .peers/bin/python -m benchmarks.llamacpp tokens FILE.gguf TEXT OUT WINDOW    # JSON
    .peers/bin/python -m benchmarks.llamacpp logits FILE.gguf IDS OUT BEGIN END    # float32 of positions BEGIN .. END
"""

from __future__ import annotations

import ctypes
import json
import random
import sys
from pathlib import Path
from typing import Any

import llama_cpp as llama

FLASH = {"on": llama.LLAMA_FLASH_ATTN_TYPE_ENABLED, "off": llama.LLAMA_FLASH_ATTN_TYPE_DISABLED}
BATCH = 2048


@llama.llama_log_callback
def _quiet(level: int, text: bytes, _: Any) -> None:
    if level == 4:  # an error
        print(text.decode(errors="replace"), end="")


def start() -> None:
    """Initialise the library; only its errors are printed."""
    llama.llama_log_set(_quiet, ctypes.c_void_p(0))
    llama.llama_backend_init()


def quantize(source: str, form: str, target: str, threads: int) -> None:
    """Quantise a GGUF file of any type to ``form``, Q4_0 or Q4_K_M, as llama-quantize does."""
    start()
    params = llama.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{form}")
    params.allow_requantize = True
    if llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp cannot quantise {source} to {form}")


class Engine:
    """A loaded GGUF file."""

    ways = len(FLASH)

    def __init__(self, path: Path, threads: int) -> None:
        start()
        params = llama.llama_model_default_params()
        params.n_gpu_layers = 0
        params.load_mode = llama.LLAMA_LOAD_MODE_NONE
        self.model = llama.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self.threads = threads
        self.vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.version = f"llama-cpp-python {llama.__version__}"
        self.weight_bytes, self.weights = streamed(path)
        self._contexts: dict[str, Any] = {}  # by way, as large as the first request says

    def run(self, request: dict[str, Any], clock: Any) -> None:
        """A sequence in two contexts, with flash attention on and off, which take turns until the clock is done.

        The seed's parity says which is first.
        """
        depth, pp, batch = (request[key] for key in ("depth", "pp", "batch"))
        rng = random.Random(request["seed"])
        ways = sorted(FLASH, reverse=request["seed"] % 2 == 0)
        buffer = llama.llama_batch_init(BATCH, 0, 1)
        try:
            for way in ways:
                if way not in self._contexts:
                    self._contexts[way] = self._context(batch, request["room"], FLASH[way])
                context = self._contexts[way]
                llama.llama_memory_clear(llama.llama_get_memory(context), False)
                self._decode(context, buffer, rng, range(depth), batch)
                clock.start()
                self._decode(context, buffer, rng, range(depth, depth + pp), batch)
                clock.tick(way)
            ends = dict.fromkeys(ways, depth + pp)
            while not clock.done:
                way = ways[0]
                self._decode(self._contexts[way], buffer, rng, range(ends[way], ends[way] + 1), batch)
                ends[way] += 1
                if clock.tick(way):
                    ways.reverse()
        finally:
            llama.llama_batch_free(buffer)

    def _context(self, batch: int, room: int, flash: int) -> Any:
        params = llama.llama_context_default_params()
        params.n_ctx = batch * ((room + 255) // 256 * 256)
        params.n_batch = BATCH
        params.n_ubatch = 512
        params.n_seq_max = batch
        params.n_threads = params.n_threads_batch = self.threads
        params.flash_attn_type = flash
        params.no_perf = True
        context = llama.llama_init_from_model(self.model, params)
        if not context:
            raise RuntimeError("llama.cpp cannot make a context of this size")
        return context

    def _decode(self, context: Any, buffer: Any, rng: random.Random, positions: range, batch: int) -> None:
        """Random tokens at ``positions`` of every sequence; logits of each one's last."""
        todo = [(sequence, position) for sequence in range(batch) for position in positions]
        if len(positions) == 1:
            todo.sort(key=lambda pair: pair[1])
        for first in range(0, len(todo), BATCH):
            part = todo[first : first + BATCH]
            buffer.n_tokens = len(part)
            for index, (sequence, position) in enumerate(part):
                buffer.token[index] = rng.randrange(self.vocab)
                buffer.pos[index] = position
                buffer.n_seq_id[index] = 1
                buffer.seq_id[index][0] = sequence
                buffer.logits[index] = position == positions[-1]
            if llama.llama_decode(context, buffer):
                raise RuntimeError("llama_decode failed")
        llama.llama_synchronize(context)


def write_tokens(path: Path, text: Path, out: Path, window: int) -> None:
    """Tokens of a text as llama-perplexity reads them: every window begins with the begin token if the model asks."""
    engine = Engine(path, 1)
    vocab = llama.llama_model_get_vocab(engine.model)
    begins = bool(llama.llama_vocab_get_add_bos(vocab))
    data = text.read_bytes()
    tokens = (llama.llama_token * (len(data) + 1))()
    count = llama.llama_tokenize(vocab, data, len(data), tokens, len(tokens), begins, False)
    if count < 0:
        raise RuntimeError("llama_tokenize failed")
    ids = list(tokens[:count])
    if begins:
        for first in range(0, count, window):
            ids[first] = llama.llama_vocab_bos(vocab)
    out.write_text(json.dumps(ids))


def write_logits(path: Path, asked: Path, out: Path, begin: int, end: int) -> None:
    """Logits of one window of ids, of positions ``begin`` to ``end`` - 1, float32 [positions, vocabulary]."""
    engine, ids = Engine(path, 1), json.loads(asked.read_text())
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = len(ids)
    params.n_ubatch = 512
    params.n_threads = params.n_threads_batch = 1
    context = llama.llama_init_from_model(engine.model, params)
    if not context:
        raise RuntimeError("llama.cpp cannot make a context of this size")
    buffer = llama.llama_batch_init(len(ids), 0, 1)
    buffer.n_tokens = len(ids)
    for index, token in enumerate(ids):
        buffer.token[index], buffer.pos[index] = token, index
        buffer.n_seq_id[index], buffer.seq_id[index][0] = 1, 0
        buffer.logits[index] = begin <= index < end
    if llama.llama_decode(context, buffer):
        raise RuntimeError("llama_decode failed")
    size = (end - begin) * engine.vocab
    found = ctypes.cast(llama.llama_get_logits(context), ctypes.POINTER(ctypes.c_float * size)).contents
    out.write_bytes(found)


def streamed(path: Path) -> tuple[int, int]:
    """Bytes and number of the weights that every token reads: all matrices but an embedding that is not the head."""
    import gguf

    tensors = gguf.GGUFReader(path).tensors
    untied = any(tensor.name == "output.weight" for tensor in tensors)
    read = [t for t in tensors if len(t.shape) > 1 and not (untied and t.name == "token_embd.weight")]
    return sum(int(t.n_bytes) for t in read), sum(int(t.n_elements) for t in read)


if __name__ == "__main__":
    what, *given = sys.argv[1:]
    files = [Path(name) for name in given[:3]]
    {"tokens": write_tokens, "logits": write_logits}[what](*files, *map(int, given[3:]))
