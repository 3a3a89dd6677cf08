"""A trained LoRA adapter as a GGUF file that llama.cpp applies to its base."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ..errors import MeetaraError
from ..params import Shape
from ..quants import adapter_type, stored_bytes
from .gguf_io import Array, TensorPlan, write_gguf

_PEFT_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight\Z")


@dataclass(frozen=True)
class LoraPair:
    """One adapted matrix in GGUF's terms: W + (alpha / rank) * b @ a.

    Attributes:
        name: Name of the base's tensor, such as `blk.0.attn_q.weight`.
        a: fp32 [rank, inputs].
        b: fp32 [outputs, rank].
    """

    name: str
    a: Array
    b: Array


def lora_pairs(weights: Mapping[str, Any], shape: Shape) -> list[LoraPair]:
    """peft's tensors under GGUF names, q and k permuted to GGUF's order of rotary halves.

    The permutation is that of llama.cpp's converter for the llama family; it acts on a matrix's rows, which are b's.

    Raises:
        MeetaraError: A tensor whose module GGUF does not know, or whose partner is missing.
    """
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape.layers)
    parts: dict[str, dict[str, Array]] = {}
    for key, weight in weights.items():
        match = _PEFT_NAME.match(key)
        name = names.get_name(f"{match['module']}.weight", try_suffixes=(".weight",)) if match else None
        if match is None or name is None:
            raise MeetaraError(f"the adapter's tensor {key!r} has no name in GGUF", remedy="train the domain again")
        parts.setdefault(name, {})[match["part"]] = np.asarray(weight, dtype=np.float32)
    pairs = []
    for name, pair in parts.items():
        if set(pair) != {"A", "B"}:
            raise MeetaraError(f"the adapter lacks a half of {name!r}", remedy="train the domain again")
        b = pair["B"]
        if ".attn_q." in name:
            b = _permuted(b, shape.heads)
        elif ".attn_k." in name:
            b = _permuted(b, shape.kv_heads)
        pairs.append(LoraPair(name, pair["A"], b))
    return sorted(pairs, key=lambda pair: _order(pair.name))


def _permuted(b: Array, heads: int) -> Array:
    rows, rank = b.shape
    return b.reshape(heads, 2, rows // heads // 2, rank).swapaxes(1, 2).reshape(rows, rank)


def _order(name: str) -> tuple[int, str]:
    block = re.match(r"blk\.(\d+)\.", name)
    return (int(block[1]) if block else -1, name)


def adapter_tensors(pairs: list[LoraPair], level: str) -> list[TensorPlan]:
    """The tensors of an adapter file at a quantisation level."""
    tensors = []
    for pair in pairs:
        for suffix, values in (("lora_a", pair.a), ("lora_b", pair.b)):
            name = f"{pair.name}.{suffix}"
            kind = adapter_type(level, pair.name, values.shape[1])
            tensors.append(TensorPlan(name, values.shape, kind, partial(np.asarray, values)))
    return tensors


def adapter_bytes(shape: Shape, rank: int, level: str) -> int:
    """Bytes of an adapter's tensors, before it is trained."""
    total = 0
    for name, (outputs, inputs) in shape.matrices.items():
        for row, rows in ((inputs, rank), (rank, outputs)):
            total += stored_bytes(adapter_type(level, f"blk.0.{name}.weight", row), row * rows)
    return total * shape.layers


def write_adapter(
    path: Path,
    shape: Shape,
    pairs: list[LoraPair],
    *,
    level: str,
    alpha: float,
    header: Mapping[str, str | int | float],
) -> list[TensorPlan]:
    """Writes an adapter GGUF (`general.type` = adapter) and returns its tensors.

    Args:
        path: Target.
        shape: Of the base.
        pairs: The adapted matrices.
        level: Quantisation level.
        alpha: LoRA's alpha; llama.cpp scales by alpha / rank.
        header: Further fields, such as `general.name` and our own `meetara.*`.
    """
    kinds = gguf.GGUFValueType
    fields: list[tuple[str, Any, Any, Any]] = [
        (gguf.Keys.General.TYPE, gguf.GGUFType.ADAPTER, kinds.STRING, None),
        (gguf.Keys.Adapter.TYPE, "lora", kinds.STRING, None),
        (gguf.Keys.Adapter.LORA_ALPHA, float(alpha), kinds.FLOAT32, None),
        *typed(header),
    ]
    tensors = adapter_tensors(pairs, level)
    write_gguf(path, shape.architecture, fields, tensors)
    return tensors


def typed(header: Mapping[str, str | int | float]) -> list[tuple[str, Any, Any, Any]]:
    """Header fields with the GGUF type that fits each value."""
    kinds = {str: gguf.GGUFValueType.STRING, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}
    return [(key, value, kinds[type(value)], None) for key, value in header.items()]
