"""Quantises a whole model with llama.cpp's own quantiser."""

from __future__ import annotations

import ctypes
from pathlib import Path

from ..errors import MeetaraError
from ..quants import LEVELS


def quantize(source: Path, target: Path, level: str) -> None:
    """Quantises a whole F16 model with llama.cpp's own `llama_model_quantize`.

    Raises:
        MeetaraError: llama.cpp refused; its log says why.
    """
    import llama_cpp

    from .runtime import captured_log

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = LEVELS[level]
    with captured_log() as lines:
        failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    if failed:
        target.unlink(missing_ok=True)
        reason = next((line for line in reversed(lines) if "error" in line.lower() or "fail" in line.lower()), "")
        raise MeetaraError(
            f"llama.cpp could not quantise to {level}: {reason}", where=source, remedy="check the free disk space"
        )
