"""Base plus adapter as one standalone model, tensor by tensor, without a merged model in memory."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import gguf

from ..errors import MeetaraError
from .adapter import LoraPair, typed
from .convert import fields_architecture
from .gguf_io import Array, TensorPlan, decode, fields_of, open_gguf, write_gguf


def merge(
    base_f16: Path,
    pairs: list[LoraPair],
    target: Path,
    *,
    alpha: float,
    header: Mapping[str, str | int | float],
) -> None:
    """Writes W + (alpha / rank) * b @ a for every adapted matrix of `base_f16`, and the others as they are.

    Raises:
        MeetaraError: The adapter has a matrix that the base has not, or one of another shape.
    """
    reader = open_gguf(base_f16)
    deltas = {pair.name: pair for pair in pairs}
    tensors = []
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        pair = deltas.pop(tensor.name, None)
        if pair and (pair.b.shape[0], pair.a.shape[1]) != shape:
            raise MeetaraError(
                f"the adapter's {tensor.name} is {pair.b.shape[0]} x {pair.a.shape[1]}, the base's "
                + " x ".join(map(str, shape)),
                where=base_f16,
                remedy="the adapter belongs to another base; train the domain again",
            )
        make = partial(_merged, tensor, pair, alpha) if pair else partial(decode, tensor)
        tensors.append(TensorPlan(tensor.name, shape, tensor.tensor_type.name, make))
    if deltas:
        raise MeetaraError(
            f"the base has no {sorted(deltas)[0]!r}", where=base_f16, remedy="the adapter belongs to another base"
        )
    fields = [*fields_of(reader, without=tuple(header)), *typed(header)]
    write_gguf(target, fields_architecture(reader), fields, tensors)


def _merged(tensor: gguf.ReaderTensor, pair: LoraPair, alpha: float) -> Array:
    return decode(tensor) + (alpha / pair.a.shape[0]) * (pair.b @ pair.a)
