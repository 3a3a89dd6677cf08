"""Quantisation levels: what llama.cpp calls them, and which tensor types an adapter gets at each."""

from __future__ import annotations

# Level -> llama.cpp's `llama_ftype`. Levels that need an importance matrix are not offered.
LEVELS: dict[str, int] = {
    "F32": 0,
    "F16": 1,
    "BF16": 32,
    "Q8_0": 7,
    "Q6_K": 18,
    "Q5_K_M": 17,
    "Q5_K_S": 16,
    "Q5_1": 9,
    "Q5_0": 8,
    "Q4_K_M": 15,
    "Q4_K_S": 14,
    "Q4_1": 3,
    "Q4_0": 2,
    "Q3_K_L": 13,
    "Q3_K_M": 12,
    "Q3_K_S": 11,
    "Q2_K": 10,
}

# Level -> types of an adapter's tensors: (most of them, those of attn_v and ffn_down, to which llama.cpp gives more
# bits). Adapter rows have 32 elements (lora_b at rank 32), so the 256-wide K types cannot hold them; each becomes the
# type that llama.cpp falls back to for such rows: Q6_K -> Q8_0, Q5_K -> Q5_1, Q4_K -> Q5_0. For Q2_K and Q3_K that is
# IQ4_NL, for which gguf has no quantiser; Q4_0 has the same size.
ADAPTER_TYPES: dict[str, tuple[str, str]] = {
    "F32": ("F32", "F32"),
    "F16": ("F16", "F16"),
    "BF16": ("BF16", "BF16"),
    "Q8_0": ("Q8_0", "Q8_0"),
    "Q6_K": ("Q8_0", "Q8_0"),
    "Q5_K_M": ("Q5_1", "Q8_0"),
    "Q5_K_S": ("Q5_1", "Q5_1"),
    "Q5_1": ("Q5_1", "Q5_1"),
    "Q5_0": ("Q5_0", "Q5_0"),
    "Q4_K_M": ("Q5_0", "Q8_0"),
    "Q4_K_S": ("Q5_0", "Q5_1"),
    "Q4_1": ("Q4_1", "Q4_1"),
    "Q4_0": ("Q4_0", "Q4_0"),
    "Q3_K_L": ("Q4_0", "Q5_1"),
    "Q3_K_M": ("Q4_0", "Q5_0"),
    "Q3_K_S": ("Q4_0", "Q4_0"),
    "Q2_K": ("Q4_0", "Q4_0"),
}
MORE_BITS = ("attn_v", "ffn_down")

# Bytes of a block and its elements.
_BLOCKS = {"F32": (4, 1), "F16": (2, 1), "BF16": (2, 1), "Q8_0": (34, 32), "Q5_1": (24, 32), "Q5_0": (22, 32),
           "Q4_1": (20, 32), "Q4_0": (18, 32)}  # fmt: skip


def adapter_type(level: str, tensor: str, row: int) -> str:
    """The type of an adapter's tensor; F16 where its rows do not divide into the level's blocks."""
    most, more = ADAPTER_TYPES[level]
    kind = more if any(f".{part}." in tensor for part in MORE_BITS) else most
    return kind if row % _BLOCKS[kind][1] == 0 else "F16"


def stored_bytes(kind: str, elements: int) -> int:
    """Bytes that `elements` take in a tensor of type `kind`."""
    size, block = _BLOCKS[kind]
    return elements * size // block
