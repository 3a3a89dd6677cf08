"""What the machine can do: the device that models run on and the precision that suits it, with the reason."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Where a model runs.

    Attributes:
        kind: `cpu` or `cuda`.
        name: The model of processor or GPU.
        precision: `fp32`, `bf16`, or `fp16` (with a loss scaler).
        reason: Why this precision.
    """

    kind: str
    name: str
    precision: str
    reason: str


CPU_MINUTES = 6.0
"""Training time on a CPU when none is asked for: the whole first run then ends in under ten minutes on 2 cores."""


def detect() -> Device:
    import torch

    if not torch.cuda.is_available():
        return Device("cpu", f"CPU, {os.cpu_count()} cores", "fp32", "no CUDA GPU is visible")
    major, minor = torch.cuda.get_device_capability()
    name = torch.cuda.get_device_name()
    # torch.cuda.is_bf16_supported() says yes on a T4, which only emulates it.
    if (major, minor) >= (8, 0):
        return Device("cuda", name, "bf16", f"compute capability {major}.{minor} has bf16")
    return Device("cuda", name, "fp16", f"compute capability {major}.{minor} is below 8.0: no bf16, fp16 with a scaler")
