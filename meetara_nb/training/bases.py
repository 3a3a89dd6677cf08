"""The weights of a base model: where they are, whether they are whole, and how transformers loads them."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MeetaraError
from ..params import Base
from ..store import Say, sha256_of

if TYPE_CHECKING:
    import torch


def source_file(base: Base) -> Path:
    """The GGUF file that holds the base's weights.

    Raises:
        MeetaraError: The package is not installed, or lacks the file.
    """
    source = base.source
    spec = importlib.util.find_spec(source.package)
    if spec is None or not spec.origin:
        raise MeetaraError(
            f"the package {source.package} with the weights of {base.title} is not installed",
            remedy="run `make setup`, or pip install -r requirements.txt",
        )
    path = Path(spec.origin).parent / source.file
    if not path.is_file():
        raise MeetaraError("the file with the base's weights is missing", where=path, remedy=_reinstall(base))
    return path


def checked_source(base: Base) -> Path:
    """`source_file`, after its hash was compared with the registry's."""
    path = source_file(base)
    if sha256_of(path) != base.source.sha256:
        raise MeetaraError(
            "the base file is damaged: its sha256 is not the one in params/bases.yaml",
            where=path,
            remedy=_reinstall(base),
        )
    return path


def _reinstall(base: Base) -> str:
    return f"pip install --force-reinstall --no-deps {base.source.package.replace('_', '-')}"


# Raised when what `prepare` makes changes.
PREPARED_VERSION = 1


def _pre_tokenizer(base: Base) -> Any:
    """How text is cut before byte-pair encoding.

    transformers gives every GPT-2 style tokenizer that it reads from a GGUF file GPT-2's own rule, whatever the file's
    `tokenizer.ggml.pre` says; for SmolLM that joins a space and a digit such as \u00b2, which its authors and llama.cpp
    keep apart.
    """
    from tokenizers import pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return {
        "gpt-2": byte_level,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
    }[base.pre_tokenizer]


def prepare(base: Base, folder: Path, say: Say = print) -> Path:
    """The base as a transformers folder (config, fp32 weights, tokenizer) in `folder`; made once, 20 to 40 s.

    Reading a GGUF file takes transformers that long every time; the folder loads in two. The folder is named by the
    source's hash and renamed into place when it is whole.

    Raises:
        MeetaraError: The source is damaged, or the base brings no chat template or end token.
    """
    final = folder / f"{base.source.sha256[:12]}-{PREPARED_VERSION}"
    if final.is_dir():
        return final
    path = checked_source(base)
    say(f"unpacking {base.title} for training: about half a minute, once")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    if not tokenizer.chat_template or tokenizer.eos_token_id is None:
        raise MeetaraError(
            "the base has no chat template or no end token", where=path, remedy="choose an instruct base"
        )
    tokenizer.backend_tokenizer.pre_tokenizer = _pre_tokenizer(base)
    # Without dequantize=True the model counts as quantised, and cannot be saved or trained.
    model = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    partial = final.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(final)
    return final


def load_tokenizer(prepared: Path) -> Any:
    """The tokenizer of a prepared base, with its chat template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(prepared)


def load_model(prepared: Path, dtype: torch.dtype) -> Any:
    """A prepared base as a transformers model on the CPU."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(prepared, dtype=dtype)
