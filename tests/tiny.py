"""A tiny random Llama (width 256, 2 layers) as a transformers model and as GGUF, with a byte-level tokenizer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from meetara_nb.gguf_factory.gguf_io import TensorPlan, write_gguf
from meetara_nb.params import Shape

SHAPE = Shape(architecture="llama", layers=2, hidden=256, heads=4, kv_heads=2, head_size=64, feed_forward=512)
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġa"]


def model() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=SHAPE.hidden, intermediate_size=SHAPE.feed_forward,
        num_hidden_layers=SHAPE.layers, num_attention_heads=SHAPE.heads, num_key_value_heads=SHAPE.kv_heads,
        rms_norm_eps=1e-5, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def with_adapter(base: LlamaForCausalLM, rank: int = 32) -> Any:
    """`base` with a random adapter on all linear layers."""
    adapted = get_peft_model(base, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))
    torch.manual_seed(2)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return adapted.eval()


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q and k in the order in which GGUF's rotary embedding takes them."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write(base: LlamaForCausalLM, path: Path, **changes: Any) -> None:
    """`base` as an F16 GGUF file; `changes` replace header fields."""
    kinds, array = gguf.GGUFValueType, gguf.GGUFValueType.ARRAY
    special = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    fields: dict[str, tuple[Any, Any, Any]] = {
        "general.type": ("model", kinds.STRING, None),
        "general.name": ("tiny", kinds.STRING, None),
        "llama.block_count": (SHAPE.layers, kinds.UINT32, None),
        "llama.context_length": (512, kinds.UINT32, None),
        "llama.embedding_length": (SHAPE.hidden, kinds.UINT32, None),
        "llama.feed_forward_length": (SHAPE.feed_forward, kinds.UINT32, None),
        "llama.attention.head_count": (SHAPE.heads, kinds.UINT32, None),
        "llama.attention.head_count_kv": (SHAPE.kv_heads, kinds.UINT32, None),
        "llama.rope.freq_base": (10000.0, kinds.FLOAT32, None),
        "llama.attention.layer_norm_rms_epsilon": (1e-5, kinds.FLOAT32, None),
        "general.file_type": (1, kinds.UINT32, None),
        "tokenizer.ggml.model": ("gpt2", kinds.STRING, None),
        "tokenizer.ggml.pre": ("smollm", kinds.STRING, None),
        "tokenizer.ggml.tokens": (TOKENS, array, kinds.STRING),
        "tokenizer.ggml.token_type": ([int(special[n >= 3]) for n in range(len(TOKENS))], array, kinds.INT32),
        "tokenizer.ggml.merges": (["Ġ a"], array, kinds.STRING),
        "tokenizer.ggml.bos_token_id": (1, kinds.UINT32, None),
        "tokenizer.ggml.eos_token_id": (2, kinds.UINT32, None),
        "tokenizer.ggml.add_bos_token": (False, kinds.BOOL, None),
        "tokenizer.chat_template": (TEMPLATE, kinds.STRING, None),
    }
    for key, value in changes.items():
        fields[key] = (value, *fields[key][1:])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SHAPE.layers)
    tensors = []
    for key, weight in base.state_dict().items():
        if key == "lm_head.weight":  # tied
            continue
        name = names.get_name(key, try_suffixes=(".weight",))
        values = weight.float().numpy()
        if ".attn_q." in name:
            values = permuted(values, SHAPE.heads)
        elif ".attn_k." in name:
            values = permuted(values, SHAPE.kv_heads)
        kind = "F32" if values.ndim == 1 else "F16"
        tensors.append(TensorPlan(name, values.shape, kind, partial(np.asarray, values)))
    write_gguf(path, "llama", [(key, *rest) for key, rest in fields.items()], tensors)
