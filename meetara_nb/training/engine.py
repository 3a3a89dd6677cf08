"""Trains a LoRA adapter with transformers' Trainer, to a plan that is frozen before the first step."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Sequence, Sized
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from .. import device
from ..errors import MeetaraError
from ..params import Base, TrainParams
from ..runlog import RunLog, duration
from ..store import digest_of, read_json, write_json
from . import bases, checkpoint
from .collate import IGNORED, Encoded, Packs, collate, encode, pack

MODULES = "all-linear"
SAVE_EVERY_S = 45.0
# Kept back from the budget: the last save, and that a step is not always as fast as the fastest measured one.
RESERVE_S, SAFETY = 4.0, 0.9


@dataclass(frozen=True)
class Plan:
    """What a training run does, fixed before its first step, so that a resumed run is the same run.

    Attributes:
        steps: Optimizer steps.
        warmup_steps, decay_steps: Those in which the learning rate rises at the start and falls at the end.
        save_steps: Steps between checkpoints.
        step_s: Measured seconds for a step; 0 where the number of steps was given.
        packs_sha256: The tokens it will see, in order.
        device: Kind of device and precision.
        versions: Of the libraries that compute.
    """

    steps: int
    warmup_steps: int
    decay_steps: int
    save_steps: int
    step_s: float
    packs_sha256: str
    device: str
    versions: dict[str, str]

    @property
    def trunk_step(self) -> int:
        """The last step before the decay; 0 where there is none."""
        return self.steps - self.decay_steps


@dataclass(frozen=True)
class Trained:
    """A finished training: the file, and what was measured."""

    path: Path
    facts: dict[str, Any]


class AdapterTrainer(Trainer):
    """Trainer that keeps the data's order and computes logits only where there is loss."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(cast(Sized, self.train_dataset))

    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], *_: Any, **__: Any) -> torch.Tensor:
        """Mean cross-entropy over the trained tokens.

        The output layer is a fifth of the small base's arithmetic, and most tokens carry no loss.
        """
        labels = inputs["labels"][:, 1:]
        causal_lm = self.accelerator.unwrap_model(model).get_base_model()
        hidden = causal_lm.get_decoder()(
            input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False
        ).last_hidden_state[:, :-1]
        targets = labels != IGNORED
        logits = causal_lm.get_output_embeddings()(hidden[targets])
        return torch.nn.functional.cross_entropy(logits.float(), labels[targets])


class Progress(TrainerCallback):
    """Says how it goes, seals checkpoints, keeps the trunk, and stops on a loss that is not a number."""

    def __init__(self, plan: Plan, packs: Packs, log: RunLog, domain: str, trunk: Path) -> None:
        self.plan, self.packs, self.log, self.domain, self.trunk = plan, packs, log, domain, trunk
        self.started = self.said = 0.0
        self.first_step = self.tokens = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started, self.first_step = time.monotonic(), state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tokens += sum(len(sample.ids) for sample in _pack_of(self.packs, state.global_step))
        if state.global_step == self.plan.trunk_step:
            content = {
                "step": state.global_step,
                "adapter": _adapter(kwargs["model"]),
                "optimizer": kwargs["optimizer"].state_dict(),
                "scheduler": kwargs["lr_scheduler"].state_dict(),
                "rng": checkpoint.rng_state(),
            }
            checkpoint.save_atomically(content, self.trunk)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        step, loss = state.global_step, float(logs["loss"])
        if not math.isfinite(loss):
            raise MeetaraError(
                f"the loss is {loss} at step {step}",
                where=f"domain {self.domain}",
                remedy="lower it, for example --set train.learning_rate=0.0003; checkpoints so far are kept",
            )
        passed = time.monotonic() - self.started
        rate = self.tokens / passed
        left = passed / (step - self.first_step) * (self.plan.steps - step)
        self.log.event(
            "step", domain=self.domain, step=step, steps=self.plan.steps, loss=round(loss, 4), tokens_per_s=round(rate)
        )
        if passed - self.said >= 10 or step in (1, self.plan.steps):
            self.said = passed
            self.log.say(
                f"  step {step:>4}/{self.plan.steps}  loss {loss:6.3f}  {rate:5.0f} tokens/s  {duration(left)} left"
            )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        checkpoint.seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def train(
    *, name: str, category: str, base_name: str, base: Base, prepared: Path, data: Path, data_sha256: str,
    params: TrainParams, work: Path, log: RunLog,
) -> Trained:  # fmt: skip
    """Trains the adapter of one domain, or goes on with what an earlier run began in `work`.

    Args:
        name, category: The domain's.
        base_name, base: The base model's name in the registry, and its entry.
        prepared: The base as a transformers folder.
        data: The training-data file.
        data_sha256: Its hash.
        params: How to train.
        work: A local folder for the plan and the checkpoints of exactly this training.
        log: Where progress goes.

    Returns:
        The trained-model file inside `work`, and figures: steps, tokens, seconds of this session, losses.

    Raises:
        MeetaraError: Data or base that cannot be used, or a loss that is not a number.
    """
    started = time.monotonic()
    where = device.detect()
    log.event("device", domain=name, **asdict(where))
    log.say(f"  on {where.name}: {where.precision} ({where.reason})")
    tokenizer = bases.load_tokenizer(prepared)
    packs = pack(encode(tokenizer, _conversations(data)), params.batch_tokens, min(params.max_length, base.context))
    share = packs.trained_tokens / packs.tokens
    log.say(f"  {packs.tokens:,} tokens in {len(packs.packs):,} steps an epoch; {share:.0%} of them are trained on")
    if packs.too_long:
        log.say(f"  {packs.too_long:,} samples exceed {params.max_length} tokens and are left out")

    set_seed(params.seed)
    model = get_peft_model(
        bases.load_model(prepared, torch.float32),
        LoraConfig(
            r=params.lora_rank,
            lora_alpha=params.lora_alpha,
            lora_dropout=params.lora_dropout,
            target_modules=MODULES,
            task_type="CAUSAL_LM",
        ),
    )
    plan = _frozen_plan(work / "plan.json", model, packs, params, where, started, log)
    resumed_from = checkpoint.newest_whole(work / "checkpoints")
    trunk = work / "trunk.pt"
    if resumed_from:
        log.say(f"  going on from {resumed_from.name} of {plan.steps} steps")
        log.event("resume", domain=name, checkpoint=resumed_from.name)
    progress = Progress(plan, packs, log, name, trunk)
    trainer = AdapterTrainer(
        model=model,
        args=_arguments(work / "checkpoints", plan, params, where),
        train_dataset=packs.packs,
        data_collator=collate,
        callbacks=[progress],
    )
    trainer.remove_callback(PrinterCallback)
    train_started = time.monotonic()
    trainer.train(resume_from_checkpoint=str(resumed_from) if resumed_from else None)
    train_s = time.monotonic() - train_started

    seen = [sample for step in range(1, plan.steps + 1) for sample in _pack_of(packs, step)]
    tokens, trained_tokens = sum(len(s.ids) for s in seen), sum(sum(s.trained) for s in seen)
    losses = [[e["step"], e["loss"], e["learning_rate"]] for e in trainer.state.log_history if "loss" in e]
    path = work / "trained_model.pt"
    config = cast(LoraConfig, model.peft_config["default"])
    checkpoint.save_atomically(
        {
            "format": checkpoint.FORMAT,
            "domain": name,
            "category": category,
            "base": base_name,
            "lora": {"rank": config.r, "alpha": config.lora_alpha, "modules": sorted(config.target_modules or ())},
            "params": params.model_dump(),
            "plan": asdict(plan),
            "versions": plan.versions,
            "data_sha256": data_sha256,
            "base_sha256": base.source.sha256,
            "adapter": _adapter(model),
            "trunk": torch.load(trunk, weights_only=True) if trunk.exists() else None,
            "losses": losses,
            "tokens": tokens,
            "trained_tokens": trained_tokens,
        },
        path,
    )
    shutil.rmtree(work / "checkpoints")
    facts = {
        "steps": plan.steps,
        "tokens": tokens,
        "trained_tokens": trained_tokens,
        "trained_token_share": round(share, 4),
        "samples_seen": len(seen),
        "epochs": round(plan.steps / len(packs.packs), 4),
        "train_s": round(train_s, 1),
        "tokens_per_s": round(progress.tokens / train_s, 1),
        "first_loss": losses[0][1],
        "last_loss": round(sum(loss for _, loss, _ in losses[-5:]) / len(losses[-5:]), 4),
        "losses": losses,
        "resumed": bool(resumed_from),
        "device": plan.device,
    }
    return Trained(path, facts)


def _conversations(data: Path) -> list[list[dict[str, str]]]:
    try:
        return [sample["messages"] for sample in json.loads(data.read_text(encoding="utf-8"))["samples"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MeetaraError(
            f"not usable as training data ({type(error).__name__}: {error})", where=data, remedy="remove it, run again"
        ) from None


def _pack_of(packs: Packs, step: int) -> list[Encoded]:
    """The pack of a step, counted from 1."""
    return packs.packs[(step - 1) % len(packs.packs)]


def _adapter(model: Any) -> dict[str, torch.Tensor]:
    """A copy of the LoRA weights in fp32, by peft's names."""
    return {name: w.detach().float().cpu().clone() for name, w in get_peft_model_state_dict(model).items()}


def _frozen_plan(
    path: Path, model: Any, packs: Packs, params: TrainParams, where: device.Device, started: float, log: RunLog
) -> Plan:
    """The plan in `path`, or a new one that is written there."""
    versions = _versions()
    packs_sha256 = digest_of([[s.ids for s in samples] for samples in packs.packs])
    if saved := read_json(path):
        plan = Plan(**saved)
        if plan.packs_sha256 == packs_sha256:
            if plan.versions != versions:
                log.say(f"  the libraries changed since this training began: {plan.versions} -> {versions}")
            return plan
        shutil.rmtree(path.parent)
    epoch_steps = math.ceil(params.epochs * len(packs.packs))
    minutes = params.max_minutes or (device.CPU_MINUTES if where.kind == "cpu" else None)
    step_s = 0.0
    if params.max_steps:
        steps = params.max_steps
    elif minutes is None:
        steps = epoch_steps
    else:
        step_s = _measured_step(model, packs, params, where)
        left = minutes * 60 - (time.monotonic() - started) - RESERVE_S
        steps = min(epoch_steps, max(1, int(left * SAFETY / step_s)))
        log.say(
            f"  a step takes {step_s:.2f} s: {steps} steps ({steps / len(packs.packs):.1%} of an epoch) "
            f"in {minutes:g} minutes"
        )
    decay = min(steps - 1, max(1, round(params.decay_share * steps)))
    plan = Plan(
        steps=steps,
        warmup_steps=min(steps - decay, max(1, round(params.warmup_share * steps))),
        decay_steps=decay,
        save_steps=max(1, round(SAVE_EVERY_S / step_s)) if step_s else max(1, min(50, steps // 4)),
        step_s=round(step_s, 4),
        packs_sha256=packs_sha256,
        device=f"{where.kind} {where.precision}",
        versions=versions,
    )
    write_json(path, asdict(plan))
    return plan


def _measured_step(model: Any, packs: Packs, params: TrainParams, where: device.Device) -> float:
    """Seconds for an optimizer step, from a few real ones, after which the adapter is as it was."""
    before = _adapter(model)
    rng = torch.get_rng_state()
    sample: Sequence[list[Encoded]] = packs.packs[:4]
    plan = Plan(len(sample), 1, 1, 10_000, 0.0, "", "", {})
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:  # nothing is saved, but Trainer wants one
        trial = AdapterTrainer(
            model=model,
            args=_arguments(Path(folder), plan, params, where, save=False),
            train_dataset=list(sample),
            data_collator=collate,
            callbacks=[clock],
        )
        trial.remove_callback(PrinterCallback)
        trial.train()
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, before)
    model.zero_grad(set_to_none=True)
    torch.set_rng_state(rng)
    # The first step also warms caches and makes the optimizer's state. Of the others the fastest counts: on a shared
    # machine a step now and then takes many times as long, which says nothing about the rest.
    per_token = [s / sum(len(e.ids) for e in samples) for s, samples in zip(clock.seconds, sample, strict=True)]
    return min(per_token[1:] or per_token) * packs.tokens / len(packs.packs)


class _Clock(TrainerCallback):
    """Seconds of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.monotonic()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.monotonic() - self._began)


def _arguments(
    output: Path, plan: Plan, params: TrainParams, where: device.Device, *, save: bool = True
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(output),
        max_steps=plan.steps,
        per_device_train_batch_size=1,
        learning_rate=params.learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": plan.decay_steps, "decay_type": "linear"},
        warmup_steps=plan.warmup_steps,
        weight_decay=params.weight_decay,
        max_grad_norm=params.max_grad_norm,
        optim="adamw_bnb_8bit",
        bf16=where.precision == "bf16",
        fp16=where.precision == "fp16",
        use_cpu=where.kind == "cpu",
        seed=params.seed,
        save_strategy="steps" if save else "no",
        save_steps=plan.save_steps,
        save_total_limit=2,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=where.kind == "cuda",
    )


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
