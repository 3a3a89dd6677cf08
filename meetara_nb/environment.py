"""The machine: what it is, and the settings that kernels are started with."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .runlog import size, table
from .store import existing

# glibc gives large buffers back to the system after every use; a training step on a CPU then spends a third of its
# time getting them again. These keep them. They must be set before the process starts.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
# Nothing is fetched unless a base asks for it, and two processes do not share a tokenizer.
QUIET = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}


@contextlib.contextmanager
def kernel_environment() -> Iterator[None]:
    """Sets the variables that kernels need, unless the user has set them, for as long as the block runs."""
    ours = {name: value for name, value in {**ALLOCATOR, **QUIET}.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "llama-cpp-python", "gguf", "papermill")


def describe(data_root: Path, models_root: Path, work_root: Path) -> str:
    """Machine, libraries and roots as a table."""
    import psutil

    from . import device

    where = device.detect()
    rows = [
        ["system", f"{platform.system()} {platform.machine()}, Python {sys.version.split()[0]}"],
        ["memory", f"{size(psutil.virtual_memory().available)} free of {size(psutil.virtual_memory().total)}"],
        ["trains on", f"{where.name}: {where.precision} ({where.reason})"],
        ["libraries", ", ".join(f"{name} {_version(name)}" for name in LIBRARIES)],
    ]
    for name, root in (("data", data_root), ("models", models_root), ("work", work_root)):
        rows.append([f"{name} root", f"{root} ({size(shutil.disk_usage(existing(root)).free)} free)"])
    return table(rows, ["", ""])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "MISSING"
