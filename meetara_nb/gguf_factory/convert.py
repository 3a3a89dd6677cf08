"""The base as an F16 GGUF file, from which every quantisation is made."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import gguf

from ..quants import LEVELS
from .gguf_io import TensorPlan, decode, fields_of, open_gguf, write_gguf

# They describe the source's own quantisation.
QUANT_KEYS = (gguf.Keys.General.FILE_TYPE, gguf.Keys.General.QUANTIZATION_VERSION)


def f16_base(source: Path, target: Path) -> str:
    """Writes the model in `source` (a GGUF of any type) to `target` as F16, vectors as F32, header kept.

    Returns:
        The hash of its weights (see `write_gguf`), by which adapters name their base.
    """
    reader = open_gguf(source)
    fields = list(fields_of(reader, without=QUANT_KEYS))
    fields.append((gguf.Keys.General.FILE_TYPE, LEVELS["F16"], gguf.GGUFValueType.UINT32, None))
    tensors = [
        TensorPlan(
            tensor.name,
            tuple(int(n) for n in reversed(tensor.shape)),
            "F32" if len(tensor.shape) == 1 else "F16",
            partial(decode, tensor),
        )
        for tensor in reader.tensors
    ]
    return write_gguf(target, fields_architecture(reader), fields, tensors)


def fields_architecture(reader: gguf.GGUFReader) -> str:
    return str(reader.fields[gguf.Keys.General.ARCHITECTURE].contents())
