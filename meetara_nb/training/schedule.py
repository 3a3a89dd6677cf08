"""How many steps a training takes and at what learning rate: warm-up, a stable phase, decay."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from ..params import TrainParams

# Kept back from the budget: the last save.
RESERVE_S = 5.0
# A plan is revised where the steps it has time for differ by more than this share.
TOLERANCE = 0.08
# The size of a step in tokens, where none is asked for: as many as leave this many steps, within these bounds.
STEPS_WANTED, SMALLEST_STEP, LARGEST_STEP = 200, 512, 16_384


@dataclass(frozen=True)
class Plan:
    """What a training does, fixed before its first step, so that a resumed run is the same run.

    Attributes:
        steps: Optimizer steps.
        warmup_steps, decay_steps: Those in which the learning rate rises at the start and falls at the end.
        most_steps: Steps that the epochs asked for come to.
        timed: Whether `steps` follows from a time budget; then it is revised while the learning rate is stable.
        batch_tokens: Tokens in a step, at most.
        save_steps, eval_steps: Steps between checkpoints, and between measurements of the held-out loss (0: none).
        step_s: Measured seconds for a step; 0 where the number of steps was given.
        packs_sha256: The tokens it will see, in order.
        device: Kind of device and precision.
        versions: Of the libraries that compute.
    """

    steps: int
    warmup_steps: int
    decay_steps: int
    most_steps: int
    timed: bool
    batch_tokens: int
    save_steps: int
    eval_steps: int
    step_s: float
    packs_sha256: str
    device: str
    versions: dict[str, str]

    @property
    def trunk_step(self) -> int:
        """The last step before the decay; 0 where there is none."""
        return self.steps - self.decay_steps

    def rate(self, step: int) -> float:
        """The share of the peak learning rate at a step, counted from 1 (warmup-stable-decay, Hu et al. 2024)."""
        if step <= self.warmup_steps:
            return step / self.warmup_steps
        return min(1.0, (self.steps - step + 1) / (self.decay_steps + 1))

    def with_steps(self, steps: int, decay_share: float, now: int) -> Plan:
        """The plan for another number of steps, seen from step `now`, before the decay."""
        decay = min(steps - now, max(1, round(decay_share * steps)))
        return replace(self, steps=steps, decay_steps=decay)

    def revised(self, params: TrainParams, now: int, step_s: float, left_s: float) -> Plan:
        """The plan after step `now`, for steps that turned out to take `step_s` and with `left_s` to go."""
        if not self.timed or now >= self.trunk_step:
            return self
        steps = min(self.most_steps, now + max(1, int((left_s - RESERVE_S) / step_s)))
        if abs(steps - self.steps) <= TOLERANCE * self.steps:
            return self
        return self.with_steps(steps, params.decay_share, now)

    def ended_early(self, params: TrainParams, now: int) -> Plan:
        """The plan whose decay begins after step `now`."""
        decay = max(1, round(now * params.decay_share / (1 - min(params.decay_share, 0.9))))
        return replace(self, steps=min(self.steps, now + decay), decay_steps=min(self.steps - now, decay), timed=False)


def make(params: TrainParams, steps: int, **fixed: Any) -> Plan:
    """A plan of `steps` steps."""
    decay = min(steps - 1, max(1, round(params.decay_share * steps)))
    warmup = min(steps - decay, max(1, round(params.warmup_share * steps)))
    return Plan(steps=steps, warmup_steps=warmup, decay_steps=decay, **fixed)


def step_tokens(params: TrainParams, tokens: float) -> int:
    """Tokens in an optimizer step: those asked for, or a power of two that makes about 200 steps of `tokens`."""
    if params.batch_tokens:
        return params.batch_tokens
    if params.max_steps:
        return SMALLEST_STEP
    fitting = 2 ** math.floor(math.log2(max(1.0, tokens / STEPS_WANTED)))
    return int(min(LARGEST_STEP, max(SMALLEST_STEP, fitting)))
