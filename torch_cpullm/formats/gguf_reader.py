"""GgufFile: a checked, memory-mapped view of one GGUF file (versions 2 and 3, little-endian).

Layout of the file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md):

    magic "GGUF" | u32 version | u64 tensor count | u64 key count
    per key      u64 length, name, u32 value type, value
    per tensor   u64 length, name, u32 dimension count, u64 dimensions (fastest first), u32 ggml type, u64 offset
    padding to `general.alignment` (32), then the tensor data; offsets count from there

Every count, length, dimension and offset is compared with the size of the file before it is used, so a damaged
file ends in a `ValueError` that names the file and never in a wild read. Reading the SmolLM2 header (98,000
strings) takes about 0.05 s here and 1.9 s with `gguf.GGUFReader`, which is why this reader exists.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

__all__ = ["GgufFile", "GgufTensor", "ggml_type_name"]

_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_ALIGNMENT = 1 << 20
_MAX_DIMS = 4  # GGML_MAX_DIMS
_MAX_NAME_BYTES = 65_535  # of a key or tensor name
_MAX_ARRAY_DEPTH = 4

_STRING, _ARRAY = 8, 9
# metadata value type -> struct letter: u8 i8 u16 i16 u32 i32 f32 bool u64 i64 f64
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_U64 = struct.Struct("<Q")
_U32 = struct.Struct("<I")


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies in the file.

    name       its GGUF name, e.g. "blk.0.attn_q.weight"
    shape      dimensions in PyTorch order (slowest first)
    ggml_type  storage type number (0 F32, 1 F16, 2 Q4_0, 3 Q4_1, 8 Q8_0, 30 BF16, ...)
    offset     first byte, counted from the start of the file
    nbytes     size in bytes
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int
    nbytes: int


def _quant_sizes() -> dict[int, tuple[int, int]]:
    """{ggml type: (elements per block, bytes per block)} of every storage type the gguf package knows."""
    from gguf.constants import GGML_QUANT_SIZES

    return {int(kind): (int(block), int(size)) for kind, (block, size) in GGML_QUANT_SIZES.items()}


def ggml_type_name(ggml_type: int) -> str:
    """The name of a storage type: Q4_0 for 2, and so on; "type 99" for a number the gguf package does not know."""
    from gguf.constants import GGMLQuantizationType

    try:
        return GGMLQuantizationType(ggml_type).name
    except ValueError:
        return f"type {ggml_type}"


class _Cursor:
    """Reads little-endian values from a buffer; running past the end is a ValueError that says what was being read."""

    def __init__(self, buffer: mmap.mmap, size_bytes: int, path: str) -> None:
        self.buffer, self.size, self.path, self.pos = buffer, size_bytes, path, 0

    def fail(self, message: str) -> NoReturn:
        raise ValueError(f"{self.path}: not a valid GGUF file: {message}")

    def need(self, count_bytes: int, what: str) -> int:
        """Claims the next `count_bytes`, returns where they start."""
        start = self.pos
        if count_bytes > self.size - start:
            self.fail(
                f"{what} at byte {start} needs {count_bytes} bytes, the file ends at {self.size} (truncated or corrupt)"
            )
        self.pos = start + count_bytes
        return start

    def u32(self, what: str) -> int:
        return int(_U32.unpack_from(self.buffer, self.need(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack_from(self.buffer, self.need(8, what))[0])

    def text(self, what: str, limit_bytes: int | None = None) -> str:
        length = self.u64(f"the length of {what}")
        if limit_bytes is not None and length > limit_bytes:
            self.fail(f"{what} claims {length} bytes, at most {limit_bytes} are allowed")
        start = self.need(length, what)
        try:
            return self.buffer[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8 ({error.reason} at byte {start + error.start})")

    def value(self, kind: int, what: str, depth: int = 0) -> Any:
        if kind in _SCALARS:
            letter = _SCALARS[kind]
            return struct.unpack_from("<" + letter, self.buffer, self.need(struct.calcsize(letter), what))[0]
        if kind == _STRING:
            return self.text(what)
        if kind == _ARRAY:
            return self.array(what, depth)
        return self.fail(f"{what} has the unknown value type {kind}")

    def array(self, what: str, depth: int) -> list[Any]:
        if depth >= _MAX_ARRAY_DEPTH:
            self.fail(f"{what} nests arrays more than {_MAX_ARRAY_DEPTH} deep")
        kind, count = self.u32(f"the element type of {what}"), self.u64(f"the element count of {what}")
        if kind in _SCALARS:
            width = struct.calcsize(_SCALARS[kind])
            start = self.need(count * width, f"{what} ({count} elements)")
            return list(struct.unpack_from(f"<{count}{_SCALARS[kind]}", self.buffer, start))
        if kind not in (_STRING, _ARRAY):
            self.fail(f"{what} has the unknown element type {kind}")
        if count * 8 > self.size - self.pos:  # each element has at least its own length or header
            self.fail(f"{what} claims {count} elements, more than the rest of the file can hold")
        if kind == _ARRAY:
            return [self.array(what, depth + 1) for _ in range(count)]
        return self.strings(count, what)

    def strings(self, count: int, what: str) -> list[str]:
        """`count` strings in a row: the vocabulary and the merges, hence the tight loop."""
        buffer, pos, size, out, unpack = self.buffer, self.pos, self.size, [], _U64.unpack_from
        try:
            for _ in range(count):
                end = pos + 8 + unpack(buffer, pos)[0]
                if end > size:
                    self.fail(f"a string of {what} at byte {pos} runs past the end of the file ({size} bytes)")
                out.append(buffer[pos + 8 : end].decode("utf-8"))
                pos = end
        except struct.error:
            self.fail(f"a string of {what} at byte {pos} runs past the end of the file ({size} bytes)")
        except UnicodeDecodeError as error:
            self.fail(f"a string of {what} at byte {pos} is not UTF-8 ({error.reason})")
        self.pos = pos
        return out


class GgufFile:
    """One GGUF file, mapped read-only.

    path        as given
    version     2 or 3
    metadata    {key: int, float, bool, str or list of those}
    tensors     {GGUF name: GgufTensor} in file order

    Raises FileNotFoundError or IsADirectoryError for a bad path, ValueError (naming the file and the defect) for
    anything that is not a complete little-endian GGUF file of version 2 or 3.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        with open(self.path, "rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            if size_bytes < 24:
                raise ValueError(f"{self.path}: not a GGUF file: {size_bytes} bytes, the header alone has 24")
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        cursor = _Cursor(buffer, size_bytes, self.path)
        self.version, tensor_count, key_count = self._header(cursor)
        self.metadata = self._metadata(cursor, key_count)
        self.tensors = self._tensor_table(cursor, tensor_count)
        self._bytes = np.frombuffer(buffer, dtype=np.uint8)

    @staticmethod
    def _header(cursor: _Cursor) -> tuple[int, int, int]:
        magic = cursor.buffer[:4]
        if magic != b"GGUF":
            cursor.fail(f"it starts with {magic!r}, expected b'GGUF'")
        cursor.pos = 4
        version = cursor.u32("the version")
        if version not in _VERSIONS:
            if version and version & 0xFFFF == 0:
                cursor.fail("it is big-endian; only little-endian files are read")
            cursor.fail(f"version {version} is not supported (supported: 2 and 3)")
        tensor_count, key_count = cursor.u64("the tensor count"), cursor.u64("the key count")
        rest = cursor.size - cursor.pos
        if tensor_count > rest // 32:  # length 8, one letter, dimension count 4, one dimension 8, type 4, offset 8
            cursor.fail(f"it claims {tensor_count} tensors, more than {cursor.size} bytes can describe")
        if key_count > rest // 13:  # length 8, type 4, value 1
            cursor.fail(f"it claims {key_count} metadata keys, more than {cursor.size} bytes can hold")
        return version, tensor_count, key_count

    @staticmethod
    def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for index in range(count):
            key = cursor.text(f"the name of metadata key {index}", _MAX_NAME_BYTES)
            if key in metadata:
                cursor.fail(f"the metadata key {key!r} appears twice")
            metadata[key] = cursor.value(cursor.u32(f"the type of {key!r}"), f"the value of {key!r}")
        return metadata

    def _tensor_table(self, cursor: _Cursor, count: int) -> dict[str, GgufTensor]:
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            cursor.fail(f"general.alignment is {alignment!r}, expected a power of two up to {_MAX_ALIGNMENT}")
        sizes = _quant_sizes()
        entries = []
        for index in range(count):
            name = cursor.text(f"the name of tensor {index}", _MAX_NAME_BYTES)
            rank = cursor.u32(f"the dimension count of tensor {name!r}")
            if not 1 <= rank <= _MAX_DIMS:
                cursor.fail(f"tensor {name!r} has {rank} dimensions, expected 1 to {_MAX_DIMS}")
            dims = [cursor.u64(f"dimension {axis} of tensor {name!r}") for axis in range(rank)]
            ggml_type = cursor.u32(f"the type of tensor {name!r}")
            offset = cursor.u64(f"the offset of tensor {name!r}")
            if ggml_type not in sizes:
                cursor.fail(f"tensor {name!r} has the unknown ggml type {ggml_type}")
            if 0 in dims:
                cursor.fail(f"tensor {name!r} has a dimension of zero: {dims}")
            block, block_bytes = sizes[ggml_type]
            if dims[0] % block:
                cursor.fail(
                    f"tensor {name!r} has rows of {dims[0]} elements, "
                    f"{ggml_type_name(ggml_type)} needs a multiple of {block}"
                )
            nbytes = dims[0] // block * block_bytes
            for size in dims[1:]:
                nbytes *= size
            if offset % alignment:
                cursor.fail(f"tensor {name!r} starts at offset {offset}, not a multiple of the alignment {alignment}")
            entries.append((name, tuple(reversed(dims)), ggml_type, offset, nbytes))
        data_start = -(-cursor.pos // alignment) * alignment
        return self._placed(cursor, entries, data_start)

    @staticmethod
    def _placed(cursor: _Cursor, entries: list[tuple], data_start: int) -> dict[str, GgufTensor]:
        tensors: dict[str, GgufTensor] = {}
        for name, shape, ggml_type, offset, nbytes in entries:
            if name in tensors:
                cursor.fail(f"tensor {name!r} appears twice")
            start = data_start + offset
            if start + nbytes > cursor.size:
                cursor.fail(
                    f"tensor {name!r} {list(shape)} {ggml_type_name(ggml_type)} occupies bytes {start} to "
                    f"{start + nbytes}, the file ends at {cursor.size} (truncated or corrupt)"
                )
            tensors[name] = GgufTensor(name, shape, ggml_type, start, nbytes)
        end, previous = data_start, ""
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                cursor.fail(f"tensor {tensor.name!r} overlaps tensor {previous!r}")
            end, previous = tensor.offset + tensor.nbytes, tensor.name
        return tensors

    def raw(self, name: str) -> np.ndarray:
        """The stored bytes of one tensor: uint8 [rows, bytes per row], a read-only view of the mapped file."""
        tensor = self.tensors[name]
        rows = 1
        for size in tensor.shape[:-1]:
            rows *= size
        return self._bytes[tensor.offset : tensor.offset + tensor.nbytes].reshape(rows, -1)

    def dequantized(self, name: str) -> np.ndarray:
        """One tensor as float32, shape as in `tensors`, by `gguf.quants.dequantize` (every type it knows).

        Raises ValueError for a storage type the gguf package cannot dequantise.
        """
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        kind = GGMLQuantizationType(tensor.ggml_type)
        raw = self.raw(name)
        views = {"F32": np.float32, "F16": np.float16}
        if kind.name in views:  # gguf expects these already typed
            raw = raw.view(views[kind.name])
        try:
            with np.errstate(all="ignore"):  # a damaged block may overflow; the caller checks the values
                return np.ascontiguousarray(dequantize(raw, kind), dtype=np.float32).reshape(tensor.shape)
        except NotImplementedError as error:
            raise ValueError(
                f"{self.path}: tensor {name!r} has the type {kind.name}, which cannot be dequantised"
            ) from error
