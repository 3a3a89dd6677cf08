"""One optimizer step: gradients in as many micro-batches as memory needs, and the optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from .. import device
from ..errors import MeetaraError
from ..params import Shape, TrainParams
from ..runlog import RunLog
from . import checkpoint
from .adapted import Adapted
from .collate import Batch, Encoded, collate, split
from .decoder import Decoder
from .schedule import LARGEST_STEP

# On a CPU larger micro-batches are no faster.
MOST_ON_CPU = 2_048


class Stepper:
    """The adapter in training: its gradients, optimizer and loss scaler, and what memory allows.

    Attributes:
        micro_tokens: Tokens that pass at once; halved when memory runs out, without a change of the step's gradient.
    """

    def __init__(self, adapted: Adapted, where: device.Device, shape: Shape, params: TrainParams, log: RunLog) -> None:
        self.adapted, self.where, self.params, self.log = adapted, where, params, log
        self.decoder = Decoder(adapted.model.train())
        self.forget()
        # What half of the free memory should hold; trying decides.
        per_token = shape.layers * where.dtype_bytes * (8 * shape.hidden + 4 * shape.feed_forward)
        most = MOST_ON_CPU if where.kind == "cpu" else LARGEST_STEP
        self.micro_tokens = max(64, min(most, int(device.detect().memory_bytes / 2 / per_token)))

    def forget(self) -> None:
        """Makes a new optimizer and scaler."""
        self.optimizer = _optimizer(self.adapted, self.params)
        self.scaler = torch.amp.GradScaler(self.where.kind, enabled=self.where.precision == "fp16")

    def state(self) -> dict[str, Any]:
        """Weights, optimizer, scaler and random generators, as `weights_only=True` loads them."""
        return {
            "weights": self.adapted.weights.detach().cpu().clone(),
            "optimizer": checkpoint.canonical(self.optimizer.state_dict()),
            "scale": self.scaler.state_dict(),
            "rng": checkpoint.rng_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.adapted.weights.copy_(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scale"]:
            self.scaler.load_state_dict(state["scale"])
        checkpoint.set_rng_state(state["rng"])

    def gradients(self, samples: Sequence[Encoded]) -> float:
        """Mean loss of a step in nats a trained token; its gradient is left in `adapted.weights.grad`."""
        trained = sum(sum(sample.trained) for sample in samples)
        while True:
            try:
                grad = cast(torch.Tensor, self.adapted.weights.grad).zero_()
                total = torch.zeros((), device=grad.device)
                for micro in split(samples, self.micro_tokens):
                    loss = self.decoder.loss(self._batch(micro)) / trained
                    self.scaler.scale(loss).backward()
                    total += loss.detach()
                return float(total)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
            self._take_less(max(len(sample.ids) for sample in samples), sum(len(sample.ids) for sample in samples))

    def _take_less(self, longest: int, tokens: int) -> None:
        """After memory ran out: smaller micro-batches, then activations computed twice, then an error."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        now = min(self.micro_tokens, tokens)
        if now > longest:
            self.micro_tokens = max(longest, now // 2)
            self.log.say(f"  out of memory: at most {self.micro_tokens:,} tokens at once from here on")
        elif not self.decoder.recompute:
            self.decoder.recompute_activations()
            self.log.say("  out of memory: activations are computed twice instead of kept, about 30% slower")
        else:
            raise MeetaraError(
                f"not enough memory on {self.where.name} for one sample of {longest} tokens",
                remedy="--set train.base_precision=nf4, or a smaller train.max_length, or a smaller --base",
            )
        self.log.event("less memory", micro_tokens=self.micro_tokens, recompute=self.decoder.recompute)

    def apply(self, rate: float) -> bool:
        """Clips the gradient and lets the optimizer take its step; False, and nothing is changed, if it is not finite.

        A loss scaler that overflows lowers its scale and leaves the step out, which is how it finds the scale.
        """
        self.scaler.unscale_(self.optimizer)
        grad = cast(torch.Tensor, self.adapted.weights.grad)
        norm = torch.linalg.vector_norm(grad)
        if not self.scaler.is_enabled() and not torch.isfinite(norm):
            return False
        grad.mul_(torch.clamp(self.params.max_grad_norm / (norm + 1e-6), max=1.0))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return True

    def _batch(self, samples: Sequence[Encoded]) -> Batch:
        cuda = self.where.kind == "cuda"
        return collate(samples, share=self.decoder.shares_beginnings, pad=cuda).to(self.where.kind)

    def loss(self, samples: Sequence[Encoded]) -> float:
        """Mean loss in nats a trained token, without gradients and dropout."""
        trained = sum(sum(sample.trained) for sample in samples)
        total = 0.0
        self.adapted.model.eval()
        with torch.no_grad():
            for micro in split(samples, self.micro_tokens):
                total += float(self.decoder.loss(self._batch(micro)))
        self.adapted.model.train()
        return total / trained


def _optimizer(adapted: Adapted, params: TrainParams) -> Any:
    if params.optimizer == "adamw":
        return torch.optim.AdamW([adapted.weights], lr=0.0, weight_decay=params.weight_decay, fused=True)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit([adapted.weights], lr=0.0, weight_decay=params.weight_decay)


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)
