"""Checkpoints that are resumed only when whole, and the trained-model file."""

from __future__ import annotations

import os
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ..errors import MeetaraError
from ..runlog import size
from ..store import Say, existing, read_json, sha256_of, write_json

FORMAT = "meetara-trained-model/2"
CHECKPOINT = "meetara-checkpoint/1"
KEPT = 2


class Checkpoints:
    """The newest states of one training, in a local folder and, rarer, in one that outlives the machine.

    A checkpoint is a file `step-000120.pt` and, written after it, `step-000120.json` with its hash: without that, or
    with another hash, it does not exist. The one before the newest is kept.
    """

    def __init__(self, local: Path, lasting: Path | None, lasting_every_s: float, say: Say) -> None:
        """Args:
        local: On this machine's disk.
        lasting: On a drive that a later session sees; None where `local` is such a place itself.
        lasting_every_s: Seconds between copies to it: Drive keeps deleted files in its bin, which counts.
        say: For what goes wrong without stopping the training.
        """
        self.local, self.lasting, self.every_s, self.say = local, lasting, lasting_every_s, say
        self._copied = time.monotonic()

    def save(self, content: dict[str, Any]) -> None:
        """Saves the state after `content["step"]`; older ones but the last go."""
        path = self.local / f"step-{content['step']:06}.pt"
        save_atomically({"format": CHECKPOINT, **content}, path)
        write_json(path.with_suffix(".json"), {"sha256": sha256_of(path)})
        _prune(self.local)
        if self.lasting and time.monotonic() - self._copied >= self.every_s:
            self._copied = time.monotonic()
            try:
                self._copy(path, self.lasting)
            except OSError as error:  # a mount that went away must not stop what goes on without it
                self.say(f"  the checkpoint could not be copied to {self.lasting} ({error.strerror}); training goes on")

    def newest(self) -> dict[str, Any] | None:
        """The newest whole checkpoint of either place; None where there is none.

        Raises:
            MeetaraError: It is whole, but of a format that this version does not read.
        """
        found = {
            path.name: path for folder in (self.lasting, self.local) if folder for path in folder.glob("step-*.pt")
        }
        for name in sorted(found, reverse=True):
            for folder in (self.local, self.lasting):
                path = folder / name if folder else None
                if path is None or not path.exists():
                    continue
                seal = read_json(path.with_suffix(".json")) or {}
                if seal.get("sha256") != sha256_of(path):
                    self.say(f"  the checkpoint {path} is damaged or unfinished: the one before it is taken")
                    continue
                content = _load(path, CHECKPOINT, "a checkpoint", "remove it and run again")
                return {**content, "path": str(path)}
        return None

    def clear(self) -> None:
        for folder in (self.local, self.lasting):
            if folder:
                shutil.rmtree(folder, ignore_errors=True)

    def _copy(self, path: Path, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / path.name
        partial = target.with_suffix(".partial")
        shutil.copyfile(path, partial)
        partial.replace(target)
        shutil.copyfile(path.with_suffix(".json"), target.with_suffix(".json"))
        _prune(folder)


def _prune(folder: Path) -> None:
    """Removes all but the newest whole checkpoints, and leftovers."""
    sealed = sorted(folder.glob("step-*.json"))
    for seal in sealed[:-KEPT]:
        seal.unlink()
    kept = {seal.stem for seal in sealed[-KEPT:]}
    for path in [*folder.glob("step-*.pt"), *folder.glob("step-*.partial")]:
        if path.stem not in kept:
            path.unlink()


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
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(canonical(content), file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch turns some of the system's errors into its own
        partial.unlink(missing_ok=True)
        free = shutil.disk_usage(existing(path.parent)).free
        raise MeetaraError(
            f"the training's state could not be saved ({str(error).splitlines()[0][:100]}; {size(free)} free)",
            where=path,
            remedy="make room, or choose another disk with MEETARA_WORK_ROOT, and run again: it goes on from the "
            "last checkpoint",
        ) from None


def rng_state() -> dict[str, Any]:
    """The state of the random generators, in types that `weights_only=True` loads."""
    import numpy as np

    kind, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else [],
        "numpy": [str(kind), [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "python": [version, list(internal), gauss],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Puts the random generators where `rng_state` found them; a GPU's only where as many are there."""
    import numpy as np

    torch.set_rng_state(state["torch"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def load_trained_model(path: Path) -> dict[str, Any]:
    """The content of a `{domain}_trained_model.pt`, which holds (sizes at rank 32 on the 135M base):

    - `format`, `domain`, `category`, `base`, `lora` (rank, alpha, modules), `params`, `plan`, `versions`;
    - `data_sha256` and `base_sha256`: what it was trained on;
    - `adapter`: the shipped LoRA weights in fp32, after the learning rate's decay, by peft's names (39 MB);
    - `trunk`: the state before that decay, from which a later session goes on: `step`, `tokens`, `weights` (other
      values than the shipped ones; flat, 39 MB), `optimizer` (8-bit AdamW, 20 MB), `rng`. It is None, and the file
      39 MB, where the run was too short to have a step before the decay;
    - `losses`: [step, loss, learning rate] of every step; `held_out`: [step, loss]; `tokens` and `trained_tokens` seen.

    It is loaded with `weights_only=True`, so that a file from elsewhere runs no code.

    Raises:
        MeetaraError: No such file, a damaged one, one that would run code, or another format.
    """
    return _load(path, FORMAT, "a trained model of this version of the lab", "train the domain again")


def _load(path: Path, format_: str, what: str, remedy: str) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise MeetaraError("no such trained model", where=path, remedy="train the domain first") from None
    except Exception as error:  # torch raises many kinds for a damaged or unsafe file
        reason = str(error).splitlines()[0][:120]
        raise MeetaraError(f"cannot be loaded as weights ({reason})", where=path, remedy=remedy) from None
    if not isinstance(content, dict) or content.get("format") != format_:
        raise MeetaraError(f"not {what}", where=path, remedy=remedy)
    return content
