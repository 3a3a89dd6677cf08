"""Checkpoints that are resumed only when whole, and the trained-model file."""

from __future__ import annotations

import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from ..errors import MeetaraError
from ..store import read_json, sha256_of, write_json

SEAL = "meetara_seal.json"
FORMAT = "meetara-trained-model/1"


def seal(checkpoint: Path) -> None:
    """Writes the hash of every file of a finished checkpoint into it, last."""
    hashes = {path.name: sha256_of(path) for path in sorted(checkpoint.iterdir()) if path.name != SEAL}
    write_json(checkpoint / SEAL, hashes)


def newest_whole(folder: Path) -> Path | None:
    """The newest sealed checkpoint whose files are what they were; removes those that are not.

    transformers' Trainer takes the highest number unchecked, and resumes without an optimizer where its file is
    missing.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for checkpoint in found:
        hashes = read_json(checkpoint / SEAL)
        if hashes and all((checkpoint / n).is_file() and sha256_of(checkpoint / n) == h for n, h in hashes.items()):
            return checkpoint
        shutil.rmtree(checkpoint)
    return None


SHARED_ELEMENTS = 4096


def canonical(content: Any, tables: dict[tuple[Any, ...], torch.Tensor] | None = None) -> Any:
    """`content` built anew, so that equal content gives equal bytes.

    Pickle writes an object that it meets a second time as a reference to the first; which equal texts and tensors are
    one object differs between a run that was resumed and one that was not. Here equal texts are one, and so are equal
    small tensors: the 8-bit optimizer's tables, two for each of 420 matrices.
    """
    tables = {} if tables is None else tables
    if isinstance(content, dict):
        return {canonical(key, tables): canonical(value, tables) for key, value in content.items()}
    if isinstance(content, list):
        return [canonical(item, tables) for item in content]
    if isinstance(content, tuple):
        return tuple(canonical(item, tables) for item in content)
    if isinstance(content, torch.Tensor):
        copy = content.detach().cpu().clone(memory_format=torch.contiguous_format)
        if not 1 < copy.numel() <= SHARED_ELEMENTS:
            return copy
        return tables.setdefault((copy.dtype, tuple(copy.shape), copy.numpy().tobytes()), copy)
    return sys.intern(str(content)) if isinstance(content, str) else content


def save_atomically(content: dict[str, Any], path: Path) -> None:
    """`torch.save` under a partial name, synced, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(canonical(content), file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def rng_state() -> dict[str, Any]:
    """The state of the random generators, in types that `weights_only=True` loads."""
    import numpy as np

    kind, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "numpy": [str(kind), [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "python": [version, list(internal), gauss],
    }


def load_trained_model(path: Path) -> dict[str, Any]:
    """The content of a `{domain}_trained_model.pt`, which holds (sizes at rank 32 on the 135M base):

    - `format`, `domain`, `category`, `base`, `lora` (rank, alpha, modules), `params`, `plan`, `versions`;
    - `data_sha256` and `base_sha256`: what it was trained on;
    - `adapter`: the shipped LoRA weights in fp32, after the learning rate's decay, by peft's names (39 MB);
    - `trunk`: the state before that decay, from which a later session goes on: `step`, `adapter` (other weights than
      the shipped ones, 39 MB), `optimizer` (8-bit AdamW, 20 MB), `scheduler`, `rng`. It is None, and the file 39 MB,
      where the run was too short to have a step before the decay;
    - `losses`: [step, loss, learning rate] of every step; `tokens` and `trained_tokens` seen.

    It is loaded with `weights_only=True`, so that a file from elsewhere runs no code.

    Raises:
        MeetaraError: No such file, a damaged one, one that would run code, or another format.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise MeetaraError("no such trained model", where=path, remedy="train the domain first") from None
    except Exception as error:  # torch raises many kinds for a damaged or unsafe file
        reason = str(error).splitlines()[0][:120]
        raise MeetaraError(
            f"cannot be loaded as weights ({reason})", where=path, remedy="remove it and run again"
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise MeetaraError("not a trained model of this lab", where=path, remedy="remove it and run again")
    return content
