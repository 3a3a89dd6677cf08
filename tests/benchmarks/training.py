"""Training speed and memory of this engine and of TRL's SFTTrainer, side by side on the CPU.

    pip install --constraint constraints.txt '.[benchmarks]'
    python tests/benchmarks/training.py                # 512 samples: about 40 minutes on 2 cores
    python tests/benchmarks/training.py --samples 128  # a quarter of it
    python tests/benchmarks/training.py --ablation     # what each part of the engine brings

Every setting trains the same samples in a process of its own. The processes take turns, a step each, so that all meet
the same machine, whatever else runs there. The same seconds of that machine are spent on matrix products of the model's
shapes, which gives the rate that could be reached. Settings:

- engine: as the lab trains, with its defaults.
- trl: SFTTrainer with bf16, gradient checkpointing and padding to the maximum off.
- trl packing: the same with its packing.
- trl as it comes: its defaults (bf16, gradient checkpointing), without the allocator settings; a few steps only.

All but the last get the allocator settings that the lab starts its kernels with, fp32, LoRA of the same rank on all
linear layers, the same samples in a step, learning rates and epochs. The held-out loss is measured by one function.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from meetara_nb.environment import ALLOCATOR, QUIET

RANK, BATCH, RATE, SEED = 16, 8, 1e-3, 17
WARMUP, DECAY = 0.05, 0.3
FEW = 3
SETTINGS = ("engine", "trl", "trl packing", "trl as it comes")
PARTS = ("transformers, packed", "loss rows only", "own layers", "shared beginnings", "one flat optimizer")


def samples_of(count: int) -> tuple[list[Any], list[Any]]:
    """Samples to train on, and 64 held out: of general_health, as the hub composes them."""
    from meetara_nb.catalogue import Catalogue
    from meetara_nb.hub.dataset import compose, to_json
    from meetara_nb.params import DataParams
    from meetara_nb.training import bases
    from meetara_nb.training.collate import encode

    params = DataParams(samples=count + 64)
    (domain,) = Catalogue().select(["general_health"])
    composed = json.loads(to_json(domain, params, compose(domain, params)))["samples"]
    encoded = encode(bases.load_tokenizer(prepared()), [sample["messages"] for sample in composed])
    return encoded[:count], encoded[count:]


def prepared() -> Path:
    from meetara_nb.lab import Lab

    return Lab.open().prepared_base


class Turn:
    """A child's end: waits for its turn before a step and reports the step's seconds after it."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.began = pipe, 0.0

    def begin(self) -> None:
        self.pipe.send(("ready",))
        self.pipe.recv()
        self.began = time.perf_counter()

    def end(self) -> None:
        self.pipe.send(("step", time.perf_counter() - self.began))


def rate_at(step: int, steps: int) -> float:
    """The share of the peak learning rate at a step, counted from 1, for all settings."""
    warmup, decay = max(1, round(WARMUP * steps)), max(1, round(DECAY * steps))
    return min(1.0, step / warmup, (steps - step + 1) / (decay + 1))


def engine(turn: Turn, train: list[Any], held: list[Any], steps: int, parts: str = PARTS[-1]) -> dict[str, Any]:
    """This engine's steps; `parts` leaves out what came after it."""
    import torch
    import torch.nn.functional as F

    from meetara_nb import device
    from meetara_nb.params import TrainParams, bases
    from meetara_nb.runlog import RunLog
    from meetara_nb.training import stepper as module
    from meetara_nb.training.adapted import WarmBase
    from meetara_nb.training.collate import collate
    from meetara_nb.training.decoder import Decoder, OutputLoss

    level = PARTS.index(parts)

    class Partial(Decoder):
        """The engine's forward pass without some of its parts."""

        @property
        def shares_beginnings(self) -> bool:
            return level >= 3

        def loss(self, batch: Any) -> Any:
            if level >= 2:
                return super().loss(batch)
            where = {"input_ids": batch.ids[None], "position_ids": batch.positions[None], "use_cache": False}
            if level == 0:
                return F.cross_entropy(self.model(**where).logits[0, batch.rows], batch.targets, reduction="sum")
            hidden = self.model.model(**where).last_hidden_state[0, batch.rows]
            return OutputLoss.apply(hidden, self.model.get_output_embeddings().weight, batch.targets)

    params = TrainParams(lora_rank=RANK, lora_alpha=RANK, seed=SEED)
    base = WarmBase(prepared(), device.detect())
    adapted = base.attach(params)
    step_of = module.Stepper(
        adapted, base.where, bases()["smollm2-135m-q4_1"].shape, params, RunLog(None, "", quiet=True)
    )
    if level < len(PARTS) - 1:
        step_of.decoder = Partial(adapted.model)
        from bitsandbytes.optim import AdamW8bit

        each = [weight for weight in adapted.model.parameters() if weight.requires_grad]
        step_of.optimizer = AdamW8bit(each, lr=0.0, weight_decay=0.0)
    batches = [train[at : at + BATCH] for at in range(0, len(train), BATCH)]
    for number, batch in enumerate(batches[:steps], 1):
        turn.begin()
        step_of.gradients(batch)
        step_of.apply(RATE * rate_at(number, len(batches)))
        turn.end()
    computed = sum(len(collate(batch).ids) for batch in batches[:steps])
    facts = {"computed_tokens": computed, "optimizer": "AdamW8bit"}
    return facts | result(adapted.model, held, torch)


def trl(
    turn: Turn, train: list[Any], held: list[Any], steps: int, *, packing: bool = False, plain: bool = False
) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from meetara_nb.training import bases

    class Turns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            turn.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turn.end()

    rows = [{"input_ids": s.ids, "assistant_masks": [int(t) for t in s.trained]} for s in train]
    options: dict[str, Any] = {"per_device_train_batch_size": BATCH}
    options |= {"max_steps": steps} if plain else {"bf16": False, "gradient_checkpointing": False}
    if packing:
        # One packed row holds as many tokens as a step of the others.
        tokens = sum(len(sample.ids) for sample in train) * BATCH // len(train)
        options |= {"packing": True, "max_length": tokens, "per_device_train_batch_size": 1}
    total = len(train) // BATCH
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=bases.load_model(prepared(), torch.float32),
            args=SFTConfig(
                output_dir=folder,  num_train_epochs=1, learning_rate=RATE,
                report_to="none", save_strategy="no", logging_steps=1000, seed=SEED,
                use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant", dataloader_pin_memory=False,
                **options,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=bases.load_tokenizer(prepared()),
            peft_config=LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[Turns()],
        )  # fmt: skip
        optimizer = trainer.create_optimizer()
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: rate_at(done + 1, total))
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
        trainer.train()
        return {"optimizer": type(optimizer).__name__} | result(
            trainer.accelerator.unwrap_model(trainer.model), held, torch
        )


def result(model: Any, held: list[Any], torch: Any) -> dict[str, Any]:
    """Peak memory of the process so far; then the held-out loss, one sample at a time, by transformers alone."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model.float().eval()
    total = count = 0.0
    for sample in held:
        ids = torch.tensor([sample.ids])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].float()
        wanted = torch.tensor(sample.trained[1:])
        total += float(torch.nn.functional.cross_entropy(logits[wanted], ids[0, 1:][wanted], reduction="sum"))
        count += float(wanted.sum())
    return {"peak_bytes": peak, "held_out": total / count}


def child(setting: str, pipe: Any, count: int, steps: int) -> None:
    os.environ.update(QUIET)
    train, held = samples_of(count)
    turn = Turn(pipe)
    run: dict[str, Callable[[], dict[str, Any]]] = {
        "engine": lambda: engine(turn, train, held, steps),
        "trl": lambda: trl(turn, train, held, steps),
        "trl packing": lambda: trl(turn, train, held, steps, packing=True),
        "trl as it comes": lambda: trl(turn, train, held, FEW, plain=True),
        **{part: lambda part=part: engine(turn, train, held, steps, part) for part in PARTS},
    }
    pipe.send(("done", run[setting]()))


def matrix_rate() -> tuple[float, float]:
    """(floating-point operations, seconds) of a few matrix products of the base's shapes."""
    import torch

    operations, began = 0.0, time.perf_counter()
    for inputs, outputs in ((576, 576), (576, 1536), (1536, 576)):
        x, w = torch.randn(1000, inputs), torch.randn(outputs, inputs)
        for _ in range(20):
            x @ w.t()
            operations += 2.0 * 1000 * inputs * outputs
    return operations, time.perf_counter() - began


def measure(settings: tuple[str, ...], count: int, steps: int) -> None:
    context = multiprocessing.get_context("spawn")
    children: dict[str, Any] = {}
    for setting in settings:
        ours = {} if setting == "trl as it comes" else ALLOCATOR
        os.environ.update(ours)
        here, there = context.Pipe()
        process = context.Process(target=child, args=(setting, there, count, steps), daemon=True)
        process.start()
        there.close()
        for name in ours:
            os.environ.pop(name)
        children[setting] = here
        message = here.recv()  # loads one after another, up to the first step
        assert message == ("ready",), message
    seconds: dict[str, list[float]] = {setting: [] for setting in settings}
    facts: dict[str, dict[str, Any]] = {}
    products: list[tuple[float, float]] = []
    while len(facts) < len(settings):
        for setting in settings:
            if setting in facts:
                continue
            pipe = children[setting]
            pipe.send("go")
            seconds[setting].append(pipe.recv()[1])
            kind, *rest = pipe.recv()
            if kind == "done":
                facts[setting] = rest[0]
        products.append(matrix_rate())
        print(f"\r{len(products)} rounds", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    report(settings, count, steps, seconds, facts, sum(o for o, _ in products) / sum(s for _, s in products))


def report(
    settings: tuple[str, ...], count: int, steps: int, seconds: dict[str, list[float]], facts: dict[str, Any],
    matrix: float,
) -> None:  # fmt: skip
    from tabulate import tabulate

    from meetara_nb.params import bases

    train, _ = samples_of(count)
    shape = bases()["smollm2-135m-q4_1"].shape
    weights = shape.layers * sum(a * b for a, b in shape.matrices.values())
    rows, rates = [], {}
    for setting in settings:
        few = FEW if setting == "trl as it comes" else steps
        seen = train if setting == "trl packing" else train[: BATCH * few]
        trained, tokens = sum(sum(s.trained) for s in seen), sum(len(s.ids) for s in seen)
        spent = sum(seconds[setting])
        rates[setting] = trained / spent
        used = 4.0 * weights * tokens / spent / matrix
        rows.append([
            setting, len(seconds[setting]), f"{spent:.0f}", f"{rates[setting]:.1f}", f"{tokens / spent:.0f}",
            f"{statistics.median(seconds[setting]):.2f}", f"{facts[setting]['peak_bytes'] / 1e9:.2f}",
            f"{facts[setting]['held_out']:.4f}", facts[setting]["optimizer"], f"{used:.0%}",
        ])  # fmt: skip
    heads = ["setting", "steps", "s", "trained tokens/s", "tokens/s", "median step s", "peak GB", "held-out loss",
             "optimizer", "of matrix rate"]  # fmt: skip
    print(tabulate(rows, heads, disable_numparse=True))
    print(
        f"matrix products of the base's shapes: {matrix / 1e9:.0f} GFLOP/s. The last column is the work of a plain "
        "forward and backward\npass through the frozen linear layers, as a share of that rate: tokens that are "
        "computed once for several samples count for each."
    )
    if "trl" in rates:
        best = max(("trl", "trl packing"), key=lambda name: rates[name])
        loss = facts["engine"]["held_out"] / facts[best]["held_out"] - 1
        print(f"engine : better TRL ({best}) = {rates['engine'] / rates[best]:.2f}; held-out loss {loss:+.2%}")
        print(f"engine : TRL as it comes = {rates['engine'] / rates['trl as it comes']:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=512, help=f"samples to train on, a multiple of {BATCH}")
    parser.add_argument("--ablation", action="store_true", help="what each part of the engine brings, in 8 steps")
    asked = parser.parse_args()
    if asked.ablation:
        measure(PARTS, 64, 8)
    else:
        measure(SETTINGS, asked.samples, asked.samples // BATCH)


if __name__ == "__main__":
    main()
