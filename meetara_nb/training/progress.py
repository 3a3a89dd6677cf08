"""How a training goes: lines for people, events for programs, TensorBoard's files on request."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from ..errors import MeetaraError
from ..runlog import RunLog, duration

SAY_EVERY_S = 10.0


class Progress:
    """Speed and time left of one session of a training.

    Attributes:
        tokens_per_s: Since the session's first step.
    """

    def __init__(self, log: RunLog, domain: str, step: int, tokens: int, *, tensorboard: bool) -> None:
        self.log, self.domain = log, domain
        self.began = time.monotonic()
        self.first_step, self.first_tokens = step, tokens
        self.said = self.began - SAY_EVERY_S
        self.tokens_per_s = 0.0
        self.board = self._board() if tensorboard else None

    def step(self, entry: list[float], steps: int, tokens: int) -> None:
        """After a step: its [number, loss, learning rate], the plan's steps, and all tokens so far."""
        step, loss, learning_rate = int(entry[0]), entry[1], entry[2]
        passed = time.monotonic() - self.began
        self.tokens_per_s = (tokens - self.first_tokens) / passed
        left = passed / (step - self.first_step) * (steps - step)
        self.log.event(
            "step", domain=self.domain, step=step, steps=steps, loss=round(loss, 4), learning_rate=learning_rate,
            tokens_per_s=round(self.tokens_per_s), left_s=round(left), memory_bytes=peak_memory(),
        )  # fmt: skip
        if self.board:
            self.board.add_scalar("loss/training", loss, step)
            self.board.add_scalar("learning_rate", learning_rate, step)
            self.board.add_scalar("tokens_per_s", self.tokens_per_s, step)
        if time.monotonic() - self.said >= SAY_EVERY_S or step == steps:
            self.said = time.monotonic()
            self.log.say(
                f"  step {step:>4}/{steps}  loss {loss:6.3f}  {self.tokens_per_s:5.0f} tokens/s  {duration(left)} left"
            )

    def held_out(self, step: int, steps: int, loss: float) -> None:
        self.log.event("held out", domain=self.domain, step=step, loss=round(loss, 4))
        self.log.say(f"  step {step:>4}/{steps}  held-out loss {loss:.3f}")
        if self.board:
            self.board.add_scalar("loss/held_out", loss, step)

    def close(self) -> None:
        if self.board:
            self.board.close()

    def _board(self) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MeetaraError(
                "TensorBoard is not installed", where="train.tensorboard", remedy="pip install tensorboard"
            ) from None
        if self.log.folder is None:
            return None
        folder = self.log.folder / "tensorboard" / self.domain
        self.log.say(f"  TensorBoard: tensorboard --logdir {folder}")
        return SummaryWriter(str(folder))


def peak_memory() -> int:
    """Most bytes in use so far: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
