"""Damaged GGUF files: a ValueError that names the file and the defect, never a crash and never half a model."""

from __future__ import annotations

import random
import struct
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf_files import write_model

from torch_cpullm.formats.gguf import load_gguf
from torch_cpullm.formats.gguf_reader import GgufFile


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_model(path, "llama")
    return path.read_bytes()


def patched(data: bytes, offset: int, form: str, value: int) -> bytes:
    width = struct.calcsize(form)
    return data[:offset] + struct.pack(form, value) + data[offset + width :]


def after(data: bytes, text: bytes, skip: int = 0) -> int:
    """Offset of the byte that follows the first occurrence of a key or tensor name, plus `skip`."""
    return data.index(text) + len(text) + skip


TENSOR = b"blk.1.ffn_down.weight"  # [64, 96]: after the name come rank u32, dims u64 x 2, type u32, offset u64
FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda d: b"", "not a GGUF file"),
    "not a gguf": (lambda d: b"PK" + d[2:], "starts with b'PKUF'"),
    "version 1": (lambda d: patched(d, 4, "<I", 1), "version 1 is not supported"),
    "big-endian": (lambda d: d[:4] + struct.pack(">I", 3) + d[8:], "big-endian"),
    "tensor count": (lambda d: patched(d, 8, "<Q", 1 << 60), "claims 1152921504606846976 tensors"),
    "key count": (lambda d: patched(d, 16, "<Q", 1 << 61), "claims 2305843009213693952 metadata keys"),
    "key length": (lambda d: patched(d, 24, "<Q", 1 << 62), "at most 65535 are allowed"),
    "value type": (lambda d: patched(d, after(d, b"llama.block_count"), "<I", 77), "unknown value type 77"),
    "array count": (
        lambda d: patched(d, after(d, b"tokenizer.ggml.tokens", 8), "<Q", 1 << 50),
        "tokens.* claims 1125899906842624 elements",
    ),
    "scalar array count": (
        lambda d: patched(d, after(d, b"tokenizer.ggml.token_type", 8), "<Q", 1 << 61),
        "needs 9223372036854775808 bytes",
    ),
    "text not UTF-8": (lambda d: d.replace(b"blk.1.ffn_down", b"blk.1.ffn_\xff\xffwn"), "not UTF-8"),
    "rank": (lambda d: patched(d, after(d, TENSOR), "<I", 9), "has 9 dimensions"),
    "zero dimension": (lambda d: patched(d, after(d, TENSOR, 12), "<Q", 0), "dimension of zero"),
    "overflowing dimensions": (lambda d: patched(d, after(d, TENSOR, 12), "<Q", (1 << 63) + 1), "the file ends at"),
    "ragged row": (lambda d: patched(d, after(d, TENSOR, 4), "<Q", 95), "needs a multiple of 32"),
    "wrong shape": (lambda d: patched(d, after(d, TENSOR, 12), "<Q", 32), r"shape \[32, 96\], the metadata says"),
    "type": (lambda d: patched(d, after(d, TENSOR, 20), "<I", 4), "unknown ggml type 4"),
    "offset past the end": (lambda d: patched(d, after(d, TENSOR, 24), "<Q", 1 << 40), "truncated or corrupt"),
    "offset wraps": (lambda d: patched(d, after(d, TENSOR, 24), "<Q", (1 << 64) - 32), "truncated or corrupt"),
    "offset unaligned": (lambda d: patched(d, after(d, TENSOR, 24), "<Q", 3), "multiple of the alignment"),
    "overlap": (lambda d: patched(d, after(d, TENSOR, 24), "<Q", 0), "overlaps"),
    "duplicate": (lambda d: d.replace(b"blk.1.ffn_down", b"blk.0.ffn_down"), "appears twice"),
    "missing and superfluous": (
        lambda d: d.replace(b"blk.1.ffn_down", b"blk.1.ffn_damn"),
        r"missing: blk\.1\.ffn_down\.weight",
    ),
    "truncated header": (lambda d: d[: len(d) // 20], "truncated|past the end"),
    "truncated data": (lambda d: d[:-64], "truncated or corrupt"),
    "nan scale": (
        lambda d: patched(d, offset_of(d, "blk.0.attn_q.weight"), "<H", 0x7E00),
        "blk.0.attn_q.weight.*must be finite",
    ),
    "nan norm": (
        lambda d: patched(d, offset_of(d, "blk.0.attn_norm.weight"), "<I", 0x7FC00000),
        "input_layernorm.weight holds NaN",
    ),
    "architecture": (lambda d: d.replace(b"llama", b"lzama"), "lzama"),
    "layers": (
        lambda d: patched(d, after(d, b"llama.block_count", 4), "<I", 4_000_000_000),
        "block_count is 4000000000, expected an integer from 1 to 2",
    ),
    "heads": (lambda d: patched(d, after(d, b"llama.attention.head_count", 4), "<I", 0), "."),
    "width": (lambda d: patched(d, after(d, b"llama.embedding_length", 4), "<I", 1 << 31), "embedding_length"),
    "special token": (
        lambda d: patched(d, after(d, b"tokenizer.ggml.eos_token_id", 4), "<I", 288),
        "eos_token_id is 288",
    ),
    "no tokenizer": (lambda d: d.replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.nokens"), "no tokenizer"),
    "bad merge": (lambda d: d.replace(b"h e", b"hhe"), "tokenizer cannot be built"),
}


def offset_of(data: bytes, name: str) -> int:
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(data)
        file.flush()
        return GgufFile(file.name).tensors[name].offset


@pytest.mark.parametrize("name", FILES)
def test_bad_file(name: str, small: bytes, tmp_path: Path) -> None:
    damage, text = FILES[name]
    path = tmp_path / "bad file.gguf"
    path.write_bytes(damage(small))
    with pytest.raises(ValueError, match=text) as error:
        load_gguf(path, progress=False)
    assert "bad file.gguf" in str(error.value)


def test_bad_arguments(small: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(small)
    with pytest.raises(FileNotFoundError):
        load_gguf(tmp_path / "none.gguf")
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16"):
        load_gguf(path, dtype=torch.int8)
    with pytest.raises(ValueError, match="compute must be 'int8', 'bf16' or 'fp32', got 'fast'"):
        load_gguf(path, compute="fast")
    with pytest.raises(TypeError, match="config must be a CpuLlmConfig, got dict"):
        load_gguf(path, config={})  # type: ignore[arg-type]


def test_damaged_bytes_never_crash(small: bytes, tmp_path: Path) -> None:
    """Random bytes, lengths and cuts, mostly in the header: a model or a ValueError, nothing else."""
    generator = random.Random(11)
    path = tmp_path / "fuzz.gguf"
    path.write_bytes(small)
    header = min(tensor.offset for tensor in GgufFile(path).tensors.values())
    table = small.index(b"token_embd.weight") - 8
    outcomes: list[str] = []
    for _ in range(400):
        data = bytearray(small)
        choice = generator.random()
        if choice < 0.15:
            del data[generator.randrange(len(data)) :]
        else:
            for _ in range(generator.choice((1, 1, 2, 8))):
                # The vocabulary is most of the header; the keys before it and the tensor table after it decide more.
                start, end = generator.choice(((0, 700), (table, header), (0, header), (header, len(small))))
                at = generator.randrange(start, end)
                data[at] = generator.choice((0, 1, 0x7F, 0x80, 0xFF, generator.randrange(256), data[at] ^ 1))
        path.write_bytes(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load_gguf(path, progress=False)
            outcomes.append("a model")
        except ValueError as error:
            outcomes.append(str(error))
    assert all("fuzz.gguf" in text for text in outcomes if text != "a model")
    assert 20 < outcomes.count("a model") < 380  # both were seen
