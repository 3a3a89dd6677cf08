"""Reading and writing GGUF files tensor by tensor, on top of the `gguf` package."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ..errors import MeetaraError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to write.

    Attributes:
        name: GGUF name.
        shape: As in numpy and torch: rows first.
        kind: GGUF type, such as F16 or Q5_0.
        make: Returns the values in fp32; called when the tensor's turn comes.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    make: Callable[[], Array]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a file must have; `kind` None where llama.cpp chooses the type."""

    name: str
    shape: tuple[int, ...]
    kind: str | None


class _Reader(gguf.GGUFReader):
    """gguf's reader with a faster `_get`: a header with a vocabulary makes half a million calls of it.

    Slicing a memory map makes a memory map each time, which is most of the eight seconds; slicing an array over the
    same bytes does not.
    """

    _bytes: Array | None = None

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        if self._bytes is None:
            self._bytes = np.asarray(self.data)
        kind = np.dtype(dtype)
        found = self._bytes[offset : offset + kind.itemsize * int(count)].view(kind)[: int(count)]
        return found.view(kind.newbyteorder(self.byte_order if override_order is None else override_order))


def open_gguf(path: Path) -> gguf.GGUFReader:
    """A reader; MeetaraError where the file is none, or cut short."""
    try:
        return _Reader(path)
    except FileNotFoundError:
        raise MeetaraError("no such file", where=path, remedy="run again") from None
    except (ValueError, IndexError, OverflowError, KeyError) as error:
        raise MeetaraError(f"damaged or no GGUF file ({error})", where=path, remedy="remove it and run again") from None


def tensors_like(path: Path) -> list[TensorSpec]:
    """Names and shapes of a file's tensors, which every quantisation of it must have."""
    return [TensorSpec(t.name, tuple(int(n) for n in reversed(t.shape)), None) for t in open_gguf(path).tensors]


def fields_of(reader: gguf.GGUFReader, *, without: Sequence[str] = ()) -> Iterator[tuple[str, Any, Any, Any]]:
    """Key, value, type and item type of every header field, leaving out those in `without`."""
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in without:
            continue
        yield key, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None


def write_gguf(
    path: Path, architecture: str, fields: Sequence[tuple[str, Any, Any, Any]], tensors: Sequence[TensorPlan]
) -> str:
    """Writes a GGUF file holding one tensor in memory at a time.

    Returns:
        sha256 over every tensor's name, shape, type and bytes: equal for equal weights, whatever the header says.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    writer = gguf.GGUFWriter(path, architecture)
    with contextlib.closing(writer):
        for key, value, kind, item_kind in fields:
            if key != gguf.Keys.General.ARCHITECTURE:  # the writer has put it there
                writer.add_key_value(key, value, kind, item_kind)
        for tensor in tensors:
            kind = gguf.GGMLQuantizationType[tensor.kind]
            block, size = gguf.GGML_QUANT_SIZES[kind]
            elements = int(np.prod(tensor.shape))
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), elements // block * size, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            values = tensor.make()
            if not np.isfinite(values).all():
                raise MeetaraError(f"the tensor {tensor.name} holds values that are no numbers", where=path.name)
            data = encode(values, tensor.kind)
            digest.update(f"{tensor.name} {tensor.shape} {tensor.kind}\n".encode())
            digest.update(data.tobytes())
            writer.write_tensor_data(data)
    return digest.hexdigest()


def encode(values: Array, kind: str) -> Array:
    """fp32 values as the bytes of a GGUF type."""
    if kind == "F32":
        return np.ascontiguousarray(values, dtype=np.float32)
    return gguf.quants.quantize(np.ascontiguousarray(values, dtype=np.float32), gguf.GGMLQuantizationType[kind])


def decode(tensor: gguf.ReaderTensor) -> Array:
    """A tensor's values in fp32, rows first."""
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return values.reshape([int(n) for n in reversed(tensor.shape)])
