"""What the machine can do: the device that models run on, and the precision that suits it and the base."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Device:
    """Where a model runs.

    Attributes:
        kind: `cpu` or `cuda`.
        name: The model of processor or GPU.
        precision: Of what is computed: `fp32`, `bf16`, or `fp16` (with a loss scaler).
        reason: Why this precision.
        memory_bytes: Free memory of the device.
        nf4: Whether the base is held in 4 bits (QLoRA).
    """

    kind: str
    name: str
    precision: str
    reason: str
    memory_bytes: int
    nf4: bool = False

    @property
    def dtype_bytes(self) -> int:
        return 4 if self.precision == "fp32" else 2


CPU_MINUTES = 6.0
"""Training time on a CPU when none is asked for: the whole first run then ends in under ten minutes on 2 cores."""
# What is needed beside the base's weights: adapter, gradients, optimizer, activations of a small micro-batch, and the
# CUDA context.
BESIDE_BASE = 2_500_000_000


def detect(precision: str = "auto") -> Device:
    """The device that is there, and its precision unless one is asked for (`fp32`, `bf16`, `fp16`)."""
    import psutil
    import torch

    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        # torch.cuda.is_bf16_supported() says yes on a T4, which only emulates it.
        if (major, minor) >= (8, 0):
            best, reason = "bf16", f"compute capability {major}.{minor} has bf16"
        else:
            best, reason = "fp16", f"compute capability {major}.{minor} is below 8.0: no bf16, fp16 with a scaler"
        free, _ = torch.cuda.mem_get_info()
        found = Device("cuda", torch.cuda.get_device_name(), best, reason, free)
    else:
        free = psutil.virtual_memory().available
        found = Device("cpu", f"CPU, {os.cpu_count()} cores", "fp32", "no CUDA GPU is visible", free)
    if precision in ("auto", found.precision):
        return found
    return replace(found, precision=precision, reason="asked for")


def for_base(found: Device, parameters: int, wanted: str = "auto") -> Device:
    """`found` with the way in which a base is held there.

    Args:
        found: The device.
        parameters: Of the base.
        wanted: `full` (the device's precision), `nf4`, or `auto`: 4 bits only where the base does not fit otherwise.
    """
    needed = parameters * found.dtype_bytes + BESIDE_BASE
    if wanted == "nf4" or (wanted == "auto" and needed > found.memory_bytes):
        why = "asked for" if wanted == "nf4" else f"{needed / 1e9:.1f} GB are needed otherwise"
        return replace(
            found, nf4=True, reason=f"{found.reason}; base in NF4: {why}, {found.memory_bytes / 1e9:.1f} GB are free"
        )
    return found
