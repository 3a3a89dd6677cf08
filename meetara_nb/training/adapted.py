"""A base model that stays in memory, and the fresh adapters that are attached to it one after another."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from transformers import set_seed

from ..device import Device
from ..params import TrainParams
from . import bases

MODULES = "all-linear"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class WarmBase:
    """A frozen base on its device. Loading it takes seconds to minutes, attaching an adapter a moment."""

    def __init__(self, prepared: Path, where: Device) -> None:
        """Args:
        prepared: The base as a transformers folder.
        where: Device, precision, and whether the weights are held in NF4.
        """
        self.prepared, self.where = prepared, where
        self.tokenizer = bases.load_tokenizer(prepared)
        self.model = bases.load_model(prepared, DTYPES[where.precision], nf4=where.nf4, device=where.kind)
        self.model.requires_grad_(False)
        self.model.config.use_cache = False

    def attach(self, params: TrainParams) -> Adapted:
        """A fresh adapter; the same seed gives the same weights. The one before must be detached."""
        set_seed(params.seed)
        config = LoraConfig(
            r=params.lora_rank,
            lora_alpha=params.lora_alpha,
            lora_dropout=params.lora_dropout,
            target_modules=MODULES,
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():  # peft looks at every attribute of the model, deprecated ones too
            warnings.simplefilter("ignore", FutureWarning)
            return Adapted(get_peft_model(self.model, config))


class Adapted:
    """A base with its adapter, whose weights and gradients are one flat fp32 tensor each.

    So the optimizer, the norm of the gradients and a checkpoint handle one tensor instead of hundreds: AdamW8bit on a
    CPU takes half the time.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        sizes = [weight.numel() for weight in trained]
        self.weights = torch.nn.Parameter(torch.cat([weight.detach().float().flatten() for weight in trained]))
        self.weights.grad = torch.zeros_like(self.weights)
        for weight, values, grad in zip(
            trained, self.weights.detach().split(sizes), self.weights.grad.split(sizes), strict=True
        ):
            weight.data = values.view(weight.shape)
            weight.grad = grad.view(weight.shape)

    @property
    def config(self) -> LoraConfig:
        return self.model.peft_config["default"]

    def tensors(self) -> dict[str, torch.Tensor]:
        """A copy of the weights in fp32 on the CPU, by peft's names."""
        return {
            name: weight.detach().float().cpu().clone()
            for name, weight in get_peft_model_state_dict(self.model).items()
        }

    def detach(self) -> None:
        """Takes the adapter off again and frees its memory; the base is as it was."""
        for weight in self.model.parameters():
            weight.grad = None
        self.weights.grad = None
        self.model.unload()
        for module in self.model.modules():
            assert not isinstance(module, LoraLayer)
        del self.model, self.weights
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
